"""Tuning: what it looks at, what it proposes, what it writes, and that a search that was cut off ends as the uncut one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from battery import STRATEGIES
from test_cli import continual
from torch import Tensor

from continual import Learner, Strategy, Stream
from continual.errors import SpecError, StateError, StreamError, TrainingError
from continual.report.aggregate import plain_training
from continual.run import run_cell
from continual.streams.experience import Experience
from continual.table import Batch, Table, TensorTable
from continual.tune import Trial, default_space, read_space, tune, tuning_stream
from continual.tune.propose import sampler
from continual.tune.space import Dimension, own_settings

MODEL = {"kind": "mlp", "hidden": [8]}
NAIVE: dict[str, Any] = {"name": "plain", "training": {"optimizer": "sgd", "lr": 0.1, "epochs": 2, "batch_size": 10}}


class Sealed(Table):
    """Rows that nobody may look at."""

    def __len__(self) -> int:
        raise AssertionError("looked at")

    def __getitem__(self, index_B: Tensor) -> Batch:
        raise AssertionError("looked at")

    @property
    def names(self) -> tuple[str, ...]:
        raise AssertionError("looked at")

    def column(self, name: str) -> Tensor:
        raise AssertionError("looked at")

    def strings(self, name: str) -> Sequence[Any]:
        raise AssertionError("looked at")


def table_of(index: int, rows: int, first: int, swapped: bool = False) -> TensorTable:
    """Two classes apart on the first value; ``swapped`` gives each row the label of the other."""
    generator = torch.Generator().manual_seed(first)
    label = torch.arange(rows) % 2
    inputs = torch.randn(rows, 4, generator=generator) * 0.3
    inputs[:, index] += 4.0 * label - 2.0
    labels = (1 - label if swapped else label) + 2 * index
    return TensorTable({"inputs": inputs, "labels": labels, "row": torch.arange(rows) + 1000 * first})


def stream_of(tests: Any = None, count: int = 3, valid: bool = False) -> Stream:
    """``tests``: None for test rows like the others, ``swapped``, or ``sealed``."""
    found = []
    for index in range(count):
        test: Table = Sealed() if tests == "sealed" else table_of(index, 40, 3 * index + 2, tests == "swapped")
        classes = (2 * index, 2 * index + 1)
        found.append(
            Experience(
                index, f"e{index}", table_of(index, 60, 3 * index), classes=classes,
                valid=table_of(index, 20, 3 * index + 1) if valid else None, test=test,
                class_names=tuple(str(k) for k in range(2 * index + 2)), total_classes=2 * count,
            )
        )  # fmt: skip
    return Stream.from_experiences(found, name="points")


def tuned(out: Path, stream: Stream | None = None, strategy: Any = NAIVE, **options: Any) -> Any:
    options = {"search": ["training.lr=log:1e-3:1"], "trials": 4, "model": MODEL, "device": "cpu", **options}
    return tune(stream or stream_of(), strategy, out=out, **options)


def without_times(out: Path) -> list[Any]:
    return [{**one, "seconds": 0} for one in json.loads((out / "trials.json").read_text(encoding="utf-8"))["trials"]]


# What it looks at


def test_no_test_row_and_no_later_experience_is_looked_at(tmp_path: Path) -> None:
    stream = stream_of("sealed", count=4)
    slots = [stream[index] for index in range(4)]
    slots[3] = replace(slots[3], train=Sealed(), valid=Sealed())
    found = tuned(tmp_path, Stream.from_experiences(slots, name="points"), trials=2)
    assert found.best.score > 0
    assert "36 valid rows (20% of the training rows, split off by their ids)" in found.statement
    assert "the first 3 of 4 experiences of 'points'; no test row was looked at" in found.statement


def test_other_test_rows_would_have_changed_the_choice_and_do_not(tmp_path: Path) -> None:
    """With every test label swapped the best choice by test rows is to learn nothing; what is chosen stays the same."""
    search = ["training.lr=choice:0.0001,0.2"]
    by_test = {}
    for lr in (0.0001, 0.2):
        learner = Learner(
            MODEL, Strategy.load(NAIVE, overrides={"training.lr": lr}), seed=0, device="cpu", progress=False
        )
        by_test[lr] = learner.run(stream_of("swapped", count=1)).metrics["accuracy"]
    assert by_test[0.0001] > by_test[0.2]  # type: ignore[operator]
    found = []
    for tests in (None, "swapped"):
        out = tmp_path / str(tests)
        given = {"search": search, "trials": 5, "overrides": {"training.lr": 0.0001}}
        found.append(tuned(out, stream_of(tests, count=1), **given))
        assert found[-1].trials[0].settings == {"training.lr": 0.0001}
        assert found[-1].best.settings == {"training.lr": 0.2}
    assert without_times(tmp_path / "None") == without_times(tmp_path / "swapped")
    one, other = ((tmp_path / name / "tuned.yaml").read_bytes() for name in ("None", "swapped"))
    assert one == other


def test_the_score_is_that_of_a_run_measured_on_the_valid_rows(tmp_path: Path) -> None:
    stream = stream_of(valid=True)
    found = tuned(tmp_path, stream, trials=1, experiences=2)
    measured = Stream.from_experiences([replace(e, test=e.valid, valid=None) for e in stream[:2]], name="points")
    strategy = Strategy.load(NAIVE)
    run = Learner(MODEL, strategy, seed=0, device="cpu", progress=False).run(measured)
    assert found.best.score == run.metrics["accuracy"]
    assert "40 valid rows (the stream's own) of the first 2 of 3 experiences" in found.statement


def test_rows_are_split_off_by_class_and_by_nothing_but_their_ids() -> None:
    stream = stream_of()
    found = tuning_stream(stream, 2, 0.2, 0, stops_early=False)
    assert len(found) == 2
    for one, other in zip(found, stream, strict=False):
        assert one.test is not None and one.valid is None
        rows, held = one.train.column("row"), one.test.column("row")
        assert torch.equal(torch.cat([rows, held]).sort().values, other.train.column("row"))
        assert one.test.column("labels").bincount(minlength=6)[list(other.classes)].tolist() == [6, 6]
        backwards = replace(other, train=other.train.select(torch.arange(59, -1, -1)))
        again = tuning_stream(Stream.from_experiences([replace(backwards, index=0)]), 1, 0.2, 0, stops_early=False)[0]
        assert again.test is not None and torch.equal(again.test.column("row").sort().values, held)
    more = tuning_stream(stream, 1, 0.5, 0, stops_early=False)[0]
    other_seed = tuning_stream(stream, 1, 0.2, 1, stops_early=False)[0]
    assert more.test is not None and len(more.test) == 30
    assert other_seed.test is not None and not torch.equal(other_seed.test.column("row"), found[0].test.column("row"))  # type: ignore[union-attr]


def test_rows_that_stop_a_trial_do_not_measure_it(tmp_path: Path) -> None:
    for valid in (True, False):
        for experience in tuning_stream(stream_of(valid=valid), 3, 0.4, 0, stops_early=True):
            assert experience.valid is not None and experience.test is not None
            parts = [table.column("row") for table in (experience.train, experience.valid, experience.test)]
            assert len(torch.cat(parts).unique()) == sum(map(len, parts)) == (80 if valid else 60)
            assert len(parts[1]) == len(parts[2])
    stopping = {**NAIVE, "training": {**NAIVE["training"], "epochs": 3, "early_stopping": {"patience": 1}}}
    assert tuned(tmp_path, strategy=stopping, trials=2).best.score > 0


def test_a_class_of_one_row_stays_in_the_training() -> None:
    whole = table_of(0, 60, 0)
    labels = whole.column("labels").clone()
    labels[:59] = 0
    labels[59] = 1
    table = TensorTable({"inputs": whole.column("inputs"), "labels": labels, "row": whole.column("row")})
    given = Experience(0, "e", table, classes=(0, 1), class_names=("0", "1"))
    found = tuning_stream(Stream.from_experiences([given]), 1, 0.2, 0, stops_early=False)[0]
    assert 1 in found.train.column("labels") and found.test is not None and 1 not in found.test.column("labels")
    few = replace(given, train=table.select(torch.tensor([0, 59])))
    with pytest.raises(StreamError, match="has 2 rows, too few to split valid ones off"):
        tuning_stream(Stream.from_experiences([few]), 1, 0.2, 0, stops_early=False)


# What is searched


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_default_space_of_every_strategy(name: str) -> None:
    strategy = Strategy.load(name)
    learns = any(
        part.slot in ("penalty", "replay", "distillation", "projection", "adapter") for part in strategy.prototypes
    )
    learns = learns or strategy.backbone == "train"
    try:
        space = default_space(strategy)
    except SpecError as error:
        assert not learns and "no rate or strength to tune" in str(error)
        return
    assert any(one.key == "training.lr" for one in space) == learns
    own = own_settings(strategy, space)
    for dimension in space:
        assert dimension.holds(own[dimension.key]), f"{dimension.key}={dimension} without {own[dimension.key]}"
        for value in dimension.ends:
            Strategy.load(name, overrides={dimension.key: value})
    keys = {one.key.rpartition(".")[2] for one in space}
    assert not keys & {"capacity", "per_class", "epochs", "iterations", "batch_size", "rank"}


def test_what_is_searched_by_default() -> None:
    content = {
        "penalty": [{"kind": "si", "strength": 2.0}, {"kind": "l2", "strength": 0.0}],
        "replay": {"kind": "rehearsal", "capacity": 10},
        "training": {"lr": 0.02},
    }
    found = {one.key: str(one) for one in default_space(Strategy.load(content))}
    assert found == {
        "training.lr": "log:0.002:0.2",
        "penalty.0.strength": "log:0.02:200",
    }
    frozen = Strategy.load({"head": {"kind": "slda", "shrinkage": 0.2}, "backbone": "frozen"})
    assert {one.key: str(one) for one in default_space(frozen)} == {"head.shrinkage": "log:0.00667:1"}


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("training.lr", r"--search 'training.lr' names no values: write it as"),
        ("training.lr=", "names no values"),
        ("training.lr=lin:0:1", r"unknown form 'lin'.*'uniform'"),
        ("training.lr=log:0:1", "the first number must be below the second, above 0"),
        ("training.lr=uniform:2:1", "the first number must be below the second"),
        ("training.lr=log:1", "needs two numbers"),
        ("training.lr=log:a:b", "needs two numbers"),
        ("training.epochs=int:1:2.5", "are no whole numbers"),
        ("training.optimizer=choice:sgd", "give two plain values or more"),
        ("training.optimizer=choice:sgd,{a", "not valid YAML"),
        ("training.rate=log:1e-3:1", r"--search training.rate=log:0.001:1: .*unknown key 'rate'"),
        ("training.lr=uniform:-1:1", "--search training.lr=uniform:-1:1: .*training"),
        ("training.optimizer=choice:sgd,lion", "--search training.optimizer=choice:sgd,lion: .*'lion'"),
        ("penalty.strength=log:1:2", "--search penalty.strength=log:1:2: .*names no kind"),
    ],
)
def test_a_search_that_cannot_be_is_refused_before_anything_runs(entry: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=said):
        tuned(tmp_path / "out", stream_of("sealed"), search=[entry])
    assert not (tmp_path / "out").exists()


def test_a_search_from_a_file_and_by_hand(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text("training.lr: log:1e-3:1\ntraining.epochs: int:1:4\n", encoding="utf-8")
    found = read_space([str(tmp_path / "space.yaml"), "training.active=choice:seen,all,null"])
    assert found == [
        Dimension("training.lr", "log", 1e-3, 1.0),
        Dimension("training.epochs", "int", 1.0, 4.0),
        Dimension("training.active", "choice", choices=("seen", "all", None)),
    ]
    assert [str(one) for one in found] == ["log:0.001:1", "int:1:4", "choice:seen,all,null"]
    with pytest.raises(SpecError, match=r"names 'training.lr' twice"):
        read_space([str(tmp_path / "space.yaml"), "training.lr=log:1:2"])


def test_values_lie_within_their_ends_and_are_of_their_kind() -> None:
    space = read_space(["a.x=log:1.23456e-3:1.5", "a.y=uniform:0.12345:0.12346", "a.n=int:2:4", "a.c=choice:1,true,x"])
    propose, before = sampler(), []
    for number in range(25):
        settings = propose(space, before, 3)
        assert all(one.holds(settings[one.key]) for one in space)
        assert type(settings["a.n"]) is int and settings["a.c"] in (1, True, "x")
        assert float(f"{settings['a.x']:.3g}") == settings["a.x"]
        before.append(Trial(number, settings, -abs(settings["a.x"] - 0.05)))
    late = [abs(trial.settings["a.x"] - 0.05) for trial in before]
    assert min(late[10:]) <= min(late[:10]) and sorted(late[10:])[7] < sorted(late[:10])[5]
    assert not Dimension("k", "int", 1, 4).holds(True) and not Dimension("k", "log", 1, 4).holds(None)


# What it writes


def test_the_tuned_strategy_runs_and_says_where_it_comes_from(tmp_path: Path) -> None:
    seen: list[Trial] = []
    found = tuned(tmp_path / "t", overrides={"training.batch_size": 12}, on_trial=seen.append)
    assert found.finished and tuple(seen) == found.trials and [trial.number for trial in seen] == [0, 1, 2, 3]
    assert seen[0].settings == {"training.lr": 0.1} and found.best.score == max(trial.score or 0 for trial in seen)
    strategy = Strategy.load(found.path)
    assert strategy.training.lr == found.best.settings["training.lr"] and strategy.training.batch_size == 12
    about = strategy.tuned
    assert about is not None and about["statement"] == found.statement and about["stream"] == "points"
    assert about["search"] == {"training.lr": "log:0.001:1"} and about["trials"] == 4 and about["failed"] == 0
    assert about["score"] == found.best.score and about["score_of_trial_0"] == seen[0].score
    plain = Strategy.load({**strategy.to_dict(), "tuned": None})
    assert strategy.fingerprint() == plain.fingerprint()
    result = run_cell(
        "split-digits", found.path, out=tmp_path / "run", device="cpu", progress=False, overrides={"training.epochs": 1}
    )
    settings = result["provenance"]["settings"]
    assert settings["tuned"] == json.loads(json.dumps(about)) and plain_training(settings, "class")
    table = (tmp_path / "t" / "trials.csv").read_text(encoding="utf-8").splitlines()
    assert table[0] == "trial,score,training.lr,seconds,message" and len(table) == 5


def test_a_strategy_of_a_state_asks_for_nothing_more_because_it_was_tuned(tmp_path: Path) -> None:
    found = tuned(tmp_path / "t", trials=1)
    learner = Learner(MODEL, found.path, seed=0, device="cpu", progress=False)
    learner.run(stream_of(count=1))
    learner.save(tmp_path / "state")
    loaded = Learner.load(tmp_path / "state", device="cpu", progress=False)
    assert loaded.strategy.tuned == learner.strategy.tuned is not None


class Killed(Exception):  # noqa: N818
    """Stands for a kill."""


@pytest.mark.parametrize("after", [0, 2])
def test_a_search_that_was_cut_off_ends_as_the_uncut_one(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {
        "search": ["training.lr=log:1e-3:1", "training.epochs=int:1:3"],
        "trials": 13,
        "experiences": 1,
    }
    whole = tuned(tmp_path / "whole", **options)
    run = Learner.run

    def broken(self: Learner, *given: Any, **more: Any) -> Any:
        if len(ran) == after:
            raise Killed
        ran.append(1)
        return run(self, *given, **more)

    ran: list[int] = []
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Learner, "run", broken)
        tuned(tmp_path / "cut", **options)
    part = tuned(tmp_path / "cut", **{**options, "trials": 6})
    assert len(part.trials) == 6
    rest = tuned(tmp_path / "cut", **options)
    assert without_times(tmp_path / "cut") == without_times(tmp_path / "whole")
    assert (tmp_path / "cut" / "tuned.yaml").read_bytes() == (tmp_path / "whole" / "tuned.yaml").read_bytes()
    assert rest.best.settings == whole.best.settings and len({str(t.settings) for t in whole.trials}) > 8


def test_another_seed_searches_elsewhere(tmp_path: Path) -> None:
    one, other = (tuned(tmp_path / str(seed), seed=seed, trials=3, experiences=1) for seed in (0, 1))
    assert [trial.settings for trial in one.trials[1:]] != [trial.settings for trial in other.trials[1:]]


def test_settings_that_were_tried_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    run = Learner.run

    def counted(self: Learner, *given: Any, **more: Any) -> Any:
        runs.append(1)
        return run(self, *given, **more)

    monkeypatch.setattr(Learner, "run", counted)
    found = tuned(
        tmp_path, search=["training.active=choice:seen,all"], trials=7, experiences=1, strategy={**NAIVE, "name": "p"}
    )
    assert len(found.trials) == 7 and len(runs) <= 3
    assert any(trial.message.startswith("as trial ") and trial.score is not None for trial in found.trials)


def test_a_trial_that_fails_is_written_down_and_the_search_goes_on(tmp_path: Path) -> None:
    found = tuned(tmp_path, search=["training.lr=choice:0.1,1e30"], trials=4, experiences=1)
    failed = [trial for trial in found.trials if trial.score is None]
    assert (
        failed
        and all("not finite" in trial.message for trial in failed)
        and found.best.settings == {"training.lr": 0.1}
    )
    with pytest.raises(TrainingError, match=r"none of 2 trials gave a score \(the .* not finite"):
        tuned(tmp_path / "none", search=["training.lr=log:1e30:1e31"], trials=2, experiences=1,
              overrides={"training.lr": 1e30})  # fmt: skip


def test_time_that_is_up_and_trials_that_are_added(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="the time was up before the first"):
        tuned(tmp_path / "none", timeout=0.0, experiences=1)
    first = tuned(tmp_path / "t", timeout=1e-9 + 0.02, experiences=1, trials=50)
    assert not first.finished and len(first.trials) < 50
    count = len(first.trials) + 1
    again = tuned(tmp_path / "t", experiences=1, trials=count)
    assert again.finished and again.trials[:-1] == first.trials


def test_a_folder_of_something_else_is_left_as_it_was(tmp_path: Path) -> None:
    tuned(tmp_path / "t", trials=1)
    before = (tmp_path / "t" / "trials.json").read_bytes()
    for changed, said in (
        ({"search": ["training.lr=log:1e-2:1"]}, "search: "),
        ({"seed": 1}, "rows: |seed: "),
        ({"experiences": 2}, "rows: |experiences: "),
        ({"share": 0.3}, "rows: "),
        ({"overrides": {"training.epochs": 1}}, "strategy_fingerprint: "),
        ({"model": {"kind": "mlp", "hidden": [9]}}, "model: "),
    ):
        with pytest.raises(StateError, match=f"holds another tuning \\(({said})"):
            tuned(tmp_path / "t", trials=2, **changed)
    assert (tmp_path / "t" / "trials.json").read_bytes() == before
    (tmp_path / "t" / "trials.json").write_text("{", encoding="utf-8")
    with pytest.raises(StateError, match="is damaged"):
        tuned(tmp_path / "t")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").write_text("{}", encoding="utf-8")
    with pytest.raises(StateError, match="holds something else"):
        tuned(tmp_path / "run")


# The command


def test_the_command(tmp_path: Path) -> None:
    command = ["tune", "split-digits", "rehearsal", "-o", str(tmp_path / "t"), "--device", "cpu", "--trials", "2"]
    command += ["--experiences", "2", "--set", "training.epochs=1", "--search", "replay.share=uniform:0.2:0.8"]
    done = continual(*command)
    assert done.returncode == 0 and not done.stderr, done.stderr
    lines = done.stdout.splitlines()
    assert (
        lines[0].startswith("trial 0 of 2: 0.")
        and lines[1].startswith("trial 1 of 2: 0.")
        and "replay.share=" in lines[1]
    )
    assert "no test row was looked at" in done.stdout and lines[-1] == str(tmp_path / "t" / "tuned.yaml")
    again = continual(*command)
    assert again.stdout == done.stdout
    done = continual(
        "run", "split-digits", lines[-1], "-o", str(tmp_path / "r"), "--device", "cpu", "--set", "training.epochs=1"
    )
    assert done.returncode == 0, done.stderr
    content = yaml.safe_load(Path(lines[-1]).read_text(encoding="utf-8"))
    assert content["training"]["epochs"] == 1 and content["tuned"]["experiences"] == 2
    assert continual("tune", "split-digits", "rehearsal", "-o", str(tmp_path / "t"), "--trials", "0").returncode == 2


def test_without_the_extra_one_sentence_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    done = continual("tune", "split-digits", "naive", "-o", str(tmp_path / "t"))
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "install the extra 'continual-memory[tune]'" in done.stderr and not (tmp_path / "t").exists()


def test_help_imports_nothing_of_it() -> None:
    code = "import sys; sys.argv = ['continual', 'tune', '--help']\nfrom continual.cli import app\n"
    code += "try:\n app()\nexcept SystemExit:\n assert not {'optuna', 'torch'} & set(sys.modules), 'imported'\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--search" in done.stdout and "imported" not in done.stderr, done.stderr


def test_one_of_several_processes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(StateError, match="a tuning is one process"):
        tuned(tmp_path)
