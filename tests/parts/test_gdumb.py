"""GDumb: a balanced memory, training from the first weights on it alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from replay_bench import epochs_of, experience, looped, recorded, resumed, small_model, train
from torch import nn
from torch.nn import functional as F

from continual import Strategy
from continual.errors import CompositionError, SpecError
from continual.parts.context import TrainingContext
from continual.parts.replay.gdumb import GDumb
from continual.streams.experience import Experience
from continual.table import TensorTable


def greedy(labels: list[int], capacity: int) -> Counter[int]:
    """Rows of each class after the sampler of the paper (its algorithm 1)."""
    counts: Counter[int] = Counter()
    seen: set[int] = set()
    for label in labels:
        seen.add(label)
        if counts[label] < capacity / len(seen):
            if sum(counts.values()) >= capacity:
                counts[counts.most_common(1)[0][0]] -= 1
            counts[label] += 1
    return +counts


def test_the_classes_of_the_memory_are_those_of_the_greedy_sampler() -> None:
    part = GDumb(capacity=24)
    loop = looped(part)
    labels: list[int] = []
    for index in range(4):
        train(loop, experience(index, 30))
        labels += experience(index, 30).train.column("labels").tolist()
        held = Counter(part.store.memory.batch(torch.arange(len(part.store)))["labels"].tolist())
        assert held == greedy(labels, 24)


def test_only_rows_of_the_memory_are_trained_on_each_equally_often() -> None:
    part = GDumb(capacity=10)
    loop = looped(part)
    for index in range(2):
        loop.begin(experience(index))
    counts: Counter[int] = Counter()
    for _ in range(5):
        batch = loop.extend(experience(1).train[torch.arange(16)])
        assert len(batch["labels"]) == 16 and set(batch) == {"inputs", "labels", "row"}
        counts.update(batch["row"].tolist())
    assert set(counts) == set(part.rows().tolist()) and set(counts.values()) == {8}
    assert {row // 1000 for row in counts} == {0, 1}


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_every_experience_is_a_training_from_the_first_weights_on_the_memory(kind: str) -> None:
    part = GDumb(capacity=12)
    loop = looped(part, kind=kind)
    before: dict[str, torch.Tensor] = {}
    for index in range(3):
        given = experience(index)
        loop.begin(given)
        first = {name: p.detach().clone() for name, p in loop.parameters().items()}
        assert all(torch.equal(first[name][: len(weight)], weight) for name, weight in before.items())
        epochs_of(loop, given, 2)
        plain = {name: weight.clone().requires_grad_() for name, weight in first.items()}
        make = torch.optim.SGD if kind == "sgd" else torch.optim.Adam
        optimizer = make(plain.values(), lr=0.1)
        for rows in recorded(loop):
            hidden = F.relu(
                F.linear(rows["inputs"], plain["backbone.layers.0.weight"], plain["backbone.layers.0.bias"])
            )
            optimizer.zero_grad()
            F.cross_entropy(F.linear(hidden, plain["head.weight"], plain["head.bias"]), rows["labels"]).backward()
            optimizer.step()
        for name, weight in plain.items():
            torch.testing.assert_close(loop.parameters()[name].detach(), weight.detach(), rtol=1e-4, atol=1e-5)
            assert not torch.equal(weight, first[name])
        loop.end()
        before = first


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.BatchNorm1d(6), nn.Linear(6, 8)
        self.norm.weight.requires_grad_(False)

    def forward(self, batch: Any) -> Any:
        from continual.models.output import Output

        return Output(self.layer(self.norm(batch["inputs"])))


def test_outputs_reserved_for_later_classes_begin_as_they_were_drawn() -> None:
    loop = looped(GDumb(capacity=12), competition="all")
    loop.reserve_classes = 10
    found = []
    for index in range(3):
        given = experience(index)
        loop.begin(given)
        found.append({name: p.detach().clone() for name, p in loop.parameters().items()})
        assert any(len(weight) == 10 for weight in found[-1].values())
        epochs_of(loop, given, 2)
        loop.end()
        assert any(not torch.equal(p, found[-1][name]) for name, p in loop.parameters().items())
    for later in found[1:]:
        assert all(torch.equal(later[name], weight) for name, weight in found[0].items())


def test_buffers_go_back_and_frozen_weights_are_left_alone() -> None:
    part, model = GDumb(capacity=12), Normed()
    trained = [p for p in model.parameters() if p.requires_grad]
    loop = TrainingContext(model, [part], torch.optim.SGD(trained, lr=0.1))
    loop.begin(experience(0))
    epochs_of(loop, experience(0), 2)
    loop.end()
    assert not torch.equal(model.norm.running_mean, torch.zeros(6))
    with torch.no_grad():
        model.norm.weight.fill_(3.0)
    loop.begin(experience(1))
    assert torch.equal(model.norm.running_mean, torch.zeros(6)) and int(model.norm.num_batches_tracked) == 0
    assert torch.equal(model.norm.weight, torch.full((6,), 3.0))
    assert "norm.weight" not in part.state_dict()["first"]


def test_cut_and_resumed_is_the_same(tmp_path: Path) -> None:
    runs = []
    for cut in (False, True):
        part = GDumb(capacity=12)
        loop = looped(part, seed=2)
        train(loop, experience(0))
        loop.begin(experience(1))
        epochs_of(loop, experience(1), 1)
        if cut:
            again = GDumb(capacity=12)
            loop = resumed(loop, part, looped(again, seed=5), again, tmp_path / "s")
            part = again
        epochs_of(loop, experience(1), 1)
        loop.end()
        train(loop, experience(2), epochs=2)
        runs.append(({n: p.detach().clone() for n, p in loop.parameters().items()}, part.rows()))
    assert torch.equal(runs[0][1], runs[1][1])
    assert all(torch.equal(weight, runs[1][0][name]) for name, weight in runs[0][0].items())


def test_erased_rows_are_trained_on_no_more() -> None:
    part = GDumb(capacity=12)
    loop = looped(part)
    train(loop, experience(0))
    gone = part.rows()[:4]
    assert part.erase(gone) == 4 and len(part.rows()) == 8
    loop.begin(experience(1))
    batch = loop.extend(experience(1).train[torch.arange(24)])
    assert not torch.isin(gone, batch["row"]).any()


def test_bytes_are_those_held() -> None:
    part = GDumb(capacity=12)
    loop = looped(part)
    train(loop, experience(0))
    weights = sum(p.nbytes for p in loop.model.parameters())
    assert part.nbytes() == part.store.nbytes() + part.cycle.nbytes() + weights


def test_what_is_refused() -> None:
    for slot, settings in {
        "penalty": {"kind": "ewc"},
        "adapter": {"kind": "lora"},
    }.items():
        with pytest.raises(CompositionError, match="first weights"):
            Strategy.load({"replay": {"kind": "gdumb"}, slot: settings})
    with pytest.raises(CompositionError, match="nothing would learn from replayed ones"):
        Strategy.load({"replay": {"kind": "gdumb"}, "head": {"kind": "nearest-mean"}})
    with pytest.raises(CompositionError, match="leave the other one out"):
        Strategy.load({"replay": [{"kind": "gdumb"}, {"kind": "rehearsal"}]})
    with pytest.raises(SpecError, match="folder"):
        GDumb(storage="memmap")
    with pytest.raises(SpecError, match="no size"):
        GDumb(capacity="lots")
    given = experience(0)
    columns: dict[str, Any] = {"inputs": given.train.column("inputs"), "row": given.train.column("row")}
    unlabelled = Experience(0, "e", TensorTable({**columns, "labels": torch.full((24,), -100)}), classes=(0,))
    with pytest.raises(CompositionError, match=r"replay/gdumb needs one class.*take replay/rehearsal"):
        GDumb().begin(TrainingContext(small_model(), []), unlabelled)
