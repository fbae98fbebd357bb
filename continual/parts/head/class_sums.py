"""Sums of the features of each class, in float64, in one pass without gradients.

Sums do not depend on the order of the rows, nor on how they are divided into batches and experiences, but for the last
bits of float64; and they are as large after a million rows as after one.

The sum of a class of one row is that row. So its id is kept beside it, and it can be given up as any stored row can; sums of
more rows give none of them back, and stay.

Letters: B rows, D features (as they are, or lifted), K classes, L classes of one row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from continual.errors import CompositionError
from continual.models.model import Model
from continual.parts.head.packed import pack, unpack
from continual.parts.part import Context
from continual.parts.passes import as_at_test
from continual.table import Batch, Table

NO_ROW = torch.iinfo(torch.int64).min
"""Stands where no single row's id is."""


class ClassSums:
    """What is added up of the rows of each class.

    Attributes:
        counts_K: rows, int64 (K,).
        sums_KD: sums of the features, float64 (K, D).
        lone_L2: class and row id of each class of one row whose id was given, int64 (L, 2); up to date after :meth:`close`.
    """

    def __init__(self, *, second: bool = False) -> None:
        self.counts_K = torch.zeros(0, dtype=torch.int64)
        self.sums_KD = torch.zeros(0, 0, dtype=torch.float64)
        self._packed = torch.zeros(1, 0, dtype=torch.float64) if second else None
        self._open_DD: Tensor | None = None
        self.lone_L2 = torch.zeros(0, 2, dtype=torch.int64)
        self._last_K: Tensor | None = None

    @property
    def second_DD(self) -> Tensor | None:
        """Sum of the outer products f fᵀ over all rows, float64 (D, D); None unless asked for."""
        if self._packed is None or self._open_DD is not None:
            return self._open_DD
        return unpack(self._packed, self.sums_KD.shape[1])

    def close(self) -> None:
        """Keep the second moments in half their bytes, and ids of single rows alone, until rows are added again."""
        if self._open_DD is not None:
            self._packed, self._open_DD = pack(self._open_DD), None
        if self._last_K is not None:
            lone = ((self.counts_K == 1) & (self._last_K != NO_ROW)).nonzero().flatten()
            self.lone_L2, self._last_K = torch.stack([lone, self._last_K[lone]], 1), None

    def grow(self, classes: int, features: int) -> None:
        """Have at least ``classes`` classes, of ``features`` features."""
        if self.sums_KD.shape[1] != features:
            assert not len(self.counts_K), "the number of features does not change"
            self.sums_KD = self.sums_KD.new_zeros(0, features)
            if self._packed is not None:
                half = (features + 1) // 2
                self._packed = self._packed.new_zeros(2 * half + 1, half)
        more = classes - len(self.counts_K)
        if more > 0:
            self.sums_KD = torch.cat([self.sums_KD, self.sums_KD.new_zeros(more, features)])
            self.counts_K = torch.cat([self.counts_K, self.counts_K.new_zeros(more)])
            if self._last_K is not None:
                self._last_K = torch.cat([self._last_K, self._last_K.new_full((more,), NO_ROW)])

    def add(self, features_BD: Tensor, labels_B: Tensor, rows_B: Tensor | None = None) -> None:
        """Add rows, float64 (B, D), and :meth:`close` after the last; those labelled -100 or beyond the classes count for
        nothing.

        Args:
            rows_B: their ids, int64; without them, single rows cannot be found again.
        """
        class_K = torch.arange(len(self.counts_K), device=labels_B.device)
        member_KB = class_K[:, None] == labels_B[None, :]
        self.sums_KD += member_KB.double() @ features_BD
        self.counts_K += member_KB.sum(1)
        if len(labels_B) and (rows_B is not None or self._last_K is not None or len(self.lone_L2)):
            known_K = self._open_ids() if self._last_K is None else self._last_K
            latest_K = NO_ROW if rows_B is None else rows_B[member_KB.int().argmax(1)]
            self._last_K = torch.where(member_KB.any(1), latest_K, known_K)
        if self._packed is not None:
            if self._open_DD is None:
                self._open_DD = self.second_DD
            assert self._open_DD is not None
            counted_BD = features_BD * member_KB.any(0)[:, None]
            self._open_DD.addmm_(counted_BD.T, features_BD)

    def means_KD(self) -> Tensor:
        """Mean of each class, float64 (K, D); zeros where it has no row."""
        return self.sums_KD / self.counts_K.clamp(min=1)[:, None]

    def within_DD(self) -> Tensor:
        """Covariance of the rows about the mean of their class, float64 (D, D), divided by the number of rows.

        (Σ f fᵀ − Σ_k n_k μ_k μ_kᵀ) / N: equal to centring every row by the final mean of its class.
        """
        second_DD = self.second_DD
        assert second_DD is not None, "the second moments are needed"
        between_DD = self.means_KD().T @ self.sums_KD
        return (second_DD - between_DD) / self.counts_K.sum().clamp(min=1)

    def rows(self) -> Tensor:
        """Ids of the rows that are the only one of their class, int64 CPU (L,)."""
        self.close()
        return self.lone_L2[:, 1].to("cpu", copy=True)

    def erase(self, rows: Tensor) -> int:
        """Take these rows out again, as far as each is the only one of its class; returns how many there were."""
        self.close()
        gone_L = torch.isin(self.lone_L2[:, 1], rows.to(self.lone_L2.device))
        gone = self.lone_L2[gone_L, 0]
        if not len(gone):
            return 0
        if self._packed is not None:
            second_DD = self.second_DD
            assert second_DD is not None
            self._packed = pack(second_DD - self.sums_KD[gone].T @ self.sums_KD[gone])
        self.sums_KD[gone], self.counts_K[gone] = 0.0, 0
        self.lone_L2 = self.lone_L2[~gone_L]
        return len(gone)

    def first(self, classes: int) -> ClassSums:
        """The same sums without the classes from ``classes`` on; nothing is copied."""
        part = ClassSums()
        part.counts_K, part.sums_KD = self.counts_K[:classes], self.sums_KD[:classes]
        part._packed, part._open_DD = self._packed, self._open_DD
        return part

    def to(self, device: torch.device) -> None:
        """Move to ``device``."""
        self.close()
        self.counts_K, self.sums_KD = self.counts_K.to(device), self.sums_KD.to(device)
        self.lone_L2 = self.lone_L2.to(device)
        if self._packed is not None:
            self._packed = self._packed.to(device)

    def state_dict(self) -> dict[str, Any]:
        """The second moments are packed (:mod:`~continual.parts.head.packed`)."""
        self.close()
        return {"counts": self.counts_K, "sums": self.sums_KD, "second": self._packed, "lone": self.lone_L2}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self.counts_K.device
        self.counts_K = state["counts"].to(device, torch.int64, copy=True)
        self.sums_KD = state["sums"].to(device, torch.float64, copy=True)
        self.lone_L2, self._last_K = state["lone"].to(device, torch.int64, copy=True), None
        if self._packed is not None:
            self._packed, self._open_DD = state["second"].to(device, torch.float64, copy=True), None

    def _open_ids(self) -> Tensor:
        """The id of the only row of each class, int64 (K,); :data:`NO_ROW` where there is none, or others with it."""
        last_K = torch.full_like(self.counts_K, NO_ROW)
        last_K[self.lone_L2[:, 0]] = self.lone_L2[:, 1]
        return last_K


def features_model(context: Context, name: str) -> Model:
    """The model of ``context``, which must give features.

    Raises:
        CompositionError: it gives logits itself, so no head of ours fits on it.
    """
    model = context.model
    if not isinstance(model, Model) or not model.gives_features or model.feature_size is None:
        raise CompositionError(
            f"{name} needs a model that gives features, and this one gives logits itself: leave the head out, "
            "or use an mlp or a pretrained encoder."
        )
    return model


def check_steady(context: Context, name: str) -> None:
    """Raise :class:`CompositionError` when the backbone trains, for a part that has learnt something of its features already."""
    if features_model(context, name).backbone_trains:
        raise CompositionError(
            f"{name} keeps what it learnt of the features of earlier rows, which no longer fit once the backbone trains on: set "
            "backbone: frozen, or take adapter/lora with across_tasks: first."
        )


def sweep(context: Context, table: Table, take: Callable[[Tensor, Batch], None]) -> None:
    """Hand the features float64 (B, D) of all rows, each once, and their batches to ``take``.

    There are no gradients, and the model is in eval mode meanwhile.
    """
    with torch.no_grad(), as_at_test(context.model):
        for batch in context.batches(context.steady(table)):
            features_BD = context.forward(batch).features
            assert features_BD is not None
            take(features_BD.double(), batch)


def class_sums(context: Context, table: Table, classes: int, *, normalize: bool) -> tuple[Tensor, Tensor]:
    """Sums float64 (K, D) of the features of each class, and rows int64 (K,), on the device.

    Rows labelled -100 or beyond ``classes`` count for nothing.

    Args:
        classes: K.
        normalize: L2-normalise the features of each row before they are added up.
    """
    model = features_model(context, "the mean of features")
    assert model.feature_size is not None
    sums = ClassSums()
    sums.to(context.device)
    sums.grow(classes, model.feature_size)

    def take(features_BD: Tensor, batch: Batch) -> None:
        sums.add(F.normalize(features_BD, dim=1) if normalize else features_BD, batch["labels"])

    sweep(context, table, take)
    return sums.sums_KD, sums.counts_K
