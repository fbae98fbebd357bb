"""Rehearsal: every batch holds rows of earlier experiences beside the new ones.

Source: Chaudhry et al. 2019, "On Tiny Episodic Memories in Continual Learning" (arXiv 1902.10486), with current and
replayed rows in one forward pass; its ring buffer is ``select: ring``. ``select: herding`` is the exemplar memory of
Rebuffi et al. 2017 (arXiv 1611.07725). ``weighting: experiences`` is the loss 1/t · current + (1 − 1/t) · replayed of
van de Ven et al. 2022 (t experiences met). Departures: rows are kept by random keys (``select.py``), not by a counter,
and replayed by walking through the memory in shuffled order, so that every row is seen equally often. A ring takes part
in the equal sharing of a capacity, where the paper divides it by a number of classes known beforehand.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from continual.kinds import Objective
from continual.models.output import Output
from continual.parts.part import Context, Part, Slot
from continual.parts.replay.cycle import Cycle
from continual.parts.replay.herding import check_features
from continual.parts.replay.memory import Memory, Storage
from continual.parts.replay.mix import ExperienceWeights, join, replay_count
from continual.parts.replay.select import Selection
from continual.parts.replay.store import Select, Store, check_place
from continual.spec import Spec
from continual.streams.experience import Experience
from continual.table import Batch

# B rows of a batch

BY_CLASS = ("class-balanced", "ring", "herding")
"""Selections that take rows of each class in place of a capacity."""


class RehearsalSettings(Spec):
    """Settings of :class:`Rehearsal`.

    Attributes:
        capacity: rows, or bytes as ``"20MB"``; 200 rows where neither this nor ``per_class`` is given.
        per_class: rows of each class, in place of a capacity: the memory grows with the classes.
        select: ``reservoir`` keeps every row of the stream with equal probability; ``class-balanced`` and
            ``experience-balanced`` give each class or experience an equal share of the places. ``ring`` keeps the latest
            rows of each class of each experience (with ``insert: end`` the last of its table, which are no random sample
            where its order means something; with ``step`` they come shuffled), ``herding`` those whose mean feature is
            nearest to the class's.
        share: part of the rows of a full batch that are replayed, in (0, 1); the last batch of an epoch gets as many.
        insert: ``end`` offers all rows of an experience when it ends; ``step`` those of each batch of its first epoch.
        weighting: ``rows`` weighs all rows of a batch alike; ``experiences`` gives the replayed ones together 1 − 1/t.
        storage: ``device`` of the training, ``cpu``, or ``memmap``, files under ``folder``.
    """

    kind: Literal["rehearsal"] = "rehearsal"
    capacity: PositiveInt | str | None = None
    per_class: PositiveInt | None = None
    select: Select = "reservoir"
    share: float = Field(0.5, gt=0, lt=1)
    insert: Literal["end", "step"] = "end"
    weighting: Literal["rows", "experiences"] = "rows"
    storage: Storage = "device"
    folder: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        if given.get("per_class") is not None:
            return {"select": "class-balanced", **given}
        return {**given, "capacity": 200} if given.get("capacity") is None else given

    @model_validator(mode="after")
    def _consistent(self) -> RehearsalSettings:
        if self.per_class is not None and self.capacity is not None:
            raise ValueError("give capacity or per_class, not both")
        if self.per_class is not None and self.select not in BY_CLASS:
            raise ValueError(
                "per_class keeps rows of each class, so select is class-balanced, ring or herding: leave select out"
            )
        if self.select == "herding" and self.insert == "step":
            raise ValueError("herding ranks all rows of an experience when it ends: leave insert out")
        check_place(self.capacity, self.storage, self.folder)
        return self


class Rehearsal(Part):
    """Replays rows of earlier experiences beside the current ones; for its settings see :class:`RehearsalSettings`."""

    slot: ClassVar[Slot] = "replay"
    Settings = RehearsalSettings
    settings: RehearsalSettings

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        own = self.settings
        self.store = Store(
            f"{self.name} with select: {own.select}",
            "take select: reservoir" + (" and a capacity in place of per_class" if own.per_class is not None else ""),
            capacity=own.capacity,
            select=own.select,
            per_class=own.per_class,
            storage=own.storage,
            folder=own.folder,
        )
        self.cycle, self.weights = Cycle(), ExperienceWeights()
        self.shortfall = self._wanted = 0

    @property
    def memory(self) -> Memory:
        """The rows held."""
        return self.store.memory

    @property
    def selection(self) -> Selection:
        """What decides which rows are held."""
        return self.store.selection

    def check_objective(self, objective: Objective) -> None:
        """Refuse a selection by class where rows have none."""
        self.store.check_objective(objective)

    def attach(self, context: Context) -> None:
        super().attach(context)
        self.store.attach(context)

    def begin(self, context: Context, experience: Experience) -> None:
        """Count the shortfall anew, and refuse what could only fail after the training.

        Raises:
            CompositionError: rows without a class, or a model without features, where the selection needs them.
            SpecError: a capacity in bytes that holds no row.
        """
        self.shortfall = self._wanted = 0
        self.store.check(experience)
        if self.settings.select == "herding":
            check_features(context, experience.train, self.store.owner)

    def extend(self, batch: Batch) -> Batch:
        """The batch with rows of the memory after its own: round(full batch · share / (1 − share)), each at most once."""
        context, held = self.context, len(self.memory)
        met = context.experience_index + 1
        by_experience = self.settings.weighting == "experiences"
        if met <= 1 and (by_experience or not held):
            return batch
        wanted = replay_count(context.full_rows, self.settings.share)
        count = min(wanted, held)
        self._wanted += wanted
        self.shortfall += wanted - count
        if not count:
            return batch
        lengths_N = self.memory.lengths
        width = 0 if lengths_N is None else batch["input_ids"].shape[1]
        index_B = self.cycle.draw(count, held, context.randomness.generator("replay"), lengths_N, width)
        joined = join(batch, self.memory.batch(index_B))
        if by_experience:
            joined["weight"] = self.weights.of(joined, len(batch["labels"]), met)
        return joined

    def after_step(self, batch: Batch, output: Output) -> None:
        """Offer the batch's own rows, in the first epoch of ``insert: step``."""
        context = self.context
        if self.settings.insert != "step" or context.epoch > 0:
            return
        own = {name: column[: context.current_rows] for name, column in batch.items()}
        if self.settings.weighting == "experiences":
            own.pop("weight", None)
        self.store.offer_batch(context, own)

    def end(self, context: Context, experience: Experience) -> None:
        """Offer all training rows of the experience; only those that are accepted are read."""
        if self.settings.insert == "end":
            self.store.offer_table(context, experience)

    def report(self) -> str | None:
        """One sentence where fewer rows were replayed in this experience than wanted."""
        if not self.shortfall:
            return None
        return (
            f"{self.shortfall} of the {self._wanted} rows wanted for replay were not given, because the "
            "memory held fewer rows than a batch wants and a batch takes each once: raise capacity (or per_class), or lower share."
        )

    def rows(self) -> Tensor:
        return self.store.rows()

    def erase(self, rows: Tensor) -> int:
        return self.store.erase(rows)

    def nbytes(self) -> int:
        return self.store.nbytes() + self.cycle.nbytes() + self.weights.nbytes()

    def state_dict(self) -> dict[str, Any]:
        return {
            **self.store.state_dict(),
            "cycle": self.cycle.state_dict(),
            "shortfall": self.shortfall,
            "wanted": self._wanted,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``, with the keys of the run that made it.

        Raises:
            StateError: it holds more rows than fit here.
        """
        self.store.load_state_dict(state)
        self.cycle.load_state_dict(state["cycle"])
        self.shortfall, self._wanted = int(state["shortfall"]), int(state["wanted"])
