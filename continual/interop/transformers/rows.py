"""The rows of a trainer: its data set read through its own collator as a table, and batches that say which rows they hold.

Nothing is copied: a :class:`DatasetTable` reads the data set, and so does the trainer's loader, which gets a view of it that
hands out each row's id beside the row.

Letters: B rows of a batch, N rows of a data set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from continual.errors import StreamError, quoted
from continual.learner.checkpoint import table_from_state, table_state
from continual.streams.content import row_keys
from continual.table import Batch, Table, TensorTable

Collate = Callable[[list[Any]], Mapping[str, Any]]
ROW_ROOM = 2**38
"""Row ids that a part (training or test rows) of one experience may use."""
_BLOCK = 256


class DatasetTable(Table):
    """A data set of a trainer, read row by row and collated batch by batch.

    Args:
        dataset: has a length, and rows that are mappings.
        collate: makes a batch of a list of rows, the same one every time.
        columns: what the model reads of a batch, beside ``labels``.
        rows_N: id of each row, int64 (N,).
    """

    def __init__(self, dataset: Any, collate: Collate, columns: Sequence[str], rows_N: Tensor) -> None:
        self.dataset, self.collate, self.columns, self.rows_N = dataset, collate, tuple(columns), rows_N
        self._known: _Known | None = None

    def __len__(self) -> int:
        return len(self.rows_N)

    def __getitem__(self, index_B: Tensor) -> Batch:
        batch = batch_of(self.collate(items_at(self.dataset, index_B.tolist())), self.columns)
        return {**batch, "row": self.rows_N[index_B.cpu()]}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self[torch.zeros(1, dtype=torch.int64)]) if len(self) else ("labels", "row")

    def column(self, name: str) -> Tensor:
        """``row``, or ``labels`` where there is one a row."""
        if name == "row":
            return self.rows_N
        labels = self._scanned().labels if name == "labels" else None
        if labels is None:
            raise self.missing(name)
        return labels

    def strings(self, name: str) -> Sequence[Any]:
        raise self.missing(name)

    @property
    def lengths(self) -> Tensor | None:
        return self._scanned().lengths

    def content_keys(self) -> npt.NDArray[np.int64]:
        """One number a row for what the model reads of it (:func:`~continual.streams.content.row_keys`)."""
        return self._scanned().keys

    def _scanned(self) -> _Known:
        """What must be known of every row, from one pass over all of them."""
        if self._known is None:
            keys, lengths, labels = [], [], []
            for index_B in torch.split(torch.arange(len(self)), _BLOCK):
                block = owned(self, index_B)
                keys.append(row_keys(block))
                if block.lengths is not None:
                    lengths.append(block.lengths)
                label = block.columns["labels"]
                if isinstance(label, Tensor) and label.dim() == 1:
                    labels.append(label.cpu())
            self._known = _Known(
                np.concatenate(keys),
                torch.cat(lengths) if len(lengths) == len(keys) else None,
                torch.cat(labels) if len(labels) == len(keys) else None,
            )
        return self._known


@dataclass(frozen=True)
class _Known:
    """Of every row (N,): a number for its content; its tokens, where rows have a length; its label, where it has one."""

    keys: npt.NDArray[np.int64]
    lengths: Tensor | None
    labels: Tensor | None


class Numbered(Dataset[Any]):
    """A data set whose rows come as pairs of id and row."""

    def __init__(self, dataset: Any, rows_N: Tensor) -> None:
        self.dataset, self.rows_N = dataset, rows_N

    def __len__(self) -> int:
        return len(self.rows_N)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return int(self.rows_N[index]), self.dataset[index]

    def __getitems__(self, indices: list[int]) -> list[tuple[int, Any]]:
        return list(zip(self.rows_N[indices].tolist(), items_at(self.dataset, indices), strict=True))


class NumberedCollator:
    """Collates pairs of id and row: the rows as ``collate`` does, and the ids as a column ``row``."""

    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __call__(self, pairs: list[tuple[int, Any]]) -> dict[str, Any]:
        return {**self.collate([row for _, row in pairs]), "row": torch.tensor([number for number, _ in pairs])}


def items_at(dataset: Any, indices: list[int]) -> list[Any]:
    """The rows at these places, in one call where the data set can."""
    many = getattr(dataset, "__getitems__", None)
    return list(many(indices)) if many is not None else [dataset[index] for index in indices]


def batch_of(inputs: Mapping[str, Any], columns: Sequence[str]) -> Batch:
    """What the model and the parts read of a collated batch.

    Raises:
        StreamError: there are no labels in it.
    """
    if not isinstance(inputs.get("labels"), Tensor):
        raise StreamError(
            f"the rows have {quoted(sorted(inputs))} and no 'labels': give the data set labels, or a collator that makes "
            "them."
        )
    return {name: inputs[name] for name in (*columns, "labels", "row") if isinstance(inputs.get(name), Tensor)}


def row_ids(dataset: Any, index: int, part: int, what: str) -> Tensor:
    """Ids int64 (N,): those of a column ``row``, else such as follow from the experience, the part and the place.

    Args:
        part: 0 for training rows, 2 for test rows.

    Raises:
        StreamError: a data set without a length or rows, or ids that are no whole numbers, one a row.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise StreamError(
            f"{what} is {type(dataset).__name__}, whose rows cannot be counted and read again, as a memory and Fisher "
            "information need: give a data set with a length (datasets.Dataset, a torch Dataset)."
        )
    if not len(dataset):
        raise StreamError(f"{what} has no rows: give it some.")
    first = dataset[0]
    if not isinstance(first, Mapping):
        raise StreamError(f"the rows of {what} are {type(first).__name__}: give rows that are mappings of columns.")
    if "row" not in first:
        start = (3 * index + part) * ROW_ROOM
        return torch.arange(start, start + len(dataset))
    columns = getattr(dataset, "column_names", None)
    ids = list(dataset["row"]) if columns else [dataset[place]["row"] for place in range(len(dataset))]
    try:
        rows_N = torch.as_tensor(ids)
    except (TypeError, ValueError):
        rows_N = torch.empty(0)
    if rows_N.is_floating_point() or rows_N.dim() != 1 or len(torch.unique(rows_N)) < len(dataset):
        raise StreamError(
            f"the column 'row' of {what} is no id of its own for each row: give different whole numbers, or leave it out."
        )
    return rows_N.to(torch.int64)


def owned(table: Table, index_N: Tensor | None = None) -> TensorTable:
    """The rows (at ``index_N``) as a table that owns them."""
    return table_from_state(table_state(table if index_N is None else table.select(index_N)))
