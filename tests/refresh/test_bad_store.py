"""Bad input to ``continual store``: the exit status, one sentence, no traceback, and the store byte for byte as it was."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_bench import Case, refuse, tree, write
from bad_store_bench import copied, csv, lines, quick_store, rows
from store_cases import BOMB, IDS, NEW, PREDICT, init, new, option, update
from test_cli import continual
from text_bench import WORDS, tiny_bert

from continual.refresh import Store
from continual.refresh.intake import row_ids


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store of three months in it."""
    place = tmp_path_factory.mktemp("grown")
    quick_store(place, 3)
    return place


@pytest.fixture
def folder(grown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a copy of that store, on a disk that nobody waits for."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    copied(grown / "store", tmp_path)
    return tmp_path


FILES = [
    option("update store gone.jsonl", "'gone.jsonl' was not found", "JSONL, CSV or Parquet"),
    update("empty", "", "is empty", "give it rows"),
    update("blank lines", "\n\n", "holds no rows", "give it some"),
    update("not UTF-8", NEW.replace("class 6", "classé").encode("latin-1"), "is not UTF-8", "save it as UTF-8"),
    update("any bytes", bytes(range(256)), "is not UTF-8"),
    update("a line that is no JSON", NEW + "hello\n", "could not be read", "mend the file"),
    update("cut off", NEW[:-10], "could not be read"),
    update("lists", "[1, 2]\n[3, 4]\n", "could not be read"),
    update("another suffix", NEW, "no file that can be read", "'.jsonl'", file="new.xlsx"),
    update("no suffix", NEW, "no file that can be read", file="new"),
    Case("update, a folder", ["store", "update", "store", "new"], ("'new' is no folder that `datasets` saved", "a file of rows"),
         {"new/rows.jsonl": NEW}),
    update("a CSV without header", csv(rows(3)).split("\n", 1)[1], "no column", "first line of a CSV", file="new.csv"),
    update("a CSV with cells too many", csv(rows(3)) + "1,2,3,4,5,6,7\n", "could not be read", file="new.csv"),
    update("a Parquet that is none", NEW, "could not be read", file="new.parquet"),
    update("a column gone", NEW.replace('"a"', '"aa"'), "no column 'a'", "Did you mean 'aa'?"),
    update("no labels", NEW.replace('"label"', '"lable"'), "no column 'label'", "Did you mean 'lable'?"),
    update("no ids", NEW.replace('"id"', '"key"'), "no column 'id'"),
    new("numbers as labels", "labels that are whole numbers", "names", label=lambda place: place % 2),
    new("text as numbers", "'a' is not numeric in every row", a="much"),
    new("text in one row", "'a' is not numeric in every row", a=lambda place: "much" if place == 15 else 1.0),
    new("a feature missing", "NaN or infinite", "row 3", a=lambda place: None if place == 3 else 1.0),
    update("an infinite feature", csv(rows(3, a=lambda n: "inf" if n == 3 else n)), "NaN or infinite", "row 3",
           file="new.csv"),
    new("features too many", "features that are 4 numbers", "3 numbers", a=[1.0, 2.0]),
    new("uneven features", "different lengths", a=lambda place: [1.0] * (place % 3 + 1)),
    new("an id missing", "row 3", "has no id", id=lambda place: None if place == 3 else f"n{place}"),
    new("an id empty", "row 3", "has no id", id=lambda place: "" if place == 3 else f"n{place}"),
    new("an id of blanks", "row 3", "has no id", id=lambda place: "  " if place == 3 else f"n{place}"),
    new("an id twice", "the id 'n1' is there twice", id=lambda place: f"n{max(place, 1)}"),
    new("ids that are lists", "id of row 0", "is [0]", "text or a whole number", id=lambda place: [place]),
    new("ids with decimals", "id of row 0", "is 0.5", "text or a whole number", id=lambda place: place + 0.5),
    new("a label missing", "label of row 3 is None", label=lambda place: None if place == 3 else "x"),
    new("a label empty", "label of row 3 is ''", label=lambda place: "" if place == 3 else "x"),
    new("a label of blanks", "label of row 3 is ' '", label=lambda place: "  " if place == 3 else "x"),
    new("labels of two types", "label of row 3 is 1", "of one kind in all rows", label=lambda place: 1 if place == 3 else "x"),
    new("labels with decimals", "label of row 0 is 0.5", label=lambda place: place + 0.5),
    new("labels that are lists", "label of row 0 is ['x']", label=["x"]),
    new("a label in capitals", "'CLASS 1'", "looks like 'class 1'", "--new-label 'CLASS 1'",
        label=lambda place: "CLASS 1" if place == 3 else "x"),
    new("a label in two spellings", "'card_lost'", "looks like 'Card lost'", "--new-label 'card_lost'",
        label=lambda place: ["Card lost", "card_lost"][place % 2]),
    new("a label with other blanks", "'class_1 '", "looks like 'class 1'",
        label=lambda place: "class_1 " if place == 3 else "x"),
    new("rows that are known", "all 5 rows", "given in earlier updates", "nothing new to learn", month=1, count=5),
    Case("update, a name that is taken", ["store", "update", "store", "month-1.jsonl"],
         ("'month-1' was learnt already", "--name"), {"month-1.jsonl": NEW}),
]  # fmt: skip


def without_live(folder: Path) -> None:
    """A store without any version in the place of the one that is there."""
    shutil.rmtree(folder / "store")
    quick_store(folder, 0)


def no_ids(folder: Path) -> None:
    shutil.rmtree(folder / "store")
    quick_store(folder, 1, columns={"features": ["a", "b", "c"]})


OPTIONS = [
    option("update", "Missing argument", status=2),
    option("update store", "Missing argument", status=2),
    option("update store new.jsonl --agian", "No such option", "--again", status=2),
    option("update nowhere new.jsonl", "'nowhere' holds no store", "continual store init", files=PREDICT),
    option("update new.jsonl new.jsonl", "'new.jsonl' holds no store", files=PREDICT),
    option("update store new.jsonl --device gpu", "unknown device 'gpu'", "'cpu'", files=PREDICT),
    option("update store new.jsonl --device gpu", "unknown device 'gpu'", files=PREDICT, ready=without_live),
    option("update store new.jsonl --name month-1", "'month-1' was learnt already", "--name", files=PREDICT),
    option("status", "Missing argument", status=2),
    option("status nowhere", "'nowhere' holds no store", "name another folder"),
    option("status store --html new.jsonl/x.html", "'new.jsonl/x.html' could not be written", files=PREDICT),
    option("history nowhere", "'nowhere' holds no store"),
    option("verify nowhere", "'nowhere' holds no store"),
    option("compare store one", "'one'", "a valid integer", status=2),
    option("compare store 1 9", "'store' has no version 9", "there are 1 to 3"),
    option("compare store 0", "'store' has no version 0", "there are 1 to 3"),
    option("compare store 1", "no live version yet", "continual store update", ready=without_live),
    option("predict store", "Missing option", "--input", status=2),
    option("predict store -i new.jsonl", "Missing option", "--output", status=2),
    option("predict store -i gone.jsonl -o out.jsonl", "'gone.jsonl' was not found"),
    option("predict store -i store -o out.jsonl", "'store' was not found"),
    option("predict store -i new.jsonl -o out.jsonl --version 9", "no version 9", "1 to 3", files=PREDICT),
    option("predict store -i new.jsonl -o out.jsonl --version 0", "no version 0", files=PREDICT),
    option("predict store -i new.jsonl -o out.jsonl --version -1", "no version -1", files=PREDICT),
    option("predict store -i new.jsonl -o out.jsonl --version x", "--version", "a valid integer", files=PREDICT, status=2),
    option("predict store -i new.jsonl -o out.jsonl --device gpu", "unknown device 'gpu'", files=PREDICT),
    option("predict store -i new.jsonl -o out.jsonl", "no live version yet", files=PREDICT, ready=without_live),
    option("predict store -i new.jsonl -o out", "'out' could not be written", files={**PREDICT, "out/x": ""}),
    option("predict store -i new.jsonl -o new.jsonl/out", "could not be written", files=PREDICT),
    option("predict store -i new.jsonl -o out.jsonl", "a column 'score'", "rename it",
           files={"new.jsonl": lines(rows(3, score=1))}),
    option("predict store -i new.jsonl -o deep/out.jsonl", "no column 'b'", files={"new.jsonl": '{"a": 1}\n'}),
    option("predict store -i new.jsonl -o out.jsonl", "'a' is not numeric", files={"new.jsonl": lines(rows(3, a="x"))}),
    option("predict store -i new.jsonl -o out.jsonl", "4 inputs", "takes 3",
           files={"new.jsonl": lines(rows(3, a=[1, 2]))}),
    option("predict store -i new.jsonl -o out.jsonl", "NaN or infinite", "row 3",
           files={"new.jsonl": lines(rows(3, a=lambda place: None if place == 3 else 1))}),
    option("predict store -i new.csv -o out.jsonl", "is empty", files={"new.csv": ""}),
    option("promote store", "Missing argument", status=2),
    option("promote store x", "a valid integer", status=2),
    option("promote store -1", "No such option", status=2),
    option("promote store -- -1", "no version -1", "there are 1 to 3"),
    option("promote store 0", "no version 0", "there are 1 to 3"),
    option("promote store 9", "no version 9", "there are 1 to 3"),
    option("promote store 1", "no version 1", "there is none yet", ready=without_live),
    option("rollback store 9", "no version 9", "there are 1 to 3"),
    option("rollback store 0", "no version 0"),
    option("rollback store", "no live version yet", "nothing to roll back", ready=without_live),
    option("erase store", "Missing option", "--rows", status=2),
    option("erase store --rows gone.txt", "'gone.txt' cannot be read", "an id a line"),
    option("erase store --rows ids.txt", "'ids.txt' cannot be read", "an id a line", files={"ids.txt": b"\xff\xfe"}),
    option("erase store --rows d.txt", "'d.txt' cannot be read", files={"d.txt/x": ""}),
    option("erase store --rows ids.txt", "'ids.txt' names no rows", "an id a line", files={"ids.txt": " \n\n"}),
    option("erase store --rows ids.txt", "no id column", "--rows", files=IDS, ready=no_ids),
    option("erase store --rows gone.jsonl", "'gone.jsonl' was not found"),
    option("erase store --rows new.jsonl", "'new.jsonl' is empty", files={"new.jsonl": ""}),
    option("erase store --rows new.jsonl", "no column 'id'", files={"new.jsonl": '{"a": 1}\n'}),
    option("export store", "Missing option", "--to", status=2),
    option("export store --to out --max-rank 0", "--max-rank", status=2),
    option("export store --to out --version 9", "no version 9"),
    option("export store --to out", "holds something that", "name a new folder", files={"out/x": ""}),
    option("export store --to new.jsonl", "name a new folder", files=PREDICT),
    option("export store --to new.jsonl/x", "could not be written", files=PREDICT),
    option("export store --to store", "name a new folder"),
    option("export store --to out", "no live version yet", ready=without_live),
    option("no-such-command store", "No such command", status=2),
]  # fmt: skip

INITS = [
    init("--strategy rehersal", "unknown strategy 'rehersal'", "Did you mean 'rehearsal'?"),
    init("--strategy joint", "update by update", "'cumulative'"),
    init("--strategy gone.yaml", "there is no file 'gone.yaml'"),
    init("--strategy split-digits", "'split-digits' is a stream"),
    init("--strategy s.yaml", "s.yaml", "unknown key 'replya'", "'replay'?", files={"s.yaml": "replya: 1\n"}),
    init("--strategy s.yaml", "values through its aliases", files={"s.yaml": BOMB}),
    init("--model ./nowhere", "there is no folder './nowhere'"),
    init("--model no_such:Thing", "'no_such:Thing' cannot be imported"),
    init("--strategy lora-rehearsal", "no --feature names a column", "all-MiniLM-L6-v2, with --model", features=()),
    init("--strategy lora-rehearsal --text t", "an mlp reads numbers and 't' is text", "all-MiniLM-L6-v2", features=()),
    init("--strategy s-prompts", "adapter/prompt puts virtual tokens", "an mlp reads none"),
    init("--strategy prefix", "adapter/prefix puts virtual tokens", "adapter kind 'lora'"),
    init("--strategy naive --objective causal-lm", "an mlp cannot be trained for causal-lm"),
    init("--model someone/model", "a transformer reads text and the columns name 'features'"),
    init("--scenario clas", "'scenario' is 'clas'", "'class'"),
    init("--objective classify", "'objective' is 'classify'", "'classification'"),
    init("--set training.lrr=1", "unknown key 'lrr'", "'lr'"),
    init("--set training.lr", "has no value", "key=value"),
    init("--set training.lr=-1", "greater than 0"),
    init("--seed -1", "--seed", status=2),
    init("--seed one", "--seed", status=2),
    init("--text t", "'features'", "'text'", "name one of them"),
    init("--gate x", "the gate 'x' is not understood", "max drop 0.02 at 95%"),
    init("", "the gate 'max drop much' is not understood", more=("--gate", "max drop much")),
    init("", "the gate 'max drop -0.1' is not understood", more=("--gate", "max drop -0.1")),
    init("", "'confidence' is 0.4", "greater than 0.5", more=("--gate", "max drop 0.1 at 40%")),
    init("", "'confidence' is 1.0", "less than 1", more=("--gate", "max drop 0.1 at 100%")),
    init("--rules r.yaml", "both --gate and --rules", more=("--gate", "max drop 0.1"), files={"r.yaml": "{}"}),
    init("--rules gone.yaml", "'gone.yaml' could not be read"),
    init("--rules r.yaml", "'r.yaml' could not be read", files={"r.yaml/x": ""}),
    init("--rules r.yaml", "'r.yaml' is empty", files={"r.yaml": ""}),
    init("--rules r.yaml", "values through its aliases", files={"r.yaml": BOMB}),
    init("--rules r.yaml", "unknown key 'max_dropp' in 'gate'", "'max_drop'?", files={"r.yaml": "gate: {max_dropp: 1}"}),
    init("--rules r.yaml", "'gate.max_drop' is -1", files={"r.yaml": "gate: {max_drop: -1}"}),
    init("--rules r.yaml", "'max_drop' is True", files={"r.yaml": "gate: {max_drop: yes}"}),
    init("--rules r.yaml", "'gate.unsure' is 'never'", "'hold' or 'promote'", files={"r.yaml": "gate: {unsure: never}"}),
    init("--rules r.yaml", "'gate.largest' is 'much'", files={"r.yaml": "gate: {largest: much}"}),
    init("--rules r.yaml", "'holdout.share' is 1.5", files={"r.yaml": "holdout: {share: 1.5}"}),
    init("--rules r.yaml", "'holdout.rows' is 0", files={"r.yaml": "holdout: {rows: 0}"}),
    init("--rules r.yaml", "'drift.stop.0' is 'leak'", "'leakage'?", files={"r.yaml": "drift: {stop: [leak]}"}),
    init("--rules r.yaml", "unknown key 'lrr'", files={"r.yaml": "ladder: {settings: [{training.lrr: 1}]}"}),
    init("--rules r.yaml", "'ladder.settings.0' is 3", files={"r.yaml": "ladder: {settings: [3]}"}),
    init("--rules r.yaml", "unknown replay kind 'none'", files={"r.yaml": "ladder: {settings: [{replay.kind: none}]}"}),
    init("--rules r.yaml", "has the parts 'replay/gdumb'", "not which parts",
         files={"r.yaml": "ladder: {settings: [{replay: {kind: gdumb}}]}"}),
    init("--rules r.yaml", "'alerts.webhook' is 'ftp://x'", files={"r.yaml": "alerts: {webhook: 'ftp://x'}"}),
    init("--rules r.yaml", "'alerts.command'", files={"r.yaml": "alerts: {command: []}"}),
    init("--rules r.yaml", "'save_every' is -1", files={"r.yaml": "save_every: -1"}),
    Case("init over a store", ["store", "init", "store", "--feature", "a"], ("'store' is not empty", "name a new folder")),
    Case("init over a file", ["store", "init", "f", "--feature", "a"], ("'f' is not empty",), {"f": "x"}),
    Case("init below a file", ["store", "init", "f/x", "--feature", "a"], ("'f/x' cannot be made", "name another folder"), {"f": "x"}),
]  # fmt: skip


@pytest.mark.parametrize("case", [*FILES, *OPTIONS, *INITS], ids=lambda case: case.name)
def test_bad_input_is_one_sentence_and_the_store_as_it_was(case: Case, folder: Path) -> None:
    refuse(case, folder)


# Stores of other kinds


def test_what_leaves_nothing_to_do_is_said_and_nothing_is_written(folder: Path) -> None:
    (folder / "again.jsonl").write_text(lines(rows(1)), encoding="utf-8")
    before = tree(folder)
    for argv, said in (
        (
            "update store again.jsonl --device cpu",
            "version 2 learnt these rows already, as 'month-1': nothing was done",
        ),
        ("promote store 3", "version 3 is live already: nothing was done"),
        ("rollback store 3", "version 3 is live already: nothing was done"),
    ):
        done = continual("store", *argv.split(), cwd=folder)
        assert done.returncode == 0 and said in done.stdout, done
        assert tree(folder) == before


def test_a_rollback_past_the_first(folder: Path) -> None:
    assert continual("store", "rollback", "store", "1", cwd=folder).returncode == 0
    refuse(option("rollback store", "version 1 is the first", "none before it"), folder)


def test_rows_that_were_erased(folder: Path) -> None:
    files = {"ids.txt": "".join(f"{row['id']}\n" for row in rows(4, 6)), "new.jsonl": lines(rows(4, 6))}
    write(folder, files)
    done = continual("store", "erase", "store", "--rows", "ids.txt", cwd=folder)
    assert done.returncode == 1 and "0 of 6 rows were erased from 0 versions" in done.stdout, "nobody knows them yet"
    refuse(
        update("erased", lines(rows(4, 6)), "all 6 rows", "were erased from this store", "nothing new to learn"), folder
    )
    before = tree(folder)
    assert continual("store", "erase", "store", "--rows", "ids.txt", cwd=folder).returncode == 0
    assert tree(folder) == before, "what is erased already is not written down again"


def test_rows_that_are_held_out_under_other_ids(folder: Path) -> None:
    """They are not trained on; where nothing else is there, the update is refused."""
    store = Store(folder / "store")
    held = store.learner(device="cpu").ledger.entries[1].tested_ids
    salt = store.folder.settings.salt
    kept = [row for row in rows(1) if int(row_ids([row["id"]], salt)) in held.tolist()]
    assert 2 <= len(kept) < 16
    fresh = [{**row, "id": f"again-{row['id']}"} for row in kept]
    said = ("rows of 'new' have the same content as test rows of earlier updates", "rows of its own")
    refuse(option("update store new.jsonl --device cpu", *said, files={"new.jsonl": lines(fresh)}), folder)
    (folder / "more.jsonl").write_text(lines([*fresh, *rows(3)]), encoding="utf-8")
    done = continual("store", "update", "store", "more.jsonl", "--device", "cpu", cwd=folder)
    assert done.returncode == 0, done
    assert "have the same content as test rows of earlier updates and were left out" in done.stdout, done.stdout
    entry = store.learner(device="cpu").ledger.entries[-1]
    assert not torch.isin(row_ids([row["id"] for row in fresh], salt), entry.trained_ids).any()


def test_one_row_alone(folder: Path) -> None:
    (folder / "one.jsonl").write_text(lines(rows(3, 1)), encoding="utf-8")
    done = continual("store", "update", "store", "one.jsonl", "--device", "cpu", cwd=folder)
    assert done.returncode == 0 and "version 4" in done.stdout, done
    assert Store(folder / "store").manifest().data.trained == 1 and Store(folder / "store").verify() == []


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in the scenario domain, whose rows have no ids."""
    place = tmp_path_factory.mktemp("fixed")
    quick_store(place, 0, scenario="domain", columns={"features": ["a", "b", "c"]})
    for month in range(2):
        (place / "rows.jsonl").write_text(lines(rows(month, label=lambda n: "xyz"[n % 3])), encoding="utf-8")
        Store(place / "store").update(place / "rows.jsonl", name=f"m{month}", device="cpu", progress=False)
    return place


FIXED = [
    new("a class that is not there", "has no rows of 'z'", "'domain' every update has all 3 classes", label=lambda n: "xy"[n % 2]),
    option("update store new.jsonl", "class 'w' is new", "the classes are fixed",
           files={"new.jsonl": lines(rows(3, label=lambda n: "xyzw"[n % 4]))}),
    new("one class", "has no rows of", "'y'", "'z'", label="x"),
    option("erase store --rows ids.txt", "no id column", "--rows", files=IDS),
]  # fmt: skip


@pytest.mark.parametrize("case", FIXED, ids=lambda case: case.name)
def test_classes_that_are_fixed(case: Case, fixed: Path, tmp_path: Path) -> None:
    copied(fixed / "store", tmp_path)
    refuse(case, tmp_path)


@pytest.fixture(scope="module")
def worded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of LoRA adapters on a tiny transformer, whose folder lies beside it."""
    place = tmp_path_factory.mktemp("worded")
    tiny_bert(place / "base")
    lora = {
        "adapter": {"kind": "lora", "rank": 4},
        "training": {"optimizer": "sgd", "lr": 0.1, "epochs": 1, "batch_size": 8},
    }
    with contextlib.chdir(place):
        model = {"kind": "pretrained", "name": "./base", "max_length": 8}
        store = quick_store(Path(), 0, model=model, strategy={"name": "lora", **lora}, columns={"text": "text"})
        Path("rows.jsonl").write_text(lines(texts(0)), encoding="utf-8")
        store.update("rows.jsonl", device="cpu", progress=False)
    return place


def texts(month: int, **change: Any) -> list[dict[str, Any]]:
    found = [{"text": f"{WORDS[(2 * month + n) % 6]} {WORDS[n % 5]}", "label": f"l{month}{n % 2}"} for n in range(12)]
    return [{**row, **{k: v(n) if callable(v) else v for k, v in change.items()}} for n, row in enumerate(found)]


def another_base(folder: Path) -> None:
    shutil.rmtree(folder / "base")
    tiny_bert(folder / "base")
    path = folder / "base" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")


def text_case(name: str, *said: str, **change: Any) -> Case:
    return update(f"text, {name}", lines(texts(1, **change)), *said)


BASE = "the base model has SHA-256"
WORDED = [
    text_case("empty", "'text' of row 3 is empty", text=lambda n: "" if n == 3 else "red"),
    text_case("of blanks", "'text' of row 3 is empty", text=lambda n: "  " if n == 3 else "red"),
    text_case("missing", "'text' of row 3 is empty", text=lambda n: None if n == 3 else "red"),
    text_case("numbers", "'text' of row 0 is int, not text", text=lambda n: n),
    update("text, another column", lines(texts(1)).replace('"text"', '"txt"'), "no column 'text'", "'txt'?"),
    option("predict store -i new.jsonl -o out.jsonl", "'text' of row 1 is empty",
           files={"new.jsonl": '{"text": "red"}\n{"text": ""}\n'}),
    option("export store --to out --max-rank 2", "rank", "2"),
    option("export store --to base", "holds something", "name a new folder"),
    option("update store new.jsonl", BASE, "give the same base model", files={"new.jsonl": lines(texts(1))}, ready=another_base),
    option("predict store -i new.jsonl -o out.jsonl", BASE, files={"new.jsonl": lines(texts(1))}, ready=another_base),
    option("export store --to out", BASE, ready=another_base),
    option("update store new.jsonl", "there is no folder './base'", files={"new.jsonl": lines(texts(1))},
           ready=lambda folder: shutil.rmtree(folder / "base")),
    option("predict store -i new.jsonl -o out.jsonl", "there is no folder './base'", files={"new.jsonl": lines(texts(1))},
           ready=lambda folder: shutil.rmtree(folder / "base")),
]  # fmt: skip


@pytest.mark.parametrize("case", WORDED, ids=lambda case: case.name)
def test_texts_and_a_base_model(case: Case, worded: Path, tmp_path: Path) -> None:
    shutil.copytree(worded, tmp_path, dirs_exist_ok=True)
    refuse(case, tmp_path)


def test_the_base_model_is_the_one_that_the_store_was_made_for(worded: Path, tmp_path: Path) -> None:
    shutil.copytree(worded / "base", tmp_path / "base")
    made = continual(
        "store", "init", "store", "--model", "./base", "--strategy", "lora", "--text", "text", cwd=tmp_path
    )
    assert made.returncode == 0, made.stderr
    files = {"new.jsonl": lines(texts(1))}
    refuse(option("update store new.jsonl --device cpu", BASE, "made for", files=files, ready=another_base), tmp_path)
