"""Runs brought together: for each strategy on each stream the mean over seeds and what it is uncertain by.

With several seeds the interval is Student's t over seeds (95 %, two-sided, each seed one observation). With one seed it
is the paired bootstrap over test rows that the run itself recorded, and says so (``over == "rows"``): it does not hold
what another seed would change. Student's t knows no limits: where it leaves the range that a figure can have, the
interval is cut there.

Letters: G seeds, U updates (rows of the matrix), S experiences (columns).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from continual.errors import StateError, quoted
from continual.monitor.metrics import defined, intransigence
from continual.monitor.statistics import seed_interval
from continual.report.load import SHARES, Result
from continual.report.variants import variants

METRICS = (
    "accuracy",
    "learning_accuracy",
    "bwt",
    "forgetting",
    "fwt",
    "retention",
    "negative_flips",
    "intransigence",
)
_SCORES = ("accuracy", "learning_accuracy")
COSTS = (
    "train_seconds",
    "monitor_seconds",
    "rows_trained",
    "rows_per_second",
    "peak_memory_bytes",
    "trainable_parameters",
)
ANYTHING = (-math.inf, math.inf)
SHARE, CHANGE = (0.0, 1.0), (-1.0, 1.0)
LIMITS = {"retention": (0.0, math.inf), "negative_flips": SHARE}
"""What a metric can be, whatever the score is; beside these a share is within ``SHARE`` and its changes in ``CHANGE``."""
Matrix = tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval.

    Attributes:
        mean: over ``count`` seeds.
        std: standard deviation over seeds (n - 1); None with one seed.
        low, high: the interval; None where there is none.
        over: what the interval speaks of: other ``seeds``, or other test ``rows`` for this one seed.
        count: seeds that gave a value.
    """

    mean: float
    std: float | None
    low: float | None
    high: float | None
    over: Literal["seeds", "rows"] | None
    count: int


@dataclass(frozen=True)
class StrategySummary:
    """One strategy on one stream, over its seeds.

    Attributes:
        metrics: name → estimate, None where no run has it.
        matrix: mean of the matrices (U, S), None in a cell that no seed measured.
        curve: (U,) mean over the experiences met so far after each update; None where a cell is missing. Empty for a
            joint run.
        cost: name → mean over seeds, None where no run has it.
        state_bytes: part → mean bytes over seeds.
        probes: name → mean over seeds of the first and the last score.
    """

    stream: str
    strategy: str
    summary: str
    source: str
    runs: tuple[Result, ...]
    metrics: dict[str, Estimate | None]
    matrix: Matrix
    curve: tuple[Estimate | None, ...]
    cost: dict[str, float | None]
    state_bytes: dict[str, float]
    notes: tuple[str, ...]
    probes: dict[str, tuple[float | None, float | None]]

    @property
    def joint(self) -> bool:
        """Trained once on everything."""
        return self.runs[0].joint

    @property
    def bound(self) -> bool:
        """An upper bound that sees all rows again (``data: joint`` or ``cumulative``), not a competitor."""
        return self.joint or (self.runs[0].provenance.settings or {}).get("data") in ("joint", "cumulative")

    @property
    def naive(self) -> bool:
        """Plain training with nothing against forgetting, as far as the settings of its runs say so."""
        settings = self.runs[0].provenance.settings
        return settings is not None and not self.bound and plain_training(settings, self.runs[0].scenario)

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(run.seed for run in self.runs)

    @property
    def total_bytes(self) -> float:
        """Bytes that all parts hold together."""
        return sum(self.state_bytes.values())


@dataclass(frozen=True)
class StreamSummary:
    """All strategies on one stream, best accuracy first.

    Attributes:
        experiences: names of the columns; plain numbers from 1 where the seeds name them differently.
        warnings: what makes the runs hard to compare, one sentence each.
    """

    stream: str
    summary: str
    scenario: str
    objective: str
    score: str
    experiences: tuple[str, ...]
    strategies: tuple[StrategySummary, ...]
    warnings: tuple[str, ...]

    @property
    def percent(self) -> bool:
        """Whether the score is a share, shown in per cent."""
        return self.score in SHARES

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted({seed for strategy in self.strategies for seed in strategy.seeds}))


def plain_training(settings: Mapping[str, Any], scenario: str) -> bool:
    """Whether a strategy trains on what arrives and does nothing else: no part but an adapter and a linear head.

    An adapter that is held after the first experience, a frozen backbone, a head without gradients and a competition that
    leaves earlier classes alone all work against forgetting.
    """
    others = ("training", "tuned")
    parts = {key for key, value in settings.items() if isinstance(value, dict | list) and key not in others}
    adapter, head = settings.get("adapter") or {}, settings.get("head") or {}
    active = (settings.get("training") or {}).get("active")
    return (
        parts <= {"adapter", "head"}
        and adapter.get("kind") in (None, "lora", "adalora")
        and adapter.get("across_tasks") != "first"
        and head.get("kind") in (None, "linear")
        and settings.get("backbone") != "frozen"
        and (scenario == "task" or active in (None, "seen", "all"))
    )


def aggregate(results: Iterable[Result]) -> list[StreamSummary]:
    """One :class:`StreamSummary` for each stream, by name.

    Raises:
        StateError: runs of one stream that cannot stand in one table (another score, other numbers of experiences).
    """
    streams: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda run: run.key):
        streams.setdefault(result.stream, []).append(result)
    return [_stream(name, runs) for name, runs in streams.items()]


def limits(metric: str, share: bool) -> tuple[float, float]:
    """The least and the most that a metric can be, where the score is a share and where it is not."""
    if metric in LIMITS or not share:
        return LIMITS.get(metric, ANYTHING)
    return SHARE if metric in _SCORES else CHANGE


def estimate(
    values: Sequence[float],
    rows: Sequence[float | None] | None = None,
    within: tuple[float, float] = ANYTHING,
) -> Estimate | None:
    """Mean and 95 % interval of one value for each seed.

    Args:
        rows: the bootstrap interval that one seed shows.
        within: the least and the most that the figure can be; the interval over seeds is cut there.
    """
    if not values:
        return None
    if len(values) == 1:
        low, high = (rows[0], rows[1]) if rows else (None, None)
        known = low is not None and high is not None
        return Estimate(values[0], None, low, high, "rows" if known else None, 1)
    _, low, high = seed_interval(values)
    assert low is not None and high is not None, "two values have an interval"
    low, high = max(low, within[0]), min(high, within[1])
    return Estimate(float(np.mean(values)), float(np.std(values, ddof=1)), low, high, "seeds", len(values))


def difference(one: StrategySummary, other: StrategySummary, metric: str = "accuracy") -> Estimate | None:
    """``one`` minus ``other``, paired by seed; None where they share no seed."""
    others = {run.seed: getattr(run.metrics, metric) for run in other.runs}
    pairs = [(getattr(run.metrics, metric), others.get(run.seed)) for run in one.runs]
    found = [left - right for left, right in pairs if left is not None and right is not None]
    return estimate(found, within=CHANGE if one.runs[0].share and metric in _SCORES else ANYTHING)


def _stream(name: str, runs: list[Result]) -> StreamSummary:
    for what in ("scenario", "objective", "score"):
        found = sorted({str(getattr(run, what)) for run in runs})
        if len(found) > 1:
            raise StateError(f"the runs of '{name}' differ in their {what} ({quoted(found)}): report them apart.")
    columns = sorted({len(run.experiences) for run in runs})
    if len(columns) > 1:
        raise StateError(f"the runs of '{name}' have different numbers of experiences ({columns}): report them apart.")
    runs, mixed = _told_apart(runs)
    runs = _with_intransigence(runs)
    strategies = [_strategy(group) for group in _by_strategy(runs).values()]
    strategies.sort(key=lambda one: (-_accuracy(one), one.strategy))
    names = {tuple(run.experiences) for run in runs}
    numbered = tuple(str(place + 1) for place in range(columns[0]))
    first = runs[0]
    return StreamSummary(
        stream=name,
        summary=first.stream_summary,
        scenario=first.scenario,
        objective=first.objective,
        score=first.score,
        experiences=names.pop() if len(names) == 1 else numbered,
        strategies=tuple(strategies),
        warnings=(*mixed, *_warnings(runs, strategies)),
    )


def _by_strategy(runs: Iterable[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for run in runs:
        found.setdefault(run.strategy, []).append(run)
    return found


def _told_apart(runs: list[Result]) -> tuple[list[Result], list[str]]:
    """The runs, where they share a strategy's name and were not made alike under names of their own; sentences on that."""
    found, sentences = [], []
    for name, group in _by_strategy(runs).items():
        kinds, keys = variants(group)
        found += [run.model_copy(update={"strategy": label}) for label, alike in kinds.items() for run in alike]
        if keys:
            sentences.append(f"Runs of '{name}' differ in {quoted(keys)}: each kind stands in a row of its own.")
    return found, sentences


def _strategy(runs: list[Result]) -> StrategySummary:
    shapes = sorted({len(run.matrix) for run in runs})
    if len(shapes) > 1:
        raise StateError(
            f"the runs of '{runs[0].stream}' with '{runs[0].strategy}' have different numbers of updates ({shapes}): "
            "finish all of them or report them apart."
        )
    metrics: dict[str, Estimate | None] = {}
    for name in METRICS:
        values = [value for run in runs if (value := getattr(run.metrics, name)) is not None]
        rows = runs[0].intervals.get(name) if len(runs) == 1 else None
        metrics[name] = estimate(values, rows, limits(name, runs[0].share))
    shape = (len(runs), len(runs[0].matrix), len(runs[0].experiences))
    matrices_GUS = np.array([run.matrix for run in runs], dtype=np.float64).reshape(shape)
    return StrategySummary(
        stream=runs[0].stream,
        strategy=runs[0].strategy,
        summary=runs[0].strategy_summary,
        source=runs[0].source or "",
        runs=tuple(runs),
        metrics=metrics,
        matrix=tuple(tuple(_mean(column) for column in row) for row in matrices_GUS.transpose(1, 2, 0).tolist()),
        curve=() if runs[0].joint else _curve(matrices_GUS, limits("accuracy", runs[0].share)),
        cost={name: _mean([getattr(run.cost, name) for run in runs]) for name in COSTS},
        state_bytes=_part_bytes(runs),
        notes=tuple(dict.fromkeys(note for run in runs for note in run.notes)),
        probes=_probes(runs),
    )


def _curve(matrices_GUS: NDArray[np.float64], within: tuple[float, float]) -> tuple[Estimate | None, ...]:
    """Mean over the experiences met after each update; with one seed no interval, since only the last row has one."""
    points = []
    for update in range(matrices_GUS.shape[1]):
        means_G = matrices_GUS[:, update, : update + 1].mean(1)
        points.append(None if np.isnan(means_G).any() else estimate(means_G.tolist(), within=within))
    return tuple(points)


def _part_bytes(runs: list[Result]) -> dict[str, float]:
    parts = sorted({part for run in runs for part in run.cost.state_bytes})
    return {part: sum(run.cost.state_bytes.get(part, 0) for run in runs) / len(runs) for part in parts}


def _probes(runs: list[Result]) -> dict[str, tuple[float | None, float | None]]:
    scores: dict[str, list[list[float | None]]] = {}
    for run in runs:
        for name, probe in run.probes.items():
            scores.setdefault(name, []).append(probe.scores or [None])
    return {
        name: (_mean([s[0] for s in found]), _mean([s[-1] for s in found])) for name, found in sorted(scores.items())
    }


def _mean(values: Iterable[float | None]) -> float | None:
    measured = [value for value in values if value is not None and not math.isnan(value)]
    return float(np.mean(measured)) if measured else None


def _with_intransigence(runs: list[Result]) -> list[Result]:
    """The runs with their intransigence, where a joint run of the same seed is among them; of the best joint strategy."""
    joint: dict[str, dict[int, Result]] = {}
    for run in runs:
        if run.joint and run.metrics.accuracy is not None:
            joint.setdefault(run.strategy, {})[run.seed] = run
    if not joint:
        return runs
    best = max(
        joint.values(), key=lambda found: float(np.mean([run.metrics.accuracy or 0.0 for run in found.values()]))
    )

    def measured(run: Result) -> Result:
        if run.joint or not run.matrix or run.seed not in best or run.metrics.intransigence is not None:
            return run
        R, reference = _floats(run.matrix), _floats(best[run.seed].matrix)[-1]
        value = defined(intransigence(R, reference))
        return run.model_copy(update={"metrics": run.metrics.model_copy(update={"intransigence": value})})

    return [measured(run) for run in runs]


def _floats(matrix: Sequence[Sequence[float | None]]) -> NDArray[np.float64]:
    return np.array([[np.nan if cell is None else cell for cell in row] for row in matrix], dtype=np.float64)


def _accuracy(summary: StrategySummary) -> float:
    found = summary.metrics["accuracy"]
    return found.mean if found else -math.inf


def _fixed(runs: list[Result], prints: dict[int, set[str]]) -> bool:
    """Whether every seed has the same split: the runs say so, or two seeds had the same rows and none says otherwise."""
    said = {run.provenance.stream_per_seed for run in runs}
    known = [found for seed in prints for found in prints[seed]]
    return True not in said and (False in said or len(known) > len(set(known)))


def _warnings(runs: list[Result], strategies: list[StrategySummary]) -> list[str]:
    sentences = []
    prints: dict[int, set[str]] = {}
    for run in runs:
        if run.provenance.stream_fingerprint:
            prints.setdefault(run.seed, set()).add(run.provenance.stream_fingerprint)
    if mixed := [seed for seed, found in sorted(prints.items()) if len(found) > 1]:
        sentences.append(
            f"Runs of the same seed ({', '.join(map(str, mixed))}) were made on different data (their stream "
            "fingerprints differ): their figures cannot be compared."
        )
    elif _fixed(runs, prints) and len({one for found in prints.values() for one in found}) > 1:
        sentences.append(
            "Runs were made on different data (their stream fingerprints differ, and the split does not depend on the "
            "seed): their figures cannot be compared."
        )
    if len({strategy.seeds for strategy in strategies}) > 1:
        counts = ", ".join(f"{one.strategy}: {' '.join(map(str, one.seeds))}" for one in strategies)
        sentences.append(f"The strategies were not run with the same seeds ({counts}).")
    return sentences
