"""Every setting changes something; accumulation changes nothing; parts go together, cut and resumed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from battery import figures, learner_for, run_with_cuts, same_weights, tiny_stream
from loop_bench import KINDS, close, differ, experience, looped, make, train, values

from continual import Learner, Strategy
from continual.table import TensorTable

CHANGES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("si", {}, {"strength": 3.0}),
    ("si", {}, {"xi": 1.0}),
    ("mas", {}, {"strength": 3.0}),
    ("mas", {}, {"rows": 3}),
    ("rwalk", {"interval": 2}, {"interval": 2, "strength": 3.0}),
    ("rwalk", {"interval": 2}, {"interval": 2, "alpha": 0.3}),
    ("rwalk", {"interval": 2}, {"interval": 3}),
    ("rwalk", {"interval": 2}, {"interval": 2, "epsilon": 0.5}),
    ("l2", {}, {"strength": 0.2}),
    ("lwf", {}, {"strength": 3.0}),
    ("lwf", {}, {"temperature": 1.0}),
    ("lwf", {}, {"weighting": "experiences"}),
    ("lwf", {}, {"over": "all"}),
    ("feature-distillation", {}, {"strength": 3.0}),
    ("feature-distillation", {}, {"distance": "cosine"}),
    ("agem", {"rows": 4}, {"rows": 4, "capacity": 5}),
    ("agem", {"rows": 4}, {"rows": 7}),
    ("agem", {"rows": 4}, {"rows": 4, "epsilon": 10.0}),
    ("agem", {"rows": 4, "capacity": 8}, {"rows": 4, "capacity": 8, "select": "reservoir"}),
    ("agem", {"rows": 4, "capacity": 7}, {"rows": 4, "capacity": 7, "select": "class-balanced"}),
    ("gem", {}, {"capacity": 4}),
    ("gem", {}, {"margin": 5.0}),
    ("gem", {}, {"epsilon": 1.0}),
    ("ogd", {}, {"rows": 3}),
    ("ogd", {}, {"logits": "mean"}),
    ("ogd", {}, {"logits": "all"}),
    ("ogd", {}, {"directions": 1}),
]


@pytest.fixture(autouse=True)
def _own_draws() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        yield


def trained(kind: str, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    loop = looped(make(kind, **settings), lr=0.1)
    for index in range(3):
        train(loop, experience(index), epochs=2)
    return values(loop.model)


@pytest.mark.parametrize("kind,settings,others", CHANGES, ids=lambda value: str(value))
def test_every_setting_changes_the_weights(kind: str, settings: dict[str, Any], others: dict[str, Any]) -> None:
    assert differ(trained(kind, settings), trained(kind, others))


def test_every_setting_is_among_them() -> None:
    for kind in KINDS:
        named = {key for one, _, changed in CHANGES if one == kind for key in changed}
        elsewhere = {"kind", "space"}  # space: tests/parts/test_penalties.py
        assert named | elsewhere >= set(type(make(kind)).Settings.model_fields)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("rwalk", "feature-distillation")])
def test_two_halves_of_a_batch_are_the_batch(kind: str) -> None:
    """Gradients are looked at and edited once a step, when all of them are there."""
    tables = []
    for index in range(3):
        table = experience(index, rows=32).train
        tables.append(TensorTable({name: table.column(name) for name in ("inputs", "labels", "row")}))
    found = []
    for size, accumulate in ((8, 1), (4, 2)):
        training = {"optimizer": "sgd", "lr": 0.1, "batch_size": size, "accumulate": accumulate, "epochs": 2}
        strategy = Strategy(make(kind), training=training)
        model = {"kind": "mlp", "hidden": [6, 5], "activation": "tanh"}
        learner = Learner(model, strategy, seed=1, device="cpu", progress=False, monitor=False)
        for table in tables:
            learner.update(table)
        found.append(values(learner.model))
    close(found[1], found[0], rtol=1e-3, atol=1e-5)


TOGETHER: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "si, lwf": [("si", {}), ("lwf", {"weighting": "experiences"})],
    "mas, agem": [("mas", {"rows": 10}), ("agem", {"capacity": 20, "rows": 8})],
    "rwalk, features, gem": [("rwalk", {"interval": 3}), ("feature-distillation", {}), ("gem", {"capacity": 20})],
    "l2, ogd": [("l2", {}), ("ogd", {"rows": 6})],
}


@pytest.mark.parametrize("together", TOGETHER)
def test_together_with_rehearsal_cut_and_resumed(together: str, tmp_path: Path) -> None:
    content: dict[str, Any] = {
        "summary": together,
        "source": "tests",
        "replay": {"kind": "rehearsal", "capacity": 20},
        "training": {"optimizer": "adamw", "lr": 0.01, "epochs": 2, "batch_size": 16, "accumulate": 2, "clip": 1.0},
    }
    for kind, settings in TOGETHER[together]:
        content[KINDS[kind]] = {"kind": kind, **settings}
    strategy: Any = Strategy.load({**content, "name": "together"})
    whole = learner_for(strategy)
    uncut = whole.run(tiny_stream())
    cut = run_with_cuts(strategy, tiny_stream(), tmp_path / "checkpoint", [2, 5])
    same_weights(whole, cut)
    assert figures(cut.run(tiny_stream()).result) == figures(uncut.result)


def test_bf16_runs_stay_finite() -> None:
    for kind in ("agem", "gem", "ogd", "lwf", "rwalk", "mas"):
        training = {"optimizer": "sgd", "lr": 0.05, "epochs": 1, "batch_size": 32, "precision": "bf16"}
        learner = learner_for(Strategy(make(kind), training=training))
        learner.run(tiny_stream())
        assert all(torch.isfinite(p).all() for p in learner.model.parameters())
