"""What the speed scripts share: alternating repeats, medians, provenance."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from continual.provenance import commit, hardware, now, versions


def alternate(work: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Run each piece of work in turn, ``repeats`` rounds after one warm-up; each returns its own figure."""
    figures: dict[str, list[float]] = {name: [] for name in work}
    for round_number in range(repeats + 1):
        for name, run in work.items():
            figure = run()
            if round_number:
                figures[name].append(figure)
    return figures


def timed(run: Callable[[], object]) -> Callable[[], float]:
    """Seconds of one call."""

    def measure() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return measure


def ratio(figures: Mapping[str, list[float]], ours: str, other: str) -> float:
    """Median over the rounds of ours / other, each pair taken in the same round."""
    return statistics.median(a / b for a, b in zip(figures[ours], figures[other], strict=True))


def write(figures: dict[str, Any], description: str) -> None:
    """Print the figures as JSON, and write them where ``--out`` says."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    out = parser.parse_args().out
    figures = {**figures, "commit": commit(), "versions": versions(), "hardware": hardware(), "measured": now()}
    text = json.dumps(figures, indent=1)
    print(text)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")
