"""What every model gives back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Output:
    """Logits of one batch, and the features that a head turned into them.

    Attributes:
        logits: (B, K), or (B, T, V) for a language model.
        features: (B, D) of the backbone, or None where the model has no head of ours.
    """

    logits: Tensor
    features: Tensor | None = None

    def detach(self) -> Output:
        """The same values, which no gradient follows."""
        return Output(self.logits.detach(), None if self.features is None else self.features.detach())
