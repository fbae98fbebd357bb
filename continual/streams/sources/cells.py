"""Cells of a CSV file that are names or text, as they stand in it: ``007`` is not 7, and ``NA`` is a name like any other."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from continual.streams.sources.rows import Part, Raw

MISSING = ("", "NA", "N/A", "n/a", "#N/A", "<NA>", "NaN", "nan", "null", "NULL", "None")
"""Cells that hold nothing, in the columns that may be numbers."""

_WHOLE = re.compile(r"\s*(0|-?[1-9][0-9]{0,17})\s*")
_NUMBER = re.compile(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*")
_DIGITS = re.compile(r"\s*[+-]?[0-9]+\s*")


def read_options(path: Path, strings: Collection[str]) -> dict[str, Any]:
    """What the reader of a CSV file is told: the cells of ``strings`` as they stand, :data:`MISSING` in the others."""
    import pandas

    names = [str(name) for name in pandas.read_csv(path, nrows=0).columns]
    return {
        "converters": {name: cell for name in names if name in strings},
        "keep_default_na": False,
        "na_values": {name: list(MISSING) for name in names if name not in strings},
    }


def cell(text: str) -> str | None:
    """What a cell holds; None where it is empty."""
    return text or None


def numbered(raws: dict[Part, Raw], parts: list[Part]) -> dict[Part, Raw]:
    """The class labels of ``parts``, which were read with :func:`cell`, as whole numbers where that loses nothing.

    It loses nothing where each of them is the usual form of a whole number and no other part has names. Where all are
    numbers and some have decimals, those become floats, which classes are refused for.
    """
    names = any(isinstance(value, str) for part in raws if part not in parts for value in _labels(raws[part]))
    values = [value for part in parts for value in _labels(raws[part]) if value is not None]
    if names or not values or not all(isinstance(value, str) and _NUMBER.fullmatch(value) for value in values):
        return raws
    whole = all(_WHOLE.fullmatch(value) for value in values)
    if not whole and all(_DIGITS.fullmatch(value) for value in values):
        return raws

    def number(value: str | None) -> str | float | None:
        if value is None:
            return None
        if whole:
            return int(value)
        return value if _DIGITS.fullmatch(value) else float(value)

    made = {part: replace(raws[part], labels=[number(value) for value in _labels(raws[part])]) for part in parts}
    return {**raws, **made}


def _labels(raw: Raw) -> list[Any]:
    return [] if raw.labels is None else list(raw.labels)
