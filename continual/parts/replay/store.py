"""A memory together with the selection of its rows: what every part that replays stored rows is made of.

Letters: B rows offered, C candidates among them, N rows of a table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor

from continual.errors import CompositionError
from continual.kinds import Objective
from continual.parts.part import Context
from continual.parts.replay.columns import parse_bytes
from continual.parts.replay.herding import herding_keys
from continual.parts.replay.memory import Memory, Storage
from continual.parts.replay.select import Selection
from continual.randomness import derive_seed
from continual.spec import Spec
from continual.streams.experience import Experience
from continual.table import Batch, Table

Select = Literal["reservoir", "class-balanced", "experience-balanced", "ring", "herding"]
Read = Callable[[Tensor], Batch]
"""Gives rows by their places among those offered."""

BLOCK = 1024
"""Rows of a table read at once."""
BESIDE = 24
"""Bytes beside each row: its key, its group, its place in a cycle."""


class StoreSettings(Spec):
    """Where rows are kept.

    Attributes:
        capacity: rows, or bytes as ``"20MB"``.
        storage: ``device`` of the training, ``cpu``, or ``memmap``, files under ``folder``.
    """

    capacity: PositiveInt | str = 200
    storage: Storage = "device"
    folder: str | None = None

    @model_validator(mode="after")
    def _place(self) -> StoreSettings:
        check_place(self.capacity, self.storage, self.folder)
        return self


def check_place(capacity: int | str | None, storage: Storage, folder: str | None) -> None:
    """Raise where bytes cannot be read, or a folder is there without ``memmap`` or the other way round."""
    if isinstance(capacity, str):
        parse_bytes(capacity)
    if (storage == "memmap") != (folder is not None):
        raise ValueError("a folder belongs to storage: memmap, and memmap needs one: give both or neither")


class Store:
    """Rows that are kept, and why those.

    ``reservoir``, ``class-balanced`` and ``experience-balanced`` keep rows of smallest random key. ``ring`` and
    ``herding`` give every class of every experience (every experience, where rows have no class) an equal share: of the
    latest rows, or of those ranked first by herding.

    Args:
        owner: how error messages call the part.
        instead: what they advise where rows have no class.
        per_class: rows of each group, in place of a capacity.
        growing: dense columns whose rows may get wider.
        beside: bytes that the owner keeps beside each row.
    """

    def __init__(
        self,
        owner: str,
        instead: str,
        *,
        capacity: int | str | None,
        select: Select = "reservoir",
        per_class: int | None = None,
        storage: Storage = "device",
        folder: str | None = None,
        growing: tuple[str, ...] = (),
        beside: int = BESIDE,
    ) -> None:
        self.owner, self.instead, self.select = owner, instead, select
        self.capacity, self.per_class = capacity, per_class
        self.storage, self.folder, self.growing, self.beside = storage, folder, growing, beside
        self.memory = self._memory(groups=1)
        self.selection = Selection(0, grouped=select != "reservoir", quota=per_class)
        self._seeded = False
        self._arrived = 0
        self._pairs: list[list[int]] = []

    def __len__(self) -> int:
        return len(self.memory)

    def attach(self, context: Context) -> None:
        """Lie where the training is; the first time, take the keys' seed from it."""
        self.memory.to(context.device)
        if not self._seeded:
            self.selection.seed, self._seeded = derive_seed(context.randomness.seed, "replay keys"), True

    def check_objective(self, objective: Objective) -> None:
        """Raise :class:`CompositionError` where the selection needs a class a row and the objective has none."""
        if (self.select == "class-balanced" or self.per_class is not None) and objective != "classification":
            raise CompositionError(
                f"{self.owner} needs one class a row and the objective is {objective}: {self.instead}."
            )

    def check(self, experience: Experience, extra: Batch | None = None) -> None:
        """Refuse before the training what could only fail after it.

        Args:
            extra: columns (one row) that are kept beside those of the experience.

        Raises:
            CompositionError: rows without a class where the selection needs one.
            SpecError: a capacity in bytes that holds no row.
        """
        if isinstance(self.capacity, str) and not self.memory.forms and len(experience.train):
            trial = Memory(self.capacity, beside=self.beside, growing=self.growing)
            trial.fit({**reader(experience.train)(torch.zeros(1, dtype=torch.int64)), **(extra or {})})
        self.check_objective(experience.objective)
        if self._by_class(experience.objective):
            self._check_classes(experience.train.column("labels"))

    def offer_batch(self, context: Context, batch: Batch) -> None:
        """Offer rows of the training, in the order in which they were trained on."""
        by_class = self._by_class(context.objective)
        ids = torch.stack([batch[name] for name in (("row", "labels") if by_class else ("row",))]).cpu()

        def read(index_B: Tensor) -> Batch:
            return {name: column.index_select(0, index_B.to(column.device)) for name, column in batch.items()}

        self._offer(ids[0], self._groups(ids[0], ids[-1] if by_class else None, context.experience_index), None, read)

    def offer_table(self, context: Context, experience: Experience) -> None:
        """Offer all training rows of an experience; only those that are accepted are read."""
        table = experience.train
        rows_N = table.column("row").to("cpu", torch.int64)
        labels_N = table.column("labels").cpu() if self._by_class(context.objective) else None
        groups_N, read = self._groups(rows_N, labels_N, experience.index), reader(table)
        keys_N = None
        if self.select == "herding":
            assert groups_N is not None, "herding ranks within groups"
            self._learn_form(read, rows_N)
            most = self.memory.capacity if self.per_class is None else self.per_class
            keys_N = herding_keys(context, table, rows_N, groups_N, most, self.owner)
        self._offer(rows_N, groups_N, keys_N, read)

    def rewrite(self, batch: Batch) -> None:
        """Write those rows of ``batch`` that are held over what is held of them."""
        if self.memory.elastic:
            self.memory.fit(batch, self.selection.trim)
        rows_B = batch["row"].to("cpu", torch.int64)
        held_N, place_N = self.memory.rows().sort()
        if not len(held_N):
            return
        found_B = torch.searchsorted(held_N, rows_B).clamp(max=len(held_N) - 1)
        index_A = (held_N[found_B] == rows_B).nonzero().flatten()
        rows = {name: column.index_select(0, index_A.to(column.device)) for name, column in batch.items()}
        self.memory.put(place_N[found_B[index_A]], rows)

    def rows(self) -> Tensor:
        """Ids of the rows held, int64 CPU (N,)."""
        return self.memory.rows()

    def erase(self, rows: Tensor) -> int:
        """Give up the rows with these ids, and what tells of them; returns how many there were."""
        rows = rows.to("cpu", torch.int64)
        stays_N = ~torch.isin(self.memory.rows(), rows)
        self.selection.keep(stays_N.nonzero().flatten())
        if self.select not in ("ring", "herding"):
            self.selection.forget(rows)
        return self.memory.erase(rows)

    def nbytes(self) -> int:
        """Bytes held."""
        return self.memory.nbytes() + self.selection.nbytes()

    def state_dict(self) -> dict[str, Any]:
        """The rows held and what the selection knows of them."""
        return {
            "memory": self.memory.state_dict(),
            "selection": self.selection.state_dict(),
            "arrived": self._arrived,
            "pairs": [list(pair) for pair in self._pairs],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``, with the keys of the run that made it.

        Raises:
            StateError: it holds more rows than fit here.
        """
        groups = len(torch.unique(state["selection"]["groups"]))
        self.memory = self._memory(max(groups, 1), self.memory.device)
        self.memory.load_state_dict(state["memory"])
        self.selection.load_state_dict(state["selection"], self.memory.capacity)
        self._arrived, self._pairs = int(state["arrived"]), [[int(one) for one in pair] for pair in state["pairs"]]
        self._seeded = True

    def _memory(self, groups: int, device: torch.device | None = None) -> Memory:
        capacity = self.per_class * groups if self.per_class is not None else self.capacity
        assert capacity is not None, "a capacity or rows of each class"
        return Memory(
            capacity,
            storage=self.storage,
            device=device,
            folder=self.folder,
            beside=self.beside,
            growing=self.growing,
        )

    def _by_class(self, objective: str) -> bool:
        return self.select == "class-balanced" or (self.select in ("ring", "herding") and objective == "classification")

    def _groups(self, rows_B: Tensor, labels_B: Tensor | None, experience: int) -> Tensor | None:
        """Which group each row offered belongs to, int64 (B,), or None where there are none."""
        if self.select == "reservoir":
            return None
        if self.select == "experience-balanced":
            return torch.full_like(rows_B, experience)
        if labels_B is not None:
            self._check_classes(labels_B)
        if self.select == "class-balanced":
            assert labels_B is not None
            return labels_B.to(torch.int64)
        return self._paired(torch.zeros_like(rows_B) if labels_B is None else labels_B, experience)

    def _paired(self, labels_B: Tensor, experience: int) -> Tensor:
        """A number for each pair of experience and class, in order of arrival."""
        labels_G, group_B = torch.unique(labels_B, return_inverse=True)
        for label in labels_G.tolist():
            if [experience, label] not in self._pairs:
                self._pairs.append([experience, label])
        return torch.tensor([self._pairs.index([experience, label]) for label in labels_G.tolist()])[group_B]

    def _learn_form(self, read: Read, rows_B: Tensor) -> None:
        if self.memory.byte_limit is not None and not self.memory.forms and len(rows_B):
            self.memory.fit(read(torch.zeros(1, dtype=torch.int64)))

    def _offer(self, rows_B: Tensor, groups_B: Tensor | None, keys_B: Tensor | None, read: Read) -> None:
        """Keep what the selection accepts."""
        memory, selection = self.memory, self.selection
        if self.select == "ring":
            keys_B = -(self._arrived + 1 + torch.arange(len(rows_B)))
            self._arrived += len(rows_B)
        index_C = selection.candidates(rows_B, groups_B, keys_B)
        if keys_B is not None:
            index_C = index_C[~torch.isin(rows_B[index_C], memory.rows())]
        if not len(index_C):
            return
        rows_C, groups_C = rows_B[index_C], None if groups_B is None else groups_B[index_C]
        keys_C = None if keys_B is None else keys_B[index_C]
        self._learn_form(lambda index: read(index_C[index]), rows_C)
        if self.per_class is not None and groups_C is not None:
            groups = len(torch.unique(torch.cat([selection.groups_N, groups_C])))
            memory.resize(max(memory.capacity, self.per_class * groups))
        plan = selection.plan(rows_C, groups_C, memory.capacity, keys_C)
        if memory.elastic:
            for block in torch.split(index_C[plan.index], BLOCK):
                memory.fit(read(block), selection.trim)
            plan = selection.plan(rows_C, groups_C, memory.capacity, keys_C)
        for block, places in zip(torch.split(index_C[plan.index], BLOCK), torch.split(plan.places, BLOCK), strict=True):
            if len(block):
                memory.put(places, read(block))
        selection.accept(plan, memory.capacity)

    def _check_classes(self, labels_N: Tensor) -> None:
        if labels_N.dim() != 1 or labels_N.is_floating_point() or (len(labels_N) and int(labels_N.min()) < 0):
            raise CompositionError(
                f"{self.owner} needs one class a row and some rows have none (a label below 0, such as -100, or labels "
                f"of another form): {self.instead}."
            )


@runtime_checkable
class KeepsRows(Protocol):
    """A part that keeps rows of earlier experiences in a store, which other parts may read."""

    store: Store


def reader(table: Table) -> Read:
    """Reads rows where the table lies."""
    device = table.column("row").device
    return lambda index_B: table[index_B.to(device)]
