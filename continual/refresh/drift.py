"""Before an update trains: how do the new rows differ from those at hand?

Shifts are compared with hold-out rows where there are some, because these are a fair sample of what came before, and a memory may be
none (herded, or as many rows of each class); near-duplicates are looked for in both. A shift is found where it is certain
*and* large: its p-value, corrected within its kind, is below ``rules.level``, and its size is ``rules.effect`` or more. A thousand
rows make trifles certain, and a few dozen make noise look large.

What a kind compares, and where it can say nothing:

========================  =====================================================================================================
``label-shift``           shares of the known classes that are on both sides (of all known ones in the domain scenario, where a
                          month without a class is news); regression: each target. Not where all classes are new.
``covariate-shift``       the encoder's features, class by class, of classes on both sides (:func:`.shifts.feature_shift`);
                          regression: of all rows. Not where all classes are new: features of other topics differ, and no
                          test of features alone tells that from a change of the source. Not for language models.
``form-shift``            texts: length, unknown tokens, word pieces, word order, of all rows, measured against what topics do
                          (:mod:`.form`); numbers: every input, of classes on both sides.
``unknown-classes``       every new row; something to know, and a finding where the rules stop at it.
``near-duplicates``       cosines of features (:mod:`.copies`).
``disputed-labels``       labels of known classes with what the live version answers, beside its answers to hold-out rows of the
                          same class (:mod:`.labels`). Not in the scenario ``task``.
``renamed-labels``        new labels with the known class that the live version takes their rows for. Not in ``task``.
``leakage``               every new row against every hold-out row, by content.
========================  =====================================================================================================

Rows are drawn by a key hashed from their id, so that the same seed gives the same answer whatever the order of the rows.

Letters: N new rows, M rows at hand, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import numpy as np
from numpy.typing import ArrayLike

from continual.kinds import Objective, Scenario
from continual.refresh.comparison import Comparison
from continual.refresh.records import Drift, Found
from continual.refresh.rules import DriftRules, Finding
from continual.refresh.sides import Answers, Features, Side
from continual.refresh.wording import Pieces
from continual.table import Table, concat

_ORDER: tuple[Finding, ...] = (
    "leakage",
    "disputed-labels",
    "renamed-labels",
    "near-duplicates",
    "form-shift",
    "covariate-shift",
    "label-shift",
    "unknown-classes",
)
"""The most serious first: what spoils measurements, what may be a broken source, what is often meant."""


def compare(
    new: Table,
    reference: Table | None,
    *,
    holdouts: Sequence[Table],
    features: Features | None,
    class_names: Sequence[str],
    known: int,
    rules: DriftRules,
    seed: int,
    objective: Objective = "classification",
    scenario: Scenario = "class",
    unknown_token: int | None = None,
    pieces: Pieces | None = None,
    answers: Answers | None = None,
    right: Sequence[ArrayLike | None] = (),
    accepted: Sequence[str] = (),
) -> Drift:
    """What is found in the new rows, the most serious first, and what was tested.

    Args:
        new: encoded training rows: ``input_ids`` and ``attention_mask``, or ``inputs``; ``labels``; ``row``.
        reference: rows at hand, those of a memory and of the hold-outs of earlier experiences; None at the first update.
        holdouts: the hold-outs alone, one table for each earlier experience; rows of ``reference`` with the same ids are taken
            for the same rows.
        features: float32 (N, D) of a frozen encoder, or the inputs themselves; None where there are none, which leaves out
            covariate shift and near-duplicates.
        class_names: of all classes, by id.
        known: classes with a smaller id were known before.
        rules: how many rows of a side are looked at, in each comparison, and from when on something counts.
        seed: of the draws.
        scenario: in ``domain`` every update is to have all classes.
        unknown_token: its id, where the tokenizer has one.
        pieces: which token ids go on a word (:func:`~continual.refresh.wording.word_pieces`).
        answers: of the live version; None leaves out what compares labels with them.
        right: 1 or 0 for each row of each of ``holdouts`` that the live version answers right or wrong, None where it was not asked.
        accepted: new labels that are classes of their own, whatever they look like.

    Returns:
        Nothing found and nothing tested where there is nothing to compare with.

    Raises:
        StreamError: rows without tokens and inputs, or features that are not finite.
    """
    told = [
        np.full(len(table), np.nan) if one is None else np.asarray(one, dtype=np.float64)
        for table, one in zip_longest(holdouts, right)
    ]
    holdouts = [table for table in holdouts if len(table)]
    holdout = concat(holdouts) if holdouts else None
    tables = {"hold-out": holdout, "memory and hold-out": reference}
    at_hand = [
        Side(table, features, objective, seed, what)
        for what, table in tables.items()
        if table is not None and len(table)
    ]
    if not len(new) or not at_hand:
        return Drift()
    fresh = Side(new, features, objective, seed, "new")
    comparison = Comparison(fresh, at_hand, rules, seed, class_names)
    if holdout is not None:
        comparison.leakage(holdout, objective)
    if features is not None:
        comparison.near_duplicates()
    comparison.form(unknown_token, pieces)
    if features is not None and objective in ("classification", "regression"):
        comparison.features()
    if objective == "classification":
        comparison.classes(known, [len(table) for table in holdouts], every_class=scenario == "domain")
        if answers is not None and holdout is not None and scenario != "task" and known > 1:
            comparison.labels(answers, np.concatenate(told), known, accepted)
    elif objective == "regression":
        comparison.targets()
    found = [one for kind in _ORDER if (one := comparison.found.get(kind)) is not None]
    meant = {"unknown-classes"} - {*rules.stop}
    return Drift(
        new=fresh.looked_at,
        reference=sum(side.looked_at for side in at_hand),
        found=tuple(one for one in found if one.kind not in meant),
        known=tuple(one for one in found if one.kind in meant),
        tested=tuple(kind for kind in _ORDER if kind in comparison.found),
    )


def stopped_by(drift: Drift, rules: DriftRules) -> Found | None:
    """The first finding of a kind that stops an update; None where there is none."""
    return next((found for found in drift.found if found.kind in rules.stop), None)
