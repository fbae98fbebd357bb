"""Features of a backbone that does not train: made once for each table, and read from then on.

A head on a frozen backbone, or on one that an adapter has settled in the first experience, sees the same features in every
epoch, in every pass of a part and in every measurement. They are made in one pass over the whole table, in eval mode, the
same batches every time; so a run that is cut off and resumed has the same bits, though it makes them again.

Kept are the tables asked for last, as long as the backbone's weights are untouched, up to :data:`BUDGET` bytes. Tables of a
user's own class are left alone, since they may give another row each time (augmentation).

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
"""Bytes of features that are kept of the tables of one call."""
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
        self._of: tuple[tuple[int, int], ...] = ()

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
        if not is_steady(self.model) or not all(_repeats(table) for table in tables):
            self._made.clear()
            return list(tables)
        now = _marks(self.model)
        if now != self._of:
            self._made.clear()
            self._of = now
        known = {key: one for made in self._made.values() for key, one in made.items()}
        kept: dict[int, tuple[Table, Featured]] = {}
        size = 0
        for table in tables:
            if len(table):
                kept[id(table)] = known[id(table)] if id(table) in known else (table, self._make(table, rows))
                size += kept[id(table)][1].column(FEATURES).nbytes
            if size > BUDGET:
                self._made.pop(use, None)
                return list(tables)
        self._made[use] = kept
        return [kept[id(table)][1] if len(table) else table for table in tables]

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
    if getattr(model.head, "reads_inputs", False):
        return False
    weights = list(model.backbone.parameters())
    return bool(weights) and not any(weight.requires_grad for weight in weights)


def training_mode(model: nn.Module) -> None:
    """Training mode, but for a backbone that does not train: nothing is dropped there and no running mean moves."""
    model.train()
    if isinstance(model, Model) and model.gives_features:
        weights = list(model.backbone.parameters())
        if weights and not any(weight.requires_grad for weight in weights):
            model.backbone.eval()


def _marks(model: nn.Module) -> tuple[tuple[int, int], ...]:
    """Where each tensor of the backbone lies, and how often it was written."""
    assert isinstance(model, Model)
    tensors = [*model.backbone.parameters(), *model.backbone.buffers()]
    return tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)


def _repeats(table: Table) -> bool:
    """Whether a table gives the same row every time, as those of this package do."""
    if isinstance(table, View | Mapped):
        return _repeats(table.base)
    if isinstance(table, Concat):
        return all(map(_repeats, table.tables))
    return type(table) in (TensorTable, ArrowTable)
