"""How large a test set has to be, what max-based forgetting reads when nothing is forgotten, intervals over seeds.

Churn is the share of rows that go from right to wrong between two updates while as many go from wrong to right: a model
that is trained on changes its mind here and there without getting worse. ``churn=0.02`` is 2 % each way.

Letters: N rows of a test set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri, stdtrit

from continual.monitor.gate import is_binary
from continual.monitor.metrics import defined

CHURN = 0.02
"""Assumed where none was measured."""


class Interval(NamedTuple):
    """A mean and where it lies; the ends are None where they cannot be computed."""

    mean: float | None
    low: float | None
    high: float | None


def rows_needed(
    drop: float,
    accuracy: float = 0.9,
    churn: float = CHURN,
    paired: bool = True,
    power: float = 0.8,
    level: float = 0.05,
) -> int:
    """Rows of a test set with which a true drop of ``drop`` is found.

    Args:
        drop: the drop of the accuracy, in (0, accuracy].
        accuracy: before the drop; it counts only when not paired.
        churn: as above; it counts only when paired.
        paired: whether the same rows are scored before and after (Connor 1987, Biometrics 43:207-211, eq. 3), or two
            independent test sets, each of this size (two proportions, null variance at ``accuracy``).
        power: the chance to find it.
        level: one-sided error.
    """
    assert 0 < drop <= 1, f"a drop lies in (0, 1], not {drop}"
    null, alternative = _paired_variances(drop, churn) if paired else _unpaired_variances(drop, accuracy)
    return round((_z(level) * math.sqrt(null) + _z(1 - power) * math.sqrt(alternative)) ** 2 / drop**2)


def smallest_detectable_drop(
    before_N: ArrayLike, after_N: ArrayLike | None = None, power: float = 0.8, level: float = 0.05
) -> float | None:
    """The smallest true drop that a one-sided paired test on these rows finds with probability ``power``.

    Args:
        before_N: scores of the rows, (N,).
        after_N: scores of the same rows later. For 0/1 scores they tell the churn (the smaller of the shares that
            changed each way); without them it is taken to be 2 % each way. For other scores they tell the spread of the
            differences.

    Returns:
        In the unit of the scores, at most 1 for 0/1 scores; None where there are no rows, or no differences to tell the
        spread of scores that are not 0/1, or scores that are not finite.
    """
    before = np.asarray(before_N, dtype=np.float64)
    after = None if after_N is None else np.asarray(after_N, dtype=np.float64)
    count = len(before)
    if count == 0:
        return None
    if is_binary(before) and (after is None or is_binary(after)):
        return _smallest_share(count, CHURN if after is None else symmetric_churn(before, after), power, level)
    if after is None or count < 2:
        return None
    return defined((_z(level) + _z(1 - power)) * float((before - after).std(ddof=1)) / math.sqrt(count))


def symmetric_churn(before_N: ArrayLike, after_N: ArrayLike) -> float:
    """The smaller of the shares of rows that went from right to wrong and from wrong to right, from 0/1 scores (N,)."""
    change_N = np.asarray(after_N, dtype=np.float64) - np.asarray(before_N, dtype=np.float64)
    return float(min((change_N > 0).mean(), (change_N < 0).mean())) if len(change_N) else 0.0


def bias_of_forgetting(
    experiences: int,
    rows: int,
    accuracy: float = 0.9,
    churn: float | None = None,
    whole: bool = True,
    simulations: int = 2000,
    seed: int = 0,
) -> float:
    """What max-based forgetting reads on average when the true accuracies never change.

    Every row of a test set is right or wrong by a two-state chain whose stationary share of right is ``accuracy``.

    Args:
        experiences: how many there are, each measured after each of as many updates.
        rows: of each test set.
        churn: share of rows that go each way between two updates, at most ``accuracy * (1 - accuracy)``, which is that
            of independent answers and stands for None.
        whole: whether rows of the matrix from before an experience was learnt count (the formula as published, on a
            matrix without gaps) or each test set is measured from then on only.

    With five experiences of 100 rows, independent answers and accuracy .8 it is 4.1 points; with fifteen, 6.6.
    """
    assert 0 < accuracy < 1, f"the accuracy lies between 0 and 1, not {accuracy}"
    spread = accuracy * (1 - accuracy)
    exchange = spread if churn is None else churn
    assert 0 <= exchange <= spread + 1e-12, f"churn is at most {spread:.3g} at accuracy {accuracy}, not {churn}"
    if experiences < 2:
        return 0.0
    generator = np.random.default_rng(seed)
    lose, win = min(exchange / accuracy, 1.0), min(exchange / (1 - accuracy), 1.0)
    right = generator.binomial(rows, accuracy, (simulations, experiences - 1))
    best = np.full(right.shape, -1)
    for update in range(experiences - 1):
        counts = np.array([whole or experience <= update for experience in range(experiences - 1)])
        best = np.where(counts, np.maximum(best, right), best)
        right = right - generator.binomial(right, lose) + generator.binomial(rows - right, win)
    return float((best - right).mean() / rows)


def seed_interval(values: Sequence[float | None], confidence: float = 0.95) -> Interval:
    """Mean over seeds and its Student-t interval; values that are None or not finite are left out.

    Fewer than two values give no interval, none gives no mean.
    """
    known = np.array([value for value in values if value is not None and math.isfinite(value)], dtype=np.float64)
    if len(known) == 0:
        return Interval(None, None, None)
    mean = float(known.mean())
    if len(known) == 1:
        return Interval(mean, None, None)
    half = float(stdtrit(len(known) - 1, 0.5 + confidence / 2)) * float(known.std(ddof=1)) / math.sqrt(len(known))
    return Interval(mean, mean - half, mean + half)


def _smallest_share(count: int, churn: float, power: float, level: float) -> float:
    """Connor's formula solved for the drop by bisection: the rows needed fall as the drop grows."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        null, alternative = _paired_variances(middle, churn)
        needed = (_z(level) * math.sqrt(null) + _z(1 - power) * math.sqrt(alternative)) ** 2 / middle**2
        low, high = (low, middle) if needed <= count else (middle, high)
    return high


def _paired_variances(drop: float, churn: float) -> tuple[float, float]:
    changed = min(2 * churn + drop, 1.0)
    return changed, max(changed - drop**2, 0.0)


def _unpaired_variances(drop: float, accuracy: float) -> tuple[float, float]:
    after = accuracy - drop
    assert 0 <= after <= accuracy <= 1, f"an accuracy of {accuracy} cannot drop by {drop}"
    return 2 * accuracy * (1 - accuracy), accuracy * (1 - accuracy) + after * (1 - after)


def _z(tail: float) -> float:
    return float(ndtri(1 - tail))
