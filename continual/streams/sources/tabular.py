"""A Hugging Face ``datasets.Dataset`` with columns of any name as one part of a source."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, StrictInt

from continual.errors import StreamError, nearest, quoted
from continual.kinds import Objective
from continual.spec import Spec
from continual.streams.columns import named
from continual.streams.content import TEXTS
from continual.streams.sources.rows import Raw, Values
from continual.streams.tokens import TEXT_GROUPS
from continual.table import ArrowTable, Table, TensorTable

if TYPE_CHECKING:
    import datasets

KEEP_IN_MEMORY = 2**30
"""Bytes up to which ``keep: auto`` keeps a part in memory."""


class TabularSource(Spec):
    """Which column is what; the settings that ``files`` and ``hub`` share.

    Attributes:
        text: column of strings; where nothing is named, the first of ``prompt`` + ``completion``, ``messages`` and
            ``text`` that is there and suits the objective is taken.
        features: numeric columns that together are ``inputs``, float32 (N, D).
        prompt, completion: columns of a language model's question and answer.
        messages: column of chats, each a list of ``{role, content}``.
        label: column of classes (whole numbers or names) or of targets.
        unlabelled: labels that stand for none (``-`` in MNLI): rows that have one are left out, and that is said.
        domain, time: columns for a split by domain or by time.
        id: column of row ids, whole numbers from 0.
        keep: ``memory``, ``disk`` (memory-mapped), or ``auto``: memory up to 1 GiB a part.
        overlap: training and valid rows whose content is among the test rows: ``refuse`` or ``drop``.
    """

    text: str | None = None
    features: list[str] | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    label: str | None = None
    unlabelled: list[str | StrictInt] = Field(default_factory=list)
    domain: str | None = None
    time: str | None = None
    id: str | None = None
    keep: Literal["memory", "disk", "auto"] = "auto"
    overlap: Literal["refuse", "drop"] = "refuse"

    def raw(self, dataset: datasets.Dataset, objective: Objective, where: str) -> Raw:
        """One part.

        Raises:
            StreamError: a column is missing, or there are none to learn from.
        """
        notes: tuple[str, ...] = ()
        if self.unlabelled:
            dataset, notes = self._labelled(dataset, objective, where)
        self._check_there(dataset, [self.domain, self.time, self.id], where)
        return Raw(
            self.inputs(dataset, objective, where),
            self._labels(dataset, objective, where),
            None if self.domain is None else list(dataset[self.domain]),
            None if self.time is None else list(dataset[self.time]),
            None if self.id is None else _array(list(dataset[self.id])),
            notes,
        )

    def inputs(self, dataset: datasets.Dataset, objective: Objective, where: str) -> Table:
        """What a model reads of the rows; labels need not be there.

        Raises:
            StreamError: a column is missing, or there are none to learn from.
        """
        columns = self._feature_columns(dataset, objective, where)
        self._check_there(dataset, [*columns.values(), *(self.features or ())], where)
        on_disk = self.keep == "disk" or (self.keep == "auto" and dataset.data.nbytes > KEEP_IN_MEMORY)
        return self._inputs(dataset, on_disk, where) if self.features else _texts(dataset, columns, on_disk)

    def _check_there(self, dataset: datasets.Dataset, names: list[str | None], where: str) -> None:
        for name in names:
            if name is not None and name not in dataset.column_names:
                header = " The first line of a CSV file names its columns." if where.endswith(".csv'") else ""
                raise StreamError(f"{where}: there is no column '{name}': {_columns(dataset, name)}{header}")

    def _labelled(
        self, dataset: datasets.Dataset, objective: Objective, where: str
    ) -> tuple[datasets.Dataset, tuple[str, ...]]:
        """The rows whose label, as it is written, is not in ``unlabelled``; a note where some are left out."""
        if objective not in ("classification", "regression"):
            raise StreamError(f"{where}: the objective '{objective}' has no labels: leave 'unlabelled' out.")
        name = self._label_column(dataset)
        nothing = {str(label) for label in self.unlabelled}
        if name not in dataset.column_names:
            return dataset, ()
        kept = [place for place, label in enumerate(dataset[name]) if str(label) not in nothing]
        if len(kept) == len(dataset):
            return dataset, ()
        left = len(dataset) - len(kept)
        note = f"{where}: {left} of {len(dataset)} rows left out, whose label is in 'unlabelled'"
        return dataset.select(kept), (note,)

    def _label_column(self, dataset: datasets.Dataset) -> str:
        return self.label or next((name for name in ("label", "labels") if name in dataset.column_names), "label")

    def string_columns(self, objective: Objective) -> tuple[str, ...]:
        """The columns that are text or names, whatever their cells look like: text, class labels, domain.

        Those of a name that is not given may not be there.
        """
        named = [self.text, self.prompt, self.completion, self.messages]
        if not any(named) and not self.features:
            named = list(TEXTS)
        if objective == "classification":
            named += ["label", "labels"] if self.label is None else [self.label]
        numbers = {*(self.features or ()), self.time, self.id}
        return tuple(dict.fromkeys(name for name in (*named, self.domain) if name is not None and name not in numbers))

    def _feature_columns(self, dataset: datasets.Dataset, objective: Objective, where: str) -> dict[str, str]:
        named = {name: getattr(self, name) for name in ("text", "prompt", "completion", "messages")}
        columns = {name: column for name, column in named.items() if column is not None}
        if columns and self.features:
            raise StreamError(f"{where}: both 'features' and '{next(iter(columns))}' are named: name one of them.")
        if not columns and not self.features:
            for group in (*TEXT_GROUPS[objective], *TEXT_GROUPS["causal-lm"]):
                if set(group) <= set(dataset.column_names):
                    columns = {name: name for name in group}
                    break
            else:
                raise StreamError(
                    f"{where}: nothing to learn from: name the column in 'text', 'features', 'messages', or 'prompt' "
                    f"and 'completion'; there are {quoted(dataset.column_names)}."
                )
        allowed = [name for group in TEXT_GROUPS[objective] for name in group]
        wrong = [name for name in columns if name not in allowed]
        if wrong or (self.features and "lm" in objective) or (self.features and objective == "seq2seq"):
            raise StreamError(
                f"{where}: '{wrong[0] if wrong else 'features'}' does not suit the objective '{objective}', which "
                f"reads {quoted(allowed)}: name such a column or set another 'objective'."
            )
        if ("prompt" in columns) != ("completion" in columns):
            raise StreamError(f"{where}: 'prompt' and 'completion' belong together: name both.")
        return columns

    def _labels(self, dataset: datasets.Dataset, objective: Objective, where: str) -> Values | None:
        if objective not in ("classification", "regression"):
            if self.label is not None:
                raise StreamError(f"{where}: the objective '{objective}' has no labels: leave 'label' out.")
            return None
        name = self._label_column(dataset)
        if name not in dataset.column_names:
            raise StreamError(
                f"{where}: there is no column '{name}' for labels in 'source.label': {_columns(dataset, name)}"
            )
        values = list(dataset[name])
        names = getattr(dataset.features[name], "names", None)
        return values if names is None else named(values, names, where)

    def _inputs(self, dataset: datasets.Dataset, on_disk: bool, where: str) -> Table:
        names = list(self.features or ())
        for name in names:
            if not _is_numeric(dataset.features[name]):
                raise StreamError(
                    f"{where}: '{name}' is not numeric in every row: mend the rows, or leave it out of 'features'."
                )
        if not on_disk:
            return TensorTable({"inputs": torch.from_numpy(_matrix(dataset.with_format("numpy"), names, where))})
        mark = hashlib.sha256(f"{dataset._fingerprint}/inputs/{names}".encode()).hexdigest()
        with quiet():
            mapped = dataset.map(
                lambda batch: {"inputs": list(_matrix({n: np.asarray(batch[n]) for n in names}, names, where))},
                batched=True,
                remove_columns=dataset.column_names,
                new_fingerprint=mark,
            )
        return ArrowTable(mapped)


def _texts(dataset: datasets.Dataset, columns: dict[str, str], on_disk: bool) -> Table:
    if not on_disk:
        return TensorTable({name: list(dataset[column]) for name, column in columns.items()})
    chosen = dataset.select_columns(list(columns.values()))
    return ArrowTable(chosen.rename_columns({column: name for name, column in columns.items() if column != name}))


def _columns(dataset: datasets.Dataset, name: str) -> str:
    found = dataset.column_names
    return f"it has {quoted(found)}; name one of them.{nearest(name, found)}"


@contextmanager
def decodable(where: str) -> Iterator[None]:
    """Text inside that is not UTF-8, which Arrow finds only when a row is read, becomes a :class:`StreamError`."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise StreamError(f"{where}: there is text that is not UTF-8 ({error.reason}): write it in UTF-8.") from error


@contextmanager
def quiet(*, log: bool = True) -> Iterator[None]:
    """No progress bars of ``datasets`` inside, and without ``log`` no errors in its log either, as they are raised too."""
    import datasets

    silent, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    if not log:
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not silent:
            datasets.enable_progress_bars()


def _array(values: list[Any]) -> npt.NDArray[Any]:
    """The values as an array, of objects where they are of different shapes."""
    try:
        return np.asarray(values)
    except ValueError:
        found = np.empty(len(values), dtype=object)
        found[:] = values
        return found


def _is_numeric(feature: Any) -> bool:
    inner = getattr(feature, "feature", feature)
    if inner is not feature:
        return _is_numeric(inner)
    return str(getattr(feature, "dtype", "")).startswith(("int", "uint", "float", "double", "bool"))


def _matrix(columns: Any, names: list[str], where: str) -> npt.NDArray[np.float32]:
    parts = []
    for name in names:
        try:
            values = np.asarray(columns[name])
            uneven = values.dtype == object
        except ValueError:
            uneven = True
        if uneven:
            raise StreamError(f"{where}: the rows of '{name}' have different lengths: make them alike.")
        with np.errstate(over="ignore"):  # what is too large is infinite then, and refused as such
            parts.append(values.reshape(len(values), -1).astype(np.float32))
    return np.concatenate(parts, axis=1)
