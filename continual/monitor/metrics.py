"""What a matrix of scores says about learning and forgetting.

``R`` is float64 (..., U, S): row i after update i, column j the test set of experience j, NaN where not measured;
higher scores are better. Leading dimensions are kept, so that a thousand bootstrap replicates are one call. Every
function returns float64 of the leading shape, NaN where the metric is not defined.

One row with several columns (``U == 1 < S``) is a model that learnt everything at once, the joint bound: it has an
accuracy and nothing else.

Letters: U updates, S experiences, N rows of a test set.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from continual.kinds import Objective

Floats = NDArray[np.float64]
Initial = Floats | Sequence[float | None] | None

METRICS = ("accuracy", "learning_accuracy", "bwt", "forgetting", "fwt", "retention")
"""The keys of :func:`metric_table`."""


def accuracy(R: Floats) -> Floats:
    """Mean of the last row over the measured experiences up to the last update (over all of them for a joint bound)."""
    R = _matrix(R)
    reach = R.shape[-1] if _joint(R) else R.shape[-2]
    return mean_known(R[..., -1, :reach])


def learning_accuracy(R: Floats) -> Floats:
    """Mean of the diagonal: each experience just after it was learnt (Riemer et al. 2019, arXiv 1810.11910)."""
    R = _matrix(R)
    return _undefined(R) if _joint(R) else mean_known(_diagonal(R))


def bwt(R: Floats) -> Floats:
    """Backward transfer, mean of R[T, j] - R[j, j] over j < T (Lopez-Paz & Ranzato 2017, arXiv 1706.08840, eq. 3)."""
    then, now = _then_and_now(_matrix(R))
    return mean_known(now - then)


def forgetting(R: Floats) -> Floats:
    """Mean over j < T of max over i < T of R[i, j], minus R[T, j] (Chaudhry et al. 2018, arXiv 1801.10112, eq. 3).

    Every measured earlier row counts, those before experience j was learnt too, as in the paper. The maximum is taken
    over noisy values, so the figure is above zero even where nothing is forgotten:
    see :func:`continual.monitor.statistics.bias_of_forgetting`.
    """
    R = _matrix(R)
    earlier = R[..., :-1, : R.shape[-2] - 1]
    if 0 in earlier.shape[-2:]:
        return _undefined(R)
    best = np.where(np.isnan(earlier), -np.inf, earlier).max(-2)
    best = np.where(np.isneginf(best), np.nan, best)
    return mean_known(best - R[..., -1, : best.shape[-1]])


def fwt(R: Floats, initial: Initial = None) -> Floats:
    """Forward transfer, mean of R[j - 1, j] - initial[j] over j > 0 (Lopez-Paz & Ranzato 2017, eq. 4).

    Args:
        initial: (..., S), the scores before any update; NaN or None where not measured.
    """
    R = _matrix(R)
    if initial is None or _joint(R):
        return _undefined(R)
    before = np.diagonal(R[..., :, 1:], axis1=-2, axis2=-1)
    start = np.asarray(initial, dtype=np.float64)[..., 1 : 1 + before.shape[-1]]
    return mean_known(before - start)


def retention(R: Floats, objective: Objective = "classification") -> Floats:
    """Mean over j < T of the share of experience j that is left; 1 when all is kept, above 1 when it got better.

    Scores that cannot be negative: R[T, j] / R[j, j]. Log-likelihood per token: exp(R[T, j] - R[j, j]), the ratio of
    the geometric mean probabilities of a token. Negative squared error: R[j, j] / R[T, j], the error then over the
    error now. An experience whose ratio has a zero below the line is left out.
    """
    then, now = _then_and_now(_matrix(R))
    if objective in ("causal-lm", "seq2seq"):
        return mean_known(np.exp(now - then))
    above, below = (then, now) if objective == "regression" else (now, then)
    ratio = np.divide(above, below, out=np.full(above.shape, np.nan), where=below != 0)
    return mean_known(ratio)


def intransigence(R: Floats, joint: ArrayLike) -> Floats:
    """Mean of joint[j] - R[j, j]: what learning in turn cost each experience (Chaudhry et al. 2018, eq. 5).

    Args:
        joint: (..., S), the scores of a model trained on everything at once.
    """
    R = _matrix(R)
    if _joint(R):
        return _undefined(R)
    learnt = _diagonal(R)
    return mean_known(np.asarray(joint, dtype=np.float64)[..., : learnt.shape[-1]] - learnt)


def negative_flips(then: Sequence[ArrayLike], now: Sequence[ArrayLike]) -> float | None:
    """Share of rows that were right just after they were learnt and are wrong now, mean over the test sets.

    Source: Yan et al. 2021, arXiv 2011.09161. Each entry holds the 0/1 scores of one test set, (N,); sets without rows
    are left out, None when no set is left.
    """
    shares = [flips(before, after).mean() for before, after in zip(then, now, strict=True) if np.size(before)]
    return float(np.mean(shares)) if shares else None


def flips(then: ArrayLike, now: ArrayLike) -> Floats:
    """1 for each row that was right and is wrong now, 0 for the others, float64 (N,), from 0/1 scores (N,)."""
    return ((np.asarray(then) > 0.5) & (np.asarray(now) < 0.5)).astype(np.float64)


def metric_arrays(R: Floats, initial: Initial, objective: Objective) -> dict[str, Floats]:
    """Every metric of :data:`METRICS` with the leading shape of ``R``, NaN where not defined."""
    return {
        "accuracy": accuracy(R),
        "learning_accuracy": learning_accuracy(R),
        "bwt": bwt(R),
        "forgetting": forgetting(R),
        "fwt": fwt(R, initial),
        "retention": retention(R, objective),
    }


def metric_table(
    R: ArrayLike, initial: Initial = None, objective: Objective = "classification"
) -> dict[str, float | None]:
    """Every metric of one matrix (U, S) by name, None where it is not defined."""
    arrays = metric_arrays(np.asarray(R, dtype=np.float64), initial, objective)
    return {name: defined(value) for name, value in arrays.items()}


def mean_known(values: Floats) -> Floats:
    """Mean over the last axis of what is not NaN; NaN where nothing is."""
    known = ~np.isnan(values)
    count = known.sum(-1)
    total = np.where(known, values, 0.0).sum(-1)
    mean: Floats = np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)
    return mean


def defined(value: float | Floats) -> float | None:
    """A number that JSON can hold: None in place of NaN and infinities."""
    return float(value) if np.isfinite(value) else None


def _matrix(R: Floats) -> Floats:
    R = np.asarray(R, dtype=np.float64)
    assert R.ndim >= 2 and R.shape[-2] > 0, f"a matrix of scores has at least one row and two dimensions, not {R.shape}"
    return R


def _joint(R: Floats) -> bool:
    return bool(R.shape[-2] == 1 < R.shape[-1])


def _diagonal(R: Floats) -> Floats:
    return np.diagonal(R, axis1=-2, axis2=-1)


def _then_and_now(R: Floats) -> tuple[Floats, Floats]:
    """R[j, j] and R[T, j] for j < T, (..., min(T, S))."""
    then = _diagonal(R[..., :-1, :])
    return then, R[..., -1, : then.shape[-1]]


def _undefined(R: Floats) -> Floats:
    return np.full(R.shape[:-2], np.nan)
