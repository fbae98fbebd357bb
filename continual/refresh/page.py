"""The retention page of a store: one HTML file that a team opens every month, read as well on paper as in the dark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from continual.refresh import figures
from continual.refresh.history import History, Version, changes, history_of
from continual.refresh.reasons import in_numbers
from continual.refresh.records import Manifest, Measured, Report
from continual.report.load import SHARES
from continual.report.numbers import UNITS, Scale
from continual.report.page import environment
from continual.report.svg import inline, theme


@dataclass(frozen=True)
class Event:
    """One entry of the journal.

    Attributes:
        time: when, as ISO 8601 says it.
        event: what happened: ``promoted``, ``rolled back``, ``erased`` …
        version: that it is about; None where it is about none.
        sentence: about it.
    """

    time: str
    event: str
    version: int | None
    sentence: str


def render_page(
    title: str, events: Sequence[Event], reports: Sequence[tuple[Manifest, Report]], live: int | None
) -> str:
    """The HTML text of the page; the same input gives the same text, and nothing in it is loaded from elsewhere.

    Args:
        events: of the journal, the oldest first.
        reports: manifest and report of every version, in any order.
        live: number of the version that is live; None where none is.
    """
    promoted = {event.version for event in events if event.event == "promoted"}
    history = history_of(reports, live, promoted)
    scale = Scale(history.score in SHARES, history.score)
    low, high = figures.limits(history, scale)
    shown = history.live or (history.versions[-1] if history.versions else None)
    template = environment(Path(__file__).parent).get_template("store.html.j2")
    text = template.render(
        title=title,
        theme=theme(),
        history=history,
        span=_span([version.manifest.created for version in history.versions]),
        headline=_headline(history, scale, live),
        last=_last(history),
        shown=shown,
        known=[_known(one, scale) for one in shown.report.measured] if shown else [],
        unit="%" if scale.percent else UNITS.get(scale.score, scale.score),
        points="points" if scale.percent else UNITS.get(scale.score, scale.score),
        score=scale.score,
        low=scale.text(low),
        high=scale.text(high),
        marks={standing: mark for standing, mark in figures.MARKS.items() if mark},
        named=[f"{place} {name}" for place, name in enumerate(history.experiences, 1)],
        figures=_figures(history, scale),
        verdicts=[_verdict(version, scale) for version in reversed(history.versions)],
        drifts=[version for version in reversed(history.versions) if version.report.drift.found],
        costs=figures.COSTS,
        disk=history.disk,
        events=list(reversed(events)),
    )
    return text.rstrip() + "\n"


def _figures(history: History, scale: Scale) -> dict[str, Markup]:
    if not history.versions:
        return {}
    drawn = {
        "matrix": (figures.matrix_figure(history, scale), f"{scale.score} of every experience in every version"),
        "curves": (figures.curves_figure(history, scale), f"{scale.score} of every experience from version to version"),
        "sizes": (figures.sizes_figure(history), "bytes of every version, and on disk"),
        "cost": (figures.cost_figure(history), "seconds of every refresh"),
    }
    return {name: Markup(inline(svg, name, label)) for name, (svg, label) in drawn.items()}


def _headline(history: History, scale: Scale, live: int | None) -> str:
    if live is None:
        return "No version is live."
    version = history.live
    if version is None:
        return f"Version {live} is live, and nothing is written of it."
    said = f"Version {live} is live, made on {version.manifest.created[:10]}"
    if version.mean is None:
        return f"{said}; none of its scores was measured."
    count = sum(score is not None for score in version.scores.values())
    said += f": mean {scale.score} {scale.text(version.mean)}{scale.unit} over {count} experience{'' if count == 1 else 's'}"
    earlier = [one for one in version.report.measured if not one.probe and one.name != version.manifest.experience]
    since = [change for one in earlier if (change := changes(one)[0]) is not None]
    if not since:
        return f"{said}."
    change = sum(since) / len(since)
    size = scale.text(abs(change)) + (" points" if scale.percent else "")
    return f"{said}; the earlier ones score {size} {'less' if change < 0 else 'more'} than when each was learnt."


def _last(history: History) -> dict[str, str] | None:
    """What the last update did."""
    if not history.versions:
        return None
    version = history.versions[-1]
    words = {
        "live": "went live",
        "was live": "went live",
        "rolled back": "went live and was rolled back",
        "failed": "failed and is not live",
        "cannot tell": "could not be told and is not live",
        "not live": "passed and is not live",
    }
    return {
        "what": f"The last update, '{version.manifest.experience}' (version {version.number}), {words[version.standing]}",
        "sentence": version.report.judgement.sentence.rstrip("."),
    }


def _known(one: Measured, scale: Scale) -> dict[str, Any]:
    since, last = changes(one)
    interval = ""
    if one.low is not None and one.high is not None:
        interval = f"{scale.text(one.low)} to {scale.text(one.high)}"
    return {
        "name": one.name,
        "probe": one.probe,
        "rows": one.rows,
        "score": scale.text(one.score),
        "interval": interval,
        "learnt": scale.text(one.learnt),
        "since": scale.text(since, sign=True),
        "last": scale.text(last, sign=True),
    }


def _verdict(version: Version, scale: Scale) -> dict[str, Any]:
    manifest, report = version.manifest, version.report
    worst = report.judgement.checks[0] if report.judgement.checks else None
    settings = ", ".join(f"{name} = {value}" for name, value in report.settings.items())
    return {
        "number": version.number,
        "date": manifest.created[:10],
        "experience": manifest.experience,
        "trained": report.data.trained,
        "holdout": report.data.holdout,
        "standing": version.standing,
        "answer": manifest.answer,
        "sentence": report.judgement.sentence,
        "rule": "" if worst is None else worst.rule.replace("_", " "),
        "about": "" if worst is None else worst.name,
        "numbers": "" if worst is None else in_numbers(worst, scale.percent),
        "attempt": f"attempt {report.attempt + 1}{f' with {settings}' if settings else ''}" if report.attempt else "",
        "notes": report.notes,
        "erased": manifest.erased,
    }


def _span(times: Sequence[str]) -> str:
    days = sorted({time[:10] for time in times})
    return "" if not days else days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
