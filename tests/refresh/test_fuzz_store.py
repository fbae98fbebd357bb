"""Bytes, rows, rules and stores that nobody would write: one sentence, nothing is run, nothing outside is read or written."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from bad_store_bench import (
    RULES,
    columns,
    copied,
    forge,
    forge_manifest,
    forge_piece,
    forge_settings,
    lines,
    piece_path,
    quick_store,
    rows,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_bench import bytes_of

from continual.errors import ContinualError, SpecError
from continual.refresh import Rules, Store
from continual.refresh.intake import read_rows
from continual.state import read_state_file, state_bytes
from continual.streams.folders import own_cache

ZEROS = torch.zeros(2, 3)
SECRET = "a line of a file that is no store's"


def quickly(examples: int) -> Any:
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


# What may be drawn

NUMBERS = st.integers(-300, 300) | st.integers(2**62, 2**70) | st.floats()
"""No number between: a network of so many units would be made."""
PLAIN = st.none() | st.booleans() | NUMBERS | st.text(max_size=12) | st.sampled_from(
    ["../../secret", "/etc/passwd", "evil:Part", "class 1", "m0-1", "0001", "nan", "pass", "\ud800", "a\0b", "é" * 9]
)  # fmt: skip
JSON = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
                    max_leaves=8)  # fmt: skip


def places(document: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value of a JSON document."""
    inside = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in inside:
        yield (*above, key)
        yield from places(value, (*above, key))


@st.composite
def changes(draw: st.DrawFn, document: Any) -> Any:
    """The document with one to three values replaced, taken out or put in."""
    found = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(1, 3))):
        way = draw(st.sampled_from(list(places(found)) or [()]))
        if not way:
            return draw(JSON)
        *above, last = way
        holder = found
        for key in above:
            holder = holder[key]
        what = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if what == "replace":
            holder[last] = draw(JSON)
        elif what == "remove":
            del holder[last]
        elif isinstance(holder, dict):
            holder[draw(st.text(max_size=6))] = draw(JSON)
        else:
            holder.append(draw(JSON))
    return found


@st.composite
def spoilt(draw: st.DrawFn, content: bytes) -> bytes:
    """Other bytes: flipped, cut off, cut out, put in, or all of them others."""
    start, stop = sorted((draw(st.integers(0, len(content))), draw(st.integers(0, len(content)))))
    found: bytes = draw(st.sampled_from([
        content[:start],
        content[:start] + content[stop:],
        content[:stop] + content[start:],
        content[:start] + draw(st.binary(max_size=20)) + content[stop:],
        bytes([*content[:start], *(byte ^ 32 for byte in content[start : start + 1]), *content[start + 1 :]]),
        draw(st.binary(max_size=60)),
    ]))  # fmt: skip
    return found


# What is watched

WATCH: dict[str, Any] = {"inside": None, "seen": []}
FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "subprocess.Popen",
    "socket.connect",
    "pickle.find_class",
)


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook, which stays for good and does nothing but while a store is watched."""
    inside = WATCH["inside"]
    if inside is None:
        return
    if event in FORBIDDEN or (event == "import" and "evil" in str(arguments[0])):
        WATCH["seen"].append((event, str(arguments[0])))
    if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        path, flags = os.path.abspath(os.fsdecode(arguments[0])), arguments[2] or 0
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        known = (*CODE, inside) if not writes else (inside, "/dev/null")
        if not path.startswith(known):
            WATCH["seen"].append((event, path))
    if event in (
        "os.remove",
        "os.rename",
        "os.mkdir",
        "os.rmdir",
        "shutil.rmtree",
        "os.truncate",
        "os.symlink",
        "os.link",
    ):
        for one in arguments[: 1 + (event in ("os.rename", "os.symlink", "os.link"))]:
            if (
                isinstance(one, str | os.PathLike)
                and Path(one).is_absolute()
                and not os.path.abspath(one).startswith(inside)
            ):
                WATCH["seen"].append((event, str(one)))


CODE = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")} | {sys.prefix, sys.base_prefix, "/proc", "/sys",
             "/dev", "/usr", "/lib", str(Path(__file__).resolve().parents[2])})  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def watching() -> Iterator[None]:
    """The hook is there, and nobody waits for a writer who is not."""
    sys.addaudithook(_watch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("continual.refresh.folder.time", SimpleNamespace(sleep=lambda seconds: None))
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@contextmanager
def watched(inside: Path) -> Iterator[None]:
    """Nothing is run, and no file is opened, moved or removed but those below ``inside``; code may be read."""
    WATCH.update(inside=str(inside.resolve()), seen=[])
    try:
        yield
    finally:
        WATCH["inside"] = None
    assert WATCH["seen"] == []


def said(command: Callable[[], object]) -> str:
    """What is said of it; empty where it did what it should."""
    try:
        command()
    except ContinualError as error:
        text = str(error)
        assert text and SECRET not in text, text
        return text
    return ""


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = quick_store(tmp_path_factory.mktemp("grown"), 2)
    store.erase(["m0-1"])
    twin = Store(copied(store, tmp_path_factory.mktemp("twin")))
    for command in (lambda: twin.update(columns(rows(3))), twin.status, lambda: twin.predict(ZEROS)):
        said(command)  # what is imported at first use is there now
    return store.path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where copies lie; beside it a file that nobody may read or change."""
    above = tmp_path_factory.mktemp("above")
    (above / "secret").write_text(SECRET, encoding="utf-8")
    (above / "inside").mkdir()
    return above / "inside"


@pytest.fixture
def store(grown: Path, place: Path) -> Iterator[Callable[[], Path]]:
    """Gives a new copy of the store, in the place of the last one."""

    def fresh() -> Path:
        shutil.rmtree(place, ignore_errors=True)
        return copied(grown, place)

    yield fresh
    assert (place.parent / "secret").read_text(encoding="utf-8") == SECRET
    assert {path.name for path in place.parent.iterdir()} == {"secret", "inside"}


def used_in_every_way(path: Path) -> list[str]:
    """What is said by everything that reads a store, and by what writes without training."""
    found: list[str] = []

    def each(*commands: Callable[[Store], object]) -> None:
        found.extend(said(lambda command=command: command(Store(path))) for command in commands)  # type: ignore[misc]

    each(Store.status, Store.history, Store.report, Store.live.fget, lambda store: str(store.status()))  # type: ignore[attr-defined]
    each(lambda store: store.compare(1, 2), lambda store: store.predict(ZEROS, device="cpu"), Store.verify)
    each(lambda store: store.rollback(), lambda store: store.promote(2), lambda store: store.erase(["m1-2"]))
    return found


# Rows


@pytest.mark.filterwarnings(  # pandas 3.1 leaves a CSV file open that it cannot parse (November 2026)
    "ignore:.*unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
@quickly(60)
@given(content=st.binary(max_size=200) | st.text(max_size=80).map(lambda text: text.encode("utf-8", "surrogatepass")),
       suffix=st.sampled_from([".jsonl", ".csv", ".parquet", ".json"]))  # fmt: skip
def test_any_bytes_as_a_file_of_rows(content: bytes, suffix: str, grown: Path, place: Path) -> None:
    path = place / f"rows{suffix}"
    path.write_bytes(content)
    asked = Store(grown).folder.settings
    with own_cache(place / "cache"):
        text = said(lambda: read_rows(path, asked.columns, asked.objective, asked.salt))
    assert f"'{path}'" in text
    shutil.rmtree(place / "cache", ignore_errors=True)


ROW = st.fixed_dictionaries(
    {},
    optional={
        name: PLAIN | JSON if name in ("id", "label") else NUMBERS | JSON for name in ("id", "label", *"abc", "more")
    },
)
NEAR = st.lists(
    st.tuples(st.sampled_from(["id", "label", "a", "more"]), st.integers(0, 7), PLAIN), min_size=1, max_size=3
)


@quickly(30)
@given(found=st.lists(ROW, min_size=1, max_size=5) | NEAR)
def test_any_rows(found: list[Any], grown: Path, store: Callable[[], Path]) -> None:
    """Rows of anything, and sound ones of which some values are others."""
    if isinstance(found[0], tuple):
        sound = rows(5, 8)
        for key, place, value in found:
            sound[place][key] = value
        found = sound
    path = store()
    (path.parent / "rows.jsonl").write_text(lines(found), encoding="utf-8")
    before = bytes_of(path)
    if said(lambda: Store(path).update(path.parent / "rows.jsonl", device="cpu", progress=False)):
        assert bytes_of(path) == before
    assert Store(path).verify() == [] and not (path / "cache").exists() and not (path / "work").exists()


# Rules

WHOLE_RULES = Rules.model_validate(RULES).model_dump(mode="json")


@quickly(150)
@given(text=st.text(max_size=60) | st.text(alphabet="ab:-&*!<>[]{}#|?, \n'\"%@", max_size=40)
       | changes(WHOLE_RULES).map(lambda found: yaml.safe_dump(found, allow_unicode=True)))  # fmt: skip
def test_any_rules(text: str, place: Path) -> None:
    path = place / "rules.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with watched(place):
        try:
            assert isinstance(Rules.load(path), Rules)
        except SpecError as error:
            assert str(path) in str(error)


@quickly(25)
@given(found=changes(WHOLE_RULES))
def test_any_rules_of_a_store(found: Any, store: Callable[[], Path]) -> None:
    path = store()
    (path / "rules.yaml").write_text(yaml.safe_dump(found), encoding="utf-8")
    with watched(path.parent):
        said(lambda: Store(path).update(columns(rows(3)), name="next", device="cpu", progress=False, abandon=True))
        assert said(Store(path).status) == ""


# A store's files

FILES = ["store.json", "journal.jsonl", "journal.end", "CURRENT", "erased.json", "rules.yaml", *[
    f"versions/{version:04d}/{name}.json" for version in (1, 2) for name in ("manifest", "report")
]]  # fmt: skip
PIECES = ["learner", "clock", "form", "tests/0000", "ledger/0001"]


@quickly(50)
@given(data=st.data())
def test_any_change_of_a_file_is_named(data: st.DataObject, store: Callable[[], Path]) -> None:
    path = store()
    name = data.draw(st.sampled_from([*FILES, *PIECES]))
    file = path / name if name in FILES else piece_path(path, 2, name)
    sound = file.read_bytes()
    file.write_bytes(data.draw(spoilt(sound)))
    changed = file.read_bytes()
    with watched(path.parent):
        try:
            wrong = Store(path).verify()
        except ContinualError as error:
            wrong = [str(error)]
        promised = name == "CURRENT" and changed == b"1\n"
        unfinished = name == "journal.jsonl" and changed.rpartition(b"\n")[0] == sound.rpartition(b"\n")[0]
        if changed != sound and name != "rules.yaml" and not promised and not unfinished:
            assert wrong
            told = " ".join(wrong)
            names = {"journal.jsonl": ("journal",), "CURRENT": ("CURRENT",)}.get(name, (file.name,))
            assert any(one in told for one in names), (name, told)
        used_in_every_way(path)


@quickly(45)
@given(data=st.data())
def test_any_record_that_a_stranger_wrote(data: st.DataObject, store: Callable[[], Path]) -> None:
    """A chain that holds, around records that nobody would write."""
    path = store()
    name = data.draw(st.sampled_from(["store", "manifest", "journal", "report"]))
    if name == "store":
        found = data.draw(changes(json.loads((path / "store.json").read_text(encoding="utf-8"))))
        (path / "store.json").write_text(json.dumps(found), encoding="utf-8")
        forge(path)
    elif name == "manifest":
        manifest = path / "versions" / "0002" / "manifest.json"
        manifest.write_text(
            json.dumps(data.draw(changes(json.loads(manifest.read_text(encoding="utf-8"))))), encoding="utf-8"
        )
        forge(path)
    elif name == "report":
        report = path / "versions" / "0002" / "report.json"
        content = json.dumps(data.draw(changes(json.loads(report.read_text(encoding="utf-8"))))).encode()
        report.write_bytes(content)
        forge_piece(path, 2, "report", content)
    else:
        entries = [json.loads(line) for line in (path / "journal.jsonl").read_bytes().splitlines()]
        found = data.draw(changes(entries))
        forge(path, lambda entries: entries.__setitem__(slice(None), [one for one in found if isinstance(one, dict)]))
    with watched(path.parent):
        used_in_every_way(path)


# Objects


def safetensors(header: bytes, body: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def plain(text: str, tensors: str = "") -> bytes:
    return safetensors(json.dumps({"__metadata__": {"state": text}}).encode()[:-1] + tensors.encode() + b"}")


DEEP = "[" * 100_000 + "]" * 100_000
OBJECTS = {
    "a header of 2^63 bytes": safetensors(b"{}", length=2**63),
    "a header of 2^40 bytes": safetensors(b"{}", length=2**40),
    "a header longer than the file": safetensors(b"{}", length=500),
    "no header": b"",
    "a header that is no JSON": safetensors(b"\xff\xfe"),
    "a header that is a list": safetensors(b"[]"),
    "a deep header": safetensors(b'{"a":' * 5000 + b"1" + b"}" * 5000),
    "no state": safetensors(b"{}"),
    "a deep state": plain(DEEP),
    "a deep state of objects": plain('{"a":' * 50_000 + "1" + "}" * 50_000),
    "a state that is a list": plain("[1, 2]"),
    "a state that is a word": plain('"state"'),
    "a number of a million digits": plain('{"a": ' + "9" * 1_000_000 + "}"),
    "a tensor that is not there": plain('{"a": {"$tensor": "7"}}'),
    "a tensor by a list": plain('{"a": {"$tensor": ["7"]}}'),
    "a number of words": plain('{"a": {"$float": "much"}}'),
    "a tensor beyond the file": plain("{}", ',"0":{"dtype":"F32","shape":[1000000000],"data_offsets":[0,4000000000]}'),
    "a tensor of a negative shape": plain("{}", ',"0":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}'),
    "tensors one over the other": plain("{}", ',"0":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},'
                                              '"1":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}') + b"\0\0\0",
    "a pickle": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
    "names with a way out": plain('{"../../secret": {"$tensor": "../../secret"}}'),
    "an empty state": plain("{}"),
}  # fmt: skip


@pytest.mark.parametrize("name", OBJECTS)
def test_objects_that_a_stranger_wrote(name: str, store: Callable[[], Path]) -> None:
    for piece in ("learner", *(["form", "ledger/0000", "tests/0001", "clock"] if name == "an empty state" else [])):
        path = store()
        forge_piece(path, 2, piece, OBJECTS[name])
        with watched(path.parent):
            found = used_in_every_way(path)
            assert any(found) == (piece != "form"), (piece, found)
            text = said(
                lambda path=path: Store(path).update(columns(rows(3)), name="next", device="cpu", progress=False)
            )  # type: ignore[misc]
            assert text, piece


@quickly(45)
@given(data=st.data())
def test_any_state_that_a_stranger_wrote(data: st.DataObject, grown: Path, store: Callable[[], Path]) -> None:
    path = store()
    name = data.draw(st.sampled_from(PIECES))
    state = read_state_file(piece_path(grown, 2, name))
    tensors: list[torch.Tensor] = []

    def hidden(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            tensors.append(value)
            return f"tensor {len(tensors) - 1}"
        if isinstance(value, dict):
            return {key: hidden(one) for key, one in value.items()}
        return [hidden(one) for one in value] if isinstance(value, list) else value

    def shown(value: Any) -> Any:
        if isinstance(value, str) and value.startswith("tensor "):
            tensor = tensors[int(value.split()[1])]
            return tensor if data.draw(st.integers(0, 60)) else tensor[:-1] if tensor.dim() else tensor.double()[None]
        if isinstance(value, dict):
            return {key: shown(one) for key, one in value.items() if key not in ("$tensor", "$float")}
        return [shown(one) for one in value] if isinstance(value, list) else value

    found = shown(data.draw(changes(hidden(state))))
    forge_piece(path, 2, name, state_bytes(found if isinstance(found, dict) else {"it": found}))
    with watched(path.parent):
        used_in_every_way(path)


def test_a_way_out_in_every_name(store: Callable[[], Path]) -> None:
    """Names of pieces, digests and folders that lead out of the store."""
    out = {"sha256": "0" * 64, "bytes": 1}
    for name in (
        "../secret",
        "/etc/passwd",
        "tests/../../../secret",
        "tests/00",
        "learner\0",
        "",
        "tests/99999999999999999999",
    ):
        path = store()
        forge_manifest(path, 2, lambda manifest, name=name: manifest["pieces"].update({name: out}))  # type: ignore[misc]
        with watched(path.parent):
            assert any(used_in_every_way(path)), name
    for digest in ("../" * 21 + "x", "/" * 64, "A" * 64, "0" * 63, "", None):
        path = store()
        forge_manifest(path, 2, lambda manifest, digest=digest: manifest["pieces"]["learner"].update(sha256=digest))  # type: ignore[misc]
        with watched(path.parent):
            assert any(used_in_every_way(path)), digest
    for name in ("²", "٣", "0", "00", "-1", "0000", "00002", "9" * 200, "0002.tmp", "1e3"):
        path = store()
        for folder in ("versions", "staged"):
            shutil.copytree(path / "versions" / "0002", path / folder / name)
        with watched(path.parent):
            assert not any(used_in_every_way(path)), name
            assert Store(path).versions() == [1, 2]


def test_a_store_within_reach_of_links(store: Callable[[], Path]) -> None:
    """A link below what a store looks at by name leads nowhere."""
    for name in (
        "objects",
        "staged/0003",
        "versions/0003",
        "work/try-0",
        "work/update.json",
        "staged/erased.json",
        ".lock",
        ".holder",
    ):
        path = store()
        target = path.parent.parent / "secret"
        if name == "objects":
            piece = piece_path(path, 2, "learner")
            piece.unlink()
            piece.symlink_to(target)
        else:
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).unlink(missing_ok=True)
            (path / name).symlink_to(target if name.endswith((".json", ".lock", ".holder")) else path.parent.parent)
        with watched(path.parent):
            found = used_in_every_way(path)
            found.append(
                said(lambda path=path: Store(path).update(columns(rows(3)), name="next", device="cpu", progress=False))
            )  # type: ignore[misc]
        assert any("link" in one or "is not what was written" in one for one in found) or name == "work/try-0", (
            name,
            found,
        )


def test_settings_that_a_stranger_wrote_run_nothing(store: Callable[[], Path]) -> None:
    def refused(path: Path, key: str, value: Any) -> None:
        forge_settings(path, **{key: value})
        with watched(path.parent):
            found = used_in_every_way(path)
            assert sum("--trust" in one for one in found) == 2 and all("--trust" in one or not one for one in found)
            assert "--trust" in said(lambda: Store(path).update(columns(rows(3)), device="cpu", progress=False))

    for key, value in (
        ("model", {"kind": "module", "class": "evil:Part"}),
        ("model", {"kind": "module", "class": "os:system", "arguments": {"command": "true"}}),
        ("strategy", {"replay": {"kind": "evil:Part"}, "training": {"epochs": 1}}),
        ("strategy", {"replay": [{"kind": "rehearsal", "folder": "/tmp"}], "training": {"epochs": 1}}),
    ):
        refused(store(), key, value)
