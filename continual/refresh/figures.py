"""The figures of a store's page, each as SVG text; they look like those of :mod:`continual.report.figures`.

Letters: V versions, S experiences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from continual.refresh.history import History, Version
from continual.report.figures import NUMBERED_CELLS, age, end_label, score_axis
from continual.report.numbers import Scale, size
from continual.report.svg import EMPTY, GRID, INK, MUTED, PAPER, SCORES, SERIES, draw, shorten, spread

NAMED_ROWS = 40
"""Up to so many versions the rows of the heat map are named, and what became of them is written out."""
LINED_CELLS = 60
"""Up to so many rows or columns the cells of the heat map stand apart."""
MARKS = {"live": "●", "was live": "", "rolled back": "↶", "failed": "×", "cannot tell": "?", "not live": "○"}
COSTS = ("train", "evaluate", "drift", "rest")
_WIDTH = 10.4
_ROOM = 12
"""Bars that there is room for at least, so that few of them are not wide."""


def limits(history: History, scale: Scale) -> tuple[float, float]:
    """The range of scores: for shares from a tenth below the lowest to 1, else what was measured, a little wider."""
    cells = [cell for row in history.matrix for cell in row if cell is not None]
    if not cells:
        return 0.0, 1.0
    if scale.percent:
        return max(math.floor(10 * min(cells) - 0.2) / 10, 0.0), 1.0
    margin = 0.04 * (max(cells) - min(cells)) or 0.5
    return min(cells) - margin, max(cells) + margin


def matrix_figure(history: History, scale: Scale) -> str:
    """Heat map: row = version, column = experience; at the right what became of the version."""
    matrix, (low, high) = history.matrix, limits(history, scale)
    rows, columns = len(matrix), max(len(history.experiences), 1)
    named = rows <= NAMED_ROWS
    wide, tall = min(7.4 / columns, 0.62), 0.3 if named else max(min(9.0 / rows, 0.2), 0.05)

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.add_patch(Rectangle((0, 0), columns, rows, facecolor=EMPTY, edgecolor=GRID, linewidth=0, hatch="//////"))
        values = [[math.nan if value is None else value for value in row] or [math.nan] for row in matrix]
        mesh = axes.pcolormesh(
            values, cmap=SCORES, vmin=low, vmax=high, edgecolors="none", rasterized=rows * columns > 2500
        )
        mesh.set_zorder(1)
        if named and columns <= NUMBERED_CELLS:
            _numbers(axes, matrix, scale, low, high)
        for place in range(1, columns if columns <= LINED_CELLS else 1):
            axes.axvline(place, color=PAPER, linewidth=1.0 if columns <= NUMBERED_CELLS else 0.4, zorder=3)
        for place in range(1, rows if rows <= LINED_CELLS else 1):
            axes.axhline(place, color=PAPER, linewidth=1.0 if named else 0.4, zorder=3)
        _ticks(axes.set_xticks, [str(place + 1) for place in range(columns)], 28, 0.5)
        names = [f"{one.number}  {_clean(one.manifest.experience, 16)}" for one in history.versions]
        _ticks(axes.set_yticks, names if named else [str(one.number) for one in history.versions], NAMED_ROWS, 0.5)
        for row, version in enumerate(history.versions):
            mark, colour = _mark(version, named)
            axes.annotate(
                mark,
                (1.0, row + 0.5),
                xycoords=("axes fraction", "data"),
                xytext=(6, 0),
                textcoords="offset points",
                va="center_baseline",
                color=colour,
                fontsize=8.5 if named else 7,
            )
        axes.set_xlabel("experience")
        axes.set_ylabel("version")
        axes.set_xlim(0, columns)
        axes.set_ylim(rows, 0)
        axes.spines[:].set_visible(False)

    return draw(min(wide * columns + 2.9, _WIDTH), rows * tall + 0.7, paint)


def curves_figure(history: History, scale: Scale) -> str:
    """Score of each experience from the version that learnt it to the live one; thick and dashed: the mean of those known."""
    line, columns = history.line, len(history.experiences)
    low, high = (value * scale.factor for value in limits(history, scale))

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        ends: list[tuple[int, float]] = []
        for column, name in enumerate(history.experiences):
            points = [
                (place, value * scale.factor)
                for place, version in enumerate(line, 1)
                if (value := version.scores.get(name)) is not None
            ]
            if points:
                xs, ys = zip(*points, strict=True)
                axes.plot(xs, ys, color=age(column, columns), linewidth=1.5 if columns <= 30 else 0.8, zorder=3)
                axes.plot(xs[:1], ys[:1], "o", color=age(column, columns), markersize=3.6, zorder=4)
                ends.append((column, ys[-1]))
        means = [(place, version.mean) for place, version in enumerate(line, 1) if version.mean is not None]
        axes.plot(
            [place for place, _ in means],
            [value * scale.factor for _, value in means],
            color=INK,
            linewidth=2.2,
            linestyle=(0, (2, 1.2)),
            zorder=5,
        )
        score_axis(axes, scale, low, high, label=scale.score)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.set_ylim(low - 0.03 * (high - low), high + 0.03 * (high - low))
        shown = ends if len(ends) <= 14 else ends[:: math.ceil(len(ends) / 12)]
        places = spread([value for _, value in shown], (high - low) * 0.055, low, high)
        for (column, value), place in zip(shown, places, strict=True):
            label = f"{column + 1} {_clean(history.experiences[column], 16)}"
            end_label(axes, len(line), value, place, label, age(column, columns), len(line))
        _ticks(axes.set_xticks, [str(version.number) for version in line], 25, 1)
        axes.set_xlim(1 - 0.04 * len(line), len(line) * 1.04)
        axes.set_xlabel("version")

    return draw(_WIDTH, 3.4, paint)


def sizes_figure(history: History) -> str:
    """Bytes of each version, and bytes on disk after each."""

    def paint(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        places = range(1, len(history.versions) + 1)
        left.bar(places, [version.bytes for version in history.versions], width=_bar(len(places)), color=SERIES[0])
        right.plot(places, history.disk, color=SERIES[0], linewidth=1.7, marker="o", markersize=3.0)
        right.fill_between(places, history.disk, color=SERIES[0], alpha=0.13, linewidth=0)
        for axes, title in ((left, "of one version"), (right, "of all versions together, on disk")):
            _amounts(axes, history, title)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value)))

    return draw(_WIDTH, 2.5, paint)


def cost_figure(history: History) -> str:
    """Seconds of each refresh, what it did on top of each other."""

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        places = range(1, len(history.versions) + 1)
        base = [0.0] * len(places)
        for name, colour in zip(COSTS, SERIES, strict=False):
            spent = [version.report.cost.get(name, 0.0) for version in history.versions]
            axes.bar(places, spent, bottom=base, width=_bar(len(places)), color=colour, label=name)
            base = [low + own for low, own in zip(base, spent, strict=True)]
        _amounts(axes, history, "seconds of each refresh")
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(
            handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, labelcolor=INK
        )

    return draw(_WIDTH, 2.5, paint)


def _numbers(axes: Any, matrix: Sequence[Sequence[float | None]], scale: Scale, low: float, high: float) -> None:
    for row, found in enumerate(matrix):
        for column, value in enumerate(found):
            if value is not None:
                number = f"{value * 100:.0f}" if scale.percent else f"{value:.2f}"
                axes.text(
                    column + 0.5,
                    row + 0.5,
                    number.replace("-", "−"),
                    ha="center",
                    va="center_baseline",
                    color="#ffffff" if (value - low) / (high - low) > 0.5 else "#111111",
                )


def _mark(version: Version, named: bool) -> tuple[str, str]:
    """What stands beside a row, and its colour: what became of the version, and a gate that was overruled."""
    standing = version.standing
    colour = SERIES[1] if standing == "failed" else INK if standing == "live" else MUTED
    overruled = version.manifest.answer != "pass" and standing not in ("failed", "cannot tell")
    if not named:
        return MARKS[standing] + (MARKS["failed"] if overruled and version.manifest.answer == "fail" else ""), colour
    words: str = "" if standing == "was live" else standing
    if overruled:
        words += f"{', ' if words else ''}gate: {version.manifest.answer}"
    return f"{MARKS[standing]} {words}".strip(), colour


def _amounts(axes: Any, history: History, title: str) -> None:
    count = len(history.versions)
    _ticks(axes.set_xticks, [str(version.number) for version in history.versions], 20, 1)
    axes.set_xlim(0.5 - 0.02 * count, max(count, _ROOM) * 1.02 + 0.5)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="y")
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("version")
    axes.set_title(title)


def _bar(count: int) -> float:
    return 0.7 if count <= 40 else 1.0


def _ticks(put: Any, labels: Sequence[str], most: int, start: float) -> None:
    """At most so many labels, evenly spaced, the first at ``start``."""
    every = max(1, math.ceil(len(labels) / most))
    put([start + place for place in range(0, len(labels), every)], labels[::every])


def _clean(name: str, limit: int) -> str:
    printable = "".join(letter if letter.isprintable() else "�" for letter in name)
    return shorten(printable, limit)
