"""A context without a learner, and models that are hard on a Fisher, for the tests of penalties."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from continual.kinds import Objective
from continual.models.output import Output
from continual.objective import loss_rows
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
        self,
        table: Table,
        *,
        limit: int | None = None,
        generator: torch.Generator | None = None,
        gradients: bool = False,
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


class Tied(nn.Module):
    """One embedding used three times: to read, as a module's tied weight, and bare in a product."""

    def __init__(self, bare: bool) -> None:
        super().__init__()
        self.read, self.write, self.bare = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False), bare
        self.write.weight = self.read.weight

    def forward(self, ids_BT: Tensor) -> Tensor:
        hidden = self.read(ids_BT).sum(1).tanh()
        return F.linear(hidden, self.read.weight) if self.bare else self.write(hidden)


class Reused(nn.Module):
    """One layer called twice in a forward pass, with an in-place activation between."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.act, self.out = nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(self.act(self.layer(x))))


class TokensFirst(nn.Module):
    """Rows on the second axis inside, where a closed form would square the wrong sums."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.out = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.out(self.inside(x_BTD.transpose(0, 1)).tanh().sum(0))


class Everything(nn.Module):
    """Positions that all rows share, normalisation, attention, convolution and a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.place = nn.Embedding(9, 8, padding_idx=0), nn.Embedding(5, 8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.power, self.conv = nn.LayerNorm(8), nn.RMSNorm(8, eps=1e-5), nn.Conv1d(8, 6, 3)
        self.batch, self.scale, self.out = nn.BatchNorm1d(6), nn.Parameter(torch.ones(6)), nn.Linear(6, 3)

    def forward(self, ids_BT: Tensor) -> Tensor:
        x = self.norm(self.read(ids_BT) + self.place(torch.arange(ids_BT.shape[1])[None]))
        x = self.power(x + self.attend(x, x, x, need_weights=False)[0])
        return self.out((self.batch(self.conv(x.mT)) * self.scale[:, None]).tanh().mean(2))


class Recurrent(nn.Module):
    """No closed form, and no bare product either."""

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.out = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.memory(x)[0][:, -1])


class Branches(nn.Module):
    """What ``torch.func`` cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.out = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.stack([row * (self.left if row.sum() > 0 else self.right) for row in x]))
