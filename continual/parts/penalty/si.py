"""Synaptic intelligence: parameters are held by what they did for the loss while they were learnt.

``loss + c sum_p Omega_p (theta_p - theta~_p)^2`` with ``Omega_p = sum_k omega_p(k) / (Delta_p(k)^2 + xi)`` over the
experiences k learnt so far, Delta their total movement and theta~ where the last one ended (Zenke et al. 2017, arXiv
1703.04200, eq. 4 and 5; omega in :mod:`~continual.parts.penalty.path`). One anchor, so one quadratic, at constant time
and memory a step.

Departures: an omega below 0 (a parameter that moved uphill) counts as 0, as a spring cannot push; omega is taken from the
gradient without SI's own pull. Where early stopping goes back to an earlier epoch, the steps taken back stay in omega and
Delta is what is left of the movement.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from continual.models.output import Output
from continual.parts.part import Context, Part, Slot
from continual.parts.penalty.path import Path
from continual.parts.penalty.springs import Springs, check_finite, check_lasting
from continual.spec import Spec
from continual.streams.experience import Experience
from continual.table import Batch


class SISettings(Spec):
    """Settings of :class:`SI`.

    Attributes:
        strength: c ≥ 0; 0 switches the pull off.
        xi: the damping, xi > 0 in the paper and epsilon in others' programs: bounds Omega where a parameter hardly moved.
    """

    kind: Literal["si"] = "si"
    strength: float = Field(default=1.0, ge=0)
    xi: float = Field(default=0.1, gt=0)


class SI(Part):
    """Pulls parameters back to where the last experience left them, by what they have done for the loss so far.

    In its first experience it only watches. It works with every optimiser, since it looks at where parameters went.
    """

    slot: ClassVar[Slot] = "penalty"
    Settings: ClassVar[type[Spec]] = SISettings
    needs_lasting_parameters: ClassVar[bool] = True
    settings: SISettings

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._springs, self._path = Springs(), Path()

    def attach(self, context: Context) -> None:
        super().attach(context)
        self._springs.release()

    def begin(self, context: Context, experience: Experience) -> None:
        """Begin a path.

        Raises:
            CompositionError: the adapter is replaced at every experience.
        """
        check_lasting(self.name, context.model)
        self._springs.release()
        self._path.begin()

    def edit_gradients(self) -> None:
        """Look at the gradients, then add ``2 c Omega (theta - theta~)`` to them; no sync of the device."""
        self._path.before_step(self.context.parameters())
        self._springs.pull(self.context, 2 * self.settings.strength)

    def after_step(self, batch: Batch, output: Output) -> None:
        self._path.after_step()

    def end(self, context: Context, experience: Experience) -> None:
        """Add the experience's importances and move the anchor here.

        Raises:
            TrainingError: an importance that is not finite.
        """
        parameters = context.parameters()
        importance = {
            name: self._path.work[name].clamp(min=0) / (movement.square() + self.settings.xi)
            for name, movement in self._path.movement(parameters).items()
        }
        check_finite("path integral", importance)
        self._springs.settle("parameters", context.model)
        self._springs.quadratic.decay_and_move(importance, dict(parameters), 1.0)
        self._springs.release()
        self._path.begin()

    def value(self) -> Tensor:
        """The penalty now, ``c sum Omega (theta - theta~)^2``, a scalar tensor, no sync."""
        return self._springs.value(self.context, 2 * self.settings.strength)

    def state_dict(self) -> dict[str, Any]:
        return {**self._springs.state_dict(), "path": self._path.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._springs.load_state_dict(state)
        self._path.load_state_dict(state["path"])
