"""Features of rows, with their labels and ids: all that there were of each class, or a random few.

Which rows of a class are kept is settled by a hash of their ids, so it depends neither on their order nor on how they are
divided into experiences, and the same rows are kept in the same places.

Letters: B rows, N rows kept, D features (as they are, or lifted), K classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from continual.errors import StreamError, TrainingError
from continual.parts.replay.select import row_keys


class FeatureRows:
    """Rows for a head that looks rows up; used as :class:`~continual.parts.head.class_sums.ClassSums` is.

    Args:
        per_class: rows kept of each class; None keeps all.

    Attributes:
        counts_K: rows kept of each class, int64 (K,); up to date after :meth:`close`, as the others are.
        features_ND: float32 (N, D), by class, within a class by hash.
        labels_N: int64 (N,).
        rows_N: ids, int64 (N,).
    """

    def __init__(self, per_class: int | None = None) -> None:
        self.per_class = per_class
        self.counts_K = torch.zeros(0, dtype=torch.int64)
        self.features_ND = torch.zeros(0, 0)
        self.labels_N = torch.zeros(0, dtype=torch.int64)
        self.rows_N = torch.zeros(0, dtype=torch.int64)
        self._added: list[tuple[Tensor, Tensor, Tensor]] = []

    def grow(self, classes: int, features: int) -> None:
        """Have at least ``classes`` classes, of ``features`` features."""
        if self.features_ND.shape[1] != features:
            assert not len(self.labels_N), "the number of features does not change"
            self.features_ND = self.features_ND.new_zeros(0, features)
        more = classes - len(self.counts_K)
        if more > 0:
            self.counts_K = torch.cat([self.counts_K, self.counts_K.new_zeros(more)])

    def add(self, features_BD: Tensor, labels_B: Tensor, rows_B: Tensor | None = None) -> None:
        """Add rows, (B, D) with labels and ids int64 (B,), and :meth:`close` after the last; those labelled -100 or beyond
        the classes count for nothing, those without ids get -1 and cannot be found again.

        Raises:
            StreamError: rows without ids where ``per_class`` chooses by them.
        """
        if rows_B is None:
            if self.per_class is not None:
                raise StreamError(
                    "which rows of a class are kept follows from their ids, and these rows have none: give them the column 'row', "
                    "or set per_class: null."
                )
            rows_B = torch.full_like(labels_B, -1)
        counted_B = (labels_B >= 0) & (labels_B < len(self.counts_K))
        self._added.append((features_BD[counted_B].float(), labels_B[counted_B], rows_B[counted_B]))

    def close(self) -> None:
        """Put the rows added in their places, and let go of those that are too many.

        Raises:
            TrainingError: features that are not finite; none of the rows added is kept then.
        """
        if not self._added:
            return
        for features_BD, _, rows_B in self._added:
            fine_B = features_BD.isfinite().all(1)
            if not bool(fine_B.all()):
                self._added = []
                raise TrainingError(
                    f"the features of row {int(rows_B[~fine_B][0])} are not finite, and would be the nearest to every other: "
                    "look at the row, or take another base."
                )
        held = [(self.features_ND, self.labels_N, self.rows_N), *self._added]
        features_ND, labels_N, rows_N = (torch.cat(column) for column in zip(*held, strict=True))
        self._added = []
        order_N = row_keys(rows_N, 0).argsort(stable=True)
        order_N = order_N[labels_N[order_N].argsort(stable=True)]
        labels_N = labels_N[order_N]
        if self.per_class is not None:
            counts_K = torch.bincount(labels_N, minlength=len(self.counts_K))
            first_K = counts_K.cumsum(0) - counts_K
            place_N = torch.arange(len(labels_N), device=labels_N.device) - first_K[labels_N]
            order_N = order_N[place_N < self.per_class]
            labels_N = labels_N[place_N < self.per_class]
        self._hold(features_ND[order_N], labels_N, rows_N[order_N])

    def first(self, classes: int) -> FeatureRows:
        """The same rows without the classes from ``classes`` on; nothing is copied."""
        part = FeatureRows(self.per_class)
        part.counts_K = self.counts_K[:classes]
        end = int(part.counts_K.sum())
        part.features_ND, part.labels_N, part.rows_N = self.features_ND[:end], self.labels_N[:end], self.rows_N[:end]
        return part

    def rows(self) -> Tensor:
        """Ids of all rows, int64 CPU (N,)."""
        self.close()
        return self.rows_N.to("cpu", copy=True)

    def erase(self, rows: Tensor) -> int:
        """Take these rows out; returns how many there were."""
        self.close()
        kept_N = ~torch.isin(self.rows_N, rows.to(self.rows_N.device))
        gone = len(kept_N) - int(kept_N.sum())
        if gone:
            self._hold(self.features_ND[kept_N], self.labels_N[kept_N], self.rows_N[kept_N])
        return gone

    def to(self, device: torch.device) -> None:
        """Move to ``device``."""
        self.close()
        self.counts_K = self.counts_K.to(device)
        self._hold(self.features_ND.to(device), self.labels_N.to(device), self.rows_N.to(device))

    def state_dict(self) -> dict[str, Any]:
        self.close()
        return {
            "classes": len(self.counts_K),
            "features": self.features_ND,
            "labels": self.labels_N,
            "rows": self.rows_N,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self.counts_K.device
        self.counts_K, self._added = self.counts_K.new_zeros(int(state["classes"])), []
        self._hold(
            state["features"].to(device, torch.float32, copy=True),
            state["labels"].to(device, torch.int64, copy=True),
            state["rows"].to(device, torch.int64, copy=True),
        )

    def _hold(self, features_ND: Tensor, labels_N: Tensor, rows_N: Tensor) -> None:
        self.features_ND, self.labels_N, self.rows_N = features_ND, labels_N, rows_N
        self.counts_K = torch.bincount(labels_N, minlength=len(self.counts_K))
