"""Times of rows: numbers, or dates as ``datetime64[s]`` in UTC."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from continual.errors import StreamError

_YEAR_OR_MONTH = re.compile(r"[0-9]{4}(-[0-9]{2})?")


def times_of(values: Sequence[Any] | Tensor | npt.NDArray[Any], where: str) -> npt.NDArray[Any]:
    """The times of a column, float64 (N,) or datetime64[s] (N,).

    Raises:
        StreamError: one is missing, or neither a number nor a date.
    """
    array = values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    try:
        if array.dtype.kind in "iuf":
            found: npt.NDArray[Any] = array.astype(np.float64)
            missing = ~np.isfinite(found)
        else:
            found = array.astype("datetime64[s]") if array.dtype.kind == "M" else moments(array.tolist())
            missing = np.isnat(found)
        if missing.any():
            raise ValueError("a time is missing")
    except (TypeError, ValueError) as error:
        raise StreamError(
            f"{where}: the time column cannot be read ({error}): use numbers or ISO dates as in 2024-01-31."
        ) from error
    return found


def moments(values: Iterable[Any]) -> npt.NDArray[Any]:
    """Dates as datetime64[s] (N,): of ``datetime``, or ISO strings, of which a month or a year is its first day.

    Raises:
        ValueError: one is something else.
    """
    return np.array([_seconds(value) for value in values], dtype="datetime64[s]")


def _seconds(value: Any) -> str:
    if isinstance(value, str):
        first = "-01" if "-" in value else "-01-01"
        value = datetime.datetime.fromisoformat(value + first if _YEAR_OR_MONTH.fullmatch(value) else value)
    if not isinstance(value, datetime.date):
        raise ValueError(f"{value!r} is no time")
    if not isinstance(value, datetime.datetime):
        return value.isoformat()
    moment = value if value.tzinfo is None else value.astimezone(datetime.UTC).replace(tzinfo=None)
    return moment.isoformat(timespec="seconds")
