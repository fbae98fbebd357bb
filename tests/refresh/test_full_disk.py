"""A disk that is full at any write, permissions that are lost, a clock that goes back: nothing is lost, the same command goes on."""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_store_bench import columns, copied, quick_store, rows
from safetensors import SafetensorError
from safetensors.torch import save_file
from store_bench import SALT, bytes_of

from continual.errors import StateError
from continual.refresh import Store
from continual.refresh.intake import row_ids

Command = Callable[[Store], object]
CLOCKED = {"clock", "report"}
"""Pieces that hold times, and differ from run to run."""


class Disk:
    """A disk that takes ``room`` more writes, flushes, renames and new folders below ``folder``; what comes after fails.

    A write that fails has written half.
    """

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path, room: int, code: int = errno.ENOSPC) -> None:
        self.folder, self.room, self.code, self.done = str(folder.resolve()), room, code, list[str]()
        opened = builtins.open

        def open_(path: Any, mode: str = "r", *given: Any, **named: Any) -> Any:
            file = opened(path, mode, *given, **named)
            writes = any(letter in mode for letter in "wxa+")
            return Half(file, self.error()) if writes and self._refuses("write", path) else file

        for module in (builtins, io):
            patch.setattr(module, "open", open_)
        for name in ("replace", "rename", "mkdir"):
            patch.setattr(os, name, self._refusing(name, getattr(os, name)))

        def flush(descriptor: int) -> None:
            if self._refuses("fsync", self.folder):
                raise self.error()

        def tensors(found: Any, path: Any, *given: Any, **named: Any) -> None:
            save_file(found, path, *given, **named)
            if self._refuses("write", path):
                os.truncate(path, 10)
                raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})")

        patch.setattr(os, "fsync", flush)
        patch.setattr("continual.state.save_file", tensors)

    def error(self) -> OSError:
        return OSError(self.code, os.strerror(self.code))

    def _refusing(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def refusing(path: Any, *given: Any, **named: Any) -> Any:
            if self._refuses(name, path):
                raise self.error()
            return call(path, *given, **named)

        return refusing

    def _refuses(self, what: str, path: Any) -> bool:
        if not (isinstance(path, str | os.PathLike) and os.path.abspath(path).startswith(self.folder)):
            return False
        self.done.append(what)
        return len(self.done) > self.room


class Half:
    """A file that takes half of what is written to it."""

    def __init__(self, file: Any, error: OSError) -> None:
        self.file, self.error = file, error

    def write(self, content: Any) -> int:
        self.file.write(content[: len(content) // 2])
        self.file.flush()
        raise self.error

    def __enter__(self) -> Half:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here pulls a plug: nothing need wait for a real disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@contextmanager
def disk(folder: Path, room: int, code: int = errno.ENOSPC) -> Iterator[Disk]:
    with pytest.MonkeyPatch.context() as patch:
        yield Disk(patch, folder, room, code)


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of two months."""
    return quick_store(tmp_path_factory.mktemp("grown"), 2).path


def update(month: int) -> Command:
    def command(store: Store) -> object:
        return store.update(columns(rows(month)), name=f"month-{month}", device="cpu", progress=False)

    return command


def erase(store: Store) -> object:
    return store.erase(["m0-1", "m0-2", "m1-3", "stranger"])


COMMANDS: dict[str, Command] = {
    "update": update(2),
    "promote": lambda store: store.promote(1),
    "rollback": lambda store: store.rollback(),
    "erase": erase,
}


def pieces(store: Store) -> dict[int, dict[str, str]]:
    """What every version is made of, but for what holds times."""
    return {
        number: {name: piece.sha256 for name, piece in store.manifest(number).pieces.items() if name not in CLOCKED}
        for number in store.versions()
    }


def names(store: Store) -> set[str]:
    """Every file and folder, but for objects, whose names are those of their content, and the lock."""
    found = {path.relative_to(store.path).as_posix() for path in store.path.rglob("*")}
    return {name for name in found if not name.startswith("objects/") and name != ".lock"}


def used(store: Store) -> set[str]:
    """Digests that versions are made of."""
    return {piece.sha256 for number in store.versions() for piece in store.manifest(number).pieces.values()}


def assert_sound(path: Path) -> None:
    """Whoever reads it finds a whole store."""
    store = Store(path)
    assert store.verify() == []
    assert store.status().live == store.live and store.live in store.versions()
    for number in store.versions():
        assert store.manifest(number).version == store.report(number).version == number
    assert len(store.predict(torch.zeros(2, 3), device="cpu")["names"]) == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_is_full_at_any_write(name: str, grown: Path, tmp_path: Path) -> None:
    command = COMMANDS[name]
    twin = Store(copied(grown, tmp_path / "twin"))
    with disk(twin.path, 10_000) as whole:
        command(twin)
    assert len(whole.done) >= 10 and {"write", "fsync", "replace"} <= set(whole.done)
    for room in range(len(whole.done)):
        path = copied(grown, tmp_path / str(room))
        said = None
        with disk(path, room):
            try:
                command(Store(path))
            except StateError as error:
                said = str(error)
        if said is None:
            assert whole.done[room] == "fsync" and Store(path).live == twin.live, (room, whole.done[room])
            assert_sound(path)
            continue
        assert "No space left on device" in said and "\n" not in said and "free some space" in said, (room, said)
        assert_sound(path)
        store = Store(path)
        command(store)
        assert store.live == twin.live and pieces(store) == pieces(twin), (room, whole.done[room])
        assert names(store) == names(twin) and store.verify() == [], (room, whole.done[room])


def test_a_disk_that_is_full_at_any_write_of_a_new_store(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    with disk(tmp_path / "whole" / "store", 10_000) as whole:
        quick_store(tmp_path / "whole", 0)
    count = len(whole.done)
    assert count >= 8
    for room in range(count):
        place = tmp_path / str(room)
        place.mkdir()
        with disk(place / "store", room), pytest.raises(StateError, match="No space left on device"):
            quick_store(place, 0)
        assert not (place / "store").exists(), room
        assert quick_store(place, 0).verify() == []


def test_a_disk_that_is_full_at_any_write_of_the_first_update(tmp_path: Path) -> None:
    """And once more at the next one, before there is room again."""
    empty = quick_store(tmp_path, 0).path
    twin = Store(copied(empty, tmp_path / "twin"))
    with disk(twin.path, 10_000) as whole:
        update(0)(twin)
    for room in range(0, len(whole.done) - 1, 2):
        path = copied(empty, tmp_path / str(room))
        with disk(path, room), pytest.raises(StateError, match="No space left on device"):
            update(0)(Store(path))
        for further in (room + 1, room % 9):
            with disk(path, further), suppress(StateError):
                update(0)(Store(path))
            assert Store(path).verify() == [] and Store(path).live in (None, 1)
            str(Store(path).status())
        update(0)(Store(path))
        assert pieces(Store(path)) == pieces(twin) and names(Store(path)) == names(twin) and Store(path).verify() == []


def test_an_erasure_that_is_not_promised_changes_nothing(grown: Path, tmp_path: Path) -> None:
    """What fails before its line is in the journal leaves every byte as it was, but for folders that are empty."""
    path = copied(grown, tmp_path)
    before = bytes_of(path)
    for room in range(200):
        with disk(path, room), pytest.raises(StateError):
            erase(Store(path))
        if Store(path).history()[-1].event == "erased":
            break
        assert bytes_of(path) == before, room
        assert len(Store(path).folder.erased()) == 0
    assert room > 20, "the promise comes after everything was written beside its place"
    needles = [int(one).to_bytes(8, "little") for one in row_ids(["m0-1", "m0-2", "m1-3"], SALT).tolist()]
    assert any(needle in content for needle in needles for content in before.values())
    erase(Store(path))
    assert not any(
        needle in content for needle in needles for name, content in bytes_of(path).items() if "erased" not in name
    )


# Permissions


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_that_cannot_be_written(name: str, code: int, grown: Path, tmp_path: Path) -> None:
    """Root may write everywhere: the system's refusal is given in its place."""
    path = copied(grown, tmp_path)
    before = bytes_of(path)
    opened = os.open

    def refuses(file: Any, flags: int, *given: Any, **named: Any) -> int:
        if flags & (os.O_CREAT | os.O_RDWR | os.O_WRONLY) and str(file).startswith(str(path)):
            raise OSError(code, os.strerror(code), str(file))
        return opened(file, flags, *given, **named)

    with disk(path, 0, code), pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", refuses)
        with pytest.raises(StateError, match=f"{os.strerror(code)}.*mend its permissions, or copy the store") as said:
            COMMANDS[name](Store(path))
        assert "\n" not in str(said.value) and bytes_of(path) == before
        assert_sound(path)
        assert len(Store(path).history()) == 5 and "version 1" in Store(path).compare(1)


@pytest.mark.parametrize("name", COMMANDS)
def test_permissions_that_are_lost_on_the_way(name: str, grown: Path, tmp_path: Path) -> None:
    for room in (3, 7, 10):
        path = copied(grown, tmp_path / str(room))
        with disk(path, room, errno.EACCES), pytest.raises(StateError, match="Permission denied"):
            COMMANDS[name](Store(path))
        assert_sound(path)


# The clock


def test_a_clock_that_goes_back(grown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    years = iter(range(2024, 1900, -1))
    for module in ("journal", "folder", "update"):
        monkeypatch.setattr(f"continual.refresh.{module}.now", lambda: f"{next(years)}-01-01T00:00:00+00:00")
    path = copied(grown, tmp_path)
    store = Store(path)
    assert store.update(columns(rows(2)), name="month-2", device="cpu", progress=False).version == 3
    store.rollback()
    store.promote(3)
    erase(store)
    times = [entry.time for entry in store.history()]
    assert times[-5:] == sorted(times[-5:], reverse=True) and times[-1] < "2020", times
    assert store.live == 3 and store.folder.line(3) == [1, 2, 3]
    assert_sound(path)
    assert "version 3 is live" in store.page(tmp_path / "page.html").read_text(encoding="utf-8").lower()
