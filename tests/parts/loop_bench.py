"""A bare loop over small experiences, for the tests of penalties, projections and distillation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from penalty_bench import Wrapped
from torch import Tensor, nn

from continual.models.mlp import MLP
from continual.models.model import Model
from continual.parts.context import TrainingContext
from continual.parts.head.linear import LinearHead
from continual.parts.part import Part
from continual.parts.registry import part_class
from continual.streams.experience import Experience
from continual.table import Batch, TensorTable

ROWS, INPUTS = 12, 4
KINDS: dict[str, Any] = {
    "si": "penalty",
    "mas": "penalty",
    "rwalk": "penalty",
    "l2": "penalty",
    "lwf": "distillation",
    "feature-distillation": "distillation",
    "agem": "projection",
    "gem": "projection",
    "ogd": "projection",
}


def make(kind: str, **settings: Any) -> Part:
    return part_class(KINDS[kind], kind, "test")(**settings)


def experience(index: int, rows: int = ROWS, classes: tuple[int, ...] | None = None, **options: Any) -> Experience:
    """Rows of two new classes, the same at every call."""
    labels = (2 * index, 2 * index + 1) if classes is None else classes
    generator = torch.Generator().manual_seed(50 + index)
    chosen = torch.tensor(labels)[torch.arange(rows) % len(labels)]
    inputs = torch.randn(rows, INPUTS, generator=generator) + chosen[:, None] * 0.3
    table = TensorTable({"inputs": inputs, "labels": chosen, "row": torch.arange(rows) + 1000 * index})
    return Experience(index, f"task {index}", table, classes=labels, **options)


def plain_model(outputs: int = 4) -> nn.Module:
    """Gives logits itself; the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        return Wrapped(nn.Sequential(nn.Linear(INPUTS, 5), nn.Tanh(), nn.Linear(5, outputs)))


def growing_model(dropout: float = 0.0) -> Model:
    """A backbone for a head that grows; the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        backbone = MLP(INPUTS, (6, 5), "tanh", dropout)
    return Model(
        backbone, gives_features=True, objectives=("classification",), spec={"kind": "mlp"}, feature_size=5
    ).train()


def looped(*parts: Part, model: nn.Module | None = None, lr: float = 0.3, **options: Any) -> TrainingContext:
    """A loop with SGD; a model of ours gets a head that grows."""
    model = growing_model() if model is None else model
    everything = [LinearHead(), *parts] if isinstance(model, Model) and model.gives_features else list(parts)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr, momentum=options.pop("momentum", 0.0))
    return TrainingContext(model, everything, optimizer, **{"seed": 3, **options})


def train(loop: TrainingContext, given: Experience, batches: Sequence[Batch] | None = None, epochs: int = 1) -> None:
    """One experience, in batches of 4 in the order of its table."""
    if batches is None:
        batches = [given.train[index] for index in torch.arange(len(given.train)).split(4)] * epochs
    loop.begin(given, steps=len(batches))
    for batch in batches:
        step(loop, batch)
    loop.end()


def step(loop: TrainingContext, batch: Batch) -> None:
    assert loop.optimizer is not None
    loop.optimizer.zero_grad()
    loop.backward(batch)
    loop.optimizer.step()
    loop.after_step()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def close(got: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-4, atol: float = 1e-6) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def differ(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return any(not torch.equal(tensor, other[name]) for name, tensor in one.items())
