"""Linear discriminants with one covariance for all classes, solved from sums.

With class means μ_k, their mean m over all rows and the within-class covariance Σ, shrunk to Σ' = (1 − s) Σ +
s · tr(Σ)/M · I, a row f has the log density ratio to a Gaussian at m

    logits_k = (μ_k − m)ᵀ Σ'⁻¹ (f − m) − ½ (μ_k − m)ᵀ Σ'⁻¹ (μ_k − m)

which is the discriminant of Hayes & Kanan 2020 (arXiv 1909.01520; no priors) up to a number that is the same for all
classes of a row, and better conditioned. Familiarity is −min_k (f − μ_k)ᵀ Σ'⁻¹ (f − μ_k), the Mahalanobis score of
Lee et al. 2018 (arXiv 1807.03888, eq. 2).

Letters: B rows, M features (as they are, or lifted), K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from continual.parts.head.class_sums import ClassSums
from continual.parts.head.closed_form import Solution

_NOTHING = 1e-10
"""A covariance below this share of the second moments is rounding: rows do not differ from the mean of their class."""


@dataclass(frozen=True)
class Discriminants:
    """The rule; its solution has ``centre`` (M,), ``factor`` (M, M) lower, ``weight`` (K, M) and ``bias`` (K,), float32.

    Attributes:
        shrinkage: s, in (0, 1].
    """

    shrinkage: float

    def solve(self, sums: ClassSums) -> Solution:
        centre_M = sums.sums_KD.sum(0) / sums.counts_K.sum()
        factor_MM = torch.linalg.cholesky(self.covariance_MM(sums))
        offset_KM = (sums.means_KD() - centre_M) * (sums.counts_K > 0)[:, None]
        weight_KM = torch.cholesky_solve(offset_KM.T, factor_MM).T
        bias_K = -0.5 * (offset_KM * weight_KM).sum(1)
        found = {"centre": centre_M, "factor": factor_MM, "weight": weight_KM, "bias": bias_K}
        return {name: tensor.float().contiguous() for name, tensor in found.items()}

    def covariance_MM(self, sums: ClassSums) -> Tensor:
        """Σ' in float64; the identity where rows do not differ from the mean of their class (one row a class)."""
        within_MM, rows = sums.within_DD(), sums.counts_K.sum()
        second_MM = sums.second_DD
        assert second_MM is not None
        mean_variance = within_MM.diagonal().mean()
        nothing = mean_variance <= _NOTHING * second_MM.diagonal().mean() / rows
        identity_MM = torch.eye(len(within_MM), dtype=within_MM.dtype, device=within_MM.device)
        shrunk_MM = (1 - self.shrinkage) * within_MM + self.shrinkage * mean_variance * identity_MM
        return torch.where(nothing, identity_MM, shrunk_MM)

    def scores(self, solution: Solution, lifted_BM: Tensor) -> Tensor:
        return (lifted_BM - solution["centre"]) @ solution["weight"].T + solution["bias"]

    def familiarity(self, solution: Solution, lifted_BM: Tensor, best_B: Tensor) -> Tensor:
        offset_MB = (lifted_BM - solution["centre"]).T
        whitened_MB: Tensor = torch.linalg.solve_triangular(solution["factor"], offset_MB, upper=False)
        return 2 * best_B - whitened_MB.square().sum(0)
