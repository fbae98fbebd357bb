"""The processes of a study: each cell has one of its own, so that what it holds and how it dies is the cell's alone.

(A process that ran several cells would report the largest memory of all of them for each.) On Linux and without a GPU a worker
imports once what every cell needs and forks each cell off, which saves each of them seconds; pages of libraries that a cell never
touches do not count as its memory then. CUDA, and other systems, do not go with a fork: there a worker is a new process for each cell.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import multiprocessing
import os
import random
import signal
import traceback
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from pathlib import Path
from typing import Any

from continual.disk import write_text
from continual.errors import ContinualError, StateError
from continual.report.load import ERROR, load_result
from continual.spec import load_object

TRACEBACK = "traceback.txt"

PRELOAD = ("continual.run", "continual.report.page", "continual.report.significance", "scipy.stats", "torch._dynamo")
"""What every cell imports; none of it looks for a GPU."""

PR_SET_PDEATHSIG = 1


class Worker:
    """Runs cells, one at a time.

    Args:
        workers: how many such share the cores.
        forks: whether it forks its cells.
    """

    def __init__(self, workers: int, forks: bool) -> None:
        self.workers, self.forks = workers, forks
        self._pool: ProcessPoolExecutor | None = None
        self._pid: Future[int] | None = None
        self.future: Future[str | None] | None = None

    def start(self, job: dict[str, Any]) -> Future[str | None]:
        """Begin with a cell; ``job`` is what :func:`_work` takes."""
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            start = (self.workers, self.forks)
            self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=_start, initargs=start)
            self._pid = self._pool.submit(os.getpid)
        self.future = self._pool.submit(_apart, job, self.workers) if self.forks else self._pool.submit(_work, job)
        return self.future

    def ended(self) -> None:
        """To be called when a cell is over, before the next one."""
        if not self.forks or self.future is None or self.future.exception() is not None:
            self.close()

    def kill(self) -> None:
        """End the process, and its cell, now; what the cell has saved stays."""
        with contextlib.suppress(BrokenProcessPool, ProcessLookupError, TimeoutError):
            if self._pid is not None and self.future is not None and not self.future.done():
                os.kill(self._pid.result(timeout=60), signal.SIGTERM)
        self.close()

    def close(self) -> None:
        """Wait for the process to end."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool = None


def message_of(future: Future[str | None], folder: Path) -> str:
    """Empty for a cell that is done; otherwise the sentence, which is in its ``error.txt`` too."""
    error = future.exception()
    if error is None:
        found = future.result()
        if found is not None:
            return found
    if error is None or isinstance(error, BrokenProcessPool):
        message = (
            "its process was killed by the system, often for want of memory: call the study again to go on where it "
            "stood, with fewer workers or a smaller batch."
        )
    else:
        message = f"its process could not go on ({type(error).__name__}: {_line(error)})."
    with contextlib.suppress(StateError):
        write_text(folder / ERROR, message + "\n")
    return message


def _start(workers: int, forks: bool) -> None:
    """In the worker: Ctrl-C is the parent's to handle, and the cores are shared."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not forks:
        _share_cores(workers)
        return
    for name in PRELOAD:
        with contextlib.suppress(Exception):  # the cell itself will say what is wrong
            importlib.import_module(name)


def _share_cores(workers: int) -> None:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(min(torch.get_num_threads(), max(1, cores // workers)))


def _apart(job: dict[str, Any], workers: int) -> str | None:
    """In a worker that forks: :func:`_work` in a child, which ends with this process; None where the system killed it."""
    context, parent = multiprocessing.get_context("fork"), multiprocessing.parent_process()
    assert parent is not None
    answer, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_in_child, args=(job, workers, theirs))
    child.start()
    theirs.close()
    if parent.sentinel in connection.wait([answer, parent.sentinel]):
        os._exit(1)
    try:
        message: str | None = answer.recv()
    except EOFError:
        message = None
    child.join()
    return message if child.exitcode == 0 else None


def _in_child(job: dict[str, Any], workers: int, answer: connection.Connection) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    _as_a_new_process(workers)
    answer.send(_work(job))


def _as_a_new_process(workers: int) -> None:
    """In a child: draws that nobody seeded differ from those of other cells."""
    import numpy as np
    import torch

    random.seed()
    np.random.seed()  # noqa: NPY002
    torch.seed()
    _share_cores(workers)


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
