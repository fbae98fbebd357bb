"""The folder of a store: which versions there are, which one is live, and one writer at a time.

``CURRENT`` names the live version and is replaced by a rename; ``versions/0008`` holds a version's manifest and report;
``staged/0008`` what is about to take its place there. What happens is promised in the journal first and done then, so that
whoever writes next finishes what a killed process had promised (:meth:`Folder.recover`), and any number of readers see
the store before it or after it.

What is read while it is written and what is written while it is read stand in one file, since each is right only beside the
other; hence its length.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Ge
from filelock import FileLock, Timeout
from pydantic import Field, StringConstraints

from continual.disk import flush, read_object
from continual.errors import StateError
from continual.kinds import Objective, Scenario
from continual.models.spec import parse_model_spec
from continual.provenance import now
from continual.refresh.journal import Entry, Journal, erased_of, live_entry, manifests_of
from continual.refresh.objects import Objects, write_bytes
from continual.refresh.pieces import State, join
from continual.refresh.records import Count, Digest, Manifest, Piece, Record, Report, read_record, record_text
from continual.refresh.rules import Rules
from continual.refresh.untold import drop_void
from continual.streams.folders import own_cache

OWN = (
    *(
        "store.json",
        "rules.yaml",
        "CURRENT",
        "journal.jsonl",
        "journal.end",
        "erased.json",
        ".lock",
        ".holder",
        ".telling",
    ),
    *("versions", "objects", "staged", "work", "cache", "untold"),
)
"""What lies in a store, all of it its own."""
READS = 5
"""How often a reader looks again where a writer has just put something else in place."""

_LIVE = re.compile(rb"[1-9][0-9]{0,8}\n")
_NUMBER = re.compile(r"(?!0000$)(0[0-9]{3}|[1-9][0-9]{3,8})")
_Found = TypeVar("_Found")


class Columns(Record):
    """Which column of the rows is what, as for the source ``files``; None takes the usual name."""

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    features: list[str] | None = None
    label: str | None = None
    id: str | None = None


class Settings(Record):
    """``store.json``: what a store is, from its first day on.

    Attributes:
        strategy: as a mapping, and what reports call it.
        salt: made from the seed, and mixed into the hash that makes a row's id a number.
        base_model_sha256: of the model's weights; None where it begins with random ones.
    """

    format: Literal[1] = 1
    created: str
    model: dict[str, Any]
    base_model_sha256: Digest | None
    strategy: dict[str, Any]
    strategy_name: str
    seed: Annotated[int, Ge(0)]
    scenario: Scenario
    objective: Objective
    columns: Columns = Field(default_factory=Columns)
    salt: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]


class Erased(Record):
    """``erased.json``: the hashed ids of erased rows."""

    rows: tuple[Count, ...] = ()


class Folder:
    """One store's folder, to read and, inside :meth:`writing`, to write.

    Raises:
        StateError: it holds no store.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.objects = Objects(self.path / "objects")
        self.journal = Journal(self.path / "journal.jsonl")
        self.versions, self.staged, self.work = (self.path / name for name in ("versions", "staged", "work"))
        for name in OWN:
            no_link(self.path / name)
        if not (self.path / "store.json").is_file():
            raise StateError(f"'{path}' holds no store: make one with `continual store init`, or name another folder.")

    @cached_property
    def settings(self) -> Settings:
        """What the store is."""
        path = self.path / "store.json"
        content, entries = read_file(path), self._entries()
        if entries[0].manifest != hashlib.sha256(content).hexdigest():
            raise StateError(
                f"'{path}' is not what was written (its SHA-256 is not the journal's): restore the store from a backup."
            )
        found = read_record(Settings, content, f"'{path}'")
        parse_model_spec(found.model, f"'{path}'")
        return found

    @property
    def rules(self) -> Rules:
        """What updates are held to, as the file says now.

        Raises:
            StateError: there is no such file.
            SpecError: it says something that is not allowed.
        """
        path = no_link(self.path / "rules.yaml")
        if not path.is_file():
            raise StateError(
                f"'{path}' is missing: write the rules anew ('{{}}' takes every default), or restore the file."
            )
        return Rules.load(path)

    # Reading

    def under_way(self) -> str | None:
        """The rows of an update that has begun and is not done, as they were named; None where there is none."""
        path = no_link(self.work / "update.json")
        advice = "give the update's command again with --abandon."
        return str(read_object(path, advice).get("path")) if path.is_file() else None

    def current(self) -> int | None:
        """The live version, None where none is.

        Raises:
            StateError: the file that names it is damaged or missing.
        """
        return self._again(self._current)

    def _current(self) -> int | None:
        path = self.path / "CURRENT"
        content = read_file(path) if path.exists() else None
        if content is not None and _LIVE.fullmatch(content):
            return int(content)
        entries = self.journal.read()
        live = live_entry(entries)
        if live is None and content is None:
            return None
        if live is not None and content is None and live is entries[-1] and live_entry(entries[:-1]) is None:
            return live.version  # promised, and about to be written
        what = "is missing" if content is None else "names no version"
        mend = "remove it" if live is None else f"`continual store promote {self.path} {live.version}` puts it right"
        raise StateError(f"'{path}' {what}: {mend}.")

    def numbers(self) -> list[int]:
        """Every version there is, rising."""
        if not self.versions.is_dir():
            return []
        with os.scandir(self.versions) as entries:
            return sorted(int(one.name) for one in entries if _NUMBER.fullmatch(one.name) and one.is_dir())

    def manifest(self, version: int) -> Manifest:
        """What a version is made of, as the journal knows it.

        Raises:
            StateError: there is no such version, or its manifest is not what was written.
        """
        return self._again(lambda: self._manifest(version))

    def report(self, version: int) -> Report:
        """What is known of a version."""

        def read() -> Report:
            piece = self._piece(version, "report")
            for path in self.places(version, "report.json"):
                content = read_file(path)
                if hashlib.sha256(content).hexdigest() == piece.sha256:
                    return read_record(Report, content, f"'{path}'")
            path = self.place(version) / "report.json"
            what = "is not what was written (its SHA-256 differs)" if path.is_file() else "is missing"
            raise StateError(f"'{path}' {what}: restore it from a backup.")

        return self._again(read)

    def state(self, version: int) -> State:
        """The learner's state in a version; every byte is checked.

        Raises:
            StateError: something is missing or was changed.
        """

        def read() -> State:
            pieces = self._manifest(version).pieces
            found = {name: self.objects.read(piece, f"{name} of version {version}") for name, piece in pieces.items()
                     if name not in ("report", "form")}  # fmt: skip
            try:
                return join(found)
            except (LookupError, TypeError, AttributeError, ValueError) as error:
                raise StateError(
                    f"version {version} is no whole state ({type(error).__name__}: {error}): restore the store from a backup."
                ) from error

        return self._again(read)

    def piece(self, version: int, name: str) -> State:
        """One piece of a version's state."""
        return self._again(lambda: self.objects.read(self._piece(version, name), f"{name} of version {version}"))

    def digest(self, version: int) -> str:
        """SHA-256 that the manifest of a version has now."""
        self.manifest(version)
        return self._digests()[version][-1]

    def erased(self) -> tuple[int, ...]:
        """Ids of the rows that were erased, so that no later update brings them back.

        Raises:
            StateError: the file that holds them is missing, or not what was written.
        """
        return self._again(self._erased).rows

    def _erased(self) -> Erased:
        path = self.path / "erased.json"
        places = [no_link(one) for one in (path, self.staged / "erased.json")]
        found = [read_file(one) for one in places if one.is_file()]
        wanted = erased_of(self.journal.read())
        if wanted is None and not path.is_file():
            return Erased()
        for content in found:
            if hashlib.sha256(content).hexdigest() == wanted:
                return read_record(Erased, content, f"'{path}'")
        what = "is not what was written (its SHA-256 is not the journal's)" if path.is_file() else "is missing"
        raise StateError(f"'{path}' {what}: restore the store from a backup.")

    def line(self, version: int | None) -> list[int]:
        """A version and those that it was trained on from, the first one first."""
        parents = {entry.version: entry.parent for entry in self.journal.read() if entry.event == "made"}
        found: list[int] = []
        while version is not None:
            found.append(version)
            parent = parents.get(version)
            if parent is not None and parent >= version:
                raise StateError(
                    f"version {version} comes before its parent {parent}: restore the store from a backup."
                )
            version = parent
        return found[::-1]

    def lacking(self, version: int, other: int | None) -> list[str]:
        """Names of what ``other`` and the versions before it learnt and ``version`` and those before it did not, by its rows."""
        rows = {entry.version: entry.fingerprint for entry in self.journal.read() if entry.event == "made"}
        have = {rows.get(one) for one in self.line(version)}
        return [self.manifest(one).experience for one in self.line(other) if rows.get(one) not in have]

    def place(self, version: int) -> Path:
        """The folder of a version.

        Raises:
            StateError: it is a link.
        """
        return no_link(self.versions / f"{version:04d}")

    def places(self, version: int, name: str) -> list[Path]:
        """The files of a version that are called so: in its place, and beside it while what was promised is not yet done."""
        folders = (self.place(version), no_link(self.staged / f"{version:04d}"))
        return [path for path in (no_link(folder / name) for folder in folders) if path.is_file()]

    def _manifest(self, version: int) -> Manifest:
        found = [(read_file(path), path) for path in self.places(version, "manifest.json")]
        known, there = self._digests().get(version, []), self.numbers()
        for digest in reversed(known):
            for content, path in found:
                if hashlib.sha256(content).hexdigest() == digest:
                    return read_record(Manifest, content, f"'{path}'")
        if not known and version not in there:
            other = f"there are {there[0]} to {there[-1]}" if there else "there is none yet"
            raise StateError(f"'{self.path}' has no version {version}: {other}.")
        what = "is not what was written (its SHA-256 is not in the journal)" if found else "is missing"
        raise StateError(f"'{self.place(version) / 'manifest.json'}' {what}: restore the store from a backup.")

    def _piece(self, version: int, name: str) -> Piece:
        pieces = self._manifest(version).pieces
        if name not in pieces:
            raise StateError(f"version {version} has no piece '{name}': restore the store from a backup.")
        return pieces[name]

    def _digests(self) -> dict[int, list[str]]:
        """Version → every SHA-256 that its manifest has had, the newest last; read again when the journal grew."""
        stat = self.journal.path.stat() if self.journal.path.exists() else None
        mark = None if stat is None else (stat.st_size, stat.st_mtime_ns, stat.st_ino)
        if getattr(self, "_known_mark", ()) != mark:
            found: dict[int, list[str]] = {}
            for entry in self.journal.read():
                for version, digest in manifests_of([entry]).items():
                    found.setdefault(version, []).append(digest)
            self._known, self._known_mark = found, mark
        return self._known

    def _entries(self) -> list[Entry]:
        entries = self.journal.read()
        if not entries:
            raise StateError(f"'{self.journal.path}' is missing or empty: restore the store from a backup.")
        return entries

    def _again(self, read: Callable[[], _Found]) -> _Found:
        """What ``read`` gives; tried once more where it fails, and more often while somebody writes."""
        for attempt in range(READS):
            try:
                return read()
            except StateError:
                if attempt == READS - 1 or (attempt and not (self.path / ".holder").exists()):
                    raise
                time.sleep(0.02 * 2**attempt)
        raise AssertionError

    # Writing

    @contextmanager
    def cached(self) -> Iterator[None]:
        """Inside, what is cached lies in the store, so that it fits where the store does; at the end it goes."""
        cache = self.path / "cache"
        with own_cache(cache):
            try:
                yield
            finally:
                shutil.rmtree(cache, ignore_errors=True)

    @contextmanager
    def writing(self, what: str) -> Iterator[Entry | None]:
        """Hold the store as its only writer, after what an earlier one left unfinished was finished.

        Yields:
            The entry of the journal by which a version went live only now, since an earlier command broke off before that.

        Raises:
            StateError: another process holds it, or the folder cannot be written.
        """
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise StateError(
                f"'{self.path}' is being written by {self._holder()}: wait until it is done; readers may go on."
            ) from error
        except OSError as error:
            raise StateError(
                f"'{self.path}' cannot be written ({error.strerror or error}): mend its permissions, or copy the store."
            ) from error
        try:
            holder = {"process": os.getpid(), "machine": platform.node(), "what": what, "since": now()}
            write_bytes(self.path / ".holder", json.dumps(holder).encode())
            yield self.recover()
        finally:
            with suppress(OSError):
                (self.path / ".holder").unlink(missing_ok=True)
            lock.release()

    def recover(self) -> Entry | None:
        """Finish what was promised in the journal and remove what was not; call it as the only writer.

        Returns:
            The last entry, where a version goes live by it only now.

        Raises:
            StateError: the disk is full or cannot be written; what is not finished stays promised.
        """
        with self._on_disk():
            return self._recover()

    def _recover(self) -> Entry | None:
        self.journal.mend()
        shutil.rmtree(self.path / "cache", ignore_errors=True)
        if not no_link(self.work / "update.json").is_file():  # what is left there is of no update any more
            shutil.rmtree(no_link(self.work), ignore_errors=True)
        for folder in (self.path, self.versions, self.staged, self.path / "untold"):
            for left in folder.glob(".*.tmp"):
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
        entries = self._entries()
        self.journal.seal()
        drop_void(self.path, len(entries))
        self._settle(entries)
        if entries and entries[-1].event == "erased":
            with suppress(StateError):  # a damaged version must not keep anybody from rolling back
                self.sweep()  # files that held the rows, where it was killed before they were removed
        live, path = live_entry(entries), self.path / "CURRENT"
        if live is None or live.version is None:
            path.unlink(missing_ok=True)
        elif not path.is_file() or path.read_bytes() != _pointer(live.version):
            self._point(live.version)
            return live if live is entries[-1] else None
        return None

    def stage(self, manifest: Manifest, report: Report) -> str:
        """Put a version's manifest and report beside its place; returns the manifest's SHA-256, for the journal."""
        folder = self.staged / f"{manifest.version:04d}"
        text = record_text(manifest).encode()
        write_bytes(folder / "report.json", record_text(report).encode())
        write_bytes(folder / "manifest.json", text)
        with self._on_disk():
            flush(self.staged)
        return hashlib.sha256(text).hexdigest()

    def add(self, manifest: Manifest, report: Report) -> None:
        """Add a version, whose pieces lie in ``objects`` already."""
        digest = self.stage(manifest, report)
        self.journal.append(
            "made",
            version=manifest.version,
            manifest=digest,
            parent=manifest.parent,
            fingerprint=manifest.data.fingerprint,
            answer=manifest.answer,
            sentence=manifest.sentence,
        )
        self._settle(self.journal.read())

    def go_live(self, version: int, event: Literal["promoted", "rolled back"], sentence: str) -> None:
        """Make a version the live one."""
        self.manifest(version)
        self.journal.append(event, version=version, sentence=sentence)
        self._point(version)

    def put_erased(
        self, manifests: dict[int, str], gone: Sequence[int], rows: int, trained: Sequence[int], sentence: str
    ) -> None:
        """Put the staged manifests, which the journal then knows by these digests, in the place of the old ones.

        Args:
            gone: ids of all rows that were ever erased.
            rows: how many of them were erased now.
            trained: versions whose weights were trained on them.
        """
        named = {str(version): digest for version, digest in manifests.items()}
        content = record_text(Erased(rows=tuple(gone))).encode()
        write_bytes(self.staged / "erased.json", content)
        digest = hashlib.sha256(content).hexdigest()
        self.journal.append(
            "erased", manifests=named, rows=rows, erased=digest, trained=tuple(trained), sentence=sentence
        )
        self._settle(self.journal.read())

    def sweep(self) -> int:
        """Remove every object that no version is made of."""
        made = manifests_of(self.journal.read())
        used = {piece.sha256 for version in made for piece in self.manifest(version).pieces.values()}
        with self._on_disk():
            return self.objects.sweep(used)

    def tidy(self) -> None:
        """Remove what a command that failed has staged and nothing promises, and its objects, as far as that is possible."""
        with suppress(OSError, StateError):
            self._settle(self.journal.read())
            self.sweep()

    @contextmanager
    def _on_disk(self) -> Iterator[None]:
        """What the system refuses inside becomes a :class:`StateError`."""
        try:
            yield
        except OSError as error:
            raise StateError(
                f"'{self.path}' could not be written ({error.strerror or error}): free some space or mend its permissions, then "
                "give the same command again."
            ) from error

    def abandon(self) -> str | None:
        """Give up an update that broke off, with what it had reached; returns a sentence, None where there is none."""
        if not self.work.is_dir():
            return None
        try:
            what = f"the update with '{self.under_way()}'"
        except StateError:
            what = "an update of which nothing could be read"
        self.journal.append("abandoned", sentence=f"{what} was given up")
        shutil.rmtree(self.work, ignore_errors=True)
        self.tidy()
        return f"{what} was given up"

    def _settle(self, entries: list[Entry]) -> None:
        """Put what is staged and was promised in its place, and remove what was not."""
        with self._on_disk():
            self._put_in_place(entries)

    def _put_in_place(self, entries: list[Entry]) -> None:
        if not self.staged.is_dir():
            return
        wanted, erased = manifests_of(entries), no_link(self.staged / "erased.json")
        if erased.is_file():
            if hashlib.sha256(erased.read_bytes()).hexdigest() == erased_of(entries):
                os.replace(erased, self.path / "erased.json")
                flush(self.path)
            erased.unlink(missing_ok=True)
        for folder in sorted(no_link(one) for one in self.staged.iterdir()):
            path = no_link(folder / "manifest.json")
            version = int(folder.name) if _NUMBER.fullmatch(folder.name) else 0
            if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == wanted.get(version):
                place = self.place(version)
                place.mkdir(parents=True, exist_ok=True)
                if (folder / "report.json").is_file():
                    os.replace(folder / "report.json", place / "report.json")
                os.replace(path, place / "manifest.json")
                flush(place)
                flush(self.versions)
            shutil.rmtree(folder, ignore_errors=True)

    def _point(self, version: int) -> None:
        path = self.path / "CURRENT"
        try:
            write_bytes(path, _pointer(version))
        except StateError:
            if not path.is_file() or path.read_bytes() != _pointer(version):
                raise  # where it is there and only its flush failed, the journal holds it

    def _holder(self) -> str:
        try:
            found = json.loads((self.path / ".holder").read_text(encoding="utf-8"))
            return f"process {found['process']} on {found['machine']} (`{found['what']}`, since {found['since']})"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"


def make_folder(path: Path, settings: Settings, rules: str) -> Folder:
    """Make a store's folder.

    Args:
        rules: text of ``rules.yaml``.

    Raises:
        StateError: there is something in it, or it cannot be written.
    """
    path = Path(path)
    made = not path.exists()
    if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        raise StateError(f"'{path}' is not empty: name a new folder for the store.")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StateError(f"'{path}' cannot be made ({error.strerror or error}): name another folder.") from error
    try:
        content = record_text(settings).encode()
        write_bytes(path / "rules.yaml", rules.encode())
        Journal(path / "journal.jsonl").append(
            "created",
            manifest=hashlib.sha256(content).hexdigest(),
            sentence=f"a store of '{settings.strategy_name}', on Python {sys.version.split()[0]}",
        )
        write_bytes(path / "store.json", content)
    except BaseException:
        for name in ("rules.yaml", "journal.jsonl", "journal.end", "store.json"):
            (path / name).unlink(missing_ok=True)
        if made:
            with suppress(OSError):
                path.rmdir()
        raise
    return Folder(path)


def _pointer(version: int) -> bytes:
    """What ``CURRENT`` says where a version is live."""
    return f"{version}\n".encode()


def no_link(path: Path) -> Path:
    """The path, which must be no link: a store holds its own files.

    Raises:
        StateError: it is one.
    """
    if path.is_symlink():
        raise StateError(f"'{path}' is a link: a store holds its own files; do not trust this folder.")
    return path


def read_file(path: Path) -> bytes:
    """A file of a store.

    Raises:
        StateError: it is a link, or cannot be read.
    """
    try:
        return no_link(path).read_bytes()
    except OSError as error:
        raise StateError(f"'{path}' cannot be read ({error.strerror or error}): mend that and try again.") from error
