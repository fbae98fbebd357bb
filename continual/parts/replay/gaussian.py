"""Feature replay: features of earlier classes are drawn from Gaussians fitted to them; no row is kept.

Source: class-wise Gaussians in feature space, as in Zhu et al. 2021, "Prototype Augmentation and Self-Supervision for
Incremental Learning" (PASS, CVPR; one radius for all classes) and Zhang et al. 2023, "SLCA" (arXiv 2303.05118; a
covariance for each class). Departures: drawn features are trained on beside the current rows in every step, not after
them; the Gaussians come from float64 sums over all rows of a class, also of one that comes back in later experiences.

With t experiences met, the loss of a step is 1/t · current + (1 − 1/t) · drawn, as under ``weighting: experiences`` of
``rehearsal.py``: the term that this part adds to the objective is (1 − 1/t) · (drawn − current).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from continual.kinds import Objective
from continual.models.output import Output
from continual.parts.head.class_sums import check_steady, features_model, sweep
from continual.parts.part import Context, Part, Slot
from continual.parts.replay.gaussians import Covariance, Gaussians
from continual.spec import Spec
from continual.streams.experience import Experience
from continual.table import Batch

_NO_GRADIENTS = (
    "it has no gradients, and its sums hold every earlier row exactly: leave replay out, or take head/linear"
)


class GaussianReplaySettings(Spec):
    """Settings of :class:`GaussianReplay`.

    Attributes:
        covariance: ``diagonal``, one variance for each class and feature; ``shared``, one covariance for all classes;
            ``full``, one for each class, which takes 12 · D² bytes a class.
        share: part of the rows of a step that are drawn, in (0, 1): round(current · share / (1 − share)), at least one.
            It sets how noisy the drawn part of the loss is, never how much it weighs.
    """

    kind: Literal["gaussian"] = "gaussian"
    covariance: Covariance = "diagonal"
    share: float = Field(0.5, gt=0, lt=1)


class GaussianReplay(Part):
    """Trains the head on features drawn from the Gaussians of earlier classes (see :class:`GaussianReplaySettings`).

    It keeps sums, sums of squares and counts of classes. A class of one row is given up with it; any other row that must
    leave them too needs them computed anew.
    """

    slot: ClassVar[Slot] = "replay"
    Settings: ClassVar[type[Spec]] = GaussianReplaySettings
    objectives: ClassVar[tuple[Objective, ...]] = ("classification",)
    needs_head: ClassVar[bool] = True
    needs_steady_features: ClassVar[bool] = True
    excludes: ClassVar[dict[str, str]] = {
        "replay/rehearsal": "both give the past its share of the loss: keep one of the two",
        **dict.fromkeys(("head/nearest-mean", "head/slda", "head/klda", "head/ridge"), _NO_GRADIENTS),
    }
    settings: GaussianReplaySettings

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.gaussians = Gaussians(self.settings.covariance)

    def attach(self, context: Context) -> None:
        """Keep ``context``.

        Raises:
            CompositionError: the model gives logits itself.
        """
        super().attach(context)
        features_model(context, self.name)
        self.gaussians.to(context.device)

    def begin(self, context: Context, experience: Experience) -> None:
        """Look whether the features are still those that were added up.

        Raises:
            CompositionError: the backbone trains, and rows have been added up already.
        """
        if len(self.gaussians):
            check_steady(context, self.name)

    def loss(self, batch: Batch, output: Output) -> Tensor | None:
        """(1 − 1/t) · (loss of drawn features − loss of the current rows), or None while there is nothing to draw."""
        context, met = self.context, self.context.experience_index + 1
        if met <= 1 or not len(self.gaussians):
            return None
        share = self.settings.share
        rows = max(round(context.current_rows * share / (1 - share)), 1)
        features_RD, labels_R = self.gaussians.draw(rows, context.randomness.generator("gaussian replay"))
        head = features_model(context, self.name).head
        assert isinstance(head, nn.Module), "a head is there once training has begun"
        drawn = context.loss_rows(Output(head(features_RD), features_RD), {"labels": labels_R}).mean()
        loss_B, weight_B = context.loss_rows(output, batch), batch.get("weight")
        current = loss_B.mean() if weight_B is None else (weight_B * loss_B).sum() / weight_B.sum()
        return (1 - 1 / met) * (drawn - current)

    def end(self, context: Context, experience: Experience) -> None:
        """Add the experience's rows to the Gaussians of their classes."""
        features = features_model(context, self.name).feature_size
        assert features is not None
        self.gaussians.grow(max(experience.classes, default=-1) + 1, features)
        sweep(
            context,
            experience.train,
            lambda features_BD, batch: self.gaussians.add(
                features_BD, batch["labels"], experience.classes, batch.get("row")
            ),
        )
        self.gaussians.fit()

    def rows(self) -> Tensor:
        return self.gaussians.sums.rows()

    def erase(self, rows: Tensor) -> int:
        return self.gaussians.erase(rows)

    def state_dict(self) -> dict[str, Any]:
        return self.gaussians.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.gaussians.load_state_dict(state)

    def nbytes(self) -> int:
        return self.gaussians.nbytes()
