"""Ridge regression from random features onto one-hot classes, exact in any order of the rows.

Source: McDonnell et al. 2023, "RanPAC: Random Projections and Pre-trained Models for Continual Learning" (arXiv
2307.02251): h = max(0, f W) with a random W, Gram matrix G = Σ h hᵀ and class sums C = Σ h yᵀ added up over the stream,
logits = h (G + λI)⁻¹ C. Familiarity is the largest logit (Hendrycks et al. 2019, arXiv 1911.11132).

λ is a number, or chosen at the end of each experience on a fifth of its training rows (``held-out``; test rows are never
looked at): the λ with the smallest squared error there, for the regression on all other rows so far. Rows are picked by a
hash of their id, so their order and batches do not matter, but the choice does depend on how the stream is divided into
experiences; for one λ, the head does not. Departures: features are L2-normalised unless ``normalize`` is off; the
candidates are multiples of the mean eigenvalue of G instead of fixed numbers; their code fits on the rows of the latest
experience alone while it chooses.

Letters: B rows, M random features, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from continual.errors import TrainingError
from continual.parts.head.class_sums import ClassSums
from continual.parts.head.closed_form import ClosedForm, ClosedFormHead, Solution
from continual.parts.head.lift import Lift, Projection
from continual.parts.part import Context
from continual.parts.replay.select import row_keys
from continual.randomness import derive_seed
from continual.spec import Spec
from continual.streams.experience import Experience
from continual.table import IGNORED, Batch

CANDIDATES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Of λ, in units of the mean eigenvalue of the Gram matrix."""
_FIFTH = -(2**63) + 2**64 // 5
"""A fifth of all keys are smaller."""


class RidgeSettings(Spec):
    """Settings of :class:`RidgeHead`.

    Attributes:
        dimension: random features; memory and the time of an update grow with its square and its cube.
        strength: λ, or ``held-out``, which chooses it on a fifth of the training rows of each experience.
        projection: ``gaussian``, or ``orthogonal``, whose random features are less alike and which holds some signs in
            the place of a matrix (:mod:`~continual.parts.head.lift`).
        center: take away the mean of the first experience's features before they are lifted.
        normalize: L2-normalise the features of each row before they are lifted.
    """

    kind: Literal["ridge"] = "ridge"
    dimension: int = Field(default=2000, ge=1)
    projection: Projection = "gaussian"
    center: bool = False
    strength: Annotated[float, Field(gt=0)] | Literal["held-out"] = "held-out"
    normalize: bool = True


@dataclass
class Ridge:
    """The rule; its solution has ``weight`` float32 (M, K)."""

    strength: float | None

    def solve(self, sums: ClassSums) -> Solution:
        second_MM = sums.second_DD
        assert second_MM is not None and self.strength is not None
        weight_MK = ridge_weights(second_MM, sums.sums_KD, self.strength)
        if weight_MK is None:
            raise TrainingError(
                f"head/ridge with strength {self.strength:g} has no solution in float64: raise strength, or take 'held-out'."
            )
        return {"weight": weight_MK.float()}

    def scores(self, solution: Solution, lifted_BM: Tensor) -> Tensor:
        return lifted_BM @ solution["weight"]

    def familiarity(self, solution: Solution, lifted_BM: Tensor, best_B: Tensor) -> Tensor:
        return best_B


def ridge_weights(gram_MM: Tensor, sums_KM: Tensor, strength: float) -> Tensor | None:
    """(G + λI)⁻¹ C, float64 (M, K); None where G + λI is not positive definite to the precision of float64."""
    shifted_MM = gram_MM.clone()
    shifted_MM.diagonal().add_(strength)
    factor_MM, failed = torch.linalg.cholesky_ex(shifted_MM)
    return None if bool(failed) else torch.cholesky_solve(sums_KM.T, factor_MM)


def choose_strength(sums: ClassSums, held: ClassSums) -> float | None:
    """The λ among the candidates with the smallest squared error on the rows of ``held``, which ``sums`` hold as well.

    The regression is on the others. With H and D the Gram matrix and class sums of the held-out rows, the squared error
    of weights W is Σ|y|² − 2⟨W, D⟩ + ⟨W, H W⟩. None where there are no rows to fit, or none held out.
    """
    all_MM, held_MM = sums.second_DD, held.second_DD
    assert all_MM is not None and held_MM is not None
    if not bool(held.counts_K.any()) or bool(held.counts_K.sum() == sums.counts_K.sum()):
        return None
    gram_MM, sums_KM = all_MM - held_MM, sums.sums_KD - held.sums_KD
    unit = float(all_MM.diagonal().mean())
    best: tuple[float, float] | None = None
    for candidate in CANDIDATES:
        weight_MK = ridge_weights(gram_MM, sums_KM, candidate * unit) if unit > 0 else None
        if weight_MK is None:
            continue
        fit = (weight_MK * (held_MM @ weight_MK)).sum() - 2 * (weight_MK * held.sums_KD.T).sum()
        if best is None or float(fit) <= best[0]:
            best = float(fit), candidate * unit
    return None if best is None else best[1]


class RidgeHead(ClosedFormHead[ClassSums]):
    """Ridge regression on random features, brought up to date at the end of each experience in one pass over its rows.

    It keeps sums, the Gram matrix and counts. A class of one row is given up with it; any other row that must leave them
    too needs them computed anew.

    Attributes:
        strength: λ of the last update, None before the first.
    """

    Settings: ClassVar[type[Spec]] = RidgeSettings
    settings: RidgeSettings

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        own = self.settings
        self.rule = Ridge(None if own.strength == "held-out" else own.strength)
        lift = Lift(
            normalize=own.normalize,
            dimension=own.dimension,
            activation="relu",
            projection=own.projection,
            center=own.center,
        )
        self.closed_form = ClosedForm(self.rule, lift, ClassSums(second=True))

    @property
    def strength(self) -> float | None:
        return self.rule.strength

    def end(self, context: Context, experience: Experience) -> None:
        """Add the experience's rows, choose the strength where it is not given, and solve."""
        if self.settings.strength != "held-out":
            super().end(context, experience)
            return
        sums = self.closed_form.held
        held = ClassSums(second=True)
        held.to(context.device)
        held.grow(len(sums.counts_K), self.settings.dimension)
        seed = derive_seed(context.randomness.seed, "held-out rows")

        def also(lifted_BM: Tensor, batch: Batch) -> None:
            chosen_B = row_keys(batch["row"], seed) < _FIFTH
            held.add(lifted_BM, batch["labels"].masked_fill(~chosen_B, IGNORED))

        self.closed_form.collect(context, experience.train, also)
        self.rule.strength = choose_strength(sums, held) or self.rule.strength or self._unit()
        self.closed_form.solve()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "strength": self.rule.strength}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rule.strength = state["strength"]
        super().load_state_dict(state)

    def _unit(self) -> float:
        """What stands in where nothing could be held out yet: the mean eigenvalue of the Gram matrix."""
        second_MM = self.closed_form.held.second_DD
        assert second_MM is not None
        return float(second_MM.diagonal().mean()) or 1.0
