"""What a row holds, as one number: the same features give the same key wherever they lie.

A key is the first 64 bits of BLAKE2b over the row's feature bytes (text, tokens, numbers); labels and row ids
are no part of it. Keys are computed once for each base table: views and mapped tables take those of their base.
A table of another kind gives its own (``content_keys``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from continual.table import ArrowTable, Concat, Mapped, Ragged, Table, TensorTable, View

Keys = npt.NDArray[np.int64]

TEXTS = ("text", "prompt", "completion", "messages")
"""Columns of strings that features are made of."""

_NOT_FEATURES = ("labels", "row", "attention_mask", "weight")
_ARROW_BATCH = 10_000

_keys: WeakKeyDictionary[Table, Keys] = WeakKeyDictionary()
_finite: WeakKeyDictionary[Table, Tensor] = WeakKeyDictionary()


def row_keys(table: Table) -> Keys:
    """The key of each row's content, int64 (N,)."""
    if isinstance(table, View):
        keys: Keys = row_keys(table.base)[table.index_N.cpu().numpy()]
        return keys
    if isinstance(table, Mapped):
        return row_keys(table.base)
    if isinstance(table, Concat):
        return np.concatenate([row_keys(part) for part in table.tables])
    if table not in _keys:
        own = getattr(table, "content_keys", None)
        _keys[table] = _compute(table) if own is None else own()
    return _keys[table]


def finite_rows(table: Table) -> Tensor:
    """Which rows hold neither NaN nor infinity, bool (N,)."""
    if isinstance(table, View):
        return finite_rows(table.base)[table.index_N]
    if isinstance(table, Mapped):
        return finite_rows(table.base)
    if isinstance(table, Concat):
        return torch.cat([finite_rows(part) for part in table.tables])
    if table not in _finite:
        _finite[table] = _check_finite(table)
    return _finite[table]


def feature_names(table: Table) -> tuple[str, ...]:
    """The columns that a row's content is made of: its strings where it has any, else its numbers."""
    texts = tuple(name for name in TEXTS if name in table.names)
    return texts or tuple(sorted(name for name in table.names if name not in _NOT_FEATURES))


def labels_key(table: Table) -> bytes:
    """Digest of the labels and row ids, as far as they are dense columns."""
    digest = hashlib.sha256()
    for name in ("labels", "row"):
        if name in table.names and not _is_ragged(table, name):
            digest.update(table.column(name).cpu().contiguous().numpy().tobytes())
    return digest.digest()


def text_key(values: Sequence[Any]) -> str:
    """SHA-256 over a whole column of strings or chat messages."""
    digest = hashlib.sha256()
    for start in range(0, len(values), _ARROW_BATCH):
        pieces = [_encoded(value) for value in values[start : start + _ARROW_BATCH]]
        digest.update(np.array([len(piece) for piece in pieces], dtype=np.int64).tobytes())
        digest.update(b"".join(pieces))
    return digest.hexdigest()


def _is_ragged(table: Table, name: str) -> bool:
    if isinstance(table, View | Mapped):
        return _is_ragged(table.base, name)
    if isinstance(table, Concat):
        return any(_is_ragged(part, name) for part in table.tables)
    if isinstance(table, TensorTable):
        return isinstance(table.columns[name], Ragged)
    return isinstance(table, ArrowTable) and name in table.pads


def _compute(table: Table) -> Keys:
    names = feature_names(table)
    if isinstance(table, ArrowTable):
        batches = table.dataset.select_columns(list(names)).iter(_ARROW_BATCH)
        return np.concatenate([_digest([[_encoded(v) for v in batch[name]] for name in names]) for batch in batches])
    return _digest([_bytes_of(table, name) for name in names])


def _bytes_of(table: Table, name: str) -> Iterable[Any]:
    column = table.columns[name] if isinstance(table, TensorTable) else None
    if isinstance(column, Ragged):
        values, offsets = column.values_V.to(torch.int32).numpy(), column.offsets_N1.tolist()
        return [values[start:stop] for start, stop in pairwise(offsets)]
    if isinstance(column, list):
        return [_encoded(value) for value in column]
    dense = table.column(name).cpu().contiguous()
    return list(dense.reshape(len(dense), -1).numpy())


def _encoded(value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    return json.dumps(value, sort_keys=True).encode("utf-8", "surrogatepass")


def _digest(columns: Sequence[Iterable[Any]]) -> Keys:
    if not columns:
        return np.zeros(0, dtype=np.int64)
    first = columns[0] if len(columns) == 1 else map(_joined, zip(*columns, strict=True))
    blake, size = hashlib.blake2b, 8
    return np.frombuffer(b"".join([blake(piece, digest_size=size).digest() for piece in first]), dtype=np.int64)


def _joined(pieces: Sequence[Any]) -> bytes:
    raw = [bytes(piece) for piece in pieces]
    return b"".join(len(piece).to_bytes(8, "little") + piece for piece in raw)


def _check_finite(table: Table) -> Tensor:
    good_N = torch.ones(len(table), dtype=torch.bool)
    if isinstance(table, TensorTable):
        for column in table.columns.values():
            if isinstance(column, Tensor) and column.is_floating_point():
                good_N &= column.reshape(len(column), -1).isfinite().all(1).cpu()
        return good_N
    for start in range(0, len(table), _ARROW_BATCH):
        index_B = torch.arange(start, min(start + _ARROW_BATCH, len(table)))
        for column in table[index_B].values():
            if column.is_floating_point():
                good_N[index_B] &= column.reshape(len(column), -1).isfinite().all(1).cpu()
    return good_N
