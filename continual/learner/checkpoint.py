"""The whole state of a learner as tensors and plain values, and tables among them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from continual.errors import StateError
from continual.table import IGNORED, TOKEN_COLUMNS, Ragged, Table, TensorTable

FORMAT = 5


def table_state(table: Table) -> dict[str, Any]:
    """Every column of a batch, copied: dense ones as they are, token columns row after row.

    Tokens that are not padded on the right alone stay a dense column with their mask.
    """
    if isinstance(table, TensorTable) and "attention_mask" not in table.columns:
        dense = {name: column for name, column in table.columns.items() if isinstance(column, Tensor)}
        if len(dense) == len(table.columns):
            return {"dense": {name: column.clone() for name, column in dense.items()}, "ragged": {}}
    everything = table[torch.arange(len(table))]
    mask = everything.get("attention_mask")
    if mask is not None and bool((mask[:, 1:] <= mask[:, :-1]).all()):
        del everything["attention_mask"]
    else:
        mask = None
    state: dict[str, Any] = {"dense": {}, "ragged": {}}
    for name, column in everything.items():
        if mask is None or name not in TOKEN_COLUMNS or column.dim() != 2:
            state["dense"][name] = column
            continue
        kept = _counted(column, mask) if name == "labels" else mask.bool()
        pad = IGNORED if name == "labels" else _pad(column, mask)
        state["ragged"][name] = {"values": column[kept].to(torch.int32), "lengths": kept.sum(1), "pad": pad}
    return state


def table_from_state(state: dict[str, Any]) -> TensorTable:
    """What :func:`table_state` kept."""
    columns: dict[str, Tensor | Ragged | list[Any]] = dict(state["dense"])
    for name, entry in state["ragged"].items():
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), entry["lengths"].cumsum(0)])
        columns[name] = Ragged(entry["values"], offsets, entry["pad"])
    return TensorTable(columns)


def check_same(what: str, saved: object, given: object) -> None:
    """Raise :class:`StateError` when a state is of another ``what`` than the one it is loaded for."""
    if saved != given:
        raise StateError(
            f"the saved state belongs to another {what} (saved {_short(saved)}, given {_short(given)}): resume it with "
            f"the {what} it was made with, or name another out folder."
        )


def _counted(labels_BT: Tensor, mask: Tensor) -> Tensor:
    """Which places belong to each row of labels: those of its tokens, or up to its last label where it has its own length."""
    if labels_BT.shape == mask.shape and bool((labels_BT[~mask.bool()] == IGNORED).all()):
        return mask.bool()
    place_T = torch.arange(labels_BT.shape[1])
    last_B = torch.where(labels_BT != IGNORED, place_T, -1).max(1).values
    return place_T <= last_B[:, None]


def _pad(column: Tensor, mask: Tensor) -> int:
    padded = column[~mask.bool()]
    return int(padded[0]) if padded.numel() else 0


def _short(value: object) -> str:
    text = str(value)
    return f"'{text}'" if len(text) <= 40 else f"'{text[:12]}…'"
