"""Columns replaced in any kind of table, without a copy of the others."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from continual.errors import StreamError
from continual.table import ArrowTable, Concat, Mapped, Table, TensorTable, View


def replace_columns(table: Table, columns: dict[str, Tensor]) -> Table:
    """``table`` with dense columns (N, ...) added or replaced; views stay views, so that their base is shared."""
    if isinstance(table, TensorTable):
        return TensorTable({**table.columns, **columns})
    if isinstance(table, View):
        spread = {}
        for name, column in columns.items():
            spread[name] = torch.zeros((len(table.base), *column.shape[1:]), dtype=column.dtype)
            spread[name][table.index_N] = column
        return View(replace_columns(table.base, spread), table.index_N)
    if isinstance(table, Mapped):
        kept = {name: function for name, function in table.functions.items() if name not in columns}
        base = replace_columns(table.base, columns)
        return Mapped(base, kept) if kept else base
    if isinstance(table, Concat):
        sizes = [len(part) for part in table.tables]
        pieces = {name: torch.split(column, sizes) for name, column in columns.items()}
        return Concat(
            [
                replace_columns(part, {name: pieces[name][place] for name in columns})
                for place, part in enumerate(table.tables)
            ]
        )
    assert isinstance(table, ArrowTable), f"columns of {type(table).__name__} cannot be replaced"
    dataset = table.dataset.remove_columns([name for name in columns if name in table.names])
    for name, column in columns.items():
        values = column.cpu().numpy()
        mark = hashlib.sha256(f"{dataset._fingerprint}/{name}".encode() + values.tobytes()).hexdigest()
        dataset = dataset.add_column(name, values, new_fingerprint=mark)
    return ArrowTable(dataset, table.pads)


def labels_of(table: Table) -> Tensor | Sequence[Any] | None:
    """The labels of a table, as numbers or strings."""
    if "labels" not in table.names:
        return None
    if isinstance(table, ArrowTable):
        names = getattr(table.dataset.features["labels"], "names", None)
        if names is not None:
            return named(list(table.dataset["labels"]), names, "the labels")
    try:
        return table.column("labels")
    except StreamError:
        return table.strings("labels")


def named(values: Sequence[Any], names: Sequence[str], where: str) -> list[str]:
    """The names of class indices, as ``datasets.ClassLabel`` has them.

    Raises:
        StreamError: a row has no label (None or -1).
    """
    for place, value in enumerate(values):
        if value is None or value < 0:
            raise StreamError(f"{where}: row {place} has no label ({value}): leave out rows without one.")
    return [names[value] for value in values]


class Lookup:
    """A function for :class:`~continual.table.Mapped`: each label becomes the entry at its place.

    Args:
        table_C: int64 (C,), new label by old label.
    """

    def __init__(self, table_C: Tensor) -> None:
        self.table_C = table_C

    def __call__(self, labels_B: Tensor) -> Tensor:
        return self.table_C.to(labels_B.device)[labels_B]


class Shift:
    """A function for :class:`~continual.table.Mapped`: adds a whole number."""

    def __init__(self, by: int) -> None:
        self.by = by

    def __call__(self, column_B: Tensor) -> Tensor:
        return column_B + self.by
