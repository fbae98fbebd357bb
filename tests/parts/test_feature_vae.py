"""Features from a generator: how it is trained, what it makes, when it is refused, and that it holds the past."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from battery import learner_for, tiny_stream
from test_gaussian_replay import D, experience, loop
from torch import Tensor

from continual import Strategy
from continual.errors import CompositionError, SpecError, TrainingError
from continual.parts.replay.cycle import Cycle
from continual.parts.replay.feature_vae import FeatureVAE
from continual.state import tensor_bytes
from continual.streams.experience import Experience
from continual.table import TensorTable

SMALL: dict[str, Any] = {"hidden": (16,), "latent": 3, "threshold": 0.0, "epochs": 4}


def learnt(part: FeatureVAE, *classes: tuple[int, ...], **options: Any) -> Any:
    training = loop(part, **options)
    for index, known in enumerate(classes):
        training.begin(experience(index, known))
        training.end()
    return training


def kept(part: FeatureVAE) -> str:
    """All but what a head, which is another's, made of it."""
    return str({name: value for name, value in part.state_dict().items() if name != "shares"})


def rows_of(classes: tuple[int, ...], index: int) -> tuple[Tensor, Tensor]:
    table = experience(index, classes).train
    labels = table.column("labels")
    return table.column("inputs")[labels >= 0], labels[labels >= 0]


def test_features_of_each_class_lie_where_its_rows_do() -> None:
    part = FeatureVAE(hidden=(64,), latent=8, epochs=100, threshold=0.0)
    learnt(part, (0, 1), (3,), (2,))
    features, labels = part.draw(20_000, torch.Generator().manual_seed(0))
    assert features.dtype == torch.float32 and set(labels.tolist()) == {0, 1, 2, 3}
    for known, index in (((0, 1), 0), ((3,), 1), ((2,), 2)):
        rows, own = rows_of(known, index)
        for label in known:
            drawn, real = features[labels == label], rows[own == label]
            assert abs(len(drawn) - 5000) < 300
            far = (drawn.mean(0) - real.mean(0)).norm() / real.var(0).sum().sqrt()
            spread = (drawn.var(0).sum() / real.var(0).sum()).sqrt()
            assert far < 0.35 and 0.6 < spread < 1.7


def test_it_is_trained_by_the_formula_written_out() -> None:
    part = FeatureVAE(**SMALL, lr=1e-2, batch_size=50)
    training = learnt(part, (0, 1), seed=3)
    assert part.generator is not None and part.scale.shape == (2, D)
    first, _ = rows_of((0, 1), 0)
    mean, deviation = first.mean(0), first.var(0).mean().sqrt()
    torch.testing.assert_close(part.scale, torch.stack([mean, deviation.expand(D)]))
    old, plain = part.generator, copy.deepcopy(part.generator).requires_grad_(True)
    draws = copy.deepcopy(training.randomness.generator("feature-vae"))
    training.begin(experience(1, (2,)))
    training.end()

    rows, labels = rows_of((2,), 1)
    rows = (rows - mean) / deviation
    plain.grow_to(3, draws)
    optimizer, cycle = torch.optim.Adam(plain.parameters(), lr=1e-2), Cycle()
    assert plain.log_variance is not None and old.log_variance is not None
    for _ in range(4 * 2):
        index = cycle.draw(50, len(rows), draws)
        current = plain.terms(rows[index], labels[index], torch.randn(50, 3, generator=draws))
        asked = torch.tensor([0, 1])[torch.randint(2, (50,), generator=draws)]
        made = old.sample(asked, torch.randn(50, 3, generator=draws))
        made = made + (old.log_variance / 2).exp() * torch.randn(50, D, generator=draws)
        replayed = plain.terms(made, asked, torch.randn(50, 3, generator=draws))
        loss = 0.5 * (current[0] + current[1]).mean() + 0.5 * (replayed[0] + replayed[1]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = part.generator
    assert found is not None and found is not old
    for name, wanted in plain.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], wanted, rtol=1e-4, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in found.parameters())


def test_the_loss_is_one_t_th_current_and_the_rest_drawn() -> None:
    part = FeatureVAE(**SMALL, share=0.75)
    training = learnt(part, (0, 1), (2, 3), seed=4)
    training.begin(experience(2, (4,)))
    batch = experience(2, (4,)).train[torch.arange(1, 9)]
    training.current_rows = training.batch_size = 8
    output = training.forward(batch)
    terms = dict(training.terms(batch, output))
    drawn, labels = part.draw(24, loop(FeatureVAE(), seed=4).randomness.generator("feature-vae replay"))
    assert set(labels.tolist()) <= {0, 1, 2, 3}
    old = torch.nn.functional.cross_entropy(training.model.head(drawn), labels)
    wanted = terms["objective"].detach() / 3 + old * 2 / 3
    torch.testing.assert_close(terms["objective"] + terms["replay/feature-vae"], wanted)


def test_a_generator_that_is_not_recognised_is_refused_before_the_next_experience() -> None:
    part = FeatureVAE(**{**SMALL, "threshold": 1.0, "epochs": 1})
    training = learnt(part, (0, 1))
    assert min(part.quality.shares) < 1
    assert "the next experience will be refused" in str(part.report())
    with pytest.raises(TrainingError, match="does not replay from its generator: the classifier recognises"):
        training.begin(experience(1, (2,)))
    fine = FeatureVAE(**SMALL)
    assert learnt(fine, (0, 1)) and fine.report() is None


def test_features_that_are_not_finite_are_not_recognised() -> None:
    part = FeatureVAE(**SMALL)
    training = learnt(part, (0, 1))
    assert part.generator is not None and max(part.quality.shares) > 0
    with torch.no_grad():
        part.generator.out.bias.fill_(float("nan"))
    part._look_at_quality(training, part.generator, [0, 1])
    assert part.quality.shares == [0.0, 0.0]


def test_round_trip_of_the_state_to_the_bit_and_bytes() -> None:
    part, again = FeatureVAE(**SMALL), FeatureVAE(**SMALL)
    training, other = learnt(part, (0, 1), (1, 2)), loop(again)
    again.load_state_dict(part.state_dict())
    other.randomness.load_state_dict(training.randomness.state_dict())
    for _ in range(2):
        assert kept(again) == kept(part) and again.nbytes() == part.nbytes()
        one, two = (each.draw(9, torch.Generator().manual_seed(1)) for each in (part, again))
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
        for each in (training, other):
            each.begin(experience(2, (0, 4)))
            each.end()
    assert part.nbytes() == tensor_bytes(part.state_dict()) and part.rows().numel() == 0


@pytest.mark.parametrize("labels", [[-100, -100], [0, -100]])
def test_of_fewer_than_two_rows_nothing_is_learnt_and_no_scale_is_taken(labels: list[int]) -> None:
    part = FeatureVAE(**SMALL)
    training = loop(part)
    few = TensorTable({"inputs": torch.rand(2, D) + 9, "labels": torch.tensor(labels), "row": torch.tensor([7, 8])})
    training.begin(Experience(0, "few", few, classes=(0,) if max(labels) == 0 else ()))
    training.end()
    assert part.generator is None and part.known() == 0 and not part.scale.numel()
    training.begin(experience(1, (1, 2)))
    assert part.loss(few[torch.arange(1)], training.forward(few[torch.arange(1)])) is None
    training.end()
    rows, _ = rows_of((1, 2), 1)
    torch.testing.assert_close(part.scale[0], rows.mean(0))
    assert part.known() == 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"share": 0.2}),
        ({}, {"hidden": (8, 8)}),
        ({}, {"latent": 4}),
        ({}, {"lr": 1e-2}),
        ({}, {"epochs": 5}),
        ({}, {"batch_size": 9}),
        ({}, {"check_rows": 50, "threshold": 0.01}),
    ],
    ids=str,
)
def test_every_setting_changes_something(one: dict[str, Any], other: dict[str, Any]) -> None:
    found = []
    for settings in (one, other):
        part = FeatureVAE(**{**SMALL, **settings})
        training = learnt(part, (0, 1))
        training.begin(experience(1, (2, 3)))
        batch = experience(1, (2, 3)).train[torch.arange(8)]
        training.current_rows = 8
        term = part.loss(batch, training.forward(batch))
        assert term is not None
        found.append((float(term.detach()), part.quality.shares, part.quality.threshold))
    assert found[0] != found[1]


def test_impossible_settings_and_features_that_move_are_refused() -> None:
    for settings in ({"share": 1.0}, {"epochs": 0}, {"hidden": ()}, {"threshold": 1.5}):
        with pytest.raises(SpecError):
            FeatureVAE(**settings)
    with pytest.raises(CompositionError, match="backbone: frozen"):
        Strategy(FeatureVAE())
    with pytest.raises(CompositionError, match="keep one of the two"):
        Strategy.load({"replay": [{"kind": "gaussian"}, {"kind": "feature-vae"}], "backbone": "frozen"})
    training = loop(FeatureVAE(**SMALL), hidden=[5])
    training.begin(experience(0, (0, 1)))
    training.end()
    with pytest.raises(CompositionError, match="no longer fit"):
        training.begin(experience(1, (2, 3)))


def test_it_holds_the_past_where_the_same_head_alone_does_not() -> None:
    common = {"head": {"kind": "linear"}, "backbone": "frozen", "training": {"lr": 0.05, "epochs": 5, "batch_size": 16}}
    accuracies = []
    for more in ({}, {"replay": {"kind": "feature-vae", "hidden": [32], "latent": 8, "threshold": 0.2}}):
        learner = learner_for(Strategy.load({**common, **more}))
        accuracies.append(learner.run(tiny_stream()).result["metrics"]["accuracy"])
    assert accuracies[1] > accuracies[0] + 0.2
