"""Has the form of rows changed: the wording of texts, the columns of numbers? Kolmogorov and Smirnov's test, column by column.

Topics differ in form to some degree. Three comparisons therefore, with Holm's correction (Holm 1979) over all columns of all of them:

* rows of the same classes, as many of each: the test of rows against rows;
* texts of classes that are not at hand against all rows at hand: classes are exchanged between the sides, whole, and the
  p-value is the share of exchanges that set the sides as far apart. So a month of new topics counts only where it differs more
  than topics do. With so few classes that no exchange could tell, nothing is tested;
* where there are no classes: all rows. What topics alone may do cannot be told from it, see :data:`TOPICS`.

The size of a change is the statistic of Kolmogorov and Smirnov, the largest gap between the two distribution functions.

Letters: N new rows, M rows at hand, L rows of both, C columns, V different values, K classes, P exchanges.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import ks_2samp

from continual.monitor.gate import holm
from continual.refresh.shifts import SIDE_ROWS, Floats, Ints, balanced
from continual.refresh.wording import Columns

TOPICS = 0.3
"""Least change of a text's form that counts where no classes tell topics apart: as far as months of ten intents of CLINC150 differ."""
MOST_COLUMNS = 256
"""Columns of numbers that are compared; of more, so many at equal distances."""
_EXCHANGES = 20_000
_FOLLOWS = 0.02


@dataclass(frozen=True)
class Change:
    """How one column differs.

    Attributes:
        effect: in [0, 1].
        p_value: of "no more than by chance", or than topics do; corrected for all columns.
        new, old: means of the two sides, and their standard deviations.
        rows: of the new side, that were compared.
        topics: how many classes at hand it was measured by; 0 where rows were.
    """

    column: str
    effect: float
    p_value: float
    new: float
    old: float
    new_spread: float
    old_spread: float
    rows: int
    topics: int


@dataclass(frozen=True)
class _Test:
    column: str
    new: Floats
    old: Floats
    classes: tuple[Ints, Ints] | None

    @property
    def smallest_p(self) -> float:
        """The smallest p-value that it could give: with classes one in the ways in which they can lie on the two sides."""
        if self.classes is None:
            return 0.0
        new, old = (len(np.unique(part)) for part in self.classes)
        return 1 / min(math.comb(new + old, new), _EXCHANGES)


def number_columns(new_NC: Floats, old_MC: Floats, name: str) -> Columns:
    """Every column of numbers, at most :data:`MOST_COLUMNS`, as ``name[0]``, ``name[1]`` …"""
    count = new_NC.shape[1]
    places = np.unique(np.linspace(0, count - 1, min(count, MOST_COLUMNS)).astype(int))
    return {f"{name}[{place}]": (new_NC[:, place], old_MC[:, place]) for place in places}


def changes(
    columns: Columns,
    classes: tuple[Ints, Ints] | None,
    *,
    topics: bool,
    level: float,
    generator: np.random.Generator,
) -> list[Change]:
    """Every column that could be tested, in every comparison, the largest change first.

    Args:
        columns: of both sides.
        classes: class ids (N,) and (M,); None where there are none.
        topics: whether rows of classes that are not at hand are compared as well.
        level: chance of a false alarm; with it goes the number of exchanges.
        generator: of the exchanges.
    """
    tests = [test for test in _tests(columns, classes, topics) if test is not None]
    tests = [test for test in tests if test.smallest_p * len(tests) < level]
    exchanges = min(_EXCHANGES, math.ceil(20 * len(tests) / level))
    measured = [_measure(test, exchanges, generator) for test in tests]
    corrected = holm(np.array([p_value for _, p_value in measured]))
    found = [
        Change(
            column=test.column,
            effect=effect,
            p_value=float(p_value),
            new=float(test.new.mean()),
            old=float(test.old.mean()),
            new_spread=float(test.new.std()),
            old_spread=float(test.old.std()),
            rows=len(test.new),
            topics=0 if test.classes is None else len(np.unique(test.classes[1])),
        )
        for test, (effect, _), p_value in zip(tests, measured, corrected, strict=True)
    ]
    return sorted(found, key=lambda change: -change.effect)


def telling(found: list[Change]) -> list[Change]:
    """Without shares that only follow the length: in longer rows the same share lies closer to its mean in every row."""
    if all(change.column != "length" for change in found):
        return found
    return [change for change in found if change.column == "length" or abs(change.new - change.old) >= _FOLLOWS]


def _tests(columns: Columns, classes: tuple[Ints, Ints] | None, topics: bool) -> Iterator[_Test | None]:
    for name, (new_N, old_M) in columns.items():
        new_there, old_there = ~np.isnan(new_N), ~np.isnan(old_M)
        new_N, old_M = new_N[new_there], old_M[old_there]
        if classes is None:
            yield _test(name, new_N, old_M)
            continue
        new_class, old_class = classes[0][new_there], classes[1][old_there]
        same_new, same_old = balanced(new_class, old_class)
        yield _test(name, new_N[same_new], old_M[same_old])
        if topics:
            other = ~np.isin(new_class, old_class)
            yield _test(name, new_N[other], old_M, (new_class[other], old_class))


def _test(name: str, new_N: Floats, old_M: Floats, classes: tuple[Ints, Ints] | None = None) -> _Test | None:
    """A test, where there are rows enough and not all values are the same."""
    if min(len(new_N), len(old_M)) < SIDE_ROWS or ((new_N == new_N[0]).all() and (old_M == new_N[0]).all()):
        return None
    return _Test(name, new_N, old_M, classes)


def _measure(test: _Test, exchanges: int, generator: np.random.Generator) -> tuple[float, float]:
    if test.classes is None:
        found = ks_2samp(test.new, test.old, method="asymp")
        return float(found.statistic), float(found.pvalue)
    gap, gaps_P = exchanged_gaps(test.new, test.old, *test.classes, exchanges, generator)
    return gap, float((1 + (gaps_P >= gap - 1e-12).sum()) / (1 + exchanges))


def exchanged_gaps(
    new_N: Floats, old_M: Floats, new_class_N: Ints, old_class_M: Ints, exchanges: int, generator: np.random.Generator
) -> tuple[float, Floats]:
    """The largest gap between the two distribution functions, and those after exchanging classes, (P,).

    Args:
        new_N, old_M: values of the rows.
        new_class_N, old_class_M: their classes; no class is on both sides.
    """
    values_V, value_L = np.unique(np.concatenate([new_N, old_M]), return_inverse=True)
    classes_K, class_L = np.unique(np.concatenate([new_class_N, old_class_M]), return_inverse=True)
    below_KV = np.zeros((len(classes_K), len(values_V)))
    np.add.at(below_KV, (class_L, value_L), 1)
    below_KV = below_KV.cumsum(1)
    is_new_K = np.isin(classes_K, new_class_N)
    gaps = [_gaps(is_new_K[None], below_KV)]
    for start in range(0, exchanges, 1000):
        draws = generator.random((min(1000, exchanges - start), len(classes_K)))
        gaps.append(_gaps(draws.argsort(1).argsort(1) < is_new_K.sum(), below_KV))
    found = np.concatenate(gaps)
    return float(found[0]), found[1:]


def _gaps(is_new_PK: NDArray[np.bool_], below_KV: Floats) -> Floats:
    new_PV = is_new_PK.astype(np.float64) @ below_KV
    old_PV = below_KV.sum(0) - new_PV
    found: Floats = np.abs(new_PV / new_PV[:, -1:] - old_PV / old_PV[:, -1:]).max(1)
    return found
