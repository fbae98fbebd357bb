"""One score for every row of every test set, in one batched pass.

Rows of tables with lengths are sorted by length, the longest first, and padded to the longest of their batch; dense
tables are read as contiguous slices. The scores stay on the device until the pass is over. Nothing here writes to the
model.

Letters: B rows of a batch, N rows of all tables, Q scores of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from continual.kinds import Objective
from continual.models.output import Output
from continual.objective import PRIMARY, score_rows
from continual.parts.passes import as_at_test
from continual.table import Batch, Ragged, Table, TensorTable, View, concat, concat_batches, to_device


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every submodule has its own training flag again.

    Gradients are off by ``torch.no_grad``, not by inference mode: a tensor that a model keeps from such a pass must not
    break a later backward pass.
    """
    with as_at_test(model), torch.no_grad():
        yield


@torch.no_grad()
def score_tables(
    tables: Sequence[Table],
    forward: Callable[[Batch], Output],
    active: Callable[[Batch], Tensor | None],
    objective: Objective,
    device: torch.device,
    batch_size: int = 256,
) -> list[dict[str, Tensor]]:
    """Score every row of every table; the caller has put the model in eval mode (:func:`evaluating`).

    Args:
        tables: with the same columns; any may be empty.
        forward: gives the output for a batch on ``device``.
        active: which classes compete for the rows of a batch, bool (K,) or (B, K), None for all.
        objective: decides the scores (:func:`continual.objective.score_rows`).
        device: where the forward pass runs.
        batch_size: most rows of one forward pass.

    Returns:
        For each table: name of the score → float32 CPU (rows,), in the order of the table's rows, primary score first.
    """
    sizes = [len(table) for table in tables]
    held: list[Table] = [table for table in tables if len(table)]
    order_N = _longest_first(held)
    batches = _slices(held, batch_size) if order_N is None else _picks(concat(held), order_N, batch_size)
    found: dict[str, list[Tensor]] = {}
    for batch in batches:
        batch = to_device(batch, device)
        for name, score_B in score_rows(objective, forward(batch).logits, batch, active(batch)).items():
            found.setdefault(name, []).append(score_B)
    scores = {name: torch.cat(scores_B).cpu() for name, scores_B in found.items()} or {
        PRIMARY[objective]: torch.empty(0)
    }
    assert all(len(score_N) == sum(sizes) for score_N in scores.values()), (
        f"not one score for each of {sum(sizes)} rows"
    )
    if order_N is not None:
        scores = {name: torch.empty_like(score_N).index_copy_(0, order_N, score_N) for name, score_N in scores.items()}
    parts = {name: torch.split(score_N, sizes) for name, score_N in scores.items()}
    return [{name: part[place].clone() for name, part in parts.items()} for place in range(len(sizes))]


def _longest_first(tables: Sequence[Table]) -> Tensor | None:
    """The order of all rows by falling length, int64 (N,), or None where rows have no length."""
    lengths = [table.lengths for table in tables]
    known = [length for length in lengths if length is not None]
    if not known or len(known) < len(lengths):
        return None
    return torch.cat(known).argsort(descending=True, stable=True)


def _picks(table: Table, order_N: Tensor, batch_size: int) -> Iterator[Batch]:
    for index_B in torch.split(order_N, batch_size):
        yield table[index_B]


def _slices(tables: Sequence[Table], batch_size: int) -> Iterator[Batch]:
    """All rows in order. Small tables share a batch; one that is half full ends with its table, which saves a copy."""
    parts: list[Batch] = []
    room = batch_size
    for table in tables:
        start, size, read = 0, len(table), _reader(table)
        while start < size:
            stop = min(start + room, size)
            parts.append(read(start, stop))
            room -= stop - start
            start = stop
            if 2 * room <= batch_size:
                yield parts[0] if len(parts) == 1 else concat_batches(parts)
                parts, room = [], batch_size
    if parts:
        yield parts[0] if len(parts) == 1 else concat_batches(parts)


def _reader(table: Table) -> Callable[[int, int], Batch]:
    """Gives rows ``start`` to ``stop``; those of a dense table in memory as views, without a copy."""
    if isinstance(table, TensorTable) and not any(isinstance(column, Ragged) for column in table.columns.values()):
        dense = {name: column for name, column in table.columns.items() if isinstance(column, Tensor)}
        return lambda start, stop: {name: column[start:stop] for name, column in dense.items()}
    if isinstance(table, View):
        base, index_N = table.base, table.index_N
        return lambda start, stop: base[index_N[start:stop]]
    return lambda start, stop: table[torch.arange(start, stop)]
