"""Studies: what a file asks for, and that cells are run once, resumed, reported and kept apart."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import study_runner
import yaml
from test_cli import continual

from continual.errors import SpecError, StateError
from continual.report import load_result
from continual.spec import parse
from continual.streams.stream import Stream
from continual.study import Study, StudySpec, run_study
from continual.study.worker import message_of

RUNNER = "study_runner:run"
STREAM = {"source": {"kind": "digits"}, "split": {"by": "class", "size": 2}, "scenario": "class"}
NAMES = ("good", "refused", "broken", "killed", "interrupts", "traced", "sleeps")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with streams and strategies beside the study."""
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(STREAM))
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({**STREAM, "name": "second"}))
    for name in NAMES:
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"training": {"lr": 0.1}}))
    return tmp_path


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells run in this process, which saves the start of another."""
    monkeypatch.setattr("continual.study.run.Worker", study_runner.Here)


def _study(place: Path, **content: Any) -> Study:
    (place / "study.yaml").write_text(yaml.safe_dump(content))
    return Study.load(place / "study.yaml")


def _table(place: Path, factor: float = 1.0) -> None:
    lines = [f"{row / 9},{factor * row},{'early' if row < 20 else 'late'}" for row in range(40)]
    place.mkdir(parents=True, exist_ok=True)
    for part in ("train", "test"):
        rows = [f"{part == 'test'},{line}" for line in lines]
        (place / f"{part}.csv").write_text("\n".join(["part,x,y,when", *rows]), encoding="utf-8")


def _tabular(place: Path, order: str = "given") -> dict[str, Any]:
    """A regression on two domains of a CSV table in ``place/rows``."""
    _table(place / "rows")
    source = {"kind": "files", "train": "train.csv", "test": "test.csv", "features": ["part", "x"], "label": "y"}
    stream = {"source": {**source, "domain": "when"}, "split": {"by": "domain", "order": order}}
    stream |= {"scenario": "domain", "objective": "regression"}
    (place / "table.yaml").write_text(yaml.safe_dump(stream))
    return {"streams": ["table.yaml"], "data": {"table": "rows"}}


def _finish(study: Study, out: Path, data: Path, *, older: bool = False) -> None:
    """Every cell finished in this process; ``older`` writes ``cell.json`` as versions did that hashed data and device."""
    for cell in study.cells():
        folder = out / cell.label
        folder.mkdir(parents=True)
        given = {"data": data, "model": cell.model, "overrides": cell.overrides}
        name = {"strategy_name": cell.strategy}
        study_runner.run(
            cell.stream_source, cell.strategy_source, seed=cell.seed, out=folder, resume=False, **name, **given
        )
        settings = {**cell.settings, "seed": cell.seed}
        if older:
            settings |= {"device": "cuda:7", "data": "/somewhere/else"}
        text = json.dumps(settings, sort_keys=True)
        content = {"settings": settings, "sha256": hashlib.sha256(text.encode()).hexdigest()}
        content |= {"stream": cell.stream, "strategy": cell.strategy, "seed": cell.seed}
        (folder / "cell.json").write_text(json.dumps(content))


def _calls(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]


def test_cells_are_the_product_in_order(place: Path) -> None:
    study = _study(place, streams=["one.yaml", "two.yaml"], strategies=["good.yaml"], seeds=[3, 1])
    labels = [cell.label for cell in study.cells()]
    assert labels == ["one/good/seed-3", "one/good/seed-1", "second/good/seed-3", "second/good/seed-1"]
    assert study.name == place.name


def test_groups_inherit_and_narrow(place: Path) -> None:
    study = _study(
        place,
        seeds=[0, 1],
        model="mlp",
        training={"lr": 0.2, "epochs": 2},
        set={"training.batch_size": 8},
        groups=[
            {"streams": ["one.yaml"], "strategies": ["good.yaml"], "training": {"lr": 0.3}},
            {
                "streams": [{"use": "one.yaml", "name": "renamed", "scenario": "task"}],
                "strategies": [{"use": "good.yaml", "name": "mine", "set": {"training.batch_size": 4}}],
                "seeds": [7],
                "model": "some/model",
            },
        ],
    )
    first, _, last = study.cells()
    assert first.overrides == {"training.lr": 0.3, "training.epochs": 2, "training.batch_size": 8}
    assert (first.model, first.stream_source) == ("mlp", str(place / "one.yaml"))
    assert last.label == "renamed/mine/seed-7" and last.model == "some/model"
    assert last.overrides == {"training.lr": 0.2, "training.epochs": 2, "training.batch_size": 4}
    assert last.stream_source == {"use": str(place / "one.yaml"), "scenario": "task", "name": "renamed"}


def test_names_of_the_library_are_found(tmp_path: Path) -> None:
    study = _study(tmp_path, streams=["split-digits"], strategies=["naive"])
    assert [cell.label for cell in study.cells()] == ["split-digits/naive/seed-0"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"streams": ["split-digit"], "strategies": ["naive"]}, "Did you mean 'split-digits'?"),
        ({"streams": ["one.yaml"], "strategies": ["naiv"]}, "Did you mean 'naive'?"),
        ({"streams": ["one.yaml"], "strategies": ["gone.yaml"]}, "there is no file 'gone.yaml'"),
        ({"streams": ["one.yaml"], "strategies": ["good.yaml"], "seed": [0]}, "Did you mean 'seeds'?"),
        ({"streams": ["one.yaml"], "strategies": [{"use": "good.yaml", "sets": {}}]}, "Did you mean 'set'?"),
        (
            {"streams": [{"use": "one.yaml", "scenari": "task"}], "strategies": ["good.yaml"]},
            "Did you mean 'scenario'?",
        ),
        ({"streams": [{"name": "x"}], "strategies": ["good.yaml"]}, "the key 'streams.0.use' is missing"),
        ({"streams": ["one.yaml"], "strategies": ["good.yaml"], "training": {"lrr": 1}}, "Did you mean 'lr'?"),
        ({"streams": ["one.yaml"], "strategies": ["good.yaml"], "set": {"replai.x": 1}}, "Did you mean 'replay'?"),
        ({"streams": ["one.yaml"], "strategies": ["good.yaml"], "seeds": [-1]}, "seeds.0"),
        ({"streams": ["one.yaml"], "strategies": ["good.yaml"], "seeds": []}, "seeds"),
        ({"streams": ["one.yaml"], "strategies": ["good.yaml"], "seeds": [1, 1]}, "two cells called 'one/good/seed-1'"),
        ({"streams": ["one.yaml"], "strategies": ["good.yaml"], "data": {"on": "x"}}, "Did you mean 'one'?"),
        ({"streams": ["one.yaml"], "strategies": [{"use": "good.yaml", "name": "../up"}]}, "cannot be a folder"),
        ({"streams": ["one.yaml"]}, "streams and strategies come together"),
        ({"summary": "nothing"}, "it names nothing to run"),
    ],
)
def test_what_a_study_cannot_say(place: Path, content: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=re.escape(said)) as caught:
        _study(place, **content)
    assert "study" in str(caught.value) and "\n" not in str(caught.value)


def test_the_schema_takes_names_and_mappings() -> None:
    choice = StudySpec.model_json_schema()["$defs"]["StrategyChoice"]["anyOf"]
    assert choice[0] == {"type": "string"} and set(choice[1]["properties"]) == {"use", "name", "set"}


def test_where_the_data_of_a_stream_lie(place: Path) -> None:
    study = _study(place, streams=["one.yaml", "two.yaml"], strategies=["good.yaml"], data={"one": "rows"})
    one, two = study.cells()
    assert (study.data_folder(one, None), study.data_folder(two, None)) == (place / "rows", None)
    (over,) = _study(place, streams=[{"use": "two.yaml", "name": "more"}], strategies=["good.yaml"]).cells()
    assert study.data_folder(over, None) is None
    assert study.data_folder(two, place) == place
    (place / "all" / "one").mkdir(parents=True)
    assert study.data_folder(one, place / "all") == place / "all" / "one"


def test_failures_stop_no_other_cell_and_a_second_call_goes_on(place: Path) -> None:
    names = ["refused", "good", "killed", "broken"]
    study = _study(place, summary="Some fail.", streams=["one.yaml"], strategies=[f"{name}.yaml" for name in names])
    out = place / "out"
    outcomes = {one.cell.strategy: one for one in run_study(study, out, 2, runner=RUNNER)}
    assert list(outcomes) == names
    assert {name: one.status for name, one in outcomes.items()} == {"good": "done"} | dict.fromkeys(
        (name for name in names if name != "good"), "failed"
    )
    folder = out / "one"
    assert outcomes["refused"].message == "the loss is not finite at step 41: lower training.lr."
    assert (folder / "refused/seed-0/error.txt").read_text() == outcomes["refused"].message + "\n"
    assert "TrainingError" in (folder / "refused/seed-0/traceback.txt").read_text()
    assert "KeyError: 'no such thing'" in outcomes["broken"].message
    assert "killed by the system" in outcomes["killed"].message
    assert (folder / "good/seed-0/log.txt").read_text() == "printed by the run\n"

    content = json.loads((out / "study.json").read_text())
    assert [cell["status"] for cell in content["cells"]] == ["failed", "done", "failed", "failed"]
    assert {"commit", "versions", "hardware"} <= set(content)
    page = (out / "report.html").read_text()
    assert "the loss is not finite at step 41" in page and "75.0" in page and "Some fail." in page
    assert "| one" in (out / "report.md").read_text() and "one,good,0" in (out / "results.csv").read_text()

    fewer = _study(place, streams=["one.yaml"], strategies=["good.yaml", "killed.yaml"])
    assert [one.status for one in run_study(fewer, out, 2, runner=RUNNER)] == ["skipped", "done"]
    assert [call["resume"] for call in _calls(folder / "good/seed-0")] == [False]
    assert [call["resume"] for call in _calls(folder / "killed/seed-0")] == [False, True]
    assert not (folder / "killed/seed-0/error.txt").exists()
    assert "Failed" not in (out / "report.md").read_text()


def test_a_run_that_leaves_its_process_is_a_failure(tmp_path: Path) -> None:
    future: Future[str] = Future()
    future.set_exception(SystemExit(3))
    assert message_of(future, tmp_path) == "its process could not go on (SystemExit: 3)."
    assert (tmp_path / "error.txt").read_text() == "its process could not go on (SystemExit: 3).\n"


def test_what_the_runner_is_given_and_other_settings_do_not_overwrite(place: Path) -> None:
    given = {"streams": [{"use": "one.yaml", "name": "x"}], "strategies": [{"use": "good.yaml", "name": "mine"}]}
    out = place / "out"
    run_study(_study(place, **given, set={"training.lr": 0.5}), out, data=place, runner=RUNNER, device="cpu")
    (call,) = _calls(out / "x/mine/seed-0")
    assert call == {
        "stream": {"use": str(place / "one.yaml"), "name": "x"},
        "strategy": str(place / "good.yaml"),
        "seed": 0,
        "resume": False,
        "data": str(place),
        "model": None,
        "device": "cpu",
        "overrides": {"training.lr": 0.5},
        "progress": False,
    }
    changed = _study(place, **given, set={"training.lr": 0.6})
    (outcome,) = run_study(changed, out, data=place, runner=RUNNER, device="cpu")
    assert outcome.status == "done" and len(_calls(out / "x/mine/seed-0")) == 1
    (aside,) = (out / "x/mine").glob(".seed-0.*.replaced")
    assert _calls(aside)[0]["overrides"] == {"training.lr": 0.5}


def test_an_interrupt_leaves_what_is_there_and_the_study_goes_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OF_THE_STUDY", str(os.getpid()))
    study = _study(place, streams=["one.yaml"], strategies=["interrupts.yaml", "good.yaml"])
    out = place / "out"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            run_study(study, out, 1, runner=RUNNER)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not (out / "one/good/seed-0/result.json").exists()
    rest = _study(place, streams=["one.yaml"], strategies=["interrupts.yaml"])
    assert [one.status for one in run_study(rest, out, 2, runner=RUNNER)] == ["done"]
    assert [call["resume"] for call in _calls(out / "one/interrupts/seed-0")] == [False, True]


def test_a_folder_of_something_else_is_left_alone(place: Path) -> None:
    study = _study(place, streams=["one.yaml"], strategies=["good.yaml"])
    folder = place / "out/one/good/seed-0"
    folder.mkdir(parents=True)
    (folder / "mine.txt").write_text("precious")
    (outcome,) = run_study(study, place / "out", runner=RUNNER)
    assert outcome.status == "failed" and "holds files that no study wrote" in outcome.message
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
    (folder / "cell.json").write_text("{")
    (outcome,) = run_study(study, place / "out", runner=RUNNER)
    assert "cell.json' is damaged" in outcome.message


def test_out_that_cannot_be_written(place: Path) -> None:
    study = _study(place, streams=["one.yaml"], strategies=["good.yaml"])
    (place / "file").write_text("")
    with pytest.raises(StateError, match="cannot be made or written"):
        run_study(study, place / "file" / "out", runner=RUNNER)


def test_a_mapping_is_a_study_too() -> None:
    spec = parse(StudySpec, {"streams": ["split-digits"], "strategies": ["naive"]}, "here")
    assert len(Study(spec).cells()) == 1


@pytest.mark.parametrize("older", [False, True])
def test_a_finished_cell_is_known_wherever_its_data_lie(place: Path, older: bool) -> None:
    study = _study(place, **_tabular(place), strategies=["traced.yaml"])
    _finish(study, place / "out", place / "rows", older=older)
    shutil.copytree(place / "rows", place / "elsewhere" / "table")
    for data, device in ((None, "auto"), (place / "elsewhere", "cpu")):
        (outcome,) = run_study(study, place / "out", data=data, runner=RUNNER, device=device)
        assert (outcome.status, outcome.message) == ("skipped", "")
    assert len(_calls(place / "out/table/traced/seed-0")) == 1


def test_a_cell_of_a_version_with_fewer_settings_is_known(place: Path, here: None) -> None:
    study = _study(place, **_tabular(place), strategies=["traced.yaml"])
    out = place / "out"
    _finish(study, out, place / "rows", older=True)
    folder = out / "table/traced/seed-0"
    cell, result = (json.loads((folder / name).read_text()) for name in ("cell.json", "result.json"))
    del cell["settings"]["stream"]["source"]["overlap"]
    del result["provenance"]["settings"]["training"]["warmup"]
    cell["settings"]["strategy"] = result["provenance"]["strategy_fingerprint"] = "as it was without warmup"
    (folder / "cell.json").write_text(json.dumps(cell)), (folder / "result.json").write_text(json.dumps(result))
    (outcome,) = run_study(study, out, runner=RUNNER)
    assert outcome.status == "skipped"
    result["provenance"]["settings"]["training"]["lr"] = 0.2
    (folder / "result.json").write_text(json.dumps(result))
    (outcome,) = run_study(study, out, runner=RUNNER)
    assert outcome.status == "done" and "its settings have changed since it was run" in outcome.message


def test_rows_that_changed_are_run_again(place: Path, here: None) -> None:
    given = {**_tabular(place), "strategies": ["traced.yaml"]}
    out = place / "out"
    _finish(_study(place, **given, seeds=[0]), out, place / "rows")
    before = (out / "table/traced/seed-0/result.json").read_bytes()
    _table(place / "rows", factor=3.0)
    outcomes = run_study(_study(place, **given, seeds=[0, 1]), out, 2, runner=RUNNER)
    assert [one.status for one in outcomes] == ["done", "done"]
    (aside,) = (out / "table/traced").glob(".seed-0.*.replaced")
    assert (aside / "result.json").read_bytes() == before
    assert "its data have changed since it was run" in outcomes[0].message and str(aside) in outcomes[0].message
    assert outcomes[1].message == ""
    first, second = (load_result(out / f"table/traced/seed-{seed}").provenance for seed in (0, 1))
    assert first.stream_fingerprint == second.stream_fingerprint
    assert "its data have changed" in (out / "study.json").read_text()


def test_a_run_that_was_cut_off_does_not_go_on_with_other_rows(place: Path, here: None) -> None:
    study = _study(place, **_tabular(place), strategies=["traced.yaml"])
    _finish(study, place / "out", place / "rows")
    folder = place / "out/table/traced/seed-0"
    fingerprint = load_result(folder).provenance.stream_fingerprint
    (folder / "result.json").unlink()
    (folder / "run.json").write_text(json.dumps({"stream_fingerprint": fingerprint}))
    _table(place / "rows", factor=3.0)
    (outcome,) = run_study(study, place / "out", runner=RUNNER)
    assert outcome.status == "done" and "its data have changed" in outcome.message
    assert [call["resume"] for call in _calls(folder)] == [False]


def test_another_base_model_of_the_same_name_is_run_again(place: Path, here: None) -> None:
    model = place / "base"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    study = _study(place, **_tabular(place), strategies=["traced.yaml"], model=str(model))
    _finish(study, place / "out", place / "rows")
    (outcome,) = run_study(study, place / "out", runner=RUNNER)
    assert outcome.status == "skipped"
    (model / "model.safetensors").write_bytes(b"other weights")
    (outcome,) = run_study(study, place / "out", runner=RUNNER)
    assert outcome.status == "done" and "its base model has changed since it was run" in outcome.message
    shutil.rmtree(model)
    (outcome,) = run_study(study, place / "out", runner=RUNNER)
    assert (outcome.status, outcome.message) == ("skipped", "")


def test_data_that_cannot_be_read_leave_what_is_finished(place: Path) -> None:
    study = _study(place, **_tabular(place), strategies=["traced.yaml"])
    _finish(study, place / "out", place / "rows")
    shutil.rmtree(place / "rows")
    (outcome,) = run_study(study, place / "out", runner=RUNNER)
    assert outcome.status == "skipped" and "could not be compared with what is there now" in outcome.message


@pytest.mark.parametrize(("order", "loads"), [("given", 1), ("random", 2)])
def test_the_rows_of_many_cells_are_read_once(
    place: Path, monkeypatch: pytest.MonkeyPatch, order: str, loads: int
) -> None:
    (place / "traced-too.yaml").write_text(yaml.safe_dump({"training": {"lr": 0.2}}))
    given = {**_tabular(place, order), "strategies": ["traced.yaml", "traced-too.yaml"], "seeds": [0, 1]}
    study = _study(place, **given)
    _finish(study, place / "out", place / "rows")
    read, load = [], Stream.load

    def counting(*stream: Any, **options: Any) -> Stream:
        read.append(options["seed"])
        return load(*stream, **options)

    monkeypatch.setattr(Stream, "load", counting)
    outcomes = run_study(study, place / "out", runner=RUNNER)
    assert [one.status for one in outcomes] == ["skipped"] * 4
    assert len(read) == loads


def test_what_is_imported_ahead_looks_for_no_gpu_and_starts_no_thread_of_its_own() -> None:
    lines = (
        "import importlib, os, torch",
        "def asked(*_): raise SystemExit('a GPU was looked for')",
        "torch.cuda.device_count = torch.cuda.is_available = torch._C._cuda_getDeviceCount = torch._C._cuda_init = asked",
        "from continual.study.worker import PRELOAD",
        "for name in PRELOAD: importlib.import_module(name)",
        "assert not os.path.isdir('/proc/self/task') or len(os.listdir('/proc/self/task')) == 1",
    )
    one = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # BLAS ends its threads before a fork by itself
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, env={**os.environ, **one}
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="cells are forked on Linux only")
def test_forked_cells_are_processes_of_their_own_which_draw_apart(place: Path) -> None:
    study = _study(place, streams=["one.yaml"], strategies=["good.yaml"], seeds=[0, 1, 2])
    for workers in (1, 2):
        out = place / str(workers)
        run_study(study, out, workers, runner="study_runner:environment", progress=False, device="cpu")
        found = [json.loads((out / f"one/good/seed-{seed}/process.json").read_text()) for seed in (0, 1, 2)]
        assert len({one["pid"] for one in found}) == 3
        assert len({one["parent"] for one in found}) == workers < 3, "which imported once for several"
        assert len({draw for one in found for draw in one["draws"]}) == 9


@pytest.mark.skipif(sys.platform != "linux", reason="cells are forked on Linux only")
def test_a_cell_ends_with_the_study(place: Path) -> None:
    _study(place, streams=["one.yaml"], strategies=["sleeps.yaml"])
    lines = (
        "from pathlib import Path",
        "from continual.study import Study, run_study",
        "if __name__ == '__main__':",
        f"    run_study(Study.load({str(place / 'study.yaml')!r}), Path({str(place / 'out')!r}), runner={RUNNER!r}, device='cpu')",
    )
    (place / "script.py").write_text("\n".join(lines), encoding="utf-8")
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    script = subprocess.Popen([sys.executable, "script.py"], cwd=place, env={**os.environ, "PYTHONPATH": paths})
    started = place / "out/one/sleeps/seed-0/pid"
    try:
        _until(lambda: started.is_file() and bool(started.read_text()))
    finally:
        script.kill()
        script.wait()
    _until(lambda: not Path("/proc", started.read_text()).exists())


@pytest.mark.skipif(sys.platform != "linux", reason="cells are forked on Linux only")
def test_cells_leave_nothing_behind_in_the_system(tmp_path: Path) -> None:
    study = {"streams": ["split-digits"], "strategies": ["naive"], "training": {"epochs": 1}, "seeds": [0, 1]}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    command = [sys.executable, "-m", "continual.cli", "study", "study.yaml", "--out", "out", "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "2 of 2 cells done" in done.stdout
    assert "leaked" not in done.stderr and "Traceback" not in done.stderr


def _until(holds: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds} seconds"
        time.sleep(0.05)


def test_a_cell_sees_the_environment_of_now(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = _study(place, streams=["one.yaml"], strategies=["good.yaml"])
    for value in ("first", "second"):
        monkeypatch.setenv("OF_THE_STUDY", value)
        run_study(study, place / value, runner="study_runner:environment", progress=False)
        assert (place / value / "one/good/seed-0/environment.txt").read_text() == value


def test_the_default_folder_is_the_study_s_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    text = "seeds: [0]\nset: {training.epochs: 1}\nstreams: [split-digits]\nstrategies: [joint]\n"
    for name in ("study.yaml", "other.yaml"):
        Path(name).write_text(text, encoding="utf-8")
        assert continual("study", name).returncode == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["mine", "other"]
