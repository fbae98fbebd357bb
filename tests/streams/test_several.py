"""Data sets in a folder each as one source, rows cut to a number, labels that stand for none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from continual import Stream
from continual.errors import SpecError, StreamError
from continual.streams.folders import Place
from continual.streams.sources.files import FilesSource
from continual.streams.sources.rows import Rows


def write(folder: Path, part: str, texts: list[str], labels: list[Any], name: str = "text") -> None:
    folder.mkdir(exist_ok=True)
    rows = [{name: text, "label": label} for text, label in zip(texts, labels, strict=True)]
    (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def two(tmp_path: Path) -> Path:
    for folder, classes in (("news", ["good", "bad"]), ("mail", ["bad", "spam", "-"])):
        for part, count in (("train", 12), ("test", 6)):
            write(
                tmp_path / folder,
                part,
                [f"{folder} {part} {place}" for place in range(count)],
                [classes[place % len(classes)] for place in range(count)],
            )
    return tmp_path


def load(source: FilesSource, data: Path) -> Rows:
    return source.load(Place(data=data), "classification")


@pytest.mark.parametrize("keep", ["memory", "disk"])
def test_classes_carry_their_folder_and_the_folder_is_the_domain(two: Path, keep: Any) -> None:
    rows = load(FilesSource(folders=["news", "mail"], unlabelled=["-"], keep=keep), two)
    assert rows.label_names == ("news/good", "news/bad", "mail/bad", "mail/spam")
    assert rows.domain_names == ("news", "mail")
    assert len(rows.tables["train"]) == 12 + 8 and len(rows.tables["test"]) == 6 + 4
    assert rows.domains["train"].tolist() == [0] * 12 + [1] * 8
    assert any("4 of 12 rows left out" in note for note in rows.notes)
    classes = rows.tables["train"].column("labels")
    assert set(classes[:12].tolist()) == {0, 1} and set(classes[12:].tolist()) == {2, 3}


def test_without_unlabelled_the_sign_is_a_class(two: Path) -> None:
    assert "mail/-" in load(FilesSource(folders=["news", "mail"]), two).label_names


def test_most_keeps_the_same_rows_in_any_order(two: Path) -> None:
    source = FilesSource(folders=["news", "mail"], most={"train": 8})
    rows = load(source, two)
    assert rows.domains["train"].bincount().tolist() == [8, 8] and len(rows.tables["test"]) == 12
    kept = {str(text) for text in rows.tables["train"].strings("text")}
    lines = (two / "news" / "train.jsonl").read_text().splitlines()
    (two / "news" / "train.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    assert {str(text) for text in load(source, two).tables["train"].strings("text")} == kept


def test_a_stream_of_folders_in_the_task_scenario(two: Path) -> None:
    source = {"kind": "files", "folders": ["news", "mail"], "unlabelled": ["-"]}
    split = {"by": "domain", "order": ["mail", "news"]}
    stream = Stream.load({"name": "two", "source": source, "split": split, "scenario": "task"}, data=two)
    assert [experience.name for experience in stream] == ["mail", "news"]
    assert [experience.classes for experience in stream] == [(0, 1), (2, 3)]


def test_what_cannot_be_is_refused(two: Path) -> None:
    write(two / "other", "train", ["a", "b"], ["x", "y"], name="body")
    with pytest.raises(StreamError, match="no training file was found for 'gone'"):
        load(FilesSource(folders=["news", "gone"]), two)
    with pytest.raises(StreamError, match="nothing to learn from"):
        load(FilesSource(folders=["news", "other"]), two)
    with pytest.raises(StreamError, match="does not lie below 'path'"):
        load(FilesSource(folders=["../news"]), two / "mail")
    for wrong in ({"folders": ["news", "news"]}, {"folders": ["news"], "domain": "label"}, {"folders": []}):
        with pytest.raises(SpecError):
            Stream.load({"name": "x", "source": {"kind": "files", **wrong}, "split": {"by": "domain"}}, data=two)


@pytest.mark.parametrize("label", [None, "", 0.5])
def test_a_label_that_is_none_does_not_become_a_class(two: Path, label: Any) -> None:
    write(two / "other", "train", ["a", "b", "c"], ["x", "y", label])
    with pytest.raises(StreamError):
        load(FilesSource(folders=["news", "other"]), two)


@pytest.mark.parametrize("given", [-1, "-1"])
@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_unlabelled_is_what_is_written_of_either_type(tmp_path: Path, given: Any, suffix: str) -> None:
    rows = [(f"text {place}", place % 3 - 1) for place in range(9)]
    lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
    if suffix == "csv":
        lines = ["text,label", *(f"{text},{label}" for text, label in rows)]
    (tmp_path / f"train.{suffix}").write_text("\n".join(lines) + "\n")
    rows_found = load(FilesSource(path=".", unlabelled=[given]), tmp_path)
    assert rows_found.label_names == ("0", "1") and "3 of 9 rows left out" in rows_found.notes[0]


def test_a_test_set_that_vanishes_is_said_and_a_share_may_take_its_place(tmp_path: Path) -> None:
    write(tmp_path, "train", [f"train {place}" for place in range(30)], [place % 2 for place in range(30)])
    write(tmp_path, "test", ["a", "b"], [-1, -1])
    rows = load(FilesSource(path=".", unlabelled=[-1]), tmp_path)
    assert "test" not in rows.tables and "2 of 2 rows left out" in rows.notes[0]
    shared = load(FilesSource(path=".", unlabelled=[-1], shares={"test": 0.3}), tmp_path)
    assert len(shared.tables["test"]) > 0 and "2 of 2 rows left out" in shared.notes[0]


def test_unlabelled_needs_labels(two: Path) -> None:
    with pytest.raises(StreamError, match="leave 'unlabelled' out"):
        FilesSource(path="news", unlabelled=["-"]).load(Place(data=two), "causal-lm")


@pytest.mark.parametrize("keep", ["memory", "disk"])
def test_folders_of_other_widths_are_refused(tmp_path: Path, keep: Any) -> None:
    for folder, width in (("a", 2), ("b", 3)):
        (tmp_path / folder).mkdir()
        rows = [{**{f"x{place}": 0.5 for place in range(width)}, "label": row % 2} for row in range(4)]
        (tmp_path / folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(StreamError):
        load(FilesSource(folders=["a", "b"], features=["x0", "x1", "x2"], keep=keep), tmp_path)


def test_what_most_leaves_out_is_said_and_one_folder_is_no_two(two: Path) -> None:
    rows = load(FilesSource(folders=["news", "mail"], most={"train": 8}), two)
    assert sum("8 of 12 rows kept" in note for note in rows.notes) == 2
    with pytest.raises(SpecError):
        Stream.load(
            {"name": "x", "source": {"kind": "files", "folders": ["news", "./news"]}, "split": {"by": "domain"}},
            data=two,
        )
