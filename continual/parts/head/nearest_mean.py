"""Nearest class mean: no weights to train, nothing to forget while the features stay as they are.

A row gets the class whose mean of features over all rows seen so far is nearest (Mensink et al. 2013, TPAMI; in
continual learning Rebuffi et al. 2017, iCaRL, arXiv 1611.07725, and Janson et al. 2022, arXiv 2210.04428). Sums are
kept in float64, so the order of the rows does not matter.

    cosine:     logits_k = scale · (f/‖f‖)·(μ_k/‖μ_k‖)
    euclidean:  logits_k = −scale · ‖f − μ_k‖²

Familiarity is the largest of these without the scale.

Letters: B rows, D features, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from continual.parts.head.class_sums import ClassSums
from continual.parts.head.closed_form import ClosedForm, ClosedFormHead, Solution
from continual.parts.head.lift import Lift
from continual.spec import Spec

Distance = Literal["cosine", "euclidean"]


class NearestMeanSettings(Spec):
    """Settings of :class:`NearestMeanHead`.

    Attributes:
        distance: what nearest means.
        normalize: L2-normalise the features of each row, before they are averaged and before they are compared.
        scale: what logits are multiplied with; it changes confidences, never the class.
    """

    kind: Literal["nearest-mean"] = "nearest-mean"
    distance: Distance = "euclidean"
    normalize: bool = True
    scale: float = Field(default=1.0, gt=0)


@dataclass(frozen=True)
class NearestMeans:
    """The rule; its solution has ``means`` float32 (K, D)."""

    distance: Distance
    scale: float

    def solve(self, sums: ClassSums) -> Solution:
        return {"means": sums.means_KD().float()}

    def scores(self, solution: Solution, lifted_BM: Tensor) -> Tensor:
        means_KD = solution["means"]
        if self.distance == "cosine":
            return self.scale * (F.normalize(lifted_BM, dim=1) @ F.normalize(means_KD, dim=1).T)
        squares_BK = lifted_BM.square().sum(1, keepdim=True) + means_KD.square().sum(1)
        return self.scale * (2 * lifted_BM @ means_KD.T - squares_BK)

    def familiarity(self, solution: Solution, lifted_BM: Tensor, best_B: Tensor) -> Tensor:
        return best_B / self.scale


class NearestMeanHead(ClosedFormHead[ClassSums]):
    """Class means of the features, brought up to date at the end of each experience in one pass over its rows.

    It keeps sums and counts of classes. A class of one row is given up with it; any other row that must leave the means
    too needs them computed anew.
    """

    Settings: ClassVar[type[Spec]] = NearestMeanSettings
    settings: NearestMeanSettings

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        own = self.settings
        rule = NearestMeans(own.distance, own.scale)
        self.closed_form = ClosedForm(rule, Lift(normalize=own.normalize), ClassSums())
