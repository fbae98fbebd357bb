"""Labels of new rows against the answers of the live version: which are disputed, and which new one looks like a known class?

**Disputed.** Of each known class, new rows that get another answer against hold-out rows that do, by Fisher's exact test, one-sided
and corrected by Holm's method; and over all classes by Cochran and Mantel-Haenszel's test (Mantel & Haenszel 1959, Journal of the
National Cancer Institute 22:719-748, without continuity correction), which sees labels mixed up a little in many classes of few rows.
Each of the two takes half of the level.

**Renamed.** A version answers with classes that it knows, so rows of a class that is really new get one and the same answer too: with
ten intents of CLINC150 known, half of the new ones do in 60 % of their rows or more. Only rows count that get the answer with as high
a logit as nine in ten hold-out rows of that class. With 10 to 100 known intents, 20 hold-out rows of each, 30 new rows and a logistic
regression on all-MiniLM-L6-v2, 80 % of the rows do in 90 % of the intents that are known and in 2 to 5 % of those that are new.

Letters: N new rows, M hold-out rows, K known classes, C classes compared.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, hypergeom, norm

from continual.monitor.gate import holm
from continual.refresh.shifts import CLASS_ROWS, Floats, Ints

TYPICAL = 0.1
"""Share of a class's own hold-out rows whose logit is lower than that of a typical one."""


@dataclass(frozen=True)
class Dispute:
    """One known class: how many of its ``rows`` got another answer, the most frequent of these, and the same of hold-out rows.

    Attributes:
        label, answer: class ids; ``times`` rows labelled so were answered so.
        effect: share of new rows with another answer, less that of hold-out rows.
        p_value: corrected for the number of classes.
    """

    label: int
    answer: int
    times: int
    wrong: int
    rows: int
    held_wrong: int
    held: int
    effect: float
    p_value: float


@dataclass(frozen=True)
class Disputes:
    """All classes, the largest effect first, and all of them taken together."""

    classes: tuple[Dispute, ...]
    effect: float
    p_value: float


@dataclass(frozen=True)
class Likeness:
    """One new label: of its ``rows``, so many look like a known class; ``p_value`` of "half of them at most", corrected."""

    label: int
    answer: int
    times: int
    rows: int
    p_value: float


def disputes(label_N: Ints, answer_N: Ints, held_M: Ints, right_M: NDArray[np.bool_]) -> Disputes | None:
    """What the live version disputes.

    Args:
        label_N, answer_N: class ids of new rows, all of known classes.
        held_M: class ids of hold-out rows.
        right_M: whether the live version answers them right.

    Returns:
        None where no class has :data:`~continual.refresh.shifts.CLASS_ROWS` rows on both sides.
    """
    classes_C = np.intersect1d(label_N, held_M)
    size = 1 + max(int(label_N.max(initial=-1)), int(held_M.max(initial=-1)))
    wrong_N = answer_N != label_N
    rows_C, held_C = (np.bincount(ids, minlength=size)[classes_C] for ids in (label_N, held_M))
    wrong_C, bad_C = (np.bincount(ids, minlength=size)[classes_C] for ids in (label_N[wrong_N], held_M[~right_M]))
    enough_C = np.minimum(rows_C, held_C) >= CLASS_ROWS
    if not enough_C.any():
        return None
    classes_C, rows_C, held_C, wrong_C, bad_C = (each[enough_C] for each in (classes_C, rows_C, held_C, wrong_C, bad_C))
    all_C = rows_C + held_C
    p_C = holm(hypergeom.sf(wrong_C - 1, all_C, wrong_C + bad_C, rows_C))
    excess_C = wrong_C / rows_C - bad_C / held_C
    expected_C = rows_C * (wrong_C + bad_C) / all_C
    variance_C = expected_C * held_C / all_C * (all_C - wrong_C - bad_C) / (all_C - 1)
    spread = float(np.sqrt(variance_C.sum()))
    p_value = float(norm.sf((wrong_C - expected_C).sum() / spread)) if spread else 1.0
    found = []
    for place in np.argsort(-excess_C, kind="stable"):
        label, count = int(classes_C[place]), int(wrong_C[place])
        given = np.bincount(answer_N[wrong_N & (label_N == label)]) if count else np.zeros(1, dtype=np.int64)
        found.append(
            Dispute(
                label=label,
                answer=int(given.argmax()),
                times=int(given.max()),
                wrong=count,
                rows=int(rows_C[place]),
                held_wrong=int(bad_C[place]),
                held=int(held_C[place]),
                effect=float(excess_C[place]),
                p_value=min(1.0, 2 * float(p_C[place])),
            )
        )
    effect = float((rows_C * excess_C).sum() / rows_C.sum())
    return Disputes(tuple(found), effect, min(1.0, 2 * p_value))


def likenesses(label_N: Ints, logits_NK: Floats, own: dict[int, Floats]) -> list[Likeness]:
    """Of each new label with enough rows, how many look like the known class that most of them are answered with.

    Args:
        label_N: class ids of rows of new labels.
        logits_NK: of the known classes.
        own: known class → its logit in hold-out rows of its own; a class without enough of them is left out.
    """
    answer_N = logits_NK.argmax(1)
    found = []
    for label in np.unique(label_N):
        mine_N = label_N == label
        answer = int(np.bincount(answer_N[mine_N]).argmax())
        typical = own.get(answer, np.zeros(0))
        if mine_N.sum() < CLASS_ROWS or len(typical) < CLASS_ROWS:
            continue
        least = np.quantile(typical, TYPICAL, method="lower")
        times = int((mine_N & (answer_N == answer) & (logits_NK[:, answer] >= least)).sum())
        rows = int(mine_N.sum())
        p_value = float(binomtest(times, rows, 0.5, alternative="greater").pvalue)
        found.append(Likeness(int(label), answer, times, rows, p_value))
    corrected = holm(np.array([one.p_value for one in found], dtype=np.float64))
    made = [
        Likeness(one.label, one.answer, one.times, one.rows, float(p)) for one, p in zip(found, corrected, strict=True)
    ]
    return sorted(made, key=lambda one: -one.times / one.rows)
