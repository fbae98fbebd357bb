"""What every source gives, and the checks that all rows pass on their way in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from continual.errors import StreamError, quoted
from continual.kinds import Objective, Scenario
from continual.streams.columns import replace_columns
from continual.streams.content import TEXTS, finite_rows, row_keys
from continual.streams.times import times_of
from continual.table import ArrowTable, Table, TensorTable

Part = Literal["train", "valid", "test"]
PARTS: tuple[Part, ...] = ("train", "valid", "test")
Values = Sequence[Any] | Tensor | npt.NDArray[Any]

_NO_NAME = ("None", "nan", "NaT", "<NA>")
"""What a value that is missing looks like as a string, in plain Python, numpy and pandas."""


@dataclass(frozen=True)
class Raw:
    """One part as a source found it.

    Attributes:
        table: the feature columns (``inputs``, ``text``, ``prompt``, ``completion``, ``messages``).
        labels, domain, time, ids: one value a row, or None.
        notes: what became of rows that are not here, in sentences.
    """

    table: Table
    labels: Values | None = None
    domain: Values | None = None
    time: Values | None = None
    ids: Values | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rows:
    """All rows of a source.

    Attributes:
        tables: ``train`` always, ``valid`` and ``test`` where there are any. Columns: features, ``labels`` (int64 class
            index, float32 target, or none for a language model), ``row`` (int64, unique over all parts).
        label_names: names of the classes by index; empty where the objective is not classification.
        domains: int64 index of each row's domain, by part; ``domain_names`` names them.
        times: datetime64[s] or float64 of each row, by part.
        notes: what became of rows that are not here, in sentences.
        experiences: places (int64) of each part by name of the experience, where the source comes in experiences of its own.
        scenario: what such experiences look like.
    """

    tables: dict[Part, Table]
    label_names: tuple[str, ...] = ()
    domains: dict[Part, Tensor] = field(default_factory=dict)
    domain_names: tuple[str, ...] = ()
    times: dict[Part, npt.NDArray[Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    experiences: dict[str, dict[Part, Tensor]] = field(default_factory=dict)
    scenario: Scenario | None = None

    @property
    def span(self) -> int:
        """One more than the largest row id."""
        return 1 + max(int(table.column("row").max()) for table in self.tables.values())


def assemble(
    raws: dict[Part, Raw],
    objective: Objective,
    where: str,
    *,
    names: Sequence[str] | None = None,
    trusted: bool = False,
    overlap: Literal["refuse", "drop", "keep"] = "keep",
) -> Rows:
    """Raw parts as checked rows.

    Args:
        raws: by part; parts without rows are left out.
        objective: decides what the labels must be.
        where: what error sentences begin with.
        names: names of the classes where the labels are indices already.
        trusted: the features need no check (they were bytes).
        overlap: what becomes of training and valid rows whose content is among the test rows.

    Raises:
        StreamError: no rows, empty text, NaN features, labels of the wrong type, one class only, ids that repeat.
    """
    notes = list(dict.fromkeys(note for raw in raws.values() for note in raw.notes))
    raws = {part: raws[part] for part in PARTS if part in raws and len(raws[part].table)}
    if "train" not in raws:
        raise StreamError(f"{where}: there are no training rows: give at least one.")
    if not trusted:
        for part, raw in raws.items():
            check_features(raw.table, f"{where}, {part}")
    if overlap == "drop" and "test" in raws:
        before = {part: len(raw.table) for part, raw in raws.items()}
        raws = {part: raw if part == "test" else _without(raw, raws["test"]) for part, raw in raws.items()}
        for part, raw in raws.items():
            dropped = before[part] - len(raw.table)
            if dropped:
                what = "training" if part == "train" else part
                notes.append(f"{dropped} of {before[part]} {what} rows dropped: same content as test rows")
        raws = {part: raw for part, raw in raws.items() if len(raw.table)}
        if "train" not in raws:
            raise StreamError(
                f"{where}: every training row is among the test rows too: give training rows of their own."
            )
    columns: dict[Part, dict[str, Tensor]] = {part: {} for part in raws}
    label_names: tuple[str, ...] = ()
    if objective == "classification":
        label_names, indices = class_indices({part: raw.labels for part, raw in raws.items()}, where, names)
        for part, index_N in indices.items():
            columns[part]["labels"] = index_N
    elif objective == "regression":
        for part, raw in raws.items():
            columns[part]["labels"] = float_targets(raw.labels, f"{where}, {part}")
    for part, row_N in _row_ids(raws, where).items():
        columns[part]["row"] = row_N
    domain_names, domains = _domains(raws, where)
    return Rows(
        tables={part: replace_columns(raw.table, columns[part]) for part, raw in raws.items()},
        label_names=label_names,
        domains=domains,
        domain_names=domain_names,
        times={part: times_of(raw.time, f"{where}, {part}") for part, raw in raws.items() if raw.time is not None},
        notes=tuple(notes),
    )


def class_indices(
    labels: dict[Part, Values | None],
    where: str,
    names: Sequence[str] | None = None,
    *,
    least: int = 2,
    known: Sequence[str] = (),
) -> tuple[tuple[str, ...], dict[Part, Tensor]]:
    """Names of the classes and the class index of each row, int64 (N,), by part.

    Whole numbers are ordered by size and named by their digits; strings stand in order of appearance in ``train``.

    Args:
        labels: of each part, ``train`` among them.
        where: what error sentences begin with.
        names: names of the classes where the labels are indices already.
        least: how many classes there must be.
        known: classes that need no training rows.

    Raises:
        StreamError: no labels, labels of another type or of two types, too few classes, a class without training rows.
    """
    values = {part: class_values(found, f"{where}, {part}") for part, found in labels.items()}
    if len({isinstance(found, list) for found in values.values()}) > 1:
        raise StreamError(f"{where}: some parts have strings as labels and others whole numbers: use one kind.")
    indices: dict[Part, Tensor] = {}
    if any(isinstance(found, list) for found in values.values()):
        place = {name: index for index, name in enumerate(dict.fromkeys([*values["train"], *known]))}
        for part, found in values.items():
            stranger = next((name for name in found if name not in place), None)
            if stranger is not None:
                raise StreamError(f"{where}: class '{stranger}' is in {part} but has no training rows: add some.")
            indices[part] = torch.tensor([place[name] for name in found], dtype=torch.int64)
        found_names = tuple(place)
    else:
        arrays = {part: np.asarray(found) for part, found in values.items()}
        past = [int(name) for name in known if _is_whole(name)]
        present = np.unique(np.concatenate([arrays["train"], np.array(past, dtype=np.int64)]))
        for part, array in arrays.items():
            strangers = np.setdiff1d(array, present)
            if len(strangers):
                raise StreamError(f"{where}: class '{strangers[0]}' is in {part} but has no training rows: add some.")
            indices[part] = torch.from_numpy(np.searchsorted(present, array).astype(np.int64))
        if names is not None and (present[0] < 0 or present[-1] >= len(names)):
            raise StreamError(
                f"{where}: label {present[-1] if present[0] >= 0 else present[0]} has no name: there are {len(names)}."
            )
        found_names = tuple(str(value) if names is None else names[value] for value in present.tolist())
    if len(found_names) < least:
        raise StreamError(
            f"{where}: all rows have the one class {quoted(found_names)}: classification needs two at least."
        )
    return found_names, indices


def float_targets(labels: Values | None, where: str) -> Tensor:
    """Targets of a regression, float32 (N,) or (N, K)."""
    if labels is None:
        raise StreamError(f"{where}: there are no labels: regression needs a number for each row.")
    try:
        array = labels.cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
        if array.dtype.kind not in "iufb":
            raise TypeError(f"{array.dtype} values")
        targets = torch.from_numpy(array.astype(np.float32))
    except (TypeError, ValueError) as error:
        raise StreamError(f"{where}: the labels are not numbers ({error}): regression needs numbers.") from error
    bad = (~targets.reshape(len(targets), -1).isfinite().all(1)).nonzero().flatten()
    if len(bad):
        raise StreamError(f"{where}: the label of row {int(bad[0])} is not finite: leave out such rows or fill them.")
    return targets


def stratified(labels_N: Tensor, share: float, seed: int) -> Tensor:
    """Which rows are taken aside, bool (N,): the same share of every class (rounded), drawn by ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels_N), generator=generator)
    order = shuffled[labels_N[shuffled].argsort(stable=True)]
    counts = labels_N.bincount()
    rank = torch.arange(len(labels_N)) - (counts.cumsum(0) - counts)[labels_N[order]]
    taken = torch.zeros(len(labels_N), dtype=torch.bool)
    taken[order] = rank < (counts * share).round().to(torch.int64)[labels_N[order]]
    return taken


def class_values(labels: Values | None, where: str) -> list[str] | npt.NDArray[np.int64]:
    """The labels of a classification as names, or as whole numbers int64 (N,).

    Raises:
        StreamError: none, or one that is neither.
    """
    if labels is None:
        raise StreamError(f"{where}: there are no labels: classification needs a class for each row.")
    if isinstance(labels, Tensor):
        labels = labels.cpu().numpy()
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "iu" and labels.ndim == 1:
        return labels.astype(np.int64)
    values = labels.tolist() if isinstance(labels, np.ndarray) else list(labels)
    kinds = {type(value) for value in values}
    if kinds == {int}:
        return np.array(values, dtype=np.int64)
    if kinds == {bool}:
        return [str(value) for value in values]
    for place, value in enumerate(values):
        if not isinstance(value, str) or not value.strip():
            raise StreamError(
                f"{where}: the label of row {place} is {value!r}: a class is a whole number or a name, of one kind in "
                "all rows; for numbers with decimals set 'objective: regression'."
            )
    return values


def _is_whole(name: str) -> bool:
    digits = name.removeprefix("-")
    return digits.isascii() and digits.isdigit() and str(int(name)) == name


def check_features(table: Table, where: str) -> None:
    """Raise :class:`StreamError` where a text is empty or a number is not finite; the sentence names the row."""
    for name in TEXTS:
        if name in table.names:
            for place, value in enumerate(table.strings(name)):
                if isinstance(value, str) and value.strip():
                    continue
                if name == "messages" and isinstance(value, list) and value:
                    continue
                nothing = value is None or isinstance(value, str) or value == []
                what = "empty" if nothing else f"{type(value).__name__}, not text"
                raise StreamError(f"{where}: '{name}' of row {place} is {what}: leave out such rows or fill them.")
    bad = (~finite_rows(table)).nonzero().flatten()
    if len(bad):
        raise StreamError(
            f"{where}: {len(bad)} rows have features that are NaN or infinite (the first is row {int(bad[0])}): "
            "leave them out or fill them."
        )


def _without(raw: Raw, test: Raw) -> Raw:
    keep = torch.from_numpy(~np.isin(row_keys(raw.table), row_keys(test.table)))
    return raw if bool(keep.all()) else take(raw, keep.nonzero().flatten())


def take(raw: Raw, index: Tensor) -> Raw:
    """The rows of ``raw`` at ``index``; a table in memory is copied, so that each part is a table of its own."""

    def chosen(values: Values | None) -> Values | None:
        if isinstance(values, Tensor):
            return values[index]
        if isinstance(values, np.ndarray):
            found: npt.NDArray[Any] = values[index.numpy()]
            return found
        return None if values is None else [values[place] for place in index.tolist()]

    table = raw.table
    if isinstance(table, ArrowTable):
        table = ArrowTable(table.dataset.select(index.numpy()), table.pads)
    elif isinstance(table, TensorTable) and all(isinstance(c, Tensor | list) for c in table.columns.values()):
        columns: dict[str, Any] = {
            name: column[index] if isinstance(column, Tensor) else [column[place] for place in index.tolist()]  # type: ignore[index]
            for name, column in table.columns.items()
        }
        table = TensorTable(columns)
    else:
        table = table.select(index)
    return Raw(table, chosen(raw.labels), chosen(raw.domain), chosen(raw.time), chosen(raw.ids), raw.notes)


def _row_ids(raws: dict[Part, Raw], where: str) -> dict[Part, Tensor]:
    ids: dict[Part, Tensor] = {}
    start = 0
    for part, raw in raws.items():
        if raw.ids is None:
            ids[part] = torch.arange(start, start + len(raw.table))
        else:
            ids[part] = _whole_ids(raw.ids, f"{where}, {part}")
        start += len(raw.table)
    given = [raw.ids is not None for raw in raws.values()]
    if any(given) and not all(given):
        raise StreamError(f"{where}: some parts have row ids and others have none: give all of them ids, or none.")
    everything = torch.cat(list(ids.values()))
    repeated = len(everything) - len(torch.unique(everything))
    if repeated:
        raise StreamError(f"{where}: {repeated} row ids repeat: give each row its own.")
    return ids


def _whole_ids(values: Values, where: str) -> Tensor:
    array = values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.dtype.kind not in "iu" or array.ndim != 1 or (len(array) and array.min() < 0):
        raise StreamError(f"{where}: the row ids are not whole numbers from 0: give such numbers, or none.")
    if len(array) and int(array.max()) >= 2**40:
        raise StreamError(f"{where}: row id {array.max()} is too large: the largest allowed is 2**40 - 1.")
    return torch.from_numpy(array.astype(np.int64))


def _domains(raws: dict[Part, Raw], where: str) -> tuple[tuple[str, ...], dict[Part, Tensor]]:
    if raws["train"].domain is None:
        return (), {}
    names = {
        part: _domain_names(raw.domain, f"{where}, {part}") for part, raw in raws.items() if raw.domain is not None
    }
    place = {name: index for index, name in enumerate(dict.fromkeys(names["train"]))}
    for part, found in names.items():
        stranger = next((name for name in found if name not in place), None)
        if stranger is not None:
            raise StreamError(f"{where}: domain '{stranger}' is in {part} but has no training rows: add some.")
    return tuple(place), {part: torch.tensor([place[name] for name in found]) for part, found in names.items()}


def _domain_names(values: Values, where: str) -> list[str]:
    found = values.tolist() if isinstance(values, Tensor) else list(values)
    names = [str(value) for value in found]
    for place, name in enumerate(names):
        if not name.strip() or (name in _NO_NAME and not isinstance(found[place], str)):
            what = name.strip() or "empty"
            raise StreamError(
                f"{where}: the domain of row {place} is missing ({what}): fill it or leave out such rows."
            )
    return names
