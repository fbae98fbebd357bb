"""L2 to the last model: every weight is held alike where the last experience left it.

``loss + strength/2 sum_p (theta_p - theta~_p)^2``: EWC with a Fisher of 1, the plainest penalty and the one that others
must beat (Kirkpatrick et al. 2017, arXiv 1612.00796, fig. 2A, "L2"). Weight decay pulls to zero instead.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from continual.parts.part import Context, Part, Slot
from continual.parts.penalty.springs import Springs, WantedSpace, check_space
from continual.spec import Spec
from continual.streams.experience import Experience


class L2Settings(Spec):
    """Settings of :class:`L2`.

    Attributes:
        strength: ≥ 0; 0 switches the pull off.
        space: ``parameters`` holds the trainable parameters; ``weights`` the effective weights of adapted layers;
            ``auto`` takes ``weights`` where an adapter is replaced, or is AdaLoRA.
    """

    kind: Literal["l2"] = "l2"
    strength: float = Field(default=1.0, ge=0)
    space: WantedSpace = "auto"


class L2(Part):
    """Pulls weights back to where the last experience left them, all alike.

    In its first experience it does nothing. New rows of a head are held from the next experience on.
    """

    slot: ClassVar[Slot] = "penalty"
    Settings: ClassVar[type[Spec]] = L2Settings
    settings: L2Settings

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._springs = Springs()

    def attach(self, context: Context) -> None:
        super().attach(context)
        self._springs.release()

    def begin(self, context: Context, experience: Experience) -> None:
        """Refuse what cannot work before anything is trained.

        Raises:
            CompositionError: ``weights`` is asked for and there is no adapted layer.
        """
        self._springs.release()
        check_space(self.settings.space, context.model)

    def edit_gradients(self) -> None:
        """Add ``strength (theta - theta~)`` to the gradients; no sync of the device."""
        self._springs.pull(self.context, self.settings.strength)

    def end(self, context: Context, experience: Experience) -> None:
        """Move the anchor here."""
        self._springs.settle(self.settings.space, context.model)
        theta = self._springs.points(context)
        ones = {name: torch.ones(point.shape, device=point.device) for name, point in theta.items()}
        self._springs.quadratic.decay_and_move(ones, theta, 0.0)
        self._springs.release()

    def value(self) -> Tensor:
        """The penalty now, ``strength/2 sum (theta - theta~)^2``, a scalar tensor, no sync."""
        return self._springs.value(self.context, self.settings.strength)

    def state_dict(self) -> dict[str, Any]:
        return self._springs.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._springs.load_state_dict(state)
