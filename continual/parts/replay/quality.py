"""Whether what a generator makes is good enough to be replayed: the classifier has to recognise it.

At the end of an experience a number of rows is made of every class known; the share that the classifier gives the class
that was asked for must reach a threshold for each, else the next experience is refused.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from continual.errors import TrainingError

BLOCK = 1024
"""Rows made at once."""


class Quality:
    """Shares of made rows that were recognised.

    Args:
        threshold: smallest share, over the classes; 0 asks for nothing.
        each: rows of each class made for the check.

    Attributes:
        classes: those that the generator in use has learnt, in order of arrival.
        shares: of each, in [0, 1].
    """

    def __init__(self, threshold: float, each: int) -> None:
        self.threshold, self.each = threshold, each
        self.classes: list[int] = []
        self.shares: list[float] = []

    def look(
        self,
        classes: list[int],
        latent: int,
        device: torch.device,
        draws: torch.Generator,
        right: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        """Take the shares.

        Args:
            classes: that the generator has learnt.
            right: bool (B,), which rows made for labels int64 (B,), on the device, from noise float32 CPU (B, latent) are
                recognised.
        """
        labels_M = torch.tensor(classes).repeat_interleave(self.each)
        noise_MZ = torch.randn(len(labels_M), latent, generator=draws)
        blocks = zip(torch.split(labels_M, BLOCK), torch.split(noise_MZ, BLOCK), strict=True)
        right_M = torch.cat([right(labels_B.to(device), noise_BZ) for labels_B, noise_BZ in blocks])
        shares: list[float] = right_M.view(-1, self.each).double().mean(1).tolist()
        self.classes, self.shares = list(classes), shares

    def require(self, name: str) -> None:
        """Raise :class:`TrainingError` where some class is not good enough."""
        worst = self._worst()
        if worst is not None:
            label, share = worst
            raise TrainingError(
                f"{name} does not replay from its generator: the classifier recognises {share:.0%} of the rows made for class "
                f"{label} and the threshold is {self.threshold:.0%}: train longer, give the generator a higher lr or more "
                "hidden units, lower the threshold, or take replay/rehearsal."
            )

    def report(self) -> str | None:
        """One sentence where some class is not good enough."""
        worst = self._worst()
        if worst is None:
            return None
        label, share = worst
        return (
            f"the classifier recognises {share:.0%} of the rows made for class {label}, fewer than the threshold of "
            f"{self.threshold:.0%}: the next experience will be refused."
        )

    def _worst(self) -> tuple[int, float] | None:
        """The class whose rows are recognised least, where that is below the threshold."""
        if not self.shares or min(self.shares) >= self.threshold:
            return None
        share = min(self.shares)
        return self.classes[self.shares.index(share)], share
