"""Two processes on this machine's CPU do what one does: the same jobs in both and alone, compared."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import distributed_jobs as jobs
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from battery import figures, learner_for, same_weights, small, tiny_stream
from filelock import FileLock
from torch import Tensor

from continual import Learner, Strategy, cli
from continual.disk import recover_folder
from continual.errors import SpecError, StateError
from continual.learner.parallel import _buckets, share
from continual.learner.processes import Processes
from continual.state import load_state, save_state
from continual.study import Study, run_study

TOLERANCE = 1e-5
SECONDS = 600
"""After so long every process that was started is killed."""
LOCAL = {
    "MASTER_ADDR": "127.0.0.1",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TOKENIZERS_PARALLELISM": "false",
}
CPU = torch.device("cpu")


def launch(arguments: list[str], count: int = 2, seconds: float = SECONDS) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of ``count`` processes that were told of one another, all killed when time is up."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    here = Path(__file__).parent
    common = {**os.environ, **LOCAL, "MASTER_PORT": port, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    common["PYTHONPATH"] = os.pathsep.join([str(here.parent), str(here)])
    started: list[subprocess.Popen[str]] = []
    ended = []
    deadline = time.monotonic() + seconds
    try:
        for rank in range(count):
            environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            pipe = subprocess.PIPE
            command = [sys.executable, *arguments]
            started.append(subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True))
        for process in started:
            out, errors = process.communicate(timeout=max(deadline - time.monotonic(), 0.1))
            ended.append((process.returncode, out, errors))
    except subprocess.TimeoutExpired:
        pytest.fail(f"{count} processes were not done after {seconds} seconds; so far: {ended}")
    finally:
        for process in started:
            process.kill()
            process.communicate()
    return ended


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have done every job, once for all workers of pytest."""
    base = tmp_path_factory.getbasetemp()
    place = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "jobs"
    with FileLock(place.with_suffix(".lock")):
        if not place.is_dir():
            place.mkdir()
            code = f"import distributed_jobs, pathlib; distributed_jobs.main(pathlib.Path({str(place)!r}))"
            ended = launch(["-W", "error", "-c", code])
            assert [status for status, _, _ in ended] == [0, 0], "\n".join(errors for _, _, errors in ended)
            (place / "done").touch()
    assert (place / "done").is_file(), "the processes failed, as another test says"
    return place


def results(folder: Path, job: str) -> tuple[Any, Any]:
    main, other = (load_state(folder / "results" / job / str(rank)) for rank in range(2))
    return main, other


def compare(left: Any, right: Any, tolerance: float, where: str = "") -> None:
    """The same nesting; floats within ``tolerance``, all else the same."""
    assert type(left) is type(right), where
    if isinstance(left, dict):
        assert list(left) == list(right), where
        for key in left:
            compare(left[key], right[key], tolerance, f"{where}/{key}")
    elif isinstance(left, list):
        assert len(left) == len(right), where
        for place, pair in enumerate(zip(left, right, strict=True)):
            compare(*pair, tolerance, f"{where}/{place}")
    elif isinstance(left, Tensor):
        if left.is_floating_point() and tolerance:
            torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance, msg=lambda text: f"{where}: {text}")
        else:
            assert torch.equal(left, right), where
    else:
        assert left == (pytest.approx(right, abs=tolerance) if isinstance(left, float) and tolerance else right), where


@pytest.mark.parametrize("job", [*jobs.AS_ONE, "batch norm", "uncut", "cut"])
def test_both_processes_hold_the_same_to_the_bit(folder: Path, job: str) -> None:
    main, other = results(folder, job)
    compare(main, other, 0.0)


@pytest.mark.parametrize("job", jobs.AS_ONE)
def test_two_processes_give_what_one_gives(folder: Path, job: str, tmp_path: Path) -> None:
    """Weights, optimiser, memory, penalty, monitor, generators: the whole state."""
    main, _ = results(folder, job)
    save_state(tmp_path / "alone", jobs.do(job, tmp_path))
    alone = load_state(tmp_path / "alone")
    compare(main, alone, TOLERANCE)
    if "rehearsal" in job or job.startswith("lora"):
        held = [part["memory"]["columns"]["row"] for part in alone["parts"].values() if "memory" in part]
        assert held and len(held[0]), "a memory was compared"


def test_rows_are_divided_and_noise_is_not_shared(folder: Path) -> None:
    main, other = results(folder, "divided")
    both = [mine + its for mine, its in zip(main["rows"], other["rows"], strict=True)]
    assert both == [8, 8, 8, 2] * 2, (
        "the last batch of 25 has one row, and the process without one runs one that is void"
    )
    assert max(main["rows"]) == max(other["rows"]) == 4 and main["all"] == other["all"] == 50
    drawn = [main["first"], main["second"], other["first"], other["second"]]
    for place, one in enumerate(drawn):
        assert all(not torch.equal(one, another) for another in drawn[place + 1 :])


def test_cut_and_resumed_equals_uncut(folder: Path) -> None:
    compare(results(folder, "cut")[0], results(folder, "uncut")[0], 0.0)


def test_running_means_are_those_of_the_main_process(folder: Path) -> None:
    main, _ = results(folder, "batch norm")
    mean, steps = (main["weights"][f"backbone.module.1.{name}"] for name in ("running_mean", "num_batches_tracked"))
    assert int(steps) == 8 and not torch.equal(mean, torch.zeros(8))


def test_a_checkpoint_of_two_processes_goes_on_in_one(folder: Path, tmp_path: Path) -> None:
    loaded = Learner.load(folder / "work" / "uncut" / "checkpoint", device="cpu", progress=False)
    compare(
        {name: tensor.clone() for name, tensor in loaded.model.saved_tensors().items()},
        results(folder, "uncut")[0]["weights"],
        0.0,
    )
    assert loaded.run(tiny_stream(experiences=2)).updates == []


def test_only_the_main_process_writes_and_tells(folder: Path, tmp_path: Path) -> None:
    main, other = results(folder, "cells")
    assert len(main.pop("told")) == 5 and other.pop("told") == []
    assert main == other
    assert {"result.json", "run.json", "scores.safetensors", "checkpoint/state.json"} < set(main["files"])
    assert "adapter/adapter_model.safetensors" in main["files"] and not any("tmp" in name for name in main["files"])
    assert main["processes"] == 2 and main["same"]
    assert "holds this run already" in main["refused"] and "another run is under way" in main["locked"]
    alone = jobs.do("cells", tmp_path)
    assert alone["processes"] == 1 and alone["files"] == main["files"] and alone["tracked"] == main["tracked"]


def test_mistakes_are_said_by_both_and_keep_none_waiting(folder: Path) -> None:
    main, other = results(folder, "mistakes")
    assert main == other
    assert "the loss is not finite" in main["not finite"] and main["not finite"].startswith("TrainingError")
    assert main["checkpoint"].startswith("StateError: the state could not be written")
    assert main["save"].startswith("StateError: the state could not be written")
    assert "differ in their training rows" in main["rows"] and "give each one all rows" in main["rows"]
    assert "differ in their settings" in main["seed"]


def test_the_command_line_in_two_processes(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ["-m", "continual.cli", "run", "split-digits", "rehearsal", "--out", str(out), "--device", "cpu"]
    main, other = launch([*command, "--set", "training.epochs=1"])
    assert (main[0], other[0]) == (0, 0), main[2] + other[2]
    assert "update 5 · " in main[1] and "result.json" in main[1] and other[1] == ""
    assert json.loads((out / "result.json").read_text())["provenance"]["processes"] == 2
    assert (out / "report.html").is_file()


# Alone


def test_a_sentence_names_its_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["continual", "run", "split-digits", "none-such", "--out", "x"])
    for rank, name in (("0", "continual: "), ("1", "continual (process 1): ")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit, match="1"):
            cli.main()
        assert capsys.readouterr().err.startswith(name)


@pytest.mark.parametrize("rows", [1, 2, 5, 6])
@pytest.mark.parametrize("count", [2, 3])
def test_shares_make_up_the_batch(rows: int, count: int) -> None:
    batch = {"labels": torch.arange(rows), "inputs": torch.arange(rows * 2).view(rows, 2)}
    shares = [share(batch, rank, count) for rank in range(count)]
    assert all(len(mine["labels"]) >= 1 for mine in shares), "no process runs the model on nothing"
    counted = torch.cat([mine["labels"] for mine in shares[: min(rows, count)]])
    assert sorted(counted.tolist()) == list(range(rows))
    assert all(torch.equal(mine["inputs"][:, 0], 2 * mine["labels"]) for mine in shares)


def test_buckets_hold_every_parameter_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("continual.learner.parallel.BUCKET_BYTES", 40)
    sizes = [(4, torch.float32), (3, torch.bfloat16), (6, torch.float32), (30, torch.float32), (1, torch.bfloat16)]
    given = [torch.nn.Parameter(torch.zeros(size, dtype=dtype)) for size, dtype in sizes]
    buckets = [[parameter.numel() for parameter in bucket] for bucket in _buckets(given)]
    assert buckets == [[4, 6], [3, 1], [30]]


def test_an_accelerator_of_the_users_own_stays_as_it_is() -> None:
    own = Accelerator()
    precision = own.mixed_precision
    for wanted in ("bf16", "fp32"):
        learner = learner_for(Strategy.load({"training": {**jobs.TRAINING, "precision": wanted}}))
        learner.run(tiny_stream(experiences=1))
        assert own.mixed_precision == precision and own.state.num_processes == 1 == learner.processes.count


@pytest.mark.parametrize("way", ["FSDP", "DEEPSPEED"])
def test_other_ways_of_dividing_are_refused(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{way}", "true")
    with pytest.raises(SpecError, match=f"configured for '{way}'.*data-parallel.*torchrun"):
        learner_for("naive")


def test_more_processes_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SpecError, match="3 processes were started on this machine, which has 2 CUDA devices"):
        Processes(torch.device("cuda"))


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    PartialState(cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SpecError, match="2 processes were started and do not know of each other"):
        Processes(CPU)


@pytest.mark.parametrize(
    ("device", "kind", "message"),
    [
        ("cuda:1", DistributedType.MULTI_GPU, "the device 'cuda:1' was asked for and this is one of 2.*'cuda:0'"),
        ("cpu", DistributedType.MULTI_GPU, "the device 'cpu' was asked for"),
        ("cuda", DistributedType.MULTI_XPU, "joined for MULTI_XPU"),
    ],
)
def test_a_device_that_is_not_the_processes_own_is_refused(
    device: str, kind: DistributedType, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class State:
        num_processes, process_index, distributed_type = 2, 0, kind
        device = torch.device("cuda:0")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("continual.learner.processes.PartialState", lambda cpu: State)
    with pytest.raises(SpecError, match=message):
        Processes(torch.device(device))


def test_a_study_is_not_started_several_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    file = tmp_path / "study.yaml"
    file.write_text("streams: [split-digits]\nstrategies: [naive]\nseeds: [0]\n")
    with pytest.raises(StateError, match="a study starts a process for each run by itself"):
        run_study(Study.load(file), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_state_that_another_process_has_just_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_state(tmp_path / "state", {"a": 1})
    aside = tmp_path / ".state.00000000.old"
    (tmp_path / "state").rename(aside)
    rename: Callable[..., None] = os.rename

    def late(source: Path, target: Path) -> None:
        rename(source, target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    recover_folder(tmp_path / "state")
    assert load_state(tmp_path / "state") == {"a": 1}


def test_one_process_asks_no_other() -> None:
    """A learner alone equals one whose messages would fail."""
    learner, other = learner_for(small("ewc-rehearsal")), learner_for(small("ewc-rehearsal"))
    for name in ("broadcast", "check_alike", "_text"):
        setattr(other.processes, name, None)
    one, two = learner.run(tiny_stream(experiences=2)), other.run(tiny_stream(experiences=2))
    same_weights(learner, other)
    assert figures(one.result) == figures(two.result)
