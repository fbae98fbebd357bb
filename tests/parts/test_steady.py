"""Features of a backbone that does not train are made once for each table, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from battery import figures, learner_for, tiny_stream
from text_bench import text_stream, tiny_bert
from torch import Tensor, nn

from continual import Learner, Strategy
from continual.models.build import build_model
from continual.models.model import FEATURES, Model
from continual.models.output import Output
from continual.parts import steady
from continual.parts.context import TrainingContext
from continual.parts.head.linear import GrowingLinear, LinearHead
from continual.parts.part import Part, Slot
from continual.parts.steady import SteadyFeatures, is_steady, training_mode
from continual.spec import Spec
from continual.table import Batch, Mapped, Ragged, Table, TensorTable, View, concat

TRAINING = {"lr": 0.05, "epochs": 3, "batch_size": 8}
FROZEN: dict[str, Any] = {
    "linear": {"head": {"kind": "linear", "init": "mean", "normalize": True}},
    "gaussian": {"head": {"kind": "linear"}, "replay": {"kind": "gaussian"}},
    "ewc": {"head": {"kind": "linear"}, "penalty": {"kind": "ewc"}},
    "lwf": {"head": {"kind": "linear"}, "distillation": {"kind": "lwf"}},
    "gem": {"head": {"kind": "linear"}, "projection": {"kind": "gem", "capacity": 10}},
    "rehearsal": {"head": {"kind": "linear"}, "replay": {"kind": "rehearsal", "capacity": 20}},
    "slda": {"head": {"kind": "slda"}},
}


def frozen(name: str, **training: Any) -> Strategy:
    return Strategy.load({"name": name, "backbone": "frozen", **FROZEN[name], "training": {**TRAINING, **training}})


def never(self: SteadyFeatures, tables: list[Table], rows: int, use: str) -> list[Table]:
    return list(tables)


def counted(learner: Learner, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs of every call of the backbone."""
    seen: list[Tensor] = []
    run = Model._run

    def counting(self: Model, batch: Batch) -> Tensor:
        if FEATURES not in batch:
            seen.append(batch["row"] if "row" in batch else torch.full_like(batch["labels"], -1))
        return run(self, batch)

    monkeypatch.setattr(Model, "_run", counting)
    return seen


@pytest.mark.parametrize("name", FROZEN)
def test_a_run_is_the_same_with_and_without_to_rounding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results, heads = [], []
    for way in (SteadyFeatures.of, never):
        monkeypatch.setattr(SteadyFeatures, "of", way)
        learner = learner_for(frozen(name))
        results.append(learner.run(tiny_stream()).result)
        assert learner.model.head is not None
        heads.append({**dict(learner.model.head.named_parameters()), **dict(learner.model.head.named_buffers())})
    assert results[0]["matrix"] == results[1]["matrix"]
    assert figures(results[0])["cost"] == figures(results[1])["cost"]
    assert heads[0].keys() == heads[1].keys() and heads[0]
    for key in heads[0]:
        torch.testing.assert_close(heads[0][key], heads[1][key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["linear", "slda"])
def test_each_row_passes_through_the_backbone_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, learner = tiny_stream(), learner_for(frozen(name))
    seen = counted(learner, monkeypatch)
    learner.run(stream)
    rows = torch.cat([table.column("row") for each in stream for table in (each.train, each.test) if table is not None])
    passed = torch.cat(
        [batch for batch in seen if len(batch) > 1]
    )  # one row is looked at to see whether the model fits
    assert len(passed) == len(rows) and torch.equal(passed.sort().values, rows.sort().values)


def test_early_stopping_looks_at_features_too(monkeypatch: pytest.MonkeyPatch) -> None:
    first = tiny_stream()[0]
    assert first.test is not None
    cut = len(first.train) - 20
    train, valid = first.train.select(torch.arange(cut)), first.train.select(torch.arange(cut, cut + 20))
    learner = learner_for(frozen("linear", early_stopping={"patience": 50}, epochs=6))
    seen = counted(learner, monkeypatch)
    learner.update(replace(first, train=train, valid=valid))
    assert sum(len(batch) for batch in seen if len(batch) > 1) == len(first.train) + len(first.test)


def test_text_with_dropout_is_read_as_at_test_and_weights_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = text_stream(tiny_bert(tmp_path / "bert"), tmp_path)
    found = []
    for way in (SteadyFeatures.of, never):
        monkeypatch.setattr(SteadyFeatures, "of", way)
        learner = learner_for(frozen("linear"), model=stream.model)
        learner.run(stream)
        assert isinstance(learner.model.head, GrowingLinear)
        found.append(learner.model.head.weight.detach())
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


class Noisy(nn.Module):
    """Gives features, with a running mean and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))

    def forward(self, batch: Batch) -> Tensor:
        found: Tensor = self.layers(batch["inputs"].flatten(1).float())
        return found


def noisy() -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        spec = {"kind": "object", "class": "Noisy"}
        return Model(Noisy(), gives_features=True, objectives=("classification",), spec=spec, feature_size=8)


def test_a_frozen_backbone_keeps_its_running_means_and_drops_nothing() -> None:
    model = noisy()
    training_mode(model)
    assert all(module.training for module in model.modules())
    model.backbone.requires_grad_(False)
    training_mode(model)
    assert model.training and not any(module.training for module in model.backbone.modules())
    learner = learner_for(frozen("linear"), model=noisy())
    stream = tiny_stream()
    learner.update(stream[0])
    before = {name: buffer.clone() for name, buffer in learner.model.backbone.named_buffers()}
    learner.update(stream[1])
    after = dict(learner.model.backbone.named_buffers())
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def ready() -> tuple[SteadyFeatures, Model]:
    model = build_model({"kind": "mlp", "hidden": [5], "inputs": 3}, objective="classification")
    context = TrainingContext(model, [LinearHead()])
    model.backbone.requires_grad_(False)
    return SteadyFeatures(model, context.forward, torch.device("cpu")), model


def some(rows: int, first: int = 0) -> TensorTable:
    inputs = torch.randn(rows, 3, generator=torch.Generator().manual_seed(first))
    return TensorTable({"inputs": inputs, "labels": torch.zeros(rows).long(), "row": torch.arange(rows) + first})


def test_rows_stay_in_their_places_and_other_columns_are_kept() -> None:
    features, model = ready()
    base = some(30)
    view, mapped = base.select(torch.tensor([5, 3, 29])), Mapped(base, {"inputs": lambda column: 2 * column})
    empty = base.select(torch.zeros(0).long())
    tables = [view, mapped, concat([some(4, 100), mapped]), empty]
    found = features.of(tables, 7, "tests")
    assert found[3] is empty
    for table, one in zip(tables[:3], found, strict=False):
        assert set(one.names) == {"labels", "row", FEATURES} and torch.equal(one.column("row"), table.column("row"))
        torch.testing.assert_close(one.column(FEATURES), model.backbone({"inputs": table.column("inputs")}))


def test_rows_of_text_are_sorted_for_the_pass_and_put_back() -> None:
    class Lengths(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Parameter(torch.ones(()))

        def forward(self, batch: Batch) -> Tensor:
            return (batch["attention_mask"].sum(1, keepdim=True) * self.one).float()

    model = Model(
        Lengths().requires_grad_(False), gives_features=True, objectives=("classification",), spec={}, feature_size=1
    )
    model.head = nn.Identity()
    lengths = [3, 1, 9, 2, 2, 7, 1]
    rows = Ragged.from_lists([[1] * length for length in lengths], 0)
    table = TensorTable({"input_ids": rows, "labels": torch.zeros(7).long(), "row": torch.arange(7)})
    [one] = SteadyFeatures(model, model, torch.device("cpu")).of([table], 2, "tests")
    assert one.column(FEATURES).flatten().tolist() == lengths and set(one.names) == {"labels", "row", FEATURES}


def test_weights_that_were_touched_make_features_anew() -> None:
    features, model = ready()
    table = some(9)
    [one] = features.of([table], 4, "tests")
    assert features.of([table], 4, "tests")[0] is one and features.of([table], 4, "training")[0] is one
    with torch.no_grad():
        next(iter(model.backbone.parameters())).mul_(2)
    [other] = features.of([table], 4, "tests")
    assert other is not one and not torch.equal(other.column(FEATURES), one.column(FEATURES))
    next(iter(model.backbone.parameters())).data.mul_(2)
    assert features.of([table], 4, "tests")[0] is not other
    [other] = features.of([table], 4, "tests")
    weight = next(iter(model.backbone.parameters()))
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], fused=True).step()
    assert features.of([table], 4, "tests")[0] is not other, "fused optimisers count no writes"
    model.backbone.requires_grad_(True)
    assert features.of([table], 4, "tests")[0] is table and not features._made, "it trains again"


def test_what_is_no_longer_asked_for_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    features, _ = ready()
    first, second = some(9), some(9, 50)
    features.of([first, second], 4, "tests")
    features.of([second], 4, "tests")
    assert [id(table) for table, _ in features._made["tests"].values()] == [id(second)]
    features.release("tests")
    assert not features._made
    monkeypatch.setattr(steady, "BUDGET", 9 * 5 * 4)
    assert features.of([first], 4, "tests")[0] is not first
    monkeypatch.setattr(SteadyFeatures, "_make", None)
    assert features.of([second], 4, "training") == [second], "that of all uses counts"
    assert features.of([first, second], 4, "tests") == [first, second] and not features._made, "nothing is computed"


class Shifted(View):
    """One of a user's own."""


class Own(Model):
    def forward(self, batch: Batch) -> Output:
        return super().forward({**batch, "inputs": batch["inputs"] * 2})


class Augmented(TensorTable):
    def __getitem__(self, index_B: Tensor) -> Batch:
        batch = super().__getitem__(index_B)
        return {**batch, "inputs": batch["inputs"] + torch.rand(())}


def test_what_may_change_is_left_alone() -> None:
    features, model = ready()
    augmented = Augmented(some(6).columns)
    words = TensorTable({**some(2).columns, "words": Ragged.from_lists([[1], [2, 3]], 0)})
    shifted = Shifted(some(6), torch.arange(3))
    for table in (augmented, augmented.select(torch.arange(3)), concat([some(3), augmented]), words, shifted):
        assert features.of([table], 4, "tests")[0] is table
    own = Own(model.backbone, gives_features=True, objectives=("classification",), spec={}, feature_size=5)
    own.head = model.head
    assert not is_steady(own), "it may do something with inputs"
    assert not is_steady(nn.Linear(2, 2)) and is_steady(model)
    model.router = lambda backbone, batch: backbone(batch)
    assert not is_steady(model), "another adapter for each row"


class Curious(Part):
    """One of a user's own, which looks at the rows themselves."""

    slot: Slot = "penalty"  # type: ignore[misc]
    Settings = Spec

    def loss(self, batch: Batch, output: Any) -> Tensor:
        return 0.0 * batch["inputs"].sum()


def test_a_part_of_the_users_sees_the_rows_themselves() -> None:
    learner = learner_for(Strategy(LinearHead(), Curious(), backbone="frozen", training=TRAINING))
    stream = tiny_stream()
    learner.update(stream[0])
    context = learner.context
    assert context.as_trained_on(stream[1].train) is stream[1].train
    assert FEATURES in context.steady(stream[1].train).names


def test_erased_rows_leave_no_features() -> None:
    learner, stream = learner_for(frozen("linear")), tiny_stream()
    learner.update(stream[0])
    assert set(learner.context.features._made) == {"tests"}
    assert stream[0].test is not None
    learner.erase(stream[0].test.column("row")[:3])
    assert not learner.context.features._made
    learner.update(stream[1])
    assert learner.monitor is not None and learner.monitor.metrics()["accuracy"] is not None
