"""When AdaLoRA prunes: shares of one task's own steps, and the ranks that are left."""

from __future__ import annotations

from dataclasses import dataclass

from continual.errors import CompositionError


@dataclass(frozen=True)
class Schedule:
    """Steps are counted from 1.

    Attributes:
        steps: optimiser steps of the task.
        warmup: steps at full rank before the budget begins to fall (``tinit``).
        final: steps after the last allocation, in which the kept directions train on (``tfinal``).
    """

    steps: int
    warmup: int
    final: int

    @property
    def last_allocation(self) -> int:
        """The step whose allocation brings the budget to its target."""
        return self.steps - self.final


def make_schedule(steps: int, warmup: float, final: float) -> Schedule:
    """The schedule of a task of ``steps`` steps, ``warmup + final < 1`` being shares of them, rounded down.

    However short the task, the last allocation comes after the warm-up: ``warmup < last_allocation``.

    Raises:
        CompositionError: the number of steps is not known, or 0.
    """
    if steps < 1:
        raise CompositionError(
            f"AdaLoRA plans its pruning from the number of optimiser steps of the task, and this one has {steps}: give "
            "`begin` the number of steps, or use adapter kind 'lora'."
        )
    return Schedule(steps, int(warmup * steps), int(final * steps))
