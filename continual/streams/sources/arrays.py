"""Rows that are in memory already: only from Python."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from continual.errors import StreamError
from continual.kinds import Objective
from continual.spec import Spec
from continual.streams.columns import labels_of
from continual.streams.convert import as_table
from continual.streams.folders import Place
from continual.streams.sources.rows import PARTS, Part, Raw, Rows, Values, assemble
from continual.table import Table


class ArraysSource(Spec):
    """Settings of the source ``arrays``: anything that :func:`~continual.streams.convert.as_table` takes.

    Attributes:
        train, valid, test: the rows of each part.
        domain, time: one value for each row, by part, for a split by domain or by time.
    """

    kind: Literal["arrays"] = "arrays"
    train: Any = Field(exclude=True, repr=False)
    valid: Any = Field(default=None, exclude=True, repr=False)
    test: Any = Field(default=None, exclude=True, repr=False)
    domain: dict[Part, Any] = Field(default={}, exclude=True, repr=False)
    time: dict[Part, Any] = Field(default={}, exclude=True, repr=False)

    def load(self, place: Place, objective: Objective) -> Rows:
        """The rows; ids are taken from a column ``row`` where there is one."""
        raws: dict[Part, Raw] = {}
        for part in PARTS:
            data = getattr(self, part)
            if data is not None:
                table = as_table(data, what=part)
                marks = {name: getattr(self, name).get(part) for name in ("domain", "time")}
                for name, values in marks.items():
                    if values is not None and len(values) != len(table):
                        raise StreamError(
                            f"the source 'arrays': {part} has {len(table)} rows and {len(values)} values for '{name}': "
                            "give one for each row."
                        )
                raws[part] = Raw(table, labels_of(table), marks["domain"], marks["time"], ids_of(table))
        return assemble(raws, objective, "the source 'arrays'")


def ids_of(table: Table) -> Values | None:
    """The row ids of a table, where it has any."""
    return table.column("row") if "row" in table.names else None
