"""One side of a comparison: which of its rows are looked at, and what is read of them.

Letters: N rows, X rows drawn, D features.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from continual.errors import StreamError, quoted
from continual.kinds import Objective
from continual.parts.replay.select import row_keys
from continual.randomness import derive_seed
from continual.refresh.shifts import Floats, Ints
from continual.table import Table

Features = Callable[[Table], Tensor]
Answers = Callable[[Table, Tensor | None], Tensor]
"""Logits float32 (N, K) of rows, given their features where there are any."""


class Side:
    """Rows of one side, in an order of keys hashed from their ids.

    Args:
        table: with ``row``, ``labels`` and either ``input_ids`` or ``inputs``.
        features: float32 (N, D) of rows; asked for each row that is drawn once.
        objective: of a classification, rows without a label are in no draw.
        seed: of the keys.
        what: how sentences call these rows.

    Attributes:
        ids_N: row ids.
        class_N: class ids, -1 for rows without one; None where there are no classes.

    Raises:
        StreamError: neither tokens nor inputs.
    """

    def __init__(self, table: Table, features: Features | None, objective: Objective, seed: int, what: str) -> None:
        if not {"input_ids", "inputs"} & set(table.names):
            raise StreamError(
                f"the {what} rows have no tokens ('input_ids') and no 'inputs', only {quoted(table.names)}: encode them first."
            )
        self.table, self.what, self._features = table, what, features
        ids = table.column("row").to("cpu", torch.int64)
        self.ids_N: Ints = ids.numpy()
        self.class_N: Ints | None = None
        if objective == "classification":
            self.class_N = table.column("labels").to("cpu", torch.int64).clamp(min=-1).numpy()
        self._order: Ints = row_keys(ids, derive_seed(seed, "drift")).argsort(stable=True).numpy()
        if self.class_N is not None:
            self._order = self._order[self.class_N[self._order] >= 0]
        self._looked_at = np.zeros(len(ids), dtype=bool)
        self._place: Ints = np.full(len(ids), -1, dtype=np.int64)
        self._known: list[Tensor] = []

    @property
    def is_text(self) -> bool:
        return "input_ids" in self.table.names

    @property
    def looked_at(self) -> int:
        """How many rows were drawn so far."""
        return int(self._looked_at.sum())

    def first(self, rows: int, among_N: NDArray[np.bool_] | None = None) -> Ints:
        """Places of the first ``rows`` rows, in their random order, int64 (X,)."""
        order = self._order if among_N is None else self._order[among_N[self._order]]
        self._looked_at[order[:rows]] = True
        return order[:rows]

    def classes(self, places_X: Ints) -> Ints:
        """Class ids of these rows, int64 (X,); zeros where there are no classes."""
        return np.zeros(len(places_X), dtype=np.int64) if self.class_N is None else self.class_N[places_X]

    def select(self, places_X: Ints) -> Table:
        """These rows."""
        return self.table.select(torch.from_numpy(places_X))

    def numbers(self, name: str, places_X: Ints) -> Floats:
        """A dense column of these rows, float64 (X, C), whatever its shape."""
        column = self.table.select(torch.from_numpy(places_X)).column(name)
        found: Floats = column.reshape(len(column), math.prod(column.shape[1:])).cpu().double().numpy()
        return found

    def logits(self, places_X: Ints, answers: Answers, known: int) -> Floats:
        """Logits of the known classes of these rows, float64 (X, known)."""
        if not len(places_X):
            return np.zeros((0, known))
        features_XD = None if self._features is None else self.features(places_X)
        found: Floats = answers(self.select(places_X), features_XD)[:, :known].double().cpu().numpy()
        return found

    def features(self, places_X: Ints) -> Tensor:
        """Features of these rows, float32 (X, D) on the CPU.

        Raises:
            StreamError: some are not finite.
        """
        assert self._features is not None, "there are no features"
        fresh = places_X[self._place[places_X] < 0]
        if len(fresh):
            found = self._features(self.select(fresh)).detach().to("cpu", torch.float32).flatten(1)
            bad = int((~found.isfinite().all(1)).sum())
            if bad:
                raise StreamError(
                    f"{bad} of {len(fresh)} {self.what} rows have features that are not finite: "
                    "mend or leave out the rows, or see to the encoder."
                )
            self._place[fresh] = np.arange(len(fresh)) + sum(map(len, self._known))
            self._known.append(found)
        if not self._known:
            return torch.empty(0, 0)
        return torch.cat(self._known)[torch.from_numpy(self._place[places_X])]
