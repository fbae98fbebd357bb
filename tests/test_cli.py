"""The command line, run as a user runs it."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from continual import cli

SMALL = ["--set", "training.epochs=1", "--device", "cpu"]


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def continual(*arguments: str, cwd: Path | None = None) -> Done:
    """What ``continual ARGUMENTS`` prints and its exit status, in this process."""
    stdout, stderr = io.StringIO(), io.StringIO()
    argv, sys.argv = sys.argv, ["continual", *arguments]
    try:
        with (
            contextlib.chdir(cwd or Path.cwd()),
            contextlib.redirect_stdout(stdout),
            contextlib.redirect_stderr(stderr),
        ):
            cli.main()
    except SystemExit as end:
        return Done(int(end.code or 0), stdout.getvalue(), stderr.getvalue())
    finally:
        sys.argv = argv


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "a"
    done = continual("run", "split-digits", "rehearsal", "--seed", "0", "--out", str(out), *SMALL)
    assert done.returncode == 0, done.stderr
    assert "update 5" in done.stdout and "├──" in done.stdout
    return out


def test_a_run_leaves_its_result_its_checkpoint_and_a_page(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text(encoding="utf-8"))
    assert result["format"] == 1 and len(result["matrix"]) == 5 and len(result["experiences"]) == 5
    names = {"accuracy", "learning_accuracy", "bwt", "forgetting", "fwt", "retention"}
    assert names <= set(result["metrics"])
    assert set(result["intervals"]) >= names - {"fwt"}
    assert {"train_seconds", "rows_per_second", "peak_memory_bytes", "state_bytes"} <= set(result["cost"])
    assert result["provenance"]["stream_per_seed"] is True
    assert result["provenance"]["stream_fingerprint"] and result["provenance"]["versions"]["torch"]
    assert (finished / "checkpoint" / "seal.json").is_file() and (finished / "report.html").is_file()
    assert "<svg" in (finished / "report.html").read_text(encoding="utf-8")


def test_the_same_command_again_is_refused_and_resume_returns_it(finished: Path) -> None:
    again = continual("run", "split-digits", "rehearsal", "--out", str(finished), *SMALL)
    assert again.returncode == 1 and "--resume" in again.stderr and "Traceback" not in again.stderr
    before = (finished / "result.json").read_bytes()
    resumed = continual("run", "split-digits", "rehearsal", "--out", str(finished), "--resume", *SMALL)
    assert resumed.returncode == 0 and (finished / "result.json").read_bytes() == before


def test_overrides_are_part_of_the_name_and_older_runs_go_on_without(finished: Path, tmp_path: Path) -> None:
    named = "rehearsal[training.epochs=1]"
    assert json.loads((finished / "result.json").read_text(encoding="utf-8"))["strategy"] == named
    out = tmp_path / "older"
    shutil.copytree(finished, out)
    request = json.loads((out / "run.json").read_text(encoding="utf-8"))
    (out / "run.json").write_text(json.dumps({**request, "strategy": "rehearsal"}), encoding="utf-8")
    resumed = continual("run", "split-digits", "rehearsal", "--out", str(out), "--resume", *SMALL)
    assert resumed.returncode == 0, resumed.stderr
    (out / "run.json").write_text(json.dumps({**request, "strategy": "another"}), encoding="utf-8")
    refused = continual("run", "split-digits", "rehearsal", "--out", str(out), "--resume", *SMALL)
    assert refused.returncode == 1 and "'another' there" in refused.stderr


def test_report_and_list(finished: Path, tmp_path: Path) -> None:
    done = continual("report", str(finished), "--out", str(tmp_path / "page.html"))
    assert done.returncode == 0 and "rehearsal" in done.stdout and (tmp_path / "page.html").is_file()
    listed = continual("list", "--parts")
    assert listed.returncode == 0 and "split-digits" in listed.stdout and "adalora" in listed.stdout


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv=['continual','--help']\n"
        "from continual import cli\n"
        "try: cli.main()\nexcept SystemExit: pass\n"
        "heavy={'torch','transformers','peft','numpy','pydantic','matplotlib','datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


WRONG = [
    (["run", "split-digit", "rehearsal"], 1, "Did you mean 'split-digits'"),
    (["run", "split-digits", "rehersal"], 1, "Did you mean 'rehearsal'"),
    (["run", "split-digits", "rehearsal", "--set", "training.learning_rate=1"], 1, "learning_rate"),
    (["run", "split-digits", "rehearsal", "--set", "replay.capcity=1"], 1, "Did you mean 'capacity'"),
    (["run", "split-digits", "rehearsal", "--set", "training.lr"], 1, "key=value"),
    (["run", "split-digits", "rehearsal", "--set", "training.lr=-1"], 1, "greater than 0"),
    (["run", "split-digits", "rehearsal", "--device", "cuda:7"], 1, "CUDA devices"),
    (["run", "split-digits", "rehearsal", "--device", "gpu"], 1, "unknown device"),
    (["run", "split-digits", "rehearsal", "--resume"], 1, "no run to resume"),
    (["run", "split-digits", "rehearsal", "--scenario", "tasks"], 1, "scenario"),
    (["run", "split-digits", "lora", "--model", "no/such-model"], 1, "no/such-model"),
    (["run", "docstrings", "rehearsal", "--model", "mlp"], 1, "tokenizer"),
    (["run", "clinc150", "lora", "--data", "nowhere"], 1, "nowhere"),
    (["run"], 2, "Missing argument"),
    (["no-such-command"], 2, "No such command"),
    (["report", "nowhere"], 1, "nowhere"),
    (["study", "nowhere.yaml"], 1, "nowhere.yaml"),
    (["check", "split-digit"], 1, "Did you mean 'split-digits'"),
    (["check", "--schema", "streem"], 1, "Did you mean 'stream'"),
]


@pytest.mark.parametrize(
    ("arguments", "status", "said"), WRONG, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    arguments: list[str], status: int, said: str, tmp_path: Path
) -> None:
    extra = ["--out", str(tmp_path / "out")] if arguments[0] == "run" and len(arguments) > 1 else []
    done = continual(*arguments, *extra, cwd=tmp_path)
    assert done.returncode == status, done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr
    if status == 1:
        assert len(done.stderr.strip().splitlines()) == 1
    left = [path for path in (tmp_path / "out").rglob("*") if path.is_file() and path.name != ".lock"]
    assert left == []


def test_an_out_folder_of_another_run_is_refused(finished: Path) -> None:
    for other in (["split-digits", "naive"], ["split-digits", "rehearsal", "--seed", "1"]):
        done = continual("run", *other, "--out", str(finished), "--resume", *SMALL)
        assert done.returncode == 1 and "another run" in done.stderr


def test_a_truncated_checkpoint_is_named(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "cut"
    shutil.copytree(finished, out)
    (out / "result.json").unlink()
    tensors = out / "checkpoint" / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])
    done = continual("run", "split-digits", "rehearsal", "--out", str(out), "--resume", *SMALL)
    assert done.returncode == 1 and "tensors.safetensors" in done.stderr and "SHA-256" in done.stderr


def test_check_prints_experiences_and_schemas(tmp_path: Path) -> None:
    done = continual("check", "split-digits")
    assert done.returncode == 0 and "5 experiences" in done.stdout and "train" in done.stdout
    for kind in ("stream", "strategy", "study"):
        schema = continual("check", "--schema", kind)
        assert schema.returncode == 0 and json.loads(schema.stdout)["type"] == "object"
    strategy = tmp_path / "mine.yaml"
    strategy.write_text("summary: x\nreplay: {kind: rehersal}\n", encoding="utf-8")
    wrong = continual("check", str(strategy))
    assert wrong.returncode == 1 and "mine.yaml" in wrong.stderr and "'rehearsal'" in wrong.stderr


def stream_file(folder: Path, rows: list[dict[str, object]], source: str = "path: rows.jsonl", more: str = "") -> Path:
    """``mine.yaml``, a stream in one experience, and ``rows.jsonl`` beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    path = folder / "mine.yaml"
    path.write_text(
        f"source: {{kind: files, {source}}}\nsplit: {{by: joint}}\nscenario: class\n{more}", encoding="utf-8"
    )
    return path


def texts(count: int, classes: int, start: int = 0) -> list[dict[str, object]]:
    return [{"text": f"text {n}", "label": f"c{n % classes}"} for n in range(start, start + count)]


def test_the_folder_in_the_environment_comes_after_the_files_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = stream_file(tmp_path / "mine", texts(40, 3), "path: rows.jsonl, shares: {test: 0.3}")
    stream_file(tmp_path / "data", texts(20, 2))
    (tmp_path / "data" / "rows.jsonl").rename(tmp_path / "data" / "train.jsonl")
    monkeypatch.setenv("CONTINUAL_DATA", str(tmp_path / "data"))
    done = continual("check", str(mine))
    assert done.returncode == 0 and "3 classes" in done.stdout, done.stderr
    named = continual("check", str(mine), "--data", str(tmp_path / "data"))
    assert named.returncode == 1 and "no training file was found for 'rows.jsonl'" in named.stderr
    (tmp_path / "mine" / "rows.jsonl").rename(tmp_path / "data" / "rows.jsonl")
    assert "3 classes" in continual("check", str(mine)).stdout
    assert "3 classes" in continual("check", str(mine), "--data", str(tmp_path / "data" / "rows.jsonl")).stdout


def test_rows_that_are_dropped_are_said(tmp_path: Path) -> None:
    files = "train: rows.jsonl, test: test.jsonl, features: [x], overlap: drop"
    mine = stream_file(tmp_path, [{"x": n, "label": f"c{n % 2}"} for n in range(40)], files)
    said = "20 of 40 training rows dropped: same content as test rows"
    (tmp_path / "test.jsonl").write_text("".join(f'{{"x": {n}, "label": "c{n % 2}"}}\n' for n in range(20, 60)))
    done = continual("check", str(mine))
    assert done.returncode == 0 and said in done.stdout
    for more in ([], ["--resume"]):
        ran = continual("run", str(mine), "naive", "--model", "mlp", "--out", str(tmp_path / "out"), *SMALL, *more)
        assert ran.returncode == 0, ran.stderr
        result = tmp_path / "out" / "result.json"
        assert json.loads(result.read_text(encoding="utf-8"))["notes"].count(said) == 1
        result.unlink()


KINDS = [
    ("source: mine\nadapter: {kind: lora}\n", "strategy 'mine'"),
    ("source: mine\n", "strategy 'mine'"),
    ("source: mine\nbackbone: frozen\nhead: {kind: ncm}\n", "unknown head kind 'ncm'"),
    ("use: split-digits\nsummary: s\nsource: {valid_share: .1}\n", "stream 'mine'"),
    ("use: split-digits\nsummary: s\n", "stream 'mine'"),
    ("use: split-digit\nsummary: s\n", "Did you mean 'split-digits'"),
    ("use: naive\ntraining: {lr: 1}\n", "unknown key 'use'"),
    ("summary: s\nsource: {kind: digits}\n", "the key 'split' is missing"),
    ("summary: s\nscenario: class\nsource: digits\n", "'source' says no 'kind'"),
]


@pytest.mark.parametrize(("content", "said"), KINDS)
def test_check_tells_streams_from_strategies(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content, encoding="utf-8")
    done = continual("check", str(path))
    assert said in done.stdout + done.stderr


def test_ctrl_c_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("continual.run.run_cell", interrupted)
    done = continual("run", "split-digits", "naive", "--out", str(tmp_path / "a"))
    assert done.returncode == 130 and "a run needs --resume" in done.stderr
