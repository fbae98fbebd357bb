"""Rows leave a learner for good, by their ids."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from continual.errors import StateError, StreamError, shown
from continual.learner.saving import Saving
from continual.owned import owned
from continual.table import Table

TESTS, PAST, LEDGER = "test sets", "past", "ledger"
"""Places that hold rows beside the parts."""


class Erasing(Saving):
    """Adds :meth:`erase`."""

    def erase(self, rows: Tensor | Sequence[int]) -> dict[str, int]:
        """Give up the rows with these ids, wherever they are held: content, ids, scores, and what they can be computed from.

        They leave every part (a memory's places are overwritten with zeros; means of exemplars are taken anew; a class sum or
        a prototype of one row alone goes), the monitor's test sets with all their scores, the rows that ``data: cumulative``
        trains on, and the ledger. Tables that stay are copied into memory of their own, the experience that was learnt last is
        let go, and with ``folder`` its checkpoint is written anew. So neither the learner nor what it saves holds them. Probes
        have no ids of the stream and stay.

        What was *trained on* them stays: weights (those that a head's ``init: mean`` began with too, which GDumb keeps) and the
        optimiser's moments, what was computed from several rows (class sums, a Fisher, directions of gradients), generators and
        autoencoders. Only training anew without the rows takes their part out of these. Not the learner's, and left alone: the
        caller's own tables, earlier saves, and the cache of tokens.

        Afterwards everything goes on. After a :meth:`run`, take the rows out of the stream as well: the next one goes on with
        what is left of it, and no longer asks whether it is the same stream, but for its classes.

        Args:
            rows: int64 (N,), on any device, or a list of numbers; ids that nobody holds count for nothing.

        Returns:
            How many rows each place gave up: every part by name, ``test sets``, ``past``, ``ledger``. A row may have been in
            several places.

        Raises:
            StreamError: these are no ids.
            StateError: an update is under way or broke off in the middle, or an engine trained, whose memory is its own.
        """
        try:
            rows = torch.as_tensor(rows)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise StreamError(
                f"rows to be erased were given as {shown(rows)}: give their ids, whole numbers in one dimension, as the column 'row' "
                "has them."
            ) from error
        rows = rows.to(torch.int64) if not rows.numel() else rows
        if rows.dim() != 1 or rows.dtype == torch.bool or rows.is_floating_point() or rows.is_complex():
            raise StreamError(
                f"rows to be erased were given as {tuple(rows.shape)} {rows.dtype}: give their ids, whole numbers in one "
                "dimension, as the column 'row' has them."
            )
        self._check_erasable()
        rows = rows.to("cpu", torch.int64)
        found: dict[str, int] = {}
        if self._context is not None:
            self._context.features.release()
        with self.randomness.framework():
            for part in [] if self._context is None else self.parts:
                found[part.name] = found.get(part.name, 0) + part.erase(rows)
        found[TESTS] = 0 if self.monitor is None else self.monitor.erase(rows)
        before = self._past_rows()
        self._past = [(_without(train, rows), _valid_without(valid, rows)) for train, valid in self._past]
        found[PAST] = before - self._past_rows()
        found[LEDGER] = self.ledger.erase(rows)
        if self._context is not None and self._context.experience is not None:
            self._pending_name, self._context.experience = self._context.experience.name, None
        self.learnt_fingerprint = None
        if self.folder is not None and self.updates:
            self._checkpoint(None)
        return found

    def _check_erasable(self) -> None:
        if self._engine is not None:
            raise StateError(
                f"what {self._engine.name} remembers cannot be erased row by row: learn the stream anew without these rows."
            )
        name = self._failed if self._pending is None else self._pending_name
        if name is not None:
            raise StateError(
                f"the learner stands in the middle of the update on '{name}', whose rows are under way: finish it, or go on "
                "from the last save between two updates, then erase."
            )

    def _past_rows(self) -> int:
        return sum(len(table) for tables in self._past for table in tables if table is not None)


def _without(table: Table, rows: Tensor) -> Table:
    stays_N = ~torch.isin(table.column("row").to("cpu", torch.int64), rows)
    return owned(table, stays_N.nonzero().flatten())


def _valid_without(table: Table | None, rows: Tensor) -> Table | None:
    left = None if table is None else _without(table, rows)
    return left if left is not None and len(left) else None
