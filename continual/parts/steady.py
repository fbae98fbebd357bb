"""Features of a backbone that does not train: made once for each table, and read from then on.

A head on a frozen backbone, or on one that an adapter has settled in the first experience, sees the same features in every
epoch, in every pass of a part and in every measurement. They are made in one pass over the whole table, in eval mode, the
same batches every time; so a run that is cut off and resumed has the same bits, though it makes them again.

Kept are the tables asked for last for each use, as long as the backbone's weights are what they were, up to :data:`BUDGET` bytes;
what would be more is left as it is before anything is computed. Tables and models of a user's own class are left alone: they may
give another row each time (augmentation), or do something else in ``forward``. The content of a table is taken to be fixed.

Letters: B rows of a batch, N rows of a table, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from continual.models.model import FEATURES, Model
from continual.models.output import Output
from continual.parts.passes import as_at_test
from continual.streams.batching import evaluation_batches
from continual.table import (
    TOKEN_COLUMNS,
    ArrowTable,
    Batch,
    Concat,
    Mapped,
    Ragged,
    Table,
    TensorTable,
    View,
    to_device,
)

BUDGET = 2**30
"""Bytes of features that are kept at most."""
INPUTS = {"inputs", *TOKEN_COLUMNS} - {"labels"}
"""Columns that features take the place of."""


class Featured(TensorTable):
    """A table with features in the place of inputs, whose rows still have their lengths: they are drawn in the same order."""

    def __init__(self, columns: dict[str, Tensor | Ragged | list[Any]], lengths: Tensor | None) -> None:
        super().__init__(columns)
        self._lengths = lengths

    @property
    def lengths(self) -> Tensor | None:
        return self._lengths


class SteadyFeatures:
    """Tables with features in the place of their rows' inputs, while the backbone is steady.

    Args:
        model: of the training; one that is not a :class:`~continual.models.model.Model` is never steady.
        forward: as the training's, in its precision.
        device: where the forward pass runs.
    """

    def __init__(self, model: nn.Module, forward: Callable[[Batch], Output], device: torch.device) -> None:
        self.model, self.forward, self.device = model, forward, device
        self._made: dict[str, dict[int, tuple[Table, Featured]]] = {}
        self._of: list[float] = []

    def release(self, use: str | None = None) -> None:
        """Let go of what was made for ``use``, or of everything."""
        if use is None:
            self._made.clear()
        else:
            self._made.pop(use, None)

    def of(self, tables: Sequence[Table], rows: int, use: str) -> list[Table]:
        """The tables with features in the place of inputs; or all as they are, where that cannot be, or was done before.

        Args:
            rows: of a forward pass.
            use: what for; features of other tables that were made for the same are let go.
        """
        if all(FEATURES in table.names for table in tables):
            return list(tables)
        if not is_steady(self.model):
            self._made.clear()
            return list(tables)
        now = _marks(self.model)
        if now != self._of:
            self._made.clear()
            self._of = now
        known = {key: one for made in self._made.values() for key, one in made.items()}
        self._made.pop(use, None)
        if not all(_repeats(table) for table in tables) or self._bytes(tables) > BUDGET:
            return list(tables)
        kept: dict[int, tuple[Table, Featured]] = {}
        for table in tables:
            if len(table):
                kept[id(table)] = known[id(table)] if id(table) in known else (table, self._make(table, rows))
        self._made[use] = kept
        return [kept[id(table)][1] if len(table) else table for table in tables]

    def _bytes(self, tables: Sequence[Table]) -> int:
        """Bytes of the features that are kept for other uses, and of those of ``tables``, which may be wider than they are."""
        width = getattr(self.model, "feature_size", None) or 0
        held = sum(one.column(FEATURES).nbytes for made in self._made.values() for _, one in made.values())
        return held + 4 * int(width) * sum(len(table) for table in tables)

    @torch.no_grad()
    def _make(self, table: Table, rows: int) -> Featured:
        order = evaluation_batches(table.lengths, len(table), rows)
        found: list[Tensor] = []
        with as_at_test(self.model):
            for index_B in order:
                features_BD = self.forward(to_device(table[index_B], self.device)).features
                assert features_BD is not None, "a steady model gives features"
                found.append(features_BD)
        order_N = torch.cat(order)
        features_ND = torch.cat(found).cpu()
        features_ND = torch.empty_like(features_ND).index_copy_(0, order_N, features_ND)
        one = table[torch.zeros(1, dtype=torch.int64)]
        others = {name: table.column(name) for name in one if name not in INPUTS}
        return Featured({**others, FEATURES: features_ND}, table.lengths)


def is_steady(model: nn.Module) -> bool:
    """Whether the model's features are always the same: nothing below its head trains, and it has something to compute."""
    if not isinstance(model, Model) or not model.gives_features or model.head is None or model.router is not None:
        return False
    if type(model).forward is not Model.forward or type(model)._run is not Model._run:
        return False
    if getattr(model.head, "reads_inputs", False):
        return False
    return next(model.backbone.parameters(), None) is not None and not model.backbone_trains


def training_mode(model: nn.Module) -> None:
    """Training mode, but for a backbone that does not train: nothing is dropped there and no running mean moves."""
    model.train()
    if isinstance(model, Model) and model.gives_features and not model.backbone_trains:
        model.backbone.eval()


@torch.no_grad()
def _marks(model: nn.Module) -> list[float]:
    """Two sums of each tensor of the backbone, in float64. Counters of writes would not do: fused optimisers leave them be."""
    assert isinstance(model, Model)
    sums = []
    for tensor in (*model.backbone.parameters(), *model.backbone.buffers()):
        values = tensor if tensor.is_floating_point() else tensor.double()
        sums += [values.sum(dtype=torch.float64), torch.linalg.vector_norm(values, dtype=torch.float64)]
    found: list[float] = torch.stack([one.to(sums[0].device) for one in sums]).tolist()
    return found


def _repeats(table: Table) -> bool:
    """Whether a table gives the same row every time, as those of this package do, and its other columns are plain tensors."""
    if type(table) in (View, Mapped):
        return _repeats(table.base)  # type: ignore[attr-defined]
    if type(table) is Concat:
        return all(map(_repeats, table.tables))
    if type(table) is TensorTable:
        return all(isinstance(column, Tensor | list) for name, column in table.columns.items() if name not in INPUTS)
    return type(table) is ArrowTable and table.pads.keys() <= INPUTS
