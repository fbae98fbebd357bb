"""The wording of texts as columns of numbers that mean the same for every topic.

How long a row is, the shares of its tokens that are unknown or go on a word, and the share of its neighbouring tokens that
stand in their usual order. Usual is what one half of the rows at hand does more often, counted over pairs of tokens; the
other half is compared. Shuffled words leave everything but this as it was.

Letters: N new rows, M rows at hand, B rows of a batch, T tokens of a row, U tokens of all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from continual.refresh.shifts import Floats, Ints
from continual.streams.batching import evaluation_batches
from continual.table import Table

_SUPPORT = 3
_BATCH = 256

Columns = dict[str, tuple[Floats, Floats]]
"""What is compared, by name: the values of the new rows (N,) and of those at hand (M,)."""
Pieces = Callable[[Tensor], Tensor]
"""Token ids int64 (U,) → whether each goes on a word, bool (U,)."""


@dataclass(frozen=True)
class Tokens:
    """Rows of tokens one after another: ids and the row of each, int64 (U,), and the number of rows."""

    ids: Ints
    row_of: Ints
    rows: int


def read_tokens(table: Table, name: str = "input_ids") -> Tokens:
    """The tokens of every row; of ``input_ids`` those that the mask lets count."""
    ids, rows = [], []
    for index_B in evaluation_batches(None, len(table), _BATCH):
        batch = table[index_B]
        ids_BT = batch[name].cpu()
        masked = name == "input_ids" and "attention_mask" in batch
        counts_BT = batch["attention_mask"].cpu().bool() if masked else torch.ones_like(ids_BT, dtype=torch.bool)
        ids.append(ids_BT[counts_BT])
        rows.append(index_B[:, None].expand_as(ids_BT)[counts_BT])
    empty = [torch.empty(0, dtype=torch.int64)]
    return Tokens(torch.cat(ids or empty).numpy(), torch.cat(rows or empty).numpy(), len(table))


def word_pieces(tokenizer: Any) -> Pieces | None:
    """Which token ids go on a word, as a function int64 (U,) → bool (U,); None where the vocabulary does not tell.

    Vocabularies mark either what goes on a word (``##``) or what begins one (``▁``, ``Ġ``); special tokens do neither.
    """
    tokens = [str(token) for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
    special = set(tokenizer.all_special_tokens)
    for mark, begins in (("##", False), ("▁", True), ("Ġ", True)):
        marked = [token.startswith(mark) for token in tokens]
        if sum(marked) * 100 >= len(tokens):
            goes_on = [found != begins and token not in special for found, token in zip(marked, tokens, strict=True)]
            return torch.tensor(goes_on).__getitem__
    return None


def text_columns(new: Tokens, old: Tokens, unknown: int | None, pieces: Pieces | None) -> Columns:
    """What is compared of texts, float64 (N,) and (M,); NaN where a row says nothing of it. The rows at hand stand in random order."""
    columns = {"length": (_lengths(new), _lengths(old))}
    if unknown is not None:
        columns["unknown tokens"] = (_share(new, new.ids == unknown), _share(old, old.ids == unknown))
    if pieces is not None:
        goes_on = [pieces(torch.from_numpy(side.ids)).cpu().numpy() for side in (new, old)]
        columns["word pieces"] = (_share(new, goes_on[0]), _share(old, goes_on[1]))
    columns["word order"] = _usual_order(new, old)
    return columns


def _lengths(side: Tokens) -> Floats:
    return np.bincount(side.row_of, minlength=side.rows).astype(np.float64)


def _share(side: Tokens, which_U: NDArray[np.bool_]) -> Floats:
    """Share of a row's tokens, NaN for a row without any."""
    return _ratio(np.bincount(side.row_of, which_U, side.rows), _lengths(side))


def _ratio(part_N: NDArray[Any], whole_N: NDArray[Any]) -> Floats:
    found: Floats = np.divide(part_N, whole_N, out=np.full(len(part_N), np.nan), where=whole_N > 0)
    return found


def _usual_order(new: Tokens, old: Tokens) -> tuple[Floats, Floats]:
    """Share of a row's pairs of neighbours that stand in the order that is usual; every other row at hand says what is.

    A pair counts where those rows have it :data:`_SUPPORT` times at least, and one order more often than the other. Tokens
    that all of them hold (those that begin and end a row) are left out.
    """
    counts_M = old.row_of % 2 == 0
    id_U, row_U = old.ids[counts_M], old.row_of[counts_M]
    held, in_rows = np.unique(np.unique(np.stack([row_U, id_U]), axis=1)[1], return_counts=True)
    everywhere = held[in_rows == len(np.unique(row_U))]
    base = 1 + max(int(new.ids.max(initial=0)), int(old.ids.max(initial=0)))
    first, second, _ = _neighbours(id_U, row_U, everywhere)
    known, counts = np.unique(first * base + second, return_counts=True)

    def times(first: Ints, second: Ints) -> Ints:
        if not len(known):
            return np.zeros(len(first), dtype=np.int64)
        place = np.searchsorted(known, first * base + second).clip(max=len(known) - 1)
        return np.where(known[place] == first * base + second, counts[place], 0)

    def share(side: Tokens) -> Floats:
        first, second, row = _neighbours(side.ids, side.row_of, everywhere)
        so, other_way = times(first, second), times(second, first)
        counted = (so + other_way >= _SUPPORT) & (so != other_way)
        return _ratio(np.bincount(row, counted & (so > other_way), side.rows), np.bincount(row, counted, side.rows))

    of_old = share(old)
    of_old[::2] = np.nan
    return share(new), of_old


def _neighbours(id_U: Ints, row_U: Ints, left_out: Ints) -> tuple[Ints, Ints, Ints]:
    """First and second token of each pair of neighbours, and the row that they stand in."""
    kept = ~np.isin(id_U, left_out)
    id_U, row_U = id_U[kept], row_U[kept]
    same = row_U[1:] == row_U[:-1]
    return id_U[:-1][same], id_U[1:][same], row_U[1:][same]
