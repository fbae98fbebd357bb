"""LoRA in the first experience only: it trains under a temporary head, then the features stay to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from battery import MODEL, learner_for, tiny_stream, weights
from torch import nn

from continual import Learner, Strategy
from continual.errors import CompositionError
from continual.models.lowrank import adapted_layers
from continual.parts.head.closed_form import ClassScores, Familiar
from continual.parts.head.linear import GrowingLinear

TRAINING = {"optimizer": "adamw", "lr": 0.01, "head_lr": 0.02, "epochs": 2, "batch_size": 16}
HEADS: list[dict[str, Any]] = [
    {"kind": "nearest-mean"},
    {"kind": "neighbours"},
    {"kind": "slda"},
    {"kind": "klda", "dimension": 30},
    {"kind": "ridge", "dimension": 30},
]


def first_session(head: dict[str, Any], **lora: Any) -> Strategy:
    adapter = {"kind": "lora", "rank": 3, "across_tasks": "first", **lora}
    return Strategy.load({"adapter": adapter, "head": head, "training": TRAINING})


def features(learner: Learner) -> torch.Tensor:
    learner.model.eval()
    with torch.no_grad():
        test = tiny_stream()[0].test
        assert test is not None
        return learner.model(test[torch.arange(20)]).features


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head["kind"])
def test_the_adapter_trains_once_and_the_features_stay(head: dict[str, Any]) -> None:
    stream, learner = tiny_stream(), learner_for(first_session(head))
    seen: list[Any] = []
    fit = type(learner)._begin

    def begin(self: Learner, *given: Any) -> Any:
        progress = fit(self, *given)
        seen.append((type(self.model.head), set(self.context.parameters())))
        return progress

    learner._begin = begin.__get__(learner)  # type: ignore[method-assign]
    first = learner.update(stream[0])
    assert first.steps > 0 and not learner.context.parameters()
    assert isinstance(learner.model.head, ClassScores)
    factors = [layer.lora_B["t0001"].weight for layer in adapted_layers(learner.model).values()]
    assert all(bool(weight.any()) for weight in factors), "the adapter has learnt"
    before, adapted = weights(learner), features(learner)
    for experience in stream[1:]:
        update = learner.update(experience)
        assert update.steps == 0
    assert torch.equal(features(learner), adapted)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(learner).items())
    assert seen[0][0] is GrowingLinear and {"head.weight"} < seen[0][1]
    assert all("lora_" in name for name in seen[0][1] - {"head.weight"})
    assert [kind for kind, _ in seen[1:]] == [ClassScores] * 2 and not seen[1][1] and not seen[2][1]
    optimizer = learner.context.optimizer
    assert (
        optimizer is not None and not any(group["params"] for group in optimizer.param_groups) and not optimizer.state
    )


def test_the_sums_are_those_of_the_adapted_features() -> None:
    stream, learner = tiny_stream(), learner_for(first_session({"kind": "nearest-mean", "normalize": False}))
    learner.update(stream[0])
    learner.update(stream[1])
    learner.model.eval()
    head = learner.model.head
    assert isinstance(head, ClassScores) and isinstance(head, Familiar)
    for experience in stream[:2]:
        batch = experience.train[torch.arange(len(experience.train))]
        with torch.no_grad():
            rows = learner.model(batch).features
        for label in experience.classes:
            torch.testing.assert_close(head.solution()["means"][label], rows[batch["labels"] == label].mean(0))


def test_a_settled_adapter_has_no_dropout_and_a_saved_one_stays_settled(tmp_path: Any) -> None:
    stream, learner = tiny_stream(), learner_for(first_session({"kind": "slda"}, dropout=0.4))
    learner.update(stream[0])
    learner.save(tmp_path / "state")
    for one in (learner, Learner.load(tmp_path / "state", device="cpu", progress=False)):
        for layer in adapted_layers(one.model).values():
            assert isinstance(layer.lora_dropout["t0001"], nn.Identity)
            assert not any(parameter.requires_grad for parameter in layer.parameters())
        assert one.update(stream[1]).steps == 0


def test_a_linear_head_trains_on_over_settled_features() -> None:
    stream, learner = tiny_stream(), learner_for(first_session({"kind": "linear"}))
    learner.update(stream[0])
    adapted = features(learner)
    assert learner.update(stream[1]).steps > 0
    assert torch.equal(features(learner), adapted)
    assert set(learner.context.parameters()) == {"head.weight", "head.bias"}


def test_adapting_helps_on_features_that_do_not_fit() -> None:
    stream = tiny_stream(experiences=1)
    accuracies = []
    for strategy in (
        Strategy.load({"head": {"kind": "nearest-mean"}, "backbone": "frozen"}),
        Strategy.load(
            {**first_session({"kind": "nearest-mean"}, rank=8).to_dict(), "training": {**TRAINING, "epochs": 8}}
        ),
    ):
        learner = Learner({**MODEL, "hidden": [4]}, strategy, seed=3, device="cpu", progress=False)
        accuracies.append(learner.run(stream).result["metrics"]["accuracy"])
    assert accuracies[1] > accuracies[0]


@pytest.mark.parametrize("across", ["continue", "stack", "merge"])
def test_an_adapter_that_trains_on_is_refused_under_a_head_without_gradients(across: str) -> None:
    with pytest.raises(CompositionError, match="across_tasks: first"):
        first_session({"kind": "slda"}, across_tasks=across)


def test_export_gives_the_adapter_of_the_first_session(tmp_path: Any) -> None:
    learner = learner_for(first_session({"kind": "slda"}))
    learner.update(tiny_stream()[0])
    folder = learner.export(tmp_path / "adapter")
    assert (folder / "adapter_model.safetensors").is_file()
