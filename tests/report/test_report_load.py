"""Run folders are read strictly where keys are fixed, and every mistake is one sentence."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from continual.errors import StateError
from continual.report import load_failures, load_result, load_results


def test_added_keys_are_kept_out_of_the_way(make: Any) -> None:
    result = load_result(make("ewc", 2))
    assert (result.stream, result.strategy, result.seed) == ("digits", "ewc", 2)
    assert result.matrix == [[0.9, None], [0.7, 0.8]] and not result.joint
    assert result.cost.state_bytes == {"replay/rehearsal": 12_000, "head/linear": 345}


def test_a_joint_run_has_one_row(make: Any) -> None:
    assert load_result(make("joint", 0, [[0.9, 0.8]])).joint
    assert not load_result(make("one", 0, [[0.9]])).joint


def test_a_run_that_measured_nothing_is_read(make: Any) -> None:
    folder = make(metrics={}, intervals={})
    path = folder / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"matrix": [], "initial": []}))
    assert load_result(folder).metrics.accuracy is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": 2}, "has the format 2, and this version reads format 1"),
        ({"format": True}, "has the format True"),
        ({"seed": "0"}, "'seed'"),
        ({"strategy": None}, "'strategy'"),
        ({"experiences": ["a", "b", "c"]}, "row 0 of the matrix has 2 cells for 3 experiences"),
        ({"matrix": [[0.9, None], ["0.7", 0.8]]}, "'matrix.1.0'"),
        ({"intervals": {"accuracy": [0.1]}}, "'intervals.accuracy'"),
        ({"metrics": {"accuracy": "high"}}, "'metrics.accuracy'"),
        ({"cost": {"train_seconds": -1.0}}, "'cost.train_seconds'"),
    ],
)
def test_what_a_result_cannot_say(make: Any, changes: dict[str, Any], said: str) -> None:
    folder = make()
    path = folder / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(StateError, match=re.escape(said)) as caught:
        load_result(folder)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ['{"format": 1, "stream"', "", "[1]", "\x00", '{"format": 1}'])
def test_a_damaged_file(make: Any, text: str) -> None:
    folder = make()
    (folder / "result.json").write_text(text)
    with pytest.raises(StateError, match=r"result\.json'") as caught:
        load_result(folder)
    assert "run it again" in str(caught.value)


def test_not_a_number_is_refused(make: Any) -> None:
    folder = make()
    path = folder / "result.json"
    path.write_text(path.read_text().replace("0.7, 0.8", "NaN, 0.8"))
    with pytest.raises(StateError, match="finite"):
        load_result(folder)


def test_a_folder_without_a_result(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"holds no result\.json"):
        load_result(tmp_path)
    with pytest.raises(StateError, match="there is no finished run in"):
        load_results([tmp_path / "nowhere"])


def test_runs_are_found_below_and_sorted(make: Any, tmp_path: Path) -> None:
    make("b", 1), make("b", 0), make("a", 0)
    make("a", 0, folder="digits/a/.seed-0.12345678.0.replaced")
    found = load_results([tmp_path, tmp_path / "digits" / "b" / "seed-1"])
    assert [run.key for run in found] == [("digits", "a", 0), ("digits", "b", 0), ("digits", "b", 1)]


def test_two_runs_of_the_same_name(make: Any, tmp_path: Path) -> None:
    make("a", 0, folder="one"), make("a", 0, folder="two")
    with pytest.raises(StateError, match="are both 'digits' with 'a' and seed 0: leave one of them out"):
        load_results([tmp_path])


def test_failures_are_read_back(tmp_path: Path) -> None:
    for name, text in (("x", "the loss is not finite.\n"), ("y", None)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "cell.json").write_text(json.dumps({"stream": "digits", "strategy": name, "seed": 3}))
        if text:
            (folder / "error.txt").write_text(text)
    (failure,) = load_failures([tmp_path])
    assert (failure.strategy, failure.seed, failure.sentence) == ("x", 3, "the loss is not finite.")
