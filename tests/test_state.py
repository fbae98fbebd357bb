"""A state on disk: any nesting comes back bit for bit, the same state gives the same bytes, and a forged file is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from continual.errors import StateError
from continual.state import _SMALL, load_state, read_state_file, save_state, state_bytes, tensor_bytes

KINDS = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


def many() -> dict[str, Any]:
    """Every dtype, small and large, empty, without dimensions, a transposed view, twice the same one."""
    draw = torch.Generator().manual_seed(0)

    def tensor(kind: torch.dtype, *shape: int) -> Tensor:
        return (torch.rand(shape, generator=draw) * 100).to(kind)

    base = tensor(torch.float32, 6, 4)
    found: dict[str, Any] = {str(kind): [tensor(kind, 3), tensor(kind, 0, 2), tensor(kind)] for kind in KINDS}
    found["large"] = tensor(torch.float32, _SMALL // 4 + 1)
    found["just small"] = tensor(torch.float32, _SMALL // 4)
    found["views"] = {"transposed": base.T, "part": base[1:3, ::2], "whole": base, "again": base}
    found["plain"] = [1, 2.5, float("nan"), float("-inf"), None, True, "text", {"nested": []}]
    return found


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return type(one) is type(other) and (one == other or one != one)


def test_any_state_comes_back(tmp_path: Path) -> None:
    save_state(tmp_path / "folder", many())
    (tmp_path / "file").write_bytes(state_bytes(many()))
    for found in (load_state(tmp_path / "folder"), read_state_file(tmp_path / "file")):
        assert same(found, many())
        found["views"]["whole"].zero_()
        assert same(found["views"]["again"], many()["views"]["again"]), "no two tensors share memory"


def test_the_same_state_gives_the_same_bytes() -> None:
    assert len({state_bytes(many()) for _ in range(8)}) == 1


def test_a_state_whose_tensors_were_written_one_by_one_is_read(tmp_path: Path) -> None:
    plain = {"a": {"$tensor": "0"}, "b": [{"$tensor": "1"}, 3]}
    save_file({"0": torch.arange(3), "1": torch.ones(2, 2)}, tmp_path / "file", {"state": json.dumps(plain)})
    assert same(read_state_file(tmp_path / "file"), {"a": torch.arange(3), "b": [torch.ones(2, 2), 3]})


def alike(count: int) -> list[dict[str, Any]]:
    """Entries of one shape, as a state of many experiences has them."""
    return [
        {
            "name": f"e{i}",
            "rows": torch.arange(i),
            "scores": [{"value": torch.tensor(i / 7), "at": (i, None)}, math.inf],
        }
        for i in range(count)
    ]


@pytest.mark.parametrize(
    "values",
    [
        alike(7),
        alike(8),
        alike(40),
        {f"key {i}": one for i, one in enumerate(alike(9))},
        [*alike(8), {"name": "other"}],
        [*alike(8), None],
        [None, *alike(8)],
        [torch.zeros(2), *[torch.zeros(2, dtype=torch.int64)] * 9],
        [torch.zeros(5000), *[torch.zeros(3)] * 9],
        [torch.ones(1, 0, 2), *[torch.ones(2, 1).t()] * 9],
        [[]] * 9,
        [{}] * 9,
        [[1, 2]] * 9 + [[1]],
        [*alike(9), {**alike(1)[0], "scores": []}],
        [[torch.zeros(i)] * (i % 3) for i in range(20)],
        [[] if i % 2 else [{"a": torch.ones(2), "b": [i] * i}] for i in range(30)],
        [{"a": 1, "b": 2}] * 9 + [{"b": 2, "a": 1}],
        [torch.tensor([True, False], dtype=torch.bool)] * 9,
        [torch.tensor(1 + 2j)] * 9,
        list(range(20)),
    ],
    ids=lambda values: str(values)[:40],
)
def test_values_that_are_alike_come_back_as_they_were(tmp_path: Path, values: Any) -> None:
    (tmp_path / "file").write_bytes(state_bytes({"values": values, "after": torch.ones(3)}))
    found = read_state_file(tmp_path / "file")
    assert same(found["values"], lists(values)) and same(found["after"], torch.ones(3))
    if isinstance(values, dict):
        assert list(found["values"]) == list(values)


def lists(value: Any) -> Any:
    """Tuples become lists, as in any state."""
    if isinstance(value, dict):
        return {key: lists(one) for key, one in value.items()}
    return [lists(one) for one in value] if isinstance(value, list | tuple) else value


def test_tensors_that_were_alike_share_no_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(state_bytes({"values": alike(9)}))
    found = read_state_file(tmp_path / "file")["values"]
    found[4]["rows"].zero_()
    assert same(found[3]["rows"], torch.arange(3)) and same(found[5]["rows"], torch.arange(5))


def test_many_entries_that_are_alike_cost_few_words() -> None:
    one, many_ = (len(state_bytes({"values": alike(count)})) for count in (100, 1100))
    assert (many_ - one) / 1000 < sum(tensor_bytes(entry) for entry in alike(1100)[100:]) / 1000 + 60


@pytest.mark.parametrize(
    "content",
    [
        {"$packed": {}, "$plain": {"a": {"$column": {"joined": "int64", "shapes": [[4]]}}}},
        {"$packed": {}, "$plain": {"a": {"$column": {"joined": "other", "shapes": [[3]]}}}},
        {"$packed": {}, "$plain": {"a": {"$column": {"joined": "int64", "shapes": 3}}}},
        {"$packed": {}, "$plain": {"a": {"$column": {"keys": ["k"], "fields": []}}}},
        {"$packed": {}, "$plain": {"a": {"$column": {"keys": ["k"], "fields": [{"plain": [1]}, {"plain": [1]}]}}}},
        {"$packed": {}, "$plain": {"a": {"$column": {"fields": [{"plain": [1]}, {"plain": [1, 2]}]}}}},
        {"$packed": {}, "$plain": {"a": {"$column": {}}}},
        {"$packed": {}, "$plain": {"a": {"$column": {"lengths": [1, 2], "items": {"plain": [1, 2]}}}}},
        {"$packed": {}, "$plain": {"a": {"$column": {"lengths": [1, 2], "items": {"plain": [1, 2, 3, 4]}}}}},
        {"$packed": {}, "$plain": {"a": {"$column": {"lengths": [1, -1], "items": {"plain": []}}}}},
        {"$packed": {}, "$plain": {"a": {"$column": {"lengths": 3, "items": {"plain": []}}}}},
        {"$packed": {}, "$plain": {"a": {"$column": [1]}}},
        {"$packed": {}, "$plain": {"a": {"$keys": ["k", "l"], "$column": {"plain": [1]}}}},
        {"$packed": {}, "$plain": {"a": {"$keys": 3, "$column": {"plain": [1]}}}},
        {"$packed": {"int64": {"0": [4]}}, "$plain": {}},
        {"$packed": {"int64": {"0": [-1]}}, "$plain": {}},
        {"$packed": {"int64": {"0": [1], "1": [1, 1]}}, "$plain": {}},
        {"$packed": {"int64": {"0": ["3"]}}, "$plain": {}},
        {"$packed": {"int64": 3}, "$plain": {}},
        {"$packed": {"float32": {"0": [3]}}, "$plain": {}},
        {"$packed": [], "$plain": {}},
        {"$packed": {}, "$plain": {"a": {"$tensor": "9"}}},
        {"$packed": {}, "$plain": []},
        [],
    ],
    ids=str,
)
def test_a_forged_file_is_refused(tmp_path: Path, content: Any) -> None:
    save_file({"int64": torch.arange(3)}, tmp_path / "file", {"state": json.dumps(content)})
    with pytest.raises(StateError, match="is damaged"):
        read_state_file(tmp_path / "file")
