"""Heads that grow: what was there stays, means are means."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from continual.errors import CompositionError, SpecError, StreamError
from continual.models.build import build_model
from continual.models.model import Model
from continual.parts.context import TrainingContext
from continual.parts.head.class_sums import class_sums
from continual.parts.head.linear import LinearHead
from continual.parts.head.nearest_mean import NearestMeanHead
from continual.parts.part import Part
from continual.parts.passes import as_at_test
from continual.randomness import Randomness
from continual.streams.experience import Experience
from continual.table import TensorTable

D = 6


def experience(index: int, classes: tuple[int, ...], rows: int = 20, **options: Any) -> Experience:
    generator = torch.Generator().manual_seed(index)
    labels = torch.tensor(classes).repeat(rows)
    inputs = torch.randn(len(labels), D, generator=generator) + F.one_hot(labels % D, D) * 3.0
    table = TensorTable({"inputs": inputs, "labels": labels, "row": torch.arange(len(labels)) + 1000 * index})
    return Experience(index, f"e{index}", table, classes=classes, **options)


def regression(index: int, outputs: int | None) -> Experience:
    shape = (12,) if outputs is None else (12, outputs)
    table = TensorTable({"inputs": torch.randn(12, D), "labels": torch.randn(shape), "row": torch.arange(12)})
    return Experience(index, "r", table, objective="regression", scenario="domain")


def features() -> Model:
    """A model whose features are its inputs."""
    return build_model({"kind": "mlp", "hidden": [], "inputs": D}, objective="classification")


def context(part: Part, **options: Any) -> TrainingContext:
    return TrainingContext(features(), [part], **options)


def rows(table: Any) -> dict[str, torch.Tensor]:
    return table[torch.arange(len(table))]


@pytest.mark.parametrize(
    "settings", [{}, {"init": "zero"}, {"init": "mean"}, {"normalize": True}, {"init": "mean", "normalize": True}]
)
def test_growing_keeps_old_rows_to_the_bit_and_the_optimisers_state(settings: dict[str, Any]) -> None:
    head = LinearHead(**settings)
    training = context(head)
    training.begin(experience(0, (0, 1)))
    assert training.model.head is head.module and set(training.parameters()) == {
        "head.weight",
        *(() if head.module.bias is None else ("head.bias",)),
    }
    training.optimizer = torch.optim.Adam(training.parameters().values(), lr=0.1)
    batch = rows(experience(0, (0, 1)).train)
    for _ in range(3):
        training.optimizer.zero_grad()
        training.backward(batch)
        training.optimizer.step()
    old = {name: p.detach().clone() for name, p in head.module.named_parameters()}
    moments = {name: training.optimizer.state[p]["exp_avg"].clone() for name, p in head.module.named_parameters()}
    logits = training.forward(batch).logits
    training.begin(experience(1, (2, 3)))
    assert head.module.weight.shape == (4, D)
    for name, parameter in head.module.named_parameters():
        assert torch.equal(parameter[:2], old[name])
        assert torch.equal(training.optimizer.state[parameter]["exp_avg"][:2], moments[name])
    torch.testing.assert_close(training.forward(batch).logits[:, :2], logits, rtol=1e-6, atol=1e-6)


def test_new_rows_are_drawn_from_the_generator_head_alone() -> None:
    before = torch.get_rng_state()
    drawn = []
    for seed in (0, 0, 1):
        head = LinearHead()
        context(head, seed=seed).begin(experience(0, (0, 1, 2)))
        drawn.append(head.module.weight.detach())
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert drawn[0].abs().max() <= 1 / D**0.5 and drawn[0].std() > 0.1
    expected = torch.empty(3, D).uniform_(-(D**-0.5), D**-0.5, generator=Randomness(0).generator("head"))
    torch.testing.assert_close(drawn[0], expected)


def test_zero_rows_are_zero() -> None:
    head = LinearHead(init="zero")
    training = context(head)
    training.begin(experience(0, (0, 1)))
    assert not training.forward(rows(experience(0, (0, 1)).train)).logits.any()


@pytest.mark.parametrize("normalize", [False, True])
def test_mean_init_is_the_nearest_mean_classifier(normalize: bool) -> None:
    stream = [experience(0, (0, 1, 2)), experience(1, (3, 4))]
    linear = LinearHead(init="mean", normalize=normalize)
    nearest = NearestMeanHead(distance="cosine" if normalize else "euclidean", normalize=normalize)
    ours, theirs = context(linear), context(nearest)
    for step in stream:
        ours.begin(step)
        theirs.begin(step)
        theirs.end()
    for step in stream:
        batch = rows(step.train)
        scores, distances = ours.forward(batch).logits, theirs.forward(batch).logits
        assert torch.equal(scores.argmax(1), distances.argmax(1))
        if normalize:
            torch.testing.assert_close(scores, 20 * distances, rtol=1e-5, atol=1e-5)
        else:
            shifted = 0.5 * distances + 0.5 * batch["inputs"].square().sum(1, keepdim=True)
            torch.testing.assert_close(scores, shifted, rtol=1e-5, atol=1e-5)


def test_mean_init_looks_at_init_rows_of_each_class_without_training_mode() -> None:
    head = LinearHead(init="mean", init_rows=1)
    training = context(head)
    training.model.train()
    first = experience(0, (0, 1))
    training.begin(first)
    assert training.model.training and all(module.training for module in training.model.modules())
    weights, data = head.module.weight.detach(), rows(first.train)
    for label in (0, 1):
        own = data["inputs"][data["labels"] == label]
        assert (own == weights[label]).all(1).sum() == 1


def test_outputs_reserved_for_later_classes_get_their_means_when_rows_arrive() -> None:
    head = LinearHead(init="mean")
    training = context(head)
    training.reserve_classes = 5
    training.begin(experience(0, (0, 1)))
    assert head.module.weight.shape == (5, D)
    old = head.module.weight.detach().clone()
    second = experience(1, (2, 3))
    training.begin(second)
    assert torch.equal(head.module.weight[[0, 1, 4]], old[[0, 1, 4]])
    data = rows(second.train)
    torch.testing.assert_close(head.module.weight[2].detach(), data["inputs"][data["labels"] == 2].mean(0))
    held = head.module.weight
    head.grow_to(3, training)
    assert head.module.weight is held


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"bias": False}),
        ({"init": "mean"}, {"init": "mean", "scale": 3.0}),
        ({}, {"normalize": True}),
        ({"normalize": True}, {"normalize": True, "bias": True}),
        ({"normalize": True}, {"normalize": True, "scale": 5.0}),
    ],
)
def test_every_setting_changes_the_logits(one: dict[str, Any], other: dict[str, Any]) -> None:
    first = experience(0, (0, 1))
    logits = []
    for settings in (one, other):
        training = context(LinearHead(**settings))
        training.begin(first)
        logits.append(training.forward(rows(first.train)).logits)
    assert not torch.allclose(logits[0], logits[1])


def test_cosine_logits_by_hand() -> None:
    head = LinearHead(normalize=True, scale=7.0)
    training = context(head)
    first = experience(0, (0, 1))
    training.begin(first)
    batch = rows(first.train)
    by_hand = 7 * F.cosine_similarity(batch["inputs"][:, None], head.module.weight[None], dim=2)
    torch.testing.assert_close(training.forward(batch).logits, by_hand)


@pytest.mark.parametrize(
    "settings",
    [
        {"init": "zero", "normalize": True},
        {"init": "mean", "bias": False},
        {"init_rows": 5},
        {"scale": 0.0},
        {"init": "ones"},
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        LinearHead(**settings)


def test_a_domain_head_is_fixed_by_the_first_experience() -> None:
    head = LinearHead()
    training = context(head, scenario="domain")
    training.begin(experience(0, (0, 1), scenario="domain"))
    training.begin(experience(1, (0, 1), scenario="domain"))
    assert head.module.weight.shape == (2, D)
    with pytest.raises(StreamError, match="fixed by the first experience"):
        training.begin(experience(2, (0, 2), scenario="domain"))


@pytest.mark.parametrize(("outputs", "found"), [(None, 1), (3, 3)])
def test_regression_has_as_many_outputs_as_targets(outputs: int | None, found: int) -> None:
    head = LinearHead()
    training = context(head, objective="regression", scenario="domain")
    for index in range(2):
        training.begin(regression(index, outputs))
        assert head.module.weight.shape == (found, D)
    with pytest.raises(CompositionError, match="regression"):
        context(LinearHead(init="mean"), objective="regression")


@pytest.mark.parametrize("part", [LinearHead, NearestMeanHead])
def test_a_model_with_its_own_logits_takes_no_head(part: type[Part]) -> None:
    with pytest.raises(CompositionError, match="gives logits itself"):
        TrainingContext(build_model(nn.Linear(2, 2), objective="classification"), [part()])


@pytest.mark.parametrize("again", ["attached", "not yet attached"])
@pytest.mark.parametrize("make", [LinearHead, NearestMeanHead])
def test_round_trip_of_the_state(make: type[Any], again: str) -> None:
    first, second = experience(0, (0, 1)), experience(1, (2, 4))
    head = make()
    training = context(head)
    for step in (first, second):
        training.begin(step)
        training.end()
    state = head.state_dict()
    fresh = make()
    if again == "attached":
        other = context(fresh, seed=9)
        fresh.load_state_dict(state)
    else:
        fresh.load_state_dict(state)
        other = context(fresh, seed=9)
    other.model.load_saved(training.model.saved_tensors())
    batch = rows(second.train)
    assert torch.equal(other.forward(batch).logits, training.forward(batch).logits)
    third = experience(2, (5,))
    for one in (training, other):
        one.begin(third)
        one.end()
    assert other.forward(batch).logits.shape == training.forward(batch).logits.shape == (40, 6)
    assert str(fresh.state_dict()) == str(head.state_dict())


def test_nearest_mean_equals_a_slow_reference_whatever_the_order_of_rows() -> None:
    whole = experience(0, (0, 1, 2), rows=40)
    data = rows(whole.train)
    for settings in (
        {},
        {"distance": "cosine"},
        {"normalize": False},
        {"distance": "cosine", "normalize": False, "scale": 3.0},
    ):
        seen = []
        for order in (torch.arange(120), torch.arange(120).flip(0)):
            head = NearestMeanHead(**settings)
            training = context(head)
            for index, part in enumerate(order.chunk(5)):
                table = whole.train.select(part)
                training.begin(Experience(index, "x", table, classes=(0, 1, 2)))
                training.end()
            seen.append(training.forward(data).logits)
            assert head.rows().numel() == 0 and head.nbytes() == 3 * D * (8 + 4) + 3 * (8 + 1)
        torch.testing.assert_close(seen[0], seen[1], rtol=1e-6, atol=1e-6)
        inputs = F.normalize(data["inputs"], dim=1) if head.settings.normalize else data["inputs"]
        means = torch.stack([inputs[data["labels"] == k].mean(0) for k in range(3)])
        if head.settings.distance == "cosine":
            slow = F.cosine_similarity(inputs[:, None], means[None], dim=2)
        else:
            slow = -(inputs[:, None] - means[None]).square().sum(2)
        torch.testing.assert_close(seen[0], head.settings.scale * slow, rtol=1e-4, atol=1e-4)


def test_a_class_without_rows_is_never_chosen_and_its_logits_are_finite() -> None:
    head = NearestMeanHead(distance="cosine")
    training = context(head)
    training.begin(experience(0, (0, 3)))
    batch = rows(experience(0, (0, 3)).train)
    assert torch.isfinite(training.forward(batch).logits).all()
    training.end()
    logits = training.forward({**batch, "inputs": -batch["inputs"]}).logits
    assert torch.isfinite(logits).all() and set(logits.argmax(1).tolist()) <= {0, 3}
    assert not training.parameters()


def test_class_sums_leave_out_ignored_rows_and_modes_are_put_back() -> None:
    training = context(LinearHead())
    training.begin(experience(0, (0,)))
    inputs, labels = torch.ones(4, D), torch.tensor([0, -100, 1, 7])
    table = TensorTable({"inputs": inputs, "labels": labels, "row": torch.arange(4)})
    sums, counts = class_sums(training, table, 2, normalize=False)
    assert counts.tolist() == [1, 1] and torch.equal(sums, torch.ones(2, D, dtype=torch.float64))
    mixed = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    with as_at_test(mixed):
        assert not any(module.training for module in mixed.modules())
    assert [module.training for module in mixed.modules()] == [True, True, False]
