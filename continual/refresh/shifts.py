"""Have labels or features shifted? Only like is compared with like: rows of the same classes, as many of each.

**Labels.** Pearson's chi-squared test of homogeneity. The size is the total variation distance between the two shares of
classes, less what chance alone makes of it in tables with the same margins (Patefield 1981, Applied Statistics 30:91-97): with
1000 rows of 150 classes on each side the plain distance reads 0.2 where nothing has shifted.

**Features.** A classifier two-sample test (Lopez-Paz & Oquab 2017, arXiv 1610.06545, section 3): a classifier learns to tell the two
sides apart on one half of the rows and is judged on the other. Three departures: the two halves take turns, and twice the
smaller of their p-values counts; it is judged by Mann and Whitney's test of its scores and not by its accuracy; features are
centred class by class and their squares are features as well, so that a logistic regression finds a change of spread.

Letters: N new rows, M rows at hand, L rows of both, D features, K classes.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2_contingency, mannwhitneyu, random_table

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

CLASS_ROWS = 5
"""Rows of a class on each side, at least; a class with fewer is not compared."""
SIDE_ROWS = 40
"""Rows of each side, at least; with fewer nothing is tested."""
_EXPECTED = 5
_TABLES = 500


@dataclass(frozen=True)
class Shift:
    """What a test says.

    Attributes:
        effect: how far the two sides can be told apart, in [0, 1].
        p_value: of "they are alike".
        rows: of the new side, that were compared.
        classes: int64 (K,), those compared, the one that has shifted most first.
        shares: float64 (2, K), the share of each on the new side and at hand; for features how far each is told apart, (1, K).
    """

    effect: float
    p_value: float
    rows: int
    classes: Ints
    shares: Floats


def balanced(new_N: Ints, old_M: Ints) -> tuple[Ints, Ints]:
    """Places of as many rows of each class on both sides, the first of each class, ascending.

    Args:
        new_N, old_M: class ids; classes with fewer than :data:`CLASS_ROWS` rows on a side are left out.
    """
    new_rank_N, old_rank_M = rank_within(new_N), rank_within(old_M)
    size = 1 + max(int(new_N.max(initial=-1)), int(old_M.max(initial=-1)), 0)
    counts_K = np.minimum(np.bincount(new_N, minlength=size), np.bincount(old_M, minlength=size))
    counts_K[counts_K < CLASS_ROWS] = 0
    return np.flatnonzero(new_rank_N < counts_K[new_N]), np.flatnonzero(old_rank_M < counts_K[old_M])


def rank_within(groups_N: Ints) -> Ints:
    """How many rows of the same group stand before each row, int64 (N,)."""
    order_N = np.argsort(groups_N, kind="stable")
    sorted_N = groups_N[order_N]
    starts_N = np.searchsorted(sorted_N, sorted_N)
    rank_N = np.empty(len(groups_N), dtype=np.int64)
    rank_N[order_N] = np.arange(len(groups_N)) - starts_N
    return rank_N


def label_shift(new_N: Ints, old_M: Ints, generator: np.random.Generator) -> Shift | None:
    """Have the shares of the classes shifted?

    Args:
        new_N, old_M: class ids of the rows of both sides.
        generator: of the tables that chance makes.

    Returns:
        None where fewer than two classes have the five expected rows on each side that the test needs.
    """
    classes_K, place_L = np.unique(np.concatenate([new_N, old_M]), return_inverse=True)
    table_2K = np.stack(
        [np.bincount(part, minlength=len(classes_K)) for part in (place_L[: len(new_N)], place_L[len(new_N) :])]
    )
    if min(len(new_N), len(old_M)) < SIDE_ROWS:
        return None
    kept_K = (np.outer(table_2K.sum(1), table_2K.sum(0)) / table_2K.sum() >= _EXPECTED).all(0)
    table_2K, classes_K = table_2K[:, kept_K], classes_K[kept_K]
    if len(classes_K) < 2 or not table_2K.sum(1).all():
        return None
    tables = random_table(table_2K.sum(1), table_2K.sum(0)).rvs(_TABLES, random_state=generator)
    by_chance = float(_distances(tables).mean())
    distance = float(_distances(table_2K[None])[0])
    shares_2K = table_2K / table_2K.sum(1, keepdims=True)
    most = np.argsort(-np.abs(shares_2K[0] - shares_2K[1]), kind="stable")
    p_value = float(chi2_contingency(table_2K).pvalue)
    return Shift(max(0.0, distance - by_chance), p_value, len(new_N), classes_K[most], shares_2K[:, most])


def feature_shift(new_ND: Floats, old_MD: Floats, new_N: Ints, old_M: Ints) -> Shift | None:
    """Can the features of the two sides be told apart, class by class?

    Args:
        new_ND, old_MD: features.
        new_N, old_M: class ids, as many rows of each on both sides (:func:`balanced`); all 0 where there are no classes. Rows
            stand in random order.

    Returns:
        The size is 2 AUC - 1 of the classifiers on the rows that they have not seen; None for fewer than
        :data:`SIDE_ROWS` rows on a side.
    """
    if min(len(new_N), len(old_M)) < SIDE_ROWS:
        return None
    features_LD = np.concatenate([new_ND, old_MD])
    class_L, side_L = np.concatenate([new_N, old_M]), np.repeat([1, 0], [len(new_N), len(old_M)])
    half_L = rank_within(2 * class_L + side_L) % 2
    score_L, p_values, sizes = np.empty(len(class_L)), [], []
    for half in (0, 1):
        learns_L, judged_L = half_L == half, half_L != half
        classifier = _fitted(features_LD[learns_L], class_L[learns_L], side_L[learns_L])
        score_L[judged_L] = classifier(features_LD[judged_L], class_L[judged_L])
        size, p_value = _told_apart(score_L[judged_L], side_L[judged_L])
        sizes.append(size)
        p_values.append(p_value)
    classes_K = np.unique(class_L)
    each_K = np.array([_told_apart(score_L[class_L == c], side_L[class_L == c])[0] for c in classes_K])
    most = np.argsort(-each_K, kind="stable")
    effect = float(np.clip(np.mean(sizes), 0, 1))
    return Shift(effect, min(1.0, 2 * min(p_values)), len(new_N), classes_K[most], each_K[None, most])


def _distances(tables_X2K: NDArray[Any]) -> Floats:
    """Total variation distance between the two rows of each table, (X,)."""
    shares = tables_X2K / tables_X2K.sum(2, keepdims=True)
    found: Floats = np.abs(shares[:, 0] - shares[:, 1]).sum(1) / 2
    return found


def _told_apart(score_L: Floats, side_L: Ints) -> tuple[float, float]:
    """2 AUC - 1 of the scores, and the one-sided p-value of Mann and Whitney's test."""
    new, old = score_L[side_L == 1], score_L[side_L == 0]
    found = mannwhitneyu(new, old, alternative="greater", method="asymptotic")
    return 2 * float(found.statistic) / (len(new) * len(old)) - 1, float(found.pvalue)


def _fitted(features_LD: Floats, class_L: Ints, side_L: Ints) -> Any:
    """A function of features and class ids that gives high scores to new rows, learnt from these."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    classes_K, place_L = np.unique(class_L, return_inverse=True)
    means_KD = np.zeros((len(classes_K), features_LD.shape[1]))
    np.add.at(means_KD, place_L, features_LD)
    means_KD /= np.bincount(place_L)[:, None]
    scaler = StandardScaler().fit(features_LD - means_KD[place_L])

    def made(rows_LD: Floats, rows_class_L: Ints) -> Floats:
        scaled = scaler.transform(rows_LD - means_KD[np.searchsorted(classes_K, rows_class_L)])
        return np.concatenate([scaled, np.square(scaled)], axis=1)

    classifier = LogisticRegression(C=0.01, max_iter=500)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.fit(made(features_LD, class_L), side_L)
    return lambda rows_LD, rows_class_L: classifier.decision_function(made(rows_LD, rows_class_L))
