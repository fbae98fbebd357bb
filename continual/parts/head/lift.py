"""What heads without gradients do with a feature before they add it up: normalise it, lift it to random features.

* ``relu``: max(0, f W) with W ~ N(0, 1), the random projection of McDonnell et al. 2023 (RanPAC, arXiv 2307.02251).
* ``fourier``: √(2/M) cos(f W + φ) with W ~ N(0, 1/s²), φ ~ U[0, 2π): the inner product of two rows tends to the
  kernel exp(−‖f − g‖² / 2s²) (Rahimi & Recht 2007, "Random Features for Large-Scale Kernel Machines").

Letters: B rows, D features, M random features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Activation = Literal["relu", "fourier"]


class Lift(nn.Module):
    """Features as a head adds them up.

    Args:
        normalize: L2-normalise each row first.
        dimension: M; None leaves the features as they are.
        bandwidth: s of ``fourier``.
    """

    weight: Tensor
    phase: Tensor

    def __init__(
        self, *, normalize: bool, dimension: int | None = None, activation: Activation = "relu", bandwidth: float = 1.0
    ) -> None:
        super().__init__()
        self.normalize, self.dimension, self.activation, self.bandwidth = normalize, dimension, activation, bandwidth
        self.register_buffer("weight", torch.zeros(0, 0), persistent=False)
        self.register_buffer("phase", torch.zeros(0), persistent=False)

    def width(self, features: int) -> int:
        """How many features come out of ``features``."""
        return features if self.dimension is None else self.dimension

    def draw(self, features: int, generator: torch.Generator) -> None:
        """Draw the projection, once; later calls do nothing."""
        if self.dimension is None or self.weight.numel():
            return
        drawn_DM = torch.randn(features, self.dimension, generator=generator)
        if self.activation == "fourier":
            phase_M = torch.rand(self.dimension, generator=generator) * (2 * math.pi)
            drawn_DM, self.phase = drawn_DM / self.bandwidth, phase_M.to(self.phase.device)
        self.weight = drawn_DM.to(self.weight.device)

    def forward(self, features_BD: Tensor) -> Tensor:
        """(B, D) or (B, M), in the precision of ``features_BD``."""
        if self.normalize:
            features_BD = F.normalize(features_BD, dim=1)
        if self.dimension is None:
            return features_BD
        projected_BM = features_BD @ self.weight.to(features_BD.dtype)
        if self.activation == "relu":
            return projected_BM.relu()
        return math.sqrt(2 / self.dimension) * (projected_BM + self.phase.to(projected_BM.dtype)).cos()

    def drawn(self) -> dict[str, Tensor]:
        """What was drawn, for the state of the part; empty without a projection."""
        return {} if self.dimension is None else {"weight": self.weight, "phase": self.phase}

    def load_drawn(self, drawn: Mapping[str, Tensor]) -> None:
        """Go on with what :meth:`drawn` gave."""
        if self.dimension is not None:
            self.weight = drawn["weight"].to(self.weight.device, copy=True)
            self.phase = drawn["phase"].to(self.phase.device, copy=True)
