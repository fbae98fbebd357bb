"""One test set or probe of the monitor: its rows, its table, its scores at each update; to a state and back.

Letters: N rows of a test set.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from continual.errors import StreamError
from continual.monitor.bootstrap import Measured
from continual.monitor.metrics import Floats
from continual.owned import owned
from continual.streams.convert import as_table
from continual.table import Table

Scores = dict[str, Tensor]
"""Name of a score → float32 (N,)."""


@dataclass
class MeasuredSet:
    """One test set or probe: where its rows lie, and their scores at each update (name of the score → (N,))."""

    name: str
    rows: Tensor
    table: Table | None = None
    ahead: bool = False
    scores: dict[int, Scores] = field(default_factory=dict)

    def updates(self) -> tuple[int, ...]:
        """At which it was measured, rising; -1 stands for before any."""
        return tuple(sorted(self.scores))

    def at(self, update: int | None, score: str) -> NDArray[np.float32] | None:
        """One score of every row (N,), None where it was not measured."""
        if update is None or update not in self.scores or score not in self.scores[update]:
            return None
        found: NDArray[np.float32] = self.scores[update][score].numpy()
        return found

    def measured(self, score: str, flips_N: Floats | None = None) -> Measured:
        """All measurements of one score, for the bootstrap."""
        updates = tuple(update for update in self.updates() if score in self.scores[update])
        empty = np.empty((0, len(self.rows)), dtype=np.float32)
        rows = [self.scores[update][score].numpy() for update in updates]
        return Measured(updates, np.stack(rows) if rows else empty, flips_N)

    def keep(self, place_K: Tensor) -> None:
        """Give up all other rows, their scores and their data: nothing of them stays in memory."""
        self.rows = self.rows[place_K]
        self.scores = {
            update: {name: score_N[place_K] for name, score_N in scores.items()}
            for update, scores in self.scores.items()
        }
        if self.table is not None:
            self.table = owned(self.table, place_K)

    def trim(self, start: int) -> None:
        """Give up all scores but those at the first update from ``start`` on, and the last ones."""
        kept = {self.first(start), max(self.scores, default=None)}
        self.scores = {update: scores for update, scores in self.scores.items() if update in kept}

    def first(self, start: int) -> int | None:
        """The first update from ``start`` on at which it was measured."""
        return next((update for update in self.updates() if update >= start), None)


def probe_table(name: str, given: Any) -> Table:
    """The rows of a probe as a table.

    Raises:
        StreamError: no rows, or labels that are no numbers.
    """
    table = as_table(given, what=f"probe '{name}'")
    if not len(table):
        raise StreamError(f"probe '{name}' has no rows: give at least one, or leave it out.")
    if "labels" in table.names:
        try:
            table.column("labels")
        except StreamError as error:
            raise StreamError(
                f"probe '{name}' has labels that are no numbers: give class ids, as `class_names` counts them from 0."
            ) from error
    return table


def set_state(one: MeasuredSet) -> dict[str, Any]:
    """Tensors and plain values, without the table."""
    return {
        "name": one.name,
        "rows": one.rows,
        "ahead": one.ahead,
        "updates": list(one.updates()),
        "scores": [named_scores(one.scores[update]) for update in one.updates()],
    }


def set_from_state(state: dict[str, Any]) -> MeasuredSet:
    """What :func:`set_state` gave; the table is put in again by whoever has it."""
    scores = {int(u): scores_from(kept) for u, kept in zip(state["updates"], state["scores"], strict=True)}
    return MeasuredSet(state["name"], state["rows"], None, bool(state["ahead"]), scores)


def finite(score_N: Tensor) -> Tensor:
    """float32 on the CPU, NaN in place of infinities, so that no difference of two of them is taken."""
    score_N = score_N.detach().to("cpu", torch.float32)
    return torch.where(score_N.isfinite(), score_N, torch.nan)


def named_scores(scores: Scores) -> dict[str, Any]:
    """Scores in a form whose keys are plain, since a score's name is not."""
    return {"names": list(scores), "values": list(scores.values())}


def scores_from(kept: dict[str, Any]) -> Scores:
    """What :func:`named_scores` gave."""
    return dict(zip(kept["names"], kept["values"], strict=True))
