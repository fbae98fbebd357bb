"""What a monitor says of a version, as it is written down; and how long a prediction takes beside another version's.

Letters: N rows of a test set.
"""

from __future__ import annotations

import statistics
import time

import torch

from continual.learner import Learner
from continual.monitor.evaluation import evaluating
from continual.monitor.metrics import defined
from continual.monitor.monitor import Monitor
from continual.refresh.records import Measured
from continual.table import Table, to_device

ROWS = 64
TURNS = 5


def measured_in(monitor: Monitor) -> tuple[Measured, ...]:
    """Mean scores of every experience and probe at the last update, when it was learnt, and at the update before."""
    last = monitor.updates() - 1
    learnt, before = monitor.pairs(), monitor.pairs(before=last - 1) if last else {}
    low, high = monitor.last_intervals()
    rows = {name: len(table) for name, table in zip(monitor.names(), monitor.tables().values(), strict=False)}
    found = []
    for place, (name, score) in enumerate(zip(monitor.names(), monitor.matrix()[last], strict=True)):
        found.append(
            Measured(
                name=name,
                rows=rows.get(name, 0),
                score=defined(score),
                low=defined(low[place]),
                high=defined(high[place]),
                learnt=defined(learnt[name][0].mean()) if name in learnt else defined(score),
                before=defined(before[name][0].mean()) if name in before else None,
            )
        )
    for name, history in monitor.probe_history().items():
        key, scores = f"probe {name}", history["scores"]
        then = defined(before[key][0].mean()) if key in before else None
        found.append(Measured(name=name, rows=len(monitor.probes[name]), score=scores[-1], learnt=scores[0], before=then,
                              probe=True))  # fmt: skip
    return tuple(found)


def seconds_in_turns(one: Learner, other: Learner, table: Table) -> tuple[float, float]:
    """Median seconds that each takes to answer the same rows (at most 64), measured in turns after a turn unmeasured."""
    rows = table[torch.arange(min(len(table), ROWS))]
    found: tuple[list[float], list[float]] = ([], [])
    for turn in range(TURNS + 1):
        for learner, seconds in zip((one, other), found, strict=True):
            batch = to_device(rows, learner.device)
            with learner.randomness.framework(), evaluating(learner.model):
                started = time.perf_counter()
                learner.answer(batch).logits.float().sum().item()
                if turn:
                    seconds.append(time.perf_counter() - started)
    return statistics.median(found[0]), statistics.median(found[1])
