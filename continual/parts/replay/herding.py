"""Herding: rows whose mean follows the mean of all rows of their class as closely as it can, best first.

Source: Rebuffi et al. 2017, iCaRL (arXiv 1611.07725), algorithm 4 and eq. 4:

    p_k = argmin over x of ‖ μ − (φ(x) + Σ_{j<k} φ(p_j)) / k ‖

with features φ of length 1 and μ their mean over the class. No row is taken twice. A memory that shrinks gives up the
rows ranked last. Multiplied by k and without what all rows share, the square is ‖φ(x)‖² − 2 φ(x)·(k μ − Σ φ(p_j)), so
that each rank costs one product of the features with the row taken before.

Letters: D features, G groups, M rows ranked, N rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from continual.errors import CompositionError
from continual.parts.part import Context
from continual.parts.passes import as_at_test
from continual.table import Table

_LAST = torch.iinfo(torch.int64).max


def herding_order(features_ND: Tensor, count: int) -> Tensor:
    """Places of the first ``count`` rows by rank, int64 (M,).

    Args:
        features_ND: float64 (N, D), N at least ``count``.
    """
    cost_N = features_ND.square().sum(1)
    toward_N, taken_N = features_ND @ features_ND.mean(0), torch.zeros_like(cost_N)
    order_M = torch.empty(count, dtype=torch.int64, device=features_ND.device)
    for rank in range(count):
        best = (cost_N + 2 * (taken_N - (rank + 1) * toward_N)).argmin().reshape(1)
        order_M[rank : rank + 1] = best
        cost_N.index_fill_(0, best, torch.inf)
        taken_N += features_ND @ features_ND.index_select(0, best)[0]
    return order_M


def herding_keys(context: Context, table: Table, rows_N: Tensor, groups_N: Tensor, most: int, owner: str) -> Tensor:
    """Keys int64 CPU (N,), different for different rows, that rise with the rank of a row in its group.

    The features of the whole table are held at once, in float64.

    Args:
        rows_N: the ids of the table's rows, each once.
        most: rows ranked in a group; all others get the largest key, which no selection accepts.

    Raises:
        CompositionError: the model gives no features.
    """
    features_ND = _features(context, table, rows_N, owner)
    keys_N = torch.full_like(rows_N, _LAST)
    for group in torch.unique(groups_N).tolist():
        members = (groups_N == group).nonzero().flatten()
        own_ND = features_ND[members.to(features_ND.device)]
        order_M = herding_order(own_ND, min(most, len(members))).cpu()
        keys_N[members[order_M]] = (torch.arange(len(order_M)) << 32) + group
    return keys_N


def check_features(context: Context, table: Table, owner: str) -> None:
    """Raise :class:`CompositionError` where the model gives no features."""
    first = table.select(torch.zeros(1, dtype=torch.int64))
    _features(context, first, first.column("row").to("cpu", torch.int64), owner)


def _features(context: Context, table: Table, rows_N: Tensor, owner: str) -> Tensor:
    """Features of length 1, float64 (N, D), in the order of ``rows_N``."""
    found, ids = [], []
    with torch.no_grad(), as_at_test(context.model):
        for batch in context.batches(table):
            features_BD = context.forward(batch).features
            if features_BD is None:
                raise CompositionError(
                    f"{owner} ranks rows by the model's features, and this model gives logits alone: take select: "
                    "class-balanced, or a model that gives features ('mlp', or a pretrained encoder)."
                )
            found.append(F.normalize(features_BD.double(), dim=1))
            ids.append(batch["row"])
    place_N = torch.cat(ids).cpu().argsort()[rows_N.argsort().argsort()]
    features_ND = torch.cat(found)
    return features_ND[place_N.to(features_ND.device)]
