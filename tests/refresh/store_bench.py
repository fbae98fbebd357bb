"""What the tests of stores share: rows of a few classes, and a store of a tiny network."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from continual.refresh import Store
from continual.refresh.intake import salt_of

COLUMNS: dict[str, Any] = {"features": ["a", "b", "c"], "label": "label", "id": "id"}
STRATEGY: dict[str, Any] = {
    "name": "small",
    "replay": {"kind": "rehearsal", "select": "class-balanced", "capacity": 40, "share": 0.5},
    "training": {"optimizer": "adam", "lr": 0.02, "epochs": 12, "batch_size": 8},
}
SALT = salt_of(0)
"""Of every store here, so that the same rows are held out in every run."""
LOOSE: dict[str, Any] = {"gate": {"max_drop": 0.9, "unsure": "promote"}, "holdout": {"share": 0.25}}


def month(place: Path, number: int, *, rows: int = 40, classes: tuple[str, ...] | None = None, **more: Any) -> Path:
    """A file of rows, two classes a month: a cloud each, far from one another."""
    draw = random.Random(number)
    names = classes or (f"class {2 * number}", f"class {2 * number + 1}")
    lines = []
    for row in range(rows):
        label = names[row % len(names)]
        centre = random.Random(label)
        values = {name: 6 * centre.uniform(-1, 1) + draw.gauss(0, 0.3) for name in "abc"}
        lines.append(json.dumps({"id": f"m{number}-{row}", "label": label, **values, **more}))
    path = place / f"month-{number}.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def small_store(place: Path, **changes: Any) -> Store:
    """A store of a tiny network in ``place/store``."""
    options: dict[str, Any] = {
        "model": {"kind": "mlp", "hidden": [16]},
        "strategy": STRATEGY,
        "rules": LOOSE,
        "columns": COLUMNS,
        **changes,
    }
    return Store.create(place / "store", **options)


def grown(place: Path, months: int, **changes: Any) -> Store:
    """A store after so many updates."""
    store = small_store(place, **changes)
    for number in range(months):
        store.update(month(place, number), device="cpu", progress=False)
    return store


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file of a store but the lock."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }
