"""Sample sizes against the published figures, the bias of forgetting against a row-wise simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from continual.monitor.gate import paired_drop
from continual.monitor.statistics import (
    bias_of_forgetting,
    rows_needed,
    seed_interval,
    smallest_detectable_drop,
    symmetric_churn,
)


@pytest.mark.parametrize(("drop", "paired", "unpaired"), [(0.02, 925, 2863), (0.01, 3089, 11294), (0.05, 220, 476)])
def test_rows_needed_are_those_of_the_protocol(drop: float, paired: int, unpaired: int) -> None:
    assert rows_needed(drop) == paired
    # 11 293 with exact normal quantiles; the published figure has them rounded to three digits
    assert rows_needed(drop, paired=False) == pytest.approx(unpaired, abs=1)


def test_every_argument_of_rows_needed_counts() -> None:
    base = rows_needed(0.02)
    assert rows_needed(0.02, churn=0.04) > base
    assert rows_needed(0.02, power=0.9) > base
    assert rows_needed(0.02, level=0.01) > base
    assert rows_needed(0.02, accuracy=0.7, paired=False) > rows_needed(0.02, paired=False)


def test_rows_needed_give_the_power_they_promise() -> None:
    generator = np.random.default_rng(0)
    drop, churn, rows = 0.05, 0.02, rows_needed(0.05)
    found = 0
    for _ in range(1000):
        lost, won, _same = generator.multinomial(rows, [churn + drop, churn, 1 - 2 * churn - drop])
        before, after = np.zeros(rows), np.zeros(rows)
        before[:lost], after[lost : lost + won] = 1, 1
        found += paired_drop(before, after).verdict == "fail"
    assert found / 1000 == pytest.approx(0.8, abs=0.05)


def test_smallest_detectable_drop_is_the_inverse_of_rows_needed() -> None:
    assert smallest_detectable_drop(np.ones(925)) == pytest.approx(0.02, rel=2e-3)
    before = np.ones(1000)
    before[:30] = 0
    after = before.copy()
    after[:10], after[-30:] = 1, 0
    assert symmetric_churn(before, after) == pytest.approx(0.01)
    smallest = smallest_detectable_drop(before, after)
    assert smallest is not None and rows_needed(smallest, churn=0.01) == pytest.approx(1000, abs=1)
    assert smallest_detectable_drop(np.ones(2)) == 1.0
    assert smallest_detectable_drop(np.ones(0)) is None


def test_smallest_detectable_drop_of_other_scores_comes_from_the_differences() -> None:
    generator = np.random.default_rng(0)
    before = generator.normal(size=400)
    after = before + generator.normal(size=400) * 0.5
    spread = np.std(before - after, ddof=1)
    expected = (stats.norm.ppf(0.95) + stats.norm.ppf(0.8)) * spread / 20
    assert smallest_detectable_drop(before, after) == pytest.approx(expected)
    assert smallest_detectable_drop(before) is None


@pytest.mark.parametrize(("experiences", "points"), [(5, 4.1), (15, 6.6)])
def test_bias_of_forgetting_is_that_of_the_protocol(experiences: int, points: float) -> None:
    assert 100 * bias_of_forgetting(experiences, 100, accuracy=0.8) == pytest.approx(points, abs=0.15)


@pytest.mark.parametrize("churn", [None, 0.02])
@pytest.mark.parametrize("whole", [True, False])
def test_bias_of_forgetting_equals_a_simulation_of_rows(churn: float | None, whole: bool) -> None:
    generator, accuracy, rows, experiences = np.random.default_rng(1), 0.9, 100, 4
    lose = (1 - accuracy) if churn is None else churn / accuracy
    win = accuracy if churn is None else churn / (1 - accuracy)
    readings = []
    for _ in range(400):
        right = generator.random((experiences - 1, rows)) < accuracy
        R = []
        for _update in range(experiences):
            R.append(right.mean(1))
            draw = generator.random(right.shape)
            right = np.where(right, draw >= lose, draw < win)
        for j in range(experiences - 1):
            start = 0 if whole else j
            readings.append(max(R[i][j] for i in range(start, experiences - 1)) - R[-1][j])
    found = bias_of_forgetting(experiences, rows, accuracy, churn, whole)
    error = np.std(readings) / math.sqrt(len(readings))
    assert found == pytest.approx(np.mean(readings), abs=4 * error)


def test_no_bias_without_an_earlier_maximum() -> None:
    assert bias_of_forgetting(1, 100) == 0.0
    assert bias_of_forgetting(2, 100) == pytest.approx(0.0, abs=0.003)


def test_seed_interval_is_students() -> None:
    values = [0.9, 0.92, 0.87]
    low, high = stats.t.interval(0.9, 2, np.mean(values), stats.sem(values))
    assert seed_interval([*values, None, math.nan], 0.9) == pytest.approx((np.mean(values), low, high))
    assert seed_interval([0.5]) == (0.5, None, None)
    assert seed_interval([None]) == (None, None, None)
