"""Averaged GEM: a step must not, to first order, raise the mean loss over rows of a memory.

Where the gradient g points against the gradient r of the memory's loss, it is projected onto the half-space that does
not: ``g - (g.r / (r.r + epsilon)) r`` where g.r < 0 (Chaudhry et al. 2019, arXiv 1812.00420, eq. 11; epsilon as in van de
Ven et al. 2022). Every step takes other rows of the memory, walking through it in shuffled order.

Departure: r is the gradient of the model in eval mode (:mod:`~continual.parts.projection.memory_gradient`). What is projected is
the gradient of the whole loss with the pull of penalties, before clipping; with an optimiser that is not plain SGD the
step itself may still point another way, there as in the paper.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from continual.kinds import Objective
from continual.parts.part import Context, Part, Slot
from continual.parts.penalty.springs import add_to_gradients
from continual.parts.projection.memory_gradient import memory_gradient
from continual.parts.replay.cycle import Cycle
from continual.parts.replay.store import Store
from continual.spec import Spec
from continual.streams.experience import Experience

INSTEAD = "take select: reservoir or experience-balanced"


class AGEMSettings(Spec):
    """Settings of :class:`AGEM`.

    Attributes:
        capacity: rows of the memory.
        select: ``reservoir`` keeps every row of the stream with equal probability; ``class-balanced`` and
            ``experience-balanced`` give each class or experience an equal share of the places.
        rows: rows of the memory that each step looks at.
        epsilon: added to the squared norm of r, > 0.
    """

    kind: Literal["agem"] = "agem"
    capacity: PositiveInt = 200
    select: Literal["reservoir", "class-balanced", "experience-balanced"] = "experience-balanced"
    rows: PositiveInt = 32
    epsilon: float = Field(default=1e-7, gt=0)


class AGEM(Part):
    """Projects the gradient so that it does not work against a memory of earlier experiences.

    In its first experience it does nothing. A step costs one more forward and backward pass, over ``rows`` rows.
    """

    slot: ClassVar[Slot] = "projection"
    Settings: ClassVar[type[Spec]] = AGEMSettings
    excludes: ClassVar[dict[str, str]] = {"projection": "the second projection would undo the first, so keep one."}
    settings: AGEMSettings

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.store = Store(self.name, INSTEAD, capacity=self.settings.capacity, select=self.settings.select)
        self.cycle = Cycle()

    def check_objective(self, objective: Objective) -> None:
        """Refuse a selection by class where rows have none."""
        self.store.check_objective(objective)

    def attach(self, context: Context) -> None:
        super().attach(context)
        self.store.attach(context)

    def begin(self, context: Context, experience: Experience) -> None:
        """Refuse what could only fail after the training.

        Raises:
            CompositionError: ``class-balanced`` where rows have no class.
        """
        self.store.check(experience)

    def edit_gradients(self) -> None:
        """Project the gradients; no sync of the device."""
        context, held = self.context, len(self.store)
        if not held:
            return
        generator = context.randomness.generator("agem")
        index_B = self.cycle.draw(min(self.settings.rows, held), held, generator)
        parameters = list(context.parameters().values())
        found = memory_gradient(context, self.store.memory, index_B, parameters)
        pairs = [(p, r) for p, r in zip(parameters, found, strict=True) if r is not None]
        if not pairs:
            return
        device = pairs[0][1].device
        with torch.no_grad():
            dots = [torch.sum(p.grad.float() * r).to(device) for p, r in pairs if p.grad is not None]
            dot = torch.stack([torch.zeros((), device=device), *dots]).sum()
            norm = torch.stack([r.square().sum().to(device) for _, r in pairs]).sum()
            scale = -dot.clamp(max=0) / (norm + self.settings.epsilon)
            add_to_gradients([p for p, _ in pairs], [r * scale.to(r.device) for _, r in pairs])

    def end(self, context: Context, experience: Experience) -> None:
        """Offer all training rows of the experience to the memory."""
        self.store.offer_table(context, experience)

    def rows(self) -> Tensor:
        return self.store.rows()

    def erase(self, rows: Tensor) -> int:
        return self.store.erase(rows)

    def nbytes(self) -> int:
        return self.store.nbytes() + self.cycle.nbytes()

    def state_dict(self) -> dict[str, Any]:
        return {**self.store.state_dict(), "cycle": self.cycle.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.store.load_state_dict(state)
        self.cycle.load_state_dict(state["cycle"])
