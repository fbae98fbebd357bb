"""How the columns of a batch are stored: form, widths, measures, and where their bytes lie.

Letters: B rows, C capacity in rows, T tokens.
"""

from __future__ import annotations

import math
import os
import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from continual.errors import SpecError, StateError, StreamError
from continual.table import PADS, Batch

LENGTH_DTYPE = torch.int32
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Form:
    """One column: rows of ``shape``; with ``tokens`` (C, widest row) with a vector of lengths beside them."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    tokens: bool = False
    fill: int = 0

    @property
    def row_bytes(self) -> int:
        own = math.prod(self.shape) * self.dtype.itemsize
        return own + LENGTH_DTYPE.itemsize if self.tokens else own

    def covers(self, other: Form) -> bool:
        """Whether a row of ``other`` can be written here without a loss."""
        if not self.tokens:
            return self == other
        return other.tokens and self.shape[0] >= other.shape[0] and self.dtype.itemsize >= other.dtype.itemsize

    def joined(self, other: Form) -> Form:
        """The smallest form that holds the rows of both."""
        if not self.tokens:
            return self
        wider = max(self.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
        return replace(self, shape=(max(self.shape[0], other.shape[0]),), dtype=wider)


def form_of(name: str, column: Tensor, lengths_B: Tensor | None) -> Form:
    """The smallest form that holds these rows."""
    if lengths_B is None:
        return Form(tuple(column.shape[1:]), column.dtype)
    if column.is_floating_point():
        return Form((int(lengths_B.max()),), column.dtype, tokens=True)
    fill = PADS.get(name, 0)
    kept = column[within(lengths_B, column.shape[1]).to(column.device)]
    low, high = (int(value) for value in kept.aminmax()) if kept.numel() else (fill, fill)
    low, high = min(low, fill), max(high, fill)
    dtype = next(d for d in _INTEGERS if torch.iinfo(d).min <= low and high <= torch.iinfo(d).max)
    return Form((int(lengths_B.max()),), dtype, tokens=True, fill=fill)


def within(lengths_B: Tensor, width: int) -> Tensor:
    """bool (B, T): which places of a padded row hold its tokens."""
    return torch.arange(width) < lengths_B[:, None]


def token_lengths(batch: Batch) -> dict[str, Tensor]:
    """For each token column its rows' lengths, int32 CPU (B,): by the mask, or to the last label that counts.

    Token types are as long as their tokens.

    Raises:
        StreamError: a mask with a 1 after a 0.
    """
    found = {}
    for name in ("input_ids", "labels"):
        column = batch.get(name)
        if column is None or column.dim() != 2 or column.dtype not in _INTEGERS:
            continue
        mask_BT = batch.get("attention_mask") if name == "input_ids" else None
        if mask_BT is not None:
            if bool((mask_BT[:, 1:] > mask_BT[:, :-1]).any()):
                raise StreamError(
                    "the attention mask of a row has a 1 after a 0, so it is not padded on the right: pad rows on the "
                    "right, the memory rebuilds the mask from their lengths."
                )
            lengths_B = mask_BT.sum(1)
        elif name == "labels":
            place_T = torch.arange(1, column.shape[1] + 1, device=column.device)
            counted_BT = (column != PADS["labels"]) * place_T
            lengths_B = counted_BT.amax(1) if column.shape[1] else counted_BT.sum(1)
        else:
            lengths_B = torch.full((len(column),), column.shape[1])
        found[name] = lengths_B.to("cpu", LENGTH_DTYPE)
    types = batch.get("token_type_ids")
    if types is not None and "input_ids" in found and types.shape == batch["input_ids"].shape:
        found["token_type_ids"] = found["input_ids"]
    return found


def padded(column: Tensor, lengths_B: Tensor, form: Form) -> Tensor:
    """Tokens in the stored form: (B, stored width), filled beyond each row's length."""
    width = min(column.shape[1], form.shape[0])
    out = torch.full((len(column), form.shape[0]), form.fill, dtype=form.dtype, device=column.device)
    outside = ~within(lengths_B, width).to(column.device)
    out[:, :width] = column[:, :width].masked_fill(outside, form.fill).to(form.dtype)
    return out


def parse_bytes(text: str) -> int:
    """``"20MB"`` → 20 000 000; units B, kB, MB, GB (powers of 1000), KiB, MiB, GiB (of 1024).

    Raises:
        SpecError: not of this form.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    if match is None or match[2].lower() not in _UNITS:
        raise SpecError(f"the capacity '{text}' is no size: write a number of rows, or bytes as '20MB' or '512KiB'.")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def mapped_file(folder: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros in a file of ``folder``, mapped into memory; the file has no name any more and goes when the tensor does.

    Raises:
        StateError: the folder cannot be written or the disk has not enough room.
    """
    size = math.prod(shape) * dtype.itemsize
    if size == 0:
        return torch.zeros(shape, dtype=dtype)
    path = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, path = tempfile.mkstemp(prefix="memory-", suffix=".bin", dir=folder)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, size)
            else:
                os.truncate(descriptor, size)
        finally:
            os.close(descriptor)
        return torch.from_file(path, shared=True, size=size, dtype=torch.uint8).view(dtype).view(shape)
    except OSError as error:
        raise StateError(
            f"the replay memory could not get {size} bytes in '{folder}' ({error}): name a folder with more room, "
            "lower the capacity, or take storage: cpu."
        ) from error
    finally:
        if path is not None:
            os.unlink(path)
