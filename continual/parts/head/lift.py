"""What heads without gradients do with a feature before they add it up: normalise it, lift it to random features.

* ``relu``: max(0, f W) with W ~ N(0, 1), the random projection of McDonnell et al. 2023 (RanPAC, arXiv 2307.02251).
* ``fourier``: √(2/M) cos(f W + φ) with W ~ N(0, 1/s²), φ ~ U[0, 2π): the inner product of two rows tends to the
  kernel exp(−‖f − g‖² / 2s²) (Rahimi & Recht 2007, "Random Features for Large-Scale Kernel Machines").

``orthogonal`` takes √P · H S₁ H S₂ H S₃ in the place of a Gaussian W, block by block: H the orthonormal Hadamard matrix of
size P (D filled up with zeros to a power of two), S random signs (Yu et al. 2016, "Orthogonal Random Features", arXiv
1610.09072, eq. 6). Rows of one block are orthogonal, which estimates kernels with less noise; what is held are 3 signs for each
random feature in the place of D numbers, and the product takes P · (√P + √P) steps for each row and factor, H being the Kronecker
product of two small matrices.

Letters: B rows, D features, M random features, P features filled up to a power of two, N blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Activation = Literal["relu", "fourier"]
Projection = Literal["gaussian", "orthogonal"]


class Lift(nn.Module):
    """Features as a head adds them up.

    Args:
        normalize: L2-normalise each row first.
        dimension: M; None leaves the features as they are.
        bandwidth: s of ``fourier``.
        projection: of Gaussian numbers, or orthogonal.
        center: take ``mean`` away from each row, and normalise it again.

    Attributes:
        mean: float32 (D,), set by the owner; None before it is known.
    """

    weight: Tensor
    phase: Tensor

    def __init__(
        self,
        *,
        normalize: bool,
        dimension: int | None = None,
        activation: Activation = "relu",
        bandwidth: float = 1.0,
        projection: Projection = "gaussian",
        center: bool = False,
    ) -> None:
        super().__init__()
        self.normalize, self.dimension, self.activation, self.bandwidth = normalize, dimension, activation, bandwidth
        self.projection, self.center = projection, center
        self.mean: Tensor | None
        self.register_buffer("mean", None, persistent=False)
        self.register_buffer("weight", torch.zeros(0, 0), persistent=False)
        self.register_buffer("phase", torch.zeros(0), persistent=False)

    def width(self, features: int) -> int:
        """How many features come out of ``features``."""
        return features if self.dimension is None else self.dimension

    def draw(self, features: int, generator: torch.Generator) -> None:
        """Draw the projection, once; later calls do nothing."""
        if self.dimension is None or self.weight.numel():
            return
        if self.projection == "orthogonal":
            width = filled(features)
            signs = torch.randint(0, 2, (-(-self.dimension // width), 3, width), generator=generator)
            self.weight = (2 * signs - 1).to(self.weight.device, torch.int8)
            if self.activation == "fourier":
                self.phase = (torch.rand(self.dimension, generator=generator) * (2 * math.pi)).to(self.phase.device)
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
        if self.mean is not None:
            features_BD = features_BD - self.mean.to(features_BD.dtype)
            if self.normalize:
                features_BD = F.normalize(features_BD, dim=1)
        if self.dimension is None:
            return features_BD
        if self.projection == "orthogonal":
            scale = 1.0 if self.activation == "relu" else 1.0 / self.bandwidth
            projected_BM = scale * rotated(features_BD, self.weight)[:, : self.dimension]
        else:
            projected_BM = features_BD @ self.weight.to(features_BD.dtype)
        if self.activation == "relu":
            return projected_BM.relu()
        return math.sqrt(2 / self.dimension) * (projected_BM + self.phase.to(projected_BM.dtype)).cos()

    def drawn(self) -> dict[str, Tensor | None]:
        """What was drawn, and the mean, for the state of the part; empty where there is neither."""
        found = {} if self.dimension is None else {"weight": self.weight, "phase": self.phase}
        return {**found, "mean": self.mean} if self.center else dict(found)

    def load_drawn(self, drawn: Mapping[str, Tensor | None]) -> None:
        """Go on with what :meth:`drawn` gave."""
        for name, tensor in drawn.items():
            setattr(self, name, None if tensor is None else tensor.to(self.weight.device, copy=True))


def filled(features: int) -> int:
    """P, the next power of two."""
    return 1 << max(features - 1, 0).bit_length()


def rotated(features_BD: Tensor, signs_N3P: Tensor) -> Tensor:
    """√P · H S₁ H S₂ H S₃ f for each block, (B, N · P) in the precision of ``features_BD``."""
    width = signs_N3P.shape[2]
    value_BP = F.pad(features_BD, (0, width - features_BD.shape[1]))
    blocks = []
    for block_3P in signs_N3P.to(features_BD.dtype):
        turned_BP = value_BP
        for sign_P in block_3P:
            turned_BP = hadamard(turned_BP * sign_P)
        blocks.append(turned_BP)
    return math.sqrt(width) * torch.cat(blocks, 1)


def hadamard(value_BP: Tensor) -> Tensor:
    """Each row times the orthonormal Hadamard matrix of size P, a power of two."""
    width = value_BP.shape[1]
    rows = 1 << (width.bit_length() - 1) // 2
    left, right = (_small(size, value_BP.device, value_BP.dtype) for size in (rows, width // rows))
    return (left @ value_BP.view(-1, rows, width // rows) @ right).flatten(1)


@lru_cache(maxsize=32)
def _small(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    from scipy.linalg import hadamard as matrix

    return torch.from_numpy(matrix(size) / math.sqrt(size)).to(device, dtype)
