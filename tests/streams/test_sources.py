from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
import sys
import types
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from continual.errors import StreamError
from continual.streams.content import row_keys
from continual.streams.folders import Place
from continual.streams.sources import files
from continual.streams.sources.arrays import ArraysSource
from continual.streams.sources.digits import DigitsSource
from continual.streams.sources.docstrings import DocstringsSource, _docstrings, _mask_pattern, clean
from continual.streams.sources.files import FilesSource
from continual.streams.sources.hub import HubSource
from continual.streams.sources.mnist import MnistSource
from continual.streams.sources.rows import Rows, stratified
from continual.streams.tokens import needed_columns
from continual.table import ArrowTable, TensorTable


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def sample(count: int = 12, start: int = 0, classes: int = 3) -> list[dict[str, Any]]:
    return [
        {
            "text": f"text number {n}",
            "label": f"class {n % classes}",
            "domain": "ab"[n % 2],
            "when": f"2024-0{1 + n % 3}-10",
        }
        for n in range(start, start + count)
    ]


def load(source: Any, data: Path | None = None, objective: Any = "classification", folder: Path | None = None) -> Rows:
    rows = source.load(Place(data, folder), objective)
    assert isinstance(rows, Rows)
    return rows


def all_rows(rows: Rows) -> torch.Tensor:
    return torch.cat([table.column("row") for table in rows.tables.values()])


def test_digits_are_scaled_stratified_and_fixed() -> None:
    rows, again = load(DigitsSource(valid_share=0.1)), load(DigitsSource(valid_share=0.1))
    train, test = rows.tables["train"], rows.tables["test"]
    inputs = train.column("inputs")
    assert inputs.dtype == torch.float32 and inputs.shape[1] == 64
    assert inputs.min() >= 0 and inputs.max() == 1
    assert sum(len(table) for table in rows.tables.values()) == 1797
    assert len(torch.unique(all_rows(rows))) == 1797
    share = test.column("labels").bincount() / torch.cat([t.column("labels") for t in rows.tables.values()]).bincount()
    assert (share - 0.25).abs().max() < 0.005
    assert 0.09 < len(rows.tables["valid"]) / (len(rows.tables["valid"]) + len(train)) < 0.11
    assert torch.equal(inputs, again.tables["train"].column("inputs"))
    assert "valid" not in load(DigitsSource()).tables


def test_stratified_takes_the_rounded_share_of_each_class() -> None:
    labels = torch.tensor([0] * 10 + [1] * 4 + [2])
    taken = stratified(labels, 0.5, 0)
    assert labels[taken].bincount(minlength=3).tolist() == [5, 2, 0]
    assert not torch.equal(taken, stratified(labels, 0.5, 1))


def test_docstrings_masked_distinct_and_cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CONTINUAL_CACHE", str(tmp_path))
    source = DocstringsSource(
        packages=["networkx", "scikit-learn"], rows_per_class={"train": 12, "valid": 4, "test": 8}
    )
    rows = load(source)
    assert {part: len(table) for part, table in rows.tables.items()} == {"train": 24, "valid": 8, "test": 16}
    assert rows.label_names == ("networkx", "scikit-learn")
    texts = [text for table in rows.tables.values() for text in table.strings("text")]
    assert len(set(texts)) == len(texts)
    joined = " ".join(texts).lower()
    assert "sklearn" not in joined and "networkx" not in joined and "scikit-learn" not in joined
    assert all(len(text) <= 200 and len(text.split()) >= 6 for text in texts)

    def forbidden(path: Path) -> list[str]:
        raise AssertionError("read again")

    monkeypatch.setattr("continual.streams.sources.docstrings._docstrings", forbidden)
    assert load(source).tables["train"].strings("text") == rows.tables["train"].strings("text")
    damaged = next((tmp_path / "docstrings").glob("networkx*.jsonl"))
    damaged.write_text("\n".join(damaged.read_text().splitlines()[:-2]) + "\n")
    monkeypatch.setattr("continual.streams.sources.docstrings._docstrings", _docstrings)
    assert load(source).tables["test"].strings("text") == rows.tables["test"].strings("text")


def test_docstrings_import_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, kind in (("quiet_a", "first"), ("quiet_b", "other")):
        folder = tmp_path / name
        folder.mkdir()
        body = "\n\n".join(
            f'def f{n}():\n    """Does the {kind} thing number {n} of {name} with care."""' for n in range(40)
        )
        (folder / "__init__.py").write_text(f"raise RuntimeError('imported')\n\n{body}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("CONTINUAL_CACHE", str(tmp_path / "cache"))
    rows = load(DocstringsSource(packages=["quiet_a", "quiet_b"], rows_per_class={"train": 5, "test": 5}))
    assert "quiet_a" not in sys.modules and rows.label_names == ("quiet_a", "quiet_b")


def test_docstrings_that_two_packages_share_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, own in (("twin_a", "first"), ("twin_b", "second")):
        (tmp_path / name).mkdir()
        lines = [f'def f{n}():\n    """The {own} kind of text with number {n} in it."""' for n in range(40)]
        lines += ['def g():\n    """The very same words stand in both of them."""']
        (tmp_path / name / "__init__.py").write_text("\n\n".join(lines))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("CONTINUAL_CACHE", str(tmp_path / "cache"))
    rows = load(DocstringsSource(packages=["twin_a", "twin_b"], rows_per_class={"train": 99, "test": 99}))
    texts = [text for table in rows.tables.values() for text in table.strings("text")]
    assert len(texts) == 80 and not any("same words" in text for text in texts)


def test_docstrings_errors() -> None:
    with pytest.raises(StreamError, match=r"'no-such-package' is not installed"):
        load(DocstringsSource(packages=["numpy", "no-such-package"]))
    with pytest.raises(StreamError, match=r"names a package twice"):
        load(DocstringsSource(packages=["networkx", "networkx"]))


def test_clean_keeps_the_first_paragraphs_only() -> None:
    mask = _mask_pattern("scikit-learn")
    text = (
        "Fit :class:`~sklearn.svm.SVC` on ``X``.\n\nMore of it in\nscikit-learn.\n\nParameters\n----------\nX : array"
    )
    assert clean(text, mask, 200) == "Fit this package on X. More of it in this package."
    assert clean("One two three four", mask, 9) == "One two"
    assert clean("The nx graph, not nxt.", _mask_pattern("networkx"), 99) == "The this package graph, not nxt."


def fake_mnist(raw: Path, zipped: bool = False) -> None:
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name, count in (("train", 40), ("t10k", 20)):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = np.array([0x800 + array.ndim, *array.shape], dtype=">u4").tobytes()
            path, content = raw / f"{name}-{kind}-ubyte", header + array.tobytes()
            if zipped:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
            else:
                path.write_bytes(content)


@pytest.mark.parametrize("zipped", [False, True])
def test_mnist_from_files(tmp_path: Path, zipped: bool) -> None:
    fake_mnist(tmp_path / "MNIST" / "raw", zipped)
    rows = load(MnistSource(valid_share=0.25), tmp_path)
    assert {part: len(table) for part, table in rows.tables.items()} == {"train": 30, "valid": 10, "test": 20}
    inputs = rows.tables["test"].column("inputs")
    assert inputs.shape == (20, 784) and inputs.dtype == torch.float32 and inputs.min() >= 0 and inputs.max() <= 1
    square = load(MnistSource(flatten=False), tmp_path / "MNIST").tables["test"].column("inputs")
    assert square.shape == (20, 1, 28, 28) and torch.equal(square.flatten(1), inputs)


def test_mnist_missing_cut_or_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONTINUAL_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StreamError, match=r"MNIST was not found .* --data"):
        load(MnistSource())
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(StreamError, match=r"needs torchvision"):
        load(MnistSource(download=True))
    fake = types.ModuleType("torchvision.datasets")
    fake.MNIST = lambda root, download: fake_mnist(Path(root) / "MNIST" / "raw")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision.datasets", fake)
    assert len(load(MnistSource(download=True), tmp_path / "new").tables["train"]) == 40
    labels = tmp_path / "new" / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-3])
    with pytest.raises(StreamError, match=r"cut short"):
        load(MnistSource(), tmp_path / "new")
    labels.write_bytes(b"nothing of the kind")
    with pytest.raises(StreamError, match=r"not an IDX file"):
        load(MnistSource(), tmp_path / "new")


def test_real_mnist(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONTINUAL_DATA", str(data_folder))
    rows = load(MnistSource())
    assert len(rows.tables["train"]) == 60_000 and len(rows.tables["test"]) == 10_000
    assert rows.tables["train"].column("labels")[:5].tolist() == [5, 0, 4, 1, 9]
    assert rows.tables["train"].column("inputs").max() == 1


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_files_by_part(tmp_path: Path, suffix: str) -> None:
    for name, start in (("train", 0), ("val", 100), ("test", 200)):
        table = datasets.Dataset.from_list(sample(start=start))
        if suffix == "jsonl":
            write_jsonl(tmp_path / "train.jsonl".replace("train", name), sample(start=start))
        elif suffix == "csv":
            table.to_pandas().to_csv(tmp_path / f"{name}.csv", index=False)
        else:
            table.to_pandas().to_parquet(tmp_path / f"{name}.parquet")
    rows = load(FilesSource(domain="domain", time="when"), tmp_path)
    assert {part: len(table) for part, table in rows.tables.items()} == {"train": 12, "valid": 12, "test": 12}
    assert rows.label_names == ("class 0", "class 1", "class 2") and rows.domain_names == ("a", "b")
    assert rows.tables["valid"].strings("text")[0] == "text number 100"
    assert rows.tables["valid"].column("labels")[0] == 100 % 3
    assert rows.times["test"].dtype.kind == "M"
    assert len(torch.unique(all_rows(rows))) == 36
    assert isinstance(rows.tables["train"], TensorTable)


def write_csv(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_cells_of_a_csv_file_are_taken_as_they_stand(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", "text,label,domain\n0,007,01\nnull,7,1\nNA,NA,NA\n1.50,None,nan\n")
    for keep in ("memory", "disk"):
        rows = load(FilesSource(path=str(path), domain="domain", keep=keep))
        assert rows.label_names == ("007", "7", "NA", "None") and rows.domain_names == ("01", "1", "NA", "nan")
        assert list(rows.tables["train"].strings("text")) == ["0", "null", "NA", "1.50"]
    renamed = write_csv(tmp_path / "b.csv", "t,y\n1,b\n2,NA\n")
    assert load(FilesSource(path=str(renamed), text="t", label="y")).label_names == ("b", "NA")
    empty = write_csv(tmp_path / "c.csv", "text,label\na,x\nb,\nc,NA\n")
    with pytest.raises(StreamError, match=r"the label of row 1 is None"):
        load(FilesSource(path=str(empty)))
    with pytest.raises(StreamError, match=r"'text' of row 1 is empty"):
        load(FilesSource(path=str(write_csv(tmp_path / "d.csv", "text,label\n1,x\n,y\n"))))


def test_numbers_in_a_csv_file_stay_numbers(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", "text,label,when,id\na,10,202402,5\nb,9,202401,3\nc,-1,202403,4\n")
    write_csv(tmp_path / "test.csv", "text,label,when,id\nd,9,202401,7\n")
    rows = load(FilesSource(time="when", id="id", domain="when"), tmp_path)
    assert rows.label_names == ("-1", "9", "10") and rows.tables["test"].column("labels").tolist() == [1]
    assert rows.times["train"].tolist() == [202402, 202401, 202403]
    assert rows.tables["train"].column("row").tolist() == [5, 3, 4]
    write_csv(tmp_path / "test.csv", "text,label\nd,09\ne,9\n")
    with pytest.raises(StreamError, match=r"class '09' is in test but has no training rows"):
        load(FilesSource(), tmp_path)
    (tmp_path / "test.csv").unlink()
    write_jsonl(tmp_path / "test.jsonl", [{"text": "d", "label": "9"}])
    assert load(FilesSource(), tmp_path).label_names == ("10", "9", "-1")
    write_jsonl(tmp_path / "test.jsonl", [{"text": "d", "label": 9}])
    assert load(FilesSource(), tmp_path).label_names == ("-1", "9", "10")
    numbers = write_csv(tmp_path / "n.csv", "x,label\n1,2\n2,0.5\nNA,3\n")
    with pytest.raises(StreamError, match=r"the label of row 1 is 0.5"):
        load(FilesSource(path=str(numbers), text="x"))
    with pytest.raises(StreamError, match=r"1 rows have features that are NaN"):
        load(FilesSource(path=str(numbers), features=["x"]), objective="regression")
    assert load(FilesSource(path=str(tmp_path / "train.csv"), label="id", id="id")).label_names == ("3", "4", "5")
    found = load(FilesSource(path=str(numbers), text="x"), objective="regression").tables["train"]
    assert found.column("labels").tolist() == [2, 0.5, 3] and list(found.strings("text")) == ["1", "2", "NA"]


def test_a_cell_that_nobody_reads_may_be_empty(tmp_path: Path) -> None:
    lines = ["text,label,age", *(f"text {n},c{n % 2},{n}" for n in range(10_000)), "last,c0,"]
    path = write_csv(tmp_path / "long.csv", "\n".join(lines) + "\n")
    assert load(FilesSource(path=str(path))).tables["train"].strings("text")[-1] == "last"


def test_files_named_and_on_disk_give_the_same_rows(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", sample(20))
    write_jsonl(tmp_path / "b.jsonl", sample(10, 50))
    memory = load(FilesSource(train="a.jsonl", test="b.jsonl", keep="memory"), tmp_path)
    disk = load(FilesSource(train="a.jsonl", test="b.jsonl", keep="disk", path="."), folder=tmp_path)
    assert isinstance(disk.tables["train"], ArrowTable) and isinstance(memory.tables["train"], TensorTable)
    index = torch.tensor([3, 1, 19])
    for part in ("train", "test"):
        one, two = memory.tables[part], disk.tables[part]  # type: ignore[index]
        assert list(one.strings("text")) == list(two.strings("text"))
        assert torch.equal(one.column("labels"), two.column("labels")) and torch.equal(
            one.column("row"), two.column("row")
        )
        assert np.array_equal(row_keys(one), row_keys(two))
    assert torch.equal(memory.tables["train"][index]["labels"], disk.tables["train"][index]["labels"])


@pytest.mark.parametrize("keep", ["memory", "disk"])
@pytest.mark.parametrize("features", [None, ["x"]])
def test_a_file_of_the_same_age_is_read_again(tmp_path: Path, keep: Any, features: list[str] | None) -> None:
    def given(start: int) -> list[dict[str, Any]]:
        return [{**row, "x": start + n} for n, row in enumerate(sample(start=start))]

    path = write_jsonl(tmp_path / "rows.jsonl", given(10))
    source = FilesSource(path=str(path), features=features, keep=keep)
    before = load(source).tables["train"]
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    write_jsonl(path, given(50))
    os.utime(path, ns=times)
    after = load(source).tables["train"]
    for table, start in ((before, 10), (after, 50)):
        if features:
            assert table.column("inputs")[:, 0].tolist() == list(range(start, start + 12))
        else:
            assert table.strings("text")[0] == f"text number {start}"


@pytest.mark.parametrize("keep", ["memory", "disk"])
def test_shares_follow_content_and_never_split_a_text(tmp_path: Path, keep: Any) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", sample(300) + sample(300))
    source = FilesSource(path=str(path), shares={"valid": 0.2, "test": 0.3}, keep=keep)
    rows = load(source)
    texts = {part: set(table.strings("text")) for part, table in rows.tables.items()}
    assert not texts["train"] & texts["test"] and not texts["train"] & texts["valid"]
    assert sum(len(table) for table in rows.tables.values()) == 600
    assert 0.2 < len(rows.tables["test"]) / 600 < 0.4 and 0.1 < len(rows.tables["valid"]) / 600 < 0.3
    write_jsonl(path, sample(20, 900) + sample(300))
    moved = load(source)
    assert set(moved.tables["test"].strings("text")) >= texts["test"]
    with pytest.raises(StreamError, match=r"has test rows and 'shares.test' as well"):
        load(FilesSource(train=str(path), test=str(path), shares={"test": 0.5}))


@pytest.mark.parametrize("keep", ["memory", "disk"])
def test_numeric_features_and_ids(tmp_path: Path, keep: Any) -> None:
    rows = [{"a": n, "b": n / 2, "c": [n, n + 1], "y": n % 2, "key": 100 - n} for n in range(8)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    found = load(FilesSource(path=str(path), features=["a", "b", "c"], label="y", id="key", keep=keep))
    batch = found.tables["train"][torch.tensor([2])]
    assert batch["inputs"].tolist() == [[2.0, 1.0, 2.0, 3.0]] and batch["inputs"].dtype == torch.float32
    assert batch["row"].tolist() == [98] and found.label_names == ("0", "1")


def test_overlap_dropped_or_kept(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", sample(12))
    write_jsonl(tmp_path / "test.jsonl", sample(12, 10))
    kept, dropped = load(FilesSource(), tmp_path), load(FilesSource(overlap="drop"), tmp_path)
    assert len(kept.tables["train"]) == 12
    assert list(dropped.tables["train"].strings("text")) == [f"text number {n}" for n in range(10)]
    assert len(dropped.tables["test"]) == 12
    assert dropped.notes == ("2 of 12 training rows dropped: same content as test rows",) and kept.notes == ()
    write_jsonl(tmp_path / "valid.jsonl", sample(3, 11))
    assert load(FilesSource(overlap="drop"), tmp_path).notes[1] == (
        "3 of 3 valid rows dropped: same content as test rows"
    )


BROKEN: list[tuple[str, list[dict[str, Any]], dict[str, Any], str]] = [
    ("missing text column", [{"t": "a", "label": "x"}], {}, "nothing to learn from"),
    ("missing named column", sample(), {"text": "txt"}, "no column 'txt'"),
    ("missing label column", [{"text": "a"}], {}, "no column 'label' for labels"),
    ("missing domain column", sample(), {"domain": "land"}, "no column 'land'"),
    ("float labels", [{"text": "a", "label": 0.5}, {"text": "b", "label": 1.5}], {}, "label of row 0 is 0.5"),
    ("no label", [{"text": "a", "label": "x"}, {"text": "b", "label": None}], {}, "label of row 1 is None"),
    ("one class", [{"text": "a", "label": "x"}, {"text": "b", "label": "x"}], {}, "the one class 'x'"),
    ("empty text", [{"text": "a", "label": "x"}, {"text": "  ", "label": "y"}], {}, "'text' of row 1 is empty"),
    (
        "text that is none",
        [{"text": 0, "label": "x"}, {"text": 4, "label": "y"}],
        {},
        "'text' of row 0 is int, not text",
    ),
    ("NaN", [{"a": 1.0, "label": "x"}, {"a": None, "label": "y"}], {"features": ["a"]}, "NaN or infinite"),
    ("word as feature", sample(), {"features": ["text"]}, "'text' is not numeric"),
    ("two kinds of features", sample(), {"features": ["label"], "text": "text"}, "both 'features' and 'text'"),
    ("ids repeat", [{**row, "id": 1} for row in sample()], {"id": "id"}, "11 row ids repeat"),
    ("ids are words", sample(), {"id": "label"}, "row ids are not whole numbers"),
    ("ids too large", [{**row, "id": 2**41 + n} for n, row in enumerate(sample())], {"id": "id"}, "too large"),
    ("half a question", sample(), {"prompt": "text"}, "'prompt' does not suit"),
    (
        "no domain",
        [*sample(), {**sample()[0], "domain": None}],
        {"domain": "domain"},
        r"domain of row 12 is missing \(None\)",
    ),
    ("empty domain", [*sample(), {**sample()[0], "domain": " "}], {"domain": "domain"}, "domain of row 12 is missing"),
    ("times are words", sample(), {"time": "label"}, "time column cannot be read"),
]


@pytest.mark.parametrize(
    ("rows", "options", "sentence"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN]
)
def test_rows_that_cannot_be_used(
    tmp_path: Path, rows: list[dict[str, Any]], options: dict[str, Any], sentence: str
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(StreamError, match=sentence):
        load(FilesSource(path=str(path), **options))


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONTINUAL_DATA", raising=False)
    with pytest.raises(StreamError, match=r"has no 'path'"):
        load(FilesSource())
    with pytest.raises(StreamError, match=r"no training file was found .*--data"):
        load(FilesSource(), tmp_path)
    (tmp_path / "train.jsonl").write_text('{"text": "a"\n')
    with pytest.raises(StreamError, match=r"could not be read"):
        load(FilesSource(), tmp_path)
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(StreamError, match=r"is empty"):
        load(FilesSource(), tmp_path)
    (tmp_path / "rows.xlsx").write_text("x")
    with pytest.raises(StreamError, match=r"allowed are '.jsonl'"):
        load(FilesSource(path=str(tmp_path / "rows.xlsx")))
    with pytest.raises(StreamError, match=r"the test file .* was not found"):
        load(FilesSource(train="rows.xlsx", test="none.csv"), tmp_path)


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
@pytest.mark.parametrize("column", ["text", "other"])
def test_files_that_are_not_utf8(tmp_path: Path, suffix: str, column: str) -> None:
    row = {"text": "plain", "label": "x", "other": "plain", column: "café"}
    lines = [json.dumps(row, ensure_ascii=False)] if suffix == "jsonl" else [",".join(row), ",".join(row.values())]
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes("\n".join([*lines, ""]).encode("latin-1"))
    with pytest.raises(StreamError, match=r"rows\.\w+' is not UTF-8 \(invalid continuation byte\): save it as UTF-8"):
        load(FilesSource(path=str(path)))
    path.write_bytes(("\n".join(lines)).encode()[:-2] + b"\xc3")
    with pytest.raises(StreamError, match=r"is not UTF-8 \(unexpected end of data\)"):
        load(FilesSource(path=str(path)))


@pytest.mark.parametrize("keep", ["memory", "disk"])
def test_text_that_arrow_holds_and_cannot_decode(tmp_path: Path, keep: Any) -> None:
    raw = pa.array([b"plain", b"caf\xe9", b"more"], type=pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    table = pa.table({"text": text, "label": ["x", "y", "x"], "domain": ["a", "b", "a"]})
    pq.write_table(table, tmp_path / "rows.parquet")
    datasets.Dataset(table).save_to_disk(str(tmp_path / "saved"))
    for source in (
        FilesSource(path=str(tmp_path / "rows.parquet"), keep=keep),
        FilesSource(path=str(tmp_path / "rows.parquet"), keep=keep, shares={"test": 0.5}),
        HubSource(name=str(tmp_path / "saved"), keep=keep),
    ):
        with pytest.raises(StreamError, match=r"there is text that is not UTF-8"):
            load(source)


def test_a_character_may_lie_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_CHUNK", 3)
    path = tmp_path / "rows.csv"
    lines = ["text,label", *(f"{'é€' * n}{n},c{n % 2}" for n in range(8)), ""]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert files._digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert load(FilesSource(path=str(path))).tables["train"].strings("text")[2] == "é€é€2"


def test_the_log_of_datasets_stays_silent_and_as_it_was(tmp_path: Path) -> None:
    heard: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = heard.append  # type: ignore[method-assign]
    log, level = logging.getLogger("datasets"), datasets.logging.get_verbosity()
    log.addHandler(handler)
    try:
        for name, text in (("a.csv", "text,label\na,x\nb,y,z,w\n"), ("b.jsonl", '{"text": "a"}\n{"text": \n')):
            (tmp_path / name).write_text(text)
            with pytest.raises(StreamError, match=r"could not be read"):
                load(FilesSource(path=str(tmp_path / name)))
    finally:
        log.removeHandler(handler)
    assert heard == [] and datasets.logging.get_verbosity() == level


def test_a_class_without_training_rows(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", sample(classes=2))
    write_jsonl(tmp_path / "test.jsonl", sample(start=50, classes=3))
    with pytest.raises(StreamError, match=r"class 'class 2' is in test but has no training rows"):
        load(FilesSource(), tmp_path)


def test_language_model_rows(tmp_path: Path) -> None:
    chats = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}]} for n in range(3)
    ]
    rows = load(FilesSource(path=str(write_jsonl(tmp_path / "c.jsonl", chats))), objective="causal-lm")
    assert (
        rows.tables["train"].strings("messages")[1][0]["content"] == "q1" and "labels" not in rows.tables["train"].names
    )
    pairs = [{"prompt": f"p{n}", "completion": "c"} for n in range(3)]
    path = str(write_jsonl(tmp_path / "p.jsonl", pairs))
    assert rows.tables["train"].names and load(FilesSource(path=path), objective="seq2seq").label_names == ()
    with pytest.raises(StreamError, match=r"has no labels: leave 'label' out"):
        load(FilesSource(path=path, label="completion"), objective="causal-lm")
    with pytest.raises(StreamError, match=r"does not suit the objective 'classification'"):
        load(FilesSource(path=path))


def test_columns_that_are_not_named_follow_the_objective(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    everything = {"text": "t", "messages": chat, "prompt": "p", "completion": "c", "label": "x"}
    wanted: dict[Any, list[tuple[str, ...]]] = {
        "causal-lm": [("prompt", "completion"), ("messages",), ("text",)],
        "seq2seq": [("prompt", "completion")],
        "classification": [("text",)],
    }
    for objective, groups in wanted.items():
        left = [{**everything, "text": f"t{n}", "label": f"c{n}"} for n in range(2)]
        for number, group in enumerate(groups):
            path = write_jsonl(tmp_path / f"{objective}{number}.jsonl", left)
            table = load(FilesSource(path=str(path)), objective=objective).tables["train"]
            assert set(table.names) - {"labels", "row"} == set(group) == set(needed_columns(list(left[0]), objective))
            left = [{name: value for name, value in row.items() if name not in group} for row in left]


def test_regression_targets(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "r.jsonl", [{"x": n, "label": n / 2} for n in range(4)]))
    rows = load(FilesSource(path=path, features=["x"]), objective="regression")
    assert rows.tables["train"].column("labels").tolist() == [0, 0.5, 1, 1.5] and rows.label_names == ()
    path = str(write_jsonl(tmp_path / "s.jsonl", [{"x": n, "label": "word"} for n in range(4)]))
    with pytest.raises(StreamError, match=r"labels are not numbers"):
        load(FilesSource(path=path, features=["x"]), objective="regression")


def test_hub_from_a_saved_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    part = {"text": [f"t{n}" for n in range(40)], "label": [1, 0] * 20}
    other = {"text": [f"u{n}" for n in range(4)], "label": [0, 1] * 2}
    made = datasets.DatasetDict(
        train=datasets.Dataset.from_dict(part, features), validation=datasets.Dataset.from_dict(other, features)
    )
    made.save_to_disk(str(tmp_path / "saved"))
    rows = load(HubSource(name=str(tmp_path / "saved")))
    assert set(rows.tables) == {"train", "valid"} and rows.label_names == ("yes", "no")
    named = load(HubSource(name="saved", splits={"test": "validation"}), tmp_path)
    assert "test" in named.tables
    made["train"].save_to_disk(str(tmp_path / "single"))
    single = load(HubSource(name="single", shares={"test": 0.5}), tmp_path)
    assert len(single.tables["train"]) + len(single.tables["test"]) == 40
    with pytest.raises(StreamError, match=r"no split 'dev'"):
        load(HubSource(name="saved", splits={"test": "dev"}), tmp_path)
    asked: list[Any] = []

    def fake(name: str, config: str | None, revision: str | None) -> Any:
        asked.append((name, config, revision))
        if name == "gone":
            raise FileNotFoundError("no such data set")
        return made

    monkeypatch.setattr(datasets, "load_dataset", fake)
    load(HubSource(name="someone/rows", config="small", revision="abc"))
    assert asked == [("someone/rows", "small", "abc")]
    with pytest.raises(StreamError, match=r"'gone' could not be loaded"):
        load(HubSource(name="gone"))


def test_arrays() -> None:
    inputs, labels = np.arange(12.0).reshape(6, 2), np.array(["b", "a"] * 3)
    rows = load(ArraysSource(train=(inputs, labels), test=(inputs + 50, labels), domain={"train": list("xxyyxx")}))
    assert rows.label_names == ("b", "a") and rows.domains["train"].tolist() == [0, 0, 1, 1, 0, 0]
    words = load(ArraysSource(train=(inputs, labels), domain={"train": ["None", "nan", "a", "a", "a", "b"]}))
    assert words.domain_names == ("None", "nan", "a", "b")
    assert load(ArraysSource(train=(inputs, labels), domain={"train": torch.arange(6) // 3})).domain_names == ("0", "1")
    for missing in (None, float("nan"), np.datetime64("NaT"), ""):
        marks = [*"xxxx", missing, "y"]
        for domain in (marks, np.array(marks, dtype=object)):
            with pytest.raises(StreamError, match=r"train: the domain of row 4 is missing"):
                load(ArraysSource(train=(inputs, labels), domain={"train": domain}))
    with pytest.raises(StreamError, match=r"test: the domain of row 0 is missing \(nan\)"):
        load(
            ArraysSource(
                train=(inputs, labels),
                test=(inputs + 50, labels),
                domain={"train": range(6), "test": np.array([np.nan, 1, 2, 3, 4, 5])},
            )
        )
    with pytest.raises(StreamError, match=r"6 rows and 2 values for 'time'"):
        load(ArraysSource(train=(inputs, labels), time={"train": [1, 2]}))
    with pytest.raises(StreamError, match=r"1 rows have features that are NaN"):
        load(ArraysSource(train=(np.where(inputs == 3, np.nan, inputs), labels)))
    with pytest.raises(StreamError, match=r"1 rows have features that are NaN or infinite"):
        load(ArraysSource(train=(np.where(inputs == 3, np.inf, inputs), labels)))
    with pytest.raises(StreamError, match=r"no training rows"):
        load(ArraysSource(train=(inputs[:0], labels[:0])))
    with pytest.raises(StreamError, match=r"some parts have strings"):
        load(ArraysSource(train=(inputs, labels), test=(inputs, np.arange(6))))
