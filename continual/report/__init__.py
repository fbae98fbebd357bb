"""What was found, shown: reads run folders and nothing else."""

from continual.report.load import Failure, Result, load_failures, load_result, load_results
from continual.report.markdown import csv_table, markdown_report, markdown_table
from continual.report.page import render_page, write_page, write_run_figures

__all__ = [
    "Failure",
    "Result",
    "csv_table",
    "load_failures",
    "load_result",
    "load_results",
    "markdown_report",
    "markdown_table",
    "render_page",
    "write_page",
    "write_run_figures",
]
