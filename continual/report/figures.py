"""The figures of a report, each as SVG text.

Every function takes what :mod:`continual.report.aggregate` gives; scores are drawn in per cent where they are shares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from continual.report.aggregate import StrategySummary, StreamSummary, aggregate
from continual.report.load import Result
from continual.report.numbers import Scale, size
from continual.report.svg import EMPTY, GRID, INK, MUTED, PAPER, SCORES, SERIES, draw, shorten, spread

NUMBERED_CELLS = 12
"""Up to so many columns the cells of a heat map carry their numbers."""
_AGES = LinearSegmentedColormap.from_list("ages", ("#4a54b8", "#2f7f9e", "#3f9f6b", "#b58b1d", "#c4551f"))
"""Experiences from the oldest to the newest; each is readable on white and on black."""


def run_figures(result: Result) -> dict[str, str]:
    """The figures of one run, file name → SVG text."""
    stream = aggregate([result])[0]
    strategy = stream.strategies[0]
    figures = {"matrix.svg": matrix_figure(stream, strategy)}
    if strategy.curve:
        figures["retention.svg"] = retention_figure(stream, strategy)
    return figures


def limits(stream: StreamSummary) -> tuple[float, float]:
    """The range of scores over all strategies: 0 to 1 for shares, else what was measured, a little wider."""
    if stream.percent:
        return 0.0, 1.0
    cells = [cell for one in stream.strategies for row in one.matrix for cell in row if cell is not None]
    low, high = (min(cells), max(cells)) if cells else (0.0, 1.0)
    margin = 0.04 * (high - low) or 0.5
    return low - margin, high + margin


def matrix_figure(stream: StreamSummary, strategy: StrategySummary) -> str:
    """Heat map of the matrix: row = after that update, column = experience; cells never measured are hatched."""
    scale, (low, high) = Scale.of(stream), limits(stream)
    rows, columns = len(strategy.matrix), len(stream.experiences)
    cell = min(2.55 / columns, 0.5)
    width = 3.1

    def paint(figure: Any) -> None:
        axes = figure.add_subplot(aspect="equal", anchor="NW")
        values = [[math.nan if value is None else value for value in row] for row in strategy.matrix]
        mesh = axes.pcolormesh(
            values, cmap=SCORES, vmin=low, vmax=high, edgecolors="none", rasterized=rows * columns > 2500
        )
        mesh.set_zorder(1)
        gap = 1.0 if columns <= NUMBERED_CELLS else 0.4
        for row, found in enumerate(strategy.matrix):
            for column, value in enumerate(found):
                if value is None:
                    axes.add_patch(
                        Rectangle((column, row), 1, 1, facecolor=EMPTY, edgecolor=GRID, linewidth=0, hatch="//////")
                    )
                elif columns <= NUMBERED_CELLS:
                    share = (value - low) / (high - low)
                    number = f"{value * 100:.0f}" if scale.percent else f"{value:.2f}"
                    axes.text(
                        column + 0.5,
                        row + 0.5,
                        number.replace("-", "−"),
                        ha="center",
                        va="center_baseline",
                        fontsize=min(8.5, 72 * cell * (0.4 if len(number) < 4 else 0.26)),
                        color="#ffffff" if share > 0.5 else "#111111",
                    )
        for place in range(1, columns):
            axes.axvline(place, color=PAPER, linewidth=gap, zorder=3)
        for place in range(1, rows):
            axes.axhline(place, color=PAPER, linewidth=gap, zorder=3)
        every = max(1, math.ceil(columns / 15))
        axes.set_xticks([place + 0.5 for place in range(0, columns, every)])
        axes.set_xticklabels([str(place + 1) for place in range(0, columns, every)])
        axes.set_yticks([place + 0.5 for place in range(0, rows, every)])
        axes.set_yticklabels(["all" if strategy.joint else str(place + 1) for place in range(0, rows, every)])
        axes.set_xlabel("experience")
        axes.set_ylabel("" if strategy.joint else "after update")
        axes.invert_yaxis()
        axes.spines[:].set_visible(False)
        axes.set_title(shorten(strategy.strategy, 34))

    return draw(width, rows * cell + 0.72, paint)


def retention_figure(stream: StreamSummary, strategy: StrategySummary) -> str:
    """Score of each experience from its own update on, one line each with its number at the end."""
    scale, (low, high) = Scale.of(stream), limits(stream)
    updates, columns = len(strategy.matrix), len(stream.experiences)

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        ends: list[tuple[int, float]] = []
        for column in range(columns):
            points = [
                (row + 1, value * scale.factor)
                for row in range(column, updates)
                if (value := strategy.matrix[row][column]) is not None
            ]
            if not points:
                continue
            colour = age(column, columns)
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, ys, color=colour, linewidth=1.5, zorder=3)
            axes.plot(xs[:1], ys[:1], "o", color=colour, markersize=3.6, zorder=4)
            ends.append((column, ys[-1]))
        bottom, top = low * scale.factor, high * scale.factor
        score_axis(axes, scale, bottom, top, label="")
        shown = ends if len(ends) <= 12 else [*ends[:: math.ceil(len(ends) / 10)]]
        places = spread([value for _, value in shown], (top - bottom) * 0.075, bottom, top)
        for (column, value), place in zip(shown, places, strict=True):
            end_label(axes, updates, value, place, str(column + 1), age(column, columns), updates)
        _update_axis(axes, updates)
        axes.set_title(shorten(strategy.strategy, 34))

    return draw(3.1, 2.25, paint)


def ranking_figure(stream: StreamSummary) -> str:
    """Final accuracy of every strategy with its 95 % interval, best on top."""
    scale = Scale.of(stream)
    ranked = [one for one in stream.strategies if one.metrics["accuracy"] is not None]

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        colours = series(stream)
        for place, one in enumerate(ranked):
            found = one.metrics["accuracy"]
            assert found is not None
            colour, mean = colours[one.strategy], found.mean * scale.factor
            axes.axhline(place, color=GRID, linewidth=0.8, zorder=0)
            if found.low is not None and found.high is not None:
                ends = [found.low * scale.factor, found.high * scale.factor]
                axes.plot(ends, [place, place], color=colour, linewidth=2.2, alpha=0.45, zorder=2)
            if len(one.runs) > 1:
                values = [run.metrics.accuracy * scale.factor for run in one.runs if run.metrics.accuracy is not None]
                axes.plot(values, [place] * len(values), "|", color=colour, markersize=7, markeredgewidth=0.9, zorder=3)
            axes.plot([mean], [place], "o", color=colour, markersize=6, zorder=4)
            axes.annotate(
                scale.text(found.mean),
                (1.0, place),
                xycoords=("axes fraction", "data"),
                xytext=(8, 0),
                textcoords="offset points",
                va="center_baseline",
                color=INK,
            )
        axes.set_yticks(range(len(ranked)))
        axes.set_yticklabels([shorten(one.strategy, 26) for one in ranked], color=INK)
        axes.set_ylim(len(ranked) - 0.4, -0.6)
        if scale.percent:
            axes.set_xlim(-2, 102)
        axes.set_xlabel(f"{stream.score} after the last update{', %' if scale.percent else ''}")
        axes.spines["left"].set_visible(False)

    return draw(5.6, 0.75 + 0.3 * max(len(ranked), 2), paint)


def progress_figure(stream: StreamSummary) -> str:
    """Mean score over the experiences met so far after each update, for every strategy; band: 95 % over seeds."""
    scale = Scale.of(stream)
    bottom, top = (value * scale.factor for value in limits(stream))
    updates = max((len(one.curve) for one in stream.strategies), default=1) or 1

    def paint(figure: Any) -> None:
        axes = figure.add_subplot()
        colours = series(stream)
        ends: list[tuple[float, str, str]] = []
        for one in stream.strategies:
            colour, final = colours[one.strategy], one.metrics["accuracy"]
            points = [(place + 1, found) for place, found in enumerate(one.curve) if found is not None]
            if points:
                xs = [place for place, _ in points]
                axes.plot(xs, [found.mean * scale.factor for _, found in points], color=colour, linewidth=1.7, zorder=3)
                banded = [(place, found) for place, found in points if found.low is not None and found.high is not None]
                axes.fill_between(
                    [place for place, _ in banded],
                    [max((found.low or 0.0) * scale.factor, bottom) for _, found in banded],
                    [min((found.high or 0.0) * scale.factor, top) for _, found in banded],
                    color=colour,
                    alpha=0.13,
                    linewidth=0,
                    zorder=1,
                )
                ends.append((points[-1][1].mean * scale.factor, one.strategy, colour))
            elif final is not None:
                axes.axhline(final.mean * scale.factor, color=colour, linewidth=1.1, linestyle=(0, (4, 3)), zorder=2)
                ends.append((final.mean * scale.factor, one.strategy, colour))
        score_axis(axes, scale, bottom, top, label=f"{stream.score}, mean of those met")
        places = spread([value for value, _, _ in ends], (top - bottom) * 0.062, bottom, top)
        for (value, name, colour), place in zip(ends, places, strict=True):
            end_label(axes, updates, value, place, shorten(name), colour, updates)
        _update_axis(axes, updates)

    return draw(5.6, 3.1, paint)


def cost_figure(stream: StreamSummary) -> str:
    """Accuracy against training seconds (left) and against the bytes that the parts hold (right)."""
    scale = Scale.of(stream)
    ranked = [one for one in stream.strategies if one.metrics["accuracy"] is not None]

    def paint(figure: Any) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        colours = series(stream)
        heights = [(one.metrics["accuracy"].mean if one.metrics["accuracy"] else 0.0) * scale.factor for one in ranked]
        margin = 0.1 * (max(heights) - min(heights)) or 0.5
        top, bottom = max(heights) + margin, min(heights) - margin
        panels = (
            (left, [one.cost["train_seconds"] or 0.0 for one in ranked], "training time, s", _plain),
            (right, [one.total_bytes for one in ranked], "state held by the parts", size),
        )
        for axes, values, label, form in panels:
            _cost_axis(axes, values, form)
            for one, value, height in zip(ranked, values, heights, strict=True):
                axes.plot([value], [height], "o", color=colours[one.strategy], markersize=6, zorder=3, clip_on=False)
            axes.set_ylim(bottom, top)
            axes.set_xlabel(label)
            axes.grid(axis="y")
            axes.yaxis.set_major_locator(MaxNLocator(6))
            axes.spines["left"].set_visible(False)
        left.set_ylabel(f"{stream.score}{', %' if scale.percent else ''}")
        figure.get_layout_engine().set(wspace=0.06)
        figure.draw_without_rendering()
        for axes, values, _, _ in panels:
            _place_names(axes, values, heights, [shorten(one.strategy, 18) for one in ranked])

    return draw(11.4, 3.3, paint)


def series(stream: StreamSummary) -> dict[str, str]:
    """Strategy → colour, by name, so that a strategy keeps its colour in all figures; bounds are grey."""
    names = sorted(one.strategy for one in stream.strategies if not (one.bound or one.naive))
    colours = {name: SERIES[place % len(SERIES)] for place, name in enumerate(names)}
    return {one.strategy: colours.get(one.strategy, MUTED) for one in stream.strategies}


def age(column: int, columns: int) -> str:
    """Colour of an experience by its place among all of them, the oldest first."""
    return str(to_hex(_AGES(column / max(columns - 1, 1))))


def score_axis(axes: Any, scale: Scale, bottom: float, top: float, *, label: str) -> None:
    """Make the vertical axis one of scores from ``bottom`` to ``top``, both in the unit that is drawn."""
    reach = 0.03 * (top - bottom)
    axes.set_ylim(bottom - reach, top + reach)
    if scale.percent:
        axes.set_yticks([0, 25, 50, 75, 100])
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="y")
    axes.spines["left"].set_visible(False)
    axes.set_ylabel(f"{label}{', %' if scale.percent else ''}" if label else "")


def _update_axis(axes: Any, updates: int) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(min(updates, 12), integer=True, min_n_ticks=1))
    axes.set_xlim(1 - 0.04 * updates, updates + 0.04 * updates)
    axes.set_xlabel("after update")


def end_label(axes: Any, x: float, y: float, place: float, name: str, colour: str, updates: int) -> None:
    """Write ``name`` to the right of a line that ends in (x, y), at the height ``place``."""
    width = updates - 1 + 0.08 * updates
    start, end = x + 0.034 * width, x + 0.102 * width
    axes.plot([start, end], [y, place], color=colour, linewidth=0.6, alpha=0.6, clip_on=False)
    axes.text(x + 0.125 * width, place, name, color=colour, va="center_baseline", clip_on=False)


def _cost_axis(axes: Any, values: Sequence[float], form: Any) -> None:
    positive = [value for value in values if value > 0]
    if positive and max(positive) / min(positive) > 20:
        floor = 10.0 ** math.floor(math.log10(min(positive)))
        decades = [floor * 10**step for step in range(math.ceil(math.log10(max(positive) / floor)) + 1)]
        if len(positive) < len(values):
            axes.set_xscale("symlog", linthresh=floor, linscale=0.6)
            axes.set_xlim(0, decades[-1])
            decades = [0.0, *decades]
        else:
            axes.set_xscale("log")
            axes.set_xlim(decades[0], decades[-1])
        axes.xaxis.set_major_locator(FixedLocator(decades))
        axes.xaxis.set_minor_locator(FixedLocator([]))
    else:
        axes.set_xlim(0, max(values, default=1.0) * 1.12 or 1.0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: form(value).replace(".0 ", " ") if value else "0"))


def _plain(value: float) -> str:
    return f"{value:,g}".replace(",", " ")


def _place_names(axes: Any, xs: Sequence[float], ys: Sequence[float], names: Sequence[str]) -> None:
    """Write each name beside its point, where it hits the fewest other points and names."""
    points = axes.transData.transform(list(zip(xs, ys, strict=True))) * 72 / axes.figure.dpi
    frame = axes.get_window_extent()
    left, bottom, right = (edge * 72 / axes.figure.dpi for edge in (frame.x0, frame.y0, frame.x1))
    taken: list[tuple[float, float, float, float]] = [(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    for place, name in enumerate(names):
        x, y = points[place]
        wide, tall = 5.0 * len(name), 10.0
        options = [(7, 0, "left"), (-7, 0, "right"), (0, 10, "center"), (0, -10, "center")]
        options += [
            (7, 9, "left"),
            (7, -9, "left"),
            (-7, 9, "right"),
            (-7, -9, "right"),
            (7, 18, "left"),
            (7, -18, "left"),
        ]
        best: tuple[float, int, int, str, tuple[float, float, float, float]] | None = None
        for rank, (dx, dy, side) in enumerate(options):
            start = x + dx - {"left": 0.0, "right": wide, "center": wide / 2}[side]
            box = (start, y + dy - tall / 2, start + wide, y + dy + tall / 2)
            hits = sum(_overlap(box, other) for at, other in enumerate(taken) if at != place)
            outside = max(0.0, left - box[0]) + max(0.0, box[2] - right) + max(0.0, bottom - box[1])
            badness = hits + 20 * outside + 0.5 * rank
            if best is None or badness < best[0]:
                best = (badness, dx, dy, side, box)
        assert best is not None
        taken.append(best[4])
        axes.annotate(
            name,
            (xs[place], ys[place]),
            xytext=(best[1], best[2]),
            textcoords="offset points",
            ha=best[3],
            va="center_baseline",
            color=INK,
            fontsize=8,
            annotation_clip=False,
        ).set_in_layout(False)


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> float:
    wide = min(one[2], other[2]) - max(one[0], other[0])
    tall = min(one[3], other[3]) - max(one[1], other[1])
    return wide * tall if wide > 0 and tall > 0 else 0.0
