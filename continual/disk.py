"""Files and folders written so that a reader sees the old or the new, and never a part: renames, seals, locks, flushes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from continual.errors import StateError

_SEAL = "seal.json"
_SAFE_NAME = re.compile(r"[A-Za-z0-9._+-]+")


def seal_folder(folder: Path) -> None:
    """Flush every file of ``folder`` and write ``seal.json``: the SHA-256 of each."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != _SEAL:
            digests[path.relative_to(folder).as_posix()] = file_sha256(path)
            flush(path)
    (folder / _SEAL).write_text(json.dumps(digests, indent=1), encoding="utf-8")
    flush(folder / _SEAL)
    flush(folder)


def check_seal(folder: Path, needed: Collection[str] = ()) -> None:
    """Raise :class:`StateError` unless every file of ``folder`` is there and unchanged, and those ``needed`` are sealed."""
    if not (folder / _SEAL).is_file():
        raise StateError(f"'{folder}' holds no saved state: name a folder that was written by continual.")
    try:
        digests = json.loads((folder / _SEAL).read_text(encoding="utf-8"))
        items = [(str(name), str(digest)) for name, digest in digests.items()]
    except (ValueError, AttributeError) as error:
        raise StateError(f"the seal of '{folder}' is damaged ({error}): use an earlier state.") from error
    loose = sorted(set(needed) - {name for name, _ in items})
    if loose:
        raise StateError(f"the seal of '{folder}' does not cover '{loose[0]}': do not trust this folder.")
    for name, digest in items:
        path = folder / name
        if Path(name).is_absolute() or not all(_SAFE_NAME.fullmatch(p) and p != ".." for p in Path(name).parts):
            raise StateError(f"the seal of '{folder}' names a file outside it ('{name}'): do not trust this folder.")
        if not path.is_file() or path.is_symlink():
            raise StateError(f"'{path}' is missing: the state is incomplete, use an earlier one.")
        if file_sha256(path) != digest:
            raise StateError(f"'{path}' is not what was written (its SHA-256 differs): use an earlier state.")


def check_replaceable(folder: Path) -> None:
    """Raise :class:`StateError` where ``folder`` holds anything but a sealed folder of ours, which alone is replaced."""
    if not (folder.exists() or folder.is_symlink()):
        return
    if folder.is_symlink() or not folder.is_dir() or (not (folder / _SEAL).is_file() and any(folder.iterdir())):
        raise StateError(
            f"'{folder}' holds something that was not written by continual, and writing there would remove it: name a new "
            "folder, or an empty one."
        )


def replace_folder(temporary: Path, folder: Path) -> None:
    """Rename ``temporary`` to ``folder``; what was there is moved aside first and removed last.

    Raises:
        StateError: what is there was not written by us.
    """
    check_replaceable(folder)
    aside = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.old"
    if folder.exists():
        os.rename(folder, aside)
    os.rename(temporary, folder)
    flush(folder.parent)
    for left in _asides(folder, "old", "tmp"):
        shutil.rmtree(left, ignore_errors=True)


def recover_folder(folder: Path) -> None:
    """Put back what :func:`replace_folder` had moved aside when it was killed between its two renames."""
    if not folder.exists() and folder.parent.is_dir():
        for aside in sorted(_asides(folder, "old"), key=lambda path: path.stat().st_mtime_ns, reverse=True):
            try:
                check_seal(aside)
            except StateError:
                continue
            with suppress(FileNotFoundError):  # another process has just done the same
                os.rename(aside, folder)
            return


def _asides(folder: Path, *endings: str) -> list[Path]:
    """What was put aside for ``folder`` itself, and for no other whose name begins alike."""
    form = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{8}}\.({'|'.join(endings)})")
    return [path for path in folder.parent.iterdir() if form.fullmatch(path.name)]


def sweep(folder: Path) -> None:
    """Remove what a process that was killed had begun to write into ``folder``; call it as the only writer there."""
    for left in folder.glob(".*.tmp"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old text or the new one."""
    path = Path(path)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        flush(temporary)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise StateError(
            f"'{path}' could not be written ({error.strerror or error}): free some space or name another place, then run "
            "it again."
        ) from error


@contextmanager
def alone(out: Path, what: str) -> Iterator[None]:
    """Make the folder ``out`` and hold its lock: one process at a time writes there.

    Args:
        what: is done there, as the sentence to another process says: ``run``, ``study``.

    Raises:
        StateError: another process holds it, or the folder cannot be made or written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / ".lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise StateError(f"another {what} is under way in '{out}': wait for it, or name another out folder.") from error
    except OSError as error:
        raise StateError(
            f"the out folder '{out}' cannot be made or written ({error}): name another out folder."
        ) from error
    try:
        yield
    finally:
        lock.release()


def read_object(path: Path, advice: str) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        advice: what to do where it is damaged; it ends the sentence.

    Raises:
        StateError: it cannot be read, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StateError(f"'{path}' is damaged ({error}): {advice}") from error
    if not isinstance(found, dict):
        raise StateError(f"'{path}' is damaged (it holds {type(found).__name__}, not an object): {advice}")
    return found


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
