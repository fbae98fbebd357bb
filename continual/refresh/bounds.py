"""Is a mean score, or a share of rows, within what a rule allows? Exact tests with three answers.

For 0/1 scores: the exact binomial test and Clopper and Pearson's interval (1934, Biometrika 26:404-413). For other scores:
Student's t. For several test sets the alarms are corrected by Holm's method and a pass is not, as in
:mod:`continual.monitor.gate`. Rows of several experiences may be counted together: with a different chance in each, their sum
has shorter tails than a binomial count of the same mean (Hoeffding 1956, Annals of Mathematical Statistics 27:713-721), so
that the answer errs on the safe side.

Letters: N rows of a test set.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri, stdtr, stdtrit
from scipy.stats import binomtest

from continual.kinds import Objective
from continual.monitor.gate import POWER, Answer, holm, is_binary, paired_interval, share_interval
from continual.monitor.metrics import Floats, defined
from continual.refresh.records import Check
from continual.refresh.rules import GateRules


def hold_to(
    rule: str, scores: Mapping[str, ArrayLike | None], limit: float, level: float, *, least: bool
) -> list[Check]:
    """One check for each test set, in the order given.

    Args:
        rule: that the checks are of.
        scores: name → score of each row (N,), or None where it was not measured, which cannot tell.
        limit: least or largest mean that is allowed.
        level: one-sided error, in (0, 0.5): the chance of any false alarm among all test sets, and of each false pass.
        least: the limit is a floor; otherwise a ceiling.

    ``fail``: the mean is significantly beyond the limit, or some score is not finite; ``pass``: significantly within, or the
    limit is one that no share of rows can break (a floor of 0); else ``cannot tell``. The interval has confidence
    1 - 2 * level, so that each end is a bound at 1 - level.
    """
    compared = {name: _compare(given, limit, level, least) for name, given in scores.items() if given is not None}
    p_values = holm(np.array([one.p_value for one in compared.values()], dtype=np.float64))
    corrected = dict(zip(compared, p_values, strict=True))
    return [
        _check(rule, name, compared[name], limit, float(corrected[name]), level, len(compared), least)
        if name in compared
        else Check(rule=rule, name=name, answer="cannot tell", value=None, limit=limit)
        for name in scores
    ]


def rows_to_pass(rules: GateRules, objective: Objective, *, lost: int) -> int:
    """Rows of a test set with which the gate still passes where so many were right, are wrong now, and nothing else has changed.

    0 where no number does (``max_drop`` 0) or none is needed (scores that are not right or wrong).
    """
    if objective != "classification" or not 0 < rules.max_drop < 1:
        return 0

    def passes(rows: int) -> bool:
        return paired_interval(lost, 0, rows, 1 - rules.confidence)[1] < rules.max_drop

    most = lost + 1
    while not passes(most):
        most *= 2
    return bisect_left(range(most + 1), True, lo=lost + 1, key=passes)


def mean_interval(score_N: ArrayLike, level: float) -> tuple[float | None, float | None]:
    """The interval of a mean at confidence 1 - 2 * level, as :func:`hold_to` computes it; None where it has none."""
    scores: Floats = np.asarray(score_N, dtype=np.float64)
    if len(scores) and is_binary(scores):
        return share_interval(int(scores.sum()), len(scores), level)
    found = _compare(scores, 0.0, level, least=True)
    return defined(found.low), defined(found.high)


@dataclass(frozen=True)
class _Mean:
    """A mean with its interval, the chance of one so bad at the limit, and what a row varies by at the limit and as measured."""

    value: float
    low: float
    high: float
    p_value: float
    variances: tuple[float, float]
    rows: int
    binary: bool
    safe: bool = False


def _compare(given: ArrayLike, limit: float, level: float, least: bool) -> _Mean:
    score_N: Floats = np.asarray(given, dtype=np.float64)
    rows, nan = len(score_N), math.nan
    if rows == 0:
        return _Mean(nan, nan, nan, 1.0, (nan, nan), 0, False)
    if not np.isfinite(score_N).all():
        return _Mean(nan, nan, nan, 0.0, (nan, nan), rows, False)
    if is_binary(score_N):
        return _share(int(score_N.sum()), rows, limit, level, least)
    mean = float(score_N.mean())
    if rows == 1:
        return _Mean(mean, nan, nan, 1.0, (nan, nan), rows, False)
    error, distance = float(score_N.std(ddof=1)) / math.sqrt(rows), (limit - mean) if least else (mean - limit)
    half = float(stdtrit(rows - 1, 1 - level)) * error
    p_value = float(stdtr(rows - 1, -distance / error)) if error else 0.0 if distance > 0 else 1.0
    return _Mean(mean, mean - half, mean + half, p_value, (error**2 * rows,) * 2, rows, False)


def _share(count: int, rows: int, limit: float, level: float, least: bool) -> _Mean:
    low, high = share_interval(count, rows, level)
    measured = (count + 1) / (rows + 2)  # never 0 or 1: rows that were all right so far need not stay so
    possible = min(max(limit, 0.0), 1.0)
    safe = limit <= 0 if least else limit >= 1
    if limit == possible:
        p_value = float(binomtest(count, rows, possible, alternative="less" if least else "greater").pvalue)
    else:
        p_value = 1.0 if safe else 0.0
    variances = (possible * (1 - possible), measured * (1 - measured))
    return _Mean(count / rows, low, high, p_value, variances, rows, True, safe)


def _check(
    rule: str, name: str, mean: _Mean, limit: float, p_value: float, level: float, family: int, least: bool
) -> Check:
    within = mean.safe or (mean.low > limit if least else mean.high < limit)
    answer: Answer = "fail" if p_value < level else "pass" if within else "cannot tell"
    needed = None
    distance = abs(mean.value - limit)
    if answer == "cannot tell" and distance > 0 and mean.variances[1] > 0:
        beyond = (mean.value < limit) == least
        needed = max(_rows_needed(mean, distance, level / family if beyond else level), mean.rows + 1)
    value, low, high = defined(mean.value), defined(mean.low), defined(mean.high)
    return Check(
        rule=rule,
        name=name,
        answer=answer,
        value=value,
        low=low,
        high=high,
        limit=limit,
        p_value=p_value,
        rows=mean.rows,
        rows_needed=needed,
    )


def _rows_needed(mean: _Mean, distance: float, level: float) -> int:
    """Rows at which a mean as measured is told from the limit with 80 % power.

    By the normal approximation; for shares the distance is taken half a row shorter, which is what an exact test costs:
    ``distance * rows - 1/2 = z * sqrt(rows)``, solved for the rows.
    """
    null, alternative = mean.variances
    rows: float = ((ndtri(1 - level) * math.sqrt(null) + ndtri(POWER) * math.sqrt(alternative)) / distance) ** 2
    if mean.binary:
        rows = rows / 4 * (1 + math.sqrt(1 + 2 / (rows * distance))) ** 2
    return math.ceil(rows)
