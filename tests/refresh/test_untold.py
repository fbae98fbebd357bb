"""What became of an update is told at least once, whenever the process that was to tell it was killed."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from bad_store_bench import columns, copied, quick_store, rows
from store_records import outcome
from test_cli import continual

from continual.errors import StateError
from continual.refresh import Outcome, Store, alerts, untold
from continual.refresh.folder import Folder
from continual.refresh.records import Found
from continual.refresh.update import Update

LOOSE = "gate: {max_drop: 0.9, unsure: promote}\n"
HEARS = "import sys; open('told', 'a').write(sys.stdin.read())"
FAILS = f"{HEARS}; sys.exit(3)"


class Killed(BaseException):
    pass


def dies(*_: Any, **__: Any) -> Any:
    raise Killed


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quick_store(tmp_path_factory.mktemp("grown"), 1).path


@pytest.fixture
def path(grown: Path, tmp_path: Path) -> Path:
    return ruled(copied(grown, tmp_path))


def ruled(path: Path, code: str = HEARS, gate: str = LOOSE, more: str = "") -> Path:
    text = f'{gate}alerts: {{command: [{sys.executable}, -c, "{code}"]}}\n{more}'
    (path / "rules.yaml").write_text(text, encoding="utf-8")
    return path


def trusted(path: Path) -> Store:
    return Store(path, trust=[sys.executable])


def learn(path: Path, month: int = 1, **options: Any) -> Outcome:
    options = {"name": f"month-{month}", "device": "cpu", "progress": False, **options}
    return trusted(path).update(columns(rows(month)), **options)


def told(path: Path) -> list[dict[str, Any]]:
    """Every outcome that the command was given."""
    text = (path / "told").read_text(encoding="utf-8") if (path / "told").exists() else ""
    found = []
    while text:
        one, end = json.JSONDecoder().raw_decode(text)
        text = text[end:].lstrip()
        found.append(one)
    return found


def kept(path: Path) -> list[str]:
    return sorted(one.name for one in (path / "untold").glob("*"))


def test_nothing_is_kept_of_what_was_told_nor_where_nobody_is_named(path: Path) -> None:
    assert learn(path).happened == "promoted" and len(told(path)) == 1 and kept(path) == []
    (path / "rules.yaml").write_text(LOOSE, encoding="utf-8")
    shutil.rmtree(path / "untold")
    assert learn(path, 2).happened == "promoted" and not (path / "untold").exists()


COMMANDS = {
    "update, the same": lambda path: learn(path),
    "update, another": lambda path: learn(path, 2),
    "promote": lambda path: trusted(path).promote(1),
    "rollback": lambda path: trusted(path).rollback(),
    "abandon": lambda path: trusted(path).abandon(),
    "erase": lambda path: trusted(path).erase(["m0-1"]),
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("where", ["_point", "_done", "tell_waiting"])
def test_killed_after_going_live_the_next_command_tells_it(
    where: str, name: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = {"_point": Folder, "_done": Update, "tell_waiting": alerts}[where]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, where, dies)
        learn(path)
    assert told(path) == [] and kept(path) == ["000004.json"]
    assert Store(path).verify() == [] and "of 1 updates is still to be told" in str(Store(path).status())
    if name == "erase" and where != "tell_waiting":
        with pytest.raises(StateError, match="broke off"):
            COMMANDS[name](path)
    else:
        COMMANDS[name](path)
    first = told(path)[0]
    assert (first["happened"], first["version"], first["live"], first["experience"]) == ("promoted", 2, 2, "month-1")
    assert len(told(path)) == 1 + (name == "update, another") and kept(path) == []
    assert "still to be told" not in str(Store(path).status())


def test_what_never_came_true_is_not_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Folder, "go_live", dies)
        learn(path)
    assert kept(path) == ["000004.json"] and "still to be told" not in str(Store(path).status())
    other = copied(path, path.parent / "other")
    assert "rolled" not in trusted(path).abandon() and told(path) == [] and kept(path) == []
    assert learn(other).happened == "promoted" and len(told(other)) == 1


@pytest.mark.parametrize("gate", ["gate: {new_floor: 1.5}\n", "gate: {max_drop: 0.01}\n"])
def test_what_was_refused_is_kept_as_well(gate: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ruled(path, gate=gate)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(alerts, "tell_waiting", dies)
        learn(path)
    trusted(path).abandon()
    assert [one["happened"] for one in told(path)] == ["failed" if "floor" in gate else "cannot tell"]
    learn(path)
    assert len(told(path)) == 2, "the same rows, refused again"


def test_what_drift_stopped_is_kept_as_well(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ruled(path, more="drift: {stop: [unknown-classes]}\n")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(alerts, "tell_waiting", dies)
        learn(path)
    trusted(path).abandon()
    assert [(one["happened"], one["version"]) for one in told(path)] == [("stopped", None)]


def test_killed_while_telling_it_is_told_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tell = alerts.tell
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(alerts, "tell", lambda *given: (tell(*given), dies()))
        learn(path)
    assert len(told(path)) == 1 and len(kept(path)) == 1
    trusted(path).promote(1)
    assert len(told(path)) == 2 and told(path)[0] == told(path)[1]


def test_one_that_fails_was_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ruled(path, FAILS)
    failed = f"the command '{sys.executable}' was not told: it ended with status 3."
    assert learn(path).notes[-1] == failed and len(told(path)) == 1 and kept(path) == []
    assert failed not in trusted(path).promote(1) and len(told(path)) == 1
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(alerts, "tell_waiting", dies)
        learn(path, 2)
    assert trusted(path).promote(2).endswith(failed) and len(told(path)) == 2


def test_it_waits_for_a_command_that_may_tell(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(alerts, "tell_waiting", dies)
        learn(path)
    assert "made live" in Store(path).promote(1) and told(path) == [] and len(kept(path)) == 1
    done = continual("store", "promote", "store", "2", "--trust", sys.executable, cwd=path.parent)
    assert done.returncode == 0 and len(told(path)) == 1 and kept(path) == [], done.stderr


def test_who_is_told_may_write_to_the_store(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def rolls_back(*_: Any) -> list[str]:
        calls.append(trusted(path).rollback())
        return []

    monkeypatch.setattr(alerts, "tell", rolls_back)
    assert learn(path).live == 2
    assert len(calls) == 1 and "from version 2 to 1" in calls[0] and Store(path).live == 1 and kept(path) == []


def test_what_comes_while_another_process_tells_is_told_by_that_one(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second update ends while the first one's command still runs."""
    tell, heard = alerts.tell, list[str]()

    def slow(one: Outcome, *given: Any) -> list[str]:
        heard.append(one.experience)
        if len(heard) == 1:
            learn(path, 2)
            assert heard == ["month-1"] and len(kept(path)) == 2
        return tell(one, *given)

    monkeypatch.setattr(alerts, "tell", slow)
    learn(path)
    assert heard == ["month-1", "month-2"] and kept(path) == []


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff"])
def test_what_cannot_be_read_is_said_once(content: bytes, path: Path) -> None:
    (path / "untold").mkdir()
    (path / "untold" / "000001.json").write_bytes(content)
    said = trusted(path).rollback(1)
    assert "nobody was told of an update, since" in said and "000001.json" in said and kept(path) == []


def test_ids_of_rows_that_are_erased_leave_what_is_to_be_told(path: Path) -> None:
    found = [Found(kind=kind, sentence="x", effect=0.5, rows=1, names=("4711",)) for kind in ("leakage", "label-shift")]
    untold.put(path, outcome(found=tuple(found)), 1)
    assert Store(path).erase(["m0-1"]).known == 1  # by somebody who may not tell
    left = untold.outcome_in(path / "untold" / "000001.json")
    assert [one.names for one in left.found] == [(), ("4711",)]


def test_the_prometheus_file_follows_a_version_that_a_person_makes_live(path: Path) -> None:
    (path / "rules.yaml").write_text(f"{LOOSE}alerts: {{prometheus: figures.prom}}\n", encoding="utf-8")
    store = Store(path, trust=["figures.prom"])
    store.update(columns(rows(1)), name="month-1", device="cpu", progress=False)

    def live() -> str:
        text = (path / "figures.prom").read_text(encoding="utf-8")
        assert text.count("# TYPE continual_live_version") == text.count("# TYPE continual_last_update gauge") == 1
        return next(line.split()[-1] for line in text.splitlines() if line.startswith("continual_live_version"))

    before = (path / "figures.prom").read_bytes()
    assert live() == "2"
    store.rollback()
    assert live() == "1" and (path / "figures.prom").read_bytes() != before
    store.promote(2)
    assert (path / "figures.prom").read_bytes() == before
