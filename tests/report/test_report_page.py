"""The page and the tables: self-contained, the same bytes every time, the right figures in the right cells."""

from __future__ import annotations

import csv
import html
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest

from continual.errors import StateError
from continual.report import (
    Failure,
    Result,
    csv_table,
    load_result,
    load_results,
    markdown_report,
    markdown_table,
    render_page,
    write_page,
    write_run_figures,
)
from continual.report.aggregate import aggregate
from continual.report.figures import cost_figure, matrix_figure, progress_figure, retention_figure
from continual.report.numbers import Scale


class _Page(HTMLParser):
    """What the page loads, its ids, and the text of its table cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self._cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [str(value) for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        self.ids += [str(value) for name, value in attrs if name == "id"]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.rows[-1][-1] += data.strip() + " "


Table = dict[str, list[list[str]]]


def _tables(text: str) -> tuple[dict[str, Table], dict[str, Table]]:
    """What is known and what it costs, by stream and by the first word of a row: the words of each cell."""
    tables: list[dict[str, Table]] = []
    for label in ("strategies on", "costs on"):
        found = re.findall(rf'aria-label="{label} (\w+)">\s*<table>(.*?)</table>', text, flags=re.DOTALL)
        rows = {stream: [[cell.split() for cell in row] for row in _Page(body).rows] for stream, body in found}
        tables.append({stream: {row[0][0]: row for row in inside} for stream, inside in rows.items()})
    return tables[0], tables[1]


@pytest.fixture(scope="module")
def results(make_in: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    base = tmp_path_factory.mktemp("runs")
    for seed in range(2):
        make_in(base, "naive", seed, [[0.9, None], [0.0, 0.9 + 0.02 * seed]])
        make_in(base, "rehearsal", seed, [[0.9, None], [0.8, 0.8 + 0.02 * seed]], notes=["A note <of> the run."])
        make_in(base, "joint", seed, [[0.95, 0.85]])
    language = {"stream": "text", "score": "log-likelihood per token", "objective": "causal-lm"}
    make_in(base, "other", 0, [[-1.0, -3.0], [-2.0, -1.5]], **language)
    return load_results([base])


@pytest.fixture(scope="module")
def text(results: list[Result]) -> str:
    return render_page(results, "A study", summary="What it is for.")


def test_the_page_holds_everything_it_shows(text: str) -> None:
    page = _Page(text)
    assert all(link.startswith("#") or link.startswith("data:") for link in page.loads)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert "svg" in page.tags
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.loads if link.startswith("#")} <= set(page.ids)


def test_the_style_loads_nothing_and_knows_dark_and_paper(text: str) -> None:
    style = text[text.index("<style>") : text.index("</style>")]
    assert "@import" not in style and "url(" not in style
    assert "prefers-color-scheme: dark" in style and "@media print" in style and "overflow-x: auto" in style


def test_the_same_runs_give_the_same_bytes_in_any_order(results: list[Result], text: str, tmp_path: Path) -> None:
    write_page(results[::-1], tmp_path / "page.html", "A study", summary="What it is for.")
    assert (tmp_path / "page.html").read_bytes() == text.encode()
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_a_place_that_cannot_be_written_is_said(results: list[Result], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "file" / "page.html", tmp_path / "file" / "in" / "page.html", tmp_path / "folder"):
        with pytest.raises(StateError, match=re.escape(f"'{place}' could not be written")):
            write_page(results[:1], place, "A study")
    if Path("/proc").is_dir():
        with pytest.raises(StateError, match=r"'/proc/x/page\.html' could not be written"):
            write_page(results[:1], Path("/proc/x/page.html"), "A study")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_the_table_holds_the_figures(text: str) -> None:
    known, costs = _tables(text)
    rows = known["digits"] | known["text"]
    # accuracies .80 and .81, so 80.5 with a t interval of 12.706 * .5 on either side
    assert rows["rehearsal"][1] == ["80.5", "74.1", "to", "86.9"]
    assert rows["rehearsal"][3] == ["−10.0", "−10.0", "to", "−10.0"]
    assert rows["naive"][4] == ["90.0", "90.0", "to", "90.0"]
    assert rows["joint"][2] == ["–"]
    assert costs["digits"]["rehearsal"][1:] == [
        ["10.5"],
        ["0.50"],
        ["100"],
        ["300", "MB"],
        ["85.0", "k"],
        ["12.3", "kB"],
        ["linear", "345", "B", "·", "rehearsal", "12.0", "kB"],
    ]
    # one seed: accuracy (-2 + -1.5) / 2 with the interval over rows that the run recorded
    assert rows["other"][1] == ["−1.750", "−1.800", "to", "−1.710*"]


def test_every_column_has_its_unit(text: str, results: list[Result]) -> None:
    known, costs = _tables(text)
    assert [" ".join(cell) for cell in known["digits"]["Strategy"][1:]] == [
        "Accuracy %",
        "Learning %",
        "BWT points",
        "Forgetting ↑ points",
        "Retention %",
        "Intransig. points",
    ]
    assert [" ".join(cell) for cell in known["text"]["Strategy"][1:]] == [
        "Final score nats",
        "Learning nats",
        "BWT nats",
        "Forgetting nats",
        "Retention %",
    ]
    assert [" ".join(cell) for cell in costs["text"]["Strategy"][1:4]] == ["Train s", "Monitor s", "Speed rows/s"]
    assert "Training and monitoring" not in text and 'title="Training without the monitor."' in text
    assert text.count("biased upwards: with no forgetting") == 1 and "The score is the log-likelihood per token" in text
    assert "log-likelihood per token matrix of other" in text and "accuracy matrix of naive" in text
    heads = [line.split("|") for line in markdown_table(results).splitlines() if line.startswith("| strategy")]
    digits, language = ([head.strip() for head in line] for line in heads)
    assert (digits[3], digits[7]) == ("accuracy", "retention")
    assert (language[3], language[7]) == ("final score", "retention %")


@pytest.mark.parametrize(
    ("score", "title", "units"),
    [
        ("exact match", "Exact match", ("%", "points", "%")),
        ("negative squared error", "Final score", ("error²", "error²", "%")),
        ("a score of mine", "Final score", ("a score of mine", "a score of mine", "%")),
    ],
)
def test_units_of_other_scores(make: Any, score: str, title: str, units: tuple[str, ...]) -> None:
    (stream,) = aggregate([load_result(make("a", 0, score=score))])
    scale = Scale.of(stream)
    found = tuple(scale.column_unit(metric) for metric in ("accuracy", "bwt", "retention"))
    assert (scale.title, found) == (title, units)


def test_headline_notes_warning_and_provenance_are_there(text: str) -> None:
    assert "A note &lt;of&gt; the run." in text
    text = html.unescape(text)
    assert "Best is rehearsal: 80.5 % accuracy on digits after 2 updates" in text
    assert "biased upwards" in text and "What it is for." in text
    assert "abc1234" in text and "memory 16.0 GB" in text and "1" * 16 in text and "Someone 2020" in text


def test_names_cannot_become_markup(make: Any) -> None:
    result = load_result(make("<script>alert(1)</script>", stream='a"b<i>', experiences=["<b>", "$x_1$ 数"]))
    failure = Failure("s", "t", 0, "<img src=http://x>")
    page = _Page(render_page([result], "<u>", failures=[failure]))
    assert not {"script", "b", "i", "u", "img"} & set(page.tags)


def test_failures_and_nothing_at_all(results: list[Result]) -> None:
    failed = [Failure("digits", "ewc", 1, "the loss is not finite at step 41.")]
    page = html.unescape(render_page(results[-1:], "A study", failures=failed))
    assert "1 run on 1 stream, 1 failed" in page and "the loss is not finite at step 41." in page
    empty = render_page([], "A study", failures=failed)
    assert "No run has finished." in empty and "the loss is not finite" in empty
    report = markdown_report(results, "A study", failures=failed)
    assert "| digits | ewc      |    1 | the loss is not finite at step 41. |" in report


def test_a_run_that_measured_nothing_is_shown(make: Any) -> None:
    result = load_result(make(metrics={}, intervals={})).model_copy(update={"matrix": []})
    assert "No strategy on digits has a final accuracy." in render_page([result], "x")


def test_probes_are_shown_before_and_after(make: Any) -> None:
    probes = {"general": {"updates": [-1, 0, 1], "scores": [0.8, 0.75, 0.7]}}
    rows = _Page(render_page([load_result(make(probes=probes))], "x")).rows
    assert ["rehearsal", "general", "80.0", "70.0", "−10.0"] in [[cell.strip() for cell in row] for row in rows]


@pytest.mark.parametrize("experiences", [1, 2, 13, 55])
def test_figures_of_any_length_are_sound_svg(make: Any, experiences: int) -> None:
    matrix = [[0.9 - 0.01 * (i - j) if j <= i else None for j in range(experiences)] for i in range(experiences)]
    (stream,) = aggregate([load_result(make("a", 0, matrix)), load_result(make("b", 0, matrix))])
    before = dict(matplotlib.rcParams)
    for paint in (matrix_figure, retention_figure):
        ElementTree.fromstring(paint(stream, stream.strategies[0]))
    for paint_all in (progress_figure, cost_figure):
        text = paint_all(stream)
        assert text == paint_all(stream)
        assert len([found for found in ElementTree.fromstring(text).iter() if (found.text or "").strip() == "b"]) >= 1
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("updates", [1, 2, 13])
def test_long_names_leave_room_for_the_curves(make: Any, updates: int) -> None:
    matrix = [[0.9 if j <= i else None for j in range(updates)] for i in range(updates)]
    (stream,) = aggregate([load_result(make(f"{letter * 3}[training.epochs=10]", 0, matrix)) for letter in "ab"])
    for drawn in (progress_figure(stream), retention_figure(stream, stream.strategies[0]), cost_figure(stream)):
        assert ElementTree.fromstring(drawn) is not None
    assert "aaa[traini….epochs=10]" in progress_figure(stream)


def test_cells_that_were_not_measured_are_hatched(make: Any) -> None:
    (stream,) = aggregate([load_result(make("a", 0))])
    drawn = matrix_figure(stream, stream.strategies[0])
    assert len(re.findall(r"fill: url\(#h", drawn)) == 1
    assert [number for number in ("90", "70", "80") if f">{number}<" in drawn] == ["90", "70", "80"]


def test_the_figures_of_one_run(make: Any) -> None:
    folder = make()
    page = write_run_figures(folder)
    assert page == folder / "report.html" and page.is_file()
    assert sorted(path.name for path in (folder / "figures").iterdir()) == ["matrix.svg", "retention.svg"]


def test_markdown_has_one_table_for_each_stream(results: list[Result]) -> None:
    digits, text = markdown_table(results).split("**text**")
    lines = [line for line in digits.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[0] for row in cells[2:]] == ["joint", "rehearsal", "naive"]
    assert cells[3][1:3] == ["2", "80.5 [74.1, 86.9]"] and cells[3][-2:] == ["10.5", "12.3 kB"]
    assert len({len(line) for line in lines}) == 1
    assert "−1.750 [−1.800, −1.710]*" in text


def test_pipes_do_not_break_the_table(make: Any) -> None:
    assert "a\\|b" in markdown_table([load_result(make("a|b", folder="x"))])
    assert markdown_table([]) == "No run has finished.\n"


def test_csv_has_every_run_in_full_precision(results: list[Result]) -> None:
    rows = list(csv.DictReader(io.StringIO(csv_table(results))))
    assert len(rows) == 7
    row = next(row for row in rows if row["strategy"] == "rehearsal" and row["seed"] == "1")
    assert float(row["accuracy"]) == (0.8 + 0.82) / 2 and row["fwt"] == "" and row["stream_fingerprint"] == "1" * 64
    assert float(row["accuracy_low"]) == float(row["accuracy"]) - 0.05 and row["state_bytes"] == "12345"
