"""The retention page: self-contained, the same bytes every time, what became of each version, nothing of a name as markup."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest
from store_records import measured, version

from continual.refresh.figures import cost_figure, curves_figure, limits, matrix_figure, sizes_figure
from continual.refresh.history import history_of
from continual.refresh.page import Event, render_page
from continual.refresh.records import Check, Found, Manifest, Report
from continual.report.numbers import Scale

Reports = list[tuple[Manifest, Report]]
PERCENT = Scale(True, "accuracy")


class _Page(HTMLParser):
    """What the page loads, its ids and tags, and the rows of its tables by label: the text of each cell."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.rows: dict[str, list[list[str]]] = {}
        self._table, self._cell = "", False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        self.loads += [str(value) for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        self.ids += [str(value) for name, value in attrs if name == "id"]
        if given.get("role") == "region":
            self._table = str(given["aria-label"])
            self.rows[self._table] = []
        if tag == "tr":
            self.rows[self._table].append([])
        if tag in ("td", "th"):
            self.rows[self._table][-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.rows[self._table][-1][-1] += " ".join(data.split()) + " "


def check(name: str, drop: float, answer: Any = "pass") -> Check:
    return Check(
        rule="max_drop", name=name, answer=answer, value=drop, low=drop - 0.01, high=drop + 0.01, limit=0.02, rows=200
    )


@pytest.fixture
def reports() -> Reports:
    """jan and feb live, mar failed, mar again live, apr rolled back, may cannot be told."""
    jan, feb, mar = measured("jan", 0.93, 0.95), measured("feb", 0.88, 0.9), measured("mar", 0.8, 0.8)
    shift = Found(kind="label-shift", sentence="more of 'pay'.", effect=0.34, p_value=0.0004, rows=77, names=("pay",))
    probe = measured("general", 0.71, 0.73, probe=True)
    return [
        version(1, "jan", (measured("jan", 0.95, 0.95),), sentence="nothing was learnt before 'jan'."),
        version(2, "feb", (measured("jan", 0.94, 0.95), measured("feb", 0.9, 0.9)), parent=1, found=(shift,)),
        version(
            3,
            "mar",
            (measured("jan", 0.85, 0.95), feb, mar),
            parent=2,
            answer="fail",
            sentence="'jan' fell by 9.0 points.",
            checks=(check("jan", 0.09, "fail"), check("feb", 0.02)),
        ),
        version(4, "mar", (jan, feb, mar, probe), parent=2, checks=(check("feb", 0.015),), notes=("A <note>.",)),
        version(5, "apr", (jan, feb, mar, measured("apr", 0.7, 0.7)), parent=4),
        version(
            6, "may", (jan, feb, mar, measured("may", None)), parent=4, answer="cannot tell", sentence="too few rows."
        ),
    ]


EVENTS = [
    *(
        Event(f"2025-0{number}-03T06:10:00+00:00", "promoted", number, f"version {number} is live.")
        for number in (1, 2, 4, 5)
    ),
    Event("2025-05-04T00:00:00+00:00", "rolled back", 4, "version 4 is live again."),
    Event("2025-06-30T00:00:00+00:00", "stopped", None, "unknown classes in 'june.csv'."),
]


def test_what_became_of_each_version(reports: Reports) -> None:
    history = history_of(reports[::-1], 4, {1, 2, 4, 5})
    assert [one.standing for one in history.versions] == [
        "was live",
        "was live",
        "failed",
        "live",
        "rolled back",
        "cannot tell",
    ]
    assert [one.number for one in history.line] == [1, 2, 4] and history.live is history.versions[3]
    assert history.experiences == ("jan", "feb", "mar", "apr", "may")
    assert history.matrix[2] == [0.85, 0.88, 0.8, None, None] and history.matrix[5][4] is None
    assert history.versions[3].mean == pytest.approx((0.93 + 0.88 + 0.8) / 3)
    by_hand = history_of(reports, 3, {1, 2, 3})
    assert by_hand.versions[2].standing == "live" and by_hand.versions[3].standing == "not live"
    none = history_of(reports, None, set())
    assert none.live is None and none.versions[0].standing == "not live" and none.line[-1].number == 6


def test_a_file_that_versions_share_lies_once_on_the_disk(reports: Reports) -> None:
    history = history_of(reports, 4, ())
    pieces: dict[str, int] = {}
    for (manifest, _), one, disk in zip(reports, history.versions, history.disk, strict=True):
        before = sum(pieces.values())
        pieces |= {piece.sha256: piece.bytes for piece in manifest.pieces.values()}
        assert one.bytes == sum(piece.bytes for piece in manifest.pieces.values())
        assert (one.added, disk) == (sum(pieces.values()) - before, sum(pieces.values()))
    assert history.versions[1].bytes - history.versions[1].added == 80_000


def test_the_page_says_what_is_live_and_what_the_last_update_did(reports: Reports) -> None:
    text = html.unescape(render_page("intents", EVENTS, reports, 4))
    assert "Version 4 is live, made on 2025-04-03: mean accuracy 87.0 % over 3 experiences" in text
    assert "the earlier ones score 2.0 points less than when each was learnt." in text
    assert "The last update, 'may' (version 6), could not be told and is not live: too few rows." in text
    assert "Last in the journal: 2025-06-30T00:00:00+00:00 · stopped · unknown classes in 'june.csv'." in text
    assert "No version is live." in render_page("x", [], reports, None)
    assert "Version 9 is live, and nothing is written of it." in render_page("x", [], reports, 9)


def test_the_tables_hold_the_figures(reports: Reports) -> None:
    rows = _Page(render_page("intents", EVENTS, reports, 4)).rows
    known = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows["scores of version 4"]}
    assert known["jan"] == ["200", "93.0 91.0 to 95.0", "95.0", "−2.0", "−2.0"]
    assert known["probe general"][1:3] == ["71.0 69.0 to 73.0", "73.0"]
    verdicts = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows["verdicts"]}
    assert list(verdicts) == ["Version", "6", "5", "4", "3", "2", "1"]
    assert verdicts["3"] == [
        "2025-03-03",
        "mar",
        "1000 200",
        "fail",
        "failed",
        "max drop · jan 9.0 (8.0 to 10.0) points, limit 2",
        "'jan' fell by 9.0 points.",
    ]
    assert verdicts["4"][3:5] == ["pass", "live"] and verdicts["4"][6].endswith("A <note>.")
    assert verdicts["5"][4] == "rolled back" and verdicts["1"][5] == "–"
    ((_, *drift),) = [row for row in rows["drift findings"] if row[0].strip() == "2"]
    assert [cell.strip() for cell in drift] == ["feb", "label shift", "0.34", "<.001", "77", "more of 'pay'. pay"]
    sizes = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows["sizes and costs"]}
    assert sizes["2"][:3] == ["40.4 MB", "40.3 MB", "80.5 MB"] and sizes["2"][3:7] == ["42.0", "4.0", "2.0", "1.0"]
    assert sizes["2"][7].startswith("weights 30.0 MB · replay/rehearsal 9.2 MB")
    assert [row[1].strip() for row in rows["journal"]][1:3] == ["stopped", "rolled back"]


def test_the_page_holds_everything_it_shows(reports: Reports) -> None:
    text = render_page("intents", EVENTS, reports, 4)
    page = _Page(text)
    assert all(link.startswith("#") or link.startswith("data:") for link in page.loads)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert page.tags.count("svg") == 4 and text.count('role="img" aria-label="') == 4
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.loads if link.startswith("#")} <= set(page.ids)
    style = text[text.index("<style>") : text.index("</style>")]
    assert "@import" not in style and "url(" not in style
    assert "prefers-color-scheme: dark" in style and "@media print" in style


def test_the_same_store_gives_the_same_bytes(reports: Reports) -> None:
    before = dict(matplotlib.rcParams)
    assert render_page("x", EVENTS, reports, 4) == render_page("x", EVENTS, reports[::-1], 4)
    assert dict(matplotlib.rcParams) == before


def hostile(evil: str, name: str) -> str:
    """A page on which everything that a user can name is ``evil``, or ``name``."""
    shift = Found(kind="leakage", sentence=evil, effect=0.1, names=(evil, name))
    scores = (measured(evil, 0.9, 0.9), measured(name, 0.5))
    manifest, report = version(1, evil, scores, sentence=evil, checks=(check(evil, 0.1, "fail"),), found=(shift,))
    changed = {"settings": {evil: evil}, "attempt": 1, "notes": (evil,), "bytes": {evil: 1}, "score": evil}
    return render_page(evil, [Event(evil, evil, 1, evil)], [(manifest, report.model_copy(update=changed))], 1)


def test_names_cannot_become_markup() -> None:
    evil = "<script>alert(1)</script>"
    text = hostile(evil, "\"'><img src=http://x>\n\x00$x$")
    assert evil not in text and text.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 10
    assert set(_Page(text).tags) == set(_Page(hostile("harmless", "x")).tags)


@pytest.mark.parametrize("score", ["accuracy", "log-likelihood per token"])
def test_scores_that_are_no_shares_have_three_decimals(score: str) -> None:
    sign = 1 if score == "accuracy" else -1
    text = html.unescape(
        render_page("x", [], [version(1, "jan", (measured("jan", sign * 0.5, sign * 0.5),), score=score)], 1)
    )
    assert ("mean accuracy 50.0 % over" in text) == (sign == 1)
    assert ("mean log-likelihood per token −0.500 over" in text) == (sign == -1)


def many(count: int) -> Reports:
    """So many versions; each forgets a little, every seventh fails."""
    found: Reports = []
    parent = None
    for number in range(1, count + 1):
        scores = tuple(measured(f"m{n}", max(0.95 - 0.003 * (number - n), 0.0), 0.95) for n in range(1, number + 1))
        found.append(version(number, f"m{number}", scores, parent=parent, answer="fail" if number % 7 == 0 else "pass"))
        parent = parent if number % 7 == 0 else number
    return found


@pytest.mark.parametrize("count", [1, 2, 13, 45])
def test_figures_of_any_length_are_sound_svg(count: int) -> None:
    history = history_of(many(count), None, ())
    drawn = [
        matrix_figure(history, PERCENT),
        curves_figure(history, PERCENT),
        sizes_figure(history),
        cost_figure(history),
    ]
    for text in drawn:
        ElementTree.fromstring(text)
    words = [" ".join((one.text or "").split()) for one in ElementTree.fromstring(drawn[0]).iter()]
    assert words.count("× failed" if count <= 40 else "×") == count // 7
    assert ("95" in words) == (count <= 12)


def test_two_hundred_versions() -> None:
    reports = many(200)
    text = render_page("x", [Event("2025", "promoted", n, "x") for n in range(1, 201) if n % 7], reports, 200)
    page = _Page(text)
    assert len(page.rows["verdicts"]) == 201 and len(page.rows["scores of version 200"]) == 201
    assert len(text) < 3_000_000 and sum(row[5].strip() == "failed" for row in page.rows["verdicts"]) == 28


def test_the_range_of_colours_is_that_of_the_scores() -> None:
    def of(*values: float, scale: Scale = PERCENT) -> tuple[float, float]:
        given = tuple(measured(str(place), value) for place, value in enumerate(values))
        return limits(history_of([version(1, "x", given, score=scale.score)], None, ()), scale)

    assert of(0.93, 0.81) == (0.7, 1.0) and of(0.04) == (0.0, 1.0) and of(1.0) == (0.9, 1.0)
    assert of(-3.0, -1.0, scale=Scale(False, "log-likelihood per token")) == pytest.approx((-3.08, -0.92))


def test_a_store_without_a_version_and_versions_that_measured_nothing() -> None:
    empty = render_page("x", EVENTS[-1:], [], None)
    assert "No version was made yet." in empty and "unknown classes" in empty and "<svg" not in empty
    nothing = render_page("x", [], [version(1, "jan", ())], 1)
    assert "none of its scores was measured" in nothing and re.search("0 experiences", nothing)


def test_a_gate_that_was_overruled_is_seen(reports: Reports) -> None:
    drawn = matrix_figure(history_of(reports, 3, {1, 2, 3}), PERCENT)
    assert "live, gate: fail" in drawn and "? cannot tell" in drawn
    assert "was live" not in drawn
