"""What the tests of stores in trouble share: a quick store to copy, rows to spoil, a chain that a stranger has forged."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from store_bench import COLUMNS, small_store

from continual.refresh import Store

QUICK: dict[str, Any] = {
    "name": "quick",
    "replay": {"kind": "rehearsal", "select": "class-balanced", "capacity": 8, "share": 0.5},
    "training": {"optimizer": "sgd", "lr": 0.02, "epochs": 1, "batch_size": 16},
}
RULES: dict[str, Any] = {"gate": {"max_drop": 0.9, "unsure": "promote"}, "holdout": {"share": 0.25}}
Rows = list[dict[str, Any]]


def rows(month: int, count: int = 16, **change: Any) -> Rows:
    """Rows of two classes of a month; ``change`` replaces columns, by a value or by a function of the row's place."""
    draw = random.Random(month)
    found = []
    for place in range(count):
        label = f"class {2 * month + place % 2}"
        row = {"id": f"m{month}-{place}", "label": label, **{name: draw.gauss(place % 2, 0.3) for name in "abc"}}
        row |= {name: value(place) if callable(value) else value for name, value in change.items()}
        found.append(row)
    return found


def lines(found: Rows) -> str:
    """Rows as JSONL."""
    return "".join(json.dumps(row) + "\n" for row in found)


def csv(found: Rows) -> str:
    """Rows as CSV."""
    return "".join(",".join(map(str, one)) + "\n" for one in (found[0].keys(), *(row.values() for row in found)))


def columns(found: Rows) -> dict[str, Any]:
    """Rows as Python hands them in, without a file between; the store's rows have ids of their own then."""
    ids = [int(hashlib.sha256(row["id"].encode()).hexdigest()[:8], 16) for row in found]
    inputs = torch.tensor([[row[name] for name in "abc"] for row in found])
    return {"inputs": inputs, "labels": [row["label"] for row in found], "row": torch.tensor(ids)}


def quick_store(place: Path, months: int, **changes: Any) -> Store:
    """A store of a tiny network after so many updates, each of one epoch."""
    rules = place.parent / f"rules-of-{place.name}.yaml"
    rules.write_text(yaml.safe_dump(RULES), encoding="utf-8")
    store = small_store(place, **{"strategy": QUICK, "rules": rules, "columns": COLUMNS, **changes})
    rules.unlink()
    for month in range(months):
        (place / "rows.jsonl").write_text(lines(rows(month)), encoding="utf-8")
        store.update(place / "rows.jsonl", name=f"month-{month}", device="cpu", progress=False)
    (place / "rows.jsonl").unlink(missing_ok=True)
    return store


def copied(store: Store | Path, place: Path) -> Path:
    """A copy of a store as ``place/store``."""
    place.mkdir(parents=True, exist_ok=True)
    shutil.copytree(store if isinstance(store, Path) else store.path, place / "store", symlinks=True)
    (place / "store" / ".lock").unlink(missing_ok=True)
    return place / "store"


def forge(store: Path, change: Callable[[list[dict[str, Any]]], object] = lambda entries: None) -> None:
    """Write the journal of a store anew after ``change`` of its entries, so that its chain holds again.

    Digests of ``store.json`` and of the manifests are taken anew from the files, as a stranger who makes a store would.
    """

    def digest(version: int) -> str:
        return hashlib.sha256((store / "versions" / f"{version:04d}" / "manifest.json").read_bytes()).hexdigest()

    path = store / "journal.jsonl"
    entries = [json.loads(line) for line in path.read_bytes().splitlines()]
    for entry in entries:
        if entry["event"] == "created":
            entry["manifest"] = hashlib.sha256((store / "store.json").read_bytes()).hexdigest()
        if entry["event"] == "made":
            entry["manifest"] = digest(entry["version"])
        entry["manifests"] = {version: digest(int(version)) for version in entry["manifests"]}
    change(entries)
    before, text = "0" * 64, b""
    for number, entry in enumerate(entries):
        line = json.dumps({**entry, "number": number, "before": before}).encode()
        before, text = hashlib.sha256(line).hexdigest(), text + line + b"\n"
    path.write_bytes(text)
    path.with_suffix(".end").write_text(f"{len(entries)} {before}\n", encoding="utf-8")


def forge_settings(store: Path, **changes: Any) -> None:
    """Keys of ``store.json`` replaced, and the chain made to fit."""
    path = store / "store.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")
    forge(store)


def forge_manifest(store: Path, version: int, change: Callable[[dict[str, Any]], object]) -> None:
    """The manifest of a version after ``change``, and the chain made to fit."""
    path = store / "versions" / f"{version:04d}" / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    change(manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")
    forge(store)


def forge_piece(store: Path, version: int, name: str, content: bytes) -> None:
    """Other bytes as a piece of a version, with manifest and chain made to fit."""
    digest = hashlib.sha256(content).hexdigest()
    path = store / "objects" / digest[:2] / digest[2:]
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    forge_manifest(
        store,
        version,
        lambda manifest: manifest["pieces"].update({name: {"sha256": digest, "bytes": len(content)}}),
    )


def piece_path(store: Path, version: int, name: str) -> Path:
    """Where a piece of a version lies."""
    piece = Store(store).manifest(version).pieces[name]
    return store / "objects" / piece.sha256[:2] / piece.sha256[2:]
