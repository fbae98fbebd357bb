"""Commands that a store must refuse: on its rows, on their options, on what became of its files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bad_bench import Case
from bad_store_bench import lines, piece_path, rows

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(9 * ['*' + before])}]\n" for before, name in zip("abcdef", "bcdefg", strict=True)
)
Ready = Callable[[Path], object]
NEW = lines(rows(3))
IDS = {"ids.txt": "m0-1\nm0-2\n"}
PREDICT = {"new.jsonl": NEW}


def update(name: str, content: str | bytes, *said: str, file: str = "new.jsonl", ready: Ready | None = None) -> Case:
    argv = ["store", "update", "store", file, "--device", "cpu"]
    return Case(f"update, {name}", argv, (f"'{file}'", *said), {file: content}, ready=ready)


def new(name: str, *said: str, month: int = 3, ready: Ready | None = None, count: int = 16, **change: Any) -> Case:
    return update(name, lines(rows(month, count, **change)), *said, ready=ready)


def option(
    argv: str, *said: str, status: int = 1, files: dict[str, Any] | None = None, ready: Ready | None = None
) -> Case:
    return Case(argv, ["store", *argv.split()], said, files or {}, status, ready)


def init(
    argv: str, *said: str, files: dict[str, Any] | None = None, status: int = 1, more: tuple[str, ...] = (),
    features: tuple[str, ...] = ("--feature", "a"),
) -> Case:  # fmt: skip
    command = ["store", "init", "fresh", *argv.split(), *more, *features]
    return Case(f"init {argv} {' '.join(more)}", command, said, files or {}, status)


def at(name: str, change: Callable[[bytes], bytes] | bytes | None) -> Ready:
    """A file of the store changed, replaced, or (None) taken away."""

    def ready(folder: Path) -> None:
        path = folder / "store" / name
        if change is None:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif callable(change):
            path.write_bytes(change(path.read_bytes()))
        else:
            path.write_bytes(change)

    return ready


def line_out(number: int) -> Ready:
    return at(
        "journal.jsonl",
        lambda text: b"".join(line for place, line in enumerate(text.splitlines(True)) if place != number),
    )


def piece(name: str, change: Callable[[bytes], bytes] | None, version: int = 3) -> Ready:
    """A piece of a version changed or taken away."""

    def ready(folder: Path) -> None:
        path = piece_path(folder / "store", version, name)
        path.unlink() if change is None else path.write_bytes(change(path.read_bytes()))

    return ready


def link(name: str) -> Ready:
    """A file or folder of the store moved out, and a link put in its place."""

    def ready(folder: Path) -> None:
        path = folder / "store" / name
        away = folder / "outside"
        if path.exists():
            path.rename(away)
        else:
            away.mkdir()
        path.symlink_to(away, target_is_directory=away.is_dir())

    return ready


def flipped(content: bytes) -> bytes:
    return content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


READS = {
    "status": ["status", "store"],
    "verify": ["verify", "store"],
    "history": ["history", "store"],
    "predict": ["predict", "store", "-i", "new.jsonl", "-o", "out.jsonl", "--device", "cpu"],
    "export": ["export", "store", "--to", "out"],
}
WRITES = {
    "update": ["update", "store", "new.jsonl", "--device", "cpu"],
    "promote": ["promote", "store", "2"],
    "rollback": ["rollback", "store"],
    "erase": ["erase", "store", "--rows", "ids.txt"],
}


def damage(name: str, ready: Ready, commands: str, *said: str) -> list[Case]:
    """Commands that must refuse a damaged store, all with the same sentence or a part of it."""
    found = []
    for command in commands.split():
        argv = ["store", *{**READS, **WRITES}[command]]
        found.append(Case(f"{command}, {name}", argv, said, {**PREDICT, **IDS}, ready=ready))
    return found


ALL = "status verify history predict update promote rollback erase"
M3, R3 = "versions/0003/manifest.json", "versions/0003/report.json"
