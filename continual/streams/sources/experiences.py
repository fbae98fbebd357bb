"""The experiences of an Avalanche benchmark object as rows, read in blocks into tensors.

Nothing of Avalanche is imported: whatever has streams of experiences with data sets will do.

Letters: N rows, E experiences.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from continual.errors import StreamError, quoted
from continual.kinds import Scenario
from continual.streams.sources.rows import Part, Raw, Rows, assemble
from continual.table import TensorTable

BLOCK = 1024
"""Rows read before they are put into the tensor of all."""
_WHERE = "the source 'avalanche'"


@dataclass(frozen=True)
class _Read:
    """The rows of some experiences: ``experience_N`` says of which, ``tasks`` are the labels of each one's tasks."""

    inputs: Tensor
    labels: Tensor
    experience_N: Tensor  # noqa: N815
    tasks: list[set[int]]
    ids: Tensor | None

    def classes(self, experience: int) -> list[int]:
        return sorted(set(self.labels[self.experience_N == experience].tolist()))


def benchmark_rows(
    benchmark: Any, train: str | None = None, test: str | None = None, overlap: Literal["refuse", "drop"] = "refuse"
) -> Rows:
    """Rows with the experiences of a benchmark, and the scenario that they look like.

    The scenario is ``task`` where there is more than one task label, ``domain`` where all experiences have the same classes,
    else ``class``. Online experiences are joined into those that they were cut from. Where the test stream has not one
    experience for each of training, each is measured on the test rows of its own classes, out of all of them.

    Raises:
        StreamError: it lacks a stream, or its rows are no tensors of one shape.
    """
    streams = getattr(benchmark, "streams", None)
    if not isinstance(streams, dict):
        raise StreamError(f"{_WHERE}: {type(benchmark).__name__} has no streams: give an Avalanche benchmark.")
    train = train or ("train" if "train" in streams else "train_online")
    notes: list[str] = []
    learnt, origins = _joined(list(_stream(streams, train)), notes)
    tested = [[experience] for experience in _stream(streams, test or "test")]
    raws: dict[Part, Raw] = {}
    reads: dict[Part, _Read] = {"train": _read(learnt), "test": _read(tested)}
    if "valid" in streams and len(valid := [[experience] for experience in streams["valid"]]) == len(learnt):
        reads["valid"] = _read(valid)
    with_ids = all(read.ids is not None for read in reads.values())
    for part, read in reads.items():
        marks = read.experience_N.tolist()
        raws[part] = Raw(
            TensorTable({"inputs": read.inputs}), read.labels, domain=marks, ids=read.ids if with_ids else None
        )
    scenario = _guessed(reads["train"])
    paired = [origin if origin is not None else place for place, origin in enumerate(origins)]
    one_each = len(tested) == len(learnt) and sorted(paired) == list(range(len(tested)))
    if not one_each:
        if scenario == "task":
            raise StreamError(
                f"{_WHERE}: there are {len(learnt)} experiences of training and {len(tested)} of test, and with task labels "
                "each needs one of its own: give as many."
            )
        notes.append(
            f"there are {len(tested)} test experiences for {len(learnt)} of training: each is measured on the test rows of "
            "its own classes, so a test row can count for several"
        )
        raws["test"] = replace(raws["test"], domain=None)
    rows = assemble(raws, "classification", _WHERE, overlap="drop" if overlap == "drop" else "keep")
    names = tuple(f"experience {place}" for place in range(len(learnt)))
    experiences: dict[str, dict[Part, Tensor]] = {name: {} for name in names}
    for place, name in enumerate(names):
        for part, table in rows.tables.items():
            if part in rows.domains:
                wanted = str(paired[place] if part == "test" else place)
                mark = rows.domain_names.index(wanted) if wanted in rows.domain_names else -1
                experiences[name][part] = (rows.domains[part] == mark).nonzero().flatten()
            else:
                own = torch.unique(rows.tables["train"].column("labels")[experiences[name]["train"]])
                experiences[name][part] = torch.isin(table.column("labels"), own).nonzero().flatten()
    return replace(
        rows, domains={}, domain_names=(), experiences=experiences, scenario=scenario, notes=(*rows.notes, *notes)
    )


def read_rows(dataset: Any, places: Iterable[int]) -> tuple[Tensor, Tensor]:
    """Inputs (N, ...) and labels int64 (N,) of the rows at ``places``, as the data set gives them for evaluation.

    Raises:
        StreamError: rows of other than one shape, or that are no tensor, image or array.
    """
    dataset = dataset.eval() if hasattr(dataset, "eval") else dataset
    places = list(places)
    inputs: Tensor | None = None
    labels = torch.empty(len(places), dtype=torch.int64)
    for start in range(0, len(places), BLOCK):
        items = [dataset[place] for place in places[start : start + BLOCK]]
        rows = [as_tensor(item[0]) for item in items]
        if inputs is None:
            inputs = torch.empty((len(places), *rows[0].shape), dtype=rows[0].dtype)
        shapes = {tuple(row.shape) for row in rows} | {tuple(inputs.shape[1:])}
        if len(shapes) > 1:
            raise StreamError(
                f"{_WHERE}: the rows have different shapes ({quoted(sorted(shapes)[:3])}): give the benchmark an "
                "eval_transform that brings them to one size."
            )
        inputs[start : start + len(rows)] = torch.stack(rows)
        labels[start : start + len(rows)] = torch.tensor([int(item[1]) for item in items])
    return torch.empty(0) if inputs is None else inputs, labels


def as_tensor(value: Any) -> Tensor:
    """One row: a tensor as it is, an array or an image of PIL as (C, H, W); float64 becomes float32.

    Raises:
        StreamError: it is something else.
    """
    if not isinstance(value, Tensor):
        image = hasattr(value, "getbands")
        array = np.asarray(value)
        if array.dtype.kind not in "iufb":
            raise StreamError(
                f"{_WHERE}: a row is {type(value).__name__}: give an eval_transform that makes a tensor of it."
            )
        if image:
            array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
        value = torch.from_numpy(np.ascontiguousarray(array).copy())
    row: Tensor = value.to(torch.float32) if value.dtype == torch.float64 else value
    return row


def task_labels(dataset: Any) -> set[int]:
    """The labels of the tasks that the rows of a data set belong to; {0} where it has none."""
    labels = getattr(dataset, "targets_task_labels", None)
    return {0} if labels is None else {int(label) for label in labels.uniques}


def _stream(streams: dict[str, Any], name: str) -> Iterable[Any]:
    if name not in streams:
        raise StreamError(f"{_WHERE}: the benchmark has no stream '{name}': it has {quoted(sorted(streams))}.")
    found: Iterable[Any] = streams[name]
    return found


def _joined(experiences: list[Any], notes: list[str]) -> tuple[list[list[Any]], list[int | None]]:
    """Experiences that were cut from the same one side by side, and the place of that one in its stream."""
    groups: dict[int, list[Any]] = {}
    origins: dict[int, int | None] = {}
    for place, experience in enumerate(experiences):
        origin = getattr(experience, "origin_experience", None)
        key = place if origin is None else -1 - int(origin.current_experience)
        groups.setdefault(key, []).append(experience)
        origins[key] = None if origin is None else int(origin.current_experience)
    if len(groups) < len(experiences):
        notes.append(
            f"{len(experiences)} online experiences were joined into the {len(groups)} that they were cut from: training with "
            f"epochs: 1 and batch_size: {len(experiences[0].dataset)} takes as many rows at a time"
        )
    return list(groups.values()), list(origins.values())


def _read(groups: Sequence[Sequence[Any]]) -> _Read:
    """All rows of the experiences of each group, one group after another."""
    found = [[read_rows(one.dataset, range(len(one.dataset))) for one in group] for group in groups]
    pieces = [piece for group in found for piece in group if len(piece[1])]
    if not pieces:
        raise StreamError(f"{_WHERE}: a stream of the benchmark has no rows: give it some.")
    shapes = {tuple(inputs.shape[1:]) for inputs, _ in pieces}
    if len(shapes) > 1:
        raise StreamError(
            f"{_WHERE}: experiences have rows of different shapes ({quoted(sorted(shapes)[:3])}): make them alike."
        )
    sizes = torch.tensor([sum(len(labels) for _, labels in group) for group in found])
    ids = [getattr(one.dataset, "row", None) for group in groups for one in group]
    return _Read(
        torch.cat([inputs for inputs, _ in pieces]),
        torch.cat([labels for _, labels in pieces]),
        torch.arange(len(groups)).repeat_interleave(sizes),
        [set().union(*(task_labels(one.dataset) for one in group)) for group in groups],
        None
        if any(one is None for one in ids)
        else torch.tensor([int(row) for one in ids if one is not None for row in one]),
    )


def _guessed(train: _Read) -> Scenario:
    if len(set().union(*train.tasks)) > 1:
        return "task"
    classes = [train.classes(place) for place in range(len(train.tasks))]
    return "domain" if len(classes) > 1 and all(found == classes[0] for found in classes) else "class"
