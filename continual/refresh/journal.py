"""What happened to a store, line by line: append-only, flushed, each line holding the SHA-256 of the line before.

The journal is written before what it tells of, so that a process that was killed in between has left a promise, which the
next one keeps (:meth:`~continual.refresh.folder.Folder.recover`). A last line without its end is one that was being written
when the process was killed: it never counted.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge
from pydantic import Field

from continual.errors import StateError
from continual.monitor.gate import Answer
from continual.provenance import now
from continual.refresh.records import Count, Digest, Record, VersionName, read_record

Happening = Literal["created", "made", "promoted", "rolled back", "stopped", "abandoned", "erased"]
GOES_LIVE: tuple[Happening, ...] = ("promoted", "rolled back")
FIRST = "0" * 64


class Entry(Record):
    """One line.

    Attributes:
        number: from 0.
        version: that it is about, None where it is about none.
        manifest: SHA-256 of that version's manifest as it was written (``made``), or of ``store.json`` (``created``).
        parent, fingerprint, answer: of a version that was ``made``: what it was trained on from, its rows, the gate's answer.
        manifests: version → SHA-256 of its manifest from now on, of every version that was written anew (``erased``).
        rows: how many rows it is about (``erased``).
        erased: SHA-256 of ``erased.json`` from now on (``erased``).
        before: SHA-256 of the line before.
    """

    number: Count
    time: str
    event: Happening
    version: Annotated[int, Ge(1)] | None = None
    manifest: Digest | None = None
    parent: Annotated[int, Ge(1)] | None = None
    fingerprint: Digest | None = None
    answer: Answer | None = None
    manifests: dict[VersionName, Digest] = Field(default_factory=dict)
    rows: Count = 0
    erased: Digest | None = None
    sentence: str = ""
    before: Digest = FIRST


class Journal:
    """The file ``journal.jsonl`` of a store."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Entry]:
        """Every entry, after the chain was checked.

        Raises:
            StateError: a line was changed, taken out or put in.
        """
        entries: list[Entry] = []
        before = FIRST
        for number, line in enumerate(self._lines()):
            where = f"line {number + 1} of '{self.path}'"
            entry = read_record(Entry, line, where)
            if entry.number != number or entry.before != before:
                raise StateError(
                    f"{where} does not follow from the line before: the journal was changed by hand; restore the store from a "
                    "backup."
                )
            entries.append(entry)
            before = hashlib.sha256(line).hexdigest()
        return entries

    def append(self, event: Happening, **content: object) -> Entry:
        """Write one entry; it is on the disk when this returns.

        Raises:
            StateError: the disk is full or cannot be written; the journal is as it was.
        """
        try:
            self.mend()
        except OSError as error:
            raise self._unwritten(error) from error
        lines = self._lines()
        before = hashlib.sha256(lines[-1]).hexdigest() if lines else FIRST
        entry = Entry.model_validate({"number": len(lines), "time": now(), "event": event, "before": before, **content})
        text = entry.model_dump_json(exclude_defaults=False) + "\n"
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "ab", buffering=0) as file:
                content_bytes = text.encode()
                if file.write(content_bytes) != len(content_bytes):
                    raise OSError(28, "no space left on the device")
                os.fsync(file.fileno())
        except OSError as error:
            with suppress(OSError):
                os.truncate(self.path, size)
            raise self._unwritten(error) from error
        return entry

    def mend(self) -> None:
        """Cut off a line that a killed process did not finish; call it as the only writer."""
        content = self.path.read_bytes() if self.path.is_file() else b""
        whole = content.rfind(b"\n") + 1
        if whole != len(content):
            os.truncate(self.path, whole)

    def _unwritten(self, error: OSError) -> StateError:
        return StateError(
            f"'{self.path}' could not be written ({error.strerror or error}); nothing was done: free some space or mend the "
            "permissions, then give the same command again."
        )

    def _lines(self) -> list[bytes]:
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StateError(f"'{self.path}' cannot be read ({error.strerror}): mend that and try again.") from error
        return content.split(b"\n")[:-1]


def live_entry(entries: list[Entry]) -> Entry | None:
    """The entry that made the live version live; None where none is."""
    return next((entry for entry in reversed(entries) if entry.event in GOES_LIVE), None)


def erased_of(entries: list[Entry]) -> str | None:
    """SHA-256 that ``erased.json`` must have now; None where there is no such file."""
    return next((entry.erased for entry in reversed(entries) if entry.erased is not None), None)


def manifests_of(entries: list[Entry]) -> dict[int, str]:
    """Version → SHA-256 that its manifest must have now."""
    found: dict[int, str] = {}
    for entry in entries:
        if entry.event == "made" and entry.version is not None and entry.manifest is not None:
            found[entry.version] = entry.manifest
        if entry.event == "erased":
            found |= {int(version): digest for version, digest in entry.manifests.items()}
    return found
