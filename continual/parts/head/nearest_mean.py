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

from continual.kinds import Objective
from continual.parts.head.class_sums import ClassSums
from continual.parts.head.closed_form import EXCLUDES, ClosedForm, Solution
from continual.parts.head.lift import Lift
from continual.parts.part import Context, Part, Slot
from continual.spec import Spec
from continual.streams.experience import Experience

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


class NearestMeanHead(Part):
    """Class means of the features, brought up to date at the end of each experience in one pass over its rows.

    It keeps sums and counts of classes. A class of one row is given up with it; any other row that must leave the means
    too needs them computed anew.
    """

    slot: ClassVar[Slot] = "head"
    Settings: ClassVar[type[Spec]] = NearestMeanSettings
    objectives: ClassVar[tuple[Objective, ...]] = ("classification",)
    needs_head: ClassVar[bool] = True
    needs_steady_features: ClassVar[bool] = True
    excludes: ClassVar[dict[str, str]] = EXCLUDES
    settings: NearestMeanSettings

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        own = self.settings
        rule = NearestMeans(own.distance, own.scale)
        self.closed_form = ClosedForm(rule, Lift(normalize=own.normalize), ClassSums())

    def attach(self, context: Context) -> None:
        super().attach(context)
        self.closed_form.attach(context, self.name)

    def begin(self, context: Context, experience: Experience) -> None:
        self.closed_form.begin(context, experience)

    def end(self, context: Context, experience: Experience) -> None:
        self.closed_form.end(context, experience)

    def grow_to(self, classes: int, context: Context) -> None:
        """Have at least ``classes`` outputs."""
        self.closed_form.grow_to(classes, context)

    def rows(self) -> Tensor:
        return self.closed_form.rows()

    def erase(self, rows: Tensor) -> int:
        return self.closed_form.erase(rows)

    def state_dict(self) -> dict[str, Any]:
        return self.closed_form.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.closed_form.load_state_dict(state, getattr(self, "context", None))

    def nbytes(self) -> int:
        return self.closed_form.nbytes()
