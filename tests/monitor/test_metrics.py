"""Metrics against plain loops, with gaps, with leading dimensions, and where they are not defined."""

from __future__ import annotations

import math

import numpy as np
import pytest

from continual.kinds import Objective
from continual.monitor import metrics as M

NAN = math.nan


def mean(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else NAN


def slow(R: np.ndarray, initial: np.ndarray, objective: str = "classification") -> dict[str, float]:
    U, S = R.shape
    last = U - 1
    earlier = range(min(last, S))
    peaks = {j: [R[i, j] for i in range(last) if not math.isnan(R[i, j])] for j in earlier}
    ratios = []
    for j in earlier:
        then, now = R[j, j], R[last, j]
        if objective == "classification":
            ratios.append(now / then if then else NAN)
        elif objective == "regression":
            ratios.append(then / now if now else NAN)
        else:
            ratios.append(math.exp(now - then))
    return {
        "accuracy": mean([R[last, j] for j in range(min(U, S))]),
        "learning_accuracy": mean([R[j, j] for j in range(min(U, S))]),
        "bwt": mean([R[last, j] - R[j, j] for j in earlier]),
        "forgetting": mean([max(peaks[j]) - R[last, j] for j in earlier if peaks[j]]),
        "fwt": mean([R[j - 1, j] - initial[j] for j in range(1, min(U + 1, S))]),
        "retention": mean(ratios),
    }


@pytest.mark.parametrize("objective", ["classification", "regression", "causal-lm", "seq2seq"])
@pytest.mark.parametrize("shape", [(2, 2), (5, 5), (7, 4), (3, 6)])
@pytest.mark.parametrize("gaps", [False, True])
def test_metrics_equal_plain_loops(shape: tuple[int, int], gaps: bool, objective: Objective) -> None:
    generator = np.random.default_rng(shape[0] * 10 + gaps)
    R, initial = generator.random((4, 3, *shape)), generator.random((4, 3, shape[1]))
    if objective != "classification":
        R, initial = -R, -initial
    if gaps:
        R[generator.random(R.shape) < 0.3] = NAN
    found = M.metric_arrays(R, initial, objective)
    for place in np.ndindex(4, 3):
        expected = slow(R[place], initial[place], objective)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name][place], value, rtol=1e-12, err_msg=name)


def test_known_values() -> None:
    R = np.array([[0.9, NAN, NAN], [0.6, 0.8, NAN], [0.7, 0.4, 1.0]])
    table = M.metric_table(R)
    assert table == pytest.approx(
        {
            "accuracy": 0.7,
            "learning_accuracy": 0.9,
            "bwt": (-0.2 - 0.4) / 2,
            "forgetting": (0.2 + 0.4) / 2,
            "fwt": None,
            "retention": (0.7 / 0.9 + 0.5) / 2,
        }
    )


def test_forgetting_counts_rows_from_before_an_experience_was_learnt() -> None:
    R = np.array([[0.5, 0.9, 0.1], [0.5, 0.8, 0.1], [0.5, 0.7, 0.1]])
    assert M.forgetting(R) == pytest.approx((0.0 + 0.2) / 2)


def test_one_row_with_many_columns_has_an_accuracy_only() -> None:
    table = M.metric_table(np.array([[0.9, 0.8, 0.7]]), [0.1, 0.1, 0.1])
    assert table.pop("accuracy") == pytest.approx(0.8)
    assert set(table.values()) == {None}


def test_first_update_has_nothing_to_compare() -> None:
    table = M.metric_table(np.array([[0.9]]))
    assert table["accuracy"] == table["learning_accuracy"] == 0.9
    assert [table[name] for name in ("bwt", "forgetting", "fwt", "retention")] == [None] * 4


def test_score_of_zero_when_learnt_has_no_retention() -> None:
    assert M.metric_table(np.array([[0.0, NAN], [0.5, 0.5]]))["retention"] is None
    assert M.retention(np.array([[-2.0, NAN], [-4.0, -1.0]]), "regression") == pytest.approx(0.5)
    assert M.retention(np.array([[-2.0, NAN], [-2.5, -1.0]]), "causal-lm") == pytest.approx(math.exp(-0.5))


def test_intransigence_is_what_the_joint_model_had_more() -> None:
    R = np.array([[0.9, NAN], [0.6, 0.7]])
    assert M.intransigence(R, [0.95, 0.85]) == pytest.approx((0.05 + 0.15) / 2)
    assert np.isnan(M.intransigence(np.array([[0.9, 0.8]]), [0.9, 0.9]))


def test_negative_flips_count_right_then_wrong() -> None:
    then = [np.array([1, 1, 0, 1.0]), np.array([1, 0.0]), np.array([])]
    now = [np.array([0, 1, 1, 0.0]), np.array([1, 1.0]), np.array([])]
    assert M.negative_flips(then, now) == pytest.approx((0.5 + 0.0) / 2)
    assert M.negative_flips([], []) is None
