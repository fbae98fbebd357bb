"""Rows as columns of tensors.

``len(table)`` rows; ``table[index_B]`` gives a batch: a dict of tensors with B on axis 0. Nothing touches one row at a
time. Columns come in three forms: a dense tensor, :class:`Ragged` (token ids of different lengths, padded batch by
batch to the longest row of the batch), and lists of strings, which are read with :meth:`Table.strings` and are in no batch.

Letters: B rows of a batch, N rows of a table, T tokens, V tokens of a whole column.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from continual.errors import StreamError, quoted

if TYPE_CHECKING:
    import datasets

Batch = dict[str, Tensor]
IGNORED = -100
"""The label that counts for nothing, as everywhere in PyTorch and Hugging Face."""


class Ragged:
    """Rows of integers of different lengths.

    Args:
        values_V: int tensor, all rows one after another.
        offsets_N1: int64 CPU tensor (N + 1,), row n is ``values_V[offsets_N1[n]:offsets_N1[n + 1]]``.
        pad: what fills a shorter row in a batch.
    """

    def __init__(self, values_V: Tensor, offsets_N1: Tensor, pad: int) -> None:
        assert int(offsets_N1[-1]) == values_V.numel() and int(offsets_N1[0]) == 0
        self.values_V, self.offsets_N1, self.pad = values_V, offsets_N1.to(torch.int64), int(pad)

    @classmethod
    def from_lists(cls, rows: Sequence[Sequence[int]], pad: int) -> Ragged:
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        offsets_N1 = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        values_V = torch.tensor([token for row in rows for token in row], dtype=torch.int32)
        return cls(values_V, offsets_N1, pad)

    def __len__(self) -> int:
        return self.offsets_N1.numel() - 1

    @property
    def lengths(self) -> Tensor:
        """int64 (N,)."""
        return self.offsets_N1.diff()

    def take(self, index_B: Tensor) -> tuple[Tensor, Tensor]:
        """Padded rows int64 (B, T) and their mask int64 (B, T), T the longest row among them (at least 1)."""
        start_B = self.offsets_N1[index_B]
        length_B = self.offsets_N1[index_B + 1] - start_B
        width = max(int(length_B.max()), 1) if len(length_B) else 1
        place_T = torch.arange(width)
        mask_BT = place_T < length_B[:, None]
        if self.values_V.numel() == 0:
            return torch.full(mask_BT.shape, self.pad), mask_BT.to(torch.int64)
        flat_BT = (start_B[:, None] + place_T).clamp_(max=self.values_V.numel() - 1)
        rows_BT = self.values_V[flat_BT].to(torch.int64).masked_fill_(~mask_BT, self.pad)
        return rows_BT, mask_BT.to(torch.int64)


class Table(ABC):
    """What every kind of table can do."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index_B: Tensor) -> Batch:
        """The rows at ``index_B`` (1-D int64), as tensors with B on axis 0."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """All columns, strings included."""

    @abstractmethod
    def column(self, name: str) -> Tensor:
        """One whole dense column, (N, ...)."""

    @abstractmethod
    def strings(self, name: str) -> Sequence[Any]:
        """One whole column of strings (or of chat messages), N long."""

    @property
    def lengths(self) -> Tensor | None:
        """Tokens of each row, int64 (N,), or None where rows have no length."""
        return None

    def select(self, index: Tensor) -> Table:
        """The rows at ``index``, without a copy."""
        return View(self, index)

    def missing(self, name: str) -> StreamError:
        return StreamError(f"there is no column '{name}' in this table: it has {quoted(self.names)}.")


class TensorTable(Table):
    """A table in memory.

    Args:
        columns: name → dense tensor (N, ...), :class:`Ragged`, or list of N strings. A ``Ragged`` column called
            ``input_ids`` gives ``attention_mask`` as well.
    """

    def __init__(self, columns: dict[str, Tensor | Ragged | list[Any]]) -> None:
        sizes = {name: len(column) for name, column in columns.items()}
        if len(set(sizes.values())) > 1:
            raise StreamError(f"the columns have different numbers of rows ({sizes}): give each the same number.")
        self._size = next(iter(sizes.values()), 0)
        self.columns = columns
        self._dense = [(name, column) for name, column in columns.items() if isinstance(column, Tensor)]
        self._ragged = [(name, column) for name, column in columns.items() if isinstance(column, Ragged)]

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index_B: Tensor) -> Batch:
        batch = {}
        moved = index_B
        for name, dense in self._dense:
            if moved.device != dense.device:
                moved = index_B.to(dense.device, non_blocking=True)
            batch[name] = dense.index_select(0, moved)
        for name, column in self._ragged:
            batch[name], mask_BT = column.take(index_B.cpu())
            if name == "input_ids":
                batch["attention_mask"] = mask_BT
        return batch

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.columns)

    def column(self, name: str) -> Tensor:
        column = self.columns.get(name)
        if not isinstance(column, Tensor):
            raise self.missing(name)
        return column

    def strings(self, name: str) -> Sequence[Any]:
        column = self.columns.get(name)
        if not isinstance(column, list):
            raise self.missing(name)
        return column

    @property
    def lengths(self) -> Tensor | None:
        column = self.columns.get("input_ids")
        return column.lengths if isinstance(column, Ragged) else None

    def to(self, device: torch.device) -> TensorTable:
        """The same table with its dense columns on ``device`` (ragged ones and strings stay)."""
        return TensorTable({name: c.to(device) if isinstance(c, Tensor) else c for name, c in self.columns.items()})


class ArrowTable(Table):
    """A Hugging Face ``datasets.Dataset``: memory-mapped, for what does not fit in memory.

    Columns of lists of integers are padded batch by batch as :class:`Ragged` ones are; ``pads`` names what fills them.
    """

    def __init__(self, dataset: datasets.Dataset, pads: dict[str, int] | None = None) -> None:
        self.dataset, self.pads = dataset, dict(pads or {})
        self._numbers = [name for name, feature in dataset.features.items() if not _holds_text(feature)]
        self._formatted = dataset.with_format("numpy", columns=self._numbers)
        self._lengths: Tensor | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index_B: Tensor) -> Batch:
        columns = self._formatted[index_B.tolist()]
        batch: Batch = {}
        for name in self._numbers:
            if name in self.pads:
                ragged = Ragged.from_lists([list(row) for row in columns[name]], self.pads[name])
                batch[name], mask_BT = ragged.take(torch.arange(len(ragged)))
                if name == "input_ids":
                    batch["attention_mask"] = mask_BT
            else:
                batch[name] = _narrow(torch.tensor(columns[name]))
        return batch

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.dataset.column_names)

    def column(self, name: str) -> Tensor:
        if name not in self._numbers or name in self.pads:
            raise self.missing(name)
        return _narrow(torch.tensor(self.dataset.with_format("numpy", columns=[name])[:][name]))

    def strings(self, name: str) -> Sequence[Any]:
        if name not in self.names or name in self._numbers:
            raise self.missing(name)
        return list(self.dataset[name])

    @property
    def lengths(self) -> Tensor | None:
        if "input_ids" not in self.pads:
            return None
        if self._lengths is None:
            import pyarrow.compute as pc

            flat = self.dataset.with_format("arrow", columns=["input_ids"])[:].column("input_ids")
            self._lengths = torch.tensor(pc.list_value_length(flat).to_numpy(), dtype=torch.int64)
        return self._lengths

    def select(self, index: Tensor) -> Table:
        return View(self, index)


class View(Table):
    """Some rows of another table, by index, without a copy."""

    def __init__(self, base: Table, index_N: Tensor) -> None:
        view = base if isinstance(base, View) else None
        self.base: Table = base if view is None else view.base
        self.index_N: Tensor = (index_N if view is None else view.index_N[index_N]).to(torch.int64)

    def __len__(self) -> int:
        return self.index_N.numel()

    def __getitem__(self, index_B: Tensor) -> Batch:
        return self.base[self.index_N[index_B]]

    @property
    def names(self) -> tuple[str, ...]:
        return self.base.names

    def column(self, name: str) -> Tensor:
        return self.base.column(name)[self.index_N]

    def strings(self, name: str) -> Sequence[Any]:
        values = self.base.strings(name)
        return [values[place] for place in self.index_N.tolist()]

    @property
    def lengths(self) -> Tensor | None:
        lengths = self.base.lengths
        return None if lengths is None else lengths[self.index_N]


class Mapped(Table):
    """A table whose columns called in ``functions`` pass through a function of the whole batch column.

    The function must treat every row alike, whatever batch it is in, such as a permutation of pixels.
    """

    def __init__(self, base: Table, functions: dict[str, Callable[[Tensor], Tensor]]) -> None:
        self.base, self.functions = base, functions

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index_B: Tensor) -> Batch:
        batch = dict(self.base[index_B])
        for name, function in self.functions.items():
            batch[name] = function(batch[name])
        return batch

    @property
    def names(self) -> tuple[str, ...]:
        return self.base.names

    def column(self, name: str) -> Tensor:
        column = self.base.column(name)
        return self.functions[name](column) if name in self.functions else column

    def strings(self, name: str) -> Sequence[Any]:
        return self.base.strings(name)

    @property
    def lengths(self) -> Tensor | None:
        return self.base.lengths


class Concat(Table):
    """Several tables one after another."""

    def __init__(self, tables: Sequence[Table]) -> None:
        assert tables, "at least one table"
        self.tables = list(tables)
        self._starts = torch.tensor([0, *[len(table) for table in tables]]).cumsum(0)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index_B: Tensor) -> Batch:
        owner_B = torch.searchsorted(self._starts[1:], index_B.cpu(), right=True)
        batches, places = [], []
        for owner in sorted(set(owner_B.tolist())):
            places_b = (owner_B == owner).nonzero().flatten()
            batches.append(self.tables[owner][index_B[places_b] - self._starts[owner]])
            places.append(places_b)
        if not batches:
            return self.tables[0][index_B]
        order_B = torch.cat(places).argsort()
        return {name: column[order_B.to(column.device)] for name, column in concat_batches(batches).items()}

    @property
    def names(self) -> tuple[str, ...]:
        return self.tables[0].names

    def column(self, name: str) -> Tensor:
        return torch.cat([table.column(name) for table in self.tables])

    def strings(self, name: str) -> Sequence[Any]:
        return [value for table in self.tables for value in table.strings(name)]

    @property
    def lengths(self) -> Tensor | None:
        parts = [table.lengths for table in self.tables]
        return None if any(part is None for part in parts) else torch.cat([p for p in parts if p is not None])


def concat(tables: Sequence[Table]) -> Table:
    """The tables one after another; views of one base become one view."""
    if len(tables) == 1:
        return tables[0]
    bases = {id(table.base) if isinstance(table, View) else -index for index, table in enumerate(tables, 1)}
    first = tables[0]
    if len(bases) == 1 and isinstance(first, View):
        return View(first.base, torch.cat([table.index_N for table in tables if isinstance(table, View)]))
    return Concat(tables)


PADS = {"labels": IGNORED}
"""What fills a token column that must grow; every other one is filled with 0 under an attention mask of 0."""
TOKEN_COLUMNS = ("input_ids", "attention_mask", "token_type_ids", "labels")
"""Columns that hold one number a token where they have two dimensions."""


def concat_batches(batches: Sequence[Batch]) -> Batch:
    """Batches one below the other; token columns of different widths are padded on the right to the widest.

    Only columns that all batches have are kept.
    """
    joined: Batch = {}
    for name in batches[0]:
        if not all(name in batch for batch in batches):
            continue
        parts = [batch[name] for batch in batches]
        if parts[0].dim() == 2 and name in TOKEN_COLUMNS:
            width = max(part.shape[1] for part in parts)
            fill = PADS.get(name, 0)
            parts = [torch.nn.functional.pad(part, (0, width - part.shape[1]), value=fill) for part in parts]
        joined[name] = torch.cat(parts)
    return joined


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on ``device``; nothing is copied where it is there already."""
    return {n: c if c.device == device else c.to(device, non_blocking=True) for n, c in batch.items()}


def _holds_text(feature: Any) -> bool:
    import datasets

    if isinstance(feature, datasets.Value):
        return bool(feature.dtype in ("string", "large_string"))
    inner = getattr(feature, "feature", None)
    if inner is not None:
        return _holds_text(inner)
    return isinstance(feature, dict | list)


def _narrow(column: Tensor) -> Tensor:
    return column.to(torch.float32) if column.dtype == torch.float64 else column
