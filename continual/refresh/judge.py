"""May a new version go live? Every rule of the gate, applied to what the monitor measured, and why in one sentence.

Drops are tested row by row against the live version (the update before the last) and, where the rules ask for it, against
the version that learnt the experience (:func:`continual.monitor.gate.gate`); floors and negative flips by exact tests
(:mod:`continual.refresh.bounds`). Within each rule the chance of any false alarm is at most 1 - confidence, however many
experiences there are; two rules are two chances.

Letters: N rows of a test set.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from continual.errors import StreamError
from continual.monitor.gate import Answer, gate
from continual.monitor.metrics import Floats, defined
from continual.monitor.monitor import Monitor
from continual.refresh.bounds import hold_to
from continual.refresh.reasons import judgement_sentence
from continual.refresh.records import Check, Judgement
from continual.refresh.rules import GateRules

Scores = NDArray[np.float32]

_ANSWERS: tuple[Answer, ...] = ("fail", "cannot tell", "pass")
_RULES = (
    "finite",
    "max_drop",
    "max_drop_since_learnt",
    "new_floor",
    "floor",
    "negative_flips",
    "slower",
    "largest",
)
"""In the order in which checks with the same answer stand; ``finite`` is asked of every version, whatever its rules."""


def judge(monitor: Monitor, rules: GateRules, *, new: str, slower: tuple[float, float] | None, size: int) -> Judgement:
    """What the gate says of the version that the last update of ``monitor`` made.

    Args:
        monitor: holds the scores of every test set at the last update, at the one before (the live version), and at the
            one that learnt it. What was not measured cannot be told, and so does not pass.
        new: name of the experience that the last update learnt; all others are earlier ones. Probes count as earlier ones
            too: before the first update they are compared with their score before any, where the model had one.
        slower: median seconds of a prediction by the live version and by the new one; None where nothing was measured.
        size: of the version, in bytes.

    Returns:
        ``fail`` if any check fails, else ``cannot tell`` if any cannot be told, else ``pass``. Checks stand by answer, then
        in the order of the rules, then by how far the value is beyond its limit. Values of drops, floors and their
        limits are in the unit of the score.

    Raises:
        StreamError: two experiences have the same name.
    """
    names = monitor.names()
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise StreamError(
            f"two experiences are called '{twice[0]}': give each a name of its own, so that each is judged."
        )
    last, level = monitor.updates() - 1, 1 - rules.confidence
    assert last >= 0, "an update that was not measured cannot be judged"
    scores = monitor.scores()
    live = {name: pair for name, pair in monitor.pairs(before=last - 1).items() if name != new}
    earlier = [name for name in scores if name != new]
    earlier += [
        f"probe {name}" for name, one in monitor.probe_history().items() if min(one["updates"], default=last) < last
    ]
    checks = _finite({**{name: after_N for name, (_, after_N) in live.items()}, **scores})
    checks += _drops("max_drop", rules.max_drop, live, earlier, level)
    if rules.max_drop_since_learnt is not None:
        since = {name: pair for name, pair in monitor.pairs().items() if name != new}
        checks += _drops("max_drop_since_learnt", rules.max_drop_since_learnt, since, earlier, level)
    if rules.floor is not None:
        checks += hold_to("floor", scores, rules.floor, level, least=True)
    if rules.new_floor is not None:
        checks += hold_to("new_floor", {new: scores.get(new)}, rules.new_floor, level, least=True)
    if rules.negative_flips is not None and earlier:
        flips_N = _flips(monitor, last, new)
        checks += hold_to("negative_flips", {"": flips_N}, rules.negative_flips, level, least=False)
    if rules.slower is not None and (earlier or slower is not None):
        checks.append(_slower(slower, rules.slower))
    if rules.largest is not None:
        answer: Answer = "pass" if size <= rules.largest else "fail"
        checks.append(Check(rule="largest", name="", answer=answer, value=float(size), limit=float(rules.largest)))
    checks.sort(key=_order)
    percent = monitor.objective == "classification"
    return Judgement(
        answer=checks[0].answer if checks else "pass",
        sentence=judgement_sentence(checks, new, len(earlier), percent, rules.confidence),
        checks=tuple(checks),
    )


def _finite(scores: dict[str, Scores | None]) -> list[Check]:
    """A failed check for each test set with scores that are no numbers now; ``value`` is their share."""
    found = []
    for name, score_N in scores.items():
        broken = 0 if score_N is None else int((~np.isfinite(score_N)).sum())
        if score_N is not None and broken:
            share, rows = broken / len(score_N), len(score_N)
            found.append(Check(rule="finite", name=name, answer="fail", value=share, limit=0.0, rows=rows))
    return found


def _drops(
    rule: str, margin: float, pairs: dict[str, tuple[Scores, Scores]], earlier: list[str], level: float
) -> list[Check]:
    checks = [
        Check(
            rule=rule,
            name=found.name,
            answer=found.verdict,
            value=found.drop,
            low=found.low,
            high=found.high,
            limit=margin,
            p_value=found.p_value,
            rows=found.rows,
            rows_needed=found.rows_needed,
        )
        for found in gate(pairs, margin, level)
    ]
    missing = [name for name in earlier if name not in pairs]
    return checks + [Check(rule=rule, name=name, answer="cannot tell", value=None, limit=margin) for name in missing]


def _flips(monitor: Monitor, last: int, new: str) -> Floats | None:
    """1 for each row of an earlier experience that was right in the live version and is wrong now, float64 (N,).

    None where scores are not right or wrong, as in a regression; probes are left out, which are no rows of the stream.
    """
    pairs = monitor.pairs(before=last - 1, score=monitor.right_or_wrong)
    found = [pairs[name] for name in monitor.scores() if name in pairs and name != new]
    if not found:
        return None
    return np.concatenate(
        [np.where(np.isfinite(after_N), (before_N == 1) & (after_N == 0), np.nan) for before_N, after_N in found]
    )


def _slower(medians: tuple[float, float] | None, limit: float) -> Check:
    if medians is None:
        return Check(rule="slower", name="", answer="cannot tell", value=None, limit=limit)
    live, now = medians
    ratio = defined(now / live) if live > 0 else None
    return Check(
        rule="slower",
        name="",
        answer="pass" if ratio is not None and ratio <= limit else "fail",
        value=ratio,
        limit=limit,
    )


def _order(check: Check) -> tuple[int, int, float, str]:
    """The worst first; what has no value stands before what has one."""
    sign = -1.0 if check.rule in ("floor", "new_floor") else 1.0
    beyond = math.inf if check.value is None else sign * (check.value - check.limit)
    return _ANSWERS.index(check.answer), _RULES.index(check.rule), -beyond, check.name
