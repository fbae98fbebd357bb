"""Which rows every update trained on and measured, by id and by content, where data come update by update.

It makes sure of three things that nobody sees in a single update: an id names one row, a row that an earlier test set
holds is not trained on (so no memory can hold it), and a row that was trained on is not measured as new.

Letters: N rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from continual.errors import StreamError
from continual.streams.content import row_keys
from continual.streams.experience import Experience
from continual.table import Table


@dataclass
class _Entry:
    """Ids and content keys, int64 (N,), of the rows that one update trained on (valid rows among them) and measured."""

    trained_ids: Tensor
    trained_keys: Tensor
    tested_ids: Tensor
    tested_keys: Tensor


class Ledger:
    """The rows of all updates so far: 16 bytes a row."""

    def __init__(self) -> None:
        self.entries: list[_Entry] = []

    def admit(self, experience: Experience) -> tuple[Experience, list[str]]:
        """The experience without the rows that would spoil a measurement, and a sentence for each kind left out.

        Raises:
            StreamError: ids that earlier updates used, or nothing left to train on or to measure.
        """
        if not self.entries:
            return experience, []
        self._check_ids(experience)
        notes: list[str] = []
        trained = torch.cat([entry.trained_keys for entry in self.entries])
        tested = torch.cat([entry.tested_keys for entry in self.entries])
        kept: dict[str, Table | None] = {}
        for part, known, why in (
            ("train", tested, "test rows of earlier updates"),
            ("valid", tested, "test rows of earlier updates"),
            ("test", trained, "rows that earlier updates trained on"),
        ):
            table: Table | None = getattr(experience, part)
            kept[part] = table
            if table is None or not len(table):
                continue
            fine_N = ~torch.isin(_keys(table), known)
            left_out = int((~fine_N).sum())
            if not left_out:
                continue
            if left_out == len(table) and part != "valid":
                raise StreamError(
                    f"all {left_out} {part} rows of '{experience.name}' have the same content as {why}: give it rows of "
                    "its own."
                )
            kept[part] = table.select(fine_N.nonzero().flatten())
            notes.append(
                f"{left_out} of the {len(table)} {part} rows of '{experience.name}' have the same content as {why} and "
                "were left out."
            )
        return replace(experience, **kept), notes  # type: ignore[arg-type]

    def add(self, experience: Experience) -> None:
        """Remember the rows of an experience that was learnt."""
        learnt = [table for table in (experience.train, experience.valid) if table is not None and len(table)]
        tests = [table for table in (experience.test,) if table is not None and len(table)]
        self.entries.append(_Entry(*_known(learnt), *_known(tests)))

    def erase(self, rows: Tensor) -> int:
        """Forget ids and content of these rows, int64 CPU; returns how many it knew. They may then come again, as new ones."""
        erased = 0
        for entry in self.entries:
            for ids, keys in (("trained_ids", "trained_keys"), ("tested_ids", "tested_keys")):
                stays_N = ~torch.isin(getattr(entry, ids), rows)
                erased += int((~stays_N).sum())
                for name in (ids, keys):
                    setattr(entry, name, getattr(entry, name)[stays_N])
        return erased

    def state_dict(self) -> dict[str, Any]:
        """Tensors."""
        return {"entries": [dict(vars(entry)) for entry in self.entries]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.entries = [_Entry(**entry) for entry in state["entries"]]

    def _check_ids(self, experience: Experience) -> None:
        used = torch.cat([torch.cat([entry.trained_ids, entry.tested_ids]) for entry in self.entries])
        for table in (experience.train, experience.valid, experience.test):
            if table is None or not len(table):
                continue
            ids_N = table.column("row").to("cpu", torch.int64)
            again_N = torch.isin(ids_N, used)
            if bool(again_N.any()):
                raise StreamError(
                    f"{int(again_N.sum())} row ids of '{experience.name}' were used by earlier updates (one of them is "
                    f"{int(ids_N[again_N][0])}): an id names one row of the whole stream, so leave the column 'row' out, "
                    "or give ids that go on."
                )


def _known(tables: Iterable[Table]) -> tuple[Tensor, Tensor]:
    found = list(tables)
    if not found:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    ids_N = torch.cat([table.column("row").to("cpu", torch.int64) for table in found])
    return ids_N.clone(), torch.cat([_keys(table) for table in found])


def _keys(table: Table) -> Tensor:
    return torch.tensor(row_keys(table))
