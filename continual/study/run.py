"""Strategies × streams × seeds, each cell a run in its own folder, several at a time on one machine.

A cell that is finished is never run twice, one that was cut off goes on, one that fails says why and stops no other,
and a process that the system kills costs its own cell only. ``cell.json`` in a cell's folder holds what was asked for;
when the study asks for something else there, or the data or the base model have changed since, the old run is moved
aside, not overwritten.

Each cell is a new process, so a script of your own that calls :func:`run_study` needs ``if __name__ == "__main__":``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from continual import provenance
from continual.disk import alone, write_text
from continual.errors import ContinualError, StateError
from continual.learner.core import resolve_device
from continual.report.load import CELL, ERROR, RESULT, Failure, load_result
from continual.study.known import BEGUN, Sources, digest, recorded_settings, same_settings
from continual.study.spec import Cell, Study
from continual.study.worker import TRACEBACK, Worker, message_of

RUNNER = "continual.run:run_cell"


@dataclass(frozen=True)
class CellOutcome:
    """How a cell ended.

    Attributes:
        status: ``skipped`` was finished before.
        message: one sentence: why it failed, why it was run again, or why it could not be compared; mostly empty.
        seconds: that it took this time.
    """

    cell: Cell
    status: Literal["done", "skipped", "failed"]
    message: str = ""
    seconds: float = 0.0


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
    """Run what is not finished yet and write its reports and ``study.json``.

    The reports are ``report.html``, ``report.md``, ``report.tex``, ``results.csv`` (every run) and ``significance.csv``
    (every pair of strategies).

    Args:
        out: cells go to ``out/<stream>/<strategy>/seed-<n>/``.
        workers: processes at a time, a new one for each cell; each takes its share of the cores.
        data: a folder with the data of the one stream, or with a folder for each.
        runner: ``module:function`` with the signature of :func:`continual.run.run_cell`.
        progress: None shows a bar where standard error is a terminal.

    Returns:
        One outcome for each cell, in the order of the study.

    Raises:
        SpecError: something in the study is wrong, or the device is not there; nothing has run.
        StateError: ``out`` cannot be written, another process runs a study there, or this is one of several processes.
    """
    assert workers >= 1
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise StateError(
            "a study starts a process for each run by itself, and this is one of several that were started together: call "
            "it without torchrun or accelerate launch, or launch single runs with `continual run`."
        )
    resolve_device(device)
    out = Path(out)
    with alone(out, "study"):
        return _run(study, out, workers, data, device, runner, progress)


def _run(
    study: Study, out: Path, workers: int, data: Path | None, device: str, runner: str, progress: bool | None
) -> list[CellOutcome]:
    cells = study.cells()
    started = provenance.now()
    outcomes: dict[str, CellOutcome] = {}
    jobs: deque[tuple[Cell, dict[str, Any]]] = deque()
    notes: dict[str, str] = {}
    sources = Sources()
    for cell in cells:
        folder = study.data_folder(cell, data)
        try:
            job, note = _prepare(cell, out / cell.label, folder, sources)
        except StateError as error:
            outcomes[cell.label] = CellOutcome(cell, "failed", str(error))
            continue
        if job is None:
            outcomes[cell.label] = CellOutcome(cell, "skipped", note)
            continue
        notes[cell.label] = note
        jobs.append((cell, {**job, "runner": runner, "data": folder, "device": device}))
    with tqdm(
        total=len(cells), initial=len(outcomes), unit="cell", disable=None if progress is None else not progress
    ) as bar:
        _work_off(jobs, outcomes, notes, workers, sys.platform == "linux" and _device(device) == "cpu", bar)
    ordered = [outcomes[cell.label] for cell in cells]
    _write_reports(study, out, ordered, started, device)
    return ordered


def _prepare(cell: Cell, folder: Path, data: Path | None, sources: Sources) -> tuple[dict[str, Any] | None, str]:
    """What the worker needs to know, or None where the cell is finished; and what is to be said of it."""
    asked = {**cell.settings, "seed": cell.seed}
    note, before = "", recorded_settings(folder)
    if before is not None:
        changed = "its settings have" if not same_settings(before, asked, folder) else ""
        if not changed:
            try:
                changed = sources.changed(cell, data, folder)
            except ContinualError as error:
                note = f"it could not be compared with what is there now: {error}"
        if changed:
            aside = _move_aside(folder, digest(before))
            note = f"{changed} changed since it was run: what it was is in '{aside}'."
        elif (folder / RESULT).is_file():
            load_result(folder)
            return None, note
    elif folder.is_dir() and any(folder.iterdir()):
        raise StateError(f"'{folder}' holds files that no study wrote: move them away, or name another out folder.")
    content = {"stream": cell.stream, "strategy": cell.strategy, "seed": cell.seed, "settings": asked}
    content["sha256"] = digest(asked)
    write_text(folder / CELL, json.dumps(content, indent=1, sort_keys=True, default=str) + "\n")
    for name in (ERROR, TRACEBACK, *(() if cell.resumable else (BEGUN,))):
        (folder / name).unlink(missing_ok=True)
    return {"cell": cell, "folder": folder, "resume": (folder / BEGUN).is_file()}, note


def _move_aside(folder: Path, digest: str) -> Path:
    places = (folder.parent / f".{folder.name}.{digest[:8]}.{attempt}.replaced" for attempt in count())
    aside = next(place for place in places if not place.exists())
    os.rename(folder, aside)
    return aside


def _work_off(
    jobs: deque[tuple[Cell, dict[str, Any]]],
    outcomes: dict[str, CellOutcome],
    notes: dict[str, str],
    workers: int,
    forks: bool,
    bar: tqdm[Any],
) -> None:
    free = [Worker(workers, forks) for _ in range(min(workers, len(jobs)))]
    running: dict[Future[str | None], tuple[Worker, Cell, Path, float]] = {}
    try:
        while jobs or running:
            while jobs and free:
                (cell, job), worker = jobs.popleft(), free.pop()
                running[worker.start(job)] = (worker, cell, job["folder"], time.monotonic())
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                worker, cell, folder, began = running.pop(future)
                worker.ended()
                free.append(worker)
                message = message_of(future, folder)
                status: Literal["done", "failed"] = "failed" if message else "done"
                said = message or notes[cell.label]
                outcomes[cell.label] = CellOutcome(cell, status, said, time.monotonic() - began)
                bar.update()
                bar.set_postfix_str(f"{cell.label} {status}")
    finally:
        for worker, _, _, _ in running.values():
            worker.kill()
        for worker in free:
            worker.close()


def _write_reports(study: Study, out: Path, outcomes: Sequence[CellOutcome], started: str, device: str) -> None:
    from continual.report import markdown_report, write_page, write_tables

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
    write_tables(results, out)
    write_text(out / "report.md", markdown_report(results, study.name, failures=failures))
    write_page(results, out / "report.html", study.name, summary=study.spec.summary, failures=failures)


def _device(device: str) -> str:
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
