"""What the live version makes of rows: their features, its answers, and how it did on hold-outs.

Letters: N rows, D features, K outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from continual.learner import Learner
from continual.monitor.evaluation import evaluating
from continual.streams.batching import evaluation_batches
from continual.table import Batch, Table, to_device


class Live:
    """The live version's learner, asked about rows."""

    def __init__(self, learner: Learner) -> None:
        self.learner, self.model = learner, learner.model

    def features(self, table: Table) -> Tensor:
        """float32 (N, D), of the backbone."""
        return self._of_each(table, self.model.backbone)

    def answers(self, table: Table, features_ND: Tensor | None) -> Tensor:
        """Logits float32 (N, K); from the features, where these were made before and are what the head reads."""
        head = self.model.head
        joined = self.model.router is None and not getattr(head, "reads_inputs", False)
        if features_ND is None or head is None or not joined:
            return self._of_each(table, lambda batch: self.learner.answer(batch).logits)
        with self.learner.randomness.framework(), evaluating(self.model):
            found: Tensor = head(features_ND.to(self.learner.device))
            return found.float().cpu()

    def right(self) -> list[NDArray[Any] | None]:
        """Of each hold-out 1 or 0 for every row, float32 (N,), as it was measured last; None where it was not."""
        assert self.learner.monitor is not None, "a store measures"
        scores = self.learner.monitor.scores()
        return [scores.get(self.learner.experience_names[index]) for index in self.learner.monitor.tables()]

    def _of_each(self, table: Table, give: Callable[[Batch], Tensor]) -> Tensor:
        order = evaluation_batches(table.lengths, len(table), self.learner.evaluation_rows)
        with self.learner.randomness.framework(), evaluating(self.model):
            found = torch.cat([give(to_device(table[index_B], self.learner.device)).float().cpu() for index_B in order])
        return torch.empty_like(found).index_copy_(0, torch.cat(order), found)
