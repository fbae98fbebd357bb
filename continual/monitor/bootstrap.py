"""Intervals of the metrics by a paired bootstrap over the rows of the test sets.

Within each experience rows are drawn with replacement, and one draw serves all updates, so that what is common to all
updates (a hard row stays hard) cancels in the differences (percentile intervals: Efron & Tibshirani 1993, ch. 13).
Rows with the same scores at every update need not be told apart: their counts are drawn together, which for 0/1 scores
leaves a few dozen patterns of thousands of rows.

Letters: U updates, S experiences, N rows of a test set, M measurements of a test set, P distinct patterns of scores,
C resamples of one chunk, X all resamples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from continual.kinds import Objective
from continual.monitor.metrics import Floats, bwt, forgetting, mean_known, metric_arrays

CHUNK = 4_000_000
"""Numbers drawn at once (32 MB)."""

INITIAL = -1
"""The update that stands for "before any update"."""


@dataclass(frozen=True)
class Measured:
    """The scores of one test set.

    Attributes:
        updates: the updates at which it was measured, rising, M of them; -1 is before any update.
        scores: float32 (M, N), one row a measurement.
        flips: float64 (N,), 1 for each row that was right when it was learnt and is wrong now, where that is known.
    """

    updates: tuple[int, ...]
    scores: NDArray[np.float32]
    flips: Floats | None = None


@dataclass(frozen=True)
class Resampled:
    """What the resamples say.

    Attributes:
        metrics: name → interval, only metrics that are defined.
        last: interval of the last row of the matrix, float64 (2, S), NaN where not measured.
        forgetting_bias: what max-based forgetting reads from the noise of these very test sets when nothing is
            forgotten (the mean over the resamples, each measured against the scores themselves); None where forgetting
            is not defined.
    """

    metrics: dict[str, tuple[float, float]]
    last: Floats
    forgetting_bias: float | None


def bootstrap(
    tests: Sequence[Measured],
    updates: int,
    objective: Objective,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Resampled:
    """Intervals of every metric.

    Args:
        tests: one for each experience, S of them, in order; without measurements where there is none.
        updates: how many rows the matrix has.
        objective: decides what ``retention`` is.
        resamples: how many draws.
        seed: of the draws; the same seed and scores give the same intervals.
    """
    matrix_US, _ = point_matrix(tests, updates)
    sizes = [updates * len(tests), *(test.scores.shape[1] for test in tests)]
    chunk = max(min(resamples, CHUNK // max(*sizes, 1)), 1)
    sources = [
        _chunks(test, resamples, chunk, np.random.default_rng([seed, place])) for place, test in enumerate(tests)
    ]
    parts: dict[str, list[Floats]] = {}
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        R_CUS = np.full((size, updates, len(tests)), np.nan)
        initial_CS = np.full((size, len(tests)), np.nan)
        flips_CS = np.full((size, len(tests)), np.nan)
        for place, (test, source) in enumerate(zip(tests, sources, strict=True)):
            means_CM = next(source)
            for column, update in enumerate(test.updates):
                (initial_CS if update == INITIAL else R_CUS[:, update])[:, place] = means_CM[:, column]
            if test.flips is not None:
                flips_CS[:, place] = means_CM[:, -1]
        found = metric_arrays(R_CUS, initial_CS, objective)
        found["negative_flips"] = mean_known(flips_CS)
        found["noise"] = forgetting(R_CUS - matrix_US) + np.nan_to_num(bwt(R_CUS - matrix_US))  # whose mean is 0
        found["last"] = R_CUS[:, -1]
        for name, values in found.items():
            parts.setdefault(name, []).append(values)
    whole = {name: np.concatenate(values) for name, values in parts.items()}
    last_XS, noise_X = whole.pop("last"), whole.pop("noise")
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    return Resampled(
        {name: _ends(values, tails) for name, values in whole.items() if np.isfinite(values).any()},
        np.quantile(last_XS, tails, axis=0),
        float(noise_X.mean()) if np.isfinite(noise_X).all() else None,
    )


def point_matrix(tests: Sequence[Measured], updates: int) -> tuple[Floats, Floats]:
    """The matrix R (U, S) and the scores before any update (S,), float64, NaN where not measured."""
    matrix_US = np.full((updates, len(tests)), np.nan)
    initial_S = np.full(len(tests), np.nan)
    for place, test in enumerate(tests):
        if test.scores.shape[1] == 0:
            continue
        for update, mean in zip(test.updates, test.scores.mean(1, dtype=np.float64), strict=True):
            if update == INITIAL:
                initial_S[place] = mean
            else:
                matrix_US[update, place] = mean
    return matrix_US, initial_S


def _chunks(measured: Measured, resamples: int, chunk: int, generator: np.random.Generator) -> Iterator[Floats]:
    """Mean scores of draws of N rows with replacement, (C, M), the flips as one more column."""
    scores_MN = measured.scores
    if measured.flips is not None:
        scores_MN = np.concatenate([scores_MN, measured.flips[None].astype(np.float32)])
    width, rows = scores_MN.shape
    if rows == 0 or width == 0:
        for start in range(0, resamples, chunk):
            yield np.full((min(chunk, resamples - start), width), np.nan)
        return
    patterns_MP, place_N, count_P = _patterns(scores_MN)
    few = len(count_P) < rows // 4
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        if few:
            counts_CP = generator.multinomial(rows, count_P / rows, size=size)
        else:
            drawn_CN = place_N[generator.integers(0, rows, size=(size, rows))]
            drawn_CN += np.arange(size)[:, None] * len(count_P)
            counts_CP = np.bincount(drawn_CN.ravel(), minlength=size * len(count_P)).reshape(size, -1)
        yield counts_CP @ patterns_MP.T.astype(np.float64) / rows


def _patterns(
    scores_MN: NDArray[np.float32],
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """Distinct columns (M, P) in rising order, which one each row has (N,), and how many rows have each (P,)."""
    place_N = np.zeros(scores_MN.shape[1], dtype=np.int64)
    for word_N in _words(scores_MN):
        _, rank_N = np.unique(word_N, return_inverse=True)
        _, place_N = np.unique(place_N * (rank_N.max(initial=0) + 1) + rank_N, return_inverse=True)
    _, first_P, count_P = np.unique(place_N, return_index=True, return_counts=True)
    return scores_MN[:, first_P], place_N, count_P


def _words(scores_MN: NDArray[np.float32]) -> list[NDArray[Any]]:
    """Numbers (N,) that order the columns one after the other; 64 rows of 0/1 scores make one number."""
    if not ((scores_MN == 0) | (scores_MN == 1)).all():
        return list(scores_MN)
    bytes_bN = np.packbits(scores_MN.astype(np.bool_), axis=0)
    bytes_bN = np.pad(bytes_bN, ((0, -len(bytes_bN) % 8), (0, 0)))
    return list(np.ascontiguousarray(bytes_bN.T).view(">u8").T.astype(np.uint64))


def _ends(values_X: Floats, tails: list[float]) -> tuple[float, float]:
    low, high = np.quantile(values_X[np.isfinite(values_X)], tails)
    return float(low), float(high)
