"""Linear discriminant analysis on random Fourier features, which is that of a Gaussian kernel.

Source: Momeni, Mazumder & Liu 2024, "Continual Learning Using a Kernel-Based Method Over Foundation Models" (KLDA, arXiv
2412.15571), for one set of random features (their ensemble, KLDA-E, is not built). Departures: the covariance is exact
in any order of the rows and shrunk as in ``slda.py``; the kernel's width is given as a standard deviation, for features
that are L2-normalised unless ``normalize`` is off.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from continual.parts.head.class_sums import ClassSums
from continual.parts.head.closed_form import ClosedForm, ClosedFormHead
from continual.parts.head.discriminant import Discriminants
from continual.parts.head.lift import Lift
from continual.spec import Spec


class KLDASettings(Spec):
    """Settings of :class:`KLDAHead`.

    Attributes:
        dimension: random features; memory and the time of an update grow with its square and its cube.
        bandwidth: standard deviation s of the kernel exp(−‖f − g‖² / 2s²).
        shrinkage: how far the covariance is drawn towards a multiple of the identity, in (0, 1].
        normalize: L2-normalise the features of each row before they are lifted.
    """

    kind: Literal["klda"] = "klda"
    dimension: int = Field(default=2000, ge=1)
    bandwidth: float = Field(default=2.0, gt=0)
    shrinkage: float = Field(default=1e-4, gt=0, le=1)
    normalize: bool = True


class KLDAHead(ClosedFormHead[ClassSums]):
    """Linear discriminants of random Fourier features, brought up to date at the end of each experience.

    It keeps sums, second moments and counts. A class of one row is given up with it; any other row that must leave them
    too needs them computed anew.
    """

    Settings: ClassVar[type[Spec]] = KLDASettings
    settings: KLDASettings

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        own = self.settings
        lift = Lift(normalize=own.normalize, dimension=own.dimension, activation="fourier", bandwidth=own.bandwidth)
        self.closed_form = ClosedForm(Discriminants(own.shrinkage), lift, ClassSums(second=True))
