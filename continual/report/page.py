"""The page: one HTML file that holds everything it shows, and is read as well on paper as in the dark."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from continual.disk import write_text
from continual.report import figures, numbers
from continual.report.aggregate import StrategySummary, StreamSummary, aggregate
from continual.report.findings import FORGETTING_NOTE, best_of, findings, headline
from continual.report.load import Failure, Result, load_result
from continual.report.numbers import Scale
from continual.report.significance import LEVEL, Comparison, compare, with_best
from continual.report.svg import inline, theme


@dataclass(frozen=True)
class Column:
    """One column of the table of strategies; ``signed`` figures carry a plus. The final score is called by its name."""

    metric: str
    title: str
    explained: str
    signed: bool = False


COLUMNS = (
    Column("accuracy", "", "Mean score over all experiences after the last update."),
    Column("learning_accuracy", "Learning", "Mean score of each experience right after its own update (the diagonal)."),
    Column("bwt", "BWT", "Backward transfer: mean change of the earlier experiences since their own update.", True),
    Column("forgetting", "Forgetting", "Mean drop of each experience from the best it ever had. Biased upwards."),
    Column("fwt", "FWT", "Forward transfer: mean gain on an experience before its own update.", True),
    Column("retention", "Retention", "Mean of the final score over the score right after the experience's own update."),
    Column("negative_flips", "Neg. flips", "Share of test rows that were right before and are wrong now."),
    Column("intransigence", "Intransig.", "What joint training reaches on an experience and this strategy did not."),
)


def write_page(
    results: Sequence[Result], path: Path, title: str, *, summary: str = "", failures: Sequence[Failure] = ()
) -> None:
    """Write the report of ``results`` as one self-contained HTML file; the same input gives the same bytes.

    Args:
        summary: a sentence below the title.
        failures: cells of a study that ended in an error; they are listed with their sentence.

    Raises:
        StateError: the file cannot be written, or the results cannot stand in one table.
    """
    write_text(Path(path), render_page(results, title, summary=summary, failures=failures))


def write_run_figures(folder: Path) -> Path:
    """Write ``figures/*.svg`` and ``report.html`` into the folder of a finished run; returns the page's path."""
    result = load_result(folder)
    for name, svg in figures.run_figures(result).items():
        write_text(Path(folder) / "figures" / name, svg)
    page = Path(folder) / "report.html"
    write_page([result], page, f"{result.stream} · {result.strategy}", summary=result.strategy_summary)
    return page


def render_page(results: Sequence[Result], title: str, *, summary: str = "", failures: Sequence[Failure] = ()) -> str:
    """The HTML text that :func:`write_page` writes."""
    ordered = sorted(results, key=lambda run: run.key)
    streams = aggregate(ordered)
    text = (
        environment(Path(__file__).parent)
        .get_template("page.html.j2")
        .render(
            title=title,
            summary=summary,
            theme=theme(),
            streams=[_stream(place, stream) for place, stream in enumerate(streams)],
            runs=ordered,
            failures=sorted(failures, key=lambda one: (one.stream, one.strategy, one.seed)),
            provenance=_provenance(ordered),
            started=_span(ordered),
        )
    )
    return text.rstrip() + "\n"


def environment(*folders: Path) -> Environment:
    """Where templates are found: in ``folders``, then beside this file; everything that is shown is escaped."""
    found = Environment(
        loader=FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.globals.update(
        seconds=numbers.seconds,
        count=numbers.count,
        size=numbers.size,
        integers=numbers.integers,
        probability=numbers.probability,
    )
    return found


def _stream(place: int, stream: StreamSummary) -> dict[str, Any]:
    """Everything that the template shows of one stream."""
    scale, best = Scale.of(stream), best_of(stream)
    columns = [
        column
        for column in COLUMNS
        if column.metric in ("accuracy", "learning_accuracy", "bwt", "forgetting", "retention")
        or any(one.metrics[column.metric] for one in stream.strategies)
    ]
    ranked = [one for one in stream.strategies if one.metrics["accuracy"]]
    drawn: dict[str, str] = {}
    if ranked:
        drawn["ranking"] = figures.ranking_figure(stream)
        drawn["progress"] = figures.progress_figure(stream)
        drawn["cost"] = figures.cost_figure(stream)
    low, high = figures.limits(stream)
    return {
        "name": stream.stream,
        "summary": stream.summary,
        "scenario": stream.scenario,
        "objective": stream.objective,
        "score": stream.score,
        "unit": scale.unit.strip(),
        "experiences": [f"{number} {name}" for number, name in enumerate(stream.experiences, 1) if name != str(number)],
        "count": len(stream.experiences),
        "seeds": stream.seeds,
        "headline": headline(stream),
        "findings": findings(stream),
        "warnings": stream.warnings,
        "columns": [(column, column.title or scale.title, scale.column_unit(column.metric)) for column in columns],
        "forgetting_note": FORGETTING_NOTE if scale.percent else "",
        "rows": [_row(one, columns, scale, one is best) for one in stream.strategies],
        "best": best.strategy if best is not None else "",
        "level": f"{LEVEL:g}",
        "apart": _apart(stream, scale, best),
        "over_rows": any(found and found.over == "rows" for one in stream.strategies for found in one.metrics.values()),
        "low": scale.text(low),
        "high": scale.text(high),
        "figures": {
            name: Markup(inline(svg, f"s{place}-{name}", f"{name} of the strategies on {stream.stream}"))
            for name, svg in drawn.items()
        },
        "matrices": [
            Markup(
                inline(
                    figures.matrix_figure(stream, one), f"s{place}-m{at}", f"{stream.score} matrix of {one.strategy}"
                )
            )
            for at, one in enumerate(stream.strategies)
            if one.matrix
        ],
        "probes": [
            (one.strategy, name, *(scale.text(value) for value in (first, last, _change(first, last))))
            for one in stream.strategies
            for name, (first, last) in one.probes.items()
        ],
        "retentions": [
            Markup(inline(figures.retention_figure(stream, one), f"s{place}-r{at}", f"retention under {one.strategy}"))
            for at, one in enumerate(stream.strategies)
            if one.curve
        ],
    }


def _apart(stream: StreamSummary, scale: Scale, best: StrategySummary | None) -> list[dict[str, str]]:
    """Each strategy beside the best one: how much lower it ends, and whether that would be so with other seeds and rows."""
    if best is None:
        return []
    found = with_best(stream, compare(stream))
    return [_beside(scale, found[one.strategy], best) for one in stream.strategies if one.strategy in found]


def _beside(scale: Scale, one: Comparison, best: StrategySummary) -> dict[str, str]:
    first = one.one == best.strategy
    sign = 1.0 if first else -1.0
    values = [None if value is None else sign * value for value in (one.difference, one.low, one.high)]
    difference, low, high = values if first else (values[0], values[2], values[1])
    interval = "" if low is None or high is None else f"{scale.text(low, sign=True)} to {scale.text(high, sign=True)}"
    needed = f"not testable: {one.seeds} of {one.t_seeds_needed} seeds" if one.t_seeds_needed else "not testable"
    over = {"seeds": ", over seeds", "rows": ", over rows of these seeds"}
    verdicts = {"different": "yes", "not told apart": "no", "not testable": "not testable"}
    return {
        "name": one.other if first else one.one,
        "difference": scale.text(difference, sign=True),
        "interval": interval,
        "seeds": numbers.probability(one.t_holm) if one.t_holm is not None else needed,
        "rows": numbers.probability(one.rows_holm),
        "verdict": verdicts[one.verdict] + (over[one.over] if one.over else ""),
    }


def _short(part: str, parts: Mapping[str, float]) -> str:
    """``slot/kind`` as its kind, where no other part has the same."""
    kind = part.rpartition("/")[2]
    return part if sum(other.rpartition("/")[2] == kind for other in parts) > 1 else kind


def _change(first: float | None, last: float | None) -> float | None:
    return None if first is None or last is None else last - first


def _row(one: StrategySummary, columns: Sequence[Column], scale: Scale, best: bool) -> dict[str, Any]:
    cells = []
    for column in columns:
        found = one.metrics[column.metric]
        cells.append(
            {
                "value": scale.text(found.mean if found else None, column.metric, sign=column.signed),
                "interval": scale.interval(found, column.metric, sign=column.signed),
                "rows": bool(found and found.over == "rows"),
                "std": scale.text(found.std, column.metric) if found and found.std is not None else "",
            }
        )
    return {
        "name": one.strategy,
        "summary": one.summary,
        "source": one.source,
        "best": best,
        "bound": one.bound,
        "seeds": one.seeds,
        "cells": cells,
        "cost": one.cost,
        "parts": [(_short(part, one.state_bytes), part, value) for part, value in one.state_bytes.items()],
        "bytes": one.total_bytes,
        "notes": one.notes,
    }


def _provenance(runs: Sequence[Result]) -> list[tuple[str, list[str]]]:
    """What the runs have in common, each distinct value once, in a fixed order."""

    def distinct(values: list[str | None]) -> list[str]:
        return sorted({value for value in values if value})

    commands = [run.provenance.command for run in runs]
    entries = [
        ("Commit", distinct([run.provenance.commit for run in runs])),
        ("Hardware", distinct([_plain(run.provenance.hardware) for run in runs])),
        ("Versions", distinct([_plain(run.provenance.versions) for run in runs])),
        ("Base model, SHA-256", distinct([run.provenance.base_model_sha256 for run in runs])),
        ("Command", distinct([" ".join(one) if isinstance(one, list) else one for one in commands])),
    ]
    return [(name, found) for name, found in entries if found]


def _plain(value: Any) -> str:
    if not isinstance(value, dict):
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    shown = {
        name: numbers.size(item) if name.endswith("_bytes") else item
        for name, item in value.items()
        if item is not None
    }
    return " · ".join(f"{name.removesuffix('_bytes').replace('_', ' ')} {item}" for name, item in shown.items())


def _span(runs: Sequence[Result]) -> str:
    days = sorted({run.provenance.started[:10] for run in runs})
    return "" if not days else days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
