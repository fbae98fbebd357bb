from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from continual.errors import SpecError
from continual.library import library_folder, library_names
from continual.streams.spec import SOURCES, SPLITS, StreamSpec, merged, read_stream_spec
from continual.streams.stream import Stream

DIGITS: dict[str, Any] = {"source": {"kind": "digits"}, "split": {"by": "class", "size": 2}, "scenario": "class"}


@pytest.mark.parametrize("name", library_names("streams"))
def test_every_stream_of_the_library_is_sound(name: str) -> None:
    spec, folder = read_stream_spec(name)
    assert spec.name == name and spec.summary.endswith(".") and spec.model is not None
    assert folder == library_folder("streams")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"source": {"kind": "digit"}},
            "unknown source kind 'digit': allowed are 'arrays', 'avalanche', 'digits', .*Did you mean 'digits'",
        ),
        ({"source": "digits"}, "'source' says no 'kind'"),
        ({"split": {"by": "clas"}}, "unknown split by 'clas': .*Did you mean 'class'"),
        ({"split": {"size": 2}}, "'split' says no 'by'"),
        ({"source": {"kind": "digits", "valid": 0.1}}, "unknown key 'valid': .*Did you mean 'valid_share'"),
        ({"source": {"kind": "digits", "valid_share": 1.5}}, "'valid_share' is 1.5"),
        ({"split": {"by": "class"}}, "give either 'size' or 'groups'"),
        ({"split": {"by": "class", "size": 2, "groups": [["0"]]}}, "give either 'size' or 'groups'"),
        ({"split": {"by": "class", "groups": [["0"]], "order": "random"}}, "'groups' says the order already"),
        ({"split": {"by": "class", "size": 0}}, "'size' is 0"),
        ({"scenario": "clas"}, "'scenario' is 'clas'.*Did you mean 'class'"),
        ({"sumary": "x"}, "unknown key 'sumary': .*Did you mean 'summary'"),
        ({"objective": "regress"}, "'objective' is 'regress'.*Did you mean 'regression'"),
        ({"use": "split-digit"}, "unknown stream 'split-digit': .*Did you mean 'split-digits'"),
        ({"use": 3}, "the key 'use' is 3"),
        ({"source": {"kind": "files", "shares": {"valid": 0.5, "test": 0.5}}}, "leave no training rows"),
    ],
)
def test_mistakes_are_sentences(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SpecError, match=sentence):
        read_stream_spec({**DIGITS, **changes})


def test_missing_key_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("source: {kind: digits}\nscenario: class\n")
    with pytest.raises(SpecError, match=r"mine\.yaml': the key 'split' is missing"):
        read_stream_spec(path)
    path.write_text("source: {kind: digits}\nscenario: class\nsplit: {by: joint, size: 2}\n")
    with pytest.raises(SpecError, match=r"mine\.yaml', split: unknown key 'size'"):
        read_stream_spec(path)


def test_use_lays_settings_over_a_stream_of_the_library(tmp_path: Path) -> None:
    spec, _ = read_stream_spec({"use": "split-mnist", "name": "split-mnist-task", "scenario": "task"})
    base, _ = read_stream_spec("split-mnist")
    assert spec == base.model_copy(update={"name": "split-mnist-task", "scenario": "task"})
    spec, _ = read_stream_spec({"use": "split-digits", "split": {"size": 5}})
    assert spec.name == "split-digits" and spec.split.size == 5 and spec.split.order == "random"  # type: ignore[union-attr]
    spec, _ = read_stream_spec({"use": "split-digits", "split": {"by": "permutation", "count": 3}})
    assert spec.split.by == "permutation"
    path = tmp_path / "mine.yaml"
    path.write_text("use: split-digits\nscenario: task\n")
    assert [e.classes for e in Stream.load(path)] == [(2 * n, 2 * n + 1) for n in range(5)]
    assert Stream.load(path).name == "mine" and Stream.load(path).scenario == "task"


def test_merged() -> None:
    base = {"a": {"kind": "x", "b": {"c": 1, "d": 2}}, "e": 1}
    assert merged(base, {"a": {"b": {"c": 5}}}) == {"a": {"kind": "x", "b": {"c": 5, "d": 2}}, "e": 1}
    assert merged(base, {"a": {"kind": "y"}, "e": {"f": 1}}) == {"a": {"kind": "y"}, "e": {"f": 1}}


def test_relative_paths_are_those_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = "\n".join(json.dumps({"text": f"row {n}", "label": "ab"[n % 2]}) for n in range(8))
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "mine.yaml").write_text(
        "source: {kind: files, path: rows.jsonl}\nsplit: {by: joint}\nscenario: class\n"
    )
    monkeypatch.chdir(Path(__file__).parent)
    assert len(Stream.load(tmp_path / "mine.yaml")[0].train) == 8
    over = {"use": str(tmp_path / "mine.yaml"), "name": "again"}
    assert len(Stream.load(over)[0].train) == 8
    (tmp_path / "data").mkdir()
    (tmp_path / "rows.jsonl").rename(tmp_path / "data" / "rows.jsonl")
    monkeypatch.setenv("CONTINUAL_DATA", str(tmp_path / "data"))
    assert len(Stream.load(over)[0].train) == 8


def test_settings_and_schema() -> None:
    stream = Stream.load({**DIGITS, "summary": "s.", "model": {"kind": "mlp", "hidden": [8]}}, scenario="task", seed=1)
    assert (stream.name, stream.summary, stream.scenario, stream.model) == (
        "digits",
        "s.",
        "task",
        {"kind": "mlp", "hidden": [8]},
    )
    assert Stream.load(StreamSpec(**DIGITS)).class_names == tuple("0123456789")
    with pytest.raises(SpecError, match="'scenario' is 'clas'"):
        Stream.load(DIGITS, scenario="clas")  # type: ignore[arg-type]
    schema = json.dumps(StreamSpec.model_json_schema())
    assert all(f'"{name}"' in schema for name in (*SOURCES, *SPLITS))


def test_arrays_as_settings() -> None:
    source = {"kind": "arrays", "train": (torch.rand(8, 2), torch.arange(8) % 4)}
    stream = Stream.load({**DIGITS, "source": source})
    assert len(stream) == 2 and "train" not in StreamSpec(**{**DIGITS, "source": source}).model_dump()["source"]
