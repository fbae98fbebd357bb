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
``unknown-classes``       every new row.
``near-duplicates``       cosines of features (:mod:`.copies`).
``leakage``               every new row against every hold-out row, by content.
========================  =====================================================================================================

Rows are drawn by a key hashed from their id, so that the same seed gives the same answer whatever the order of the rows.

Letters: N new rows, M rows at hand, D features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from continual.objective import Objective
from continual.randomness import derive_seed
from continual.refresh import sentences
from continual.refresh.copies import contents, near_duplicates
from continual.refresh.form import TOPICS, changes, number_columns
from continual.refresh.records import Drift, Found
from continual.refresh.rules import DriftRules, Finding
from continual.refresh.sentences import Bar
from continual.refresh.shifts import Ints, balanced, feature_shift, label_shift
from continual.refresh.sides import Features, Side
from continual.refresh.wording import Pieces, read_tokens, text_columns
from continual.streams.experience import Scenario
from continual.table import Table

_ORDER: tuple[Finding, ...] = (
    "leakage",
    "near-duplicates",
    "form-shift",
    "covariate-shift",
    "label-shift",
    "unknown-classes",
)
"""The most serious first: what spoils measurements, what may be a broken source, what is often meant."""

_LEAST = 0.01
"""Share of near-duplicates beyond the usual one from which on they are reported."""


def compare(
    new: Table,
    reference: Table | None,
    *,
    holdout: Table | None,
    features: Features | None,
    class_names: Sequence[str],
    known: int,
    rules: DriftRules,
    seed: int,
    objective: Objective = "classification",
    scenario: Scenario = "class",
    unknown_token: int | None = None,
    pieces: Pieces | None = None,
) -> Drift:
    """What is found in the new rows, the most serious first, and what was tested.

    Args:
        new: encoded training rows: ``input_ids`` and ``attention_mask``, or ``inputs``; ``labels``; ``row``.
        reference: rows at hand, those of a memory and of the hold-outs of earlier experiences; None at the first update.
        holdout: the hold-outs alone; rows of ``reference`` with the same ids are taken for the same rows.
        features: float32 (N, D) of a frozen encoder, or the inputs themselves; None where there are none, which leaves out
            covariate shift and near-duplicates.
        class_names: of all classes, by id.
        known: classes with a smaller id were known before.
        rules: how many rows are looked at, and from when on something counts.
        seed: of the draws.
        scenario: in ``domain`` every update is to have all classes.
        unknown_token: its id, where the tokenizer has one.
        pieces: which token ids go on a word (:func:`~continual.refresh.wording.word_pieces`).

    Returns:
        Nothing found and nothing tested where there is nothing to compare with.

    Raises:
        StreamError: rows without tokens and inputs, or features that are not finite.
    """
    fresh = Side(new, features, objective, seed, "new")
    tables = {"hold-out": holdout, "memory and hold-out": reference}
    at_hand = [
        Side(table, features, objective, seed, what)
        for what, table in tables.items()
        if table is not None and len(table)
    ]
    if not len(new) or not at_hand:
        return Drift()
    comparison = _Comparison(fresh, at_hand, rules, seed, class_names)
    if holdout is not None and len(holdout):
        comparison.leakage(holdout, objective)
    if features is not None:
        comparison.near_duplicates()
    comparison.form(unknown_token, pieces)
    if features is not None and objective in ("classification", "regression"):
        comparison.features()
    if objective == "classification":
        comparison.classes(known, every_class=scenario == "domain")
    elif objective == "regression":
        comparison.targets()
    return Drift(
        new=fresh.looked_at,
        reference=sum(side.looked_at for side in at_hand),
        found=tuple(found for kind in _ORDER if (found := comparison.found.get(kind)) is not None),
        tested=tuple(kind for kind in _ORDER if kind in comparison.found),
    )


def stopped_by(drift: Drift, rules: DriftRules) -> Found | None:
    """The first finding of a kind that stops an update; None where there is none."""
    return next((found for found in drift.found if found.kind in rules.stop), None)


class _Comparison:
    """New rows and rows at hand, and what was found of each kind that was tested.

    Args:
        new: the new rows.
        at_hand: hold-outs, if there are any, and all rows at hand; shifts are measured against the first.
    """

    def __init__(self, new: Side, at_hand: Sequence[Side], rules: DriftRules, seed: int, names: Sequence[str]) -> None:
        self.new, self.old, self.at_hand = new, at_hand[0], at_hand
        self.rules, self.seed, self.names = rules, seed, names
        self.bar = Bar(rules.level, rules.effect)
        self.found: dict[Finding, Found | None] = {}

    def leakage(self, holdout: Table, objective: Objective) -> None:
        """Of every new row, not of those drawn alone."""
        places = np.flatnonzero(np.isin(contents(self.new.table, objective), contents(holdout, objective)))
        self.found["leakage"] = None
        if len(places):
            self.found["leakage"] = sentences.leakage(len(places), len(self.new.table), self._ids(places))

    def near_duplicates(self) -> None:
        """Of the rows drawn; hold-outs first, other rows at hand where there is room."""
        new, old = self.new.first(self.rules.rows), self.old.first(self.rules.rows)
        at_hand = [self.old.features(old)]
        for side in self.at_hand[1:]:
            others = side.first(self.rules.rows - len(old), ~np.isin(side.ids_N, self.old.ids_N))
            at_hand.append(side.features(others))
        old_MD = torch.cat([features for features in at_hand if len(features)])
        near = near_duplicates(self.new.features(new), old_MD, self.rules.similar)
        self.found["near-duplicates"] = None
        if near.p_value < self.rules.level and near.share - near.usual >= _LEAST:
            ids = self._ids(new[near.places.numpy()])
            self.found["near-duplicates"] = sentences.near_duplicates(
                near, len(new), len(old_MD), self.rules.similar, self.rules.level, ids
            )

    def form(self, unknown_token: int | None, pieces: Pieces | None) -> None:
        """Of texts all rows, of numbers those of classes on both sides."""
        text, classified = self.new.is_text, self.new.class_N is not None
        new, old = self._drawn(shared=classified and not text)
        if text:
            words, words_at_hand = read_tokens(self.new.select(new)), read_tokens(self.old.select(old))
            columns = text_columns(words, words_at_hand, unknown_token, pieces)
        else:
            columns = number_columns(self.new.numbers("inputs", new), self.old.numbers("inputs", old), "inputs")
        classes = (self.new.classes(new), self.old.classes(old)) if classified else None
        tested = changes(columns, classes, topics=text, level=self.rules.level, generator=self._generator("form"))
        bar = Bar(self.rules.level, TOPICS) if text and not classified and self.rules.effect < TOPICS else self.bar
        found = [change for change in tested if bar.cleared(change.effect, change.p_value)]
        if tested:
            self.found["form-shift"] = sentences.form_shift(found, bar) if found else None

    def features(self) -> None:
        """Class by class; of all rows where there are no classes."""
        classified = self.new.class_N is not None
        new, old = self._drawn(shared=classified)
        same_new, same_old = balanced(self.new.classes(new), self.old.classes(old))
        new, old = new[same_new], old[same_old]
        shift = None
        if len(new):
            new_ND, old_MD = (side.features(part).double().numpy() for side, part in ((self.new, new), (self.old, old)))
            shift = feature_shift(new_ND, old_MD, self.new.classes(new), self.old.classes(old))
        if shift is not None:
            cleared = self.bar.cleared(shift.effect, shift.p_value)
            names = self.names if classified else None
            self.found["covariate-shift"] = sentences.covariate_shift(shift, names, self.bar) if cleared else None

    def classes(self, known: int, *, every_class: bool) -> None:
        """Which are new, and the shares of the others: of those on both sides, or of every one."""
        new, old = self._drawn(shared=not every_class)
        new_class, old_class = self.new.classes(new), self.old.classes(old)
        shift = label_shift(new_class[new_class < known], old_class[old_class < known], self._generator("labels"))
        if shift is not None:
            cleared = self.bar.cleared(shift.effect, shift.p_value)
            self.found["label-shift"] = sentences.label_shift(shift, self.names, self.bar) if cleared else None
        if known > 0:
            assert self.new.class_N is not None
            classes, counts = np.unique(self.new.class_N[self.new.class_N >= known], return_counts=True)
            most = np.argsort(-counts, kind="stable")
            listed = [(self.names[c], int(count)) for c, count in zip(classes[most], counts[most], strict=True)]
            self.found["unknown-classes"] = None
            if listed:
                self.found["unknown-classes"] = sentences.unknown_classes(
                    int(counts.sum()), len(self.new.table), listed
                )

    def targets(self) -> None:
        """The labels of a regression."""
        new, old = self._drawn(shared=False)
        columns = number_columns(self.new.numbers("labels", new), self.old.numbers("labels", old), "labels")
        tested = changes(columns, None, topics=False, level=self.rules.level, generator=self._generator("labels"))
        found = [change for change in tested if self.bar.cleared(change.effect, change.p_value)]
        if tested:
            self.found["label-shift"] = sentences.target_shift(found, self.bar) if found else None

    def _drawn(self, *, shared: bool) -> tuple[Ints, Ints]:
        """Places on both sides; with ``shared`` of rows of classes that both have."""
        if not shared or self.new.class_N is None or self.old.class_N is None:
            return self.new.first(self.rules.rows), self.old.first(self.rules.rows)
        both = np.intersect1d(self.new.class_N, self.old.class_N)
        new, old = np.isin(self.new.class_N, both), np.isin(self.old.class_N, both)
        return self.new.first(self.rules.rows, new), self.old.first(self.rules.rows, old)

    def _ids(self, places: Ints) -> list[str]:
        return [str(row) for row in self.new.ids_N[places]]

    def _generator(self, name: str) -> np.random.Generator:
        return np.random.default_rng(derive_seed(self.seed, f"drift/{name}"))
