"""What is searched for erased rows: every byte of a saved folder, and every tensor and string that a learner can reach."""

from __future__ import annotations

import gc
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from continual import Learner
from continual.parts.replay.select import row_keys
from continual.state import save_state
from continual.streams.experience import Experience
from continual.table import TensorTable

RARE = 3 << 60
"""Ids of rows begin here, so that no other number is one of them."""
NUMBERS = (np.int8, np.int16, np.int32, np.int64)
_PASSED = (type, types.ModuleType, types.FrameType, types.BuiltinFunctionType, types.CodeType)


@dataclass
class Rows:
    """Rows whose every number is their own: ids int64 (N,), and content."""

    ids: Tensor
    inputs: Tensor | None = None
    tokens: Sequence[Sequence[int]] = ()

    def ids_as_bytes(self, seeds: Iterable[int] = ()) -> list[bytes]:
        """Ids as int64, as JSON has them, and their keys under the seeds of selections."""
        keys = [row_keys(self.ids, seed).tolist() for seed in seeds]
        numbers = [number for group in [self.ids.tolist(), *keys] for number in group]
        return [number.to_bytes(8, "little", signed=True) for number in numbers] + [
            str(number).encode() for number in numbers
        ]

    def content(self) -> list[bytes]:
        """Two neighbouring inputs as float32, one as float64; all tokens of a row in every type of whole numbers."""
        found: list[bytes] = []
        for row in [] if self.inputs is None else self.inputs.flatten(1):
            found += [row[place : place + 2].numpy().tobytes() for place in range(0, len(row) - 1, 9)]
            found += [row[place : place + 1].double().numpy().tobytes() for place in range(0, len(row), 9)]
        found += [np.array(row, dtype=kind).tobytes() for row in self.tokens for kind in NUMBERS]
        return found


def distinct(experience: Experience, first: int) -> Experience:
    """Every input of every row another number in [0, 1], and ids from ``RARE + first`` on, the same base for all tables."""
    generator = torch.Generator().manual_seed(first)
    tables = {part: getattr(experience, part) for part in ("train", "test") if getattr(experience, part) is not None}
    sizes = [len(table) for table in tables.values()]
    inputs = torch.cat([table.column("inputs") for table in tables.values()])
    inputs = 0.9 * inputs / inputs.abs().max() + 0.1 * torch.rand(inputs.shape, generator=generator)
    base = TensorTable(
        {
            "inputs": inputs,
            "labels": torch.cat([table.column("labels") for table in tables.values()]),
            "row": RARE + first + 977 * torch.arange(sum(sizes)),
        }
    )
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    views = {p: base.select(torch.arange(s, s + n)) for p, s, n in zip(tables, starts, sizes, strict=True)}
    return Experience(
        experience.index, experience.name, views["train"], None, views.get("test"), experience.classes,
        experience.class_names, experience.scenario, experience.objective, experience.total_classes,
    )  # fmt: skip


def rows_of(experiences: Iterable[Experience], ids: Tensor) -> Rows:
    """The rows with these ids, and what they look like."""
    found = []
    for experience in experiences:
        for table in (experience.train, experience.test):
            if table is not None:
                own = torch.isin(table.column("row"), ids).nonzero().flatten()
                found.append(table[own]["inputs"])
    return Rows(ids, torch.cat(found))


def seeds_of(learner: Learner) -> list[int]:
    """Seeds of the keys by which rows are kept."""
    return [part.store.selection.seed for part in learner.parts if hasattr(part, "store")]


def saved(learner: Learner, folder: Path) -> bytes:
    """Every byte of what is saved."""
    save_state(folder, learner._state(with_tests=True))
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def held(learner: Learner) -> bytes:
    """Every byte of every tensor and array that the learner can reach (the whole storage of each), and every string."""
    seen: set[int] = set()
    stores: set[int] = set()
    found: list[bytes] = []
    waiting: list[Any] = [learner]
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, _PASSED):
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            storage = one.untyped_storage()
            if storage.data_ptr() not in stores:
                stores.add(storage.data_ptr())
                found.append(torch.empty(0, dtype=torch.uint8).set_(storage).numpy().tobytes())
            waiting += [one.grad, *vars(one).values()]
        elif isinstance(one, np.ndarray):
            found.append(one.tobytes())
            waiting.append(one.base)
        elif isinstance(one, str):
            found.append(one.encode("utf-8", "surrogatepass"))
        elif isinstance(one, types.FunctionType):
            waiting += [cell.cell_contents for cell in one.__closure__ or ()]
        else:
            waiting += gc.get_referents(one)
    return b"\0".join(found)


def any_of(patterns: Sequence[bytes], content: bytes) -> bool:
    return any(pattern in content for pattern in patterns)


def all_of(patterns: Sequence[bytes], content: bytes) -> bool:
    return all(pattern in content for pattern in patterns)
