"""Replayed rows beside the current ones: how many, in one batch, and what they weigh.

Letters: B rows of a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from continual.errors import StreamError, quoted
from continual.table import Batch, concat_batches, to_device


def replay_count(full_rows: int, share: float) -> int:
    """Rows to replay beside every batch, so that they are ``share`` of all rows beside a full one.

    The last batch of an epoch, which may hold a few new rows only, gets as many: a step on few rows is one at the full rate with a
    noisy gradient, which memory rows steady (measured: ``reports/methods/README.md``, beside Avalanche).
    """
    return round(full_rows * share / (1 - share))


def join(batch: Batch, replayed: Batch) -> Batch:
    """The rows of ``replayed`` below those of ``batch``, on its device; without weights of their own they weigh 1.

    Raises:
        StreamError: the batch has a column that the replayed rows lack.
    """
    labels = batch["labels"]
    replayed = to_device(replayed, labels.device)
    lacking = batch.keys() - replayed.keys()
    if lacking - {"weight"}:
        raise StreamError(
            f"the batch has the columns {quoted(sorted(lacking - {'weight'}))}, which the rows of earlier experiences "
            "lack: give every experience of a stream the same columns."
        )
    if lacking:
        replayed = {**replayed, "weight": torch.ones(len(replayed["labels"]), device=labels.device)}
    return concat_batches([batch, replayed])


class ExperienceWeights:
    """Weights that sum to 1: 1/t over the current rows, 1 − 1/t over the replayed ones, t experiences met.

    Source: the loss of van de Ven et al. 2022, 1/t · current + (1 − 1/t) · replayed.
    """

    def __init__(self) -> None:
        self._last: tuple[tuple[int, int, int, torch.device], Tensor] | None = None

    def of(self, joined: Batch, current: int, met: int) -> Tensor:
        """Float (B,), the first ``current`` rows being the current ones; within each kind, weights given are kept."""
        given_B = joined.get("weight")
        if given_B is not None:
            own_b, old_b = given_B[:current], given_B[current:]
            return torch.cat([own_b / (own_b.sum() * met), old_b * ((1 - 1 / met) / old_b.sum())])
        labels = joined["labels"]
        key = (current, len(labels), met, labels.device)
        if self._last is None or self._last[0] != key:
            weight_B = torch.full((len(labels),), (1 - 1 / met) / (len(labels) - current), device=labels.device)
            weight_B[:current] = 1 / (met * current)
            self._last = (key, weight_B)
        return self._last[1]

    def nbytes(self) -> int:
        """Bytes held."""
        return 0 if self._last is None else self._last[1].nbytes
