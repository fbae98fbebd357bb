"""The processes of a study: each cell has one of its own, so that what it holds and how it dies is the cell's alone.

(A process that ran several cells would report the largest memory of all of them for each.) On Linux and without a GPU they are forked
from one that has imported what every cell needs and runs nothing, which saves each of them seconds; CUDA, and other systems, do not
go with a fork, so there each is a new one.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import traceback
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from continual.disk import write_text
from continual.errors import ContinualError, StateError
from continual.learner.core import resolve_device
from continual.report.load import ERROR, load_result
from continual.spec import load_object

TRACEBACK = "traceback.txt"

PRELOAD = ["continual.run", "continual.report.page", "continual.report.significance", "scipy.stats", "torch._dynamo"]
"""What every cell imports; none of it starts a thread or looks for a GPU."""


class Worker:
    """A process that runs one cell.

    Args:
        job: what :func:`_work` takes.
        workers: how many such processes share the cores.
    """

    def __init__(self, job: dict[str, Any], workers: int) -> None:
        context: Any = multiprocessing.get_context("spawn")
        if sys.platform == "linux" and resolve_device(job["device"]).type == "cpu":
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(PRELOAD)
        start = (workers, dict(os.environ))
        self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=_start, initargs=start)
        self._pid = self._pool.submit(os.getpid)
        self.future = self._pool.submit(_work, job)

    def kill(self) -> None:
        """End the process now; what it has saved stays."""
        with contextlib.suppress(BrokenProcessPool, ProcessLookupError, TimeoutError):
            pid = self._pid.result(timeout=60)
            if not self.future.done():
                os.kill(pid, signal.SIGTERM)
        self.close()

    def close(self) -> None:
        """Wait for the process to end."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def message_of(future: Future[str], folder: Path) -> str:
    """Empty for a cell that is done; otherwise the sentence, which is in its ``error.txt`` too."""
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, BrokenProcessPool):
        message = (
            "its process was killed by the system, often for want of memory: call the study again to go on where it "
            "stood, with fewer workers or a smaller batch."
        )
    else:
        message = f"its process could not go on ({type(error).__name__}: {_line(error)})."
    with contextlib.suppress(StateError):
        write_text(folder / ERROR, message + "\n")
    return message


def _start(workers: int, environment: dict[str, str]) -> None:
    """In the worker: its environment is the parent's as it is now, Ctrl-C is the parent's to handle, and the cores are shared."""
    import torch

    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(min(torch.get_num_threads(), max(1, cores // workers)))


def _work(job: dict[str, Any]) -> str:
    """In the worker: run one cell; what it prints goes to its ``log.txt``. Returns why it failed, or nothing."""
    cell, folder = job["cell"], job["folder"]
    with (
        open(folder / "log.txt", "a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        try:
            load_object(job["runner"], "runner")(
                cell.stream_source,
                cell.strategy_source,
                seed=cell.seed,
                out=folder,
                data=job["data"],
                model=cell.model,
                device=job["device"],
                resume=job["resume"],
                overrides=cell.overrides,
                strategy_name=cell.strategy,
                progress=False,
            )
            load_result(folder)
            return ""
        except ContinualError as error:
            message, trace = _line(error), traceback.format_exc()
        except Exception as error:
            trace = traceback.format_exc()
            message = (
                f"it stopped with an error of its own ({type(error).__name__}: {_line(error)}): see traceback.txt."
            )
        write_text(folder / TRACEBACK, trace)
        write_text(folder / ERROR, message + "\n")
        return message


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
