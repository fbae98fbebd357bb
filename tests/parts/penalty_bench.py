"""A context without a learner, for the tests of penalties."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from continual.models.output import Output
from continual.objective import Objective, loss_rows
from continual.randomness import Randomness
from continual.table import Batch, Table


class FakeContext:
    """As much of a training as the Fisher and EWC look at."""

    def __init__(self, model: nn.Module, objective: Objective = "classification", active: Tensor | None = None) -> None:
        self.model, self.objective, self._active = model, objective, active
        self.randomness, self.device = Randomness(0), torch.device("cpu")
        self.forwards = 0

    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def forward(self, batch: Batch) -> Output:
        self.forwards += 1
        output: Output = self.model(batch)
        return output

    def active(self, batch: Batch) -> Tensor | None:
        return self._active

    def loss_rows(self, output: Output, batch: Batch) -> Tensor:
        return loss_rows(self.objective, output.logits, batch, self.active(batch))

    def batches(
        self, table: Table, *, limit: int | None = None, generator: torch.Generator | None = None
    ) -> Iterator[Batch]:
        order = torch.arange(len(table)) if limit is None else torch.randperm(len(table), generator=generator)[:limit]
        yield from (table[index] for index in order.split(4))


class Wrapped(nn.Module):
    """Gives a plain module or a Hugging Face model the signature of ours."""

    def __init__(self, inner: nn.Module, reads: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.inner, self.reads = inner, reads

    def forward(self, batch: Batch) -> Output:
        if self.reads:
            return Output(self.inner(**{name: batch[name] for name in self.reads}).logits)
        return Output(self.inner(batch["inputs"]))
