"""Drawing to SVG text: the same input gives the same bytes, and nothing of the user's matplotlib is read or changed.

Colours that stand for a role (ink, muted, grid, one per strategy) are listed here, so that a page can turn them into
CSS variables and follow the reader's light or dark theme.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

INK, MUTED, GRID, PAPER, EMPTY = "#1b1c1f", "#63676e", "#e4e5e8", "#fdfdfb", "#ececef"
SERIES = ("#0b66b2", "#cf6a0c", "#12805d", "#b03a7c", "#6657b8", "#8a6b00", "#27899f", "#96462f")
"""Told apart by readers with any common colour blindness, on white and (as the page changes them) on black."""
SCORES = LinearSegmentedColormap.from_list("scores", ("#f3f1e7", "#c3d5d3", "#7fb0bd", "#3b80a5", "#1a4f86", "#0c2a57"))
"""One hue, from light to dark: its order survives in grey and for colour-blind readers."""

_STYLE = {
    "svg.hashsalt": "continual",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.unicode_minus": True,
    "font.family": ["DejaVu Sans"],
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8.0,
    "axes.titlecolor": INK,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8.5,
    "axes.edgecolor": GRID,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "xtick.minor.size": 0.0,
    "ytick.minor.size": 0.0,
    "text.color": INK,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "hatch.linewidth": 0.7,
    "hatch.color": GRID,
}


def draw(width: float, height: float, paint: Callable[[Any], None]) -> str:
    """SVG text of a figure of ``width`` × ``height`` inches that ``paint`` draws on."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03))
        paint(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return buffer.getvalue()


def inline(svg: str, prefix: str, label: str) -> str:
    """``svg`` as it stands inside a page: ids of its own, a label for screen readers, role colours as CSS variables."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{prefix}-', body)
    body = re.sub(r"url\(#", f"url(#{prefix}-", body)
    body = re.sub(r'href="#', f'href="#{prefix}-', body)
    for name, colour in theme().items():
        body = body.replace(colour, f"var(--{name})")
    escaped = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return re.sub(r"<svg ", f'<svg role="img" aria-label="{escaped}" ', body, count=1).strip()


def theme() -> dict[str, str]:
    """CSS variable → colour that it stands for in a figure."""
    roles = {"ink": INK, "muted": MUTED, "grid": GRID, "paper": PAPER, "empty": EMPTY}
    return roles | {f"series-{place}": colour for place, colour in enumerate(SERIES)}


def spread(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The places nearest to ``values`` (least squares) in the same order, ``gap`` apart, inside ``[low, high]``.

    Isotonic regression of ``value - rank * gap`` by pooling neighbours; a gap that does not fit is made smaller.
    """
    order = sorted(range(len(values)), key=lambda place: (values[place], place))
    gap = min(gap, (high - low) / max(len(values) - 1, 1))
    pools: list[list[float]] = []
    for rank, place in enumerate(order):
        pools.append([values[place] - rank * gap])
        while len(pools) > 1 and _mean(pools[-2]) > _mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    flat = [_mean(pool) for pool in pools for _ in pool]
    placed = [0.0] * len(values)
    for rank, place in enumerate(order):
        placed[place] = min(max(flat[rank], low), high - (len(order) - 1) * gap) + rank * gap
    return placed


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def shorten(name: str, limit: int = 22) -> str:
    """A name of at most ``limit`` characters, cut in the middle, since long names tell their difference at the end."""
    if len(name) <= limit:
        return name
    head = (limit - 1) // 2
    return f"{name[:head].rstrip('-_ ')}…{name[head + 1 - limit :]}"
