"""How rows become experiences: by class, by domain, by time, or all at once. Only places are worked out here."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from continual.errors import StreamError, quoted, unknown
from continual.randomness import derive_seed
from continual.spec import Spec
from continual.streams.sources.rows import Part, Rows
from continual.streams.times import moments

Order = Literal["given", "random"] | list[str | int]
Period = Literal["day", "month", "year"]


@dataclass(frozen=True)
class Piece:
    """What one experience is made of.

    Attributes:
        name: of the experience.
        places: rows of each part, int64; a part that is not named here is taken whole.
        functions: what its columns pass through, by column.
        classes: class indices of the source, in order.
        positional: in the scenario ``domain`` a label is the place in ``classes``.
    """

    name: str
    places: dict[Part, Tensor] = field(default_factory=dict)
    functions: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    classes: tuple[int, ...] = ()
    positional: bool = False


class ClassSplit(Spec):
    """New classes in each experience.

    Attributes:
        size: classes of each experience; the last one may have fewer.
        groups: instead of ``size``: the classes of each experience by name.
        order: ``given`` as the source has them, ``random``, or the names in order (which may leave some out).
        seed: of the random order; None: that of the run.
        classes: use only so many, the first in ``order``.
    """

    by: Literal["class"] = "class"
    size: Annotated[int, Field(ge=1)] | None = None
    groups: list[list[str | int]] | None = None
    order: Order = "given"
    seed: int | None = None
    classes: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _size_or_groups(self) -> ClassSplit:
        if (self.size is None) == (self.groups is None):
            raise ValueError("give either 'size' or 'groups'")
        if self.groups is not None and (self.order != "given" or self.classes is not None):
            raise ValueError("'groups' says the order already: leave 'order' and 'classes' out")
        return self

    @property
    def random(self) -> bool:
        """Whether the seed of the run changes the split."""
        return self.order == "random" and self.seed is None

    def pieces(self, rows: Rows, seed: int) -> list[Piece]:
        """One piece for each group of classes.

        Raises:
            StreamError: no classes here, an unknown class, or one that is named twice.
        """
        if not rows.label_names:
            raise StreamError(
                "a split by class needs classes: set 'objective: classification' or split by domain or time."
            )
        if self.groups is not None:
            named = ordered([name for group in self.groups for name in group], rows.label_names, "class", 0)
            sizes = [len(group) for group in self.groups]
            if 0 in sizes:
                raise StreamError("a group of the split by class is empty: name at least one class in each.")
            groups = [list(part) for part in np.split(named, np.cumsum(sizes)[:-1])]
        else:
            assert self.size is not None
            order = ordered(self.order, rows.label_names, "class", seed if self.seed is None else self.seed)
            if self.classes is not None and self.classes > len(order):
                raise StreamError(f"the split takes {self.classes} classes and there are {len(order)}: take fewer.")
            order = order[: self.classes]
            if self.size > len(order):
                raise StreamError(
                    f"the split puts {self.size} classes into each experience and there are {len(order)}: take a smaller "
                    "'size', or 'by: joint' for one experience."
                )
            groups = [order[start : start + self.size] for start in range(0, len(order), self.size)]
        found = {part: by_value(table.column("labels")) for part, table in rows.tables.items()}
        nothing = torch.empty(0, dtype=torch.int64)
        return [
            Piece(
                name=", ".join(rows.label_names[c] for c in group) if len(group) <= 3 else f"classes {number}",
                places={p: torch.cat([f.get(int(c), nothing) for c in group]).sort().values for p, f in found.items()},
                classes=tuple(int(c) for c in group),
                positional=True,
            )
            for number, group in enumerate(groups, 1)
        ]


class Ordered(Spec):
    """Names of a source in some order.

    Attributes:
        order: ``given`` as the source has them, ``random``, or their names in order (which may leave some out).
        seed: of the random order; None: that of the run.
    """

    order: Order = "given"
    seed: int | None = None

    @property
    def random(self) -> bool:
        """Whether the seed of the run changes the split."""
        return self.order == "random" and self.seed is None


class DomainSplit(Ordered):
    """One experience for each value of the source's domain column."""

    by: Literal["domain"] = "domain"

    def pieces(self, rows: Rows, seed: int) -> list[Piece]:
        """One piece for each domain.

        Raises:
            StreamError: the source names no domains, or an unknown one is asked for.
        """
        if not rows.domain_names:
            raise StreamError("a split by domain needs a domain column: name it in 'source.domain'.")
        order = ordered(self.order, rows.domain_names, "domain", seed if self.seed is None else self.seed)
        found = {part: by_value(index_N) for part, index_N in rows.domains.items()}
        return [_marked(rows, rows.domain_names[d], {part: f.get(d) for part, f in found.items()}) for d in order]


class ExperienceSplit(Ordered):
    """The experiences that the source comes in."""

    by: Literal["experience"] = "experience"

    def pieces(self, rows: Rows, seed: int) -> list[Piece]:
        """One piece for each experience.

        Raises:
            StreamError: the source has no experiences of its own, or an unknown one is asked for.
        """
        if not rows.experiences:
            raise StreamError(
                "a split by experience needs a source that comes in experiences, such as 'kind: avalanche'."
            )
        names = list(rows.experiences)
        order = ordered(self.order, names, "experience", seed if self.seed is None else self.seed)
        return [_marked(rows, names[place], dict(rows.experiences[names[place]])) for place in order]


class TimeSplit(Spec):
    """One experience for each period of the source's time column.

    Attributes:
        periods: how many, with as many training rows in each as equal times allow; or ``day``, ``month``, ``year``;
            or the times at which a new one begins (numbers or ISO dates; ``2024-02`` is the first of the month).
    """

    by: Literal["time"] = "time"
    periods: Annotated[int, Field(ge=1)] | Period | list[float | str]

    @field_validator("periods", mode="before")
    @classmethod
    def _dates_as_strings(cls, value: Any) -> Any:
        """YAML reads ``2024-02-01`` as a date."""
        if not isinstance(value, list):
            return value
        return [cut.isoformat() if isinstance(cut, datetime.date) else cut for cut in value]

    @property
    def random(self) -> bool:
        """Whether the seed of the run changes the split."""
        return False

    def pieces(self, rows: Rows, seed: int) -> list[Piece]:
        """One piece for each period that has rows, in order of time.

        Raises:
            StreamError: the source names no times, or they are no dates where dates are needed.
        """
        if not rows.times:
            raise StreamError("a split by time needs a time column: name it in 'source.time'.")
        periods = self._periods(rows.times)
        used = sorted(set(np.concatenate(list(periods.values())).tolist()))
        found = {part: by_value(torch.from_numpy(values)) for part, values in periods.items()}
        pieces = []
        for period in used:
            name = str(np.datetime64(period, self._unit)) if isinstance(self.periods, str) else f"period {period + 1}"
            pieces.append(_marked(rows, name, {part: f.get(period) for part, f in found.items()}))
        return pieces

    @property
    def _unit(self) -> Any:
        return {"day": "D", "month": "M", "year": "Y"}[self.periods] if isinstance(self.periods, str) else "s"

    def _periods(self, times: dict[Part, npt.NDArray[Any]]) -> dict[Part, npt.NDArray[np.int64]]:
        dates = times["train"].dtype.kind == "M"
        if len({values.dtype.kind for values in times.values()}) > 1:
            raise StreamError("some parts have numbers as times and others dates: use one kind.")
        if isinstance(self.periods, str):
            if not dates:
                raise StreamError(
                    f"'periods: {self.periods}' needs dates and the time column has numbers: give a number."
                )
            units = {part: values.astype(f"datetime64[{self._unit}]") for part, values in times.items()}
            return {part: values.astype(np.int64) for part, values in units.items()}
        numbers = {part: values.astype(np.float64) for part, values in times.items()}
        cuts = _even_cuts(numbers["train"], self.periods) if isinstance(self.periods, int) else self._cuts(dates)
        return {part: np.searchsorted(cuts, values, side="right") for part, values in numbers.items()}

    def _cuts(self, dates: bool) -> npt.NDArray[np.float64]:
        assert isinstance(self.periods, list)
        try:
            wanted: Any = moments(map(str, self.periods)) if dates else self.periods
            cuts = np.asarray(wanted).astype(np.float64)
        except ValueError as error:
            raise StreamError(
                f"'periods' cannot be read ({error}): give times of the kind that the column has."
            ) from error
        if (np.diff(cuts) <= 0).any():
            raise StreamError(f"'periods' has times that do not rise ({quoted(self.periods)}): put them in order.")
        return cuts


def _even_cuts(times_N: npt.NDArray[np.float64], periods: int) -> npt.NDArray[np.float64]:
    """Where periods after the first begin: as even in rows as may be, each with one time of its own at least."""
    distinct = np.unique(times_N)
    if len(distinct) < periods:
        raise StreamError(
            f"the time column has too few different times for {periods} periods ({len(distinct)}): take fewer."
        )
    number = np.arange(1, periods)
    starts = (len(times_N) * number / periods).astype(np.int64)
    wanted = np.searchsorted(distinct, np.sort(times_N)[starts])
    rising = np.maximum.accumulate(np.maximum(wanted - number, 0)) + number
    found: npt.NDArray[np.float64] = distinct[np.minimum(rising, len(distinct) - periods + number)]
    return found


class JointSplit(Spec):
    """Everything at once: one experience."""

    by: Literal["joint"] = "joint"

    @property
    def random(self) -> bool:
        """Whether the seed of the run changes the split."""
        return False

    def pieces(self, rows: Rows, seed: int) -> list[Piece]:
        """One piece with all rows."""
        return [Piece("joint", classes=tuple(range(len(rows.label_names))))]


def ordered(order: Order | Sequence[str | int], names: Sequence[str], what: str, seed: int) -> list[int]:
    """Places in ``names`` in the order asked for.

    Raises:
        StreamError: an unknown name, or one that is there twice.
    """
    if order == "given":
        return list(range(len(names)))
    if order == "random":
        generator = torch.Generator().manual_seed(derive_seed(seed, f"stream/{what} order"))
        return [int(place) for place in torch.randperm(len(names), generator=generator)]
    place = {name: index for index, name in enumerate(names)}
    found = []
    for name in order:
        if str(name) not in place:
            raise StreamError(unknown(f"{what} in the split", name, names))
        if place[str(name)] in found:
            raise StreamError(f"the split names {what} '{name}' twice: name each once.")
        found.append(place[str(name)])
    return found


def by_value(index_N: Tensor) -> dict[int, Tensor]:
    """Places of each value, in rising order."""
    if len(index_N) == 0:
        return {}
    order = index_N.argsort(stable=True)
    values, counts = torch.unique_consecutive(index_N[order], return_counts=True)
    return dict(zip(values.tolist(), torch.split(order, counts.tolist()), strict=True))


def _marked(rows: Rows, name: str, places: dict[Part, Tensor | None]) -> Piece:
    nothing = torch.empty(0, dtype=torch.int64)
    filled = {part: nothing if places.get(part) is None else places[part] for part in rows.tables}
    known: dict[Part, Tensor] = {part: place for part, place in filled.items() if place is not None}
    classes: tuple[int, ...] = ()
    if rows.label_names:
        labels = [rows.tables[part].column("labels")[place] for part, place in known.items()]
        classes = tuple(torch.unique(torch.cat(labels)).tolist())
    return Piece(name, known, classes=classes)
