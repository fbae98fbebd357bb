"""Bad input, from the command line: the exit status, one sentence, no traceback, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import study_runner
import torch
from bad_bench import (
    LOGITS,
    STREAM,
    Case,
    FullDisk,
    assert_refused,
    assert_whole,
    csv,
    each,
    lines,
    over,
    refuse,
    rows,
    run,
    stream_case,
    tree,
    write,
)
from filelock import FileLock
from test_cli import continual
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from continual.state import load_state

SOUND = {"train.jsonl": lines(rows()), "test.jsonl": lines(rows(12, 100)), "s.yaml": STREAM}
NUMBERS = {
    "train.jsonl": lines(each(rows(), label=lambda n: n / 7)),
    "test.jsonl": lines(each(rows(12, 100), label=lambda n: n / 7)),
}
TEXTS = {
    "train.jsonl": lines([{"text": f"word {n}", "label": "ab"[n % 2]} for n in range(16)]),
    "test.jsonl": lines([{"text": f"other {n}", "label": "ab"[n % 2]} for n in range(8)]),
}
REGRESSION: dict[str, Any] = {"objective": "regression", "split": {"by": "joint"}, "scenario": "domain"}
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(9 * ['*' + before])}]\n" for before, name in zip("abcdef", "bcdefg", strict=True)
)


@pytest.fixture(autouse=True)
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONTINUAL_DATA", raising=False)


def setting(*values: str, said: tuple[str, ...], strategy: str = "naive", **changes: Any) -> Case:
    argv = run(*[word for value in values for word in ("--set", value)], strategy=strategy)
    return stream_case("set " + " ".join(values), *said, argv=argv, **changes)


def option(*words: str, said: tuple[str, ...], status: int = 1, **named: str) -> Case:
    return Case(" ".join([*words, *named.values()]), run(*words, **named), said, SOUND, status)


def yaml_case(name: str, content: str | bytes, *said: str) -> Case:
    return Case(f"yaml, {name}", run(), ("'s.yaml'", *said), {"s.yaml": content})


def train_file(name: str, content: str | bytes, *said: str) -> Case:
    files = {name: content, "test.jsonl": SOUND["test.jsonl"]}
    return stream_case(f"{name}: {said[0]}", *said, files=files)


NAMES = [
    option(stream="split-digit", said=("unknown stream 'split-digit'", "Did you mean 'split-digits'?")),
    option(strategy="rehersal", said=("unknown strategy 'rehersal'", "Did you mean 'rehearsal'?")),
    option(stream="rehearsal", said=("'rehearsal' is a strategy", "the stream comes first")),
    option(strategy="split-digits", said=("'split-digits' is a stream", "the stream comes first")),
    option(stream="gone.yaml", said=("there is no file 'gone.yaml'", "continual list")),
    option("--scenario", "tasks", said=("'tasks'", "'task', 'domain' or 'class'", "Did you mean 'task'?")),
    option("--device", "gpu", said=("unknown device 'gpu'", "'cpu', 'cuda'")),
    option("--device", "mps", said=("unknown device 'mps'",)),
    option("--precision", "fp8", said=("'training.precision' is 'fp8'", "'fp32' or 'bf16'")),
    option("--track", "nothing", said=("unknown tracker 'nothing'", "installed here")),
    option("--data", "nowhere", said=("no training file was found", "nowhere", "--data")),
    option("--model", "./nowhere", said=("there is no folder './nowhere'", "Hugging Face")),
    option("--model", "no_such:Thing", said=("'no_such:Thing' cannot be imported", "Python path")),
    option("--model", "os:path", said=("'os:path' is not a torch module", "torch.nn.Module")),
    option("--model", "torch.nn:Linear", said=("'torch.nn:Linear' could not be made", "'arguments'")),
    option("--resume", said=("there is no run to resume in 'out'", "leave --resume out")),
    stream_case("unknown source", "unknown source kind 'fils'", "Did you mean 'files'?", source={"kind": "fils"}),
    stream_case("no source", "'source' says no 'kind'", "source: {kind: NAME", source=[]),
    stream_case("unknown split", "unknown split by 'clas'", "Did you mean 'class'?", split={"by": "clas"}),
    stream_case("unknown key", "'s.yaml': unknown key 'scenaro'", "Did you mean 'scenario'?", scenaro="class"),
    stream_case("unknown key inside", "source: unknown key 'lable'", "'label'?", source={"lable": "x"}),
    stream_case("unknown objective", "'objective' is 'classify'", "'classification'?", objective="classify"),
    stream_case("unknown model", "unknown model kind 'mpl'", "Did you mean 'mlp'?", model={"kind": "mpl"}),
    stream_case("unknown model key", "unknown key 'hiden'", "'hidden'?", model={"kind": "mlp", "hiden": [3]}),
    Case("unknown study key", ["study", "s.yaml"], ("unknown key 'seed'", "Did you mean 'seeds'?"),
         {"s.yaml": {"streams": ["split-digits"], "strategies": ["naive"], "seed": 1}}),
    Case("unknown strategy of a study", ["study", "s.yaml"], ("unknown strategy 'niave'", "Did you mean 'naive'?"),
         {"s.yaml": {"streams": ["split-digits"], "strategies": ["niave"]}}),
    Case("unknown part", ["check", "m.yaml"], ("m.yaml", "unknown replay kind 'rehersal'", "'rehearsal'?"),
         {"m.yaml": {"replay": {"kind": "rehersal"}}}),
    Case("unknown part key", ["check", "m.yaml"], ("m.yaml, replay: unknown key 'capcity'", "'capacity'?"),
         {"m.yaml": {"replay": {"kind": "rehearsal", "capcity": 3}}}),
    Case("a part that is none", ["check", "m.yaml"], ("'os:path' is not a part", "continual.parts.Part"),
         {"m.yaml": {"replay": {"kind": "os:path"}}}),
]  # fmt: skip

SETTINGS = [
    setting("training.learning_rate=1", said=("strategy 'naive': unknown key 'learning_rate' in 'training'", "'lr'")),
    setting("training.lr=fast", said=("'training.lr' is 'fast'", "should be a number")),
    setting("training.lr=.inf", said=("'training.lr' is inf", "finite")),
    setting("training.lr=-1", said=("greater than 0",)),
    setting("training.epochs=1.5", said=("'training.epochs' is 1.5", "should be a whole number")),
    setting("training.epochs=yes", said=("'epochs' is True, and should be a number",)),
    setting("training=3", said=("'training' is 3", "should be a mapping of keys to values")),
    setting("training=null", said=("'training' is empty", "should be a mapping")),
    setting("training.lr", said=("has no value", "key=value")),
    setting("=3", said=("has no value", "key=value")),
    setting("training.lr=[1", said=("not valid YAML",)),
    setting("training.lr.x=1", said=("goes below 'lr'",)),
    setting("trainin.lr=1", said=("unknown key 'trainin'", "Did you mean 'training'?")),
    setting("training.optimizer=adm", said=("'sgd', 'adam' or 'adamw'", "Did you mean 'adam'?")),
    setting("training.iterations=3", said=("give epochs or iterations, not both",)),
    setting("replay.capacity=3", said=("'replay' names no kind", "'rehearsal'")),
    setting("replay.capacity=10B", strategy="rehearsal", said=("10 bytes holds no row", "'48B' at least")),
    setting("replay.capacity=lots", strategy="rehearsal", said=("'lots' is no size", "'20MB'")),
    setting("replay.capacity=0", strategy="rehearsal", said=("'capacity' is 0", "greater than 0")),
    setting("replay.storage=memmap", "replay.folder=train.jsonl", strategy="rehearsal",
            said=("could not get", "'train.jsonl'", "storage: cpu")),
    setting("adapter.target=[q_proj]", strategy="lora", said=("'q_proj'", "'layers.0'", "name some of them")),
    setting("adapter.target=[]", strategy="lora", said=("the list is empty", "all-linear")),
    setting("training.early_stopping.patience=1", said=("no valid rows", "leave early_stopping out")),
]  # fmt: skip

USAGE = [
    option("--seed", "one", said=("--seed", "valid integer"), status=2),
    option("--save-every", "0", said=("--save-every", "greater than or equal to 1"), status=2),
    option("--resum", said=("No such option", "--resume"), status=2),
    option("more", said=("unexpected extra argument",), status=2),
    Case("no out", ["run", "s.yaml", "naive"], ("Missing option", "--out"), SOUND, 2),
    Case("no arguments", ["run"], ("Missing argument",), status=2),
    Case("no workers", ["study", "s.yaml", "--workers", "0"], ("--workers",), status=2),
    Case("no such command", ["rum"], ("No such command",), status=2),
    Case("a report of nothing", ["report"], ("Missing argument",), status=2),
]

YAMLS = [
    yaml_case("cut off", "source: {kind: files\nsplit: [", "not valid YAML (line 2, column 6:", "mend it there"),
    yaml_case("a tab", "source:\n\tkind: x\n", "line 2, column 1", "'\\t'"),
    yaml_case("empty", "", "is empty", "'key: value'"),
    yaml_case("a list", "- a\n", "holds a list", "'key: value'"),
    yaml_case("one value", "hello", "holds one value", "'key: value'"),
    yaml_case("two documents", "a: 1\n---\nb: 2\n", "line 2, column 1", "another document"),
    yaml_case("a key twice", "source: {kind: digits}\nsource: {kind: mnist}\n", "line 2", "'source' is there twice"),
    yaml_case("code", "source: !!python/object/apply:os.mkdir ['hacked']\n", "not valid YAML", "constructor"),
    yaml_case("keys that are numbers", "1: 2\n", "'source' is missing"),
    yaml_case("a bomb", BOMB, "values through its aliases", "100000 are allowed"),
    yaml_case("a bomb as a value", f"{BOMB}source: {{kind: files, path: *g}}\n", "values through its aliases"),
    yaml_case("an alias of itself", "source: &a {kind: files, features: *a}\n", "a part of"),
    yaml_case("latin-1", "summary: Grüße\n".encode("latin-1"), "is not UTF-8", "save it as UTF-8"),
    yaml_case("a nul", "a: \0", "not valid YAML", "#x0000"),
    yaml_case("deep", "[" * 1500, "not valid YAML", "nested too deeply"),
    yaml_case("uses itself", "use: s.yaml\n", "leads back to itself"),
    Case("yaml, a folder", run(), ("there is no file 's.yaml'",), {"s.yaml/x": ""}),
    Case("a strategy as a stream", run(), ("the key 'source' is missing",), {"s.yaml": {"training": {"lr": 1}}}),
    Case("a stream as a strategy", run(strategy="s.yaml"), ("the key 'source' is {", "should be text"), SOUND),
    Case("a stream as a study", ["study", "s.yaml"], ("unknown key 'source'", "'streams'"), SOUND),
]

SPLITS = [
    stream_case("size of 0", "'size' is 0", "greater than or equal to 1", split={"by": "class", "size": 0}),
    stream_case("size that is a word", "'size' is 'two'", "a whole number", split={"by": "class", "size": "two"}),
    stream_case("size above the classes", "9 classes into each", "there are 2", split={"by": "class", "size": 9}),
    stream_case("too many classes", "takes 9 classes and there are 2", split={"by": "class", "size": 1, "classes": 9}),
    stream_case("neither size nor groups", "give either 'size' or 'groups'", split={"by": "class"}),
    stream_case("order that is a word", "'order' is 'randm'", "'random'?",
                split={"by": "class", "size": 1, "order": "randm"}),
    stream_case("order that repeats", "names class 'a' twice", "each once",
                split={"by": "class", "size": 1, "order": ["a", "b", "a"]}),
    stream_case("order of others", "unknown class in the split 'z'", "'a', 'b'",
                split={"by": "class", "size": 1, "order": ["a", "z"]}),
    stream_case("order of one", "one class in the whole stream", split={"by": "class", "size": 1, "order": ["a"]}),
    stream_case("groups that repeat", "names class 'a' twice", split={"by": "class", "groups": [["a"], ["a", "b"]]}),
    stream_case("an empty group", "group of the split by class is empty", split={"by": "class", "groups": [["a"], []]}),
    stream_case("domain not named", "needs a domain column", "'source.domain'", split={"by": "domain"}),
    stream_case("time not named", "needs a time column", "'source.time'", split={"by": "time", "periods": 2}),
    stream_case("one class each in domain", "nothing to tell apart", scenario="domain"),
    stream_case("too many periods", "too few different times for 5 periods", train=rows(t=1), test=rows(12, 100, t=1),
                source={"time": "t"}, split={"by": "time", "periods": 5}),
]  # fmt: skip

ROWS = [
    stream_case("no feature column", "'train.jsonl': there is no column 'aa'", "it has 'a', 'b', 'label'", "'a'?",
                source={"features": ["aa", "b"]}),
    stream_case("no label column", "no column 'lable' for labels", "Did you mean 'label'?", source={"label": "lable"}),
    stream_case("no domain column", "no column 'land'", source={"domain": "land"}),
    stream_case("no time column", "no column 'when'", source={"time": "when"}),
    stream_case("no id column", "no column 'key'", source={"id": "key"}),
    stream_case("labels with decimals", "label of row 0 is 0.5", "objective: regression",
                train=each(rows(), label=lambda n: n + 0.5)),
    stream_case("labels that are lists", "label of row 0 is ['a']", train=each(rows(), label=lambda n: ["a"])),
    stream_case("no labels at all", "label of row 0 is None", "a whole number or a name",
                train=each(rows(), label=lambda n: None)),
    stream_case("one label missing", "label of row 3 is None",
                train=each(rows(), label=lambda n: None if n == 3 else "a")),
    stream_case("labels of two kinds", "some parts have strings as labels and others whole numbers",
                test=each(rows(12, 100), label=lambda n: n % 2)),
    stream_case("NaN", "1 rows have features that are NaN or infinite (the first is row 3)", "fill them",
                train=each(rows(), a=lambda n: None if n == 3 else 1.0)),
    stream_case("words as features", "'a' is not numeric", train=each(rows(), a=lambda n: "x")),
    stream_case("uneven features", "the rows of 'a' have different lengths",
                train=each(rows(), a=lambda n: [1.0] * (n % 3 + 1))),
    stream_case("other widths in test", "have 3 inputs", "test rows have 4", train=each(rows(), a=lambda n: [n, 1.0]),
                test=each(rows(12, 100), a=lambda n: [n, 1.0, 2.0])),
    stream_case("one class", "the one class 'a'", "two at least", train=rows(classes=1), test=rows(12, 100, 1)),
    stream_case("a class of the test set only", "class 'c' is in test but has no training rows", test=rows(12, 100, 3)),
    stream_case("an experience without test rows", "experience 'c' has no test rows", train=rows(classes=3)),
    stream_case("an empty experience", "experience 'period 3' has no training rows", "leave it out",
                train=each(rows(), t=lambda n: n % 2), test=each(rows(12, 100), t=lambda n: n),
                source={"time": "t"}, split={"by": "time", "periods": [1, 5]}, scenario="domain"),
    stream_case("a domain of the test set only", "domain 'y' is in test but has no training rows",
                train=rows(d="x"), test=each(rows(12, 100), d=lambda n: "xy"[n % 2]), source={"domain": "d"},
                split={"by": "domain"}, scenario="domain"),
    stream_case("test rows in train", "12 test rows have the same content as training", "overlap: drop",
                test=rows(12, 4)),
    stream_case("ids in train and test", "12 row ids repeat", train=each(rows(), id=lambda n: n),
                test=each(rows(12, 100), id=lambda n: n), source={"id": "id"}),
    stream_case("times that are words", "time column cannot be read", "ISO dates", source={"time": "label"},
                split={"by": "time", "periods": 2}),
    stream_case("regression of words", "labels are not numbers", **REGRESSION),
    stream_case("regression by class", "a split by class needs classes", files=NUMBERS, objective="regression",
                scenario="domain"),
    Case("check of test rows in train", ["check", "s.yaml"], ("12 test rows have the same content",),
         {**SOUND, "test.jsonl": lines(rows(12, 4))}),
]  # fmt: skip

FILES = [
    train_file("train.jsonl", lines(rows()) + "hello\n", "could not be read", "row 24", "mend the file"),
    train_file("train.jsonl", lines(rows())[:-10], "could not be read", "mend the file"),
    train_file("train.jsonl", "[1, 2]\n[3, 4]\n", "could not be read"),
    train_file("train.jsonl", "", "is empty", "give it rows"),
    train_file("train.jsonl", "\n\n", "holds no rows", "give it some"),
    train_file("train.jsonl", lines(rows()) + lines([{"a": "x", "b": 1, "label": "a"}]), "'a' is not numeric"),
    train_file("train.jsonl", lines(rows()) + '{"x": 1}\n', "NaN or infinite (the first is row 24)"),
    train_file("train.jsonl", lines(rows()).replace('"label": "a"', '"label": "ä"').encode("latin-1"), "is not UTF-8"),
    train_file("train.jsonl", bytes(range(256)), "is not UTF-8"),
    train_file("train.csv", csv(rows()).split("\n", 1)[1], "no column 'b'", "first line of a CSV file names"),
    train_file("train.csv", csv(rows()) + "1,2,a,9,9\n", "could not be read", "line 26", "mend the file"),
    train_file("train.csv", csv(rows()) + "1\n", "NaN or infinite (the first is row 24)"),
    train_file("train.csv", "a,b,label\n", "holds no rows"),
    train_file("train.csv", "a,b,label\n1,2,\n3,4,\n", "label of row 0 is None"),
    train_file("train.csv", csv(rows()).replace(",", ";"), "no column 'a': it has 'a;b;label'"),
    train_file("train.csv", csv(rows()).replace(",a\n", ",ä\n").encode("latin-1"), "is not UTF-8", "save it as UTF-8"),
    train_file("train.parquet", b"no parquet", "could not be read", "mend the file"),
    train_file("train.xlsx", b"x", "no training file was found", "'.parquet'", "--data"),
    stream_case("a file of another kind", "'s.yaml' is no file that can be read", "'.csv'", source={"path": "s.yaml"}),
    stream_case("a path out of the folder", "no training file was found for '../../up'", source={"path": "../../up"}),
    stream_case("a named file that is not there", "the test file 'tset.jsonl' was not found",
                source={"train": "train.jsonl", "test": "tset.jsonl"}),
    stream_case("test rows alone", "names no 'train' file", source={"test": "test.jsonl"}),
    stream_case("all rows shared out", "leave no training rows",
                source={"path": "train.jsonl", "shares": {"test": 0.6, "valid": 0.6}}),
]  # fmt: skip

PARTS = [
    stream_case("text with an mlp", "are text and an mlp has no tokenizer", "sentence-transformers", files=TEXTS,
                source={"kind": "files", "path": "."}),
    stream_case("balanced classes of a regression", "class-balanced", "regression", "reservoir", files=NUMBERS,
                argv=run(strategy="rehearsal"), **REGRESSION),
    stream_case("nearest means of a regression", "head/nearest-mean does not work for regression", files=NUMBERS,
                argv=run(strategy="frozen"), **REGRESSION),
    stream_case("an adapter without a linear layer", "no linear layer", "leave the adapter out",
                argv=run(strategy="lora"), model={"kind": "mlp", "hidden": []}),
    stream_case("an adapter and a head on logits", "needs a model that gives features", "take 'mlp'",
                argv=run(strategy="lora"), model={**LOGITS, "arguments": {"in_features": 2, "out_features": 2}}),
    stream_case("a model of another width", "Linear cannot take inputs of shape (2,) a row", "made for",
                model={**LOGITS, "arguments": {"in_features": 3, "out_features": 2}}),
    stream_case("features for a language model", "'features' does not suit the objective 'causal-lm'",
                objective="causal-lm"),
    Case("a model without weights", run("--model", "./m"), ("'m' holds no model.safetensors", "save_pretrained"),
         {**SOUND, "m/config.json": "{}"}),
    Case("a model that is damaged", run("--model", "./m"), ("'m' could not be loaded",),
         {**SOUND, "m/config.json": '{"model_type": "bert"}', "m/model.safetensors": "x"}),
]  # fmt: skip

OUTS = [
    Case("out is a file", run(), ("'out' cannot be made", "another out folder"), {**SOUND, "out": "mine"}),
    Case("out below a file", run("--out", "s.yaml/out"), ("'s.yaml/out' cannot be made",), SOUND),
    Case("out in a place of the system", run("--out", "/proc/none/out"), ("cannot be made",), SOUND),
    Case("a result without its run", run(), ("holds a result of something else",), {**SOUND, "out/result.json": "{}"}),
    Case("run.json cut off", run("--resume"), ("'out/run.json' is damaged",), {**SOUND, "out/run.json": '{"str'}),
    Case("run.json is a list", run("--resume"), ("'out/run.json' is damaged", "another out folder"),
         {**SOUND, "out/run.json": "[]"}),
    Case("run.json of another run", run("--resume"), ("'out' holds another run (stream: empty there",),
         {**SOUND, "out/run.json": "{}"}),
    Case("study into a file", ["study", "t.yaml", "--out", "out"], ("'out' cannot be made or written", "another out folder"),
         {**SOUND, "t.yaml": {"streams": ["s.yaml"], "strategies": ["naive"]}, "out": "mine"}),
    Case("report of an empty folder", ["report", "x"], ("no finished run in 'x'", "result.json"), {"x/y": ""}),
    Case("report of a folder that is not there", ["report", "x"], ("no finished run in 'x'",)),
    Case("report of a result cut off", ["report", "x"], ("'x/result.json' is damaged", "run it again"),
         {"x/result.json": '{"format": 1, "str'}),
    Case("report of an empty result", ["report", "x"], ("'x/result.json' is damaged",), {"x/result.json": ""}),
    Case("report of another format", ["report", "x"], ("has the format 2", "reads format 1"),
         {"x/result.json": '{"format": 2}'}),
    Case("report of half a result", ["report", "x"], ("'x/result.json' is damaged ('stream'",),
         {"x/result.json": '{"format": 1}'}),
]  # fmt: skip

CASES = [*NAMES, *SETTINGS, *USAGE, *YAMLS, *SPLITS, *ROWS, *FILES, *PARTS, *OUTS]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused_in_one_sentence_and_nothing_is_left(case: Case, tmp_path: Path) -> None:
    refuse(case, tmp_path)


def test_the_stream_that_the_cases_spoil_is_sound(tmp_path: Path) -> None:
    write(tmp_path, SOUND)
    assert continual("check", "s.yaml", cwd=tmp_path).returncode == 0
    done = continual(*run(), cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert_whole(tmp_path / "out")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_where_there_is_none(tmp_path: Path) -> None:
    refuse(
        option("--device", "cuda", said=("'cuda' was asked for", "0 CUDA devices", "take 'cpu' or 'auto'")), tmp_path
    )
    study = {"t.yaml": {"streams": ["s.yaml"], "strategies": ["naive"]}}
    argv = ["study", "t.yaml", "--out", "out", "--device", "cuda"]
    write(tmp_path, {**SOUND, **study})
    assert_refused(continual(*argv, cwd=tmp_path), 1, ("'cuda' was asked for", "take 'cpu' or 'auto'"))


# A folder that holds a run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    write(folder, SOUND)
    assert continual(*run(), cwd=folder).returncode == 0
    return folder


def unfinished(folder: Path) -> None:
    (folder / "out" / "result.json").unlink()


def spoil(name: str, change: str) -> Any:
    def ready(folder: Path) -> None:
        unfinished(folder)
        path = folder / "out" / "checkpoint" / name
        if change == "gone":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:-9] if change == "cut" else b"")

    return ready


def checkpoint_of(*argv: str, **named: str) -> Any:
    """Puts the checkpoint of another run into the folder."""

    def ready(folder: Path) -> None:
        unfinished(folder)
        other = continual(*run("--out", "other", *argv, **named), cwd=folder)
        assert other.returncode == 0, other.stderr
        shutil.rmtree(folder / "out" / "checkpoint")
        (folder / "other" / "checkpoint").rename(folder / "out" / "checkpoint")
        shutil.rmtree(folder / "other")

    return ready


WIDER = {"m.yaml": over(STREAM, name="s", model={"kind": "mlp", "hidden": [7]})}
DAMAGE = {"cut": "differs", "gone": "is missing", "empty": "differs"}
SEAL = {"cut": "is damaged", "gone": "holds no saved state", "empty": "is damaged"}
HELD = [
    Case("the same again", run(), ("holds this run already", "add --resume")),
    Case("another seed", run("--seed", "1", "--resume"), ("holds another run (seed: 0 there, 1 asked for)",)),
    Case("another strategy", run("--resume", strategy="ewc"), ("strategy: 'naive[", "there, 'ewc[", "asked for")),
    Case("another stream", run("--resume", stream="split-digits"), ("stream: 's' there, 'split-digits' asked for",)),
    Case("other settings", run("--set", "training.lr=0.5", "--resume"), ("training.lr=0.5]' asked for",)),
    Case("other rows", run("--resume"), ("stream 's', but its settings or rows differ",),
         {"train.jsonl": lines(rows(30))}),
    Case("another model", run("--model", "mlp", "--resume"), ("'mlp' asked for", "another out folder")),
    Case("a result cut off", run("--resume"), ("'out/result.json' is damaged", "delete it and resume"),
         {"out/result.json": '{"format": 1, "stre'}),
    Case("a result that is a list", run("--resume"), ("'out/result.json' is damaged",), {"out/result.json": "[]"}),
    Case("a result that is nothing", run("--resume"), ("'out/result.json' has the format None",),
         {"out/result.json": "{}"}),
    *[Case(f"checkpoint {name} {change}", run("--resume"), (name, said, "delete 'out/checkpoint' and resume"),
           ready=spoil(name, change))
      for name in ("tensors.safetensors", "state.json") for change, said in DAMAGE.items()],
    *[Case(f"checkpoint seal {change}", run("--resume"), (said, "delete 'out/checkpoint' and resume"),
           ready=spoil("seal.json", change))
      for change, said in SEAL.items()],
    Case("checkpoint of another strategy", run("--resume"), ("belongs to another strategy", "another out folder"),
         ready=checkpoint_of(strategy="rehearsal")),
    Case("checkpoint of another seed", run("--resume"), ("belongs to another seed (saved '5', given '0')",),
         ready=checkpoint_of("--seed", "5")),
    Case("checkpoint of another stream", run("--resume"), ("belongs to another stream", "another out folder"),
         ready=checkpoint_of("--scenario", "task")),
    Case("checkpoint of another model", run("--resume"), ("is of another model", "'hidden': [7]", "'hidden': [4]"),
         WIDER, ready=checkpoint_of(stream="m.yaml")),
    Case("a report below a file", ["report", "out", "--out", "s.yaml/p.html"], ("'s.yaml/p.html' could not be written",)),
    Case("a report into a folder", ["report", "out", "--out", "d"], ("'d' could not be written",), {"d/x": ""}),
    Case("a report of one run twice", ["report", "out", "copy"], ("are both 's' with 'naive[training.epochs=1]' and seed 0",),
         ready=lambda folder: shutil.copytree(folder / "out", folder / "copy")),
]  # fmt: skip


@pytest.mark.parametrize("case", HELD, ids=lambda case: case.name)
def test_a_folder_that_holds_a_run_is_left_as_it_was(case: Case, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "held"
    shutil.copytree(finished, folder)
    refuse(case, folder)


def test_what_a_killed_run_left_is_swept_and_the_run_goes_on(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "held"
    shutil.copytree(finished, folder)
    out = folder / "out"
    unfinished(folder)
    whole = tree(out / "checkpoint")
    write(out, {".run.json.12ab34cd.tmp": "{", ".checkpoint.12ab34cd.tmp/tensors.safetensors": "x", ".scores.tmp": "x"})
    (out / "checkpoint").rename(out / ".checkpoint.99aa88bb.old")
    done = continual(*run("--resume"), cwd=folder)
    assert done.returncode == 0, done.stderr
    assert_whole(out)
    assert tree(out / "checkpoint") == whole
    found, expected = (json.loads((at / "out" / "result.json").read_text()) for at in (folder, finished))
    assert found["matrix"] == expected["matrix"]


def save_base(folder: Path, seed: int) -> None:
    """A small BERT with a tokenizer of words, its weights drawn by ``seed``."""
    words = {word: place for place, word in enumerate(["[PAD]", "[UNK]", "word", "other", *map(str, range(16))])}
    rules = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=rules, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=16, **sizes)).save_pretrained(folder)


def test_a_checkpoint_on_another_base_model(tmp_path: Path) -> None:
    write(tmp_path, {**TEXTS, "s.yaml": over(STREAM, source={"kind": "files", "path": "."}, model="./base")})
    save_base(tmp_path / "base", seed=0)
    assert continual(*run(strategy="lora"), cwd=tmp_path).returncode == 0
    unfinished(tmp_path)
    save_base(tmp_path / "base", seed=1)
    said = ("the base model has SHA-256", "the state was made on", "give the same base model")
    refuse(Case("another base", run("--resume", strategy="lora"), said), tmp_path)


@pytest.mark.parametrize("command", ["run", "study"])
def test_a_folder_that_another_process_writes(command: str, tmp_path: Path) -> None:
    study = {"streams": ["s.yaml"], "strategies": ["naive"]}
    write(tmp_path, {**SOUND, "t.yaml": study, "out/.lock": ""})
    argv = run() if command == "run" else ["study", "t.yaml", "--out", "out"]
    with FileLock(tmp_path / "out" / ".lock"):
        refuse(Case(command, argv, ("'out'", "another", "wait for it")), tmp_path)


def test_a_training_that_fails_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, SOUND)
    argv = run("--set", "training.lr=1.0e+30", "--set", "training.epochs=null", "--set", "training.iterations=20")
    said = ("the loss is not finite", "rows", "lower training.lr")
    assert_refused(continual(*argv, cwd=tmp_path), 1, said)
    assert_whole(tmp_path / "out")
    held = tree(tmp_path / "out")
    assert {"run.json", "checkpoint/seal.json"} <= set(held) and "result.json" not in held
    assert_refused(continual(*argv, "--resume", cwd=tmp_path), 1, said)
    assert tree(tmp_path / "out") == held


def test_a_cell_that_fails_costs_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fails = {"use": "naive", "name": "fails", "set": {"training.lr": 1.0e30}}
    study = {"streams": ["s.yaml"], "strategies": [fails, "naive"], "training": {"epochs": 20}}
    write(tmp_path, {**SOUND, "t.yaml": study})
    monkeypatch.setattr("continual.study.run.Worker", study_runner.Here)
    done = continual("study", "t.yaml", "--out", "out", "--device", "cpu", cwd=tmp_path)
    said = assert_refused(done, 1, ("s/fails/seed-0 failed: the loss is not finite", "lower training.lr"))
    cell = tmp_path / "out" / "s" / "fails" / "seed-0"
    assert (cell / "error.txt").read_text().strip() in said and "1 of 2 cells done" in done.stdout
    assert (tmp_path / "out" / "s" / "naive" / "seed-0" / "result.json").is_file()
    assert_whole(tmp_path / "out")


# A full disk


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each strategy that met no trouble, with the names of the files that it wrote."""
    found = {}
    for strategy in ("naive", "lora"):
        folder = tmp_path_factory.mktemp(strategy)
        write(folder, SOUND)
        with pytest.MonkeyPatch.context() as patch:
            disk = FullDisk(patch, folder / "out", room=1000)
            assert continual(*run(strategy=strategy), cwd=folder).returncode == 0
        (folder / "written.json").write_text(json.dumps(disk.written))
        found[strategy] = folder
    return found


@pytest.mark.parametrize(
    ("strategy", "room"), [*[("naive", n) for n in range(12)], *[("lora", n) for n in range(8, 12)]]
)
def test_a_disk_that_is_full_at_any_file(strategy: str, room: int, uncut: dict[str, Path], tmp_path: Path) -> None:
    written = json.loads((uncut[strategy] / "written.json").read_text())
    assert room < len(written)
    write(tmp_path, SOUND)
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        FullDisk(patch, out, room)
        done = continual(*run(strategy=strategy), cwd=tmp_path)
    assert_refused(done, 1, ("No space left on device", "written", "free some space"))
    assert_whole(out)
    resume = ["--resume"] if (out / "run.json").exists() else []
    done = continual(*run(*resume, strategy=strategy), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_whole(out)
    expected = uncut[strategy] / "out"
    assert set(tree(out)) == set(tree(expected))
    name = "checkpoint/tensors.safetensors"
    assert (out / name).read_bytes() == (expected / name).read_bytes()


def test_a_full_disk_is_met_at_every_file_of_a_run(uncut: dict[str, Path]) -> None:
    naive, lora = (json.loads((uncut[name] / "written.json").read_text()) for name in ("naive", "lora"))
    assert len(naive) == 12 and len(lora) == 16
    assert lora[8:12] == ["adapter_model.safetensors", "adapter_config.json", "continual.json", "seal.json"]


def test_a_disk_that_takes_files_and_cannot_flush_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(tmp_path, SOUND)
    calls = []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 6:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    assert_refused(continual(*run(), cwd=tmp_path), 1, ("Input/output error", "free some space"))
    assert_whole(tmp_path / "out")
    assert (tmp_path / "out" / "checkpoint" / "seal.json").is_file()


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from continual.cli import main
main()
"""
DIGITS = ["run", "split-digits", "naive", "--out", "out", "--device", "cpu", "--set", "training.epochs=1"]


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    pytest.importorskip("resource", reason="this system has no limits on files")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *DIGITS], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.startswith("continual: ") and len(done.stderr.splitlines()) == 1
    assert "File too large" in done.stderr and "free some space or name another folder" in done.stderr
    assert tree(tmp_path) == {}


def test_a_small_file_system(tmp_path: Path) -> None:
    """A real one of 600 kB, in a mount namespace that goes with the process: the second checkpoint has no room beside the first."""
    (tmp_path / "small").mkdir()
    mount = "mount -t tmpfs -o size=600k tmpfs small 2>&1 || exit 77; cd small; "
    try:
        able = subprocess.run(["unshare", "-rm", "sh", "-c", f"{mount} true"], cwd=tmp_path, capture_output=True)
    except OSError:
        able = None
    if able is None or able.returncode != 0:
        pytest.skip("no small file system can be mounted here")
    script = f'{mount} "$@"; echo "status $?" >&2; cp -r out ../copy'
    command = ["unshare", "-rm", "sh", "-c", script, "sh", sys.executable, "-m", "continual.cli", *DIGITS]
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=paths)
    said = done.stderr.splitlines()
    assert len(said) == 2 and said[1] == "status 1", done.stderr
    assert said[0].startswith("continual: the state could not be written") and "No space left on device" in said[0]
    assert_whole(tmp_path / "copy")
    assert load_state(tmp_path / "copy" / "checkpoint")["updates"] == 1


@pytest.mark.parametrize("name", ["a file", "a full disk"])
def test_a_cache_that_cannot_be_written(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CONTINUAL_CACHE", str(tmp_path / "cache"))
    write(tmp_path, {**SOUND, **({"cache": "mine"} if name == "a file" else {})})
    if name == "a full disk":
        import datasets

        def full(*given: Any, **named: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(datasets.Dataset, "from_json", full)
    before = tree(tmp_path)
    assert_refused(continual(*run(), cwd=tmp_path), 1, ("into the cache", "CONTINUAL_CACHE", "free some space"))
    assert tree(tmp_path) == before


# What nobody foresaw


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            KeyError("no\nsuch thing"),
            "it stopped with an error of its own (KeyError: 'no\\nsuch thing'): the traceback",
        ),
        (RuntimeError("a\nb"), "it stopped with an error of its own (RuntimeError: a b): the traceback"),
        (PermissionError(13, "Permission denied", "x"), "the system refused something (PermissionError: [Errno 13]"),
        (MemoryError("all of it"), "not enough memory (MemoryError: all of it): lower training.batch_size"),
        (torch.OutOfMemoryError("CUDA out of memory"), "not enough memory (OutOfMemoryError: CUDA out of memory)"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"), "not enough memory"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_an_error_of_ours_is_one_sentence_too(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(*given: Any, **named: Any) -> None:
        raise error

    monkeypatch.setattr("continual.run.run_cell", fails)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    text = assert_refused(continual(*run(), cwd=tmp_path), 1, (said,))
    left = list(tmp_path.iterdir())
    if "memory" in said:
        assert left == []
    else:
        assert str(left[0]) in text and type(error).__name__ in left[0].read_text() and "fails" in left[0].read_text()
