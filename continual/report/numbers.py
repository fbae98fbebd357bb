"""How figures are written: one place, so that the page, the table in a terminal and the plots agree."""

from __future__ import annotations

from dataclasses import dataclass

from continual.report.aggregate import Estimate, StreamSummary

NONE = "–"
MINUS = "−"
SHARES = ("retention", "negative_flips")
"""Metrics that are shares, whatever the score is."""
CHANGES = ("bwt", "forgetting", "fwt", "intransigence")
"""Metrics that are differences of scores: of shares in points."""
UNITS = {"log-likelihood per token": "nats", "negative squared error": "error²"}
"""Units of the scores that are no shares."""


@dataclass(frozen=True)
class Scale:
    """The unit of a score: per cent for shares of rows (accuracy), three decimals for anything else."""

    percent: bool
    score: str = ""

    @classmethod
    def of(cls, stream: StreamSummary) -> Scale:
        return cls(stream.percent, stream.score)

    @property
    def factor(self) -> float:
        return 100.0 if self.percent else 1.0

    def text(self, value: float | None, metric: str = "accuracy", *, sign: bool = False) -> str:
        """``91.3`` or ``−0.412``; with ``sign`` a plus too."""
        if value is None:
            return NONE
        percent = self.percent or metric in SHARES
        digits = 1 if percent else 3
        rounded = round(value * (100.0 if percent else 1.0), digits) + 0.0
        return f"{rounded:{'+' if sign else ''}.{digits}f}".replace("-", MINUS)

    def interval(self, found: Estimate | None, metric: str = "accuracy", *, sign: bool = False) -> str:
        """``90.1 to 92.4``, or nothing where there is no interval."""
        if found is None or found.low is None or found.high is None:
            return ""
        return f"{self.text(found.low, metric, sign=sign)} to {self.text(found.high, metric, sign=sign)}"

    @property
    def unit(self) -> str:
        return " %" if self.percent else ""

    @property
    def title(self) -> str:
        """What the column of final scores is called."""
        return self.score.capitalize() if self.percent else "Final score"

    def column_unit(self, metric: str) -> str:
        """The unit that stands over a column: ``%``, ``points``, or that of the score."""
        if metric in SHARES or (self.percent and metric not in CHANGES):
            return "%"
        return "points" if self.percent else UNITS.get(self.score, self.score)


def seconds(value: float | None) -> str:
    """Seconds with the digits that matter: ``0.42``, ``4.2``, ``420``."""
    if value is None:
        return NONE
    return f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 100 else f"{value:,.0f}".replace(",", " ")


def count(value: float | None) -> str:
    """A count with a unit: ``950``, ``85.0 k``, ``22.7 M``."""
    return NONE if value is None else _scaled(value, ("", " k", " M", " G", " T"))


def size(value: float | None) -> str:
    """Bytes in powers of 1000: ``0 B``, ``120 kB``, ``1.2 GB``."""
    return NONE if value is None else _scaled(value, (" B", " kB", " MB", " GB", " TB"))


def probability(value: float | None) -> str:
    """A p-value: ``.034``, ``<.001``."""
    if value is None:
        return NONE
    return "<.001" if value < 0.001 else "1" if value > 0.9995 else f"{value:.3f}".lstrip("0")


def integers(values: tuple[int, ...]) -> str:
    """``0, 1, 2``, or ``0–9`` for a longer unbroken row."""
    if len(values) > 3 and list(values) == list(range(values[0], values[-1] + 1)):
        return f"{values[0]}–{values[-1]}"
    return ", ".join(map(str, values))


def _scaled(value: float, units: tuple[str, ...]) -> str:
    place = 0
    while place + 1 < len(units) and value >= 999.5:
        value, place = value / 1000, place + 1
    digits = 0 if value >= 99.95 or place == 0 else 1
    return f"{value:.{digits}f}{units[place]}"
