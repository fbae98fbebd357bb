"""Rehearsal: every batch holds rows of earlier experiences beside the new ones.

Source: Chaudhry et al. 2019, "On Tiny Episodic Memories in Continual Learning" (arXiv 1902.10486), with current and
replayed rows in one forward pass. ``weighting: experiences`` is the loss 1/t · current + (1 − 1/t) · replayed of
van de Ven et al. 2022 (t experiences met). Departures: rows are kept by random keys (``select.py``), not by a counter,
and replayed by walking through the memory in shuffled order, so that every row is seen equally often.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from continual.errors import CompositionError, StreamError, quoted
from continual.models.output import Output
from continual.objective import Objective
from continual.parts.part import Context, Part, Slot
from continual.parts.replay.columns import parse_bytes
from continual.parts.replay.cycle import Cycle
from continual.parts.replay.memory import Memory
from continual.parts.replay.select import Selection
from continual.randomness import derive_seed
from continual.spec import Spec
from continual.streams.experience import Experience
from continual.table import Batch, Table, concat_batches, to_device

# B rows of a batch, C candidates, N rows of a table

BLOCK = 1024
"""Rows of a table read at once."""
BESIDE = 24
"""Bytes beside each row: its key, its group, its place in the cycle."""


class RehearsalSettings(Spec):
    """Settings of :class:`Rehearsal`.

    Attributes:
        capacity: rows, or bytes as ``"20MB"``; 200 rows where neither this nor ``per_class`` is given.
        per_class: rows of each class, in place of a capacity: the memory grows with the classes.
        select: ``reservoir`` keeps every row of the stream with equal probability; ``class-balanced`` and
            ``experience-balanced`` give each class or experience an equal share of the places.
        share: part of the rows of a forward pass that are replayed, in (0, 1).
        insert: ``end`` offers all rows of an experience when it ends; ``step`` those of each batch of its first epoch.
        weighting: ``rows`` weighs all rows of a batch alike; ``experiences`` gives the replayed ones together 1 − 1/t.
        storage: ``device`` of the training, ``cpu``, or ``memmap``, files under ``folder``.
    """

    kind: Literal["rehearsal"] = "rehearsal"
    capacity: PositiveInt | str | None = None
    per_class: PositiveInt | None = None
    select: Literal["reservoir", "class-balanced", "experience-balanced"] = "reservoir"
    share: float = Field(0.5, gt=0, lt=1)
    insert: Literal["end", "step"] = "end"
    weighting: Literal["rows", "experiences"] = "rows"
    storage: Literal["device", "cpu", "memmap"] = "device"
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
        if self.per_class is not None and self.select != "class-balanced":
            raise ValueError("per_class keeps rows of each class, so select is class-balanced: leave select out")
        if isinstance(self.capacity, str):
            parse_bytes(self.capacity)
        if (self.storage == "memmap") != (self.folder is not None):
            raise ValueError("a folder belongs to storage: memmap, and memmap needs one: give both or neither")
        return self


class Rehearsal(Part):
    """Replays rows of earlier experiences beside the current ones; for its settings see :class:`RehearsalSettings`."""

    slot: ClassVar[Slot] = "replay"
    Settings = RehearsalSettings
    settings: RehearsalSettings

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        own = self.settings
        self.memory = self._memory(classes=1)
        self.selection = Selection(0, grouped=own.select != "reservoir", quota=own.per_class)
        self.cycle = Cycle()
        self.shortfall = 0
        self._wanted = 0
        self._seeded = False
        self._weight: tuple[tuple[int, int, int, torch.device], Tensor] | None = None

    def check_objective(self, objective: Objective) -> None:
        """Refuse ``class-balanced`` where rows have no class."""
        if self.settings.select == "class-balanced" and objective != "classification":
            instead = "" if self.settings.per_class is None else " with a capacity in place of per_class"
            raise CompositionError(
                f"{self.name} with select: class-balanced needs one class a row and the objective is {objective}: take "
                f"select: reservoir{instead}."
            )

    def attach(self, context: Context) -> None:
        super().attach(context)
        self.memory.to(context.device)
        if not self._seeded:
            self.selection.seed, self._seeded = derive_seed(context.randomness.seed, "replay keys"), True

    def begin(self, context: Context, experience: Experience) -> None:
        """Count the shortfall anew, and refuse what could only fail after the training.

        Raises:
            CompositionError: ``class-balanced`` where rows have no class.
            SpecError: a capacity in bytes that holds no row.
        """
        self.shortfall = self._wanted = 0
        if isinstance(self.settings.capacity, str) and not self.memory.forms and len(experience.train):
            trial = Memory(self.settings.capacity, beside=BESIDE)
            trial.fit(_reader(experience.train)(torch.zeros(1, dtype=torch.int64)))
        self.check_objective(experience.objective)
        if self.settings.select == "class-balanced":
            _check_classes(experience.train.column("labels"), self.name)

    def extend(self, batch: Batch) -> Batch:
        """The batch with rows of the memory after its own: round(current · share / (1 − share)), each at most once."""
        context, held = self.context, len(self.memory)
        met = context.experience_index + 1
        by_experience = self.settings.weighting == "experiences"
        if met <= 1 and (by_experience or not held):
            return batch
        current, share = context.current_rows, self.settings.share
        wanted = round(current * share / (1 - share))
        count = min(wanted, held)
        self._wanted += wanted
        self.shortfall += wanted - count
        if not count:
            return batch
        lengths_N = self.memory.lengths
        width = 0 if lengths_N is None else batch["input_ids"].shape[1]
        index_B = self.cycle.draw(count, held, context.randomness.generator("replay"), lengths_N, width)
        replayed = to_device(self.memory.batch(index_B), batch["labels"].device)
        lacking = batch.keys() - replayed.keys()
        if lacking:
            replayed = _completed(replayed, lacking)
        joined = concat_batches([batch, replayed])
        if by_experience:
            joined["weight"] = self._weights(joined, len(batch["labels"]), met)
        return joined

    def after_step(self, batch: Batch, output: Output) -> None:
        """Offer the batch's own rows, in the first epoch of ``insert: step``."""
        context = self.context
        if self.settings.insert != "step" or context.epoch > 0:
            return
        own = {name: column[: context.current_rows] for name, column in batch.items()}
        if self.settings.weighting == "experiences":
            own.pop("weight", None)
        names = ("row", "labels") if self.settings.select == "class-balanced" else ("row",)
        ids = torch.stack([own[name] for name in names]).cpu()

        def read(index_B: Tensor) -> Batch:
            return {name: column.index_select(0, index_B.to(column.device)) for name, column in own.items()}

        self._offer(ids[0], self._groups(ids[0], ids[-1], context.experience_index), read)

    def end(self, context: Context, experience: Experience) -> None:
        """Offer all training rows of the experience; only those that are accepted are read."""
        if self.settings.insert != "end":
            return
        table = experience.train
        rows_N = table.column("row").to("cpu", torch.int64)
        labels_N = table.column("labels").cpu() if self.settings.select == "class-balanced" else rows_N
        self._offer(rows_N, self._groups(rows_N, labels_N, experience.index), _reader(table))

    def report(self) -> str | None:
        """One sentence where fewer rows were replayed in this experience than wanted."""
        if not self.shortfall:
            return None
        return (
            f"{self.name}: {self.shortfall} of the {self._wanted} rows wanted for replay were not given, because the "
            "memory held fewer rows than a batch wants and a batch takes each once: raise the capacity or lower share."
        )

    def rows(self) -> Tensor:
        return self.memory.rows()

    def erase(self, rows: Tensor) -> int:
        stays_N = ~torch.isin(self.memory.rows(), rows.to("cpu", torch.int64))
        self.selection.keep(stays_N.nonzero().flatten())
        return self.memory.erase(rows)

    def nbytes(self) -> int:
        weight = 0 if self._weight is None else self._weight[1].nbytes
        return self.memory.nbytes() + self.selection.nbytes() + self.cycle.nbytes() + weight

    def state_dict(self) -> dict[str, Any]:
        return {
            "memory": self.memory.state_dict(),
            "selection": self.selection.state_dict(),
            "cycle": self.cycle.state_dict(),
            "shortfall": self.shortfall,
            "wanted": self._wanted,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``, with the keys of the run that made it.

        Raises:
            StateError: it holds more rows than fit here.
        """
        classes = len(torch.unique(state["selection"]["groups"]))
        self.memory = self._memory(max(classes, 1), self.memory.device)
        self.memory.load_state_dict(state["memory"])
        self.selection.load_state_dict(state["selection"], self.memory.capacity)
        self.cycle.load_state_dict(state["cycle"])
        self.shortfall, self._wanted, self._seeded = int(state["shortfall"]), int(state["wanted"]), True

    def _memory(self, classes: int, device: torch.device | None = None) -> Memory:
        own = self.settings
        capacity = own.per_class * classes if own.per_class is not None else own.capacity
        assert capacity is not None
        return Memory(capacity, storage=own.storage, device=device, folder=own.folder, beside=BESIDE)

    def _groups(self, rows_N: Tensor, labels_N: Tensor, experience: int) -> Tensor | None:
        """Which group each row offered belongs to, int64 (N,), or None where there are none."""
        if self.settings.select == "reservoir":
            return None
        if self.settings.select == "experience-balanced":
            return torch.full_like(rows_N, experience)
        _check_classes(labels_N, self.name)
        return labels_N.to(torch.int64)

    def _offer(self, rows_N: Tensor, groups_N: Tensor | None, read: Callable[[Tensor], Batch]) -> None:
        """Keep what the selection accepts; ``read`` gives rows by their place among those offered."""
        memory, selection = self.memory, self.selection
        index_C = selection.candidates(rows_N, groups_N)
        if not len(index_C):
            return
        rows_C, groups_C = rows_N[index_C], None if groups_N is None else groups_N[index_C]
        if memory.byte_limit is not None and not memory.forms:
            memory.fit(read(index_C[:1]))
        if self.settings.per_class is not None and groups_C is not None:
            classes = len(torch.unique(torch.cat([selection.groups_N, groups_C])))
            memory.resize(max(memory.capacity, self.settings.per_class * classes))
        plan = selection.plan(rows_C, groups_C, memory.capacity)
        if memory.elastic:
            for block in torch.split(index_C[plan.index], BLOCK):
                memory.fit(read(block), selection.trim)
            plan = selection.plan(rows_C, groups_C, memory.capacity)
        for block, places in zip(torch.split(index_C[plan.index], BLOCK), torch.split(plan.places, BLOCK), strict=True):
            if len(block):
                memory.put(places, read(block))
        selection.accept(plan, memory.capacity)

    def _weights(self, joined: Batch, current: int, met: int) -> Tensor:
        """Weights float (B,) that sum to 1: 1/t over the first ``current`` rows, 1 − 1/t over the replayed ones."""
        given_B = joined.get("weight")
        if given_B is not None:
            own_b, old_b = given_B[:current], given_B[current:]
            return torch.cat([own_b / (own_b.sum() * met), old_b * ((1 - 1 / met) / old_b.sum())])
        labels = joined["labels"]
        key = (current, len(labels), met, labels.device)
        if self._weight is None or self._weight[0] != key:
            weight_B = torch.full((len(labels),), (1 - 1 / met) / (len(labels) - current), device=labels.device)
            weight_B[:current] = 1 / (met * current)
            self._weight = (key, weight_B)
        return self._weight[1]


def _reader(table: Table) -> Callable[[Tensor], Batch]:
    """Reads rows where the table lies."""
    device = table.column("row").device
    return lambda index_B: table[index_B.to(device)]


def _check_classes(labels_N: Tensor, name: str) -> None:
    if labels_N.dim() != 1 or labels_N.is_floating_point() or (len(labels_N) and int(labels_N.min()) < 0):
        raise CompositionError(
            f"{name} with select: class-balanced needs one class a row and some rows have none (a label below 0, such "
            "as -100, or labels of another form): take select: reservoir."
        )


def _completed(replayed: Batch, lacking: set[str]) -> Batch:
    """Replayed rows weigh 1 where the batch brings weights and they have none."""
    if lacking != {"weight"}:
        raise StreamError(
            f"the batch has the columns {quoted(sorted(lacking))}, which the rows of earlier experiences lack: give "
            "every experience of a stream the same columns."
        )
    labels = replayed["labels"]
    return {**replayed, "weight": torch.ones(len(labels), device=labels.device)}
