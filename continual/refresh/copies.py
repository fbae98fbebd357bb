"""Rows that are there already: the very content of a hold-out row, or features that point the same way.

Near-duplicates are a share of the new rows, and a share says little by itself: short texts, templates and features of few
dimensions have many rows alike. It is compared with the share of the rows at hand that have such a neighbour among the other
rows at hand (Fisher's exact test, one-sided).

Letters: N new rows, M rows at hand, D features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import fisher_exact
from torch import Tensor
from torch.nn import functional as F

from continual.kinds import Objective
from continual.refresh.shifts import Ints
from continual.refresh.wording import read_tokens
from continual.streams.content import Keys, row_keys
from continual.table import IGNORED, Ragged, Table, TensorTable

BLOCK = 1024
"""Rows of a block of cosines on each side."""


@dataclass(frozen=True)
class Near:
    """What the features say.

    Attributes:
        places: int64, the new rows with a near-duplicate, those nearest to one first.
        share: of the new rows.
        usual: of the rows at hand, among each other.
        p_value: of "no more than usual".
    """

    places: Tensor
    share: float
    usual: float
    p_value: float


def contents(table: Table, objective: Objective) -> Keys:
    """The key of what a model reads of each row, int64 (N,): its tokens (for ``seq2seq`` those of the answer too), or its inputs.

    Rows that were kept as tokens and rows that still have their text get the same key.
    """
    if "input_ids" not in table.names:
        return row_keys(TensorTable({"inputs": table.column("inputs").cpu().float()}))
    tokens = read_tokens(table)
    columns: dict[str, Tensor | Ragged | list[object]] = {"input_ids": _ragged(tokens.ids, tokens.row_of, tokens.rows)}
    if objective == "seq2seq":
        answers = read_tokens(table, "labels")
        counted = answers.ids != IGNORED
        columns["answer"] = _ragged(answers.ids[counted], answers.row_of[counted], answers.rows)
    return row_keys(TensorTable(columns))


def near_duplicates(new_ND: Tensor, old_MD: Tensor, similar: float) -> Near:
    """New rows whose cosine with a row at hand is ``similar`` or more.

    Args:
        new_ND, old_MD: features, float32; N and M at least 1.
        similar: in (0, 1].
    """
    new_ND, old_MD = F.normalize(new_ND.float()), F.normalize(old_MD.float())
    # the cosine of a row with itself is 1 only up to rounding
    limit = similar - 1e-6
    nearest_N, nearest_M = _nearest(new_ND, old_MD), _nearest(old_MD, old_MD, itself=False)
    hits, usual = int((nearest_N >= limit).sum()), int((nearest_M >= limit).sum())
    table = [[hits, len(nearest_N) - hits], [usual, len(nearest_M) - usual]]
    order_N = nearest_N.argsort(descending=True, stable=True)
    return Near(
        places=order_N[:hits],
        share=hits / len(nearest_N),
        usual=usual / len(nearest_M),
        p_value=float(fisher_exact(table, alternative="greater")[1]),
    )


def _nearest(of_ND: Tensor, among_MD: Tensor, *, itself: bool = True) -> Tensor:
    """The largest cosine of each row with one of the others, (N,), block by block; -1 where there is no other."""
    nearest_N = torch.full((len(of_ND),), -1.0, device=of_ND.device)
    for row in range(0, len(of_ND), BLOCK):
        for column in range(0, len(among_MD), BLOCK):
            cosines = of_ND[row : row + BLOCK] @ among_MD[column : column + BLOCK].T
            if not itself and row == column:
                cosines.fill_diagonal_(-1.0)
            nearest_N[row : row + BLOCK] = torch.maximum(nearest_N[row : row + BLOCK], cosines.amax(1))
    return nearest_N


def _ragged(id_U: Ints, row_U: Ints, rows: int) -> Ragged:
    lengths_N = np.bincount(row_U, minlength=rows)
    offsets_N1 = np.concatenate([[0], lengths_N.cumsum()])
    return Ragged(torch.from_numpy(id_U.astype(np.int32)), torch.from_numpy(offsets_N1), 0)
