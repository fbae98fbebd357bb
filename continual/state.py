"""State on disk and back: safetensors for tensors, JSON for the rest; nothing pickled, nothing half-written.

A state is any nesting of dicts (with string keys), lists, tensors and plain JSON values. It is written to a temporary
folder beside its place, flushed to the disk, sealed with the SHA-256 of each file and renamed, so that a reader sees the
old state or the new one and never a part of either.

A state of many experiences is mostly small tensors, each of which costs safetensors more than its bytes do: those of one dtype
are written as one. And it is the same few fields over and over: values that are alike are written field by field, so that a
thousand experiences cost a few long columns and not thousands of short entries.
"""

from __future__ import annotations

import json
import math
import shutil
import uuid
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from continual.disk import check_replaceable, check_seal, recover_folder, replace_folder, seal_folder
from continual.errors import StateError

_TENSOR = "$tensor"
_FLOAT = "$float"
_METADATA = "state"  # one key alone: safetensors writes several in an order that is drawn anew each time
_PLAIN = "$plain"
_PACKED = "$packed"
_COLUMN = "$column"
_KEYS = "$keys"
_RESERVED = (_TENSOR, _FLOAT, _PACKED, _PLAIN, _COLUMN, _KEYS)
_MANY = 8
"""Values from which on those that are alike are written field by field."""
_SMALL = 16 * 1024
"""Bytes up to which a tensor is written together with others of its dtype."""
_PACKABLE = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}
_SIGNS = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError)
"""How a file shows that it holds no state."""


def save_state(folder: Path, state: dict[str, Any]) -> int:
    """Write ``state`` as ``folder``, replacing what is there in one rename; returns the bytes written.

    Raises:
        StateError: the disk is full or the place cannot be written; what was there before is untouched.
    """
    folder = Path(folder)
    check_replaceable(folder)
    plain, whole = _written(state)
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        temporary.mkdir(parents=True)
        save_file(whole, temporary / "tensors.safetensors")
        (temporary / "state.json").write_text(plain, encoding="utf-8")
        seal_folder(temporary)
        size = sum(path.stat().st_size for path in temporary.iterdir())
        replace_folder(temporary, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise StateError(
            f"the state could not be written to '{folder}' ({error}); what was there before is untouched: "
            "free some space or name another folder, then run the command again."
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return size


def load_state(folder: Path) -> dict[str, Any]:
    """Read what :func:`save_state` wrote, after checking every file against its seal.

    Raises:
        StateError: nothing there, a file missing, or a byte changed.
    """
    folder = Path(folder)
    recover_folder(folder)
    check_seal(folder, {"state.json", "tensors.safetensors"})
    try:
        plain = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        with safe_open(folder / "tensors.safetensors", "pt") as file:
            state = _state(plain, file)
    except _SIGNS as error:
        raise StateError(f"the state in '{folder}' is damaged ({error}): use an earlier one.") from error
    assert isinstance(state, dict)
    return state


def state_bytes(state: dict[str, Any]) -> bytes:
    """``state`` as one safetensors file, its plain values in the metadata; the same state gives the same bytes."""
    plain, whole = _written(state)
    return bytes(save(whole, {_METADATA: plain}))


def read_state_file(path: Path) -> dict[str, Any]:
    """What :func:`state_bytes` made, from a file.

    Raises:
        StateError: it is no such file.
    """
    try:
        with safe_open(path, "pt") as file:
            state = _state(json.loads((file.metadata() or {})[_METADATA]), file)
    except _SIGNS as error:
        raise StateError(f"'{path}' is damaged ({type(error).__name__}: {error}): restore it from a backup.") from error
    if not isinstance(state, dict):
        raise StateError(f"'{path}' is damaged (it holds no state): restore it from a backup.")
    return state


def _written(state: dict[str, Any]) -> tuple[str, dict[str, Tensor]]:
    """The plain values as JSON, and the tensors as they are written: contiguous, on the CPU, small ones joined."""
    tensors: dict[str, Tensor] = {}
    plain = _flatten(state, tensors)
    whole: dict[str, Tensor] = {}
    small: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        if tensor.dtype in _PACKABLE and tensor.nbytes <= _SMALL:
            small.setdefault(kind, {})[key] = tensor
        else:
            whole[key] = tensor.cpu().clone(memory_format=torch.contiguous_format)
    for kind, group in small.items():
        whole[kind] = torch.cat([tensor.reshape(-1).cpu() for tensor in group.values()])
    shapes = {kind: {key: list(tensor.shape) for key, tensor in group.items()} for kind, group in small.items()}
    return json.dumps({_PACKED: shapes, _PLAIN: plain}, allow_nan=False, separators=(",", ":")), whole


def _state(content: dict[str, Any], file: Any) -> Any:
    """What :func:`_written` took apart, or wrote before small tensors were joined; ``file`` holds the tensors."""
    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for kind, shapes in content.get(_PACKED, {}).items():
        parts = tensors.pop(kind).split([math.prod(shape) for shape in shapes.values()])
        for (key, shape), part in zip(shapes.items(), parts, strict=True):
            tensors[key] = part.reshape(shape).clone()
    return _unflatten(content.get(_PLAIN, content), tensors)


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in a nesting of dicts and lists."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(tensor_bytes(item) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(tensor_bytes(item) for item in value)
    return 0


def _flatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        key = str(len(tensors))
        tensors[key] = value.detach()
        return {_TENSOR: key}
    if isinstance(value, dict):
        for key in value:
            assert isinstance(key, str) and key not in _RESERVED, f"state keys are plain strings, not {key!r}"
        column = _column(list(value.values()), tensors)
        if column is not None:
            return {_KEYS: list(value), _COLUMN: column}
        return {key: _flatten(item, tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        column = _column(value, tensors)
        return {_COLUMN: column} if column is not None else [_flatten(item, tensors) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: repr(value)}
    assert value is None or isinstance(value, bool | int | float | str), f"a state cannot hold {type(value)}"
    return value


def _unflatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {_TENSOR}:
            return tensors[value[_TENSOR]]
        if set(value) == {_FLOAT}:
            return float(value[_FLOAT])
        if set(value) == {_COLUMN}:
            return _values(value[_COLUMN], tensors)
        if set(value) == {_KEYS, _COLUMN}:
            return dict(zip(value[_KEYS], _values(value[_COLUMN], tensors), strict=True))
        return {key: _unflatten(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_unflatten(item, tensors) for item in value]
    return value


def _column(values: Sequence[Any], tensors: dict[str, Tensor]) -> dict[str, Any] | None:
    """Values that are alike, field by field (lists of different lengths end to end); None where they are few or differ in kind."""
    if len(values) < _MANY:
        return None
    first = values[0]
    if isinstance(first, Tensor):
        kind, place = first.dtype, first.device
        if kind not in _PACKABLE or not all(
            isinstance(one, Tensor) and one.dtype == kind and one.device == place and one.nbytes <= _SMALL
            for one in values
        ):
            return None
        key, shapes = str(len(tensors)), [list(one.shape) for one in values]
        with torch.no_grad():
            tensors[key] = torch.cat([one if one.dim() == 1 else one.reshape(-1) for one in values]).cpu()
        return {"joined": key, "shapes": shapes}
    if isinstance(first, dict):
        keys = list(first)
        if not keys or not all(isinstance(one, dict) and list(one) == keys for one in values):
            return None
        return {"keys": keys, "fields": [_field([one[key] for one in values], tensors) for key in keys]}
    if isinstance(first, list | tuple):
        if not all(isinstance(one, list | tuple) for one in values):
            return None
        lengths = [len(one) for one in values]
        if len(set(lengths)) > 1:
            return {"lengths": lengths, "items": _field([item for one in values for item in one], tensors)}
        if first:
            return {"fields": [_field([one[place] for one in values], tensors) for place in range(len(first))]}
    return None


def _field(values: list[Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    found = _column(values, tensors)
    return {"plain": [_flatten(one, tensors) for one in values]} if found is None else found


def _values(column: dict[str, Any], tensors: dict[str, Tensor]) -> list[Any]:
    """What :func:`_column` or :func:`_field` took apart."""
    if "joined" in column:
        shapes = column["shapes"]
        parts = tensors[column["joined"]].split_with_sizes([math.prod(shape) for shape in shapes])
        return [part.reshape(shape).clone() for part, shape in zip(parts, shapes, strict=True)]
    if "plain" in column:
        return [_unflatten(one, tensors) for one in column["plain"]]
    if "lengths" in column:
        items = iter(_values(column["items"], tensors))
        found = [list(islice(items, length)) for length in column["lengths"]]
        if sum(column["lengths"]) != sum(map(len, found)) or next(items, None) is not None:
            raise ValueError("lists that are longer or shorter than what they hold")
        return found
    rows = zip(*(_values(field, tensors) for field in column["fields"]), strict=True)
    if "keys" not in column:
        return [list(row) for row in rows]
    keys = column["keys"]
    if len(keys) != len(column["fields"]):
        raise ValueError(f"{len(keys)} keys for {len(column['fields'])} fields")
    return [dict(zip(keys, row, strict=True)) for row in rows]
