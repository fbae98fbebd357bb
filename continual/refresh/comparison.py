"""The comparisons of an update's rows with those at hand, each by itself: what is drawn, what is tested, what is said.

Letters: N new rows, M rows at hand, D features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from continual.kinds import Objective
from continual.randomness import derive_seed
from continual.refresh import sentences
from continual.refresh.copies import contents, near_duplicates
from continual.refresh.form import TOPICS, changes, number_columns, telling
from continual.refresh.labels import disputes, likenesses
from continual.refresh.records import Found
from continual.refresh.rules import DriftRules, Finding
from continual.refresh.sentences import Bar
from continual.refresh.shifts import Floats, Ints, balanced, feature_shift, label_shift
from continual.refresh.sides import Answers, Side
from continual.refresh.wording import Pieces, read_tokens, text_columns
from continual.table import Table

_LEAST = 0.01
"""Share of near-duplicates beyond the usual one from which on they are reported."""


class Comparison:
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
        same_N = np.isin(contents(self.new.table, objective), contents(holdout, objective))
        ids = [str(row) for row in np.sort(self.new.ids_N[same_N])]
        self.found["leakage"] = sentences.leakage(ids, len(self.new.table)) if ids else None

    def near_duplicates(self) -> None:
        """Of the rows drawn; hold-outs first, other rows at hand where there is room."""
        new, old = self.new.first(self.rules.rows), self.old.first(self.rules.rows)
        at_hand = [self.old.features(old)]
        for side in self.at_hand[1:]:
            others = side.first(self.rules.rows - len(old), ~np.isin(side.ids_N, self.old.ids_N))
            at_hand.append(side.features(others))
        if not len(new) or not any(map(len, at_hand)):
            return
        old_MD = torch.cat([features for features in at_hand if len(features)])
        near = near_duplicates(self.new.features(new), old_MD, self.rules.similar)
        self.found["near-duplicates"] = None
        if near.p_value < self.rules.level and near.share - near.usual >= _LEAST:
            ids = [str(row) for row in self.new.ids_N[new[near.places.numpy()]]]
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
        found = telling(found) if text else found
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

    def classes(self, known: int, sizes: Sequence[int], *, every_class: bool) -> None:
        """Which are new, and the shares of the others: of those on both sides, or of every one.

        Where experiences bring other classes, the shares of all their rows together say nothing: those with the same classes
        among the new rows are taken, and of several such sets the one with the most rows. ``sizes`` are rows of each experience.
        """
        new_N, old_M = self.new.class_N, self.old.class_N
        assert new_N is not None and old_M is not None
        fair_M, asked = np.ones(len(old_M), dtype=bool), np.arange(known)
        if not every_class:
            experience_M = np.repeat(np.arange(len(sizes)), sizes) if sizes else np.zeros_like(old_M)
            fair_M, asked = _most_rows_alike(old_M, experience_M, np.intersect1d(new_N, old_M))
        shift = label_shift(
            new_N[self.new.first(self.rules.rows, np.isin(new_N, asked))],
            old_M[self.old.first(self.rules.rows, fair_M & np.isin(old_M, asked))],
            self._generator("labels"),
        )
        if shift is not None:
            cleared = self.bar.cleared(shift.effect, shift.p_value)
            self.found["label-shift"] = sentences.label_shift(shift, self.names, self.bar) if cleared else None
        if known > 0:
            classes, counts = np.unique(new_N[new_N >= known], return_counts=True)
            most = np.argsort(-counts, kind="stable")
            listed = [(self.names[c], int(count)) for c, count in zip(classes[most], counts[most], strict=True)]
            self.found["unknown-classes"] = None
            if listed:
                self.found["unknown-classes"] = sentences.unknown_classes(
                    int(counts.sum()), len(self.new.table), listed
                )

    def labels(self, answers: Answers, right_M: Floats, known: int, accepted: Sequence[str]) -> None:
        """Against what the live version answers; ``right_M``: 1 for hold-out rows that it answers right, 0, or NaN where not known."""
        new_N, old_M = self.new.class_N, self.old.class_N
        assert new_N is not None and old_M is not None and len(old_M) == len(right_M)
        places = self.new.first(self.rules.rows)
        label, logits = new_N[places], self.new.logits(places, answers, known)
        of_known, told_M = label < known, np.isfinite(right_M) & (old_M >= 0)
        answer = logits.argmax(1)
        found = disputes(label[of_known], answer[of_known], old_M[told_M], right_M[told_M] == 1)
        if found is not None:
            named = [one for one in found.classes if self.bar.cleared(one.effect, one.p_value)]
            together = not named and self.bar.cleared(found.effect, found.p_value)
            self.found["disputed-labels"] = None
            if named or together:
                self.found["disputed-labels"] = sentences.disputed_labels(found, named, self.names, self.bar)
        fresh = ~of_known & ~np.isin(label, [place for place, name in enumerate(self.names) if name in accepted])
        if fresh.any():
            own = {}
            for one in np.unique(answer[fresh]).tolist():
                held = self.old.first(self.rules.rows, old_M == one)
                own[one] = self.old.logits(held, answers, known)[:, one]
            likely = likenesses(label[fresh], logits[fresh], own)
            alike = [
                one for one in likely if one.p_value < self.rules.level and one.times >= self.rules.renamed * one.rows
            ]
            if likely:
                self.found["renamed-labels"] = (
                    sentences.renamed_labels(alike, self.names, self.rules) if alike else None
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

    def _generator(self, name: str) -> np.random.Generator:
        return np.random.default_rng(derive_seed(self.seed, f"drift/{name}"))


def _most_rows_alike(class_M: Ints, experience_M: Ints, among: Ints) -> tuple[NDArray[np.bool_], Ints]:
    """Rows of experiences that have the same of the classes ``among``, bool (M,), and these classes."""
    rows: dict[tuple[int, ...], list[int]] = {}
    for experience in np.unique(experience_M):
        have = np.intersect1d(class_M[experience_M == experience], among)
        rows.setdefault(tuple(have.tolist()), []).append(int(experience))
    size = {
        have: int(np.isin(class_M[np.isin(experience_M, at)], have).sum()) for have, at in rows.items() if len(have) > 1
    }
    if not size:
        return np.zeros(len(class_M), dtype=bool), among[:0]
    chosen = max(size, key=lambda have: (size[have], have))
    return np.isin(experience_M, rows[chosen]), np.array(chosen, dtype=np.int64)
