"""What the tests with Avalanche share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from continual import Stream


class Items(torch.utils.data.Dataset[tuple[Any, int]]):
    """A plain torch data set with ``targets``."""

    def __init__(self, inputs: Any, labels: Tensor) -> None:
        self.inputs, self.targets = inputs, labels.tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, place: int) -> tuple[Any, int]:
        return self.inputs[place], self.targets[place]


def items(rows: int, classes: int = 6, start: int = 0) -> Items:
    """Rows of 5 numbers, the same at every call, each unlike all others."""
    generator = torch.Generator().manual_seed(start)
    labels = torch.arange(rows) % classes
    return Items(torch.randn(rows, 5, generator=generator) + labels[:, None], labels)


def digits(scenario: str = "class", experiences: int = 3) -> Stream:
    return Stream.load("split-digits", scenario=scenario)[:experiences]  # type: ignore[arg-type]


def network(outputs: int = 10) -> nn.Sequential:
    """The same weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, outputs))


def values(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
