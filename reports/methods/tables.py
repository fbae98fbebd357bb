"""Tables of the README beside it: ``python reports/methods/tables.py runs/mammoth`` or ``… runs/avalanche --pairs``.

Without ``--pairs``: accuracy in %, mean ± standard deviation over seeds, a row for each strategy, a column for each stream. With it:
ours and Avalanche's implementation of each method, and the 95 % interval (t) of their difference over shared seeds.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t

from continual.report import load_results

SAME = {"replay": "rehearsal"}
"""Avalanche's name of a method → ours, where they differ."""

Runs = dict[tuple[str, str], dict[int, Any]]


def spread(runs: Runs) -> None:
    streams, strategies = (list(dict.fromkeys(key[place] for key in runs)) for place in (0, 1))
    print(f"| strategy | {' | '.join(f'{stream} | forgetting | train s' for stream in streams)} |")
    print("|---" * (1 + 3 * len(streams)) + "|")
    for strategy in strategies:
        cells = []
        for stream in streams:
            found = runs.get((stream, strategy))
            if found is None:
                cells += ["–"] * 3
                continue
            accuracy, lost = (_of(found, name) for name in ("accuracy", "forgetting"))
            seconds = np.median([one.cost.train_seconds for one in found.values()])
            cells += [_mean(accuracy), "–" if lost is None else f"{lost.mean():.1f}", f"{seconds:.0f}"]
        print(f"| `{strategy}` | {' | '.join(cells)} |")


def pairs(runs: Runs) -> None:
    for stream in dict.fromkeys(stream for stream, _ in runs):
        print(
            f"\n| {stream} | ours | Avalanche | difference [95 %] | forgetting | seconds | state, kB |\n|---|---|---|---|---|---|---|"
        )
        for strategy in [name for place, name in runs if place == stream and name.startswith("avalanche-")]:
            method = strategy.removeprefix("avalanche-")
            ours, theirs = runs[stream, SAME.get(method, method)], runs[stream, strategy]
            seeds = sorted(ours.keys() & theirs.keys())
            both = [_of({seed: one[seed] for seed in seeds}, "accuracy") for one in (ours, theirs)]
            gap = both[0] - both[1]
            half = t.ppf(0.975, len(gap) - 1) * gap.std(ddof=1) / len(gap) ** 0.5
            shown = f"{gap.mean():+.1f} [{gap.mean() - half:+.1f}, {gap.mean() + half:+.1f}]"
            lost = " / ".join(f"{_of(one, 'forgetting').mean():.1f}" for one in (ours, theirs))
            cost = [
                " / ".join(f"{np.mean([read(run) for run in one.values()]):{form}}" for one in (ours, theirs))
                for read, form in (
                    (lambda run: run.cost.train_seconds, ".2f"),
                    (lambda run: sum(run.cost.state_bytes.values()) / 1000, ".0f"),
                )
            ]
            print(
                f"| `{SAME.get(method, method)}` | {_mean(both[0])} | {_mean(both[1])} | {shown} | {lost} | {' | '.join(cost)} |"
            )


def _of(found: dict[int, Any], metric: str) -> Any:
    values = [getattr(one.metrics, metric) for one in found.values()]
    return None if None in values else 100 * np.array(values)


def _mean(values: Any) -> str:
    return f"{values.mean():.1f} ± {values.std(ddof=1):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", action="store_true")
    arguments = parser.parse_args()
    runs: Runs = defaultdict(dict)
    for result in load_results([arguments.folder]):
        runs[result.stream, result.strategy][result.seed] = result
    (pairs if arguments.pairs else spread)({key: dict(sorted(one.items())) for key, one in runs.items()})


if __name__ == "__main__":
    main()
