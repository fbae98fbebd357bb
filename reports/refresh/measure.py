"""CLINC150 as fifteen monthly refreshes of one store, ten new intents each, with what goes wrong in real life.

Month 6 is offered with poisoned labels first (two of five are wrong), month 9 with drifted wording; after
month 10 rows are erased; month 12 is rolled back and promoted again. Training and validation rows of the data are the months'
files; the store sets its own hold-out aside. The data's test file is never given to the store: it is predicted at the end.

    python reports/refresh/measure.py --data FOLDER --out reports/refresh
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from continual.provenance import commit, hardware, now, versions
from continual.refresh import Outcome, Store

MONTHS = 15
BASE = "sentence-transformers/all-MiniLM-L6-v2"
RULES = """\
# 200 to 300 hold-out rows of each month tell a drop of 5 points, not one of 2; 3000 in all keep the cost of a month flat
gate: {max_drop: 0.05, confidence: 0.95, floor: 0.6, new_floor: 0.85, negative_flips: 0.1, slower: 2.0, largest: 60MB}
holdout: {share: 0.25, rows: 400, total: 3000}
drift: {stop: [form-shift]}
"""
STRATEGIES: dict[str, dict[str, Any]] = {
    "lora-rehearsal": {"model": BASE, "strategy": "lora-rehearsal", "overrides": {}},
    "lora-first-ranpac": {
        "model": {"kind": "pretrained", "name": BASE, "layers": 4},
        "strategy": "lora-first-ranpac",
        "overrides": {
            "head.dimension": 1900,
            "head.projection": "orthogonal",
            "head.center": True,
        },
    },
}
Rows = list[dict[str, str]]


def read(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def months_of(data: Path) -> list[Rows]:
    """Rows of each month, with ids; the intents in random order, ten a month."""
    rows = [row for name in ("train", "val") for row in read(data / f"{name}.jsonl") if row["label"] != "oos"]
    tests = {row["text"] for row in read(data / "test.jsonl")}
    rows = [row for row in rows if row["text"] not in tests]
    intents = sorted({row["label"] for row in rows})
    random.Random(0).shuffle(intents)
    found = []
    for month in range(MONTHS):
        own = set(intents[10 * month : 10 * month + 10])
        chosen = [row for row in rows if row["label"] in own]
        random.Random(month).shuffle(chosen)
        found.append(
            [{"id": f"{month + 1:02d}-{n:04d}", "text": r["text"], "label": r["label"]} for n, r in enumerate(chosen)]
        )
    return found


def poisoned(months: list[Rows], month: int) -> Rows:
    """The month's rows with two labels of five replaced by any label known so far, as a broken labelling job would leave them."""
    draw = random.Random(1)
    names = sorted({row["label"] for rows in months[: month + 1] for row in rows})
    return [
        {**row, "id": f"poisoned-{row['id']}", "label": draw.choice(names) if draw.random() < 0.4 else row["label"]}
        for row in months[month]
    ]


def drifted(rows: Rows) -> Rows:
    """The same requests as a new front end would send them: with a greeting before, a signature after, and typing errors."""
    draw = random.Random(2)

    def typed(text: str) -> str:
        letters = list(text)
        for place in range(len(letters) - 1):
            if letters[place].isalpha() and draw.random() < 0.12:
                letters[place], letters[place + 1] = letters[place + 1], letters[place]
        return "".join(letters)

    return [
        {**row, "id": f"new-{row['id']}", "text": f"hello team, {typed(row['text'])} - sent from my phone, many thanks"}
        for row in rows
    ]


def folder_bytes(path: Path) -> int:
    return sum(one.stat().st_size for one in path.rglob("*") if one.is_file())


def refresh(name: str, months: list[Rows], tests: Rows, place: Path, out: Path) -> dict[str, Any]:
    store = Store.create(place / name, rules=place / "rules.yaml", columns={"id": "id"}, **STRATEGIES[name])
    steps: list[dict[str, Any]] = []

    def update(label: str, rows: Rows) -> Outcome:
        path = write(place / f"{label}.jsonl", rows)
        before, started = folder_bytes(store.path), time.perf_counter()
        outcome = store.update(path, device="cpu", progress=False)
        report = None if outcome.version is None else store.report(outcome.version)
        steps.append(
            {
                "offered": label,
                "happened": outcome.happened,
                "version": outcome.version,
                "sentence": outcome.sentence,
                "mean score": outcome.score,
                "worst": None if outcome.worst is None else outcome.worst.model_dump(),
                "drift": [found.sentence for found in outcome.found],
                "seconds": round(time.perf_counter() - started, 2),
                "cost": None if report is None else {k: round(v, 2) for k, v in report.cost.items()},
                "store grew by bytes": folder_bytes(store.path) - before,
                "state bytes": None if report is None else sum(report.bytes.values()),
            }
        )
        print(
            name,
            label,
            outcome.happened,
            outcome.score,
            steps[-1]["seconds"],
            steps[-1]["cost"],
            outcome.sentence,
            flush=True,
        )
        for sentence in steps[-1]["drift"]:
            print("   drift:", sentence, flush=True)
        return outcome

    def act(label: str, sentence: str) -> None:
        steps.append({"done": label, "sentence": sentence})
        print(name, label, sentence, flush=True)

    for month, rows in enumerate(months):
        if month == 5:
            update("2026-06-poisoned", poisoned(months, month))
        if month == 8:
            update("2026-09-drifted", drifted(rows))
        outcome = update(f"2026-{month + 1:02d}" if month < 12 else f"2027-{month - 11:02d}", rows)
        if outcome.happened in ("failed", "cannot tell") and outcome.version is not None:
            act("promote", store.promote(outcome.version))
        if month == 9:
            erased = store.erase([f"{m:02d}-{n:04d}" for m in (2, 3) for n in range(10)])
            act("erase", f"{erased.sentence} {erased.places}")
        if month == 11:
            act("rollback", store.rollback())
            act("promote", store.promote(store.versions()[-1]))
    wrong = store.verify()
    predicted = store.predict([row["text"] for row in tests], device="cpu")["names"]
    accuracy = sum(one == row["label"] for one, row in zip(predicted, tests, strict=True)) / len(tests)
    store.page(out / f"{name}.html")
    store.export(place / f"{name}-export")
    learner = store.learner(device="cpu")
    sizes = learner.state_bytes()
    return {
        "strategy": name,
        "steps": steps,
        "verify": wrong,
        "test accuracy of version live at the end": accuracy,
        "state bytes": sizes,
        "store bytes": folder_bytes(store.path),
        "versions": len(store.versions()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, required=True, help="Folder with train.jsonl, val.jsonl and test.jsonl of CLINC150."
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--only", choices=list(STRATEGIES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = arguments.data if (arguments.data / "train.jsonl").is_file() else arguments.data / "clinc150"
    months, tests = months_of(data), [row for row in read(data / "test.jsonl") if row["label"] != "oos"]
    for name in [arguments.only] if arguments.only else list(STRATEGIES):
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            (place / "rules.yaml").write_text(RULES, encoding="utf-8")
            found = refresh(name, months, tests, place, arguments.out)
        found |= {
            "command": f"python reports/refresh/measure.py --data FOLDER --only {name}",
            "rules": RULES,
            "commit": commit(),
            "packages": versions(),
            "hardware": hardware(),
            "measured": now(),
        }
        (arguments.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
