"""Nearest neighbours among the features of earlier rows: nothing to train, nothing forgotten, every row kept or a few.

Source: the weighted vote of Wu et al. 2018, "Unsupervised Feature Learning via Non-parametric Instance Discrimination"
(arXiv 1805.01978, section 3.4): with s_i = −½ ‖f − g_i‖² (for features of length 1 their f·g_i − 1),

    logits_k = log of the share of class k in Σ exp(s_i / τ) over the ``neighbours`` rows with the largest s_i

so that the softmax of the logits is the vote. A class without a neighbour has the share that its nearest row would have, times
:data:`BEHIND`: it stays below all others, and in the task scenario the classes of a row's own task are told apart also where none
of its neighbours is one of theirs. Familiarity is the negative distance to the last of these rows (Sun et al.
2022, "Out-of-Distribution Detection with Deep Nearest Neighbors", arXiv 2204.06507).

It keeps the features, labels and ids of rows, no text and no pixels, though features tell of those. ``per_class`` bounds
them: a random few of each class, the same in any order of the rows.

Letters: B rows, N rows kept, D features, K classes, n neighbours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from continual.parts.head.closed_form import UNKNOWN, ClosedForm, ClosedFormHead, Solution
from continual.parts.head.feature_rows import FeatureRows
from continual.parts.head.lift import Lift
from continual.spec import Spec
from continual.state import tensor_bytes

BLOCK = 2**17
"""Rows compared at once."""
BEHIND = 1e-12
"""What is left of the share of a class without a neighbour."""


class NeighboursSettings(Spec):
    """Settings of :class:`NeighboursHead`.

    Attributes:
        neighbours: rows that vote; all where there are fewer.
        temperature: τ; larger ones let the neighbours count more alike.
        per_class: rows kept of each class; null keeps all, and memory grows with the stream.
        normalize: L2-normalise the features of each row, before they are kept and before they are compared.
    """

    kind: Literal["neighbours"] = "neighbours"
    neighbours: PositiveInt = 20
    temperature: PositiveFloat = 0.07
    per_class: PositiveInt | None = None
    normalize: bool = True


@dataclass(frozen=True)
class Vote:
    """The rule; its solution has ``rows`` float32 (N, D), ``halves`` float32 (N,), ½ ‖g‖², ``labels`` int64 (N,) and
    ``counts`` int64 (K,). Where it must ``center``, a ``centre`` float32 (D,) is taken from rows and queries, since far from the
    origin float32 would lose the differences."""

    neighbours: int
    temperature: float
    center: bool = False

    def solve(self, held: FeatureRows) -> Solution:
        features_ND, more = held.features_ND, {}
        if self.center:
            more = {"centre": features_ND.mean(0, dtype=torch.float64).float()}
            features_ND = features_ND - more["centre"]
        halves_N = 0.5 * features_ND.square().sum(1)
        return {"rows": features_ND, "halves": halves_N, "labels": held.labels_N, "counts": held.counts_K, **more}

    def scores(self, solution: Solution, lifted_BM: Tensor) -> Tensor:
        nearest_Bn, place_Bn, best_BK = self.nearest(solution, lifted_BM)
        vote_Bn = nearest_Bn / self.temperature
        total_B1 = vote_Bn.logsumexp(1, keepdim=True)
        voted_BnK = F.one_hot(solution["labels"][place_Bn], len(solution["counts"])).bool()
        share_BK = vote_Bn[:, :, None].where(voted_BnK, -torch.inf).logsumexp(1) - total_B1
        behind_BK = best_BK / self.temperature - total_B1 + math.log(BEHIND)
        return torch.where(voted_BnK.any(1), share_BK, behind_BK).clamp(min=UNKNOWN / 2)

    def familiarity(self, solution: Solution, lifted_BM: Tensor, best_B: Tensor) -> Tensor:
        nearest_Bn, _, _ = self.nearest(solution, lifted_BM)
        return -(-2 * nearest_Bn[:, -1]).clamp(min=0).sqrt()

    def nearest(self, solution: Solution, lifted_BM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """−½ ‖f − g‖² of the nearest rows, float32 (B, n), nearest first; their places, int64 (B, n); and the same of the nearest
        row of each class, float32 (B, K), −∞ without one."""
        rows_ND, halves_N, labels_N = solution["rows"], solution["halves"], solution["labels"]
        lifted_BM = lifted_BM - solution["centre"] if self.center else lifted_BM
        best_BK = lifted_BM.new_full((len(lifted_BM), len(solution["counts"])), -torch.inf)
        count = min(self.neighbours, len(rows_ND))
        half_B1 = 0.5 * lifted_BM.square().sum(1, keepdim=True)
        best_Bn, place_Bn = lifted_BM.new_empty(len(lifted_BM), 0), halves_N.new_empty(len(lifted_BM), 0).long()
        for start in range(0, len(rows_ND), BLOCK):
            stop = start + BLOCK
            close_BN = lifted_BM @ rows_ND[start:stop].T - halves_N[start:stop] - half_B1
            best_BK.scatter_reduce_(1, labels_N[start:stop].expand_as(close_BN), close_BN, "amax")
            found_Bn, at_Bn = close_BN.topk(min(count, close_BN.shape[1]))
            both_B, places_B = torch.cat([best_Bn, found_Bn], 1), torch.cat([place_Bn, at_Bn + start], 1)
            best_Bn, order_Bn = both_B.topk(min(count, both_B.shape[1]))
            place_Bn = places_B.gather(1, order_Bn)
        return best_Bn, place_Bn, best_BK


class NeighboursHead(ClosedFormHead[FeatureRows]):
    """Rows vote for those they are nearest to; brought up to date at the end of each experience in one pass over its rows.

    It keeps features of rows, and gives up those of any row.
    """

    Settings: ClassVar[type[Spec]] = NeighboursSettings
    settings: NeighboursSettings

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        own = self.settings
        rule, held = Vote(own.neighbours, own.temperature, center=not own.normalize), FeatureRows(own.per_class)
        self.closed_form = ClosedForm(rule, Lift(normalize=own.normalize), held)

    def nbytes(self) -> int:
        """Bytes of what is kept, where the scores look it up, and of what they need beside it."""
        solution = self.closed_form.module.solution()
        shared = {"labels", "rows"} if self.settings.normalize else {"labels"}
        return tensor_bytes([self.closed_form.state_dict(), {k: v for k, v in solution.items() if k not in shared}])
