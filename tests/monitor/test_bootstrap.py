"""The bootstrap against a plain loop over resamples and rows."""

from __future__ import annotations

import numpy as np
import pytest

from continual.monitor import bootstrap as B
from continual.monitor.metrics import metric_table


def made(binary: bool, rows: int = 60, seed: int = 0) -> list[B.Measured]:
    generator = np.random.default_rng(seed)
    found = []
    for place in range(3):
        updates = (B.INITIAL, *range(max(place - 1, 0), 3))
        scores = generator.random((len(updates), rows + 10 * place)) + 0.3
        if binary:
            scores = (scores > 0.6).astype(np.float64)
        flips = (scores[1] > 0.5) & (scores[-1] < 0.5)
        found.append(B.Measured(updates, scores.astype(np.float32), flips.astype(np.float64) if place < 2 else None))
    return found


def slow(tests: list[B.Measured], resamples: int, seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    found: dict[str, list[float]] = {}
    for _ in range(resamples):
        R, initial, flips = np.full((3, 3), np.nan), np.full(3, np.nan), []
        for place, test in enumerate(tests):
            rows = generator.choice(test.scores.shape[1], test.scores.shape[1])
            for update, scores in zip(test.updates, test.scores, strict=True):
                if update == B.INITIAL:
                    initial[place] = scores[rows].mean()
                else:
                    R[update, place] = scores[rows].mean()
            if test.flips is not None:
                flips.append(test.flips[rows].mean())
        for name, value in (metric_table(R, initial) | {"negative_flips": float(np.mean(flips))}).items():
            assert value is not None
            found.setdefault(name, []).append(value)
    return {name: np.array(values) for name, values in found.items()}


@pytest.mark.parametrize("binary", [True, False])
def test_intervals_equal_those_of_a_plain_loop(binary: bool) -> None:
    tests = made(binary)
    found = B.bootstrap(tests, 3, "classification", resamples=4000, seed=1)
    expected = slow(tests, 1500, 2)
    assert set(found.metrics) == set(expected)
    for name, (low, high) in found.metrics.items():
        spread = expected[name].std()
        reference = np.quantile(expected[name], [0.025, 0.975])
        np.testing.assert_allclose((low, high), reference, atol=0.25 * spread, err_msg=name)


@pytest.mark.parametrize(
    ("measurements", "rows", "values"),
    [(1, 40, 2), (8, 40, 2), (9, 300, 2), (70, 300, 2), (130, 20, 2), (5, 300, 3), (2, 9, 99)],
)
def test_patterns_are_those_that_numpy_finds(measurements: int, rows: int, values: int) -> None:
    draw = np.random.default_rng(measurements)
    scores = draw.integers(0, values, size=(measurements, rows)).astype(np.float32)
    scores[:, draw.random(rows) < 0.5] = scores[:, :1]
    patterns, place, count = B._patterns(scores)
    wanted, places, counts = np.unique(scores.T, axis=0, return_inverse=True, return_counts=True)
    assert np.array_equal(patterns, wanted.T) and np.array_equal(count, counts)
    assert np.array_equal(place, places.reshape(-1)) and np.array_equal(patterns[:, place], scores)


def test_patterns_of_rows_are_drawn_as_often_as_rows() -> None:
    """Many equal rows take the other way of drawing: both give the spread of the formula."""
    generator = np.random.default_rng(0)
    few = (generator.random((1, 4000)) < 0.8).astype(np.float32)
    many = generator.random((1, 400)).astype(np.float32)
    for scores in (few, many):
        measured = B.Measured((0,), scores)
        low, high = B.bootstrap([measured], 1, "classification", resamples=4000).metrics["accuracy"]
        half = 1.96 * scores.std() / np.sqrt(scores.shape[1])
        assert (high - low) / 2 == pytest.approx(half, rel=0.08)
        assert (high + low) / 2 == pytest.approx(scores.mean(), abs=0.1 * half)


@pytest.mark.parametrize("binary", [True, False])
def test_chunks_change_nothing(binary: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = made(binary)
    whole = B.bootstrap(tests, 3, "classification", resamples=50)
    monkeypatch.setattr(B, "CHUNK", 7 * 80)
    parts = B.bootstrap(tests, 3, "classification", resamples=50)
    assert {name: pytest.approx(ends) for name, ends in whole.metrics.items()} == parts.metrics
    np.testing.assert_allclose(whole.last, parts.last)
    assert whole.forgetting_bias == pytest.approx(parts.forgetting_bias)


def test_same_seed_same_intervals_and_other_seed_others() -> None:
    tests = made(True)
    one, again, other = (B.bootstrap(tests, 3, "classification", 100, seed=seed) for seed in (3, 3, 4))
    assert one.metrics == again.metrics and one.metrics != other.metrics


def test_confidence_and_objective_count() -> None:
    tests = made(False)
    wide, narrow = (B.bootstrap(tests, 3, "classification", 500, confidence).metrics for confidence in (0.99, 0.5))
    assert wide["accuracy"][0] < narrow["accuracy"][0] < narrow["accuracy"][1] < wide["accuracy"][1]
    assert B.bootstrap(tests, 3, "causal-lm", 500).metrics["retention"] != wide["retention"]


def test_pairing_takes_out_what_rows_have_in_common() -> None:
    """Rows differ a lot and change little: the interval of bwt is that of the changes."""
    generator = np.random.default_rng(0)
    then = generator.normal(size=500)
    now = then + 0.01 * generator.normal(size=500)
    tests = [
        B.Measured((0, 1), np.stack([then, now]).astype(np.float32)),
        B.Measured((1,), np.ones((1, 500), np.float32)),
    ]
    low, high = B.bootstrap(tests, 2, "causal-lm").metrics["bwt"]
    assert high - low < 0.003


def test_bias_is_what_forgetting_reads_when_nothing_is_forgotten() -> None:
    """Independent answers at accuracy .8, 100 rows, 5 experiences: about 2.4 points on the triangle of a run."""
    generator = np.random.default_rng(0)
    biases: list[float] = []
    readings: list[float] = []
    for _ in range(40):
        tests = [
            B.Measured(tuple(range(j, 5)), (generator.random((5 - j, 100)) < 0.8).astype(np.float32)) for j in range(5)
        ]
        reading = metric_table(B.point_matrix(tests, 5)[0])["forgetting"]
        bias = B.bootstrap(tests, 5, "classification", 100).forgetting_bias
        assert reading is not None and bias is not None
        readings.append(reading)
        biases.append(bias)
    assert np.mean(biases) == pytest.approx(0.024, abs=0.003)
    assert np.mean(readings) == pytest.approx(0.024, abs=0.007)


def test_test_sets_without_rows_or_measurements_are_gaps() -> None:
    empty = B.Measured((0, 1), np.empty((2, 0), np.float32))
    none = B.Measured((), np.empty((0, 0), np.float32))
    full = B.Measured((1,), np.ones((1, 9), np.float32))
    found = B.bootstrap([empty, none, full], 2, "classification", 20)
    assert found.metrics == {} or set(found.metrics) <= {"accuracy", "learning_accuracy"}
    assert np.isnan(found.last[:, :2]).all() and (found.last[:, 2] == 1).all()
    assert found.forgetting_bias is None
    assert B.bootstrap([], 1, "classification", 20).metrics == {}
