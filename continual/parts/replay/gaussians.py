"""One Gaussian for the features of each class, from float64 sums, and draws from them.

Letters: B rows, R rows drawn, D features, K classes, k classes with rows.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from continual.parts.head.class_sums import ClassSums
from continual.state import tensor_bytes

Covariance = Literal["diagonal", "shared", "full"]


class Gaussians:
    """Sums of all rows of each class; the sum of a class of one row is that row, and can be given up.

    Args:
        covariance: ``diagonal``, one variance for each class and feature; ``shared``, one covariance for all classes,
            about the mean of each; ``full``, a covariance for each class. All are divided by the number of rows.

    Attributes:
        sums: rows and sums of each class, for ``shared`` the second moments as well.
        squares: ``diagonal``: sums of squares float64 (K, D). ``full``: sums of outer products float64 (K, D, D). Else
            None.
    """

    def __init__(self, covariance: Covariance) -> None:
        self.covariance = covariance
        self.sums = ClassSums(second=covariance == "shared")
        self.squares: Tensor | None = None if covariance == "shared" else torch.zeros(0, dtype=torch.float64)
        self._known_k = torch.zeros(0, dtype=torch.int64)
        self._mean_KD = torch.zeros(0, 0)
        self._factor = torch.zeros(0)

    def grow(self, classes: int, features: int) -> None:
        """Have at least ``classes`` classes, of ``features`` features."""
        self.sums.grow(classes, features)
        if self.squares is not None and classes > len(self.squares):
            shape = (features,) if self.covariance == "diagonal" else (features, features)
            grown = self.sums.sums_KD.new_zeros(classes, *shape)
            grown[: len(self.squares)] = self.squares.reshape(-1, *shape)
            self.squares = grown

    def add(
        self, features_BD: Tensor, labels_B: Tensor, classes: tuple[int, ...], rows_B: Tensor | None = None
    ) -> None:
        """Add rows, float64 (B, D) with ids int64 (B,), of ``classes``; those with another label count for nothing."""
        self.sums.add(features_BD, labels_B, rows_B)
        if self.squares is None:
            return
        for label in classes:
            own_BD = features_BD * (labels_B == label)[:, None]
            if self.covariance == "diagonal":
                self.squares[label] += own_BD.square().sum(0)
            else:
                self.squares[label].addmm_(own_BD.T, own_BD)

    def fit(self) -> None:
        """Bring means and covariances up to date with the sums."""
        self.sums.close()
        self._known_k = self.sums.counts_K.nonzero().flatten().cpu()
        mean_KD = self.sums.means_KD()
        self._mean_KD = mean_KD.float()
        if self.covariance == "shared":
            self._factor = root(self.sums.within_DD())
            return
        assert self.squares is not None
        count_K = self.sums.counts_K.clamp(min=1)
        if self.covariance == "diagonal":
            variance_KD = self.squares / count_K[:, None] - mean_KD.square()
            self._factor = variance_KD.clamp(min=0).sqrt().float()
        else:
            self._factor = torch.zeros_like(self.squares, dtype=torch.float32)
            for label in self._known_k.tolist():
                mean_D = mean_KD[label]
                self._factor[label] = root(self.squares[label] / count_K[label] - torch.outer(mean_D, mean_D))

    def erase(self, rows: Tensor) -> int:
        """Take out rows that are the only one of their class; returns how many there were."""
        erased = self.sums.erase(rows)
        if erased:
            if self.squares is not None:
                self.squares[self.sums.counts_K == 0] = 0.0
            self.fit()
        return erased

    def __len__(self) -> int:
        """Classes that can be drawn."""
        return len(self._known_k)

    def draw(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Features float32 (R, D) and labels int64 (R,), every known class equally likely."""
        device, width = self._mean_KD.device, self._mean_KD.shape[1]
        labels_R = self._known_k[torch.randint(len(self), (rows,), generator=generator)].to(device)
        noise_RD = torch.randn(rows, width, generator=generator).to(device)
        if self.covariance == "diagonal":
            return self._mean_KD[labels_R] + self._factor[labels_R] * noise_RD, labels_R
        if self.covariance == "shared":
            return self._mean_KD[labels_R] + noise_RD @ self._factor.T, labels_R
        return self._mean_KD[labels_R] + (self._factor[labels_R] @ noise_RD[:, :, None])[:, :, 0], labels_R

    def to(self, device: torch.device) -> None:
        """Move to ``device``."""
        self.sums.to(device)
        self._mean_KD, self._factor = self._mean_KD.to(device), self._factor.to(device)
        if self.squares is not None:
            self.squares = self.squares.to(device)

    def state_dict(self) -> dict[str, Any]:
        return {**self.sums.state_dict(), "squares": self.squares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums.load_state_dict(state)
        if self.squares is not None:
            self.squares = state["squares"].to(self.squares.device, torch.float64, copy=True)
        self.fit()

    def nbytes(self) -> int:
        """Bytes of the sums and of what was made of them."""
        return tensor_bytes([self.state_dict(), self._known_k, self._mean_KD, self._factor])


def root(covariance_DD: Tensor) -> Tensor:
    """A with A Aᵀ the covariance, float32 (D, D); directions without variance stay without."""
    values_D, vectors_DD = torch.linalg.eigh(covariance_DD)
    scaled_DD: Tensor = vectors_DD * values_D.clamp(min=0).sqrt()
    return scaled_DD.float()
