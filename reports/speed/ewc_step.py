"""Milliseconds of a training step with EWC after 1 task and after 20, against one without, in one run; and its bytes.

MLP 784-100-100-10, SGD, batch 128.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable

import torch
from torch import nn

from continual.models.output import Output
from continual.parts.context import TrainingContext
from continual.parts.part import Part
from continual.parts.penalty.ewc import EWC
from continual.streams.experience import Experience
from continual.table import Batch, TensorTable

sys.path.insert(0, __file__.rsplit("/", 1)[0])
from bench import alternate, ratio, timed, write

BATCH, STEPS, TASKS, TASK_ROWS = 128, 200, 20, 500
REPEATS, THREADS, SEED = 15, 2, 0


class Dense(nn.Module):
    """784-100-100-10."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)]
        self.layers = nn.Sequential(*layers)

    def forward(self, batch: Batch) -> Output:
        return Output(self.layers(batch["inputs"]))


def rows(count: int) -> TensorTable:
    return TensorTable({"inputs": torch.rand(count, 784), "labels": torch.randint(0, 10, (count,))})


def after(tasks: int) -> tuple[Callable[[], None], int]:
    """Steps of one experience with EWC after so many tasks (0: without EWC), and the bytes that it holds."""
    model = Dense()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    parts: list[Part] = [EWC(strength=1.0)] if tasks else []
    context = TrainingContext(model, parts, optimizer, seed=SEED, batch_size=BATCH)
    for index in range(tasks + 1):
        experience = Experience(index, f"task {index}", rows(TASK_ROWS), classes=tuple(range(10)), scenario="domain")
        context.begin(experience)
        if index < tasks:
            context.end()
    batch = rows(BATCH)[torch.arange(BATCH)]

    def run() -> None:
        for _ in range(STEPS):
            optimizer.zero_grad()
            context.backward(batch)
            optimizer.step()
            context.after_step()

    return run, sum(part.nbytes() for part in parts)


def main() -> None:
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    runs = {"without": after(0), "after_1": after(1), f"after_{TASKS}": after(TASKS)}
    figures = alternate({name: timed(run) for name, (run, _) in runs.items()}, REPEATS)
    write(
        {
            "what": "milliseconds of a training step; ratio of a step after 20 tasks to one after 1, median of rounds",
            "milliseconds": {name: round(1000 * statistics.median(f) / STEPS, 4) for name, f in figures.items()},
            "state_bytes": {name: size for name, (_, size) in runs.items()},
            "ratio": {
                f"after_{TASKS}_to_1": round(ratio(figures, f"after_{TASKS}", "after_1"), 3),
                "after_1_to_without": round(ratio(figures, "after_1", "without"), 3),
            },
            "target": {f"after_{TASKS}_to_1": 1.05},
            "repeats": REPEATS,
            "steps": STEPS,
            "threads": THREADS,
            "seed": SEED,
        },
        __doc__ or "",
    )


if __name__ == "__main__":
    main()
