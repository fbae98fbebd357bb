"""Our experiences as Avalanche's: data sets in memory, class ids, task labels, and what experiences say of their classes.

Imported after :func:`continual.foreign.imported` only.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from avalanche.benchmarks import CLScenario, DatasetExperience, EagerCLStream
from avalanche.benchmarks.utils import AvalancheDataset, ConstantSequence, DataAttribute, TaskLabels
from avalanche.benchmarks.utils.classification_dataset import TaskAwareSupervisedClassificationDataset
from torch import Tensor
from torch.utils.data import Dataset

from continual.errors import StreamError
from continual.streams.experience import Experience
from continual.streams.stream import Stream
from continual.table import Table

PARTS = ("train", "valid", "test")


class Rows(Dataset[tuple[Tensor, int]]):
    """Rows in memory as pairs of inputs and class id.

    Args:
        inputs: (N, ...).
        targets: class ids, N of them.
    """

    def __init__(self, inputs: Tensor, targets: Sequence[int]) -> None:
        self.inputs, self.targets = inputs, list(targets)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        return self.inputs[place], self.targets[place]


def data_set(table: Table, owner: dict[int, int] | None) -> AvalancheDataset:
    """A table as a data set that gives (inputs, class id, task label); it holds a copy of the inputs.

    Args:
        owner: task label of each class; None gives all rows the label 0.

    Raises:
        StreamError: the table has no dense ``inputs``.
    """
    check_dense(table)
    everything = table[torch.arange(len(table))]
    labels = everything["labels"].tolist()
    tasks = [0] * len(labels) if owner is None else [owner[label] for label in labels]
    return TaskAwareSupervisedClassificationDataset(
        [Rows(everything["inputs"].cpu(), labels)],
        data_attributes=[
            DataAttribute(labels, "targets"),
            TaskLabels(ConstantSequence(tasks[0], len(tasks)) if len(set(tasks)) == 1 else tasks),
            DataAttribute(everything["row"].tolist(), "row"),
        ],
    )


def check_dense(table: Table) -> None:
    """Raise :class:`StreamError` for rows of text or tokens."""
    if "inputs" not in table.names:
        raise StreamError(
            f"Avalanche takes rows of dense 'inputs', and these have {', '.join(table.names)}: give tensors, such as features "
            "of a pretrained model."
        )


def owners(experience: Experience) -> dict[int, int] | None:
    """Class id → task label, in the scenario ``task``."""
    if experience.scenario != "task":
        return None
    tasks = experience.owners or (experience.index,) * len(experience.classes)
    return dict(zip(experience.classes, tasks, strict=True))


def decorated(
    dataset: AvalancheDataset, index: int, *, before: set[int], after: set[int], benchmark: Any
) -> DatasetExperience:
    """An experience with the attributes of Avalanche's protocols: index, task labels, classes now, before and to come."""
    found = DatasetExperience(dataset=dataset, current_experience=index)
    classes = {int(label) for label in dataset.targets.uniques}
    tasks = sorted(dataset.targets_task_labels.uniques)
    if len(tasks) == 1:
        found.task_label = tasks[0]
    found.task_labels = tasks
    found.classes_in_this_experience = sorted(classes)
    found.previous_classes = set(before)
    found.classes_seen_so_far = before | classes
    found.future_classes = after - found.classes_seen_so_far
    found.benchmark = benchmark
    return found


def order_of(classes: Sequence[Sequence[int]]) -> Any:
    """What Avalanche's older strategies ask a benchmark for: how many classes are new in each experience, and their order.

    Args:
        classes: of each experience.
    """
    met: list[int] = []
    sizes = []
    for own in classes:
        new = [label for label in own if label not in met]
        met += new
        sizes.append(len(new))
    return SimpleNamespace(n_classes_per_exp=sizes, classes_order=met, n_classes=len(met))


def make_benchmark(stream: Stream) -> CLScenario:
    """See :func:`continual.interop.avalanche.benchmark_from`."""
    if stream.objective != "classification":
        raise StreamError(
            f"an Avalanche benchmark has classes, and the objective of this stream is {stream.objective}."
        )
    experiences = list(stream)
    streams = []
    order = order_of([experience.classes for experience in experiences])
    for part in PARTS:
        tables: list[Table | None] = [getattr(experience, part) for experience in experiences]
        found = [table for table in tables if table is not None and len(table)]
        if not found:
            continue
        if len(found) < len(experiences):
            raise StreamError(
                f"{len(experiences) - len(found)} of {len(experiences)} experiences have no {part} rows, and an Avalanche "
                "stream has some in each: give them some, or leave that part out of all."
            )
        everything = {label for experience in experiences for label in experience.classes}
        before: set[int] = set()
        made = []
        for experience, table in zip(experiences, found, strict=True):
            dataset = data_set(table, owners(experience))
            made.append(decorated(dataset, experience.index, before=before, after=everything, benchmark=order))
            before = before | set(made[-1].classes_in_this_experience)
        streams.append(EagerCLStream(part, made))
    benchmark = CLScenario(streams)
    vars(benchmark).update(vars(order))
    return benchmark
