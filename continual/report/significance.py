"""Which strategies are told apart by their runs: every pair on a stream, over seeds and over test rows.

**Over seeds** each shared seed is one observation of the difference of final scores, so it speaks of other seeds: the paired
t test, and Wilcoxon's signed-rank test (exact, also with ties; equal pairs are left out).

**Over rows** the seeds are taken as they are, so it speaks of other test rows: McNemar's test for rows that several seeds
score, each row one cluster (Durkalski et al. 2003, Statistics in Medicine 22:2417-2428, whose statistic is

    z = Σ_n d_n / √(Σ_n d_n²),    d_n = Σ_seeds Σ_experiences w (score of one − score of the other),

with w one over seeds × experiences × rows of the experience, so that Σ d_n is the difference of the final scores; with one seed and
experiences of equal size it is McNemar's z). Its sign-flip distribution is taken exactly where few rows differ.

All p-values are two-sided, and corrected by Holm's method (Holm 1979) over all pairs of the stream that can be tested, each test
by itself.
What cannot be tested says how many seeds it would need: the t test :data:`MIN_SEEDS`, Wilcoxon's so many that its smallest
p-value, 2/2^n, passes Holm's correction.

Letters: C cells (a row under a seed), F sign flips, G shared seeds, N rows.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, stdtr, stdtrit
from scipy.stats import rankdata

from continual.monitor.gate import holm
from continual.report.aggregate import StrategySummary, StreamSummary
from continual.report.findings import best_of
from continual.report.rows import FinalScores, final_scores

LEVEL = 0.05
MIN_SEEDS = 3
"""Seeds for a t test: with two, one degree of freedom tells nothing apart."""
FEW = 12
"""Rows that differ, up to which all sign flips are counted."""
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """Two strategies on one stream: ``one`` minus ``other``; what cannot be had is None.

    Attributes:
        seeds: shared by both.
        difference: of the final scores, the mean over shared seeds.
        low, high: its 95 % interval over seeds, Student's t.
        t_p, t_holm, wilcoxon_p, wilcoxon_holm: p-values over seeds, as they are and corrected.
        t_seeds_needed, wilcoxon_seeds_needed: where there are too few, how many it takes; else None.
        rows: distinct test rows compared; 0 where the runs left no scores of the same rows.
        rows_low, rows_high: the 95 % interval over rows.
        rows_p, rows_holm: p-values over rows.
    """

    stream: str
    one: str
    other: str
    seeds: int
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    t_p: float | None = None
    t_holm: float | None = None
    t_seeds_needed: int | None = None
    wilcoxon_p: float | None = None
    wilcoxon_holm: float | None = None
    wilcoxon_seeds_needed: int | None = None
    rows: int = 0
    rows_low: float | None = None
    rows_high: float | None = None
    rows_p: float | None = None
    rows_holm: float | None = None

    @property
    def verdict(self) -> str:
        """``different``, ``not told apart`` or ``not testable``, over seeds; over rows where there are too few seeds."""
        p_value = self.t_holm if self.t_holm is not None else self.rows_holm
        if p_value is None:
            return "not testable"
        return "different" if p_value <= LEVEL else "not told apart"

    @property
    def over(self) -> str | None:
        """What the verdict speaks of: other ``seeds``, or other ``rows`` for these seeds."""
        return "seeds" if self.t_holm is not None else "rows" if self.rows_holm is not None else None


def compare(stream: StreamSummary) -> list[Comparison]:
    """Every pair of strategies, the better one first; p-values are corrected over all of them."""
    scored = [one for one in stream.strategies if one.metrics["accuracy"]]
    pairs = list(combinations(scored, 2))
    rows = _Rows(scored)
    found = [_over_seeds(stream.stream, one, other, len(pairs)) | rows.test(one, other) for one, other in pairs]
    for name in ("t", "wilcoxon", "rows"):
        known = [place for place, one in enumerate(found) if one[f"{name}_p"] is not None]
        raw = np.array([found[place][f"{name}_p"] for place in known], dtype=np.float64)
        for place, corrected in zip(known, holm(raw).tolist(), strict=True):
            found[place][f"{name}_holm"] = corrected
    return [Comparison(**one) for one in found]


def with_best(stream: StreamSummary, comparisons: Sequence[Comparison]) -> dict[str, Comparison]:
    """Strategy → its comparison with the best one that is not a bound."""
    best = best_of(stream)
    if best is None:
        return {}
    mine = [one for one in comparisons if best.strategy in (one.one, one.other)]
    return {one.other if one.one == best.strategy else one.one: one for one in mine}


def csv_significance(streams: Sequence[StreamSummary]) -> str:
    """One line for each pair of strategies on each stream, nothing rounded."""
    names = [field.name for field in fields(Comparison)]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*names, "verdict", "verdict_over"])
    for stream in streams:
        for one in compare(stream):
            writer.writerow([*(getattr(one, name) for name in names), one.verdict, one.over])
    return buffer.getvalue()


def seeds_needed(pairs: int) -> int:
    """Seeds with which Wilcoxon's test can find a difference at all, when the best of ``pairs`` p-values is corrected."""
    return math.ceil(math.log2(2 * max(pairs, 1) / LEVEL))


def paired_t(difference_G: Floats) -> float | None:
    """Two-sided p-value of the paired t test; None with fewer than :data:`MIN_SEEDS`, or differences that are one number."""
    count = len(difference_G)
    if count < MIN_SEEDS or not np.isfinite(difference_G).all():
        return None
    if not difference_G.any():
        return 1.0
    deviation = float(difference_G.std(ddof=1))
    if deviation < 1e-12:
        return None
    return float(2 * stdtr(count - 1, -abs(float(difference_G.mean())) * math.sqrt(count) / deviation))


def signed_rank(difference_G: Floats) -> float | None:
    """Two-sided p-value of Wilcoxon's signed-rank test, exact with midranks; None where all pairs are equal."""
    apart_G = difference_G[difference_G != 0]
    if not len(apart_G):
        return None
    twice_G = np.rint(2 * rankdata(np.abs(apart_G))).astype(np.int64)
    ways = np.zeros(int(twice_G.sum()) + 1)
    ways[0] = 1.0
    for rank in twice_G.tolist():
        ways[rank:] = (ways[rank:] + ways[: len(ways) - rank]) / 2
        ways[:rank] /= 2
    smaller = min(int(twice_G[apart_G > 0].sum()), int(twice_G[apart_G < 0].sum()))
    return float(min(1.0, 2 * ways[: smaller + 1].sum()))


def clustered_mcnemar(difference_N: Floats) -> float:
    """Two-sided p-value of Σ d = 0 where every d might as well have had the other sign."""
    apart_n = difference_N[difference_N != 0]
    if not len(apart_n):
        return 1.0
    total = abs(float(apart_n.sum()))
    if len(apart_n) > FEW:
        return float(2 * ndtr(-total / math.sqrt(float(np.square(apart_n).sum()))))
    signs_Fn = 1 - 2 * (np.arange(2 ** len(apart_n))[:, None] >> np.arange(len(apart_n)) & 1)
    return float((np.abs(signs_Fn @ apart_n) >= total - 1e-12).mean())


def _over_seeds(stream: str, one: StrategySummary, other: StrategySummary, pairs: int) -> dict[str, Any]:
    others = {run.seed: run.metrics.accuracy for run in other.runs}
    both = [(run.metrics.accuracy, others.get(run.seed)) for run in one.runs]
    difference_G = np.array([a - b for a, b in both if a is not None and b is not None], dtype=np.float64)
    count, needed = len(difference_G), seeds_needed(pairs)
    found: dict[str, Any] = {"stream": stream, "one": one.strategy, "other": other.strategy, "seeds": count}
    found["t_p"] = paired_t(difference_G)
    found["t_seeds_needed"] = MIN_SEEDS if count < MIN_SEEDS else None
    found["wilcoxon_p"] = signed_rank(difference_G) if count >= needed else None
    found["wilcoxon_seeds_needed"] = needed if count < needed else None
    if count:
        found["difference"] = mean = float(difference_G.mean())
        if count > 1:
            half = float(stdtrit(count - 1, 0.975)) * float(difference_G.std(ddof=1)) / math.sqrt(count)
            found["low"], found["high"] = mean - half, mean + half
    return found


class _Rows:
    """The final scores of all runs on a stream, laid side by side: every strategy of a seed has the same cells."""

    def __init__(self, strategies: Sequence[StrategySummary]) -> None:
        self._scores: dict[tuple[str, int], Floats] = {}
        self._cells: dict[int, FinalScores] = {}
        for one in strategies:
            for run in one.runs:
                found = final_scores(run)
                if found is None:
                    continue
                first = self._cells.setdefault(run.seed, found)
                if np.array_equal(first.rows, found.rows) and np.array_equal(first.weights, found.weights):
                    self._scores[one.strategy, run.seed] = found.scores

    def test(self, one: StrategySummary, other: StrategySummary) -> dict[str, Any]:
        """Rows, interval and p-value of a pair; None in them where some shared seed left no scores of the same rows."""
        shared = sorted(set(one.seeds) & set(other.seeds))
        keys = [(name, seed) for seed in shared for name in (one.strategy, other.strategy)]
        nothing: dict[str, Any] = {"rows_p": None}
        if not shared or any(key not in self._scores for key in keys):
            return nothing
        cells = [self._cells[seed] for seed in shared]
        apart = [self._scores[one.strategy, seed] - self._scores[other.strategy, seed] for seed in shared]
        difference_C = np.concatenate([a * c.weights for a, c in zip(apart, cells, strict=True)]) / len(shared)
        if not np.isfinite(difference_C).all():
            return nothing
        _, row_C = np.unique(np.concatenate([cell.rows for cell in cells]), return_inverse=True)
        difference_N = np.bincount(row_C, weights=difference_C).astype(np.float64)
        count, total = len(difference_N), float(difference_N.sum())
        found: dict[str, Any] = {"rows": count, "rows_p": clustered_mcnemar(difference_N)}
        if count > 1:
            half = 1.959964 * float(difference_N.std(ddof=1)) * math.sqrt(count)
            found["rows_low"], found["rows_high"] = total - half, total + half
        return found
