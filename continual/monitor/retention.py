"""What is left of every experience after an update, as data and as a tree that can be printed.

Each test set is compared with its own scores just after it was learnt, row by row (a probe with its first scores):

* ``forgotten``: the drop is significantly more than the tolerance (corrected for the number of lines);
* ``lost some``: significantly more than nothing, not significantly more than the tolerance;
* ``kept``: significantly less than the tolerance, and not significantly more than nothing;
* ``cannot tell``: the test set is too small to say either;
* ``new``: learnt, or first measured, at this update; ``not measured``: left out at this update.

Letters: N rows of a test set.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from continual.kinds import Objective
from continual.monitor.advice import PRACTICAL, advise
from continual.monitor.gate import paired_drop
from continual.monitor.metrics import defined
from continual.monitor.statistics import smallest_detectable_drop
from continual.objective import PRIMARY

Status = Literal["new", "kept", "lost some", "forgotten", "cannot tell", "not measured"]

TOLERANCE: dict[Objective, float] = {"classification": 0.03, "regression": 0.1, "causal-lm": 0.1, "seq2seq": 0.1}
"""How much may be lost before it is called forgotten: accuracy; share of the squared error; log-likelihood per token
(0.1 is a tenth of the geometric mean probability of a token)."""


@dataclass(frozen=True)
class Kept:
    """One line of the tree.

    Attributes:
        name: of the experience or the probe.
        probe: whether it is a probe.
        status: as above.
        before, after: mean score just after it was learnt, and now.
        change, low, high: after minus before with its two-sided interval, which holds for all lines of the tree together.
        rows: of the test set.
        smallest_detectable_drop: what the paired test of this line finds on these rows with 80 % power.
        rows_needed: where it cannot be told, the rows that would tell.
    """

    name: str
    probe: bool
    status: Status
    before: float | None
    after: float | None
    change: float | None
    low: float | None
    high: float | None
    rows: int
    smallest_detectable_drop: float | None
    rows_needed: int | None


@dataclass(frozen=True)
class Retention:
    """What an update left of everything before it; ``str`` gives the tree.

    Attributes:
        update: number of the update, from 0.
        name: of the experience that it learnt.
        objective: what the scores are (:data:`continual.objective.PRIMARY`).
        lines: one for each test set, in order, then one for each probe.
        metrics: name → value, None where not defined.
        intervals: name → low and high.
        forgetting_bias: what max-based forgetting would read here with nothing forgotten.
        advice: one sentence.
    """

    update: int
    name: str
    objective: Objective
    lines: tuple[Kept, ...]
    metrics: dict[str, float | None]
    intervals: dict[str, tuple[float, float]]
    forgetting_bias: float | None
    advice: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self) | {
            "lines": [asdict(line) for line in self.lines],
            "intervals": {name: list(ends) for name, ends in self.intervals.items()},
        }

    def __str__(self) -> str:
        rows = [_cells(line, self.objective) for line in self.lines]
        widths = [max((len(row[column]) for row in rows), default=0) for column in range(4)]
        lines = []
        for place, row in enumerate(rows):
            branch = "└── " if place == len(rows) - 1 else "├── "
            name, before, after, change = (cell.ljust(width) for cell, width in zip(row, widths, strict=False))
            lines.append(f"{branch}{name}   {before} → {after}   {change}   {row[4]}".rstrip())
        head = f"update {self.update + 1} · {self.name}".ljust(4 + sum(widths[:3]) + 9)
        overall = f"{PRIMARY[self.objective]} {_number(self.metrics.get('accuracy'))}"
        return "\n".join(
            [f"{head} {overall}{self._ends('accuracy')}", *lines, *self._summary(), f"what to do: {self.advice}"]
        )

    def _summary(self) -> list[str]:
        parts = []
        for name in ("retention", "bwt", "forgetting", "negative_flips"):
            value = self.metrics.get(name)
            if value is None:
                continue
            text = f"{name.replace('_', ' ')} {_number(value)}"
            if name == "forgetting":
                text += _bias_note(self.forgetting_bias)
            parts.append(text)
        return [" · ".join(parts)] if parts else []

    def _ends(self, name: str) -> str:
        ends = self.intervals.get(name)
        return "" if ends is None else f" [{_number(ends[0])}, {_number(ends[1])}]"


def judge(
    name: str,
    before_N: NDArray[np.float32] | None,
    after_N: NDArray[np.float32] | None,
    tolerance: float,
    confidence: float = 0.95,
    probe: bool = False,
    family: int = 1,
) -> Kept:
    """One line of the tree from the scores of one test set.

    Args:
        before_N: scores just after it was learnt, None where that is this update.
        after_N: scores now, None where it was left out.
        tolerance: in the unit of the scores.
        confidence: of the whole tree.
        family: how many lines are compared in this tree. Each decision is one-sided at (1 - confidence) / 2 / family
            (Bonferroni), so that one false alarm in the whole tree has at most the probability (1 - confidence) / 2; the
            interval of each line is the one that belongs to its decisions.
    """
    before = None if before_N is None else _mean(before_N)
    after = None if after_N is None else _mean(after_N)
    rows = len(after_N) if after_N is not None else len(before_N) if before_N is not None else 0
    if before_N is None or after_N is None:
        status: Status = "not measured" if after_N is None else "new"
        smallest = None if after_N is None else smallest_detectable_drop(after_N, level=(1 - confidence) / 2)
        return Kept(name, probe, status, before, after, None, None, None, rows, smallest, None)
    level = (1 - confidence) / 2
    alarm = level / max(family, 1)
    verdict = paired_drop(before_N, after_N, tolerance, alarm, name)
    if verdict.verdict == "fail":
        status = "forgotten"
    elif verdict.low is not None and verdict.low > 0:
        status = "lost some"
    else:
        status = "kept" if verdict.verdict == "pass" else "cannot tell"
    change, low, high = (None if value is None else -value for value in (verdict.drop, verdict.high, verdict.low))
    smallest = smallest_detectable_drop(before_N, after_N, level=alarm)
    needed = verdict.rows_needed if status == "cannot tell" else None
    return Kept(name, probe, status, before, after, change, low, high, rows, smallest, needed)


def retention_of(
    update: int,
    name: str,
    objective: Objective,
    lines: tuple[Kept, ...],
    metrics: dict[str, float | None],
    intervals: dict[str, tuple[float, float]],
    forgetting_bias: float | None,
    slots: tuple[str, ...] | None,
) -> Retention:
    """The whole, with one sentence of advice that fits the parts in use."""
    advice = advise(lines, objective, slots)
    return Retention(update, name, objective, lines, metrics, intervals, forgetting_bias, advice)


def _cells(line: Kept, objective: Objective) -> tuple[str, str, str, str, str]:
    points = objective == "classification"
    change = ""
    if line.change is not None:
        unit = " pts" if points else ""
        change = f"{_change(line.change, points)}{unit}"
        if line.low is not None and line.high is not None:
            change += f" [{_change(line.low, points)}, {_change(line.high, points)}]"
    word = line.status.upper() if line.status == "forgotten" else line.status
    if line.status == "kept" and line.smallest_detectable_drop is not None:
        size = line.smallest_detectable_drop
        word += f" (smallest detectable drop {f'{100 * size:.1f} pts' if points else _number(size)})"
    if line.status == "cannot tell":
        word += f" ({line.rows} rows{_wanted(line)})"
    name = f"probe {line.name}" if line.probe else line.name
    return name, _number(line.before), _number(line.after), change, word


def _bias_note(bias: float | None) -> str:
    """With a single earlier measurement there is no maximum to take, and no bias."""
    if bias is not None and abs(bias) < 5e-4:
        return " (max-based)"
    shown = "" if bias is None else f": about {_number(bias)} would show with none"
    return f" (max-based, biased upwards{shown})"


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:.3f}".replace("-", "−")


def _change(value: float, points: bool) -> str:
    text = f"{100 * value:+.1f}" if points else f"{value:+.3f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "−")


def _mean(scores_N: NDArray[np.float32]) -> float | None:
    return defined(float(scores_N.mean(dtype=np.float64))) if len(scores_N) else None


def _wanted(line: Kept) -> str:
    if not line.rows_needed:
        return ""
    return (
        ", too near the tolerance" if line.rows_needed > PRACTICAL * line.rows else f", about {line.rows_needed} needed"
    )
