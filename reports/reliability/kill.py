"""A store whose every command is killed at a random moment, beside a twin that was never killed.

Each command (update, rollback, promote, erase) runs in a process of its own, which gets SIGKILL at a random time, at a random
durable write (fsync, rename, truncation), or at a random moment of training or evaluation. After each kill `verify` finds nothing
wrong, the live version loads, and no version is lost; then the same command is given again and completes, and the live version has
the same bytes as the twin's. After each erasure, and at the end, no file of the store holds a byte of the rows that were erased: of
their ids as numbers and in words, and of their content. Every update tells a command of itself, once at least.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from continual.learner import Learner
from continual.learner.trainer import Trainer
from continual.provenance import commit, hardware, now, versions
from continual.refresh import Store
from continual.refresh.folder import Folder
from continual.refresh.intake import row_ids
from continual.refresh.objects import Objects

FEATURES = 8
RULES = {"gate": {"max_drop": 0.9, "unsure": "promote"}, "holdout": {"share": 0.25}, "save_every": 8}
HEARS = "cat >> ../told-${PWD##*/}"
"""What every update is told to: a file beside the store, called after it."""
STRATEGY = {
    "replay": {"kind": "rehearsal", "select": "class-balanced", "capacity": 120, "share": 0.5},
    "training": {"optimizer": "adam", "lr": 0.01, "epochs": 6, "batch_size": 8},
}
STAGES = ("begin", "training", "evaluation", "saving", "promoting", "erasing")
Command = tuple[str, Any]


def rows_of(update: int, path: Path) -> Path:
    """Forty rows of four classes, of which one is new every tenth update."""
    draw = random.Random(update)
    newest = 4 + update // 10
    lines = []
    for place in range(40):
        label = newest - 1 - place % 4
        centre = random.Random(label)
        values = {f"x{k}": centre.uniform(-2, 2) + draw.gauss(0, 0.6) for k in range(FEATURES)}
        lines.append(json.dumps({"id": f"{update}-{place}", "label": f"class {label}", **values}))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def plan(updates: int, data: Path) -> list[Command]:
    """Updates, and among them rollbacks that are promoted again, and erasures."""
    commands: list[Command] = []
    for update in range(updates):
        commands.append(("update", rows_of(update, data / f"{update:04d}.jsonl")))
        if update % 12 == 7:
            commands += [("rollback", None), ("promote", -1)]
        if update % 20 == 15:
            commands.append(("erase", [f"{u}-{p}" for u in range(update - 2, update) for p in (1, 2, 3)]))
    return commands


def carry_out(place: Path, command: Command) -> None:
    store = Store(place, trust=["sh"])
    what, given = command
    if what == "update":
        store.update(given, device="cpu", progress=False)
    elif what == "rollback":
        store.rollback(max(store.versions()) - 1)
    elif what == "promote":
        store.promote(max(store.versions()))
    else:
        store.erase(given)


def durable(limit: int | None, count: Any) -> None:
    """Count the durable writes of this process, and kill it just before number ``limit``."""

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            if limit is not None and count.value >= limit:
                os.kill(os.getpid(), signal.SIGKILL)
            count.value += 1
            return original(*given, **named)

        return call

    for name in ("fsync", "replace", "rename", "truncate"):
        setattr(os, name, counted(getattr(os, name)))


def mark_stages(stage: Any) -> None:
    """Let ``stage`` hold what the process is doing."""

    def marked(owner: Any, name: str, number: int) -> None:
        original = getattr(owner, name)

        def call(*given: Any, **named: Any) -> Any:
            before, stage.value = stage.value, number
            try:
                return original(*given, **named)
            finally:
                stage.value = before

        setattr(owner, name, call)

    import continual.refresh.erasure as erasure_module

    marked(Trainer, "fit", STAGES.index("training"))
    marked(Learner, "_measure", STAGES.index("evaluation"))
    marked(Learner, "_checkpoint", STAGES.index("saving"))
    marked(Objects, "put", STAGES.index("saving"))
    marked(Folder, "add", STAGES.index("saving"))
    marked(Folder, "go_live", STAGES.index("promoting"))
    marked(erasure_module, "_erase", STAGES.index("erasing"))


def child(place: Path, command: Command, limit: int | None, count: Any, stage: Any) -> None:
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    durable(limit, count)
    mark_stages(stage)
    carry_out(place, command)


def start(place: Path, command: Command, limit: int | None = None) -> tuple[Any, Any, Any]:
    fork = multiprocessing.get_context("fork")
    count, stage = fork.Value("i", 0, lock=False), fork.Value("i", 0, lock=False)
    process = fork.Process(target=child, args=(place, command, limit, count, stage))
    process.start()
    return process, count, stage


def kill_in(process: Any, stage: Any, name: str, delay: float) -> None:
    """Kill the process so many seconds after it is first seen in a stage."""
    wanted = STAGES.index(name)
    while process.is_alive():
        if stage.value == wanted:
            time.sleep(delay)
            os.kill(process.pid, signal.SIGKILL)
            return
        time.sleep(0.0005)


def traces(ids: list[str], data: Path, salt: str) -> list[bytes]:
    """What a store could hold of rows: their ids as numbers and in words, their content."""
    numbers = row_ids(ids, salt).tolist()
    found = [form for number in numbers for form in (number.to_bytes(8, "little"), str(number).encode())]
    for name in ids:
        update, row = name.split("-")
        values = json.loads((data / f"{int(update):04d}.jsonl").read_text(encoding="utf-8").splitlines()[int(row)])
        content = torch.tensor([values[f"x{k}"] for k in range(FEATURES)])
        found += [content.numpy().tobytes(), f'"{name}"'.encode()]
    return found


def holding(place: Path, needles: list[bytes]) -> list[str]:
    """Files of a store with any of these bytes, but for the list of what was erased."""
    files = [path for path in place.rglob("*") if path.is_file() and path.name != "erased.json"]
    pattern = re.compile(b"|".join(map(re.escape, needles)))
    return [path.relative_to(place).as_posix() for path in files if pattern.search(path.read_bytes())]


def told(path: Path) -> set[int]:
    """The versions that went live, as the command was told."""
    text, found = path.read_text(encoding="utf-8") if path.exists() else "", set()
    while text:
        one, end = json.JSONDecoder().raw_decode(text)
        text = text[end:].lstrip()
        if one["happened"] == "promoted":
            found.add(one["version"])
    return found


def live_bytes(place: Path) -> dict[str, str]:
    """SHA-256 of every piece of the live version but its times."""
    store = Store(place)
    return {n: p.sha256 for n, p in store.manifest().pieces.items() if n not in ("clock", "report")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    draw, stages, modes, begun = random.Random(arguments.seed), Counter(), Counter(), time.perf_counter()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        (base / "data").mkdir()
        whole, cut = base / "whole", base / "cut"
        columns = {"features": [f"x{k}" for k in range(FEATURES)], "label": "label", "id": "id"}
        rules = {**RULES, "alerts": {"command": ["sh", "-c", HEARS]}}
        Store.create(whole, model={"kind": "mlp", "hidden": [16]}, strategy=STRATEGY, rules=rules, columns=columns)
        salt, erased, searched = Store(whole).folder.settings.salt, list[bytes](), 0
        shutil.copytree(whole, cut)
        commands = plan(arguments.updates, base / "data")
        for number, command in enumerate(commands):
            if command[0] == "erase":
                gone = traces(command[1], base / "data", salt)
                erased += gone
                if not holding(whole, gone):
                    raise RuntimeError(
                        f"command {number}: the rows to be erased are not in the store, so nothing is shown"
                    )
            started = time.perf_counter()
            process, count, _ = start(whole, command)
            process.join()
            if process.exitcode != 0:
                raise RuntimeError(f"the twin failed at command {number}: {command}")
            seconds = time.perf_counter() - started
            known = Store(cut).versions()
            mode = draw.choice(("time", "write", "stage")) if command[0] == "update" else draw.choice(("time", "write"))
            limit = draw.randrange(max(count.value, 1)) if mode == "write" else None
            process, _, stage = start(cut, command, limit)
            if mode == "time":
                time.sleep(draw.uniform(0, seconds))
                if process.is_alive():
                    os.kill(process.pid, signal.SIGKILL)
            if mode == "stage":
                kill_in(process, stage, draw.choice(("training", "evaluation")), draw.uniform(0, 0.004))
            process.join()
            if process.exitcode == -signal.SIGKILL:
                stages[STAGES[stage.value]] += 1
                modes[mode] += 1
            store = Store(cut)
            found = store.verify()
            lost = sorted(set(known) - set(store.versions()))
            if found or lost:
                wrong.append(f"command {number} {command[0]}: {found} lost {lost}")
            if store.live is not None:
                store.learner(device="cpu")
            if process.exitcode != 0:
                process, _, _ = start(cut, command)
                process.join()
                if process.exitcode != 0:
                    wrong.append(f"command {number} {command[0]} did not complete when it was given again")
            if erased and (command[0] == "erase" or number == len(commands) - 1):
                searched += 1
                held = holding(cut, erased)
                if held:
                    wrong.append(f"command {number} {command[0]}: rows that were erased are still in {held}")
            if live_bytes(whole) != live_bytes(cut):
                wrong.append(f"command {number} {command[0]}: the live version differs from the twin's")
            if wrong:
                break
            if number % 20 == 0:
                print(number, command[0], dict(stages), f"{time.perf_counter() - begun:.0f} s", flush=True)
        unheard = sorted(set(Store(cut).versions()) - told(base / "told-cut"))
        if unheard:
            wrong.append(f"nobody was told of the versions {unheard}")
        report = {
            "commands": number + 1,
            "updates": arguments.updates,
            "kills": sum(stages.values()),
            "killed in": dict(stages),
            "killed by": dict(modes),
            "versions": len(Store(cut).versions()),
            "rows erased": sum(len(given) for what, given in commands if what == "erase"),
            "searches for their bytes": searched,
            "versions that were told of": len(told(base / "told-cut")),
            "wrong": wrong,
            "final versions identical": live_bytes(whole) == live_bytes(cut),
            "seconds": round(time.perf_counter() - begun),
            "command": f"python reports/reliability/kill.py --updates {arguments.updates} --seed {arguments.seed}",
            "commit": commit(),
            "versions of packages": versions(),
            "hardware": hardware(),
            "measured": now(),
        }
    print(json.dumps(report, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
