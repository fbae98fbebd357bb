"""One writer at a time, who is named; and any number of readers, who see a whole version whatever he does."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from bad_store_bench import columns, copied, quick_store, rows
from test_cli import continual

from continual.errors import StateError
from continual.refresh import Store
from continual.refresh.records import record_text

READERS = 48
ROWS = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [-3.0, 2.0, 1.0]])


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quick_store(tmp_path_factory.mktemp("grown"), 3).path


# Two writers

HOLDER = """
import json, sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1] + "/.lock")
lock.acquire()
with open(sys.argv[1] + "/.holder", "w") as file:
    json.dump({"process": 4711, "machine": "elsewhere", "what": "update", "since": "2026-01-02T03:04:05+00:00"}, file)
print("held", flush=True)
time.sleep(60)
"""
WRITES = ["update store new.jsonl --device cpu", "promote store 2", "rollback store", "erase store --rows ids.txt"]


def test_a_second_writer_is_told_who_writes(grown: Path, tmp_path: Path) -> None:
    path = copied(grown, tmp_path)
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(3)), encoding="utf-8")
    (tmp_path / "ids.txt").write_text("m0-1\n", encoding="utf-8")
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == "held\n"
            for command in WRITES:
                done = continual("store", *command.split(), cwd=tmp_path)
                assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done
                who = "process 4711 on elsewhere (`update`, since 2026-01-02T03:04:05+00:00)"
                assert f"'store' is being written by {who}: wait until it is done; readers may go on." in done.stderr
            for command in ("status store", "verify store", "predict store -i new.jsonl -o out.jsonl --device cpu"):
                assert continual("store", *command.split(), cwd=tmp_path).returncode == 0
            (path / ".holder").write_text("who knows", encoding="utf-8")
            with pytest.raises(StateError, match="being written by another process"):
                Store(path).promote(2)
        finally:
            other.kill()
    assert "made live by hand" in Store(path).promote(2), "the lock goes with the process that held it"
    assert not (path / ".holder").exists()


def test_a_second_writer_in_another_thread(grown: Path, tmp_path: Path) -> None:
    path = copied(grown, tmp_path)
    found: list[str] = []

    def write() -> None:
        try:
            Store(path).promote(1)
        except StateError as error:
            found.append(str(error))

    with Store(path).folder.writing("erase"):
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
    assert f"process {os.getpid()} on {platform.node()} (`erase`, since 20" in found[0]
    assert Store(path).live == 3 and "made live" in Store(path).promote(1)


# Readers


def read_status(store: Store) -> None:
    status = store.status()
    assert status.live in (1, 2, 3, 4) and f"live: version {status.live} of" in str(status)
    assert {one.name for one in status.measured} == {f"month-{month}" for month in range(status.live)}


def read_manifest(store: Store) -> None:
    live = store.live
    assert live is not None
    manifest, report = store.manifest(live), store.report(live)
    assert manifest.version == report.version == live and manifest.update == live - 1 and manifest.erased <= 2


def read_report(store: Store) -> None:
    for number in store.versions():
        report = store.report(number)
        while True:  # an erasure may come between the two
            manifest = store.manifest(number)
            if hashlib.sha256(record_text(report).encode()).hexdigest() == manifest.pieces["report"].sha256:
                break
            assert manifest.erased
            report = store.report(number)


def read_state(store: Store) -> None:
    number = random.Random().choice(store.versions())
    state = store.folder.state(number)
    assert state["updates"] == number == len(state["ledger"]["entries"]) == len(state["tests"])
    for index, entry in enumerate(state["ledger"]["entries"]):
        test = state["tests"][str(index)]["dense"]["row"]
        assert set(test.tolist()) <= set(entry["tested_ids"].tolist()), "test rows and ledger are of the same moment"


def read_history(store: Store) -> None:
    numbers = [entry.number for entry in store.history()]
    assert numbers == list(range(len(numbers))) and len(numbers) >= 7
    erased = store.folder.erased()
    assert "version 1" in store.compare(1) and list(erased) == sorted(set(erased))


READS: list[Callable[[Store], None]] = [read_status, read_manifest, read_report, read_state, read_history]

PREDICTS = """
import sys, json, torch
from continual import Store
torch.set_num_threads(1)
store, rows = Store(sys.argv[1]), torch.tensor(json.loads(sys.argv[2]))
while True:
    live = store.live
    learner = store.learner(live, device="cpu")
    print(json.dumps([live, learner.updates, learner.predict(rows)["scores"].tolist()]), flush=True)
"""


@contextmanager
def readers(path: Path) -> Iterator[list[str]]:
    """Readers in threads, each with its own store or one that it shares; what went wrong in them is in the list."""
    wrong: list[str] = []
    counts = [0] * READERS
    over = threading.Event()
    shared = Store(path)

    def read(place: int) -> None:
        draw = random.Random(place)
        store = shared if place % 2 else Store(path)
        while not over.is_set():
            try:
                READS[place % len(READS)](store)
            except BaseException as error:
                wrong.append(f"{READS[place % len(READS)].__name__}: {type(error).__name__}: {error}")
                return
            counts[place] += 1
            time.sleep(draw.uniform(0, 0.4))

    threads = [threading.Thread(target=read, args=(place,)) for place in range(READERS)]
    for thread in threads:
        thread.start()
    try:
        yield wrong
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert min(counts) > 0 or wrong, "every reader has read"


def write_everything(store: Store) -> None:
    """An update, and everything that changes which version is live, or what it holds."""
    store.update(columns(rows(3)), name="month-3", device="cpu", progress=False)
    for _ in range(2):
        store.rollback()
        store.rollback(1)
        store.promote(4)
    store.erase([f"m{month}-{place}" for month in range(3) for place in range(0, 16, 3)])
    store.rollback()
    store.erase(["m0-1", "m1-1"])
    store.promote(4)


def test_fifty_readers_while_everything_is_written(grown: Path, tmp_path: Path) -> None:
    twin = Store(copied(grown, tmp_path / "twin"))
    known = {number: twin.learner(number, device="cpu").predict(ROWS)["scores"] for number in (1, 2, 3)}
    write_everything(twin)
    known[4] = twin.learner(4, device="cpu").predict(ROWS)["scores"]
    path = copied(grown, tmp_path / "read")
    command = [sys.executable, "-c", PREDICTS, str(path), json.dumps(ROWS.tolist())]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    out = tmp_path / "predicted.jsonl"
    with (
        out.open("w") as told,
        subprocess.Popen(command, stdout=told, stderr=subprocess.STDOUT, env=environment) as predicts,
    ):
        try:
            while not out.stat().st_size and predicts.poll() is None:
                time.sleep(0.05)
            with readers(path) as wrong:
                write_everything(Store(path))
            assert wrong == [] and predicts.poll() is None, out.read_text(encoding="utf-8")
        finally:
            predicts.kill()
    seen = [json.loads(line) for line in out.read_text(encoding="utf-8").split("\n")[:-1]]
    for live, updates, scores in seen:
        assert live == updates and torch.equal(torch.tensor(scores), known[live])
    assert len({live for live, _, _ in seen}) > 1
    store = Store(path)
    assert store.verify() == [] and store.live == twin.live == 4
    for number in store.versions():
        ours, theirs = (one.manifest(number).pieces for one in (store, twin))
        assert {name: piece for name, piece in ours.items() if name not in ("clock", "report")} == {
            name: piece for name, piece in theirs.items() if name not in ("clock", "report")
        }


def test_readers_never_hinder_a_writer(grown: Path, tmp_path: Path) -> None:
    """Neither those that find nothing wrong, nor those that look again and again at what is damaged."""
    path = copied(grown, tmp_path)
    (path / "versions" / "0001" / "report.json").write_text("{}", encoding="utf-8")
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            with pytest.raises(StateError, match=r"0001/report\.json"):
                Store(path).report(1)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for version in (2, 3) * 10:
            Store(path).promote(version)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert Store(path).live == 3


LIGHT = """
import sys
from continual import Store
store = Store(sys.argv[1])
print(store.status(), store.compare(1), store.history(), store.manifest(), store.report(), store.verify(), sep="\\n")
print(store.rollback(), store.promote(3), store.abandon(), sep="\\n")
heavy = {"torch", "transformers", "pandas", "datasets", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""


def test_who_only_asks_or_points_does_not_wait_for_torch(grown: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT, str(copied(grown, tmp_path))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
