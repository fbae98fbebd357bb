"""The same table for a README or a terminal (Markdown), and every run in full precision for other programs (CSV)."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from continual.report import numbers
from continual.report.aggregate import COSTS, METRICS, Estimate, aggregate
from continual.report.findings import findings, headline
from continual.report.load import Failure, Result
from continual.report.numbers import Scale

SHOWN = {
    "accuracy": "accuracy",
    "learning_accuracy": "learning accuracy",
    "bwt": "BWT",
    "forgetting": "forgetting",
    "retention": "retention",
}


def markdown_table(results: Sequence[Result]) -> str:
    """One table for each stream, best first; 95 % interval in brackets, ``*`` where it is over rows (one seed)."""
    blocks = []
    for stream in aggregate(results):
        scale = Scale.of(stream)
        heads = ["strategy", "seeds", *(_head(scale, metric) for metric in SHOWN), "train s", "state"]
        rows = [
            [
                one.strategy,
                str(len(one.runs)),
                *(_cell(scale, one.metrics[metric], metric) for metric in SHOWN),
                numbers.seconds(one.cost["train_seconds"]),
                numbers.size(one.total_bytes),
            ]
            for one in stream.strategies
        ]
        unit = "scores in %" if scale.percent else f"scores: {stream.score}"
        lines = [f"**{_escape(stream.stream)}** ({unit})", "", *_lines(heads, rows)]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n" if blocks else "No run has finished.\n"


def markdown_report(results: Sequence[Result], title: str, *, failures: Sequence[Failure] = ()) -> str:
    """The sentences of the page, the tables, and what failed."""
    lines = [f"# {_escape(title)}", ""]
    for stream in aggregate(results):
        lines += [_escape(" ".join([headline(stream), *findings(stream), *stream.warnings])), ""]
    lines += [markdown_table(results).rstrip(), ""]
    if failures:
        rows = [[one.stream, one.strategy, str(one.seed), one.sentence] for one in failures]
        lines += ["**Failed**", "", *_lines(["stream", "strategy", "seed", "why"], rows), ""]
    return "\n".join(lines)


def csv_table(results: Sequence[Result]) -> str:
    """One line for each run: metrics with their interval over rows, costs and provenance, nothing rounded."""
    names = ["stream", "strategy", "seed", "scenario", "objective", "score", "experiences", "updates"]
    for metric in METRICS:
        names += [metric, f"{metric}_low", f"{metric}_high"]
    names += [*COSTS, "state_bytes", "commit", "started"]
    names += ["stream_fingerprint", "strategy_fingerprint", "base_model_sha256"]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(names)
    for run in sorted(results, key=lambda one: one.key):
        row: list[object] = [run.stream, run.strategy, run.seed, run.scenario, run.objective, run.score]
        row += [len(run.experiences), len(run.matrix)]
        for metric in METRICS:
            low, high = run.intervals.get(metric) or (None, None)
            row += [getattr(run.metrics, metric), low, high]
        row += [getattr(run.cost, name) for name in COSTS]
        origin = run.provenance
        row += [sum(run.cost.state_bytes.values()), origin.commit, origin.started]
        row += [origin.stream_fingerprint, origin.strategy_fingerprint, origin.base_model_sha256]
        writer.writerow(row)
    return buffer.getvalue()


def _head(scale: Scale, metric: str) -> str:
    """The line above a table gives the unit of its scores; a share among scores of another kind has its own."""
    name = scale.title.lower() if metric == "accuracy" else SHOWN[metric]
    return name if scale.percent or scale.column_unit(metric) != "%" else f"{name} %"


def _cell(scale: Scale, found: Estimate | None, metric: str) -> str:
    sign = metric == "bwt"
    value = scale.text(found.mean if found else None, metric, sign=sign)
    if found is None or found.low is None or found.high is None:
        return value
    low, high = (scale.text(end, metric, sign=sign) for end in (found.low, found.high))
    return f"{value} [{low}, {high}]{'*' if found.over == 'rows' else ''}"


def _lines(heads: list[str], rows: list[list[str]]) -> list[str]:
    cells = [[_escape(cell) for cell in row] for row in [heads, *rows]]
    widths = [max(len(row[place]) for row in cells) for place in range(len(heads))]
    left = {0, *(place for place, head in enumerate(heads) if head in ("strategy", "why"))}
    padded = [
        [
            cell.ljust(wide) if place in left else cell.rjust(wide)
            for place, (cell, wide) in enumerate(zip(row, widths, strict=True))
        ]
        for row in cells
    ]
    rule = ["-" * wide if place in left else "-" * (wide - 1) + ":" for place, wide in enumerate(widths)]
    return ["| " + " | ".join(row) + " |" for row in [padded[0], rule, *padded[1:]]]


def _escape(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
