"""Stands in for ``continual.run.run_cell``: does what the strategy's name says, in the processes of a study."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch

from continual.errors import TrainingError
from continual.models.build import base_on_disk
from continual.strategy import Strategy
from continual.streams.spec import read_stream_spec
from continual.streams.stream import Stream
from continual.study import worker


def run(stream: Any, strategy: Any, *, seed: int, out: Path, resume: bool, strategy_name: str, **given: Any) -> None:
    """Write what it was called with, then end as the strategy's name says; a cell that goes on ends well.

    A strategy whose name begins with ``traced`` leaves a result that says which rows, base and settings it was made on.
    """
    name = str(stream["name"]) if isinstance(stream, dict) else Path(str(stream)).stem
    called = {"stream": stream, "strategy": strategy, "seed": seed, "resume": resume}
    called |= {key: str(value) if isinstance(value, Path) else value for key, value in given.items()}
    with open(out / "calls.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(called) + "\n")
    print("printed by the run")
    (out / "run.json").write_text("{}", encoding="utf-8")
    if not resume:
        if strategy_name == "refused":
            raise TrainingError("the loss is not finite\nat step 41: lower training.lr.")
        if strategy_name == "broken":
            raise KeyError("no such thing")
        if strategy_name == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if strategy_name == "sleeps":
            (out / "pid").write_text(str(os.getpid()), encoding="utf-8")
            time.sleep(600)
        if strategy_name == "interrupts":
            os.kill(int(os.environ["OF_THE_STUDY"]), signal.SIGINT)
            time.sleep(60)
    result = _result(name, strategy_name, seed)
    if strategy_name.startswith("traced"):
        spec, _ = read_stream_spec(stream)
        loaded = Stream.load(stream, data=given["data"], seed=seed)
        result["provenance"]["stream_fingerprint"] = loaded.fingerprint()
        result["provenance"]["base_model_sha256"] = base_on_disk(given["model"] or spec.model or "mlp")
        chosen = Strategy.load(strategy, overrides=given["overrides"])
        result["provenance"] |= {"settings": chosen.to_dict(), "strategy_fingerprint": chosen.fingerprint()}
    (out / "result.json").write_text(json.dumps(result), encoding="utf-8")


class Here:
    """Stands in for :class:`continual.study.worker.Worker`: cells run in this process, which saves the start of another."""

    def __init__(self, workers: int, forks: bool) -> None: ...

    def start(self, job: dict[str, Any]) -> Future[str | None]:
        future: Future[str | None] = Future()
        future.set_result(worker._work(job))
        return future

    def ended(self) -> None: ...

    def close(self) -> None: ...


def environment(*given: Any, out: Path, **more: Any) -> None:
    """Write down the value of a variable, whose process this is, and what its generators draw."""
    (out / "environment.txt").write_text(os.environ.get("OF_THE_STUDY", ""), encoding="utf-8")
    draws = [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002
    process = {"pid": os.getpid(), "parent": os.getppid(), "draws": draws}
    (out / "process.json").write_text(json.dumps(process), encoding="utf-8")
    run(*given, out=out, **more)


def _result(stream: str, strategy: str, seed: int) -> dict[str, Any]:
    return {
        "format": 1,
        "stream": stream,
        "strategy": strategy,
        "seed": seed,
        "experiences": ["a", "b"],
        "matrix": [[0.9, None], [0.7, 0.8]],
        "initial": [None, None],
        "metrics": {"accuracy": 0.75},
        "intervals": {},
        "cost": {
            "train_seconds": 1.0,
            "monitor_seconds": 0.1,
            "rows_trained": 10,
            "rows_per_second": 10.0,
            "peak_memory_bytes": 1,
            "state_bytes": {},
            "trainable_parameters": 1,
        },
        "provenance": {
            "commit": None,
            "versions": {},
            "hardware": {},
            "seed": seed,
            "started": "2026-11-23T10:00:00+00:00",
            "stream_fingerprint": None,
            "strategy_fingerprint": None,
            "base_model_sha256": None,
        },
    }
