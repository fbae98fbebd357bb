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

from continual.parts.head.class_sums import ClassSums
from continual.parts.head.closed_form import ClosedForm, ClosedFormHead
from continual.parts.head.discriminant import Discriminants
from continual.parts.head.lift import Lift
from continual.spec import Spec


class SLDASettings(Spec):
    """Settings of :class:`SLDAHead`.

    Attributes:
        shrinkage: how far the covariance is drawn towards a multiple of the identity, in (0, 1]; more for fewer rows.
        normalize: L2-normalise the features of each row.
    """

    kind: Literal["slda"] = "slda"
    shrinkage: float = Field(default=1e-4, gt=0, le=1)
    normalize: bool = True


class SLDAHead(ClosedFormHead[ClassSums]):
    """Linear discriminants of the features, brought up to date at the end of each experience in one pass over its rows.

    It keeps sums, second moments and counts. A class of one row is given up with it; any other row that must leave them
    too needs them computed anew.
    """

    Settings: ClassVar[type[Spec]] = SLDASettings
    settings: SLDASettings

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        own = self.settings
        self.closed_form = ClosedForm(
            Discriminants(own.shrinkage), Lift(normalize=own.normalize), ClassSums(second=True)
        )
