"""What the tests of bad input share: small data to spoil, a look at a folder, a disk that is full."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from test_cli import Done, continual

from continual.disk import check_seal

RUN = ["run", "s.yaml", "naive", "--out", "out", "--device", "cpu", "--set", "training.epochs=1"]
STREAM: dict[str, Any] = {
    "source": {"kind": "files", "path": ".", "features": ["a", "b"]},
    "split": {"by": "class", "size": 1},
    "scenario": "class",
    "model": {"kind": "mlp", "hidden": [4]},
}
LOGITS = {"kind": "module", "class": "torch.nn:Linear"}
Rows = list[dict[str, Any]]


def run(*more: str, strategy: str = "naive", stream: str = "s.yaml") -> list[str]:
    """The arguments of a run into ``out``."""
    return ["run", stream, strategy, *RUN[3:], *more]


def rows(count: int = 24, start: int = 0, classes: int = 2, **more: Any) -> Rows:
    """Rows with the features a and b, one class after another; ``more`` goes into each."""
    return [{"a": float(start + n), "b": (start + n) / 2, "label": "abcdef"[n % classes], **more} for n in range(count)]


def each(found: Rows, **change: Callable[[int], Any]) -> Rows:
    """The rows with columns made from their place."""
    return [{**row, **{name: make(n) for name, make in change.items()}} for n, row in enumerate(found)]


def lines(found: Rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in found)


def csv(found: Rows) -> str:
    return "a,b,label\n" + "".join(f"{row['a']},{row['b']},{row['label']}\n" for row in found)


def write(folder: Path, files: dict[str, Any]) -> None:
    """Bytes and text as they are, anything else as YAML."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        plain = content if isinstance(content, str | bytes) else yaml.safe_dump(content, sort_keys=False)
        path.write_bytes(plain if isinstance(plain, bytes) else plain.encode())


def over(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """``base`` with keys replaced; a mapping without ``kind`` or ``by`` is laid over the one that is there."""
    found = dict(base)
    for key, value in changes.items():
        whole = not isinstance(value, dict) or "kind" in value or "by" in value
        found[key] = value if whole else {**base[key], **value}
    return found


@dataclass(frozen=True)
class Case:
    """A command that must be refused.

    Attributes:
        said: pieces of the sentence.
        files: written into the working folder first.
        ready: what is done after that.
    """

    name: str
    argv: list[str]
    said: tuple[str, ...]
    files: dict[str, Any] = field(default_factory=dict)
    status: int = 1
    ready: Callable[[Path], object] | None = None


def stream_case(
    name: str,
    *said: str,
    argv: list[str] | None = None,
    train: Rows | None = None,
    test: Rows | None = None,
    files: dict[str, Any] | None = None,
    **changes: Any,
) -> Case:
    """A run of a small stream with changed keys, rows or files."""
    given = files or {
        "train.jsonl": lines(rows() if train is None else train),
        "test.jsonl": lines(rows(12, 100) if test is None else test),
    }
    return Case(name, argv or run(), said, {**given, "s.yaml": over(STREAM, **changes)})


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file with its content, every folder with None; a lock does not count, nor a folder that holds nothing else."""
    found = {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if path.name != ".lock"
    }
    return {name: content for name, content in found.items() if content is not None or not _locked(folder / name)}


def _locked(folder: Path) -> bool:
    return [path.name for path in folder.iterdir()] == [".lock"]


def assert_refused(done: Done, status: int, said: tuple[str, ...]) -> str:
    """Status, form and pieces of what was said; returns it on one line."""
    assert "Traceback" not in done.stderr + done.stdout
    assert done.returncode == status, f"{done.returncode}: {done.stderr}"
    text = " ".join(done.stderr.replace("│", " ").split())
    if status == 1:
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert text.startswith("continual: ") and text[-1] in ".?)" and len(text) < 700, text
        for leak in ("<class", "<built-in", "object at 0x", "NoneType", "Value(", "constrained-", "pydantic"):
            assert leak not in text, text
    else:
        assert text.startswith("Usage: continual"), text
    for piece in said:
        assert piece in text, f"{piece!r} is not in: {text}"
    return text


def refuse(case: Case, folder: Path) -> None:
    """Run the case; the folder is afterwards what it was."""
    write(folder, case.files)
    if case.ready is not None:
        case.ready(folder)
    before = tree(folder)
    assert_refused(continual(*case.argv, cwd=folder), case.status, case.said)
    assert tree(folder) == before


def assert_whole(out: Path) -> None:
    """No file of a run is half-written, and nothing temporary is left."""
    for path in out.rglob("*"):
        assert path.suffix not in (".tmp", ".old"), path
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                assert list(file.keys())
        elif path.suffix in (".svg", ".html"):
            assert path.read_text(encoding="utf-8").rstrip().endswith(f"</{path.suffix[1:]}>")
    for name in ("checkpoint", "adapter"):
        if (out / name).exists():
            check_seal(out / name)


class FullDisk:
    """A disk with room for ``room`` more files below ``folder``; the next one is half written, then nothing goes."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path, room: int) -> None:
        self.folder, self.room, self.written = folder.resolve(), room, list[str]()
        write_text = Path.write_text

        def text(path: Path, data: str, *given: Any, **named: Any) -> int:
            if self._refuses(path):
                path.write_bytes(data.encode()[: len(data) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            return write_text(path, data, *given, **named)

        def tensors(found: Any, path: Any, *given: Any, **named: Any) -> None:
            save_file(found, path, *given, **named)
            if self._refuses(Path(path)):
                os.truncate(path, 10)
                raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

        patch.setattr(Path, "write_text", text)
        for module in ("state", "run", "parts.adapter.export"):
            patch.setattr(f"continual.{module}.save_file", tensors)

    def _refuses(self, path: Path) -> bool:
        if not path.resolve().is_relative_to(self.folder):
            return False
        self.written.append(path.name)
        return len(self.written) > self.room
