"""Adapters of several tasks as one change of the weights, each way with the error that it makes.

* ``cat``: the factors side by side, whose product is the exact sum Σ_t B_t A_t; ranks add up.
* ``svd``: the best approximation of that sum with a given rank (Eckart & Young 1936), from the factors alone.
* ``ties``: Yadav et al. 2023 (arXiv 2306.01708, algorithm 1): of each task's change the ``density`` of largest entries is
  kept; where signs disagree the one with the larger total wins; entries of that sign are averaged.
* ``dare``: Yu et al. 2023 (arXiv 2311.03099, eq. 2): of each task's change a random ``density`` of the entries is kept and
  divided by ``density``, then all are summed.

``ties`` and ``dare`` work on the full changes B_t A_t, which they leave with full rank. Departure: TIES trims each layer by
itself, where the paper trims all layers as one vector, so that no more than one layer's changes are in memory at once.

An error is ‖M − S‖ / ‖S‖ (Frobenius) of what came out, M, against the exact sum S in float64. It says how far the merged
model is from the one that was trained with all adapters summed, not how good it is.

Letters: T tasks, O outputs of a layer, I inputs, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from continual.errors import CompositionError, SpecError, unknown
from continual.models.lowrank import Fold, stack_folds

Method = Literal["cat", "svd", "ties", "dare"]
METHODS: tuple[str, ...] = get_args(Method)
DENSITY = 0.2
"""What TIES keeps in its paper."""


@dataclass
class Merged:
    """What became of the adapters.

    Attributes:
        folds: layer → A (r, I) and B (O, r), float32, where the result has factors.
        deltas: layer → change (O, I), float32, where it has none.
        errors: layer → relative error against the exact sum.
        error: of all layers together.
    """

    method: Method
    folds: dict[str, Fold] = field(default_factory=dict)
    deltas: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    error: float = 0.0

    def delta(self, layer: str) -> Tensor:
        """The change of one layer's weight, (O, I)."""
        if layer in self.deltas:
            return self.deltas[layer]
        A, B = self.folds[layer]
        return B @ A


@torch.no_grad()
def merge(
    adapters: Sequence[Mapping[str, Fold]],
    method: Method = "cat",
    *,
    rank: int | None = None,
    density: float | None = None,
    scale: float = 1.0,
    generator: torch.Generator | None = None,
) -> Merged:
    """One change of the weights from those of several tasks.

    Args:
        adapters: of each task, layer → its fold; a task may lack a layer, or have it with rank 0.
        rank: of the result, at most; needed by ``svd``, and for the others null leaves it as it comes out. What a lower
            rank costs is in the error.
        density: share of entries that ``ties`` and ``dare`` keep, in (0, 1]; null for 0.2.
        scale: what the result is multiplied with, λ of both papers.
        generator: CPU generator of what ``dare`` keeps.

    Raises:
        SpecError: an unknown method, or a value out of its range.
        CompositionError: no adapter to merge.
    """
    check_merge(adapters, method, rank=rank, density=density, scale=scale, generator=generator)
    names = list(dict.fromkeys(name for folds in adapters for name, fold in folds.items() if fold[0].shape[0]))
    found = Merged(method)
    squares: list[tuple[float, float]] = []
    for name in names:
        folds = [folds[name] for folds in adapters if name in folds and folds[name][0].shape[0]]
        A, B = stack_folds(folds)
        exact_OI = B.double() @ A.double()
        if method in ("cat", "svd"):
            found.folds[name] = (A, B * scale) if rank is None else _truncated(A, B * scale, rank)
        else:
            deltas_TOI = torch.stack([b @ a for a, b in folds])
            kept = DENSITY if density is None else density
            delta_OI = scale * (_ties(deltas_TOI, kept) if method == "ties" else _dare(deltas_TOI, kept, generator))
            if rank is None:
                found.deltas[name] = delta_OI
            else:
                found.folds[name] = _best(delta_OI, rank)
        wrong = float((found.delta(name).double() - exact_OI).square().sum())
        right = float(exact_OI.square().sum())
        squares.append((wrong, right))
        found.errors[name] = _ratio(wrong, right)
    found.error = _ratio(sum(wrong for wrong, _ in squares), sum(right for _, right in squares))
    return found


def check_merge(
    adapters: Sequence[Mapping[str, Fold]],
    method: str,
    *,
    rank: int | None = None,
    density: float | None = None,
    scale: float = 1.0,
    generator: torch.Generator | None = None,
) -> None:
    """Raise what :func:`merge` raises for these arguments, and merge nothing."""
    if method not in METHODS:
        raise SpecError(unknown("way to merge adapters", method, METHODS))
    if not any(fold[0].shape[0] for folds in adapters for fold in folds.values()):
        raise CompositionError("there is no adapter to merge: train at least one experience first.")
    if rank is not None and rank < 1:
        raise SpecError(f"the rank of merged adapters is {rank}: give 1 or more.")
    if method == "svd" and rank is None:
        raise SpecError(
            "'svd' approximates the sum of adapters with a rank that you choose: give the rank, or take 'cat'."
        )
    if density is not None and method in ("cat", "svd"):
        raise SpecError(f"density is read by 'ties' and 'dare', and '{method}' keeps every entry: leave it out.")
    if density is not None and not 0 < density <= 1:
        raise SpecError(f"the density is {density}: it is the share of entries kept, above 0 and at most 1.")
    if not (math.isfinite(scale) and scale > 0):
        raise SpecError(f"the scale of merged adapters is {scale}: give a number above 0.")
    if method == "dare" and generator is None:
        raise SpecError("'dare' keeps entries at random: give a torch.Generator.")


def _ties(deltas_TOI: Tensor, density: float) -> Tensor:
    flat_TN = deltas_TOI.flatten(1)
    kept = max(1, round(density * flat_TN.shape[1]))
    places_Tk = flat_TN.abs().topk(kept, dim=1).indices
    trimmed_TN = torch.zeros_like(flat_TN).scatter_(1, places_Tk, flat_TN.gather(1, places_Tk))
    elected_N = trimmed_TN.sum(0).sign()
    agrees_TN = (trimmed_TN.sign() == elected_N) & (trimmed_TN != 0)
    mean_N = (trimmed_TN * agrees_TN).sum(0) / agrees_TN.sum(0).clamp(min=1)
    return mean_N.view(deltas_TOI.shape[1:])


def _dare(deltas_TOI: Tensor, density: float, generator: torch.Generator | None) -> Tensor:
    drawn_TOI = torch.rand(deltas_TOI.shape, generator=generator).to(deltas_TOI.device)
    return (deltas_TOI * (drawn_TOI < density)).sum(0) / density


def _truncated(A: Tensor, B: Tensor, rank: int) -> Fold:
    """The best approximation of B A with this rank, without forming the product."""
    Qb, Rb = torch.linalg.qr(B.double())
    Qa, Ra = torch.linalg.qr(A.double().T)
    U, s, Vh = torch.linalg.svd(Rb @ Ra.T, full_matrices=False)
    return _fold(Qb @ U, s, Vh @ Qa.T, rank)


def _best(delta_OI: Tensor, rank: int) -> Fold:
    U, s, Vh = torch.linalg.svd(delta_OI.double(), full_matrices=False)
    return _fold(U, s, Vh, rank)


def _fold(U: Tensor, s: Tensor, Vh: Tensor, rank: int) -> Fold:
    roots_r = s[:rank].sqrt()
    A, B = roots_r[:, None] * Vh[:rank], U[:, :rank] * roots_r
    return A.float().contiguous(), B.float().contiguous()


def _ratio(wrong: float, right: float) -> float:
    if right == 0:
        return 0.0 if wrong == 0 else math.inf
    return math.sqrt(wrong / right)
