"""Every strategy of the library goes through the same tests."""

from __future__ import annotations

import random
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from battery import ENGINES, STRATEGIES, figures, learner_for, run_with_cuts, same_weights, small, tiny_stream, weights

from continual import Learner
from continual.state import load_state, save_state, tensor_bytes

CONTINUAL = [name for name in STRATEGIES if "joint" not in name]
IMPOSSIBLE = {("avalanche-der", "task"), ("avalanche-icarl", "domain")}
"""Where an engine's strategy refuses a scenario (tests/interop/test_avalanche_engine.py)."""


@pytest.fixture(autouse=True)
def engines_are_installed(request: pytest.FixtureRequest) -> None:
    """Skip the strategies of packages that are not here; the extra ``dev`` brings them all."""
    name = getattr(getattr(request.node, "callspec", None), "params", {}).get("name")
    for package in ("avalanche", *(("quadprog",) if name == "avalanche-gem" else ())):
        if name in ENGINES and find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


@pytest.mark.parametrize("name", STRATEGIES)
def test_same_seed_same_result_and_another_seed_another(name: str) -> None:
    one, other = learner_for(name), learner_for(name)
    first, second = one.run(tiny_stream()), other.run(tiny_stream())
    assert figures(first.result) == figures(second.result)
    same_weights(one, other)
    if one.context.parameters():
        third = learner_for(name, seed=4)
        third.run(tiny_stream())
        assert any(not torch.equal(a, b) for a, b in zip(weights(one).values(), weights(third).values(), strict=True))


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name not in ENGINES])
@pytest.mark.parametrize("cuts", [[1], [4, 2, 5]], ids=str)
def test_cut_and_resumed_equals_uncut(name: str, cuts: list[int], tmp_path: Path) -> None:
    whole = learner_for(name)
    uncut = whole.run(tiny_stream())
    learner = run_with_cuts(name, tiny_stream(), tmp_path / "checkpoint", cuts)
    same_weights(whole, learner)
    assert figures(learner.run(tiny_stream()).result) == figures(uncut.result)


@pytest.mark.parametrize("name", [name for name in CONTINUAL if name not in ENGINES])
def test_state_round_trip_between_updates(name: str, tmp_path: Path) -> None:
    stream = tiny_stream()
    whole, halves = learner_for(name), learner_for(name)
    for experience in stream:
        whole.update(experience)
    halves.update(stream[0])
    halves.update(stream[1])
    halves.save(tmp_path / "state")
    loaded = Learner.load(tmp_path / "state", device="cpu", progress=False)
    same_weights(halves, loaded)
    update = loaded.update(stream[2])
    same_weights(whole, loaded)
    assert update.retention is not None
    assert len(loaded.monitor.matrix()) == 3  # type: ignore[union-attr]
    np.testing.assert_array_equal(loaded.monitor.matrix(), whole.monitor.matrix())  # type: ignore[union-attr]


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name not in ENGINES])
def test_a_restored_state_is_written_as_the_very_same_bytes(name: str, tmp_path: Path) -> None:
    learner = learner_for(name)
    if name in CONTINUAL:
        learner.update(tiny_stream()[0])
        learner.update(tiny_stream()[1])
    else:
        learner.run(tiny_stream())
    save_state(tmp_path / "one", learner.state())
    restored = Learner.restore(load_state(tmp_path / "one"), "one", device="cpu", progress=False)
    save_state(tmp_path / "other", restored.state())
    assert len(list((tmp_path / "one").iterdir())) == 3
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_monitor_never_changes_training(name: str) -> None:
    with_monitor, without = learner_for(name), learner_for(name, monitor=False)
    with_monitor.run(tiny_stream())
    without.run(tiny_stream())
    same_weights(with_monitor, without)


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_users_generators_are_neither_read_nor_changed(name: str) -> None:
    torch.manual_seed(11)
    np.random.seed(11)  # noqa: NPY002
    random.seed(11)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    one = learner_for(name)
    one.run(tiny_stream(experiences=2))
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert before[2] == random.getstate()
    torch.manual_seed(12)
    other = learner_for(name)
    other.run(tiny_stream(experiences=2))
    same_weights(one, other)


@pytest.mark.parametrize("name", CONTINUAL)
@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
def test_every_scenario(name: str, scenario: str) -> None:
    if (name, scenario) in IMPOSSIBLE:
        pytest.skip("refused in one sentence")
    learner = learner_for(name)
    run = learner.run(tiny_stream(scenario))
    assert len(run.result["matrix"]) == 3
    assert run.result["metrics"]["accuracy"] > 0.1
    assert (run.result["metrics"]["fwt"] is None) == (scenario != "domain")


@pytest.mark.parametrize("name", CONTINUAL)
def test_an_experience_of_one_class_and_an_empty_valid_set(name: str) -> None:
    stream = tiny_stream()
    learner = learner_for(name)
    first = stream[0]
    learner.update(replace(first, valid=first.train.select(torch.empty(0, dtype=torch.int64))))
    second = stream[1]
    label = second.classes[0]
    only = (second.train.column("labels") == label).nonzero().flatten()
    tested = (second.test.column("labels") == label).nonzero().flatten()  # type: ignore[union-attr]
    one_class = replace(second, train=second.train.select(only), test=second.test.select(tested), classes=(label,))  # type: ignore[union-attr]
    update = learner.update(one_class)
    assert update.retention is not None
    assert all(torch.isfinite(tensor).all() for tensor in weights(learner).values() if tensor.is_floating_point())


@pytest.mark.parametrize("name", STRATEGIES)
def test_bytes_reported_are_bytes_held(name: str) -> None:
    learner = learner_for(name)
    learner.run(tiny_stream(experiences=2))
    reported = learner.state_bytes()
    for part in learner.parts:
        assert reported[part.name] >= tensor_bytes(part.state_dict()) * 0.9
        assert reported[part.name] <= 8_000_000


@pytest.mark.parametrize("name", CONTINUAL)
def test_erased_rows_are_gone(name: str) -> None:
    learner = learner_for(name)
    learner.run(tiny_stream(experiences=2))
    for part in learner.parts:
        rows = part.rows()
        if len(rows):
            assert part.erase(rows[:3]) == 3
            assert not torch.isin(rows[:3], part.rows()).any()
            assert len(part.rows()) == len(rows) - 3


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_is_what_its_dict_says(name: str) -> None:
    from continual import Strategy

    strategy = small(name)
    again = Strategy.load(strategy.to_dict())
    assert again.fingerprint() == strategy.fingerprint()
    assert strategy.summary and strategy.source
