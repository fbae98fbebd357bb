"""The order of one pass over the rows, as a list of index tensors.

Where rows have lengths, rows of similar length share a batch (buckets as in Khomenko et al. 2016, arXiv 1708.05604, and
the ``group_by_length`` of Hugging Face's trainer), so that little is padded and the order is still random.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WINDOW = 50
"""Batches among which rows are sorted by length."""


def training_batches(
    lengths_N: Tensor | None, rows: int, batch_size: int, generator: torch.Generator, *, drop_last: bool = False
) -> list[Tensor]:
    """Every row once, in random order, in batches of ``batch_size``; the last may be smaller.

    Args:
        lengths_N: tokens of each row, int64 (N,), or None where rows have no length.
        rows: N.
        batch_size: rows of a batch, at least 1.
        generator: where the order is drawn from; the same state gives the same order.
        drop_last: leave out the rows that do not fill a batch (a random choice of them each time).

    Returns:
        int64 index tensors, each (B,).
    """
    order_N = torch.randperm(rows, generator=generator)
    if drop_last:
        order_N = order_N[: rows - rows % batch_size]
    if lengths_N is None or len(order_N) == 0:
        return list(torch.split(order_N, batch_size)) if len(order_N) else []
    batches: list[Tensor] = []
    for window in torch.split(order_N, _WINDOW * batch_size):
        batches.extend(torch.split(window[lengths_N[window].argsort(stable=True)], batch_size))
    return [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]


def evaluation_batches(lengths_N: Tensor | None, rows: int, batch_size: int) -> list[Tensor]:
    """Every row once, the same order every time: by length where rows have one, else as they lie.

    Returns:
        int64 index tensors, each (B,).
    """
    order_N = torch.arange(rows) if lengths_N is None else lengths_N.argsort(stable=True)
    return list(torch.split(order_N, batch_size)) if rows else []
