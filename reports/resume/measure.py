"""A run killed at random steps and resumed each time, against one that was never killed: every figure and weight.

Each kill is SIGKILL to the process of `continual run`. Both runs are of the same stream, strategy and seed.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from continual.provenance import commit, hardware, now, versions
from continual.state import load_state

TIMES = ("cost", "provenance")


def command(stream: str, strategy: str, out: Path, *extra: str) -> list[str]:
    base = [sys.executable, "-m", "continual.cli", "run", stream, strategy]
    return [*base, "--out", str(out), "--seed", "0", "--device", "cpu", *extra]


def figures(folder: Path) -> dict[str, Any]:
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    kept = {key: value for key, value in result.items() if key not in TIMES}
    cost = {key: result["cost"][key] for key in ("rows_trained", "state_bytes", "trainable_parameters")}
    return {**kept, "cost": cost}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_state(folder / "checkpoint")["weights"])


def killed(stream: str, strategy: str, out: Path, kills: int, span: float, seed: int, options: list[str]) -> int:
    """Run, kill up to ``span`` seconds after a checkpoint, resume, until ``kills`` are done; then let it finish."""
    draw = random.Random(seed)
    done = 0
    while True:
        resume = ["--resume"] if (out / "run.json").exists() else []
        process = subprocess.Popen(
            command(stream, strategy, out, *resume, *options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        if done >= kills:
            if process.wait() != 0:
                raise RuntimeError(f"the last run of {strategy} ended with status {process.returncode}")
            return done
        wait_for_training(process, out)
        time.sleep(draw.uniform(0.0, span))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            done += 1
        elif (out / "result.json").exists():
            return done


def wait_for_training(process: subprocess.Popen[bytes], out: Path) -> None:
    """Until the process has written a checkpoint of its own, or is over."""
    seal = out / "checkpoint" / "seal.json"
    before = seal.stat().st_mtime_ns if seal.exists() else 0
    while process.poll() is None:
        try:
            if seal.stat().st_mtime_ns != before:
                return
        except OSError:
            pass
        time.sleep(0.001)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    arguments = parser.parse_args()
    rows = []
    longer = ["--set", "training.epochs=60", "--save-every", "5"]
    plan = [("split-digits", "rehearsal", longer), ("split-digits", "ewc-rehearsal", longer)]
    plan += [("docstrings", "adalora-rehearsal", ["--save-every", "2"])]
    for stream, strategy, options in plan:
        with tempfile.TemporaryDirectory() as place:
            whole, cut = Path(place) / "whole", Path(place) / "cut"
            subprocess.run(command(stream, strategy, whole, *options), check=True, stdout=subprocess.DEVNULL)
            cost = json.loads((whole / "result.json").read_text(encoding="utf-8"))["cost"]
            span = cost["train_seconds"] / (2 * arguments.kills)  # so that the run is not over before the last kill
            kills = killed(stream, strategy, cut, arguments.kills, span, 0, options)
            left, right = weights(whole), weights(cut)
            rows.append(
                {
                    "stream": stream,
                    "strategy": strategy,
                    "kills": kills,
                    "same_figures": figures(whole) == figures(cut),
                    "same_weights": left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left),
                }
            )
            print(rows[-1], flush=True)
    report = {"runs": rows, "commit": commit(), "versions": versions(), "hardware": hardware(), "measured": now()}
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if not all(row["same_figures"] and row["same_weights"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
