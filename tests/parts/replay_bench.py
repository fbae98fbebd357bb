"""What the tests of replay share: a small model with a head, experiences, a loop and breaks in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from continual.models.mlp import MLP
from continual.models.model import Model
from continual.models.output import Output
from continual.parts.context import TrainingContext
from continual.parts.head.linear import LinearHead
from continual.parts.part import Part
from continual.state import load_state, save_state
from continual.streams.experience import Experience
from continual.table import Batch, TensorTable

WIDTH = 6


def experience(index: int, rows: int = 24, classes: tuple[int, ...] | None = None, **columns: Any) -> Experience:
    """Two classes of noisy points in [0, 1], ids from 1000 · index on."""
    classes = classes or (2 * index, 2 * index + 1)
    generator = torch.Generator().manual_seed(100 + index)
    labels = torch.tensor(classes)[torch.arange(rows) % len(classes)]
    noise = torch.rand(rows, WIDTH, generator=generator)
    inputs = 0.3 * noise + 0.7 * torch.nn.functional.one_hot(labels % WIDTH, WIDTH)
    ids = torch.arange(1000 * index, 1000 * index + rows)
    table = TensorTable({"inputs": inputs, "labels": labels, "row": ids, **columns})
    return Experience(index, f"e{index}", table, classes=classes, total_classes=8)


def small_model() -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = MLP(WIDTH, (12,))
    return Model(backbone, gives_features=True, objectives=("classification",), spec={"kind": "mlp"}, feature_size=12)


class Linear(nn.Module):
    """Gives logits and no features."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 10)

    def forward(self, batch: Batch) -> Output:
        return Output(self.layer(batch["inputs"]))


class Recorder(Part):
    """Keeps every batch as the model sees it."""

    slot = "recall"

    def __init__(self) -> None:
        self.seen: list[Batch] = []

    def extend(self, batch: Batch) -> Batch:
        self.seen.append(batch)
        return batch


def looped(part: Part, seed: int = 0, lr: float = 0.1, kind: str = "sgd", **options: Any) -> TrainingContext:
    """A loop over a growing head, ``part`` and a recorder of batches."""
    model = small_model()
    loop = TrainingContext(model, [LinearHead(), part, Recorder()], seed=seed, **options)
    make = torch.optim.SGD if kind == "sgd" else torch.optim.Adam
    loop.optimizer = make(model.parameters(), lr=lr)
    return loop


def recorded(loop: TrainingContext) -> list[Batch]:
    """The batches that the model saw since the last call."""
    recorder = loop.parts[-1]
    assert isinstance(recorder, Recorder)
    seen, recorder.seen = recorder.seen, []
    return seen


def train(loop: TrainingContext, given: Experience, epochs: int = 1, batch_size: int = 8) -> list[Batch]:
    """One experience from begin to end; its own batches."""
    loop.begin(given)
    seen = epochs_of(loop, given, epochs, batch_size)
    loop.end()
    return seen


def epochs_of(loop: TrainingContext, given: Experience, epochs: int, batch_size: int = 8) -> list[Batch]:
    seen: list[Batch] = []
    for _ in range(epochs):
        for batch in loop.shuffled(given.train, batch_size):
            step(loop, batch)
            seen.append(batch)
    return seen


def step(loop: TrainingContext, batch: Batch) -> Tensor:
    assert loop.optimizer is not None
    loop.optimizer.zero_grad()
    loss = loop.backward(batch)
    loop.optimizer.step()
    loop.after_step()
    return loss


def resumed(loop: TrainingContext, part: Part, other: TrainingContext, again: Part, folder: Path) -> TrainingContext:
    """``other``, which has ``again`` in place of ``part``, as ``loop`` stands in the middle of an experience."""
    heads = loop.parts[0], other.parts[0]
    state = {
        "head": heads[0].state_dict(),
        "part": part.state_dict(),
        "random": loop.randomness.state_dict(),
        "weights": dict(loop.model.state_dict()),
    }
    save_state(folder, state)
    saved = load_state(folder)
    heads[1].load_state_dict(saved["head"])
    again.load_state_dict(saved["part"])
    other.model.load_state_dict(saved["weights"])
    other.randomness.load_state_dict(saved["random"])
    other._parameters = None
    other.optimizer = torch.optim.SGD(other.model.parameters(), lr=0.1)
    other.experience, other.experience_index = loop.experience, loop.experience_index
    other.step, other.epoch = loop.step, loop.epoch
    other.set_owner(loop.owner)
    return other
