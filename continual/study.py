"""A study: strategies × streams × seeds, each cell a run in its own folder, several at a time on one machine.

A cell that is finished is never run twice, one that was cut off goes on, one that fails says why and stops no other,
and a process that the system kills costs its own cell only. ``cell.json`` in a cell's folder holds what was asked for; when
the study asks for something else there, the old run is moved aside, not overwritten.

Processes are spawned, so a script of your own that calls :func:`run_study` needs ``if __name__ == "__main__":``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from filelock import FileLock, Timeout
from pydantic import ConfigDict, Field, NonNegativeInt, model_validator
from tqdm import tqdm

from continual import provenance
from continual.errors import ContinualError, SpecError, StateError, unknown
from continual.library import find_spec
from continual.report.load import CELL, ERROR, RESULT, Failure, load_result
from continual.report.markdown import csv_table, markdown_report
from continual.report.page import write_page
from continual.spec import Spec, load_object, parse, read_yaml
from continual.state import write_text
from continual.strategy import Strategy
from continual.streams.spec import read_stream_spec

RUNNER = "continual.run:run_cell"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*")


def _or_name(schema: dict[str, Any]) -> None:
    content = dict(schema)
    schema.clear()
    schema["anyOf"] = [{"type": "string"}, content]


class _Choice(Spec):
    use: str
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, content: Any) -> Any:
        return {"use": content} if isinstance(content, str) else content


class StreamChoice(_Choice):
    """A stream of the study: its name, or a mapping.

    Attributes:
        use: a name of the library, or a YAML file (from the study's folder or the working directory).
        name: what reports call it; its own name where it is not given.

    Any other key is one of the stream's file and is laid over it.
    """

    model_config = ConfigDict(extra="allow", json_schema_extra=_or_name)


class StrategyChoice(_Choice):
    """A strategy of the study: its name, or a mapping.

    Attributes:
        use: a name of the library, or a YAML file (from the study's folder or the working directory).
        name: what reports call it; the name of ``use`` where it is not given.
        set: dotted key of its file → value.
    """

    model_config = ConfigDict(json_schema_extra=_or_name)

    set: dict[str, Any] = Field(default_factory=dict)

    @property
    def label(self) -> str:
        return self.name or (Path(self.use).stem if self.use.endswith((".yaml", ".yml")) else self.use)


class Group(Spec):
    """Streams × strategies × seeds with settings of their own.

    Attributes:
        seeds: those of the study where they are not given.
        model: taken instead of each stream's own.
        training: keys of the strategies' ``training``, for all of them.
        set: dotted key of a strategy's file → value, for all of them; set after ``training`` and before a strategy's
            own ``set``.
    """

    streams: list[StreamChoice] = Field(min_length=1)
    strategies: list[StrategyChoice] = Field(min_length=1)
    seeds: list[NonNegativeInt] | None = None
    model: str | dict[str, Any] | None = None
    training: dict[str, Any] = Field(default_factory=dict)
    set: dict[str, Any] = Field(default_factory=dict)


class StudySpec(Spec):
    """The form of a study's YAML file: one block at the top, or ``groups`` of them, or both.

    Attributes:
        data: stream → folder of its data, from the study's folder.
        model, training, set: as in a group, and for all groups where they do not say otherwise.
    """

    summary: str = ""
    streams: list[StreamChoice] = Field(default_factory=list)
    strategies: list[StrategyChoice] = Field(default_factory=list)
    seeds: list[NonNegativeInt] = Field(default_factory=lambda: [0], min_length=1)
    model: str | dict[str, Any] | None = None
    training: dict[str, Any] = Field(default_factory=dict)
    set: dict[str, Any] = Field(default_factory=dict)
    data: dict[str, str] = Field(default_factory=dict)
    groups: list[Group] = Field(default_factory=list)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if bool(self.streams) != bool(self.strategies):
            raise ValueError("streams and strategies come together, give both or put them into groups")
        if not self.streams and not self.groups:
            raise ValueError("it names nothing to run, give streams and strategies, or groups")
        return self

    def blocks(self) -> list[Group]:
        """The block at the top and the groups, each complete."""
        top = [Group(streams=self.streams, strategies=self.strategies)] if self.streams else []
        return [
            group.model_copy(
                update={
                    "seeds": group.seeds if group.seeds is not None else self.seeds,
                    "model": group.model if group.model is not None else self.model,
                    "training": {**self.training, **group.training},
                    "set": {**self.set, **group.set},
                }
            )
            for group in [*top, *self.groups]
        ]


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        stream, strategy, seed: its names in reports and its folder.
        stream_source: what the runner loads: a name, a file, or the content of one.
        strategy_source: a name or a file; ``overrides`` are set in it.
        settings: all of it resolved, as far as it can change the result.
    """

    stream: str
    strategy: str
    seed: int
    stream_source: str | dict[str, Any]
    strategy_source: str
    overrides: dict[str, Any]
    model: str | dict[str, Any] | None
    settings: dict[str, Any]

    @property
    def label(self) -> str:
        """``stream/strategy/seed-n``, which is also the folder below the study's."""
        return f"{self.stream}/{self.strategy}/seed-{self.seed}"


@dataclass(frozen=True)
class CellOutcome:
    """How a cell ended.

    Attributes:
        status: ``skipped`` was finished before.
        message: why it failed, one sentence; empty otherwise.
        seconds: that it took this time.
    """

    cell: Cell
    status: Literal["done", "skipped", "failed"]
    message: str = ""
    seconds: float = 0.0


class Study:
    """A checked study.

    Args:
        spec: its content.
        folder: relative paths start here.
        name: the title of its page.

    Raises:
        SpecError: an unknown stream, strategy, key or value, or two cells of the same name.
    """

    def __init__(self, spec: StudySpec, folder: Path = Path(), name: str = "study") -> None:
        self.spec, self.folder, self.name = spec, Path(folder), name

    @classmethod
    def load(cls, path: str | Path) -> Study:
        """Read and check a study's file, down to every stream and strategy that it names."""
        path = Path(path)
        name = path.resolve().parent.name if path.stem == "study" else path.stem
        study = cls(parse(StudySpec, read_yaml(path), str(path)), path.parent, name)
        study.cells()
        return study

    def cells(self) -> list[Cell]:
        """Every run of the study, in the order of its file, seeds innermost."""
        return list(self._cells)

    @cached_property
    def _cells(self) -> list[Cell]:
        found: dict[str, Cell] = {}
        streams: set[str] = set()
        for group in self.spec.blocks():
            for choice in group.streams:
                name, source, settings = self._stream(choice)
                streams |= {name, choice.use}
                for strategy in group.strategies:
                    first = self._cell(group, name, source, settings, strategy)
                    for cell in (replace(first, seed=seed) for seed in group.seeds or []):
                        if cell.label in found:
                            raise SpecError(
                                f"study '{self.name}' has two cells called '{cell.label}': give one of the strategies "
                                "or streams a name of its own ({use: …, name: …}), or name each seed once."
                            )
                        found[cell.label] = cell
        for name in self.spec.data:
            if name not in streams:
                raise SpecError(f"study '{self.name}', data: {unknown('stream', name, streams)}")
        return list(found.values())

    def data_folder(self, cell: Cell, data: Path | None) -> Path | None:
        """Where the data of a cell's stream lie: ``data/<stream>``, else what the file says, else ``data`` itself."""
        if data is not None and (Path(data) / cell.stream).is_dir():
            return Path(data) / cell.stream
        use = str(cell.settings["stream"]["use"])
        for name in (cell.stream, use):
            if name in self.spec.data:
                return self.folder / Path(self.spec.data[name]).expanduser()
        if data is None and isinstance(cell.stream_source, dict) and use.endswith((".yaml", ".yml")):
            return Path(cell.stream_source["use"]).parent
        return Path(data) if data is not None else None

    def _stream(self, choice: StreamChoice) -> tuple[str, str | dict[str, Any], dict[str, Any]]:
        """Name in reports, what the runner loads, and the resolved settings."""
        source = self._find("streams", choice.use)
        over = dict(choice.model_extra or {})
        given: str | dict[str, Any] = source
        if over or choice.name is not None:
            given = {"use": source, **over} | ({"name": choice.name} if choice.name is not None else {})
        try:
            spec, _ = read_stream_spec(given)
        except ContinualError as error:
            raise SpecError(f"study '{self.name}', stream '{choice.name or choice.use}': {error}") from error
        settings = spec.model_dump(mode="json", exclude={"summary"})
        return self._safe(spec.name or choice.use, "stream"), given, {"use": choice.use, **settings}

    def _cell(
        self,
        group: Group,
        stream: str,
        stream_source: str | dict[str, Any],
        stream_settings: dict[str, Any],
        choice: StrategyChoice,
    ) -> Cell:
        source = self._find("strategies", choice.use)
        overrides = {**{f"training.{key}": value for key, value in group.training.items()}, **group.set, **choice.set}
        try:
            strategy = Strategy.load(source, overrides=overrides)
        except ContinualError as error:
            raise SpecError(f"study '{self.name}', strategy '{choice.label}': {error}") from error
        settings = {"stream": stream_settings, "strategy": strategy.fingerprint(), "model": group.model}
        return Cell(
            stream=stream,
            strategy=self._safe(choice.label, "strategy"),
            seed=0,
            stream_source=stream_source,
            strategy_source=source,
            overrides=overrides,
            model=group.model,
            settings=settings,
        )

    def _find(self, kind: Literal["streams", "strategies"], use: str) -> str:
        beside = self.folder / use
        source = str(beside) if use.endswith((".yaml", ".yml")) and beside.is_file() else use
        try:
            find_spec(kind, source)
        except SpecError as error:
            raise SpecError(f"study '{self.name}': {error}") from error
        return source

    def _safe(self, name: str, what: str) -> str:
        if not _NAME.fullmatch(name):
            raise SpecError(
                f"study '{self.name}': the {what} name '{name}' cannot be a folder: use letters, digits and . _ + - only, "
                "with 'name:' if need be."
            )
        return name


def run_study(
    study: Study,
    out: Path,
    workers: int = 1,
    data: Path | None = None,
    *,
    device: str = "auto",
    runner: str = RUNNER,
    progress: bool | None = None,
) -> list[CellOutcome]:
    """Run what is not finished yet and write ``report.html``, ``report.md``, ``results.csv`` and ``study.json``.

    Args:
        out: cells go to ``out/<stream>/<strategy>/seed-<n>/``.
        workers: processes at a time; each takes its share of the cores.
        data: a folder with the data of the one stream, or with a folder for each.
        runner: ``module:function`` with the signature of :func:`continual.run.run_cell`.
        progress: None shows a bar where standard error is a terminal.

    Returns:
        One outcome for each cell, in the order of the study.

    Raises:
        SpecError: something in the study is wrong; nothing has run.
        StateError: ``out`` cannot be written or another process runs a study there.
    """
    assert workers >= 1
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / ".lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise StateError(f"another study is running in '{out}': wait for it, or name another out folder.") from error
    except OSError as error:
        raise StateError(f"'{out}' cannot be written ({error}): name another out folder.") from error
    try:
        return _run(study, out, workers, data, device, runner, progress)
    finally:
        lock.release()


def _run(
    study: Study, out: Path, workers: int, data: Path | None, device: str, runner: str, progress: bool | None
) -> list[CellOutcome]:
    cells = study.cells()
    started = provenance.now()
    outcomes: dict[str, CellOutcome] = Field(default_factory=dict)
    jobs: deque[tuple[Cell, dict[str, Any]]] = deque()
    for cell in cells:
        folder = study.data_folder(cell, data)
        asked = {
            **cell.settings,
            "seed": cell.seed,
            "device": device,
            "data": str(folder.resolve()) if folder else None,
        }
        try:
            job = _prepare(cell, out / cell.label, asked)
        except StateError as error:
            outcomes[cell.label] = CellOutcome(cell, "failed", str(error))
            continue
        if job is None:
            outcomes[cell.label] = CellOutcome(cell, "skipped")
            continue
        jobs.append((cell, {**job, "runner": runner, "data": folder, "device": device}))
    with tqdm(
        total=len(cells), initial=len(outcomes), unit="cell", disable=None if progress is None else not progress
    ) as bar:
        _work_off(jobs, outcomes, workers, bar)
    ordered = [outcomes[cell.label] for cell in cells]
    _write_reports(study, out, ordered, started, device)
    return ordered


def _prepare(cell: Cell, folder: Path, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the worker needs to know, or None where the cell is finished."""
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()
    known = folder / CELL
    if known.is_file():
        try:
            before = str(json.loads(known.read_text(encoding="utf-8"))["sha256"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StateError(
                f"'{known}' is damaged ({error}): move that folder away and call the study again."
            ) from error
        if before != digest:
            _move_aside(folder, before)
        elif (folder / RESULT).is_file():
            load_result(folder)
            return None
    elif folder.is_dir() and any(folder.iterdir()):
        raise StateError(f"'{folder}' holds files that no study wrote: move them away, or name another out folder.")
    content = {"stream": cell.stream, "strategy": cell.strategy, "seed": cell.seed, "sha256": digest, "settings": asked}
    write_text(known, json.dumps(content, indent=1, sort_keys=True, default=str) + "\n")
    for name in (ERROR, "traceback.txt"):
        (folder / name).unlink(missing_ok=True)
    return {"cell": cell, "folder": folder, "resume": (folder / "run.json").is_file()}


def _move_aside(folder: Path, digest: str) -> None:
    for attempt in range(10_000):
        aside = folder.parent / f".{folder.name}.{digest[:8]}.{attempt}.replaced"
        if not aside.exists():
            os.rename(folder, aside)
            return


def _work_off(
    jobs: deque[tuple[Cell, dict[str, Any]]], outcomes: dict[str, CellOutcome], workers: int, bar: tqdm[Any]
) -> None:
    """One process per slot, one cell at a time in each, so that a process that dies is known by its cell."""
    slots = [_Slot(workers) for _ in range(min(workers, len(jobs)))]
    idle = list(slots)
    running: dict[Future[str], tuple[_Slot, Cell, Path, float]] = Field(default_factory=dict)
    try:
        while jobs or running:
            while jobs and idle:
                slot, (cell, job) = idle.pop(), jobs.popleft()
                running[slot.submit(job)] = (slot, cell, job["folder"], time.monotonic())
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                slot, cell, folder, began = running.pop(future)
                message = _message(future, folder)
                if isinstance(future.exception(), BrokenProcessPool):
                    slot.renew()
                status: Literal["done", "failed"] = "failed" if message else "done"
                outcomes[cell.label] = CellOutcome(cell, status, message, time.monotonic() - began)
                idle.append(slot)
                bar.update()
                bar.set_postfix_str(f"{cell.label} {status}")
    except BaseException:
        for slot in slots:
            slot.kill()
        raise
    finally:
        for slot in slots:
            slot.close()


def _message(future: Future[str], folder: Path) -> str:
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


class _Slot:
    """One worker process, started when it is first needed."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None
        self._pid: Future[int] | None = None

    def submit(self, job: dict[str, Any]) -> Future[str]:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=_start, initargs=(self._workers,))
            self._pid = self._pool.submit(os.getpid)
        return self._pool.submit(_work, job)

    def renew(self) -> None:
        self.close()
        self._pool = None

    def kill(self) -> None:
        if self._pid is not None and self._pid.done() and self._pid.exception() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid.result(), signal.SIGTERM)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def _start(workers: int) -> None:
    """In the worker: Ctrl-C is the parent's to handle, and the cores are shared."""
    import torch

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
            message = _line(error)
        except Exception as error:
            message = (
                f"it stopped with an error of its own ({type(error).__name__}: {_line(error)}): see traceback.txt."
            )
        write_text(folder / "traceback.txt", traceback.format_exc())
        write_text(folder / ERROR, message + "\n")
        return message


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _write_reports(study: Study, out: Path, outcomes: Sequence[CellOutcome], started: str, device: str) -> None:
    content = {
        "format": 1,
        "study": study.name,
        "summary": study.spec.summary,
        "started": started,
        "finished": provenance.now(),
        "commit": provenance.commit(),
        "versions": provenance.versions(),
        "hardware": provenance.hardware(_device(device)),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "cells": [
            {
                "stream": one.cell.stream,
                "strategy": one.cell.strategy,
                "seed": one.cell.seed,
                "status": one.status,
                "message": one.message,
                "seconds": round(one.seconds, 3),
                "folder": one.cell.label,
            }
            for one in outcomes
        ],
    }
    write_text(out / "study.json", json.dumps(content, indent=1) + "\n")
    results = [load_result(out / one.cell.label) for one in outcomes if one.status != "failed"]
    failed = [one for one in outcomes if one.status == "failed"]
    failures = [Failure(one.cell.stream, one.cell.strategy, one.cell.seed, one.message) for one in failed]
    write_text(out / "results.csv", csv_table(results))
    write_text(out / "report.md", markdown_report(results, study.name, failures=failures))
    write_page(results, out / "report.html", study.name, summary=study.spec.summary, failures=failures)


def _device(device: str) -> str:
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
