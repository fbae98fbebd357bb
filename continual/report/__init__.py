"""What was found, shown: reads run folders and nothing else. What draws is loaded when something is drawn."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from continual.report.load import Failure, Result, load_failures, load_result, load_results

if TYPE_CHECKING:
    from continual.report.latex import latex_tables as latex_tables
    from continual.report.markdown import csv_table as csv_table
    from continual.report.markdown import markdown_report as markdown_report
    from continual.report.markdown import markdown_table as markdown_table
    from continual.report.page import render_page as render_page
    from continual.report.page import write_page as write_page
    from continual.report.page import write_run_figures as write_run_figures
    from continual.report.tables import write_tables as write_tables

_WHERE = {
    "csv_table": "continual.report.markdown",
    "latex_tables": "continual.report.latex",
    "markdown_report": "continual.report.markdown",
    "markdown_table": "continual.report.markdown",
    "render_page": "continual.report.page",
    "write_page": "continual.report.page",
    "write_run_figures": "continual.report.page",
    "write_tables": "continual.report.tables",
}

__all__ = [
    "Failure",
    "Result",
    "csv_table",
    "latex_tables",
    "load_failures",
    "load_result",
    "load_results",
    "markdown_report",
    "markdown_table",
    "render_page",
    "write_page",
    "write_run_figures",
    "write_tables",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(_WHERE[name]), name)
