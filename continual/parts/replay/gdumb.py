"""GDumb: a balanced memory, and a model trained from scratch on nothing else.

Source: Prabhu, Torr & Dokania 2020, "GDumb: A Simple Approach that Questions Our Progress in Continual Learning" (ECCV,
doi 10.1007/978-3-030-58536-5_31): a greedy sampler keeps the classes of a memory balanced, and before every measurement
a model is trained from scratch on the memory alone.

Every experience begins with its rows offered to the memory and with the weights set back; then each batch of the
experience is replaced by as many rows of the memory, walked through in shuffled order (a batch larger than the memory
holds rows more than once). So an epoch is as many rows as the experience has: ``training.iterations`` sets the steps
free of that. Departures: within a class every row has the same chance to be kept, where the greedy sampler prefers those
that come first, and places that a small class leaves free go to the others; the counts of the classes are the same
where every class has rows enough. From scratch means: from the weights with which each parameter first entered
training, the same each time; for a pretrained model that is its base.

Letters: B rows of a batch.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from continual.kinds import Objective
from continual.parts.part import Context, Part, Slot
from continual.parts.replay.cycle import Cycle
from continual.parts.replay.store import Store, StoreSettings
from continual.spec import Spec
from continual.state import tensor_bytes
from continual.streams.experience import Experience
from continual.table import Batch, to_device

_FROM_SCRATCH = "it begins every experience from the first weights"


class GDumbSettings(StoreSettings):
    """Settings of :class:`GDumb`: those of its memory."""

    kind: Literal["gdumb"] = "gdumb"


class GDumb(Part):
    """Trains from scratch on a balanced memory alone; it holds the first weights beside the rows.

    The first weights were never trained, so that no row is in them; but a linear head with ``init: mean`` begins with what it
    computed from the rows of a class, and where that was one row alone, :meth:`erase` leaves its features there.
    """

    slot: ClassVar[Slot] = "replay"
    Settings: ClassVar[type[Spec]] = GDumbSettings
    objectives: ClassVar[tuple[Objective, ...]] = ("classification",)
    excludes: ClassVar[dict[str, str]] = {
        "replay": "it trains on its own memory and nothing else: leave the other one out.",
        "penalty": f"{_FROM_SCRATCH}, so there is nothing to hold: leave the penalty out, or take replay/rehearsal.",
        "distillation": f"{_FROM_SCRATCH}, so there is nothing to hold: leave it out, or take replay/rehearsal.",
        "projection": f"{_FROM_SCRATCH}, so there is nothing to protect: leave it out, or take replay/rehearsal.",
        "adapter": f"{_FROM_SCRATCH}, and adapters are merged or replaced between experiences: leave the adapter out, or "
        "take replay/rehearsal.",
    }
    settings: GDumbSettings

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        own = self.settings
        self.store = Store(
            self.name,
            "take replay/rehearsal with select: reservoir",
            capacity=own.capacity,
            select="class-balanced",
            storage=own.storage,
            folder=own.folder,
        )
        self.cycle = Cycle()
        self._first: dict[str, Tensor] = {}

    def attach(self, context: Context) -> None:
        super().attach(context)
        self.store.attach(context)

    def begin(self, context: Context, experience: Experience) -> None:
        """Take the experience's rows into the memory, and set the weights back.

        Raises:
            CompositionError: rows without a class.
            SpecError: a capacity in bytes that holds no row.
        """
        self.store.check(experience)
        self.store.offer_table(context, experience)
        self._from_scratch(context)

    def extend(self, batch: Batch) -> Batch:
        """As many rows of the memory as the batch has, in their place."""
        left, held = len(batch["labels"]), len(self.store)
        generator = self.context.randomness.generator("replay")
        drawn = []
        while left and held:
            drawn.append(self.cycle.draw(min(left, held), held, generator))
            left -= len(drawn[-1])
        return to_device(self.store.memory.batch(torch.cat(drawn)), batch["labels"].device) if drawn else batch

    def rows(self) -> Tensor:
        return self.store.rows()

    def erase(self, rows: Tensor) -> int:
        return self.store.erase(rows)

    def nbytes(self) -> int:
        return self.store.nbytes() + self.cycle.nbytes() + tensor_bytes(self._first)

    def state_dict(self) -> dict[str, Any]:
        return {**self.store.state_dict(), "cycle": self.cycle.state_dict(), "first": dict(self._first)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``.

        Raises:
            StateError: it holds more rows than fit here.
        """
        self.store.load_state_dict(state)
        self.cycle.load_state_dict(state["cycle"])
        self._first = {name: tensor.to(self.store.memory.device) for name, tensor in state["first"].items()}

    @torch.no_grad()
    def _from_scratch(self, context: Context) -> None:
        """Weights and buffers as they first were; what has grown since keeps its new rows as they were drawn."""
        trained = context.parameters()
        own = context.model.state_dict(keep_vars=True)
        frozen = {name for name, tensor in own.items() if isinstance(tensor, torch.nn.Parameter)} - trained.keys()
        for name, tensor in own.items():
            if name in frozen or not isinstance(tensor, Tensor):
                continue
            first = self._first.get(name)
            if first is None or first.shape != tensor.shape:
                grown = tensor.detach().clone()
                if first is not None:
                    grown[tuple(slice(size) for size in first.shape)] = first
                self._first[name] = grown
            tensor.copy_(self._first[name])
        context.forget(trained.values())
