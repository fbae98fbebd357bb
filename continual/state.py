"""State on disk and back: safetensors for tensors, JSON for the rest; nothing pickled, nothing half-written.

A state is any nesting of dicts (with string keys), lists, tensors and plain JSON values. It is written to a temporary
folder beside its place, flushed to the disk, sealed with the SHA-256 of each file and renamed, so that a reader sees the
old state or the new one and never a part of either.

A state of many experiences is mostly small tensors, each of which costs safetensors more than its bytes do: those of one dtype
are written as one.
"""

from __future__ import annotations

import json
import math
import shutil
import uuid
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
_SMALL = 16 * 1024
"""Bytes up to which a tensor is written together with others of its dtype."""
_PACKABLE = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
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
        if kind in _PACKABLE and tensor.numel() * tensor.element_size() <= _SMALL:
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
            assert isinstance(key, str) and key not in (_TENSOR, _FLOAT, _PACKED, _PLAIN), (
                f"state keys are plain strings, not {key!r}"
            )
        return {key: _flatten(item, tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_flatten(item, tensors) for item in value]
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
        return {key: _unflatten(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_unflatten(item, tensors) for item in value]
    return value
