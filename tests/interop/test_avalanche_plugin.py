"""Our parts inside an Avalanche strategy against the same parts in a loop of our own, over the same batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from avalanche.benchmarks.utils import DataAttribute, make_avalanche_dataset
from avalanche.models import IncrementalClassifier, SimpleMLP, as_multitask
from avalanche.training import Naive, Replay
from avalanche.training.plugins import EWCPlugin
from avalanche_bench import digits, equal, items, network, values
from torch import Tensor, nn

from continual import Stream, TrainingContext
from continual.errors import CompositionError, StreamError
from continual.foreign import quiet
from continual.interop.avalanche import as_plugin, benchmark_from
from continual.interop.avalanche.plugin import Rows
from continual.models.output import Output
from continual.parts.part import Part
from continual.parts.penalty.ewc import EWC
from continual.parts.registry import part_class
from continual.parts.replay.rehearsal import Rehearsal
from continual.table import Batch

PARTS: list[tuple[Any, str, dict[str, Any]]] = [
    ("penalty", "ewc", {"strength": 50.0}),
    ("penalty", "ewc", {"strength": 50.0, "mode": "online", "decay": 0.9}),
    ("penalty", "si", {"strength": 5.0}),
    ("penalty", "mas", {"strength": 0.1}),
    ("penalty", "l2", {"strength": 0.5}),
    ("penalty", "rwalk", {}),
    ("replay", "rehearsal", {"capacity": 40}),
    ("replay", "rehearsal", {"capacity": 40, "select": "class-balanced", "share": 0.3}),
    ("replay", "rehearsal", {"per_class": 6, "select": "ring"}),
    ("distillation", "lwf", {}),
    ("projection", "agem", {"capacity": 40}),
    ("projection", "gem", {"capacity": 40}),
    ("projection", "ogd", {}),
]


class Ours(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Batch) -> Output:
        return Output(self.module(batch["inputs"]))


def in_our_loop(parts: list[Part], stream: Stream, epochs: int = 2) -> list[Tensor]:
    module = network()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    loop = TrainingContext(Ours(module), parts, optimizer, seed=3, competition="all", batch_size=16)
    for experience in stream:
        loop.begin(experience)
        for _ in range(epochs):
            for index in torch.arange(len(experience.train)).split(16):
                optimizer.zero_grad()
                loop.backward(experience.train[index])
                optimizer.step()
                loop.after_step()
            loop.epoch += 1
        loop.end()
    return values(module)


def in_avalanche(parts: list[Part], stream: Stream, epochs: int = 2, module: nn.Module | None = None) -> list[Tensor]:
    module = network() if module is None else module
    benchmark = benchmark_from(stream)
    plugins = [as_plugin(*parts, seed=3, scenario=stream.scenario)] if parts else []
    with quiet("avalanche"):
        naive = Naive(
            model=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9),
            criterion=nn.CrossEntropyLoss(),
            train_mb_size=16,
            train_epochs=epochs,
            evaluator=None,
            plugins=plugins,
        )
        for experience in benchmark.train_stream:
            naive.train(experience, eval_streams=[], shuffle=False)
    return values(module)


@pytest.mark.parametrize(("slot", "kind", "settings"), PARTS, ids=str)
def test_the_weights_are_those_of_our_own_loop(slot: Any, kind: str, settings: dict[str, Any]) -> None:
    stream = digits()

    def make() -> list[Part]:
        return [part_class(slot, kind, "test")(**settings)]

    found = in_avalanche(make(), stream)
    assert equal(found, in_our_loop(make(), stream))
    assert not equal(found, in_avalanche([], stream))


def test_several_parts_and_the_rows_that_they_hold() -> None:
    stream = digits()
    ours: list[Part] = [EWC(strength=50.0), Rehearsal(capacity=40)]
    theirs: list[Part] = [Rehearsal(capacity=40), EWC(strength=50.0)]
    assert equal(
        in_avalanche(theirs, stream), in_our_loop(sorted(ours, key=lambda part: part.slot == "penalty"), stream)
    )
    held, expected = theirs[0], ours[1]
    assert len(held.rows()) == 40 and torch.equal(held.rows().sort().values, expected.rows().sort().values)
    trained = torch.cat([experience.train.column("row") for experience in stream])
    assert bool(torch.isin(held.rows(), trained).all())
    assert held.erase(held.rows()[:5]) == 5 and len(held.rows()) == 35


def test_a_memory_owns_its_rows_and_replays_them_with_their_tasks() -> None:
    stream = digits("task")
    part = Rehearsal(capacity=30)
    with quiet("avalanche"):
        module = as_multitask(SimpleMLP(num_classes=10, input_size=64, hidden_size=8), "classifier")
    in_avalanche([part], stream, module=module)
    everything = part.memory.batch(torch.arange(len(part.memory)))
    assert set(everything) == {"inputs", "labels", "task", "row"}
    assert torch.equal(everything["task"], everything["labels"] // 2)
    kept = part.memory.nbytes()
    assert kept < 2 * 30 * (64 * 4 + 3 * 8)


def test_a_classifier_of_avalanche_that_grows() -> None:
    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.classifier = nn.Linear(64, 8), IncrementalClassifier(8, initial_out_features=2)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.classifier(torch.tanh(self.body(x)))
            return logits

    stream = digits()
    found = []
    for parts in ([], [EWC(strength=500.0)], [Rehearsal(capacity=40)]):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            module = Growing()
            found.append(in_avalanche(list(parts), stream, module=module))
        assert module.classifier.classifier.out_features == 6
    assert not equal(found[0], found[1]) and not equal(found[0], found[2])
    assert all(bool(torch.isfinite(tensor).all()) for weights in found for tensor in weights)


def test_beside_a_plugin_and_a_strategy_of_avalanche() -> None:
    benchmark = benchmark_from(digits())
    with quiet("avalanche"):
        for strategy in (Naive, Replay):
            module = network()
            options = {"mem_size": 20} if strategy is Replay else {}
            plugins = [EWCPlugin(ewc_lambda=1.0), as_plugin(Rehearsal(capacity=20))]
            trained = strategy(
                model=module,
                optimizer=torch.optim.SGD(module.parameters(), lr=0.05),
                criterion=nn.CrossEntropyLoss(),
                train_mb_size=16,
                evaluator=None,
                plugins=plugins,
                **options,
            )
            for experience in benchmark.train_stream:
                trained.train(experience, eval_streams=[])
            assert len(plugins[1].parts[0].rows()) == 20


def test_the_users_generators_are_not_read() -> None:
    def sequence(parts: list[Part]) -> Tensor:
        torch.manual_seed(4)
        in_avalanche(parts, digits())
        return torch.rand(3)

    assert torch.equal(sequence([]), sequence([Rehearsal(capacity=20), EWC()]))


@pytest.mark.parametrize(
    ("slot", "kind", "settings", "sentence"),
    [
        ("adapter", "lora", {}, "adapter/lora cannot be a plugin of Avalanche"),
        ("head", "linear", {}, "head/linear cannot be a plugin"),
        ("replay", "dark", {}, "replay/dark cannot be a plugin"),
        ("distillation", "feature-distillation", {}, "needs features of a model of ours"),
        ("replay", "rehearsal", {"insert": "step"}, "takes rows when an experience ends"),
        ("replay", "rehearsal", {"select": "herding"}, "takes rows when an experience ends"),
        ("replay", "rehearsal", {"weighting": "experiences"}, "leave weighting: experiences out"),
    ],
)
def test_parts_that_cannot_be_plugins(slot: Any, kind: str, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CompositionError, match=sentence):
        as_plugin(part_class(slot, kind, "test")(**settings))


def test_no_part_is_refused() -> None:
    with pytest.raises(CompositionError, match="was given no part"):
        as_plugin()


def test_a_data_set_as_a_table() -> None:
    data = items(7)
    with quiet("avalanche"):
        dataset = make_avalanche_dataset(data, data_attributes=[DataAttribute(data.targets, "targets")])
    table = Rows(dataset, 2)
    assert len(table) == 7 and table.names == ("inputs", "labels", "task", "row")
    batch = table[torch.tensor([4, 1])]
    assert torch.equal(batch["inputs"], data.inputs[[4, 1]]) and batch["labels"].tolist() == [4, 1]
    assert batch["task"].tolist() == [0, 0] and batch["row"].tolist() == [2 * 2**32 + 4, 2 * 2**32 + 1]
    assert torch.equal(table.column("inputs"), data.inputs) and torch.equal(
        table.column("row")[:2], batch["row"] * 0 + torch.tensor([2 * 2**32, 2 * 2**32 + 1])
    )
    with pytest.raises(StreamError, match="no column 'words'"):
        table.column("words")
    with pytest.raises(StreamError, match="no column 'text'"):
        table.strings("text")
