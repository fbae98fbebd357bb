"""Data sets that lie in a folder each, as one: a row's domain is its folder, and its class carries the folder's name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from continual.errors import StreamError, quoted
from continual.kinds import Objective
from continual.streams.content import row_keys
from continual.streams.sources.rows import Raw, class_values, take
from continual.table import ArrowTable, Table, TensorTable


def at_most(raw: Raw, most: int | None, where: str) -> Raw:
    """``raw`` cut to ``most`` rows, those of smallest hash of their content: the same ones in whatever order they lie."""
    if most is None or len(raw.table) <= most:
        return raw
    order_N = np.argsort(row_keys(raw.table), kind="stable")
    note = f"{where}: {most} of {len(raw.table)} rows kept, as 'most' asks"
    return replace(take(raw, torch.from_numpy(np.sort(order_N[:most]))), notes=(*raw.notes, note))


def one_of(found: Mapping[str, Raw], objective: Objective) -> Raw:
    """The rows of all folders below one another, with the folder as their domain.

    Args:
        found: folder → its rows. A class ``World`` of ``agnews`` becomes ``agnews/World``; numbers to be learnt by
            regression stay as they are.

    Raises:
        StreamError: the columns differ, or some lie in memory and others on disk.
    """
    raws = list(found.values())
    labels: list[Any] | None = None
    if raws[0].labels is not None:
        labels = []
        for folder, raw in found.items():
            if objective == "classification":
                labels += [f"{folder}/{value}" for value in class_values(raw.labels, f"'{folder}'")]
            else:
                labels += _plain(raw.labels)
    ids = None if raws[0].ids is None else np.concatenate([np.asarray(raw.ids) for raw in raws])
    time = None if raws[0].time is None else [value for raw in raws for value in _plain(raw.time)]
    domain = [folder for folder, raw in found.items() for _ in range(len(raw.table))]
    notes = tuple(note for raw in raws for note in raw.notes)
    return Raw(_one_table({folder: raw.table for folder, raw in found.items()}), labels, domain, time, ids, notes)


def _one_table(tables: Mapping[str, Table]) -> Table:
    import datasets

    first_folder, first = next(iter(tables.items()))
    for folder, table in tables.items():
        if type(table) is not type(first):
            raise StreamError(
                f"'{first_folder}' and '{folder}' do not lie in the same place: set keep: memory or keep: disk."
            )
        if table.names != first.names:
            raise StreamError(
                f"'{first_folder}' has the columns {quoted(first.names)} and '{folder}' has {quoted(table.names)}: name "
                "columns that all folders have."
            )
    if isinstance(first, ArrowTable):
        found = [table.dataset for table in tables.values() if isinstance(table, ArrowTable)]
        for folder, part in zip(tables, found, strict=True):
            if part.features != found[0].features:
                raise StreamError(
                    f"the columns of '{folder}' are of other types or sizes than those of '{first_folder}': give all folders "
                    "the same, or set keep: memory."
                )
        return ArrowTable(datasets.concatenate_datasets(found), first.pads)
    columns: dict[str, Any] = {}
    for name in first.names:
        shapes = {folder: tuple(table.column(name).shape[1:]) for folder, table in tables.items() if name == "inputs"}
        if len(set(shapes.values())) > 1:
            raise StreamError(
                f"the rows of the folders differ in their number of features ({shapes}): give all the same."
            )
        parts: list[Any] = [table.columns[name] for table in tables.values() if isinstance(table, TensorTable)]
        columns[name] = torch.cat(parts) if isinstance(parts[0], Tensor) else [row for part in parts for row in part]
    return TensorTable(columns)


def _plain(values: Any) -> list[Any]:
    return values.tolist() if isinstance(values, Tensor | np.ndarray) else list(values)
