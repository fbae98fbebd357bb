"""New rows against rows at hand: what must be found, and what must not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from drift_bench import (
    UNKNOWN,
    Rows,
    blobs,
    doubled,
    goes_on,
    labels_of,
    misspelt,
    numbers,
    shuffled,
    texts,
    topic_rows,
    unreadable,
)
from scipy.stats import ks_2samp

from continual.errors import StreamError
from continual.refresh.drift import compare, stopped_by
from continual.refresh.records import Drift, Found
from continual.refresh.rules import DriftRules
from continual.table import IGNORED, Ragged, Table, TensorTable, View, concat

NAMES = [f"topic {number}" for number in range(40)]


def drift_of(new: Table, holdouts: list[Table], known: int, **options: Any) -> Drift:
    settings: dict[str, Any] = {
        "reference": concat(holdouts) if holdouts else None,
        "features": None,
        "class_names": NAMES,
        "rules": DriftRules(),
        "seed": 0,
        "unknown_token": UNKNOWN,
        "pieces": goes_on,
    }
    return compare(new, holdouts=holdouts, known=known, **{**settings, **options})


def inputs(rows: Table) -> torch.Tensor:
    return rows.column("inputs")


def found(drift: Drift, kind: str) -> Found:
    return next(one for one in drift.found if one.kind == kind)


def kinds(drift: Drift) -> list[str]:
    return [one.kind for one in drift.found]


def known(drift: Drift) -> list[str]:
    return [one.kind for one in drift.known]


# --- the form of texts


def test_ordinary_months_of_new_topics_are_no_news() -> None:
    for seed in range(5):
        drift = drift_of(texts(range(10, 18), seed, 10_000), [texts(range(10), seed, 0)], 10)
        assert kinds(drift) == [] and known(drift) == ["unknown-classes"]
        assert drift.tested == ("leakage", "form-shift", "unknown-classes")


@pytest.mark.parametrize("topics", [range(10, 18), range(8), [0, 1, 2, 3, *range(10, 16)]])
@pytest.mark.parametrize(
    ("change", "column", "says"),
    [
        (doubled, "length", "rows are 1.8 times as long (2"),
        (shuffled, "word order", "of neighbouring tokens stand in their usual order against 100 %"),
        (misspelt, "word pieces", "of the tokens go on a word against 1."),
        (unreadable, "unknown tokens", " % unknown tokens against 0 %"),
    ],
)
def test_drifted_wording_is_found_and_named(
    topics: list[int], change: Callable[[Rows], Rows], column: str, says: str
) -> None:
    at_hand: list[Table] = [texts(range(10), 0, 0)]
    ordinary = drift_of(texts(topics, 1, 10_000), at_hand, 10)
    assert "form-shift" in ordinary.tested and "form-shift" not in kinds(ordinary)
    drifted = found(drift_of(texts(topics, 1, 10_000, change), at_hand, 10), "form-shift")
    assert drifted.p_value is not None and drifted.p_value < 0.01 and drifted.effect > 0.3
    assert drifted.names[0] == column and says in drifted.sentence
    assert len(drifted.names) == 1 or change is misspelt  # misspelt rows are longer as well
    assert f"size {drifted.effect:.2f} of 1, reported from 0.1 on; p < 0.001, reported below 0.01" in drifted.sentence


def test_topics_that_differ_in_length_are_no_news_where_rows_alone_would_be() -> None:
    def terse(topic: int) -> float:
        return 2.0 + 0.5 * ((topic * 7) % 10)

    new, old = texts([11, 14, 15, 17, 18], 0, 10_000, phrases=terse), texts(range(10), 0, 0, phrases=terse)
    by_rows = ks_2samp(new.lengths, old.lengths)
    assert by_rows.pvalue < 1e-6 and by_rows.statistic > 0.1
    drift = drift_of(new, [old], 10)
    assert "form-shift" in drift.tested and "form-shift" not in kinds(drift)


def test_too_few_topics_tell_nothing() -> None:
    assert "form-shift" not in drift_of(texts([10, 11], 0, 10_000, doubled), [texts([0, 1, 2], 0, 0)], 3).tested


def test_wording_of_rows_without_classes_counts_from_what_topics_do_alone() -> None:
    def spoken(topic: int, phrases: float, first_id: int) -> TensorTable:
        rows = topic_rows(topic, 300, first_id, phrases)
        ragged = Ragged.from_lists(rows, 0)
        return TensorTable({"input_ids": ragged, "labels": ragged, "row": torch.arange(first_id, first_id + 300)})

    slight = drift_of(spoken(1, 4.7, 1000), [spoken(0, 4.0, 0)], 0, objective="causal-lm")
    assert slight.found == () and slight.tested == ("leakage", "form-shift")
    large = drift_of(spoken(1, 9.0, 1000), [spoken(0, 4.0, 0)], 0, objective="causal-lm")
    assert kinds(large) == ["form-shift"] and "reported from 0.3 on" in large.found[0].sentence


# --- labels


def test_classes_not_known_before_are_named_the_largest_first() -> None:
    new = blobs(labels_of({0: 30, 5: 3, 6: 7}), 1000, 1)
    at_hand: list[Table] = [blobs(labels_of({0: 50, 1: 50}), 0, 0)]
    (one,) = drift_of(new, at_hand, 2).known
    assert one.names == ("topic 6", "topic 5") and one.rows == 10 and one.effect == 0.25 and one.p_value is None
    assert "'topic 6' (7 rows), 'topic 5' (3 rows)" in one.sentence
    stops = drift_of(new, at_hand, 2, rules=DriftRules(stop=["unknown-classes"]))
    assert stops.known == () and found(stops, "unknown-classes") == one
    assert "unknown-classes" not in drift_of(new, at_hand, 0).tested


def test_shares_of_known_classes_are_compared() -> None:
    at_hand: list[Table] = [blobs(labels_of({0: 100, 1: 100, 2: 100}), 0, 0)]
    same = drift_of(blobs(labels_of({0: 52, 1: 46, 2: 49, 3: 300}), 1000, 1), at_hand, 3)
    assert "label-shift" in same.tested and "label-shift" not in kinds(same)
    other = found(drift_of(blobs(labels_of({0: 120, 1: 20, 2: 40, 3: 300}), 1000, 1), at_hand, 3), "label-shift")
    assert other.names[0] == "topic 0" and "'topic 0' is 67 % of the new rows and was 33 %" in other.sentence
    assert other.effect == pytest.approx(1 / 3 - 0.05, abs=0.02) and other.rows == 180


def test_experiences_with_other_classes_do_not_make_a_shift() -> None:
    """Class 0 came three times and class 1 once: all their rows together are no month."""
    at_hand: list[Table] = [
        blobs(labels_of({0: 100, 1: 100}), 0, 0),
        blobs(labels_of({0: 100, 2: 100}), 1000, 1),
        blobs(labels_of({0: 100, 3: 80}), 2000, 2),
    ]
    drift = drift_of(blobs(labels_of({0: 100, 1: 100, 5: 10}), 9000, 3), at_hand, 4)
    assert "label-shift" in drift.tested and "label-shift" not in kinds(drift)
    assert "label-shift" in kinds(drift_of(blobs(labels_of({0: 100, 1: 30}), 9000, 3), at_hand, 4))


def test_a_class_that_stays_away_is_news_where_every_month_has_all_of_them() -> None:
    new, at_hand = blobs(labels_of({0: 100, 1: 100}), 1000, 1), [blobs(labels_of({0: 100, 1: 100, 2: 100}), 0, 0)]
    assert "label-shift" not in kinds(drift_of(new, at_hand, 3))
    assert found(drift_of(new, at_hand, 3, scenario="domain"), "label-shift").names[0] == "topic 2"


# --- labels and what the live version answers

CENTRES = np.random.default_rng(99).normal(size=(40, 6)) * 5


def nearest(known: int) -> Callable[[Table, torch.Tensor | None], torch.Tensor]:
    """Answers of a model that knows the places of the first classes (of :func:`drift_bench.blobs`)."""
    centres = torch.tensor(CENTRES[:known], dtype=torch.float32)
    return lambda rows, _: -(inputs(rows)[:, None] - centres).square().sum(2)


def asked(new: Table, counts: dict[int, int], wrong: int = 0, **options: Any) -> Drift:
    """Against hold-out rows of these classes, the first ``wrong`` of which are answered wrong."""
    held = blobs(labels_of(counts), 0, 0)
    right = np.ones(len(held))
    right[:wrong] = 0
    known = options.pop("known", len(counts))
    return drift_of(new, [held], known, answers=nearest(known), right=[right], **options)


def relabelled(new: TensorTable, **changed: int) -> TensorTable:
    """With other labels: ``_1=2`` calls the rows of class 1 rows of class 2."""
    labels = new.column("labels")
    given = labels.clone()
    for old, label in changed.items():
        given[labels == int(old[1:])] = label
    return TensorTable({**new.columns, "labels": given})


@pytest.mark.parametrize("features", [inputs, None])
def test_swapped_labels_are_named(features: Any) -> None:
    at_hand = {0: 60, 1: 60, 2: 60, 3: 60}
    new = blobs(labels_of({0: 50, 1: 50, 2: 40}), 1000, 1)
    ordinary = asked(new, at_hand, features=features)
    assert "disputed-labels" in ordinary.tested and "disputed-labels" not in kinds(ordinary)
    drift = asked(relabelled(new, _0=1, _1=0), at_hand, wrong=2, features=features)
    one = found(drift, "disputed-labels")
    assert drift.found[0] == one and one.names == ("topic 1", "topic 0") and one.rows == 100
    assert (
        "to the live version, rows labelled 'topic 1' look like 'topic 0' (50 of 50; of its hold-out rows 0 of 60"
        in (one.sentence)
    )
    assert (
        "'topic 0' look like 'topic 1' (50 of 50; of its hold-out rows 2 of 60 look like another class)" in one.sentence
    )
    assert one.effect == 1.0 and one.p_value is not None and one.p_value < 1e-6
    large = asked(relabelled(new, _0=1, _1=0), at_hand, features=features, rules=DriftRules(effect=0.999, level=1e-300))
    assert "disputed-labels" not in kinds(large) and "disputed-labels" in large.tested


def test_a_class_that_the_live_version_is_bad_at_is_no_news() -> None:
    new = blobs(labels_of({0: 40, 1: 40}), 1000, 1)
    new.columns["labels"][:12] = 1
    at_hand = {0: 60, 1: 60}
    assert "disputed-labels" in kinds(asked(new, at_hand))
    held = blobs(labels_of(at_hand), 0, 0)
    right = np.ones(120)
    right[60:76] = 0
    assert "disputed-labels" not in kinds(drift_of(new, [held], 2, answers=nearest(2), right=[right]))
    untold = drift_of(new, [held], 2, answers=nearest(2), right=[None])
    assert "disputed-labels" not in untold.tested


def test_labels_mixed_up_in_many_classes_of_few_rows_are_seen_together() -> None:
    counts = dict.fromkeys(range(40), 6)
    new, generator = blobs(labels_of(counts), 1000, 1), np.random.default_rng(0)
    assert "disputed-labels" not in kinds(asked(new, counts))
    some = torch.tensor(generator.permutation(240)[:48])
    new.columns["labels"][some] = torch.tensor(generator.integers(0, 40, 48))
    one = found(asked(new, counts), "disputed-labels")
    assert "rows of many labels look like other classes, most of all: rows labelled" in one.sentence
    assert one.effect == pytest.approx(0.2, abs=0.03) and 40 < one.rows <= 48


def test_a_known_class_by_another_name_is_named_and_a_new_one_is_not() -> None:
    at_hand = {0: 60, 1: 60, 2: 60}
    new = blobs(labels_of({1: 50, 7: 50, 0: 9}), 1000, 0)
    drift = asked(relabelled(new, _1=8), at_hand)
    one = found(drift, "renamed-labels")
    assert one.names == ("topic 8",) and 0.8 <= one.effect <= 1 and one.p_value is not None and one.p_value < 1e-4
    assert f"the new label 'topic 8' looks like the known 'topic 1' ({one.rows} of 50 rows)" in one.sentence
    assert "renamed-labels" not in kinds(asked(new, at_hand)) and "renamed-labels" in asked(new, at_hand).tested
    for rules in (DriftRules(renamed=1.0), DriftRules(level=1e-30)):
        assert "renamed-labels" not in kinds(asked(relabelled(new, _1=8), at_hand, rules=rules))
    assert "renamed-labels" not in kinds(asked(relabelled(new, _1=8), at_hand, accepted=["topic 8"]))
    assert stopped_by(drift, DriftRules(stop=["renamed-labels"])) == one
    few = asked(relabelled(blobs(labels_of({1: 4}), 1000, 1), _1=8), at_hand)
    assert "renamed-labels" not in few.tested


def test_labels_are_not_asked_about_where_tasks_do_not_compete() -> None:
    new = relabelled(blobs(labels_of({0: 50, 1: 50}), 1000, 1), _0=1, _1=0)
    assert "disputed-labels" not in asked(new, {0: 60, 1: 60}, scenario="task").tested


# --- features


def test_covariate_shift_is_measured_class_by_class() -> None:
    at_hand: list[Table] = [blobs(labels_of({0: 150, 1: 30, 2: 60}), 0, 0)]
    mixture = drift_of(blobs(labels_of({0: 30, 1: 150, 2: 60, 9: 200}), 1000, 1), at_hand, 3, features=inputs)
    assert "covariate-shift" in mixture.tested and "form-shift" in mixture.tested
    assert kinds(mixture) == ["label-shift"] and known(mixture) == ["unknown-classes"]
    moved = drift_of(blobs(labels_of({0: 100, 1: 20, 2: 40}), 1000, 1, move=1.0), at_hand, 3, features=inputs)
    shift = found(moved, "covariate-shift")
    assert shift.rows == 160 and set(shift.names) == {"topic 0", "topic 1", "topic 2"} and shift.effect > 0.3
    assert "form-shift" in kinds(moved) and found(moved, "form-shift").names[0].startswith("inputs[")


def test_the_class_that_moved_is_named_first() -> None:
    def pulled(rows: Table) -> torch.Tensor:
        features_ND = inputs(rows).clone()
        features_ND[(rows.column("labels") == 1) & (rows.column("row") >= 1000)] += 2.0
        return features_ND

    labels = labels_of({0: 100, 1: 100, 2: 100})
    drift = drift_of(blobs(labels, 1000, 1), [blobs(labels, 0, 0)], 3, features=pulled)
    assert found(drift, "covariate-shift").names[0] == "topic 1" and "form-shift" not in kinds(drift)


def test_nothing_is_said_of_features_where_all_classes_are_new() -> None:
    new, at_hand = blobs(labels_of({5: 100, 6: 100}), 1000, 1, move=9.0), [blobs(labels_of({0: 100, 1: 100}), 0, 0)]
    drift = drift_of(new, at_hand, 2, features=inputs)
    assert drift.tested == ("leakage", "near-duplicates", "unknown-classes") and kinds(drift) == []
    assert known(drift) == ["unknown-classes"]


def test_few_rows_are_not_tested() -> None:
    at_hand: list[Table] = [blobs(labels_of({0: 100, 1: 100, 2: 100}), 0, 0)]
    drift = drift_of(blobs(labels_of({0: 10, 1: 10, 2: 4}), 1000, 1, move=5.0), at_hand, 3, features=inputs)
    assert drift.tested == ("leakage", "near-duplicates", "unknown-classes")


def test_shifts_are_measured_against_hold_outs_and_not_against_a_choosy_memory() -> None:
    labels = labels_of({0: 100, 1: 100})
    herded = blobs(labels, 5000, 5, spread=0.05)
    held: Table = blobs(labels, 0, 0)
    new = blobs(labels, 1000, 1)
    assert kinds(drift_of(new, [held], 2, features=inputs, reference=concat([herded, held]))) == []
    alone = compare(new, herded, holdouts=[], features=inputs, class_names=NAMES, known=2, rules=DriftRules(), seed=0)
    assert "covariate-shift" in kinds(alone) and "leakage" not in alone.tested


# --- regression and language models


def test_labels_and_features_of_a_regression() -> None:
    def measured(first_id: int, seed: int, move: float, lift: float) -> TensorTable:
        generator = np.random.default_rng(seed)
        return numbers(
            generator.normal(size=(200, 3)) + move, generator.normal(size=200).astype(np.float32) + lift, first_id
        )

    at_hand: list[Table] = [measured(0, 0, 0.0, 0.0)]
    options: dict[str, Any] = {"objective": "regression", "features": inputs}
    same = drift_of(measured(1000, 1, 0.0, 0.0), at_hand, 0, **options)
    assert same.found == ()
    assert same.tested == ("leakage", "near-duplicates", "form-shift", "covariate-shift", "label-shift")
    lifted = drift_of(measured(1000, 1, 0.0, 2.0), at_hand, 0, **options)
    assert kinds(lifted) == ["label-shift"] and lifted.found[0].names == ("labels[0]",)
    assert "labels[0] has mean 1.86 and standard deviation 1.08 against" in lifted.found[0].sentence
    assert kinds(drift_of(measured(1000, 1, 1.0, 0.0), at_hand, 0, **options)) == ["form-shift", "covariate-shift"]


# --- rows that are there already


def test_rows_with_the_content_of_a_hold_out_row_are_named_whatever_their_form() -> None:
    held = texts(range(10), 0, 0)
    new = texts(range(10), 1, 1000)
    index_B = torch.tensor([7, 300, 50])
    leaked = {**held[index_B], "row": torch.tensor([9002, 9001, 9003])}
    padded = TensorTable(dict(leaked))
    drift = drift_of(concat([new, padded]), [held], 10)
    assert kinds(drift) == ["leakage"] and drift.found[0].rows == 3
    assert drift.found[0].names == ("9001", "9002", "9003")
    assert kinds(drift_of(new, [held], 10)) == []
    with_text = TensorTable({**held.columns, "text": [str(row) for row in range(len(held))]})
    assert found(drift_of(concat([new, padded]), [with_text], 10), "leakage").rows == 3


def test_an_answer_is_content_too_and_other_labels_are_not() -> None:
    def asked(prompts: Rows, answers: Rows, first_id: int) -> TensorTable:
        return TensorTable(
            {
                "input_ids": Ragged.from_lists(prompts, 0),
                "labels": Ragged.from_lists(answers, IGNORED),
                "row": torch.arange(first_id, first_id + len(prompts)),
            }
        )

    held = asked([[5, 6], [7, 8, 9]], [[1], [2, 3]], 0)
    new = asked([[5, 6], [7, 8, 9]], [[2, 3], [2, 3]], 10)
    assert drift_of(new, [held], 0, objective="seq2seq").found[0].names == ("11",)
    same = blobs(labels_of({0: 3}), 0, 0)
    relabelled = numbers(inputs(same).numpy(), labels_of({1: 3}), 10)
    assert found(drift_of(relabelled, [same], 2), "leakage").rows == 3


def test_near_duplicates_are_found_in_hold_outs_and_in_the_memory() -> None:
    generator = np.random.default_rng(0)
    labels = labels_of({0: 60, 1: 60})
    held, memory = (numbers(generator.normal(size=(120, 16)), labels, first_id) for first_id in (0, 500))
    for origin in (held, memory):
        fresh = generator.normal(size=(120, 16))
        fresh[:12] = origin.column("inputs")[:12] * 1.5 + 0.01
        new = numbers(fresh, labels, 1000)
        drift = drift_of(new, [held], 2, features=inputs, reference=concat([memory, held]))
        near = found(drift, "near-duplicates")
        assert near.rows == 12 and near.effect == 0.1 and "leakage" not in kinds(drift)
        assert set(near.names) == {str(row) for row in range(1000, 1012)}
        assert drift.reference == 240
        strict = DriftRules(similar=0.9999999)
        assert "near-duplicates" not in kinds(drift_of(new, [held], 2, features=inputs, rules=strict))
    assert "near-duplicates" not in kinds(drift_of(new, [held], 2, features=inputs))


@pytest.mark.parametrize(
    ("rows", "copies", "reported"), [(40, 2, False), (40, 12, True), (1500, 9, False), (1500, 30, True)]
)
def test_near_duplicates_must_be_more_than_usual_and_more_than_trifles(rows: int, copies: int, reported: bool) -> None:
    generator = np.random.default_rng(1)
    held = numbers(generator.normal(size=(rows, 24)), labels_of({0: rows}), 0)
    fresh = generator.normal(size=(rows, 24))
    fresh[:copies] = inputs(held)[:copies] * 2
    drift = drift_of(
        numbers(fresh, labels_of({0: rows}), 5000), [held], 1, features=inputs, rules=DriftRules(rows=2000)
    )
    assert ("near-duplicates" in kinds(drift)) == reported


def test_features_in_which_all_rows_are_near_say_nothing() -> None:
    def flat(rows: Table) -> torch.Tensor:
        return inputs(rows) + 1000.0

    labels = labels_of({0: 60, 1: 60})
    drift = drift_of(blobs(labels, 1000, 1), [blobs(labels, 0, 0)], 2, features=flat)
    assert "near-duplicates" in drift.tested and "near-duplicates" not in kinds(drift)


# --- the whole


def test_the_first_update_has_nothing_to_be_compared_with() -> None:
    assert drift_of(blobs(labels_of({0: 50}), 0, 0), [], 0) == Drift()
    assert drift_of(blobs(labels_of({0: 50}), 0, 0), [blobs(labels_of({}), 9, 0)], 0, reference=None) == Drift()


def test_the_same_seed_gives_the_same_answer_whatever_the_order_of_the_rows() -> None:
    labels = labels_of({0: 90, 1: 90, 2: 90, 7: 40})
    new, held = blobs(labels, 1000, 1, move=0.4), blobs(labels[:270], 0, 0)
    options: dict[str, Any] = {"features": inputs, "rules": DriftRules(rows=150)}
    first = drift_of(new, [held], 3, **options)
    mixed = [View(part, torch.randperm(len(part), generator=torch.Generator().manual_seed(3))) for part in (new, held)]
    assert drift_of(mixed[0], [mixed[1]], 3, **options) == first
    assert drift_of(new, [held], 3, **options, seed=1) != first
    wordy = [texts(range(10), 0, 0)], 10
    assert drift_of(texts(range(10, 18), 1, 9000, doubled), *wordy) == drift_of(
        texts(range(10, 18), 1, 9000, doubled), *wordy
    )


def test_so_many_rows_of_a_side_are_looked_at_and_no_row_twice() -> None:
    asked: list[int] = []

    def counted(rows: Table) -> torch.Tensor:
        asked.extend(rows.column("row").tolist())
        return inputs(rows)

    labels = labels_of({0: 200, 1: 200})
    new, held = blobs(labels, 1000, 1), blobs(labels, 0, 0)
    drift = drift_of(new, [held], 2, features=counted, rules=DriftRules(rows=70))
    assert drift.new == 70 and drift.reference == 70
    assert len(asked) == len(set(asked)) == 140
    memory = blobs(labels, 5000, 2)
    drift = drift_of(new, [held], 2, features=counted, rules=DriftRules(rows=500), reference=concat([memory, held]))
    assert drift.new == 400 and drift.reference == 500


def test_a_shift_must_be_certain_and_large() -> None:
    labels = labels_of({0: 200, 1: 200})
    new, held = blobs(labels, 1000, 1, move=0.4), blobs(labels, 0, 0)
    shift = found(drift_of(new, [held], 2, features=inputs), "covariate-shift")
    assert shift.p_value is not None
    certain = DriftRules(level=shift.p_value)
    assert "covariate-shift" not in kinds(drift_of(new, [held], 2, features=inputs, rules=certain))
    assert "covariate-shift" in kinds(drift_of(new, [held], 2, features=inputs, rules=DriftRules(effect=shift.effect)))
    large = DriftRules(effect=shift.effect + 1e-6)
    assert "covariate-shift" not in kinds(drift_of(new, [held], 2, features=inputs, rules=large))


def test_the_first_finding_of_a_kind_that_stops_is_given() -> None:
    drift = Drift(
        found=(
            Found(kind="leakage", sentence="a", effect=0.1),
            Found(kind="form-shift", sentence="b", effect=0.5),
            Found(kind="unknown-classes", sentence="c", effect=1.0),
        )
    )
    assert stopped_by(drift, DriftRules()) is None
    assert stopped_by(drift, DriftRules(stop=["covariate-shift"])) is None
    assert stopped_by(drift, DriftRules(stop=["unknown-classes", "form-shift"])) == drift.found[1]


def test_rows_without_a_label_are_in_no_draw() -> None:
    new, held = blobs(labels_of({0: 60, 1: 60}), 1000, 1), blobs(labels_of({0: 60, 1: 60}), 0, 0)
    new.columns["labels"] = new.column("labels").masked_fill(torch.arange(120) % 2 == 0, IGNORED)
    assert drift_of(new, [held], 2, features=inputs).new == 60
    new.columns["labels"] = torch.full((120,), IGNORED)
    assert drift_of(new, [held], 2, features=inputs).tested == ("leakage", "unknown-classes")


def test_rows_that_cannot_be_compared_are_refused_in_a_sentence() -> None:
    labels = labels_of({0: 60, 1: 60})
    bare = TensorTable({"labels": torch.tensor(labels), "row": torch.arange(120)})
    with pytest.raises(StreamError, match="the new rows have no tokens"):
        drift_of(bare, [blobs(labels, 0, 0)], 2)
    with pytest.raises(StreamError, match="1 of 120 new rows have features that are not finite"):
        broken = blobs(labels, 1000, 1)
        broken.column("inputs")[3, 2] = torch.nan
        drift_of(broken, [blobs(labels, 0, 0)], 2, features=inputs)
