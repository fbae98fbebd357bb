"""Parts that train the head on drawn features of earlier classes, beside the current rows in every step.

With t experiences met, the loss of a step is 1/t · current + (1 − 1/t) · drawn, as under ``weighting: experiences`` of
``rehearsal.py``: the term that such a part adds to the objective is (1 − 1/t) · (drawn − current).

Letters: R rows drawn, D features.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from continual.kinds import Objective
from continual.models.output import Output
from continual.parts.head.class_sums import check_steady, features_model
from continual.parts.part import Context, Part, Slot
from continual.parts.replay.mix import replay_count
from continual.spec import Spec
from continual.streams.experience import Experience
from continual.table import Batch


class DrawnSettings(Spec):
    """Settings of every :class:`DrawnFeatures`.

    Attributes:
        share: part of the rows of a step that are drawn, in (0, 1): round(full batch · share / (1 − share)), at least one.
            It sets how noisy the drawn part of the loss is, never how much it weighs.
    """

    share: float = Field(0.5, gt=0, lt=1)


class DrawnFeatures(Part):
    """What such parts share; each says what it draws from."""

    slot: ClassVar[Slot] = "replay"
    objectives: ClassVar[tuple[Objective, ...]] = ("classification",)
    needs_head: ClassVar[bool] = True
    needs_steady_features: ClassVar[bool] = True
    excludes: ClassVar[dict[str, str]] = {"replay": "both give the past its share of the loss: keep one of the two"}
    settings: DrawnSettings

    @abstractmethod
    def known(self) -> int:
        """Classes that can be drawn."""

    @abstractmethod
    def draw(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Features float32 (R, D) and labels int64 (R,), every known class equally likely."""

    def attach(self, context: Context) -> None:
        """Keep ``context``.

        Raises:
            CompositionError: the model gives logits itself.
        """
        super().attach(context)
        features_model(context, self.name)

    def begin(self, context: Context, experience: Experience) -> None:
        """Look whether the features are still those that were learnt.

        Raises:
            CompositionError: the backbone trains, and something has been learnt of its features already.
        """
        if self.known():
            check_steady(context, self.name)

    def loss(self, batch: Batch, output: Output) -> Tensor | None:
        """(1 − 1/t) · (loss of drawn features − loss of the current rows), or None while there is nothing to draw."""
        context, met = self.context, self.context.experience_index + 1
        if met <= 1 or not self.known():
            return None
        rows = max(replay_count(context.full_rows, self.settings.share), 1)
        features_RD, labels_R = self.draw(rows, context.randomness.generator(f"{self.kind} replay"))
        logits_RK = head_of(context, self.name)(features_RD)
        drawn = context.loss_rows(Output(logits_RK, features_RD), {"labels": labels_R}).mean()
        loss_B, weight_B = context.loss_rows(output, batch), batch.get("weight")
        current = loss_B.mean() if weight_B is None else (weight_B * loss_B).sum() / weight_B.sum()
        return (1 - 1 / met) * (drawn - current)


def head_of(context: Context, name: str) -> nn.Module:
    """The head of the model, which is there once training has begun."""
    head = features_model(context, name).head
    assert isinstance(head, nn.Module), "a head is there once training has begun"
    return head
