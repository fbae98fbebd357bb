"""One sentence on what to do after an update."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence
from typing import Protocol

from continual.kinds import Objective

PRACTICAL = 100
"""More test rows than so many times those at hand are asked of nobody."""
EXACT = "exact head"
"""Among the slots: a head that replay cannot help, since it keeps what it learnt."""
PLASTIC = 0.8
"""A new experience below this share of what earlier ones reached was learnt too little."""


class Line(Protocol):
    """What the advice looks at (:class:`continual.monitor.retention.Kept`)."""

    @property
    def name(self) -> str: ...
    @property
    def probe(self) -> bool: ...
    @property
    def status(self) -> str: ...
    @property
    def before(self) -> float | None: ...
    @property
    def after(self) -> float | None: ...
    @property
    def change(self) -> float | None: ...
    @property
    def rows(self) -> int: ...
    @property
    def rows_needed(self) -> int | None: ...


def advise(lines: Sequence[Line], objective: Objective, slots: Collection[str] | None) -> str:
    """What to do next: about what was forgotten, else about what was hardly learnt, else about test sets too small.

    Args:
        lines: of the tree.
        objective: only accuracies of different experiences are compared with each other.
        slots: kinds of parts in use (``replay``, ``penalty``, ..., :data:`EXACT`), None where not known.
    """
    forgotten = _worst(lines, "forgotten")
    if forgotten is not None:
        return f"'{forgotten.name}' lost {_size(forgotten, objective)}: {_remedy(forgotten, slots)}."
    hardly = _hardly_learnt(lines, objective)
    if hardly is not None:
        return f"{hardly}: {_plasticity(slots)}."
    some = _worst(lines, "lost some")
    if some is not None:
        return f"'{some.name}' lost {_size(some, objective)}, which is real, if not surely more than the tolerance: watch it."
    unsure = [line for line in lines if line.status == "cannot tell"]
    if unsure:
        line = min(unsure, key=lambda line: line.rows_needed or line.rows)
        if line.rows_needed is not None and line.rows_needed > PRACTICAL * line.rows:
            return (
                f"the change of '{line.name}' lies too near the tolerance for its {line.rows} test rows, and for any "
                "practical number of them, to tell: read its interval, or set another tolerance."
            )
        needed = "more" if line.rows_needed is None else f"about {line.rows_needed}"
        return f"the test set of '{line.name}' is too small to tell with its {line.rows} rows: give it {needed} rows."
    if any(line.status == "kept" for line in lines):
        return "nothing: every test set that could be compared has kept its score."
    return "nothing yet: there is no earlier score to compare with."


def _worst(lines: Sequence[Line], status: str) -> Line | None:
    found = [line for line in lines if line.status == status]
    return min(found, key=lambda line: line.change or 0.0) if found else None


def _size(line: Line, objective: Objective) -> str:
    if line.change is None:
        return "its scores, which are no longer finite"
    size = abs(line.change)
    return f"{100 * size:.1f} points" if objective == "classification" else f"{size:.3f}"


def _remedy(line: Line, slots: Collection[str] | None) -> str:
    if line.probe:
        return "lower the learning rate, train fewer weights (an adapter), or replay rows like those of the probe"
    if slots is not None and EXACT in slots:
        return (
            "the head keeps what it learnt of these rows, so they were erased, or given to classes that came later: look at which, "
            "or take other features"
        )
    if slots is None:
        return "replay some of its rows, or more of them where replay is in use"
    if "replay" not in slots:
        beside = " beside the penalty, which alone is weak protection" if "penalty" in slots else ""
        return f"add replay of some of its rows to the strategy{beside}"
    return "raise the capacity or the share of the replay, or lower the learning rate"


def _hardly_learnt(lines: Sequence[Line], objective: Objective) -> str | None:
    learnt = [line.before for line in lines if not line.probe and line.before is not None]
    new = [line for line in lines if not line.probe and line.status == "new" and line.after is not None]
    if objective != "classification" or not learnt or not new:
        return None
    usual = statistics.median(learnt)
    line = min(new, key=lambda line: line.after or 0.0)
    if (line.after or 0.0) >= PLASTIC * usual:
        return None
    return f"'{line.name}' was learnt to {line.after or 0.0:.3f} only, where earlier ones reached {usual:.3f}"


def _plasticity(slots: Collection[str] | None) -> str:
    holding = [slot for slot in ("penalty", "distillation", "projection") if slots is not None and slot in slots]
    if holding:
        return f"lower the strength of the {' and the '.join(holding)}, or train longer"
    if slots is not None and "adapter" in slots:
        return "raise the rank of the adapter or the learning rate, or train longer"
    return "train longer or raise the learning rate"
