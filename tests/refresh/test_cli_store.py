"""`continual store …` as a user runs it, in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from store_bench import LOOSE, STRATEGY, month
from test_cli import Done, continual

from continual.refresh import Store
from continual.refresh.rules import Rules, explained

FEATURES = ["--feature", "a", "--feature", "b", "--feature", "c", "--id", "id"]


def init(place: Path, *more: str, rules: dict[str, object] | None = None) -> Done:
    (place / "small.yaml").write_text(
        yaml.safe_dump({k: v for k, v in STRATEGY.items() if k != "name"}), encoding="utf-8"
    )
    gate = ["--gate", "max drop 90% at 95%"] if rules is None else ["--rules", "rules.yaml"]
    if rules is not None:
        (place / "rules.yaml").write_text(yaml.safe_dump(rules), encoding="utf-8")
    return continual("store", "init", "store", "--strategy", "small.yaml", *gate, *FEATURES, *more, cwd=place)


def update(place: Path, number: int, *more: str) -> Done:
    rows = month(place, number)
    return continual("store", "update", "store", rows.name, "--device", "cpu", *more, cwd=place)


def test_a_store_from_init_to_export(tmp_path: Path) -> None:
    made = init(tmp_path, rules=LOOSE)
    assert made.returncode == 0 and "continual store update store ROWS" in made.stdout, made.stderr
    assert "no version is live yet" in continual("store", "status", "store", cwd=tmp_path).stdout
    for number in range(3):
        done = update(tmp_path, number)
        assert done.returncode == 0 and f"version {number + 1} promoted" in done.stdout, done.stderr
    status = continual("store", "status", "store", "--html", "page.html", cwd=tmp_path)
    assert status.returncode == 0 and "live: version 3" in status.stdout and "month-1" in status.stdout
    assert "<html" in (tmp_path / "page.html").read_text(encoding="utf-8")
    plain = json.loads(continual("store", "status", "store", "--json", cwd=tmp_path).stdout)
    assert plain["live"] == 3 and [one["name"] for one in plain["measured"]] == ["month-0", "month-1", "month-2"]
    assert continual("store", "verify", "store", cwd=tmp_path).stdout == "3 versions, every byte as it was written\n"

    rows = [json.loads(line) for line in month(tmp_path, 0).read_text(encoding="utf-8").splitlines()]
    (tmp_path / "new.jsonl").write_text("\n".join(json.dumps({k: r[k] for k in "abc"}) for r in rows), encoding="utf-8")
    done = continual("store", "predict", "store", "-i", "new.jsonl", "-o", "out/scored.jsonl", cwd=tmp_path)
    assert done.returncode == 0 and "40 rows by version 3" in done.stdout, done.stderr
    scored = [json.loads(line) for line in (tmp_path / "out" / "scored.jsonl").read_text(encoding="utf-8").splitlines()]
    right = sum(one["predicted"] == row["label"] for one, row in zip(scored, rows, strict=True))
    assert right > 20 and scored[0].keys() == {"a", "b", "c", "predicted", "score", "version"}

    assert "from version 3 to 2" in continual("store", "rollback", "store", cwd=tmp_path).stdout
    assert "live: version 2" in continual("store", "status", "store", cwd=tmp_path).stdout
    compared = continual("store", "compare", "store", "2", "3", cwd=tmp_path).stdout
    assert "version 2" in compared and "month-2" in compared and "trained on from" in compared
    assert "version 3" in continual("store", "promote", "store", "3", cwd=tmp_path).stdout
    events = [line.split()[1] for line in continual("store", "history", "store", cwd=tmp_path).stdout.splitlines()]
    assert events == ["created", *["made", "promoted"] * 3, "rolled", "promoted"]

    (tmp_path / "ids.txt").write_text("m1-3\nm1-4\n", encoding="utf-8-sig")  # as Windows writes it
    done = continual("store", "erase", "store", "--rows", "ids.txt", cwd=tmp_path)
    assert done.returncode == 0 and "2 of 2 rows were erased" in done.stdout and "rollback store 1" in done.stdout
    assert "was ever given" not in done.stdout
    assert continual("store", "erase", "store", "--rows", "ids.txt", cwd=tmp_path).returncode == 0, "the same again"
    strangers = [f"x{number}" for number in range(7)]
    for ids, status, count in ((["m1-5", *strangers], 0, 8), (["y", "z"], 1, 2)):
        (tmp_path / "ids.txt").write_text("\n".join(ids), encoding="utf-8")
        done = continual("store", "erase", "store", "--rows", "ids.txt", cwd=tmp_path)
        named = "'x0', 'x1', 'x2', 'x3', 'x4' and 2 more (7 of" if status == 0 else "'y', 'z' (2 of"
        assert done.returncode == status and f"was ever given {named} the {count} named)" in done.stdout, done.stdout
    assert continual("store", "verify", "store", cwd=tmp_path).returncode == 0
    done = continual("store", "export", "store", "--to", "plain", cwd=tmp_path)
    assert done.returncode == 0 and "base_model" not in (tmp_path / "plain" / "README.md").read_text(), done.stderr


def predicted(place: Path, *more: str) -> tuple[Done, list[dict[str, object]]]:
    """What ``predict`` did with the rows of month 1, without their labels."""
    rows = [json.loads(line) for line in month(place, 1).read_text(encoding="utf-8").splitlines()]
    (place / "new.jsonl").write_text("\n".join(json.dumps({k: r[k] for k in "abc"}) for r in rows), encoding="utf-8")
    (place / "scored.jsonl").unlink(missing_ok=True)
    done = continual("store", "predict", "store", "-i", "new.jsonl", "-o", "scored.jsonl", *more, cwd=place)
    made = (place / "scored.jsonl").read_text(encoding="utf-8").splitlines() if not done.returncode else []
    return done, [json.loads(line) for line in made]


def test_in_the_scenario_task_the_classes_of_one_experience_compete(tmp_path: Path) -> None:
    init(tmp_path, "--scenario", "task", rules=LOOSE)
    for number in range(2):
        assert update(tmp_path, number).returncode == 0
    for number in range(2):
        _, rows = predicted(tmp_path, "--experience", f"month-{number}")
        assert {row["predicted"] for row in rows} <= {f"class {2 * number}", f"class {2 * number + 1}"} and rows
    done, _ = predicted(tmp_path)
    assert (
        done.returncode == 1 and "it is not named: name it (--experience), one of 'month-0', 'month-1'" in done.stderr
    )
    done, _ = predicted(tmp_path, "--experience", "month-7")
    assert done.returncode == 1 and "'month-7' is none of them" in done.stderr
    done, _ = predicted(tmp_path, "--experience", "month-1", "--out-of-scope", "0.5")
    assert done.returncode == 1 and "answers by head/linear, which does not say how familiar" in done.stderr


def test_rows_out_of_scope_are_marked_where_the_head_can_tell(tmp_path: Path) -> None:
    strategy = {"backbone": "frozen", "head": {"kind": "nearest-mean"}}
    (tmp_path / "means.yaml").write_text(yaml.safe_dump(strategy), encoding="utf-8")
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(LOOSE), encoding="utf-8")
    continual("store", "init", "store", "--strategy", "means.yaml", "--rules", "rules.yaml", *FEATURES, cwd=tmp_path)
    assert update(tmp_path, 0).returncode == 0
    _, rows = predicted(tmp_path)
    assert rows and all("familiar" in row and "out_of_scope" not in row for row in rows)
    median = sorted(float(str(row["familiar"])) for row in rows)[20]
    _, marked = predicted(tmp_path, "--out-of-scope", str(median))
    assert [row["out_of_scope"] for row in marked] == [float(str(row["familiar"])) < median for row in rows]
    assert 15 < sum(bool(row["out_of_scope"]) for row in marked) < 25
    done, _ = predicted(tmp_path, "--out-of-scope", "nan")
    assert done.returncode == 1 and "nan is no threshold" in done.stderr
    done, _ = predicted(tmp_path, "--experience", "month-0")
    assert done.returncode == 1 and "where all classes compete: leave the experience 'month-0' out" in done.stderr


def test_the_exit_status_says_what_the_gate_said(tmp_path: Path) -> None:
    init(tmp_path, rules={"gate": {"max_drop": 0.02, "new_floor": 0.01}})
    assert update(tmp_path, 0).returncode == 0
    unsure = update(tmp_path, 1)
    assert unsure.returncode == 4 and "cannot tell" in unsure.stdout and "version 1 is live" in unsure.stdout
    (tmp_path / "store" / "rules.yaml").write_text("gate: {new_floor: 1.1, max_drop: 0.9}\n", encoding="utf-8")
    refused = update(tmp_path, 2, "--json")
    assert refused.returncode == 3 and json.loads(refused.stdout)["happened"] == "failed"
    assert update(tmp_path, 0).returncode == 0, "rows that were learnt already are no failure"


def test_rows_that_differ_stop_an_update_where_the_rules_say_so(tmp_path: Path) -> None:
    init(tmp_path, rules={**LOOSE, "drift": {"stop": ["unknown-classes"]}})
    assert update(tmp_path, 0).returncode == 0
    done = update(tmp_path, 1)
    assert (
        done.returncode == 5
        and "--accept-drift" in done.stdout
        and "was not learnt" in done.stdout
        and "class 2" in done.stdout
    )
    assert "stopped" in continual("store", "history", "store", cwd=tmp_path).stdout
    status = continual("store", "status", "store", cwd=tmp_path).stdout
    assert status.startswith("store: mlp with 'small', 1 versions")
    assert "the last update was stopped: 'month-1' was not learnt" in status
    done = update(tmp_path, 1, "--accept-drift")
    assert (
        done.returncode == 0
        and "note: a person accepted what would have stopped the update: unknown-classes." in done.stdout
    )
    history = continual("store", "history", "store", cwd=tmp_path).stdout.splitlines()
    assert [line.split()[1] for line in history][-3:] == ["accepted", "made", "promoted"] and "class 2" in history[-3]
    assert Store(tmp_path / "store").report().drift.accepted == ("unknown-classes",)
    assert "was stopped" not in continual("store", "status", "store", cwd=tmp_path).stdout
    (tmp_path / "store" / "rules.yaml").write_text("gate: {max_drop: 0.9, unsure: promote}\n", encoding="utf-8")
    done = update(tmp_path, 2, "--accept-drift")
    assert done.returncode == 0 and "accepted" not in done.stdout, "nothing would have stopped it"
    assert "drift:" not in done.stdout and "are of 2 classes not known before" in done.stdout
    assert "drift:" not in continual("store", "status", "store", cwd=tmp_path).stdout


def test_rows_of_a_version_that_was_taken_back_are_not_live(tmp_path: Path) -> None:
    init(tmp_path, rules=LOOSE)
    assert update(tmp_path, 0).returncode == update(tmp_path, 1).returncode == 0
    assert continual("store", "rollback", "store", cwd=tmp_path).returncode == 0
    done = update(tmp_path, 1)
    assert (
        done.returncode == 3 and "month-1: version 2 rolled back" in done.stdout and "version 1 is live" in done.stdout
    )
    assert "went live and was taken back" in done.stdout and "`continual store promote store 2`" in done.stdout
    assert Store(tmp_path / "store").versions() == [1, 2]
    assert continual("store", "promote", "store", "2", cwd=tmp_path).returncode == update(tmp_path, 1).returncode == 0
    continual("store", "rollback", "store", cwd=tmp_path)
    assert update(tmp_path, 1, "--again").returncode == 0 and Store(tmp_path / "store").live == 3


@pytest.mark.parametrize("phrase", ["max drop 0.02 at 95%", "max drop 2%", "max drop .5"])
def test_a_gate_in_words(phrase: str, tmp_path: Path) -> None:
    assert init(tmp_path, "--gate", phrase).returncode == 0
    kept = yaml.safe_load((tmp_path / "store" / "rules.yaml").read_text(encoding="utf-8"))["gate"]
    assert kept["max_drop"] == (0.5 if "5" in phrase.split()[2] and "0.02" not in phrase else 0.02)
    assert kept["confidence"] == 0.95


def test_rules_are_checked_before_they_are_used(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(
        "gate: {max_drop: 0.1}\nalerts: {webhook: 'https://x.org/'}\n", encoding="utf-8"
    )
    assert "every key is known" in continual("check", "rules.yaml", cwd=tmp_path).stdout
    (tmp_path / "rules.yaml").write_text("gate: {max_dro: 0.1}\n", encoding="utf-8")
    done = continual("check", "rules.yaml", cwd=tmp_path)
    assert done.returncode == 1 and "Did you mean 'max_drop'?" in done.stderr
    assert "max_drop_since_learnt" in continual("check", "--schema", "rules").stdout


def test_the_rules_that_init_writes_are_explained_and_read_back() -> None:
    rules = Rules.model_validate({"gate": {"max_drop": 0.05}, "ladder": {"settings": [{"training.lr": 1e-4}]}})
    for given in (Rules(), rules):
        text = explained(given)
        assert Rules.model_validate(yaml.safe_load(text)) == given
        keys = [line for line in text.splitlines() if ":" in line and not line.strip().startswith("#")]
        assert len(keys) == 32 and text.count("# ") >= 30 and "``" not in text
