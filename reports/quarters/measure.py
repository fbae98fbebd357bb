"""The retention tree of the README: two made-up quarters of 2000 rows in which the sign of fraud moves."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from continual import Learner


def quarter(seed: int, angle: float, rows: int) -> DataLoader[tuple[Tensor, ...]]:
    """Rows of 12 numbers; fraud is what lies beyond a plane that has turned by ``angle``, with one label in ten wrong."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, 12, generator=generator)
    side = inputs[:, 0] * torch.cos(torch.tensor(angle)) + inputs[:, 1] * torch.sin(torch.tensor(angle))
    wrong = torch.rand(rows, generator=generator) < 0.1
    return DataLoader(TensorDataset(inputs, ((side > 0) ^ wrong).long()), batch_size=64)


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 2))
    learner = Learner(model, strategy="ewc", device="cpu")
    learner.update(quarter(0, 0.0, 2000), test=quarter(1, 0.0, 2000), name="q1-fraud")
    print(learner.update(quarter(2, 0.8, 2000), test=quarter(3, 0.8, 2000), name="q2-fraud"))


if __name__ == "__main__":
    main()
