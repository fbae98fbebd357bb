"""A damaged store, and one that a stranger made: one sentence, nothing is run, and not a byte changes."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from bad_bench import Case, refuse
from bad_store_bench import QUICK, copied, forge, forge_manifest, forge_settings, quick_store
from store_cases import ALL, BOMB, M3, NEW, R3, Ready, at, damage, flipped, half, line_out, link, piece
from test_cli import continual

from continual.refresh import Store
from continual.refresh.journal import Journal


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store of three months in it."""
    place = tmp_path_factory.mktemp("grown")
    quick_store(place, 3)
    return place


@pytest.fixture
def folder(grown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a copy of that store, on a disk that nobody waits for."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    copied(grown / "store", tmp_path)
    return tmp_path


def cut_off(lines: int) -> Ready:
    """The journal's last lines gone, with the version that they made, and with ``CURRENT`` to match."""

    def ready(folder: Path) -> None:
        at("journal.jsonl", lambda text: b"".join(text.splitlines(True)[:-lines]))(folder)
        if lines > 1:
            at("versions/0003", None)(folder)
        at("CURRENT", b"2\n")(folder)

    return ready


DAMAGE = [
    *damage("store.json taken away", at("store.json", None), "status verify update", "'store' holds no store"),
    *damage("store.json flipped", at("store.json", flipped), ALL, "'store/store.json' is not what was written", "backup"),
    *damage("store.json empty", at("store.json", b""), "status update", "'store/store.json' is not what was written"),
    *damage("journal taken away", at("journal.jsonl", None), ALL, "'store/journal.jsonl' is missing or empty", "backup"),
    *damage("journal flipped", at("journal.jsonl", flipped), "status verify update", "of 'store/journal.jsonl'", "backup"),
    *damage("journal of bytes", at("journal.jsonl", b"\xff\n"), "status verify update", "line 1 of 'store/journal.jsonl' is damaged"),
    *damage("a line taken out", line_out(2), ALL, "line 3 of 'store/journal.jsonl' does not follow", "changed by hand"),
    *damage("the first line taken out", line_out(0), "status verify update", "line 1 of 'store/journal.jsonl' does not follow"),
    *damage("a line twice", at("journal.jsonl", lambda text: text + text.splitlines(True)[-1]), "status verify update", "line 8",
            "not follow"),
    *damage("the end cut off", cut_off(2), ALL, "'store/journal.jsonl' has 5 lines and had 7: its end was cut off", "backup"),
    *damage("the last line cut off", cut_off(1), "status verify update", "has 6 lines and had 7"),
    *damage("the mark flipped", at("journal.end", flipped), "status verify update", "'store/journal.end'"),
    *damage("the mark empty", at("journal.end", b""), "status verify update", "'store/journal.end' is damaged", "remove it"),
    *damage("the mark taken away", at("journal.end", None), "verify", "'store/journal.end' is missing", "makes it anew"),
    *damage("CURRENT of words", at("CURRENT", b"three\n"), "status verify predict export", "'store/CURRENT' names no version",
            "`continual store promote store 3` puts it right"),
    *damage("CURRENT empty", at("CURRENT", b""), "status verify predict", "'store/CURRENT' names no version", "promote store 3"),
    *damage("CURRENT of digits and more", at("CURRENT", b"3 \n"), "status verify predict", "'store/CURRENT' names no version"),
    *damage("CURRENT taken away", at("CURRENT", None), "status verify predict", "'store/CURRENT' is missing", "promote store 3"),
    *damage("CURRENT of no version", at("CURRENT", b"9\n"), "status predict export", "no version 9", "there are 1 to 3"),
    *damage("CURRENT of no version", at("CURRENT", b"9\n"), "verify", "CURRENT names version 9", "the journal version 3"),
    *damage("CURRENT of another version", at("CURRENT", b"1\n"), "verify", "CURRENT names version 1", "the journal version 3"),
    *damage("manifest flipped", at(M3, flipped), "status verify predict update", f"'store/{M3}' is not what was written"),
    *damage("manifest empty", at(M3, b""), "status verify predict update", f"'store/{M3}' is not what was written"),
    *damage("manifest taken away", at(M3, None), "status verify predict update", f"'store/{M3}' is missing", "backup"),
    *damage("report flipped", at(R3, flipped), "status verify", f"'store/{R3}' is not what was written", "backup"),
    *damage("report taken away", at(R3, None), "status verify", f"'store/{R3}' is missing", "backup"),
    *damage("version taken away", at("versions/0003", None), "status verify predict update rollback", f"'store/{M3}' is missing"),
    *damage("version taken away", at("versions/0002", None), "promote erase", "'store/versions/0002/manifest.json' is missing"),
    *damage("versions taken away", at("versions", None), "status predict update", f"'store/{M3}' is missing"),
    *damage("learner flipped", piece("learner", flipped), "verify predict update export", "learner of version 3 is not what was"),
    *damage("learner cut off", piece("learner", half), "verify predict update", "learner of version 3 is not what was written"),
    *damage("learner taken away", piece("learner", None), "verify predict update", "learner of version 3 is missing", "backup"),
    *damage("learner flipped", piece("learner", flipped, 2), "verify promote rollback erase", "learner of version 2 is not what"),
    *damage("form flipped", piece("form", flipped), "verify update", "form of version", "is not what was written"),
    *damage("test set flipped", piece("tests/0000", flipped), "verify predict update", "tests/0000 of version", "is not what was"),
    *damage("objects taken away", at("objects", None), "predict update promote", "is missing", "backup"),
    *damage("rules.yaml taken away", at("rules.yaml", None), "verify update", "'store/rules.yaml' is missing", "every default"),
    *damage("rules.yaml empty", at("rules.yaml", b""), "verify update", "'store/rules.yaml' is empty", "key: value"),
    *damage("rules.yaml cut off", at("rules.yaml", b"gate: {"), "verify update", "'store/rules.yaml' is not valid YAML"),
    *damage("rules.yaml a bomb", at("rules.yaml", BOMB.encode()), "verify update", "values through its aliases"),
    *damage("rules.yaml with code", at("rules.yaml", b"gate: !!python/object/apply:os.mkdir ['hacked']\n"), "verify update",
            "not valid YAML", "constructor"),
    *damage("rules.yaml of an unknown key", at("rules.yaml", b"gaet: {}\n"), "verify update", "unknown key 'gaet'", "'gate'?"),
    *damage("erased.json of words", at("erased.json", b"all\n"), "status verify update erase",
            "'store/erased.json' is not what was written"),
    *damage("a version that nobody made", lambda folder: shutil.copytree(folder / "store/versions/0003",
            folder / "store/versions/0004"), "verify", "'store/versions/0004' is no version that the journal knows"),
    *[one for name in ("store.json", "journal.jsonl", "CURRENT", "rules.yaml", "versions", "objects", "staged", "work", "cache")
      for one in damage(f"{name} a link", link(name), "status update", f"'store/{name}' is a link", "do not trust")],
    *damage("a version a link", link("versions/0003"), "status verify predict update", "'store/versions/0003' is a link"),
    *damage("a manifest a link", link(M3), "status verify predict update", f"'store/{M3}' is a link"),
]  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE, ids=lambda case: case.name)
def test_a_damaged_store_is_named_and_left_as_it_is(case: Case, folder: Path) -> None:
    refuse(case, folder)


@pytest.mark.parametrize("command", ["promote store 3", "promote store 2", "rollback store 1"])
@pytest.mark.parametrize("content", [None, b"", b"three\n", b"9\n", b"1\n"])
def test_current_is_put_right_by_the_next_command_that_writes(
    command: str, content: bytes | None, folder: Path
) -> None:
    at("CURRENT", content)(folder)
    done = continual("store", *command.split(), cwd=folder)
    assert done.returncode == 0, done.stderr
    version = int(command[-1])
    assert ("nothing was done" in done.stdout) == (version == 3) and ("from version 3" in done.stdout) == (version == 1)
    assert Store(folder / "store").live == version and Store(folder / "store").verify() == []


def test_every_line_is_missed(folder: Path) -> None:
    """One that is taken out breaks the chain; those cut off at the end leave a whole one, and what they told of is strange."""
    path = folder / "store" / "journal.jsonl"
    whole = path.read_bytes().splitlines(keepends=True)
    for number in range(len(whole) - 1):
        path.write_bytes(b"".join(whole[:number] + whole[number + 1 :]))
        assert continual("store", "verify", "store", cwd=folder).returncode == 1
    for number in range(1, len(whole)):
        path.write_bytes(b"".join(whole[:number]))
        assert continual("store", "verify", "store", cwd=folder).returncode == 1, number


def test_a_mark_that_lags_behind_or_is_missing_is_made_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may be killed between a line and its mark, and an older store has none."""
    path = folder / "store"
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "_put_mark", lambda *_: None)
        Store(path).promote(1)
    assert (path / "journal.end").read_text().startswith("7 ") and len(Store(path).history()) == 8
    assert Store(path).verify() == [] and Store(path).live == 1
    for content in ((path / "journal.end").read_bytes(), None):
        at("journal.end", content)(folder)
        assert Store(path).live == 1
        assert "nothing was done" in Store(path).promote(1)
        assert (path / "journal.end").read_text().startswith("8 ") and Store(path).verify() == []


def test_a_journal_that_was_cut_off_is_gone_on_with_where_its_mark_is_removed(folder: Path) -> None:
    cut_off(2)(folder)
    at("journal.end", None)(folder)
    assert "made live by hand" in Store(folder / "store").promote(1)
    assert Store(folder / "store").verify() == [] and len(Store(folder / "store").history()) == 6


# What a stranger's store asks for


def rules(content: str) -> Ready:
    return at("rules.yaml", f"gate: {{max_drop: 0.9, unsure: promote}}\n{content}\n".encode())


def settings(**changes: Any) -> Ready:
    return lambda folder: forge_settings(folder / "store", **changes)


EVIL = {"kind": "evil_module:Part"}
ASKS = [
    *[one for name, ready in (
        ("a part", settings(strategy={**QUICK, "penalty": EVIL})),
        ("a model", settings(model={"kind": "module", "class": "evil_module:Part"})),
    ) for one in damage(f"asks for {name}", ready, "predict update erase export", "'evil_module:Part'", "--trust")],
    *[one for name, text, asked in (
        ("a part in a try", "ladder: {settings: [{replay.kind: 'evil_module:Part'}]}", "evil_module:Part"),
        ("a part in a try, nested", "ladder: {settings: [{penalty: {kind: 'evil_module:Part'}}]}", "evil_module:Part"),
        ("a folder in a try", "ladder: {settings: [{replay.folder: /tmp/evil}]}", "/tmp/evil"),
        ("a program", "alerts: {command: [touch, hacked]}", "touch"),
        ("a web hook", "alerts: {webhook: 'https://evil.example/x'}", "https://evil.example/x"),
        ("a file outside", "alerts: {prometheus: ../hacked}", "../hacked"),
    ) for one in damage(f"asks for {name}", rules(text), "update", f"'{asked}'", "--trust")],
    *damage("another format", settings(format=2), "status verify update", "'store/store.json' is damaged (format", "backup"),
    *damage("another format of a version",
            lambda folder: forge_manifest(folder / "store", 3, lambda one: one.update(format=2)),
            "status verify predict update", f"'store/{M3}' is damaged (format", "backup"),
    *damage("a salt of words", settings(salt="salt"), "status update erase", "'store/store.json' is damaged (salt"),
    *damage("a piece outside", lambda folder: forge_manifest(folder / "store", 3, lambda one: one["pieces"].update(
            {"../../outside": {"sha256": "0" * 64, "bytes": 1}})), "status verify predict", "is damaged (pieces.../../outside"),
    *damage("a piece by another digest", lambda folder: forge_manifest(folder / "store", 3, lambda one: one["pieces"].update(
            {"learner": {"sha256": "../" * 21 + "x", "bytes": 1}})), "status verify predict", "is damaged (pieces.learner.sha256"),
    *damage("a parent after its child", lambda folder: forge(folder / "store", lambda lines: lines[3].update(parent=3)),
            "export", "comes before its parent", "backup"),
    *damage("a promise of no version", lambda folder: forge(folder / "store", lambda lines: lines[-1].update(version=9)),
            "verify", "the journal version 9"),
]  # fmt: skip


@pytest.mark.parametrize("case", ASKS, ids=lambda case: case.name)
def test_a_strangers_store_decides_nothing(case: Case, folder: Path) -> None:
    (folder / "evil_module.py").write_text("open('hacked', 'w')\n", encoding="utf-8")
    refuse(case, folder)


def test_what_a_store_asks_for_is_done_where_it_is_named(folder: Path) -> None:
    rules(f"alerts: {{command: [{sys.executable}, -c, \"open('told', 'w')\"], prometheus: ../out.prom}}")(folder)
    (folder / "new.jsonl").write_text(NEW, encoding="utf-8")
    trust = ["--trust", sys.executable, "--trust", "../out.prom"]
    done = continual("store", "update", "store", "new.jsonl", "--device", "cpu", *trust, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "out.prom").is_file() and (folder / "store" / "told").is_file()


def test_a_store_of_code_of_ones_own_is_looked_at_without_trust(folder: Path) -> None:
    settings(strategy={**QUICK, "penalty": EVIL})(folder)
    for argv in (
        "status store",
        "history store",
        "compare store 1 2",
        "verify store",
        "promote store 2",
        "rollback store",
    ):
        done = continual("store", *argv.split(), cwd=folder)
        assert done.returncode == 0, done.stderr
