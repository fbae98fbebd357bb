"""Rows of a table in memory of their own: nothing of the table that they came from is kept alive, or in view.

A :class:`~continual.table.View` costs nothing and holds on to every row of its base; whoever must give rows up, or keep a few of
many, takes what it keeps through :func:`owned`.

Letters: N rows, B rows read at once, V tokens of a whole column.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from continual.table import ArrowTable, Batch, Concat, Mapped, Ragged, Table, TensorTable, View, concat_batches

BLOCK = 1024
"""Rows of a table that is not in memory read at once."""

Column = Tensor | Ragged | list[Any]


def owned(table: Table, index_N: Tensor | None = None) -> TensorTable:
    """The rows at ``index_N`` (int64 (N,); None for all), copied: the same batches, lengths and strings as from ``table``.

    Dense columns keep their dtype and their device, token columns stay ragged. Tables of a kind of the user's own give their
    batches and strings.
    """
    index_N = torch.arange(len(table)) if index_N is None else index_N.to(torch.int64)
    if isinstance(table, View):
        return owned(table.base, table.index_N[index_N.to(table.index_N.device)])
    if isinstance(table, TensorTable):
        return TensorTable({name: _picked(column, index_N) for name, column in table.columns.items()})
    if isinstance(table, Mapped):
        columns = owned(table.base, index_N).columns
        if all(isinstance(columns.get(name), Tensor) for name in table.functions):
            changed = {name: function(columns[name]) for name, function in table.functions.items()}  # type: ignore[arg-type]
            return TensorTable({**columns, **changed})
    if isinstance(table, Concat):
        joined = _from_several(table, index_N.cpu())
        if joined is not None:
            return joined
    return _read(table, index_N.cpu())


def _picked(column: Column, index_N: Tensor) -> Column:
    if isinstance(column, Tensor):
        return column.index_select(0, index_N.to(column.device))
    index_N = index_N.cpu()
    if isinstance(column, list):
        return [column[place] for place in index_N.tolist()]
    lengths_N = column.lengths[index_N]
    offsets_N1 = torch.cat([torch.zeros(1, dtype=torch.int64), lengths_N.cumsum(0)])
    shift_N = column.offsets_N1[index_N] - offsets_N1[:-1]
    place_V = torch.arange(int(offsets_N1[-1])) + shift_N.repeat_interleave(lengths_N)
    return Ragged(column.values_V[place_V], offsets_N1, column.pad)


def _from_several(table: Concat, index_N: Tensor) -> TensorTable | None:
    """The rows of several tables; None where a column is of one kind in one of them and of another in the next."""
    starts = torch.tensor([0, *[len(part) for part in table.tables]]).cumsum(0)
    owner_N = torch.searchsorted(starts[1:], index_N, right=True)
    places = [(owner_N == owner).nonzero().flatten() for owner in range(len(table.tables))]
    used = [owner for owner, place in enumerate(places) if len(place)] or [0]
    pieces = [owned(table.tables[owner], index_N[places[owner]] - starts[owner]).columns for owner in used]
    names = [name for name in pieces[0] if all(name in piece for piece in pieces)]
    columns: dict[str, Column] = {}
    for name in names:
        joined = _joined([piece[name] for piece in pieces])
        if joined is None:
            return None
        columns[name] = joined
    return owned(TensorTable(columns), torch.cat([places[owner] for owner in used]).argsort())


def _joined(parts: Sequence[Column]) -> Column | None:
    if all(isinstance(part, list) for part in parts):
        return [value for part in parts for value in part]  # type: ignore[union-attr]
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if len(tensors) == len(parts):
        return torch.cat(tensors) if len({tensor.shape[1:] for tensor in tensors}) == 1 else None
    ragged = [part for part in parts if isinstance(part, Ragged)]
    if len(ragged) < len(parts):
        return None
    lengths_N = torch.cat([part.lengths for part in ragged])
    offsets_N1 = torch.cat([torch.zeros(1, dtype=torch.int64), lengths_N.cumsum(0)])
    return Ragged(torch.cat([part.values_V for part in ragged]), offsets_N1, ragged[0].pad)


def _read(table: Table, index_N: Tensor) -> TensorTable:
    """Rows of a table that is not in memory, block by block."""
    if not len(index_N) and len(table):
        return owned(_read(table, torch.zeros(1, dtype=torch.int64)), index_N)
    arrow = table if isinstance(table, ArrowTable) else None
    ragged = {} if arrow is None else {name: pad for name, pad in arrow.pads.items() if name in arrow.names}
    made = {*ragged, "attention_mask"} if "input_ids" in ragged else set(ragged)
    blocks: list[Batch] = []
    columns: dict[str, Column] = {}
    tokens: dict[str, list[list[int]]] = {name: [] for name in ragged}
    for index_B in torch.split(index_N, BLOCK):
        blocks.append({name: column for name, column in table[index_B].items() if name not in made})
        for name in ragged:
            assert arrow is not None
            rows = arrow.dataset.with_format("numpy", columns=[name])[index_B.tolist()][name]
            tokens[name] += [row.tolist() for row in rows]
    columns |= {name: Ragged.from_lists(rows, ragged[name]) for name, rows in tokens.items()}
    columns |= concat_batches(blocks)
    for name in table.names:
        if name not in columns and name not in made:
            values = table.strings(name)
            columns[name] = [values[place] for place in index_N.tolist()]
    return TensorTable(columns)
