"""What a monitor says of a version, as it is written down; and how long a prediction takes beside another version's.

Letters: N rows of a test set.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from continual.learner import Learner
from continual.monitor.evaluation import evaluating
from continual.monitor.metrics import defined
from continual.monitor.monitor import Monitor
from continual.refresh.bounds import mean_interval
from continual.refresh.records import Measured
from continual.table import Table, to_device

LEVEL = 0.025
"""Of each end of an interval."""
ROWS = 64
TURNS = 5
SCALED = 10.0
"""A network takes features up to about this size as they are."""


def measured_in(monitor: Monitor) -> tuple[Measured, ...]:
    """Mean scores of every experience and probe at the last update, when it was learnt, and at the update before."""
    last = monitor.updates() - 1
    learnt, before = monitor.pairs(), monitor.pairs(before=last - 1) if last else {}
    now = monitor.scores()
    found = []
    for name, score_N in now.items():
        low, high = (None, None) if score_N is None else mean_interval(score_N, LEVEL)
        score = None if score_N is None else _mean(score_N)
        found.append(
            Measured(
                name=name,
                rows=0 if score_N is None else len(score_N),
                score=score,
                low=low,
                high=high,
                learnt=_mean(learnt[name][0]) if name in learnt else score,
                before=_mean(before[name][0]) if name in before else None,
            )
        )
    for name, history in monitor.probe_history().items():
        key, scores = f"probe {name}", history["scores"]
        then = defined(before[key][0].mean()) if key in before else None
        found.append(Measured(name=name, rows=len(monitor.probes[name]), score=scores[-1], learnt=scores[0], before=then,
                              probe=True))  # fmt: skip
    return tuple(found)


def _mean(score_N: NDArray[np.float32]) -> float | None:
    """None where there are no rows, as where all were erased."""
    return defined(float(score_N.mean())) if len(score_N) else None


def no_better(name: str, score: float | None, holdout: Table | None, class_names: Sequence[str]) -> str | None:
    """One sentence where always giving the most frequent label of the hold-out is right as often, or oftener; else None.

    Args:
        score: accuracy on the hold-out.
        class_names: of the labels in ``holdout``.
    """
    if score is None or holdout is None or not len(holdout):
        return None
    counts = torch.bincount(holdout.column("labels"), minlength=len(class_names))
    share = float(counts.max()) / len(holdout)
    if share == 1 or score > share:
        return None
    said = (
        f"'{name}' scores {score:.3f} on its own hold-out, no better than always answering '{class_names[int(counts.argmax())]}' "
        f"({share:.3f}): the update has learnt nothing of use from it, and the gate asks what was lost (gate.new_floor asks for more)"
    )
    inputs = holdout.column("inputs").float() if "inputs" in holdout.names else torch.zeros(1)
    if inputs.isfinite().all() and inputs.abs().max() > SCALED:
        said += f"; its features reach from {inputs.min():.4g} to {inputs.max():.4g}: bring each to a mean of 0 and a spread of 1"
    return f"{said}."


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
