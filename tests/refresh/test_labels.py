"""Disputed and renamed labels: against slow references, and how often they are found where nothing is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from store_bench import grown

from continual.refresh.labels import disputes, likenesses
from continual.refresh.live import Live


def rows_of(counts: list[tuple[int, int]], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Class ids and whether each row is answered right, of so many rows of each class and so many wrong ones, mixed."""
    ids = np.concatenate([np.full(rows, label) for label, (rows, _) in enumerate(counts)])
    right = np.concatenate([np.arange(rows) >= wrong for rows, wrong in counts])
    order = np.random.default_rng(seed).permutation(len(ids))
    return ids[order], right[order]


def test_disputes_are_fishers_and_mantels() -> None:
    new, held = [(50, 41), (20, 3), (4, 4), (30, 0), (9, 0)], [(60, 2), (25, 2), (50, 0), (40, 3), (9, 0)]
    label_N, right_N = rows_of(new, 0)
    held_M, right_M = rows_of(held, 1)
    answer_N = np.where(right_N, label_N, (label_N + 1) % 5)
    answer_N[np.flatnonzero((label_N == 0) & ~right_N)[:5]] = 3
    found = disputes(label_N, answer_N, held_M, right_M)
    assert found is not None and [one.label for one in found.classes] == [0, 1, 4, 3], "class 2 has four rows"
    first = found.classes[0]
    assert (first.answer, first.times, first.wrong, first.rows, first.held_wrong, first.held) == (1, 36, 41, 50, 2, 60)
    assert first.effect == pytest.approx(41 / 50 - 2 / 60)
    p_values, over, spread, excess, total = [], 0.0, 0.0, 0.0, 0
    for label in (0, 1, 3, 4):
        (rows, wrong), (others, bad) = new[label], held[label]
        p_values.append(stats.fisher_exact([[wrong, rows - wrong], [bad, others - bad]], alternative="greater").pvalue)
        count_k = np.arange(rows + 1)
        chance_k = stats.hypergeom(rows + others, wrong + bad, rows).pmf(count_k)
        mean = float(chance_k @ count_k)
        over, spread = over + wrong - mean, spread + float(chance_k @ (count_k - mean) ** 2)
        excess, total = excess + rows * (wrong / rows - bad / others), total + rows
    ranked = sorted(p_values)
    holms = [min(1.0, max((4 - k) * p for k, p in enumerate(ranked[: place + 1]))) for place in range(4)]
    own = {label: holms[ranked.index(p)] for label, p in zip((0, 1, 3, 4), p_values, strict=True)}
    for one in found.classes:
        assert one.p_value == pytest.approx(min(1.0, 2 * own[one.label])), one
    assert found.p_value == pytest.approx(2 * stats.norm.sf(over / spread**0.5)) and found.effect == pytest.approx(
        excess / total
    )


def test_nothing_is_said_of_too_few_rows() -> None:
    four, many = np.zeros(4, dtype=np.int64), np.zeros(60, dtype=np.int64)
    assert disputes(four, four + 1, many, many == 0) is None and disputes(many, many + 1, four, four == 0) is None
    assert disputes(many[:0], many[:0], many, many == 0) is None
    assert likenesses(four + 2, np.eye(3)[four], {0: np.zeros(60)}) == [] == likenesses(many + 2, np.eye(3)[many], {})
    same = disputes(many, many, many, many == 0)
    assert same is not None and same.p_value == same.classes[0].p_value == 1.0


def test_ordinary_months_raise_few_alarms() -> None:
    generator, alarms = np.random.default_rng(0), np.zeros(2)
    rates = np.linspace(0, 0.6, 20)
    for _ in range(400):
        label_N, held_M = (generator.integers(0, 20, size) for size in (500, 400))
        wrong_N, right_M = generator.random(500) < rates[label_N], generator.random(400) >= rates[held_M]
        found = disputes(label_N, np.where(wrong_N, (label_N + 1) % 20, label_N), held_M, right_M)
        assert found is not None
        alarms += [min(one.p_value for one in found.classes) < 0.05, found.p_value < 0.05]
    assert (alarms <= 0.04 * 400).all(), "half of the level each, and some more by chance"


def test_likeness_counts_rows_that_are_as_sure_as_nine_in_ten_of_the_class_itself() -> None:
    own = {0: np.arange(100.0), 1: np.arange(100.0)}
    logits = np.array([[9.0, 0.0]] * 18 + [[8.9, 0.0]] * 2 + [[0.0, 5.0]] * 12)
    label = np.array([5] * 20 + [6] * 12)
    first, second = likenesses(label, logits, own)
    assert (first.label, first.answer, first.times, first.rows) == (5, 0, 18, 20)
    assert (second.label, second.answer, second.times, second.rows) == (6, 1, 0, 12)
    raw = stats.binomtest(18, 20, 0.5, alternative="greater").pvalue
    assert first.p_value == pytest.approx(min(1.0, 2 * raw)) and second.p_value == 1.0


def test_answers_are_those_of_the_version_whether_features_are_at_hand_or_not(tmp_path: Path) -> None:
    learner = grown(tmp_path, 2).learner(device="cpu")
    assert learner.monitor is not None
    live, table = Live(learner), learner.monitor.tables()[0]
    found = live.answers(table, live.features(table))
    torch.testing.assert_close(found, live.answers(table, None))
    torch.testing.assert_close(found.softmax(1), learner.predict(table)["scores"])
    learner.model.head.reads_inputs = True  # type: ignore[union-attr, assignment]
    with pytest.raises(RuntimeError, match="shapes"):
        live.answers(table, live.features(table))  # asks the whole model, whose head now reads inputs of another width
    first = live.right()[0]
    assert first is not None and first.tolist() == (found.argmax(1) == table.column("labels")).float().tolist()
