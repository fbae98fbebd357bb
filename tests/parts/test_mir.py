"""Maximally interfered retrieval: which candidates are replayed, and that looking changes nothing."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from replay_bench import Linear, epochs_of, experience, looped, recorded, resumed, train
from torch import Tensor, nn

from continual import Strategy
from continual.errors import CompositionError, SpecError
from continual.models.output import Output
from continual.parts.context import TrainingContext
from continual.parts.replay.mir import MIR
from continual.table import Batch


def interference(loop: TrainingContext, batch: Batch, candidates: Batch, rates: dict[str, float]) -> list[float]:
    """Row by row, on a copy of the model that has made the step."""
    moved = copy.deepcopy(loop.model)
    loop.loss_rows(moved(batch), batch).mean().backward()
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            parameter -= rates[name] * parameter.grad
    found = []
    for place in range(len(candidates["labels"])):
        row = {name: column[place : place + 1] for name, column in candidates.items()}
        with torch.no_grad():
            found.append(float(loop.loss_rows(moved(row), row) - loop.loss_rows(loop.model(row), row)))
    return found


@pytest.mark.parametrize("virtual_lr", [None, 2.0])
def test_the_rows_replayed_are_those_whose_loss_would_rise_most(virtual_lr: float | None) -> None:
    part = MIR(capacity=18, candidates=9, share=0.4, virtual_lr=virtual_lr)
    loop = looped(part, batch_size=6)
    train(loop, experience(0), epochs=3)
    given = experience(1)
    loop.begin(given)
    assert loop.optimizer is not None
    loop.optimizer.param_groups.append(
        {**loop.optimizer.param_groups[0], "lr": 0.7, "params": loop.optimizer.param_groups[0]["params"][2:]}
    )
    loop.optimizer.param_groups[0]["params"] = loop.optimizer.param_groups[0]["params"][:2]
    names = list(loop.parameters())
    assert loop.rates() == dict(zip(names, (0.1, 0.1, 0.7, 0.7), strict=True))
    rates = loop.rates() if virtual_lr is None else dict.fromkeys(names, virtual_lr)
    loop.batch_size = 6
    for start in (0, 6, 12):
        batch = given.train[torch.arange(start, start + 6)]
        twin = copy.deepcopy(part.cycle)
        generator = torch.Generator()
        generator.set_state(loop.randomness.generator("replay").get_state())
        candidates = part.store.memory.batch(twin.draw(9, 18, generator))
        rises = interference(loop, batch, candidates, rates)
        expected = sorted(range(9), key=lambda place: -rises[place])[:4]
        joined = loop.extend(batch)
        assert joined["row"][:6].tolist() == batch["row"].tolist()
        assert joined["row"][6:].tolist() == candidates["row"][expected].tolist()
        assert len(set(rises)) > 4


def test_the_length_of_the_virtual_step_changes_the_choice() -> None:
    chosen = []
    for rate in (1e-3, 30.0):
        part = MIR(capacity=18, candidates=12, virtual_lr=rate)
        loop = looped(part, batch_size=6)
        train(loop, experience(0), epochs=3)
        train(loop, experience(1), epochs=1)
        chosen.append([batch["row"].tolist() for batch in recorded(loop)])
    assert chosen[0] != chosen[1]


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.layer = nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 8)

    def forward(self, batch: Batch) -> Output:
        return Output(self.layer(self.drop(self.norm(batch["inputs"]))))


def test_looking_changes_no_weight_no_buffer_no_gradient_and_no_draw() -> None:
    part, model = MIR(capacity=18), Noisy()
    loop = TrainingContext(model, [part], torch.optim.SGD(model.parameters(), lr=0.3))
    loop.begin(experience(0))
    epochs_of(loop, experience(0), 1)
    loop.end()
    loop.begin(experience(1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert len(loop.extend(experience(1).train[torch.arange(8)])["row"]) == 16
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), state) and model.training


def test_weights_are_put_back_when_the_second_look_fails() -> None:
    part = MIR(capacity=18)
    loop = looped(part)
    train(loop, experience(0))
    loop.begin(experience(1))
    before = [p.detach().clone() for p in loop.model.parameters()]
    calls = []
    forward = loop.forward

    def failing(batch: Batch) -> Output:
        calls.append(batch)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return forward(batch)

    loop.forward = failing  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="out of memory"):
        loop.extend(experience(1).train[torch.arange(8)])
    assert all(torch.equal(p, old) for p, old in zip(loop.model.parameters(), before, strict=True))


def test_a_small_memory_gives_all_it_has() -> None:
    part = MIR(capacity=5)
    loop = looped(part)
    train(loop, experience(0))
    assert [len(batch["row"]) for batch in recorded(loop)] == [8, 13, 13]


def test_cut_and_resumed_is_the_same(tmp_path: Path) -> None:
    runs: list[tuple[dict[str, Tensor], Tensor]] = []
    for cut in (False, True):
        part = MIR(capacity=12, candidates=11)
        loop = looped(part, seed=2, batch_size=8)
        train(loop, experience(0))
        loop.begin(experience(1))
        epochs_of(loop, experience(1), 1)
        if cut:
            again = MIR(capacity=12, candidates=11)
            loop = resumed(loop, part, looped(again, seed=5, batch_size=8), again, tmp_path / "s")
            part = again
        epochs_of(loop, experience(1), 1)
        loop.end()
        train(loop, experience(2), epochs=2)
        runs.append(({n: p.detach().clone() for n, p in loop.parameters().items()}, part.rows()))
    assert torch.equal(runs[0][1], runs[1][1])
    assert all(torch.equal(weight, runs[1][0][name]) for name, weight in runs[0][0].items())


def test_erased_rows_are_no_candidates() -> None:
    part = MIR(capacity=12)
    loop = looped(part)
    train(loop, experience(0))
    gone = part.rows()[:6]
    assert part.erase(gone) == 6 and part.nbytes() > 0
    loop.begin(experience(1))
    replayed = loop.extend(experience(1).train[torch.arange(6)])["row"][6:]
    assert sorted(replayed.tolist()) == sorted(part.rows().tolist())


def test_what_is_refused() -> None:
    part = MIR(candidates=32)
    loop = looped(part)
    with pytest.raises(CompositionError, match=r"replays 32 rows beside a batch of 32.*raise candidates above 32"):
        loop.begin(experience(0))
    bare = TrainingContext(Linear(), [MIR()])
    bare.begin(experience(0))
    bare.parts[0].after_step(experience(0).train[torch.arange(8)], Output(torch.zeros(0)))
    bare.current_rows = 8
    bare.parts[0].after_step(experience(0).train[torch.arange(8)], Output(torch.zeros(0)))
    with pytest.raises(CompositionError, match="set virtual_lr"):
        bare.extend(experience(0).train[torch.arange(8)])
    with pytest.raises(CompositionError, match="leave the other one out"):
        Strategy.load({"replay": [{"kind": "mir"}, {"kind": "rehearsal"}]})
    with pytest.raises(SpecError, match="greater than 0"):
        MIR(virtual_lr=0)
