"""What became of an update, as a file for Prometheus' text collector (text exposition format 0.0.4).

Every sample carries the label ``store``, so that the files of several stores may lie in one folder. Times are seconds since
1970 as values; the collector allows no time stamps of samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import get_args

from continual.monitor.gate import Answer
from continual.refresh.records import Manifest, Outcome, Report
from continual.refresh.rules import Finding, Happened

LIVE = "continual_live_version"
"""The first of the gauges of the version that is live, with which the file ends."""
Sample = tuple[dict[str, str], float | int]
"""Labels and value."""


def exposition(outcome: Outcome, live: tuple[Manifest, Report] | None, now: float) -> str:
    """The text of the file; the same input gives the same text.

    Args:
        outcome: of the last update.
        live: what is written of the version that is live; None where none is.
        now: when the update ended, seconds since 1970.
    """
    return "".join(_block(outcome.store, *gauge) for gauge in _gauges(outcome, live, now) if gauge[2])


def with_live(text: str, store: str, live: tuple[Manifest, Report] | None) -> str:
    """A file's text with what it says of the last update, and of the version that is live now."""
    kept = text.partition(f"# HELP {LIVE} ")[0]
    return kept + "".join(_block(store, *gauge) for gauge in (() if live is None else _of_live(*live)) if gauge[2])


def _block(store: str, name: str, explained: str, samples: Sequence[Sample]) -> str:
    lines = [f"# HELP {name} {_escape(explained, quotes=False)}", f"# TYPE {name} gauge"]
    lines += [_line(name, {"store": store} | labels, value) for labels, value in samples]
    return "\n".join(lines) + "\n"


def _gauges(
    outcome: Outcome, live: tuple[Manifest, Report] | None, now: float
) -> Iterator[tuple[str, str, Sequence[Sample]]]:
    yield (
        "continual_last_update",
        "1 for what became of the last update, 0 for what did not.",
        [({"happened": one}, int(one == outcome.happened)) for one in get_args(Happened)],
    )
    yield "continual_last_update_timestamp_seconds", "When the last update ended.", [({}, now)]
    yield "continual_update_seconds", "How long the last update took.", [({}, outcome.seconds)]
    yield "continual_update_attempts", "How many settings the last update tried.", [({}, outcome.attempts)]
    answer = _answer(outcome)
    answers = [({"answer": one}, int(one == answer)) for one in get_args(Answer)]
    yield "continual_gate_answer", "1 for the answer of the gate to the last update.", answers if answer else []
    effects = {one.kind: one.effect for one in reversed(outcome.found)}
    yield (
        "continual_drift_effect",
        "Size of each kind of drift in the rows of the last update, 0 where none was found.",
        [({"kind": kind}, effects.get(kind, 0.0)) for kind in get_args(Finding)],
    )
    if live is not None:
        yield from _of_live(*live)


def _of_live(manifest: Manifest, report: Report) -> Iterator[tuple[str, str, Sequence[Sample]]]:
    yield LIVE, "Number of the version that is live.", [({}, manifest.version)]
    created = _seconds(manifest.created)
    made: list[Sample] = [] if created is None else [({}, created)]
    yield "continual_live_created_timestamp_seconds", "When the version that is live was made.", made
    tests = [one for one in report.measured if not one.probe]
    known: list[Sample] = [({"experience": one.name}, one.score) for one in tests if one.score is not None]
    yield "continual_score", "Mean score of each experience in the version that is live.", known
    mean: list[Sample] = [({}, sum(value for _, value in known) / len(known))] if known else []
    yield "continual_mean_score", "Mean of the scores of all experiences in the version that is live.", mean
    probes: list[Sample] = [
        ({"probe": one.name}, one.score) for one in report.measured if one.probe and one.score is not None
    ]
    yield "continual_probe_score", "Mean score of each probe in the version that is live.", probes
    drops = [one.learnt - one.score for one in tests if one.learnt is not None and one.score is not None]
    worst: list[Sample] = [({}, max(drops))] if drops else []
    yield "continual_worst_drop", "Largest drop of an experience's mean score since the version that learnt it.", worst
    parts: list[Sample] = [({"part": part}, size) for part, size in report.bytes.items()]
    yield "continual_state_bytes", "Bytes of each part of the version that is live.", parts


def _answer(outcome: Outcome) -> Answer | None:
    """Of the whole: that of the worst check; None where the gate was not asked."""
    if outcome.worst is not None:
        return outcome.worst.answer
    return "pass" if outcome.happened == "promoted" else None


def _seconds(created: str) -> float | None:
    try:
        moment = datetime.fromisoformat(created)
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _line(name: str, labels: dict[str, str], value: float | int) -> str:
    inside = ",".join(f'{key}="{_escape(text, quotes=True)}"' for key, text in labels.items())
    return f"{name}{{{inside}}} {value!r}"


def _escape(text: str, *, quotes: bool) -> str:
    escaped = text.replace("\\", "\\\\").replace("\n", "\\n")
    return escaped.replace('"', '\\"') if quotes else escaped
