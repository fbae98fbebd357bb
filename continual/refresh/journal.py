"""What happened to a store, line by line: append-only, flushed, each line holding the SHA-256 of the line before.

The journal is written before what it tells of, so that a process that was killed in between has left a promise, which the
next one keeps (:meth:`~continual.refresh.folder.Folder.recover`). A last line without its end is one that was being written
when the process was killed: it never counted.

After every line ``journal.end`` is replaced: how many lines there are, and the SHA-256 of the last. It may lag behind where a
process was killed between the two, and is never ahead, so a journal that has fewer lines was cut off at its end.
"""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge
from pydantic import Field

from continual.errors import StateError
from continual.monitor.gate import Answer
from continual.provenance import now
from continual.refresh.records import Count, Digest, Record, VersionName, read_record

Happening = Literal["created", "made", "promoted", "rolled back", "stopped", "accepted", "abandoned", "erased"]
GOES_LIVE: tuple[Happening, ...] = ("promoted", "rolled back")
FIRST = "0" * 64

_MARK = re.compile(rb"([0-9]{1,9}) ([0-9a-f]{64})\n")


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
        trained: versions whose weights were trained on the rows (``erased``).
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
    trained: tuple[Annotated[int, Ge(1)], ...] = ()
    sentence: str = ""
    before: Digest = FIRST


class Journal:
    """The file ``journal.jsonl`` of a store."""

    def __init__(self, path: Path) -> None:
        self.path, self.mark = path, path.with_suffix(".end")
        self._known: list[tuple[bytes, Entry, str]] = []
        """Lines that were checked before, as long as they stand at the head of the file: the entry and SHA-256 of each."""

    def read(self) -> list[Entry]:
        """Every entry, after the chain was checked.

        Raises:
            StateError: a line was changed, taken out or put in, or lines at the end are gone.
        """
        marked = self._marked()  # first: whoever writes meanwhile adds a line before he marks it
        lines, known = self._lines(), self._known
        if [line for line, _, _ in known] != lines[: len(known)]:
            known = []
        checked = list(known)
        for number, line in enumerate(lines[len(known) :], len(known)):
            before = checked[-1][2] if checked else FIRST
            where = f"line {number + 1} of '{self.path}'"
            entry = read_record(Entry, line, where)
            if entry.number != number or entry.before != before:
                raise StateError(
                    f"{where} does not follow from the line before: the journal was changed by hand; restore the store from a "
                    "backup."
                )
            checked.append((line, entry, hashlib.sha256(line).hexdigest()))
        if checked and marked is not None:
            self._check_end(marked, [digest for _, _, digest in checked])
        self._known = checked
        return [entry for _, entry, _ in checked]

    def _check_end(self, marked: tuple[int, str], digests: list[str]) -> None:
        count, last = marked
        if count > len(digests):
            raise StateError(
                f"'{self.path}' has {len(digests)} lines and had {count}: its end was cut off; restore the store from a backup, "
                f"or remove '{self.mark}' to go on with what is left."
            )
        if count and digests[count - 1] != last:
            raise StateError(
                f"line {count} of '{self.path}' is not the one that '{self.mark}' tells of: restore the store from a backup."
            )

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
        content_bytes = text.encode()
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "ab", buffering=0) as file:
                if file.write(content_bytes) != len(content_bytes):
                    raise OSError(28, "no space left on the device")
                os.fsync(file.fileno())
        except OSError as error:
            with suppress(OSError):
                os.truncate(self.path, size)
            raise self._unwritten(error) from error
        self._put_mark(len(lines) + 1, hashlib.sha256(content_bytes[:-1]).hexdigest())
        return entry

    def seal(self) -> None:
        """Mark the end where the mark is missing or lags behind; call it as the only writer, after :meth:`read`."""
        lines = self._lines()
        last = hashlib.sha256(lines[-1]).hexdigest() if lines else FIRST
        if lines and self._marked() != (len(lines), last):
            self._put_mark(len(lines), last)

    def mend(self) -> None:
        """Cut off a line that a killed process did not finish; call it as the only writer."""
        content = self.path.read_bytes() if self.path.is_file() else b""
        whole = content.rfind(b"\n") + 1
        if whole != len(content):
            os.truncate(self.path, whole)

    def _marked(self) -> tuple[int, str] | None:
        try:
            content = self.mark.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StateError(f"'{self.mark}' cannot be read ({error.strerror}): mend that and try again.") from error
        found = _MARK.fullmatch(content)
        if found is None:
            raise StateError(
                f"'{self.mark}' is damaged: restore the store from a backup, or remove it if nothing else is damaged."
            )
        return int(found[1]), found[2].decode()

    def _put_mark(self, lines: int, last: str) -> None:
        """Replace the mark. Where that fails it lags behind, which is no mistake: the line is on the disk."""
        temporary = self.mark.parent / f".{self.mark.name}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            with open(temporary, "wb") as file:
                file.write(f"{lines} {last}\n".encode())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.mark)
        except OSError:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

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
