"""Has an earlier experience dropped by more than it may? A paired test per test set, with three answers.

For 0/1 scores: Tango's score interval and test for the difference of paired proportions (Tango 1998, Statistics in
Medicine 17:891-908, eq. 3-5; at a margin of 0 it is McNemar's test), and where it is the more careful one, the exact binomial
interval and test of the net loss, as if no row had been won: with few rows Tango's alone passes at 53 rows without a change, where a
true drop of 5 points leaves all of them right in 6.6 % of cases, and not in 5. Computed over all tables of 53 to 200 rows and many
shares of rows won, both together pass wrongly in at most 5.2 % of cases (Tango's alone 6.8) and raise a false alarm in at most
6.4 % (8.9). For other scores: the paired t interval and test.
For several test sets the alarms are corrected by Holm's method (Holm 1979), so that one false alarm in the whole family
has at most the probability ``level``. A pass needs no correction: all sets must pass, and each does so at ``level``
(the intersection-union test, Berger 1982).

Letters: N rows of a test set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import bdtrc, betaincinv, ndtr, ndtri, stdtr, stdtrit

from continual.monitor.metrics import defined

Answer = Literal["pass", "fail", "cannot tell"]
POWER = 0.8
"""The chance to see a difference of the size measured that ``rows_needed`` stands for."""


@dataclass(frozen=True)
class Verdict:
    """What the gate says about one test set.

    Attributes:
        name: of the test set.
        verdict: ``fail``: the drop is significantly more than the margin, or scores that were finite no longer are;
            ``pass``: the drop is significantly less; otherwise ``cannot tell``.
        drop: mean score before minus mean score after; None where it is no number.
        low, high: the two-sided interval of the drop at confidence 1 - 2 * level; None where it cannot be computed.
        margin: the drop that is allowed.
        p_value: one-sided, of "the drop is at most the margin", corrected for the number of test sets.
        rows: how many rows were compared.
        rows_needed: where the verdict is ``cannot tell``, the rows at which a drop as large as the one measured would
            be told from the margin with 80 % power; None where none would do (the drop equals the margin) or where no
            spread was measured.
    """

    name: str
    verdict: Answer
    drop: float | None
    low: float | None
    high: float | None
    margin: float
    p_value: float
    rows: int
    rows_needed: int | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def paired_drop(
    before_N: ArrayLike, after_N: ArrayLike, margin: float = 0.0, level: float = 0.05, name: str = ""
) -> Verdict:
    """Did the scores of these rows drop by more than ``margin``?

    Args:
        before_N, after_N: scores of the same rows in the same order, higher is better, (N,).
        margin: the drop that is allowed, in the unit of the scores.
        level: one-sided error of each answer, in (0, 0.5).
    """
    compared = _compare(before_N, after_N, margin, level)
    return _verdict(name, compared, margin, compared.p_value, level, level)


def gate(pairs: Mapping[str, tuple[ArrayLike, ArrayLike]], margin: float = 0.0, level: float = 0.05) -> list[Verdict]:
    """A verdict for each test set, the worst first: fails, then those that cannot tell, each by falling drop.

    Args:
        pairs: name → scores before and after of the same rows, each (N,).
        margin: the drop that is allowed, in the unit of the scores.
        level: the chance of any false alarm among all test sets, and of each single false pass.

    The first verdict is that of the whole: it is ``pass`` only when every test set passes.
    """
    compared = {name: _compare(before, after, margin, level) for name, (before, after) in pairs.items()}
    corrected = holm(np.array([one.p_value for one in compared.values()], dtype=np.float64))
    verdicts = [
        _verdict(name, one, margin, float(p_value), level, level / len(compared))
        for (name, one), p_value in zip(compared.items(), corrected, strict=True)
    ]
    order: dict[Answer, int] = {"fail": 0, "cannot tell": 1, "pass": 2}
    return sorted(verdicts, key=lambda verdict: (order[verdict.verdict], -(verdict.drop or 0.0)))


def drop_interval(before_N: ArrayLike, after_N: ArrayLike, level: float) -> tuple[float, float]:
    """The two-sided interval of the mean drop at confidence 1 - 2 * level; NaN where it cannot be computed."""
    before, after = np.asarray(before_N, dtype=np.float64), np.asarray(after_N, dtype=np.float64)
    drop_N = before - after
    if len(drop_N) == 0:
        return math.nan, math.nan
    if is_binary(before) and is_binary(after):
        return paired_interval(int((drop_N > 0).sum()), int((drop_N < 0).sum()), len(drop_N), level)
    if len(drop_N) == 1:
        return math.nan, math.nan
    half = float(stdtrit(len(drop_N) - 1, 1 - level) * drop_N.std(ddof=1) / math.sqrt(len(drop_N)))
    return float(drop_N.mean()) - half, float(drop_N.mean()) + half


@lru_cache(4096)  # many test sets of one size that hardly change
def paired_interval(lost: int, won: int, rows: int, level: float) -> tuple[float, float]:
    """The interval of (lost - won) / rows by which the gate passes: the wider of Tango's and the exact one of the net loss.

    Arguments as of :func:`tango_interval`, at confidence 1 - 2 * level.
    """
    low, high = tango_interval(lost, won, rows, level)
    net_low, net_high = share_interval(abs(lost - won), rows, level)
    if lost == won:
        net_low = -net_high
    elif lost < won:
        net_low, net_high = -net_high, -net_low
    return min(low, net_low), max(high, net_high)


def share_interval(count: int, rows: int, level: float) -> tuple[float, float]:
    """Clopper and Pearson's exact interval of a share (1934, Biometrika 26:404-413), at confidence 1 - 2 * level."""
    low = float(betaincinv(count, rows - count + 1, level)) if count else 0.0
    high = float(betaincinv(count + 1, rows - count, 1 - level)) if count < rows else 1.0
    return low, high


def tango_interval(lost: int, won: int, rows: int, level: float) -> tuple[float, float]:
    """Tango's score interval of (lost - won) / rows, at confidence 1 - 2 * level.

    Args:
        lost: rows that were right and are wrong now.
        won: rows that were wrong and are right now.
        rows: all rows, at least 1.
    """
    z = float(ndtri(1 - level))
    drop = (lost - won) / rows

    def edge(sign: float, end: float) -> float:
        def distance(delta: float) -> float:
            return sign * _tango(lost, won, rows, delta) - z

        return end if distance(end) <= 0 else float(brentq(distance, drop, end, xtol=1e-9))

    return edge(1.0, -1.0), edge(-1.0, 1.0)


def holm(p_values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Holm's corrected p-values, in the order given."""
    order = np.argsort(p_values, kind="stable")
    scaled = p_values[order] * np.arange(len(p_values), 0, -1)
    corrected = np.empty_like(p_values)
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return corrected


def is_binary(scores_N: NDArray[np.float64]) -> bool:
    """Whether all scores are 0 or 1."""
    return bool(((scores_N == 0) | (scores_N == 1)).all())


@dataclass(frozen=True)
class _Comparison:
    drop: float
    low: float
    high: float
    p_value: float
    variance: float
    rows: int


def _compare(before_N: ArrayLike, after_N: ArrayLike, margin: float, level: float) -> _Comparison:
    before, after = np.asarray(before_N, dtype=np.float64), np.asarray(after_N, dtype=np.float64)
    assert before.shape == after.shape and before.ndim == 1, f"paired scores differ: {before.shape}, {after.shape}"
    assert 0 < level < 0.5, f"a one-sided level lies between 0 and 0.5, not {level}"
    count, drop_N = len(before), before - after
    if count == 0:
        return _Comparison(math.nan, math.nan, math.nan, 1.0, math.nan, 0)
    if not np.isfinite(drop_N).all():
        broken = bool(np.isfinite(before).all())
        return _Comparison(math.nan, math.nan, math.nan, 0.0 if broken else 1.0, math.nan, count)
    low, high = drop_interval(before, after, level)
    if is_binary(before) and is_binary(after):
        lost, won = int((drop_N > 0).sum()), int((drop_N < 0).sum())
        p_value = float(ndtr(-_tango(lost, won, count, margin)))
        if 0 < margin < 1 and lost - won > count * margin:
            p_value = max(p_value, float(bdtrc(lost - won - 1, count, margin)))
        variance = (lost + won + 1) / (count + 2)  # never 0: rows that have not changed yet still may
    else:
        p_value = _t_p_value(drop_N, margin)
        variance = float(drop_N.var(ddof=1)) if count > 1 else math.nan
    return _Comparison(float(drop_N.mean()), low, high, p_value, variance, count)


def _verdict(
    name: str, compared: _Comparison, margin: float, p_value: float, level: float, alarm_level: float
) -> Verdict:
    answer: Answer = "fail" if p_value < level else "pass" if compared.high < margin else "cannot tell"
    needed = None
    distance = compared.drop - margin
    if answer == "cannot tell" and distance != 0 and compared.variance > 0:
        z = float(ndtri(1 - (alarm_level if distance > 0 else level)) + ndtri(POWER))
        needed = max(math.ceil(z * z * compared.variance / distance**2), compared.rows + 1)
    low, high = defined(compared.low), defined(compared.high)
    return Verdict(name, answer, defined(compared.drop), low, high, margin, p_value, compared.rows, needed)


def _tango(lost: int, won: int, rows: int, delta: float) -> float:
    """Tango's statistic for a true drop of ``delta``: standard normal when that is the truth, large when it is more."""
    distance = lost - won - rows * delta
    first = 2.0 * rows
    second = -lost - won + (2.0 * rows - lost + won) * delta
    third = -won * delta * (1.0 - delta)
    won_share = (math.sqrt(max(second * second - 4.0 * first * third, 0.0)) - second) / (2.0 * first)
    variance = rows * (2.0 * won_share + delta * (1.0 - delta))
    if variance <= 1e-12:
        return 0.0 if abs(distance) < 1e-9 else math.copysign(1e9, distance)
    return distance / math.sqrt(variance)


def _t_p_value(drop_N: NDArray[np.float64], margin: float) -> float:
    count = len(drop_N)
    if count < 2:
        return 1.0
    distance = float(drop_N.mean()) - margin
    spread = float(drop_N.std(ddof=1)) / math.sqrt(count)
    if spread == 0:
        return 0.0 if distance > 0 else 1.0
    return float(stdtr(count - 1, -distance / spread))
