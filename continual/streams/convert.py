"""What people already have, as tables and experiences: data sets of torch and Hugging Face, arrays, data frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, TensorDataset
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data.dataloader import default_collate

from continual.errors import StreamError, quoted
from continual.kinds import Objective, Scenario
from continual.streams.columns import labels_of, named, replace_columns
from continual.streams.experience import Experience
from continual.streams.labels import unused
from continual.streams.sources.rows import PARTS, Part, Values, class_indices, float_targets
from continual.table import IGNORED, ArrowTable, Ragged, Table, TensorTable

_ALIASES = {
    "features": "inputs", "input": "inputs", "x": "inputs",
    "label": "labels", "target": "labels", "targets": "labels", "y": "labels",
}  # fmt: skip
_TOKENS = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
_ROW_ROOM = 2**38
_IN_MEMORY = 2**30


def as_table(data: Any, *, what: str = "train") -> Table:
    """Rows in any common form as a table; ``labels`` are numbers or a list of strings.

    Args:
        data: a table; a torch ``Dataset`` (with a length; its items are stacked once) or ``DataLoader`` (its data set
            where it draws every row once and collates as usual, else one pass over it); a ``datasets.Dataset``; a pair
            of inputs and labels; a mapping from column to array, tensor or list; a data frame with such columns.
        what: what error sentences call it.

    Raises:
        StreamError: another form, or rows that cannot be stacked.
    """
    if isinstance(data, Table):
        return data
    if isinstance(data, DataLoader):
        return _from_loader(data, what)
    if hasattr(data, "column_names") and hasattr(data, "features"):
        return _from_arrow(data, what)
    if isinstance(data, TensorDataset):
        return _from_items(data.tensors, what)
    if isinstance(data, TorchDataset):
        return _from_torch(data, what)
    if isinstance(data, Mapping):
        return _from_columns(data, what)
    if hasattr(data, "columns") and hasattr(data, "iloc"):
        return _from_columns({str(name): _plain(data[name]) for name in data.columns}, what)
    if isinstance(data, tuple | list) and len(data) == 2:
        return _from_items(data, what)
    raise StreamError(
        f"{what} is {type(data).__name__}: give a table, a torch Dataset or DataLoader, a datasets.Dataset, a pair "
        "(inputs, labels), a mapping of columns, or a data frame."
    )


def as_experience(
    data: Any,
    *,
    index: int,
    name: str,
    test: Any = None,
    valid: Any = None,
    known_names: tuple[str, ...] = (),
    scenario: Scenario = "class",
    objective: Objective = "classification",
) -> Experience:
    """Rows in any common form as an experience of an open stream.

    Classes get the ids of ``known_names``, new ones the next ids in order of arrival; whole numbers are named by their
    digits. In the scenario ``task`` every class is new; in ``domain`` no class may be new once there are any.
    Row ids are those of a column ``row``, else they follow from ``index``, the part and the place.

    Raises:
        StreamError: no rows, labels of the wrong type, a new class where none may be, row ids that repeat.
    """
    if data is None:
        raise StreamError(f"{name}: there is no data: give training rows.")
    found: dict[Part, Any] = {"train": data, "valid": valid, "test": test}
    tables = {part: as_table(found[part], what=f"{name}, {part}") for part in PARTS if found[part] is not None}
    tables = {part: table for part, table in tables.items() if part == "train" or len(table)}
    if len(tables["train"]) == 0:
        raise StreamError(f"{name}: there are no training rows: give at least one.")
    columns: dict[Part, dict[str, Tensor]] = {part: {} for part in tables}
    classes: tuple[int, ...] = ()
    names = known_names
    if objective == "classification":
        classes, names, labels = _class_ids(tables, name, known_names, scenario)
        for part, ids_N in labels.items():
            columns[part]["labels"] = ids_N
    elif objective == "regression":
        for part, table in tables.items():
            columns[part]["labels"] = float_targets(labels_of(table), f"{name}, {part}")
    for part, table in tables.items():
        if "row" in table.names:
            columns[part]["row"] = _row_ids(table, f"{name}, {part}")
        else:
            start = (index * len(PARTS) + PARTS.index(part)) * _ROW_ROOM
            columns[part]["row"] = torch.arange(start, start + len(table))
    rows = torch.cat([column["row"].cpu() for column in columns.values()])
    repeated = len(rows) - len(torch.unique(rows))
    if repeated:
        raise StreamError(f"{name}: {repeated} row ids repeat: give each row its own.")
    made = {part: replace_columns(table, columns[part]) for part, table in tables.items()}
    return Experience(
        index, name, made["train"], made.get("valid"), made.get("test"), classes, names, scenario, objective
    )


def _class_ids(
    tables: dict[Part, Table], name: str, known: tuple[str, ...], scenario: Scenario
) -> tuple[tuple[int, ...], tuple[str, ...], dict[Part, Tensor]]:
    met = {} if scenario == "task" else {old: place for place, old in enumerate(known)}
    given: dict[Part, Values | None] = {part: labels_of(table) for part, table in tables.items()}
    found, indices = class_indices(given, name, least=1, known=list(met))
    present = [found[place] for place in torch.unique(indices["train"]).tolist()]
    names = list(known)
    for new in present:
        if new in met:
            continue
        if scenario == "domain" and known:
            raise StreamError(
                f"{name}: class '{new}' is new, and in the scenario 'domain' the classes are fixed ({quoted(known)}): "
                "use the scenario 'class' or leave such rows out."
            )
        met[new] = len(names)
        names.append(unused(new, name, names))
    lookup_C = torch.tensor([met[any_name] for any_name in found], dtype=torch.int64)
    labels = {part: lookup_C[index_N] for part, index_N in indices.items()}
    return tuple(sorted(met[new] for new in present)), tuple(names), labels


def _row_ids(table: Table, where: str) -> Tensor:
    try:
        ids_N = table.column("row")
    except StreamError:
        ids_N = torch.empty(0)
    if ids_N.is_floating_point() or ids_N.dtype == torch.bool or ids_N.dim() != 1:
        raise StreamError(
            f"{where}: the column 'row' holds no whole numbers, one a row: give such ids, or leave it out."
        )
    return ids_N.to(torch.int64)


def _from_loader(loader: DataLoader[Any], what: str) -> Table:
    sampler = getattr(loader, "sampler", None)
    every_row = isinstance(sampler, SequentialSampler) or (
        isinstance(sampler, RandomSampler) and not sampler.replacement and sampler.num_samples == len(sampler)
    )
    full = every_row and not loader.drop_last and len(sampler or ()) == _length(loader.dataset)
    if full and loader.collate_fn is default_collate:
        return as_table(loader.dataset, what=what)
    with torch.random.fork_rng(devices=[]):
        batches = list(loader)
    if not batches:
        raise StreamError(f"{what}: the loader gives no batch: give at least one row.")
    if isinstance(batches[0], Mapping):
        return _from_columns({key: _joined([batch[key] for batch in batches]) for key in batches[0]}, what)
    return _from_items([_joined(list(parts)) for parts in zip(*batches, strict=True)], what)


def _from_torch(data: TorchDataset[Any], what: str) -> Table:
    size = _length(data)
    if size is None:
        raise StreamError(f"{what}: this data set has no length: give one with __len__ and __getitem__.")
    if size == 0:
        raise StreamError(f"{what}: there are no rows: give at least one.")
    with torch.random.fork_rng(devices=[]):
        items = [data[place] for place in range(size)]
    if isinstance(items[0], Mapping):
        return _from_columns({key: [item[key] for item in items] for key in items[0]}, what)
    return _from_items([list(column) for column in zip(*items, strict=True)], what)


def _from_items(items: Sequence[Any], what: str) -> Table:
    if len(items) != 2:
        raise StreamError(f"{what}: a row has {len(items)} parts: give (inputs, labels), or a mapping with names.")
    first = items[0]
    text = not isinstance(first, Tensor | np.ndarray) and len(first) > 0 and isinstance(first[0], str)
    return _from_columns({"text" if text else "inputs": first, "labels": items[1]}, what)


def _from_columns(data: Mapping[str, Any], what: str) -> Table:
    columns: dict[str, Tensor | Ragged | list[Any]] = {}
    for given, values in data.items():
        name = _ALIASES.get(given, given)
        if name == "token_type_ids":
            raise StreamError(
                f"{what}: no model here reads 'token_type_ids': leave the column out, or join the two texts into one."
            )
        if name in columns:
            raise StreamError(f"{what}: '{given}' and another column are both '{name}': give one of them.")
        columns[name] = _column(name, values, what)
    return TensorTable(columns)


def _column(name: str, values: Any, what: str) -> Tensor | Ragged | list[Any]:
    if isinstance(values, Tensor):
        return _narrow(values.detach())
    words = isinstance(values, np.ndarray) and values.dtype.kind in "UT"
    plain = values if isinstance(values, np.ndarray) and not words else list(values)
    first = plain[0] if len(plain) else 0.0
    if words or isinstance(first, str) or (isinstance(first, list | tuple) and first and isinstance(first[0], Mapping)):
        return [str(value) if isinstance(value, np.str_) else value for value in plain]
    if isinstance(plain, list) and name in _TOKENS and isinstance(first, list):
        return Ragged.from_lists(plain, _TOKENS[name])
    try:
        if isinstance(first, Tensor):
            return _narrow(torch.stack([value.detach() for value in plain]))
        array = (
            np.stack([np.asarray(value) for value in plain]) if isinstance(plain, list) and plain else np.asarray(plain)
        )
        if name == "labels" and array.dtype == object:
            return list(plain)
        return _narrow(torch.as_tensor(array if array.flags.writeable else array.copy()))
    except (TypeError, ValueError, RuntimeError) as error:
        raise StreamError(f"{what}: the rows of '{name}' cannot be stacked ({error}): make them alike.") from error


def _from_arrow(data: Any, what: str) -> Table:
    renamed = {
        name: _ALIASES[name]
        for name in data.column_names
        if name in _ALIASES and _ALIASES[name] not in data.column_names
    }
    data = data.rename_columns(renamed) if renamed else data
    names = getattr(data.features.get("labels"), "names", None)
    if data.data.nbytes > _IN_MEMORY:
        return ArrowTable(data, {"input_ids": 0} if "input_ids" in data.column_names else None)
    columns = {name: list(data[name]) for name in data.column_names}
    if names is not None:
        columns["labels"] = named(columns["labels"], names, what)
    return _from_columns(columns, what)


def _plain(column: Any) -> Any:
    values = column.to_numpy()
    return values.tolist() if values.dtype == object else values


def _joined(parts: list[Any]) -> Any:
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return [value for part in parts for value in part]


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None


def _narrow(column: Tensor) -> Tensor:
    return column.to(torch.float32) if column.dtype == torch.float64 else column
