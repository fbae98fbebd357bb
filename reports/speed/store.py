"""A store: what an update takes beside training and evaluation, and whether the number of versions slows it.

Overhead: updates of all-MiniLM-L6-v2 with LoRA and a memory on docstrings, two packages at a time; everything that is neither
training nor evaluation, with the comparison of new rows (drift) by itself. Wanted: at most 1 s + 5 % of the update.

Versions: a tiny network and one class over and over, so that nothing but the store's own work is left. Wanted: `status` at
1000 versions in 2 s, an update there no slower than at 10.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from continual import Store, Stream
from continual.provenance import commit, hardware, now, versions

RULES = {"gate": {"max_drop": 0.9, "unsure": "promote"}, "holdout": {"share": 0.25}}


def overhead(place: Path) -> dict[str, Any]:
    store = Store.create(
        place / "text", model="sentence-transformers/all-MiniLM-L6-v2", strategy="lora-rehearsal", rules=RULES
    )
    shares, found = [], []
    for experience in Stream.load("docstrings"):
        train = experience.train
        rows = train[torch.arange(len(train))]
        file = place / f"{experience.name.replace(' ', '')}.jsonl"
        texts = train.strings("text")
        names = [experience.class_names[label] for label in rows["labels"].tolist()]
        lines = [json.dumps({"text": text, "label": name}) for text, name in zip(texts, names, strict=True)]
        file.write_text("\n".join(lines), encoding="utf-8")
        started = time.perf_counter()
        store.update(file, device="cpu", progress=False)
        whole = time.perf_counter() - started
        cost = store.report(store.versions()[-1]).cost
        rest = whole - cost["train"] - cost["evaluate"] - cost["drift"]
        found.append({"update": whole, **cost, "rest": rest, "allowed": 1 + 0.05 * whole})
        shares.append(rest - 0.05 * whole)
    return {"updates": found, "worst rest less 5 % of the update, seconds": max(shares[1:])}


def many(place: Path, count: int) -> dict[str, Any]:
    strategy = {"name": "tiny", "training": {"optimizer": "sgd", "lr": 0.1, "epochs": 1, "batch_size": 16}}
    columns = {"features": ["a", "b"], "label": "label"}
    store = Store.create(
        place / "many",
        model={"kind": "mlp", "hidden": [4]},
        strategy=strategy,
        rules=RULES,
        columns=columns,
        scenario="domain",
    )
    draw, seconds = random.Random(0), []
    for number in range(count):
        file = place / f"{number}.jsonl"
        rows = [
            {"a": draw.random(), "b": draw.random() + place_ % 2, "label": "xy"[place_ % 2]} for place_ in range(16)
        ]
        file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        started = time.perf_counter()
        store.update(file, device="cpu", progress=False)
        seconds.append(time.perf_counter() - started)
        file.unlink()
        if number + 1 in (10, 30, 100, 300, 1000):
            print(number + 1, f"{statistics.median(seconds[-9:]):.2f} s an update", flush=True)
    command = [sys.executable, "-m", "continual.cli", "store", "status", str(store.path)]
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    process = time.perf_counter() - started
    started = time.perf_counter()
    str(store.status())
    size = sum(path.stat().st_size for path in store.path.rglob("*") if path.is_file())
    return {
        "versions": count,
        "update at 10, seconds": statistics.median(seconds[5:15]),
        "update at the end, seconds": statistics.median(seconds[-10:]),
        "status, seconds": time.perf_counter() - started,
        "status with the start of Python, seconds": process,
        "store bytes": size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--versions", type=int, default=1000, help="At least 20.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = {"versions": many(Path(folder), arguments.versions)}
        found["overhead"] = overhead(Path(folder))
    found |= {"commit": commit(), "packages": versions(), "hardware": hardware(), "measured": now()}
    print(json.dumps(found, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
