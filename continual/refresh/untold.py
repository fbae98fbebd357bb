"""What is still to be told of updates: it is kept until it was told.

An outcome is put into ``untold/`` before the line of the journal that makes it true, in a file called after the number of that
line, and taken away after everyone was told (:func:`~continual.refresh.alerts.tell_waiting`). So a process that is killed
between the two leaves it to the next command that writes, and one that is killed before the line leaves a file of no meaning.
"""

from __future__ import annotations

import re
from pathlib import Path

from continual.errors import StateError
from continual.refresh.objects import write_bytes
from continual.refresh.records import Outcome, read_record, record_text

FOLDER = "untold"
_NAME = re.compile(r"[0-9]{6,9}\.json")


def put(store: Path, outcome: Outcome, line: int) -> None:
    """Keep an outcome that line ``line`` of the journal (from 0) makes true, and that is to be told.

    Raises:
        StateError: the disk is full or cannot be written.
    """
    write_bytes(store / FOLDER / f"{line:06d}.json", record_text(outcome).encode())


def waiting(store: Path, lines: int) -> list[Path]:
    """The files of what is to be told, the oldest first, where the journal has so many lines."""
    return [path for path in _files(store) if int(path.stem) < lines]


def outcome_in(path: Path) -> Outcome:
    """The outcome in a file.

    Raises:
        StateError: it cannot be read, or is none.
    """
    if path.is_symlink():
        raise StateError(f"'{path}' is a link: a store holds its own files; do not trust this folder.")
    try:
        return read_record(Outcome, path.read_bytes(), f"'{path}'")
    except OSError as error:
        raise StateError(f"'{path}' cannot be read ({error.strerror or error}): mend that and try again.") from error


def drop_void(store: Path, lines: int) -> None:
    """Take away what the journal, with so many lines, never made true; call it as the only writer."""
    for path in _files(store):
        if int(path.stem) >= lines:
            path.unlink(missing_ok=True)


def forget_rows(store: Path) -> None:
    """Take the names of single rows out of what is to be told, as an erasure does with reports.

    Raises:
        StateError: a file cannot be read or written.
    """
    for path in _files(store):
        outcome = outcome_in(path)
        found = tuple(one.without_rows() for one in outcome.found)
        if found != outcome.found:
            write_bytes(path, record_text(outcome.model_copy(update={"found": found})).encode())


def _files(store: Path) -> list[Path]:
    folder = store / FOLDER
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=lambda path: int(path.stem))
