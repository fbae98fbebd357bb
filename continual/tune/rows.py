"""The rows that a tuning may see: of the first experiences the training rows and, in the place of test rows, valid ones.

Test rows and later experiences are not touched: they are neither read nor counted, nor do they enter a fingerprint (as in
Chaudhry et al. 2019, arXiv 1812.00420, section 2, whose hyper-parameters are chosen on the first three tasks alone).

Letters: N rows of a table.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from continual.errors import StreamError
from continual.parts.replay.select import row_keys
from continual.randomness import derive_seed
from continual.streams.experience import Experience
from continual.streams.stream import Stream
from continual.table import Table


def tuning_stream(stream: Stream, experiences: int, share: float, seed: int, *, stops_early: bool) -> Stream:
    """The first experiences of ``stream``, each measured on valid rows.

    Args:
        experiences: how many; all where there are fewer.
        share: part of the training rows that is split off where an experience has no valid rows, in (0, 1).
        seed: of what is split off, which depends on row ids and classes only.
        stops_early: give every second valid row to early stopping, so that a trial is not measured on rows that stopped it.

    Raises:
        StreamError: an experience has too few rows to be split.
    """
    found = []
    for index in range(min(experiences, len(stream))):
        experience = stream[index]
        train, valid = experience.train, experience.valid
        if valid is None or not len(valid):
            train, valid = _split(experience, train, share, seed)
        stop: Table | None = None
        if stops_early:
            stop, valid = _split(experience, valid, 0.5, seed)
        found.append(replace(experience, train=train, valid=stop, test=valid))
    return Stream.from_experiences(
        found, name=stream.name, scenario=stream.scenario, objective=stream.objective, model=stream.model
    )


def _split(experience: Experience, table: Table, share: float, seed: int) -> tuple[Table, Table]:
    """Those that stay, and a ``share`` of the rows, of each class where rows have one: those of smallest hashed id."""
    rows_N = table.column("row").to("cpu", torch.int64)
    key_N = row_keys(rows_N, derive_seed(seed, "tune"))
    labels_N = table.column("labels").cpu() if experience.objective == "classification" else torch.zeros_like(rows_N)
    order_N = key_N.argsort()
    order_N = order_N[labels_N[order_N].argsort(stable=True)]
    _, counts_G = torch.unique_consecutive(labels_N[order_N], return_counts=True)
    rank_N = torch.cat([torch.arange(int(count)) for count in counts_G])
    taken_N = rank_N < _taken(counts_G, share).repeat_interleave(counts_G)
    if not bool(taken_N.any()):
        raise StreamError(
            f"experience '{experience.name}' has {len(table)} rows, too few to split valid ones off: give the stream valid "
            "rows, or a larger share (--valid-share)."
        )
    return table.select(order_N[~taken_N].sort().values), table.select(order_N[taken_N].sort().values)


def _taken(counts_G: Tensor, share: float) -> Tensor:
    """Rows to take of each group: the share, at least one, and never the last one that it has."""
    return torch.minimum((counts_G * share).round().clamp(min=1), counts_G - 1).to(torch.int64)
