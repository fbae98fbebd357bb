"""Feature replay: features of earlier classes are drawn from Gaussians fitted to them; no row is kept.

Source: class-wise Gaussians in feature space, as in Zhu et al. 2021, "Prototype Augmentation and Self-Supervision for
Incremental Learning" (PASS, CVPR; one radius for all classes) and Zhang et al. 2023, "SLCA" (arXiv 2303.05118; a
covariance for each class). Departures: drawn features are trained on beside the current rows in every step, not after
them; the Gaussians come from float64 sums over all rows of a class, also of one that comes back in later experiences.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from continual.parts.head.class_sums import features_model, sweep
from continual.parts.part import Context
from continual.parts.replay.drawn import DrawnFeatures, DrawnSettings
from continual.parts.replay.gaussians import Covariance, Gaussians
from continual.spec import Spec
from continual.streams.experience import Experience


class GaussianReplaySettings(DrawnSettings):
    """Settings of :class:`GaussianReplay`.

    Attributes:
        covariance: ``diagonal``, one variance for each class and feature; ``shared``, one covariance for all classes;
            ``full``, one for each class, which takes 12 · D² bytes a class.
        share: part of the rows of a step that are drawn (:class:`~continual.parts.replay.drawn.DrawnSettings`).
    """

    kind: Literal["gaussian"] = "gaussian"
    covariance: Covariance = "diagonal"


class GaussianReplay(DrawnFeatures):
    """Trains the head on features drawn from the Gaussians of earlier classes (see :class:`GaussianReplaySettings`).

    It keeps sums, sums of squares and counts of classes. A class of one row is given up with it; any other row that must
    leave them too needs them computed anew.
    """

    Settings: ClassVar[type[Spec]] = GaussianReplaySettings
    settings: GaussianReplaySettings

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.gaussians = Gaussians(self.settings.covariance)

    def attach(self, context: Context) -> None:
        super().attach(context)
        self.gaussians.to(context.device)

    def known(self) -> int:
        return len(self.gaussians)

    def draw(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return self.gaussians.draw(rows, generator)

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
