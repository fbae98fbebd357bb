"""Rows that are kept: copied into storage of our own, allocated once, bounded in rows or in bytes.

Dense columns lie as (C, ...) in their own dtype. Token columns (``input_ids``, two-dimensional integer ``labels``) lie
as (C, widest row) in the smallest integer dtype that holds them, with a vector of lengths; the attention mask is not
stored but rebuilt. Dense columns that grow (the logits of a head that does) lie in the same way. Storage is allocated
again only when a longer row (or a larger token id) comes, or the capacity is changed. Nothing of the tables that rows
came from is kept.

Letters: B rows of a batch, C capacity in rows, K rows that stay, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from continual.errors import SpecError, StateError, StreamError, quoted
from continual.parts.replay.columns import (
    LENGTH_DTYPE,
    Form,
    form_of,
    mapped_file,
    padded,
    parse_bytes,
    token_lengths,
    within,
)
from continual.table import PADS, Batch

Storage = Literal["device", "cpu", "memmap"]
Keep = Callable[[int], Tensor]
"""Given how many rows fit, the places (K,) of those that stay."""


class Memory:
    """Rows in places 0 … ``len(memory) - 1``.

    Args:
        capacity: rows, or bytes as ``"20MB"``.
        storage: ``device``, ``cpu``, or ``memmap`` (files under ``folder``, for what does not fit).
        device: where ``device`` storage lies.
        folder: for ``memmap``.
        beside: bytes that the owner keeps beside each row, counted against a capacity in bytes.
        growing: floating-point columns (B, width) whose width may grow from one batch to the next.

    Raises:
        SpecError: a capacity that holds no row, or ``memmap`` without a folder.
    """

    def __init__(
        self,
        capacity: int | str,
        *,
        storage: Storage = "cpu",
        device: torch.device | None = None,
        folder: str | Path | None = None,
        beside: int = 0,
        growing: tuple[str, ...] = (),
    ) -> None:
        self.byte_limit = parse_bytes(capacity) if isinstance(capacity, str) else None
        self.capacity = 0 if isinstance(capacity, str) else capacity
        if self.byte_limit is None and self.capacity < 1:
            raise SpecError(f"a capacity of {capacity} holds no row: give at least 1 row, or bytes as '20MB'.")
        if (storage == "memmap") != (folder is not None):
            raise SpecError("a folder belongs to storage: memmap, and memmap needs one: give both or neither.")
        self.storage, self.folder, self.beside = storage, None if folder is None else Path(folder), beside
        self.device = torch.device("cpu") if storage != "device" or device is None else device
        self.growing = growing
        self.forms: dict[str, Form] = {}
        self._order: list[str] = []
        self._aligned = True
        self._count = 0
        self._values: dict[str, Tensor] = {}
        self._lengths: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return self._count

    @property
    def names(self) -> list[str]:
        """Columns of a batch, in the order of the first one; empty before it."""
        return self._order

    @property
    def lengths(self) -> Tensor | None:
        """Tokens of each row held, int32 CPU (N,); None where rows have no tokens."""
        lengths_C = self._lengths.get("input_ids")
        return None if lengths_C is None else lengths_C[: self._count]

    @property
    def elastic(self) -> bool:
        """Whether wider rows make fewer fit: bounded in bytes, with columns that can get wider."""
        return self.byte_limit is not None and any(form.tokens for form in self.forms.values())

    def batch(self, index_B: Tensor) -> Batch:
        """The rows at ``index_B`` (int64 CPU, (B,)) on the memory's device, tokens padded to the longest row drawn."""
        found: Batch = {}
        place_B = index_B.to(self.device, non_blocking=True)
        lengths = {name: lengths_C.index_select(0, index_B) for name, lengths_C in self._lengths.items()}
        widths = {name: max(int(lengths_B.max()), 1) if len(lengths_B) else 1 for name, lengths_B in lengths.items()}
        if self._aligned and widths.keys() >= {"input_ids", "labels"}:
            widths["labels"] = max(widths["input_ids"], widths["labels"])
        for name in self._order:
            if name == "attention_mask" and "input_ids" in lengths:
                mask_BT = within(lengths["input_ids"], widths["input_ids"]).to(torch.int64)
                found[name] = mask_BT.to(self.device, non_blocking=True)
            elif name in widths:
                values_CT = self._values[name]
                short = widths[name] - values_CT.shape[1]
                rows_BT = values_CT[:, : widths[name]].index_select(0, place_B)
                rows_BT = rows_BT if rows_BT.is_floating_point() else rows_BT.to(torch.int64)
                if short > 0:
                    rows_BT = torch.nn.functional.pad(rows_BT, (0, short), value=self.forms[name].fill)
                found[name] = rows_BT
            else:
                found[name] = self._values[name].index_select(0, place_B)
        return found

    def widths(self, name: str, index_B: Tensor) -> Tensor:
        """Own width of the rows at ``index_B`` in a token column or one that grows, int32 CPU (B,)."""
        return self._lengths[name].index_select(0, index_B)

    def fit(self, batch: Batch, keep: Keep | None = None) -> None:
        """Make room for rows like these: learn the columns from the first batch, widen token columns for a longer row.

        Args:
            keep: called where a capacity in bytes now holds fewer rows than there are.

        Raises:
            SpecError: the capacity in bytes holds no row.
            StreamError: the columns are not those of the rows before.
        """
        if len(batch["labels"]):
            self._fit(batch, self._lengths_of(batch), keep)

    def _lengths_of(self, batch: Batch) -> dict[str, Tensor]:
        grown = {name: batch[name] for name in self.growing if name in batch}
        full = {name: torch.full((len(c),), c.shape[1], dtype=LENGTH_DTYPE) for name, c in grown.items()}
        return {**token_lengths(batch), **full}

    def _fit(self, batch: Batch, lengths: dict[str, Tensor], keep: Keep | None) -> None:
        stored = [name for name in batch if not (name == "attention_mask" and "input_ids" in lengths)]
        forms = {name: form_of(name, batch[name], lengths.get(name)) for name in stored}
        if lengths.keys() >= {"input_ids", "labels"} and batch["labels"].shape != batch["input_ids"].shape:
            self._aligned = False
        if self.forms:
            self._check(forms)
            if all(self.forms[name].covers(form) for name, form in forms.items()):
                return
            forms = {name: form.joined(forms[name]) for name, form in self.forms.items()}
        capacity = self._rows_of(forms)
        if self._count > capacity:
            assert keep is not None, "who bounds a memory in bytes says which rows stay"
            self.keep(keep(capacity))
        if not self._order:
            self._order = list(batch)
        self._allocate(forms, capacity)

    def put(self, places_B: Tensor, batch: Batch) -> None:
        """Write the rows of ``batch`` at ``places_B`` (int64 CPU), which are places in use or those that follow them.

        Raises:
            StreamError: the columns are not those of the rows before.
        """
        if not len(places_B):
            return
        lengths = self._lengths_of(batch)
        self._fit(batch, lengths, None)
        last = int(places_B.max())
        assert last < self.capacity, f"place {last} of a memory of {self.capacity} rows"
        place_B = places_B.to(self.device)
        for name, form in self.forms.items():
            column = batch[name].detach()
            if name in lengths:
                self._lengths[name][places_B] = lengths[name]
                column = padded(column, lengths[name], form)
            self._values[name][place_B] = column.to(self.device)
        self._count = max(self._count, last + 1)

    def rows(self) -> Tensor:
        """Ids of the rows held, int64 CPU (N,), a copy."""
        if "row" not in self._values:
            return torch.empty(0, dtype=torch.int64)
        return self._values["row"][: self._count].to("cpu", torch.int64, copy=True)

    def keep(self, places_K: Tensor) -> None:
        """Move the rows at ``places_K`` (CPU, ascending) to the front and overwrite all others with zeros."""
        count, self._count = self._count, len(places_K)
        for values in (*self._values.values(), *self._lengths.values()):
            moved = values[:count].index_select(0, places_K.to(values.device))
            values[: len(places_K)] = moved
            values[len(places_K) : count].zero_()
            moved.zero_()

    def erase(self, rows: Tensor) -> int:
        """Overwrite the rows with these ids with zeros and close the gaps; returns how many there were."""
        stays_N = ~torch.isin(self.rows(), rows.to("cpu", torch.int64))
        erased = int((~stays_N).sum())
        if erased:
            self.keep(stays_N.nonzero().flatten())
        return erased

    def resize(self, capacity: int) -> None:
        """Another capacity in rows, not below the rows held."""
        assert capacity >= self._count and self.byte_limit is None
        if not self.forms:
            self.capacity = capacity
        elif capacity != self.capacity:
            self._allocate(self.forms, capacity)

    def to(self, device: torch.device) -> None:
        """Lie on ``device`` from now on, where storage is ``device``."""
        if self.storage == "device" and device != self.device:
            self.device = device
            self._values = {name: values.to(device) for name, values in self._values.items()}

    def nbytes(self) -> int:
        """Bytes allocated, filled or not."""
        return sum(tensor.nbytes for tensor in [*self._values.values(), *self._lengths.values()])

    def state_dict(self) -> dict[str, Any]:
        """The rows held, and no more."""
        return {
            "order": list(self._order),
            "aligned": self._aligned,
            "columns": {name: values[: self._count].clone() for name, values in self._values.items()},
            "lengths": {name: lengths[: self._count].clone() for name, lengths in self._lengths.items()},
            "count": self._count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state`` in fresh storage.

        Raises:
            StateError: more rows than fit here, or columns that do not belong together.
        """
        count, columns, lengths = int(state["count"]), dict(state["columns"]), dict(state["lengths"])
        forms = {}
        for name, column in columns.items():
            tokens = name in lengths
            forms[name] = Form(tuple(column.shape[1:]), column.dtype, tokens, PADS.get(name, 0) if tokens else 0)
            if not _sound(column, lengths.get(name), count):
                raise StateError(
                    f"the column '{name}' of a saved memory is not one of {count} rows: the state is damaged, use an "
                    "earlier one."
                )
        capacity = self._rows_of(forms) if forms else self.capacity
        if count > capacity:
            raise StateError(
                f"the saved memory holds {count} rows and this one has room for {capacity}: give it the capacity that "
                "it was saved with, or more."
            )
        self._order, self._aligned, self._count = list(state["order"]), bool(state["aligned"]), 0
        self._values, self._lengths, self.forms, self.capacity = {}, {}, {}, capacity
        if forms:
            self._allocate(forms, capacity)
            self._count = count
            for name, column in columns.items():
                self._values[name][:count] = column.to(self.device)
            for name, lengths_N in lengths.items():
                self._lengths[name][:count] = lengths_N

    def _rows_of(self, forms: dict[str, Form]) -> int:
        """How many rows of these forms fit."""
        if self.byte_limit is None:
            return self.capacity
        row_bytes = sum(form.row_bytes for form in forms.values()) + self.beside
        capacity = self.byte_limit // max(row_bytes, 1)
        if capacity < 1:
            raise SpecError(
                f"a replay memory of {self.byte_limit} bytes holds no row, for one row takes {row_bytes} bytes: give a "
                f"capacity of '{row_bytes}B' at least, or one in rows."
            )
        return capacity

    def _allocate(self, forms: dict[str, Form], capacity: int) -> None:
        """New storage, the rows held copied into it one column after the other."""
        for name, form in forms.items():
            old = self._values.get(name)
            if old is not None and old.shape == (capacity, *form.shape) and old.dtype == form.dtype:
                continue
            new = self._zeros((capacity, *form.shape), form.dtype)
            if old is not None:
                kept = new[: self._count]
                if form.tokens:
                    kept.fill_(form.fill)
                    kept = kept[:, : old.shape[1]]
                kept.copy_(old[: self._count])
            self._values[name] = new
            if form.tokens:
                lengths_C = torch.zeros(capacity, dtype=LENGTH_DTYPE)
                if name in self._lengths:
                    lengths_C[: self._count] = self._lengths[name][: self._count]
                self._lengths[name] = lengths_C
        self.forms, self.capacity = dict(forms), capacity

    def _zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.folder is not None:
            return mapped_file(self.folder, shape, dtype)
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def _check(self, forms: dict[str, Form]) -> None:
        if set(forms) != set(self.forms):
            raise StreamError(
                f"the rows to be kept have the columns {quoted(forms)} and the memory holds {quoted(self.forms)}: give "
                "every experience of a stream the same columns."
            )
        for name, form in forms.items():
            held = self.forms[name]
            if form.tokens != held.tokens or (not form.tokens and form != held):
                raise StreamError(
                    f"the column '{name}' has rows of {form.shape} {form.dtype} and the memory holds rows of "
                    f"{held.shape} {held.dtype}: give every experience the same shape and type."
                )


def _sound(column: Tensor, lengths_N: Tensor | None, count: int) -> bool:
    if len(column) != count or lengths_N is None:
        return len(column) == count
    inside = lengths_N.numel() == 0 or 0 <= int(lengths_N.min()) <= int(lengths_N.max()) <= column.shape[1]
    return column.dim() == 2 and len(lengths_N) == count and inside
