"""Feature replay: the Gaussians are those of the rows, the loss is that of their definition, and it holds the past."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from battery import learner_for, tiny_stream
from torch.nn import functional as F

from continual import Strategy
from continual.errors import CompositionError, SpecError
from continual.models.build import build_model
from continual.parts.context import TrainingContext
from continual.parts.head.linear import LinearHead
from continual.parts.replay.gaussian import GaussianReplay
from continual.parts.replay.gaussians import Gaussians, root
from continual.streams.experience import Experience
from continual.table import TensorTable

D = 4
COVARIANCES = ("diagonal", "shared", "full")


def experience(index: int, classes: tuple[int, ...], rows: int = 60) -> Experience:
    generator = torch.Generator().manual_seed(index)
    labels = torch.tensor(classes).repeat(rows)
    mix = torch.randn(10, D, D, generator=generator)[labels]
    inputs = (mix @ torch.randn(len(labels), D, 1, generator=generator))[:, :, 0] + 3.0 * labels[:, None]
    labels[::13] = -100
    table = TensorTable({"inputs": inputs, "labels": labels, "row": torch.arange(len(labels)) + 1000 * index})
    return Experience(index, f"e{index}", table, classes=classes)


def loop(part: GaussianReplay, hidden: list[int] | None = None, **options: Any) -> TrainingContext:
    model = build_model({"kind": "mlp", "hidden": hidden or [], "inputs": D}, objective="classification")
    return TrainingContext(model, [LinearHead(), part], **options)


def slow_covariance(covariance: str, rows: np.ndarray, labels: np.ndarray, label: int) -> np.ndarray:
    own = rows[labels == label]
    full = np.cov(own.T, bias=True)
    if covariance == "full":
        return full
    if covariance == "diagonal":
        return np.diag(np.diag(full))
    centred = np.concatenate([rows[labels == k] - rows[labels == k].mean(0) for k in np.unique(labels)])
    return centred.T @ centred / len(centred)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_draws_have_the_mean_and_covariance_of_all_rows_of_their_class(covariance: Any) -> None:
    part = GaussianReplay(covariance=covariance)
    training = loop(part)
    stream = [experience(0, (0, 1)), experience(1, (3,)), experience(2, (1, 3))]
    for step in stream:
        training.begin(step)
        training.end()
    rows = torch.cat([step.train.column("inputs") for step in stream]).double().numpy()
    labels = torch.cat([step.train.column("labels") for step in stream]).numpy()
    rows, labels = rows[labels >= 0], labels[labels >= 0]
    features, drawn = part.gaussians.draw(60_000, torch.Generator().manual_seed(0))
    assert features.dtype == torch.float32 and set(drawn.tolist()) == {0, 1, 3}
    for label in (0, 1, 3):
        own = features[drawn == label].double().numpy()
        assert abs(len(own) - 20_000) < 600
        wanted = slow_covariance(covariance, rows, labels, label)
        scale = np.sqrt(wanted.trace())
        np.testing.assert_allclose(own.mean(0), rows[labels == label].mean(0), atol=0.03 * scale)
        np.testing.assert_allclose(np.cov(own.T), wanted, atol=0.05 * wanted.trace())


def test_root_squares_to_the_covariance_also_where_directions_have_no_variance() -> None:
    thin = torch.randn(2, 6, dtype=torch.float64)
    covariance = thin.T @ thin
    found = root(covariance).double()
    torch.testing.assert_close(found @ found.T, covariance, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_a_single_row_is_drawn_as_it_is(covariance: Any) -> None:
    gaussians, row = Gaussians(covariance), torch.randn(1, D, dtype=torch.float64)
    gaussians.grow(2, D)
    gaussians.add(row, torch.tensor([1]), (1,))
    gaussians.fit()
    features, labels = gaussians.draw(5, torch.Generator().manual_seed(0))
    assert (labels == 1).all()
    torch.testing.assert_close(features, row.float().expand(5, D), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("share", [0.5, 0.25])
def test_the_loss_is_one_t_th_current_and_the_rest_drawn(share: float, weights: bool) -> None:
    part = GaussianReplay(share=share)
    training = loop(part, seed=4)
    for index, classes in enumerate([(0, 1), (2,), (3, 4)]):
        training.begin(experience(index, classes))
        if index < 2:
            training.end()
    batch = experience(2, (3, 4)).train[torch.arange(1, 13)]
    if weights:
        batch["weight"] = torch.rand(12)
    training.current_rows = training.batch_size = 12
    output = training.forward(batch)
    terms = dict(training.terms(batch, output))
    again = loop(GaussianReplay(), seed=4).randomness.generator("gaussian replay")
    count = round(12 * share / (1 - share))
    drawn, labels = part.gaussians.draw(count, again)
    assert set(labels.tolist()) <= {0, 1, 2}
    head = training.model.head
    old = F.cross_entropy(head(drawn), labels)  # type: ignore[misc]
    rows = F.cross_entropy(output.logits, batch["labels"], reduction="none")
    new = (rows * batch["weight"]).sum() / batch["weight"].sum() if weights else rows.mean()
    torch.testing.assert_close(terms["objective"] + terms["replay/gaussian"], new / 3 + old * 2 / 3)


def test_nothing_is_drawn_in_the_first_experience_and_gradients_reach_the_head_alone() -> None:
    part = GaussianReplay()
    training = loop(part)
    first = experience(0, (0, 1))
    training.begin(first)
    batch = first.train[torch.arange(8)]
    training.backward(batch)
    assert part.loss(batch, training.forward(batch)) is None
    training.end()
    training.begin(experience(1, (2, 3)))
    second = experience(1, (2, 3)).train[torch.arange(8)]
    term = part.loss(second, training.forward(second))
    assert term is not None and term.requires_grad


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_round_trip_of_the_state_to_the_bit_and_bytes(covariance: Any) -> None:
    part, again = GaussianReplay(covariance=covariance), GaussianReplay(covariance=covariance)
    training = loop(part)
    for index, classes in enumerate([(0, 1), (1, 2)]):
        training.begin(experience(index, classes))
        training.end()
    other = loop(again)
    again.load_state_dict(part.state_dict())
    assert str(again.state_dict()) == str(part.state_dict()) and again.nbytes() == part.nbytes()
    for _ in range(2):
        one, two = (p.gaussians.draw(9, torch.Generator().manual_seed(1)) for p in (part, again))
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
        for each in (training, other):
            each.begin(experience(2, (0, 4)))
            each.end()
    square = {"diagonal": 5 * D, "shared": D * D, "full": 5 * D * D}[covariance]
    sums = D * (D + 1) // 2 if covariance == "shared" else square
    assert part.nbytes() == 5 * 8 + 5 * D * (8 + 4) + sums * 8 + square * 4 + 4 * 8
    assert part.rows().numel() == 0


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_a_class_of_one_row_is_given_up_with_it(covariance: Any) -> None:
    part, never = GaussianReplay(covariance=covariance), GaussianReplay(covariance=covariance)
    training, other = loop(part), loop(never)
    labels = torch.tensor([2, -100])
    single = TensorTable({"inputs": torch.rand(2, D) + 1, "labels": labels, "row": torch.tensor([77, 78])})
    for each in (training, other):
        each.begin(experience(0, (0, 1)))
        each.end()
    training.begin(Experience(1, "single", single, classes=(2,)))
    training.end()
    row = part.gaussians.sums.sums_KD[2].clone()
    assert part.rows().tolist() == [77] and len(part.gaussians) == 3 and row.any()
    assert part.erase(torch.tensor([78, 5])) == 0 and part.erase(torch.tensor([77])) == 1
    assert not len(part.rows()) and len(part.gaussians) == 2
    never.gaussians.grow(3, D)
    never.gaussians.fit()
    for name in ("_mean_KD", "_factor"):
        torch.testing.assert_close(getattr(part.gaussians, name), getattr(never.gaussians, name), rtol=1e-4, atol=1e-4)
    state = part.state_dict()
    held = [part.gaussians._mean_KD, part.gaussians._factor, *(v for v in state.values() if v is not None)]
    content = b"".join(one.numpy().tobytes() for one in held)
    searched = [row[:2], row[:2].float(), row[:1], row[:1].square(), torch.tensor([77])]
    assert not any(one.numpy().tobytes() in content for one in searched)


@pytest.mark.parametrize(
    ("one", "other"), [({}, {"covariance": "full"}), ({}, {"covariance": "shared"}), ({}, {"share": 0.2})]
)
def test_every_setting_changes_the_loss(one: dict[str, Any], other: dict[str, Any]) -> None:
    found = []
    for settings in (one, other):
        part = GaussianReplay(**settings)
        training = loop(part)
        for index in range(2):
            training.begin(experience(index, (2 * index, 2 * index + 1)))
            if index == 0:
                training.end()
        batch = experience(1, (2, 3)).train[torch.arange(8)]
        training.current_rows = 8
        term = part.loss(batch, training.forward(batch))
        assert term is not None
        found.append(float(term.detach()))
    assert found[0] != found[1]


@pytest.mark.parametrize("settings", [{"share": 1.0}, {"share": 0.0}, {"covariance": "low-rank"}])
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        GaussianReplay(**settings)


def test_features_that_move_are_refused() -> None:
    with pytest.raises(CompositionError, match="backbone: frozen"):
        Strategy(GaussianReplay())
    with pytest.raises(CompositionError, match="keep one of the two"):
        Strategy.load({"replay": [{"kind": "gaussian"}, {"kind": "rehearsal"}], "backbone": "frozen"})
    training = loop(GaussianReplay(), hidden=[5])
    training.begin(experience(0, (0, 1)))
    training.end()
    with pytest.raises(CompositionError, match="no longer fit"):
        training.begin(experience(1, (2, 3)))
    Strategy.load({"adapter": {"kind": "lora", "across_tasks": "first"}, "replay": {"kind": "gaussian"}})


def test_it_holds_the_past_where_the_same_head_alone_does_not() -> None:
    common = {"head": {"kind": "linear"}, "backbone": "frozen", "training": {"lr": 0.05, "epochs": 5, "batch_size": 16}}
    accuracies = []
    for more in ({}, {"replay": {"kind": "gaussian"}}):
        learner = learner_for(Strategy.load({**common, **more}))
        accuracies.append(learner.run(tiny_stream()).result["metrics"]["accuracy"])
    assert accuracies[1] > accuracies[0] + 0.2
