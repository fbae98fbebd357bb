"""Which strategies are said to be of no use in which scenario, and that what is named instead is of use."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, ClassVar, get_args

import pytest
import torch
from battery import ENGINES, STRATEGIES, TOKENS, small, tiny_stream
from test_cli import continual

from continual import Learner, Strategy
from continual.kinds import Scenario
from continual.learner import core
from continual.parts.part import Part
from continual.parts.registry import PARTS
from continual.run import run_cell
from continual.spec import Spec
from continual.study import Study
from continual.suitability import KEEPS, unsuited

BARE = {"naive", "lora", "adalora", "lm-lora", "inc-lora", "lm-inc-lora", "prompt", "prefix", "avalanche-naive"}
"""Nothing against forgetting in them."""
NOT_FOR_CLASSES = {
    *("ewc", "online-ewc", "si", "mas", "rwalk", "l2", "lwf", "feature-distillation", "agem", "ogd"),
    *("osf", "lm-osf"),
    *("avalanche-ewc", "avalanche-si", "avalanche-lwf", "avalanche-agem"),
}
SCENARIOS: tuple[Scenario, ...] = get_args(Scenario)


@pytest.mark.parametrize("name", [*STRATEGIES, *TOKENS])
def test_every_strategy_in_every_scenario(name: str) -> None:
    strategy = Strategy.load(name)
    for scenario in SCENARIOS:
        for objective in ("classification", "causal-lm"):
            said = unsuited(strategy, scenario, objective)  # type: ignore[arg-type]
            assert (said is not None) == (name in BARE or (name in NOT_FOR_CLASSES and scenario == "class"))
            if said is None:
                continue
            assert said.count(". ") == 0 and said.endswith(".") and f"'{name}'" in said
            assert ("lower bound" in said) == (name in BARE)
            found = re.search(r"take '([a-z-]+)'( with --set (\S+)=([a-z]+))?", said)
            assert found is not None
            overrides = {found[3]: found[4]} if found[2] else {}
            other = Strategy.load(found[1], overrides=overrides)
            other.check(objective=objective, gives_features=objective == "classification")  # type: ignore[arg-type]
            assert all(unsuited(other, each, objective) is None for each in SCENARIOS)  # type: ignore[arg-type]
            assert {p.slot for p in strategy.prototypes if p.slot == "adapter"} <= {p.slot for p in other.prototypes}
        assert unsuited(strategy, scenario, "classification", 1) is None


def test_the_list_names_parts_that_there_are() -> None:
    known = {f"{slot}/{kind}" for slot, kinds in PARTS.items() for kind in kinds}
    engines = [engine for name in ENGINES if (engine := Strategy.load(name).engine) is not None]
    known |= {f"{engine.name} {engine.settings.strategy}" for engine in engines}  # type: ignore[attr-defined]
    assert set(KEEPS) <= known


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, "lower bound"),
        ({"training": {"active": "experience"}}, None),
        ({"training": {"active": "asymmetric"}}, None),
        ({"training": {"active": "all"}}, "lower bound"),
        ({"data": "cumulative"}, None),
        ({"backbone": "frozen"}, "'backbone: frozen' alone .* take 'slda'"),
        ({"backbone": "frozen", "head": {"kind": "slda"}}, None),
        ({"penalty": [{"kind": "si"}, {"kind": "l2"}]}, "'penalty/si', 'penalty/l2' alone"),
        ({"penalty": {"kind": "si"}, "replay": {"kind": "rehearsal"}}, None),
        ({"adapter": {"kind": "lora", "across_tasks": "first"}}, "'adapter/lora' alone"),
        ({"distillation": {"kind": "test_suitability:Own"}}, None),
    ],
)
def test_what_is_said_comes_from_the_parts(content: dict[str, Any], expected: str | None) -> None:
    said = unsuited(Strategy.load({**content, "name": "mine"}), "class", "classification")
    assert (said is None) if expected is None else re.search(expected, str(said)), said


class Own(Part):
    """A user's part, of which nothing is known."""

    class Settings(Spec):
        kind: str = "lwf"

    slot: ClassVar[Any] = "distillation"


def test_a_run_says_it_once_and_writes_it_down(tmp_path: Path) -> None:
    said: list[str] = []
    for scenario, resume in (("class", False), ("task", False)):
        out = tmp_path / scenario
        run_cell(
            "split-digits", "ewc", out=out, device="cpu", scenario=scenario, resume=resume,  # type: ignore[arg-type]
            overrides={"training.epochs": 1}, progress=False, on_note=said.append,
        )  # fmt: skip
        notes = json.loads((out / "result.json").read_text(encoding="utf-8"))["notes"]
        found = [note for note in notes if "known to be of no use in the class scenario" in note]
        assert len(found) == (scenario == "class")
    assert len(said) == 1 and "take 'rehearsal'" in said[0]


def test_a_run_that_goes_on_has_the_note_once(tmp_path: Path) -> None:
    stop: dict[str, Any] = {
        "out": tmp_path / "a",
        "device": "cpu",
        "progress": False,
        "overrides": {"training.epochs": 1},
    }

    def broken(update: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_cell("split-digits", "naive", on_update=broken, **stop)
    result = run_cell("split-digits", "naive", resume=True, **stop)
    assert sum("lower bound" in note for note in result["notes"]) == 1


def test_the_commands_say_it_once_for_each_pair(tmp_path: Path) -> None:
    done = continual(
        "run", "split-digits", "si", "-o", str(tmp_path / "a"), "--set", "training.epochs=1", "--device", "cpu"
    )
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.startswith("note: 'si[training.epochs=1]' is known to be of no use in the class scenario")
    assert done.stdout.count("no use") == 1
    study = {
        "streams": ["split-digits", {"use": "split-digits", "name": "apart", "scenario": "task"}],
        "strategies": [{"use": "lwf", "name": "held"}, "rehearsal"],
        "seeds": [0, 1],
    }
    (tmp_path / "study.yaml").write_text(json.dumps(study), encoding="utf-8")
    found = Study.load(tmp_path / "study.yaml").notes()
    assert len(found) == 1 and found[0].startswith("split-digits/held: 'held' is known to be of no use")


def test_updates_of_ones_own_are_not_lectured() -> None:
    learner = Learner({"kind": "mlp", "hidden": [4]}, small("naive"), seed=0, device="cpu", progress=False)
    assert not learner.run(tiny_stream(experiences=2)).result["notes"]


@pytest.mark.parametrize(
    ("hardware", "device", "precision"),
    [(False, "cpu", "bf16"), (True, "cpu", "bf16"), (False, "cuda", "bf16"), (False, "cpu", "fp32")],
)
def test_bf16_without_instructions_for_it_is_said(
    hardware: bool, device: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core, "_has_bf16", lambda: hardware)
    strategy = Strategy.load("naive", overrides={"training.precision": precision})
    said = core.slow_precision(strategy.training, torch.device(device))
    assert (said is not None) == ((hardware, device, precision) == (False, "cpu", "bf16"))
    assert said is None or "--precision fp32" in said


def test_it_is_said_by_a_run_and_once_by_a_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "_has_bf16", lambda: False)
    (tmp_path / "study.yaml").write_text(
        "seeds: [0]\nset: {training.precision: bf16}\nstreams: [split-digits]\nstrategies: [rehearsal, joint]\n"
    )
    notes = Study.load(tmp_path / "study.yaml").notes("cpu")
    assert sum("no instructions for bf16" in note for note in notes) == 1
    said: list[str] = []
    short = Strategy.load(
        "joint", overrides={"training.precision": "bf16", "training.epochs": None, "training.iterations": 1}
    )
    run_cell("split-digits", short, out=tmp_path / "run", device="cpu", on_note=said.append)
    assert any("no instructions for bf16" in note for note in said)
