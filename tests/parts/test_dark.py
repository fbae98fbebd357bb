"""Dark replay: which logits are stored, what they cost, and what the second draw does."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from replay_bench import Linear, epochs_of, experience, looped, recorded, resumed, train
from torch import Tensor
from torch.nn import functional as F

from continual import Strategy
from continual.errors import CompositionError, SpecError
from continual.parts.context import TrainingContext
from continual.parts.replay.dark import LOGITS, WIDTH, Dark
from continual.state import load_state, save_state
from continual.streams.experience import Experience
from continual.table import Batch, TensorTable


class ByHand:
    """DER and DER++ written out: plain tensors, a dict of logits, the loss row by row."""

    def __init__(self, loop: TrainingContext, alpha: float, beta: float, logits: str) -> None:
        self.loop, self.alpha, self.beta, self.logits = loop, alpha, beta, logits
        self.weights = self.copy()
        self.stored: dict[int, Tensor] = {}

    def copy(self) -> dict[str, Tensor]:
        return {name: p.detach().clone().requires_grad_() for name, p in self.loop.parameters().items()}

    def grow(self) -> None:
        for name, now in self.copy().items():
            if now.shape != self.weights[name].shape:
                old = self.weights[name].detach()
                self.weights[name] = torch.cat([old, now.detach()[len(old) :]]).requires_grad_()

    def forward(self, inputs: Tensor) -> Tensor:
        w = self.weights
        hidden = F.relu(F.linear(inputs, w["backbone.layers.0.weight"], w["backbone.layers.0.bias"]))
        return F.linear(hidden, w["head.weight"], w["head.bias"])

    def step(self, batch: Batch, current: int, epoch: int) -> None:
        logits = self.forward(batch["inputs"])
        own, rest = slice(0, current), len(batch["labels"]) - current
        drawn = rest // 2 if self.beta else rest
        loss = F.cross_entropy(logits[own], batch["labels"][own])
        squares, compared = torch.zeros(()), 0
        for place in range(current, current + drawn):
            stored = self.stored[int(batch["row"][place])]
            squares = squares + sum((logits[place, k] - stored[k]) ** 2 for k in range(len(stored)))
            compared += len(stored)
        if drawn:
            loss = loss + self.alpha * squares / compared
            if self.beta:
                second = slice(current + drawn, None)
                loss = loss + self.beta * F.cross_entropy(logits[second], batch["labels"][second])
        loss.backward()
        for row, values in zip(batch["row"][own].tolist(), logits[own].detach(), strict=True):
            if epoch == 0 or self.logits == "latest":
                self.stored[row] = values.clone()
        with torch.no_grad():
            for weight in self.weights.values():
                weight -= 0.1 * weight.grad
                weight.grad = None


@pytest.mark.parametrize("beta", [0.0, 0.7])
@pytest.mark.parametrize("logits", ["latest", "first"])
def test_training_is_the_formula_written_out(beta: float, logits: str) -> None:
    part = Dark(capacity=12, alpha=0.3, beta=beta, logits=logits)
    loop = looped(part)
    reference: ByHand | None = None
    for index in range(3):
        given = experience(index, 20)
        loop.begin(given)
        reference = reference or ByHand(loop, 0.3, beta, logits)
        reference.grow()
        for epoch in range(2):
            own = epochs_of(loop, given, 1)
            for batch, current in zip(recorded(loop), own, strict=True):
                reference.step(batch, len(current["row"]), epoch)
        loop.end()
        for name, weight in reference.weights.items():
            torch.testing.assert_close(loop.parameters()[name].detach(), weight.detach(), rtol=1e-4, atol=1e-5)
        held = torch.arange(len(part.store))
        kept, widths = part.store.memory.batch(held), part.store.memory.widths(LOGITS, held)
        for row, values, width in zip(kept["row"].tolist(), kept[LOGITS], widths.tolist(), strict=True):
            assert width == 2 * (row // 1000) + 2
            torch.testing.assert_close(values[:width], reference.stored[row], rtol=1e-4, atol=1e-5)
            assert not values[width:].any()
    assert len({row // 1000 for row in part.rows().tolist()}) == 3


def test_outputs_that_did_not_exist_are_not_compared() -> None:
    part = Dark(capacity=8, alpha=2.0)
    loop = looped(part)
    train(loop, experience(0))
    loop.begin(experience(1))
    loop.batch_size = 4
    batch = loop.extend(experience(1).train[torch.arange(4)])
    assert batch[LOGITS].shape == (8, 2) and batch[WIDTH].tolist() == [0] * 4 + [2] * 4
    output = loop.forward(batch)
    before = part.loss(batch, output)
    output.logits = output.logits.detach().clone()
    output.logits[:, 2:] += 5.0
    output.logits[:4] -= 3.0
    torch.testing.assert_close(part.loss(batch, output), before.detach())  # type: ignore[union-attr]
    output.logits[4:, :2] = batch[LOGITS][4:] + 0.5
    torch.testing.assert_close(part.loss(batch, output), torch.tensor(2.0 * 0.25))


def test_draws_are_independent_and_every_row_is_drawn_equally_often() -> None:
    part = Dark(capacity=12, beta=1.0, memory_batch=6)
    loop = looped(part)
    train(loop, experience(0))
    loop.begin(experience(1))
    first: Counter[int] = Counter()
    second: Counter[int] = Counter()
    same = 0
    for _ in range(60):
        batch = loop.extend(experience(1).train[torch.arange(4)])
        assert len(batch["row"]) == 16
        one, other = batch["row"][4:10].tolist(), batch["row"][10:].tolist()
        first.update(one)
        second.update(other)
        same += len(set(one) & set(other))
    assert set(first) == set(second) == set(part.rows().tolist())
    assert max(first.values()) - min(first.values()) <= 2 and max(second.values()) - min(second.values()) <= 2
    assert 2 < same / 60 < 4


def test_the_first_experience_replays_from_the_second_batch_on() -> None:
    part = Dark(capacity=12)
    loop = looped(part)
    train(loop, experience(0))
    assert [len(batch["row"]) for batch in recorded(loop)] == [8, 16, 16]
    train(loop, experience(1, rows=19))
    assert [len(batch["row"]) for batch in recorded(loop)] == [16, 16, 11], "the last batch gets as many"


def test_the_objective_counts_current_rows_with_the_weights_they_bring() -> None:
    part = Dark(capacity=12, alpha=1.0, beta=1.0)
    loop = looped(part)
    train(loop, experience(0, weight=torch.ones(24)))
    given = experience(1, weight=1 + torch.arange(24.0))
    loop.begin(given)
    loop.batch_size = 6
    batch = loop.extend(given.train[torch.arange(6)])
    assert batch["weight"].tolist() == [1, 2, 3, 4, 5, 6, *[0] * 12]
    output = loop.forward(batch)
    losses = F.cross_entropy(output.logits, batch["labels"], reduction="none")
    terms = dict(loop.terms(batch, output))
    torch.testing.assert_close(terms["objective"], (losses[:6] * torch.arange(1.0, 7.0)).sum() / 21)
    gaps = (output.logits[6:12, :2] - batch[LOGITS][6:12]).square().mean()
    torch.testing.assert_close(terms["replay/dark"], gaps + losses[12:].mean())
    assert "weight" not in part.store.memory.names


def test_regression_holds_the_outputs() -> None:
    part = Dark(capacity=10, alpha=1.0)
    loop = TrainingContext(Linear(), [part], objective="regression")
    loop.optimizer = torch.optim.SGD(loop.model.parameters(), lr=0.01)
    columns: dict[str, Any] = {name: experience(0).train.column(name) for name in ("inputs", "row")}
    given = Experience(0, "r", TensorTable({**columns, "labels": torch.rand(24, 10)}), objective="regression")
    train(loop, given, epochs=2)
    assert part.store.memory.batch(torch.arange(10))[LOGITS].shape == (10, 10)


def test_a_capacity_in_bytes_holds_while_the_logits_get_wider() -> None:
    part = Dark(capacity="900B", beta=1.0)
    loop = looped(part)
    sizes = []
    for index in range(4):
        train(loop, experience(index), epochs=2)
        sizes.append(len(part.store))
        assert part.nbytes() <= 900
        kept = part.store.memory.batch(torch.arange(sizes[-1]))
        assert torch.equal(kept["labels"], 2 * (kept["row"] // 1000) + kept["row"] % 2)
    assert sizes == [900 // (4 * 6 + 8 + 8 + 8 * (index + 1) + 4 + 32) for index in range(4)]


@pytest.mark.parametrize("storage", ["cpu", "memmap"])
def test_storage_changes_no_batch_while_the_logits_get_wider(storage: str, tmp_path: Path) -> None:
    runs = []
    for where in ("device", storage):
        folder = {"folder": str(tmp_path / "maps")} if where == "memmap" else {}
        part = Dark(capacity=12, storage=where, **folder)
        loop = looped(part)
        for index in range(3):
            train(loop, experience(index), epochs=2)
        runs.append(recorded(loop))
    for one, other in zip(*runs, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(column, other[name]) for name, column in one.items())
    assert (tmp_path / "maps").is_dir() == (storage == "memmap")


def test_cut_and_resumed_is_the_same(tmp_path: Path) -> None:
    runs = []
    for cut in (False, True):
        part = Dark(capacity=12, beta=0.5)
        loop = looped(part, seed=2)
        train(loop, experience(0))
        loop.begin(experience(1))
        epochs_of(loop, experience(1), 1)
        if cut:
            again = Dark(capacity=12, beta=0.5)
            loop = resumed(loop, part, looped(again, seed=5), again, tmp_path / "s")
            part = again
        epochs_of(loop, experience(1), 1)
        loop.end()
        train(loop, experience(2), epochs=2)
        runs.append(({n: p.detach().clone() for n, p in loop.parameters().items()}, part.rows(), part.nbytes()))
    assert torch.equal(runs[0][1], runs[1][1]) and runs[0][2] == runs[1][2]
    assert all(torch.equal(weight, runs[1][0][name]) for name, weight in runs[0][0].items())


def test_erased_rows_take_their_logits_with_them(tmp_path: Path) -> None:
    part = Dark(capacity=12)
    loop = looped(part)
    train(loop, experience(0), epochs=2)
    kept = part.store.memory.batch(torch.arange(12))
    assert part.erase(kept["row"][:4]) == 4 and len(part.rows()) == 8
    save_state(tmp_path / "s", part.state_dict())
    raw = (tmp_path / "s" / "tensors.safetensors").read_bytes()
    for place in range(12):
        assert (kept[LOGITS][place].numpy().tobytes() in raw) == (place >= 4)
    again = Dark(capacity=12)
    again.load_state_dict(load_state(tmp_path / "s"))
    assert torch.equal(again.rows(), part.rows())
    loop.begin(experience(1))
    assert not torch.isin(kept["row"][:4], loop.extend(experience(1).train[torch.arange(20)])["row"]).any()


def test_what_is_refused() -> None:
    with pytest.raises(CompositionError, match="it has no gradients"):
        Strategy.load({"replay": {"kind": "dark"}, "head": {"kind": "nearest-mean"}})
    with pytest.raises(CompositionError, match="leave the other one out"):
        Strategy.load({"replay": [{"kind": "rehearsal"}, {"kind": "dark"}]})
    with pytest.raises(CompositionError, match="made for 'classification', 'regression'"):
        Strategy.load("der").check(objective="causal-lm", gives_features=False)
    for settings, said in (({"alpha": 0}, "greater than 0"), ({"beta": -1}, "greater than or equal to 0")):
        with pytest.raises(SpecError, match=said):
            Dark(**settings)
    with pytest.raises(SpecError, match="holds no row"):
        Dark(capacity="60B").begin(TrainingContext(Linear(), []), experience(0))
