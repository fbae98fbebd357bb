"""Streaming linear discriminant analysis: class means and one covariance, exact in any order of the rows.

Source: Hayes & Kanan 2020, "Lifelong Machine Learning with Deep Streaming Linear Discriminant Analysis" (arXiv
1909.01520). Departures: their covariance centres each row by the mean of its class at that moment, which depends on the
order of the rows; here sums are kept and every row is centred by the final mean of its class. They shrink towards
the identity; here the target is scaled by the mean variance, so that the scale of the features does not matter, and
features are L2-normalised unless ``normalize`` is off.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from continual.kinds import Objective
from continual.parts.head.class_sums import ClassSums
from continual.parts.head.closed_form import EXCLUDES, ClosedForm
from continual.parts.head.discriminant import Discriminants
from continual.parts.head.lift import Lift
from continual.parts.part import Context, Part, Slot
from continual.spec import Spec
from continual.streams.experience import Experience


class SLDASettings(Spec):
    """Settings of :class:`SLDAHead`.

    Attributes:
        shrinkage: how far the covariance is drawn towards a multiple of the identity, in (0, 1]; more for fewer rows.
        normalize: L2-normalise the features of each row.
    """

    kind: Literal["slda"] = "slda"
    shrinkage: float = Field(default=1e-4, gt=0, le=1)
    normalize: bool = True


class SLDAHead(Part):
    """Linear discriminants of the features, brought up to date at the end of each experience in one pass over its rows.

    It keeps sums, second moments and counts. A class of one row is given up with it; any other row that must leave them
    too needs them computed anew.
    """

    slot: ClassVar[Slot] = "head"
    Settings: ClassVar[type[Spec]] = SLDASettings
    objectives: ClassVar[tuple[Objective, ...]] = ("classification",)
    needs_head: ClassVar[bool] = True
    needs_steady_features: ClassVar[bool] = True
    excludes: ClassVar[dict[str, str]] = EXCLUDES
    settings: SLDASettings

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        own = self.settings
        self.closed_form = ClosedForm(
            Discriminants(own.shrinkage), Lift(normalize=own.normalize), ClassSums(second=True)
        )

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
