"""The generative classifier: Bayes' rule by a loop over classes, what it is trained on, and what it never forgets."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from replay_bench import WIDTH, Linear, experience, small_model
from torch import Tensor

from continual import Learner, Strategy
from continual.errors import CompositionError, SpecError, TrainingError
from continual.models.vae import ConditionalVAE
from continual.parts.context import TrainingContext
from continual.parts.head.closed_form import UNKNOWN, Familiar
from continual.parts.head.vae_classifier import VaeClassifierHead
from continual.parts.replay.cycle import Cycle
from continual.state import load_state, save_state, tensor_bytes
from continual.streams.experience import Experience
from continual.table import TensorTable

SMALL: dict[str, Any] = {"hidden": (8,), "latent": 2, "iterations": 60, "lr": 1e-2, "samples": 6, "batch_size": 10}


def looped(seed: int = 0, **settings: Any) -> TrainingContext:
    model = small_model().requires_grad_(False)
    return TrainingContext(model, [VaeClassifierHead(**{**SMALL, **settings})], seed=seed)


def learn(loop: TrainingContext, *given: Experience) -> VaeClassifierHead:
    for each in given:
        loop.begin(each)
        loop.end()
    head = loop.parts[0]
    assert isinstance(head, VaeClassifierHead)
    return head


def rows_of(inputs: Tensor) -> dict[str, Tensor]:
    return {"inputs": inputs, "labels": torch.zeros(len(inputs), dtype=torch.int64)}


def test_a_row_gets_the_class_under_which_it_is_most_likely() -> None:
    loop = looped()
    head = learn(loop, experience(0), experience(1))
    test = experience(0, rows=40).train, experience(1, rows=40).train
    inputs = torch.cat([table.column("inputs") for table in test])
    labels = torch.cat([table.column("labels") for table in test])
    logits = loop.forward(rows_of(inputs)).logits
    zero = torch.zeros(1, dtype=torch.int64)
    for row, logit in zip(inputs, logits, strict=True):
        wanted = torch.stack([vae.log_likelihood(row[None], zero, head.module.noise)[0] for vae in head.module.vaes])  # type: ignore[operator]
        torch.testing.assert_close(logit, wanted, rtol=1e-4, atol=1e-4)
    assert (logits.argmax(1) == labels).float().mean() > 0.95
    assert torch.equal(logits, loop.forward(rows_of(inputs)).logits), "measuring draws nothing"
    head.grow_to(6, loop)
    logits = loop.forward(rows_of(inputs)).logits
    assert logits.shape == (80, 6) and (logits[:, 4:] == UNKNOWN).all()
    assert isinstance(head.module, Familiar)
    familiar = head.module.familiarity(inputs)
    torch.testing.assert_close(familiar, logits[:, :4].exp().mean(1).log(), rtol=1e-4, atol=1e-4)
    assert familiar.mean() > head.module.familiarity(1 - inputs).mean()


def test_an_autoencoder_sees_the_rows_of_its_class_alone_and_is_trained_by_the_formula() -> None:
    given = experience(0)
    loop = looped(seed=4)
    draws = torch.Generator()
    draws.set_state(loop.randomness.generator("vae-classifier").get_state())
    head = learn(loop, given)
    for place, label in enumerate((0, 1)):
        own = given.train.column("inputs")[given.train.column("labels") == label]
        vae = ConditionalVAE(WIDTH, 1, hidden=(8,), latent=2, generator=draws)
        optimizer, cycle = torch.optim.Adam(vae.parameters(), lr=1e-2), Cycle()
        for _ in range(60):
            rows = own[cycle.draw(10, 12, draws)]
            noise = torch.randn(10, 2, generator=draws)
            missing, kl = vae.terms(rows, torch.zeros(10, dtype=torch.int64), noise)
            optimizer.zero_grad()
            (missing + kl).mean().backward()
            optimizer.step()
        for mine, theirs in zip(head.module.vaes[place].parameters(), vae.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs.detach(), rtol=1e-3, atol=1e-4)
            assert not mine.requires_grad


def test_nothing_that_was_learnt_changes() -> None:
    loop = looped()
    inputs = torch.rand(20, WIDTH)
    learn(loop, experience(0))
    before = loop.forward(rows_of(inputs)).logits
    head = learn(loop, experience(1), experience(2))
    assert torch.equal(loop.forward(rows_of(inputs)).logits[:, :2], before)
    assert head.module.classes == [0, 1, 2, 3, 4, 5] and not loop.parameters()


def test_a_class_of_several_experiences_is_a_mixture_by_rows() -> None:
    loop = looped()
    head = learn(loop, experience(0), experience(1, rows=48, classes=(0, 1)))
    assert head.module.classes == [0, 1, 0, 1] and head.module.rows == [12, 12, 24, 24]
    inputs = torch.rand(9, WIDTH)
    zeros = torch.zeros(9, dtype=torch.int64)
    logits = loop.forward(rows_of(inputs)).logits
    for label in (0, 1):
        one, other = (head.module.vaes[p].log_likelihood(inputs, zeros, head.module.noise) for p in (label, label + 2))  # type: ignore[operator]
        wanted = (12 / 36 * one.double().exp() + 24 / 36 * other.double().exp()).log()
        torch.testing.assert_close(logits[:, label].double(), wanted, rtol=1e-4, atol=1e-4)


def test_features_of_a_frozen_backbone() -> None:
    loop = looped(reads="features", likelihood="gaussian")
    head = learn(loop, experience(0))
    batch = experience(0).train[torch.arange(5)]
    output = loop.forward(batch)
    assert head.module.vaes[0].inputs == 12 and output.features is not None  # type: ignore[union-attr]
    assert torch.equal(output.features, loop.model.backbone(batch))  # type: ignore[operator]
    loop = looped()
    learn(loop, experience(0))
    output = loop.forward(batch)
    assert output.features is not None and torch.equal(output.features, batch["inputs"])


@pytest.mark.parametrize(
    "changed",
    [
        {"reads": "features", "likelihood": "gaussian"},
        {"hidden": (9,)},
        {"latent": 3},
        {"likelihood": "gaussian"},
        {"lr": 2e-2},
        {"iterations": 61},
        {"batch_size": 11},
        {"samples": 7},
    ],
)
def test_every_setting_changes_the_likelihood(changed: dict[str, Any]) -> None:
    one, other = looped(), looped(**changed)
    batch = experience(0).train[torch.arange(6)]
    for loop in (one, other):
        learn(loop, experience(0))
    assert not torch.allclose(one.forward(batch).logits, other.forward(batch).logits, rtol=1e-5, atol=1e-5)
    assert set(VaeClassifierHead.Settings.model_fields) == {"kind", "reads", *SMALL, "likelihood"}


def test_state_round_trip(tmp_path: Any) -> None:
    loop, other = looped(seed=1), looped(seed=2)
    head = learn(loop, experience(0))
    again = other.parts[0]
    save_state(tmp_path / "s", {"head": head.state_dict(), "weights": dict(loop.model.state_dict())})
    saved = load_state(tmp_path / "s")
    again.load_state_dict(saved["head"])
    other.model.load_state_dict(saved["weights"])
    other.randomness.load_state_dict(loop.randomness.state_dict())
    for each in (loop, other):
        learn(each, experience(1))
    batch = rows_of(torch.rand(6, WIDTH))
    assert torch.equal(loop.forward(batch).logits, other.forward(batch).logits)
    assert again.nbytes() == tensor_bytes(again.state_dict()) == 6 * 2 * 4 and len(again.rows()) == 0


def test_its_weights_are_saved_with_the_model_and_named_in_the_result() -> None:
    strategy = Strategy.load({"head": {"kind": "vae-classifier", **SMALL}, "backbone": "frozen"})
    learner = Learner({"kind": "mlp", "hidden": [4]}, strategy, seed=0, device="cpu", progress=False, monitor=False)
    given = experience(0)
    learner.update((given.train.column("inputs"), given.train.column("labels")))
    own = sum(parameter.nbytes for parameter in learner.model.head.parameters())  # type: ignore[union-attr]
    assert own > 1000 and learner.state_bytes()["weights"] == own + sum(
        parameter.nbytes for parameter in learner.model.backbone.parameters()
    )
    found = learner.predict(given.train.column("inputs"))
    assert (found["labels"] == given.train.column("labels")).float().mean() > 0.9 and len(found["familiar"]) == 24


def test_what_is_refused() -> None:
    given = experience(0)
    columns = {name: given.train.column(name) for name in ("inputs", "labels", "row")}
    far = Experience(0, "far", TensorTable({**columns, "inputs": columns["inputs"] * 3}), classes=(0, 1))
    with pytest.raises(CompositionError, match=r"learns inputs in \[0, 1\], and those of experience 'far' lie in \["):
        learn(looped(), far)
    learn(looped(likelihood="gaussian"), far)
    nan = columns["inputs"].clone()
    nan[3, 3] = torch.nan
    with pytest.raises(CompositionError, match="lie in"):
        learn(looped(), Experience(0, "nan", TensorTable({**columns, "inputs": nan}), classes=(0, 1)))
    with pytest.raises(CompositionError, match="give every experience inputs of one shape"):
        wide = TensorTable({**columns, "inputs": columns["inputs"].repeat(1, 2)})
        learn(looped(), given, Experience(1, "wide", wide, classes=(0, 1)))
    tokens = TensorTable(
        {"input_ids": torch.ones(24, 3, dtype=torch.int64), **{n: columns[n] for n in ("labels", "row")}}
    )
    with pytest.raises(CompositionError, match=r"reads the column 'inputs'.*set head.reads: features"):
        looped().parts[0].begin(looped(), Experience(0, "t", tokens, classes=(0, 1)))
    with pytest.raises(TrainingError, match="class 0 of experience 'e0' are not finite"):
        learn(looped(lr=1e30), given)
    with pytest.raises(CompositionError, match="needs a model that gives features"):
        TrainingContext(Linear(), [VaeClassifierHead(**SMALL)])
    with pytest.raises(CompositionError, match="the backbone trains on"):
        learn(TrainingContext(small_model(), [VaeClassifierHead(**SMALL)]), given)
    for slot, kind in (
        ("replay", "rehearsal"),
        ("penalty", "si"),
        ("distillation", "lwf"),
        ("projection", "gem"),
        ("adapter", "lora"),
    ):
        with pytest.raises(CompositionError, match="head/vae-classifier cannot be combined with"):
            Strategy.load({"head": {"kind": "vae-classifier"}, "backbone": "train", slot: {"kind": kind}})
    with pytest.raises(CompositionError, match="backbone: frozen"):
        Strategy.load({"head": {"kind": "vae-classifier"}})
    with pytest.raises(SpecError, match="at least 1"):
        VaeClassifierHead(hidden=())


def test_rows_that_do_not_count_are_not_learnt() -> None:
    given = experience(0)
    labels = given.train.column("labels").clone()
    labels[::3] = -100
    columns = {"inputs": given.train.column("inputs"), "labels": labels, "row": given.train.column("row")}
    head = learn(looped(), Experience(0, "e0", TensorTable(columns), classes=(0, 1)))
    assert sum(head.module.rows) == int((labels >= 0).sum()) and head.module.classes == [0, 1]
    assert math.isfinite(float(head.module.vaes[0].moments.weight.sum()))  # type: ignore[union-attr, operator]
