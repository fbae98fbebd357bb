"""What an update and a whole run give back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from continual.monitor.monitor import Retention


@dataclass(frozen=True)
class Update:
    """One update; printing it shows what is still known of every experience so far.

    Attributes:
        index, name: of the experience.
        retention: the retention tree, None where nothing could be measured.
        steps, rows: optimiser steps, and rows that went through them (replayed ones included).
        train_seconds, monitor_seconds: wall time.
        stopped_early: whether early stopping ended it.
        notes: what the user should know, such as a memory with fewer rows than were asked for.
    """

    index: int
    name: str
    retention: Retention | None
    steps: int
    rows: int
    train_seconds: float
    monitor_seconds: float
    stopped_early: bool = False
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        shown = (
            str(self.retention)
            if self.retention
            else f"update {self.index + 1} · {self.name}: no test set, not measured"
        )
        return "\n".join([shown, *(f"note: {note}" for note in self.notes)])


@dataclass
class Run:
    """All updates over a stream.

    Attributes:
        updates: those that this call made (fewer than the stream has where the run was resumed).
        result: the content of ``result.json``.
    """

    updates: list[Update] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, float | None]:
        """Metrics of the whole run by name."""
        return dict(self.result["metrics"])
