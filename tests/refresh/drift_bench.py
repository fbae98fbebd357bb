"""Texts of a small made-up language, with topics, and the ways in which their wording can drift.

A row is ``[CLS]``, some phrases of two tokens that stand in one order only, words of its topic between them, ``[SEP]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from continual.table import Ragged, TensorTable

CLS, SEP, UNKNOWN = 1, 2, 3
PIECES_FROM = 5000
"""Token ids from here on go on a word."""
Rows = list[list[int]]


def goes_on(ids: torch.Tensor) -> torch.Tensor:
    return ids >= PIECES_FROM


def topic_rows(topic: int, rows: int, seed: int, phrases: float = 4.0) -> Rows:
    """Rows of a topic, with so many phrases on average."""
    generator = np.random.default_rng([topic, seed])
    made = []
    for _ in range(rows):
        row = [CLS]
        for phrase in generator.integers(0, 12, 1 + generator.poisson(phrases - 1)).tolist():
            row += [10 + 2 * phrase, 11 + 2 * phrase, 100 + 20 * topic + int(generator.integers(0, 20))]
            if generator.random() < 0.05:
                row.append(PIECES_FROM + int(generator.integers(0, 50)))
        made.append([*row, SEP])
    return made


def table(rows: Rows, labels: list[int], first_id: int) -> TensorTable:
    return TensorTable(
        {
            "input_ids": Ragged.from_lists(rows, 0),
            "labels": torch.tensor(labels),
            "row": torch.arange(first_id, first_id + len(rows)),
        }
    )


def numbers(inputs_NC: NDArray[Any], labels_N: NDArray[Any], first_id: int) -> TensorTable:
    return TensorTable(
        {
            "inputs": torch.tensor(inputs_NC, dtype=torch.float32),
            "labels": torch.tensor(labels_N),
            "row": torch.arange(first_id, first_id + len(labels_N)),
        }
    )


def doubled(rows: Rows) -> Rows:
    return [row[:-1] + other[1:] for row, other in zip(rows, rows[1:] + rows[:1], strict=True)]


def shuffled(rows: Rows) -> Rows:
    generator = np.random.default_rng(0)
    return [[CLS, *generator.permutation(row[1:-1]).tolist(), SEP] for row in rows]


def misspelt(rows: Rows) -> Rows:
    """A fifth of the words fall to pieces."""
    generator = np.random.default_rng(0)

    def spelt(token: int) -> list[int]:
        if token in (CLS, SEP) or generator.random() > 0.2:
            return [token]
        return [token, PIECES_FROM + int(generator.integers(0, 50))]

    return [[piece for token in row for piece in spelt(token)] for row in rows]


def unreadable(rows: Rows) -> Rows:
    """An eighth of the words are unknown."""
    generator = np.random.default_rng(0)
    return [[UNKNOWN if token > SEP and generator.random() < 0.125 else token for token in row] for row in rows]


def texts(
    topics: Iterable[int],
    seed: int,
    first_id: int,
    change: Callable[[Rows], Rows] = lambda rows: rows,
    phrases: Callable[[int], float] = lambda topic: 4.0,
) -> TensorTable:
    """Sixty rows of each topic, changed in some way."""
    chosen = list(topics)
    rows = [row for topic in chosen for row in topic_rows(topic, 60, seed, phrases(topic))]
    return table(change(rows), [topic for topic in chosen for _ in range(60)], first_id)


def labels_of(counts: dict[int, int]) -> NDArray[np.int64]:
    """So many rows of each class."""
    return np.repeat(np.array(list(counts), dtype=np.int64), list(counts.values()))


def blobs(labels_N: NDArray[np.int64], first_id: int, seed: int, move: float = 0.0, spread: float = 1.0) -> TensorTable:
    """Classes at different places of six dimensions; ``move`` shifts all of them, ``spread`` is that around their means."""
    generator = np.random.default_rng([seed, first_id])
    centres = np.random.default_rng(99).normal(size=(40, 6)) * 5
    return numbers(centres[labels_N] + generator.normal(size=(len(labels_N), 6)) * spread + move, labels_N, first_id)
