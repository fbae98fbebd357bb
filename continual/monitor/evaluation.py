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

from continual.models.output import Output
from continual.objective import PRIMARY, Objective, score_rows
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
    names: list[str] = [PRIMARY[objective]]
    scores_QN = torch.empty(1, 0)
    done = 0
    for batch in batches:
        batch = to_device(batch, device)
        found = score_rows(objective, forward(batch).logits, batch, active(batch))
        if done == 0:
            names = list(found)
            scores_QN = torch.empty(len(names), sum(sizes), dtype=torch.float32, device=device)
        size = 0
        for place, score_B in enumerate(found.values()):
            size = len(score_B)
            scores_QN[place, done : done + size] = score_B
        done += size
    assert done == sum(sizes), f"{sum(sizes)} rows went in and {done} scores came out"
    scores_QN = scores_QN.cpu()
    if order_N is not None:
        scores_QN = torch.empty_like(scores_QN).index_copy_(1, order_N, scores_QN)
    parts = torch.split(scores_QN, sizes, dim=1)
    return [{name: part[place].clone() for place, name in enumerate(names)} for part in parts]


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
        start = 0
        while start < len(table):
            stop = min(start + room, len(table))
            parts.append(_slice(table, start, stop))
            room -= stop - start
            start = stop
            if 2 * room <= batch_size:
                yield parts[0] if len(parts) == 1 else concat_batches(parts)
                parts, room = [], batch_size
    if parts:
        yield parts[0] if len(parts) == 1 else concat_batches(parts)


def _slice(table: Table, start: int, stop: int) -> Batch:
    """Rows ``start`` to ``stop``; a dense table in memory gives views, without a copy."""
    if isinstance(table, TensorTable) and not any(isinstance(column, Ragged) for column in table.columns.values()):
        return {name: column[start:stop] for name, column in table.columns.items() if isinstance(column, Tensor)}
    if isinstance(table, View):
        return table.base[table.index_N[start:stop]]
    return table[torch.arange(start, stop)]
