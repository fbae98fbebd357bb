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
