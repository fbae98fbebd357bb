"""The tables beside the page: every run, every pair of strategies, and a table for a paper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from continual.disk import write_text
from continual.report.aggregate import aggregate
from continual.report.latex import latex_tables
from continual.report.load import Result
from continual.report.markdown import csv_table
from continual.report.significance import csv_significance


def write_tables(results: Sequence[Result], folder: Path, name: str = "report") -> list[Path]:
    """Write ``results.csv``, ``significance.csv`` and ``<name>.tex`` into ``folder``; returns their paths.

    Beside a page of another name than ``report``, that name stands before those of the CSV files too.

    Raises:
        StateError: a file cannot be written, the scores of a run are damaged, or the results cannot stand in one table.
    """
    before = "" if name == "report" else f"{name}-"
    texts = {
        f"{before}results.csv": csv_table(results),
        f"{before}significance.csv": csv_significance(aggregate(results)),
        f"{name}.tex": latex_tables(results),
    }
    for file, text in texts.items():
        write_text(Path(folder) / file, text)
    return [Path(folder) / file for file in texts]
