"""The rows of an update on their way in: read, numbered, checked against what the store knows, and a hold-out set aside.

A row's id is a number made from its ``id`` column, or from its content and label where there is none, by a hash with the
store's salt (which follows from its seed): the same row has the same id in every file and in every store of that seed. Hold-out
rows are those of smallest hash.

Letters: N rows.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from continual.disk import file_sha256
from continual.errors import StreamError, quoted, shown
from continual.kinds import Objective, Scenario
from continual.refresh.folder import Columns
from continual.refresh.rules import HoldoutRules
from continual.streams.columns import labels_of, replace_columns
from continual.streams.content import row_keys
from continual.streams.convert import as_table
from continual.streams.sources.files import FilesSource
from continual.streams.sources.rows import Raw, Values, check_features, class_values, take
from continual.streams.sources.tabular import TabularSource, decodable
from continual.table import Table, TensorTable

_SPAN = 2**63
_BETWEEN = r"[\s_\-.,:;/'\"()]+"
_SEPARATOR = re.compile(rf"(?<=[^\W\d_]){_BETWEEN}(?=[^\W_])|(?<=\d){_BETWEEN}(?=[^\W\d_])")
"""What words are set apart by, and a word and a number; between two digits, and before the first sign, it says something."""
_NO_ID = ("None", "nan", "NaT", "<NA>")
"""What an id that is missing looks like as text."""


@dataclass(frozen=True)
class Offered:
    """The rows of an update, numbered.

    Attributes:
        raw: their features and labels.
        ids: int64 (N,), from 0.
        names: the label of each as text, where the objective is classification.
        path, sha256: of the file they came from; None for rows from Python.
        fingerprint: SHA-256 of the rows, whatever their order and file.
        form: what the features and the label are, to compare with later files.
        notes: what became of rows that are not here.
    """

    raw: Raw
    ids: Tensor
    names: tuple[str, ...]
    path: str
    sha256: str | None
    fingerprint: str
    offered: int
    form: dict[str, str]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Divided:
    """The rows of an update as tables with ``labels`` and ``row``: what trains, selects and measures.

    ``notes`` say which rows are in none of them.
    """

    train: Table
    valid: Table | None
    holdout: Table | None
    notes: tuple[str, ...] = ()


def read_rows(data: Any, columns: Columns, objective: Objective, salt: str) -> Offered:
    """The rows of a file (JSONL, CSV, Parquet), of a ``datasets`` folder or object, of a data frame, or of arrays.

    Raises:
        StreamError: they cannot be read, a column or a value is missing, or an id repeats.
    """
    path, sha256, raw = _raw(data, columns, objective)
    count = len(raw.table)
    if count == 0:
        raise StreamError(f"'{path}' holds no rows: give it some.")
    check_features(raw.table, f"'{path}'")
    names = tuple(map(str, class_values(raw.labels, f"'{path}'"))) if objective == "classification" else ()
    keys_N = row_keys(raw.table)
    told = names or tuple(str(value) for value in (raw.labels if raw.labels is not None else [""] * count))
    if raw.ids is None:
        rows_N = _hashed((f"{key}/{label}" for key, label in zip(keys_N.tolist(), told, strict=True)), salt)
        first_N = np.unique(rows_N.numpy(), return_index=True)[1]
        notes = raw.notes
        if len(first_N) < count:
            chosen = torch.from_numpy(np.sort(first_N))
            notes = (*notes, f"{count - len(first_N)} of the {count} rows of '{path}' are there twice and count once.")
            raw, rows_N = take(raw, chosen), rows_N[chosen]
            names = tuple(names[place] for place in chosen.tolist()) if names else ()
            keys_N, told = keys_N[chosen.numpy()], tuple(told[place] for place in chosen.tolist())
    else:
        ids = _checked_ids(raw.ids, path)
        rows_N, notes = _hashed(ids, salt), raw.notes
    lines = sorted(
        f"{row}/{key}/{label}" for row, key, label in zip(rows_N.tolist(), keys_N.tolist(), told, strict=True)
    )
    fingerprint = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    form = _form(raw, objective)
    return Offered(raw, rows_N, names, path, sha256, fingerprint, count, form, tuple(notes))


def salt_of(seed: int) -> str:
    """The salt of a store with this seed, 16 bytes in hexadecimal."""
    return hashlib.blake2b(f"continual store {seed}".encode(), digest_size=16).hexdigest()


def row_ids(ids: Sequence[str], salt: str) -> Tensor:
    """The numbers of rows with these values in their ``id`` column, int64 (N,)."""
    return _hashed(ids, salt)


def without(offered: Offered, gone: Tensor, why: str) -> Offered:
    """Without the rows whose ids are in ``gone``, and a note that says why.

    Raises:
        StreamError: none would be left.
    """
    stays_N = ~torch.isin(offered.ids, gone)
    left = int((~stays_N).sum())
    if left == 0:
        return offered
    if left == len(offered.ids):
        raise StreamError(f"all {left} rows of '{offered.path}' {why}: there is nothing new to learn.")
    index = stays_N.nonzero().flatten()
    return replace(
        offered,
        raw=take(offered.raw, index),
        ids=offered.ids[index],
        names=tuple(offered.names[place] for place in index.tolist()) if offered.names else (),
        notes=(*offered.notes, f"{left} of the {len(stays_N)} rows of '{offered.path}' {why} and were left out."),
    )


def check_form(offered: Offered, known: dict[str, str] | None) -> None:
    """Raise :class:`StreamError` where the rows are of another form than those of earlier updates."""
    for key, was in (known or {}).items():
        now = offered.form.get(key)
        if now != was:
            raise StreamError(
                f"'{offered.path}' has {key} that {_is(now)}, and in earlier updates {_is(was)}: give the rows the form they had, "
                "or begin a new store."
            )


def check_labels(offered: Offered, known: Sequence[str], scenario: Scenario, accepted: Sequence[str] = ()) -> None:
    """Raise :class:`StreamError` where labels look renamed or written in two ways, or are fewer than a fixed set of them.

    Args:
        known: names of the classes learnt so far.
        accepted: new labels that are meant although another one looks alike.
    """
    present = dict.fromkeys(offered.names)
    alike = {_plain(name): name for name in known}
    met = set(known)
    for name in present:
        twin = alike.setdefault(_plain(name), name)
        if name not in met and twin != name and name not in accepted and (twin in met or twin not in accepted):
            raise StreamError(
                f"the label '{name}' in '{offered.path}' looks like '{twin}' written in another way: write it as '{twin}', or say "
                f"that it is a class of its own with --new-label '{name}'."
            )
    missing = [name for name in known if name not in present]
    if scenario == "domain" and missing:
        raise StreamError(
            f"'{offered.path}' has no rows of {quoted(missing[:5])}, and in the scenario 'domain' every update has all "
            f"{len(known)} classes: add some, since an update without them would unlearn them."
        )


def divide(offered: Offered, rules: HoldoutRules, *, least: int, most: int, valid: bool) -> Divided:
    """Set the hold-out aside, and rows to select on where the strategy needs them.

    Every class keeps at least one training row, and what has its content trains with it. Rows with the content of a hold-out
    row are not trained on.

    Args:
        least: hold-out rows that are wanted at least, as far as a third of the rows goes.
        most: hold-out rows, at most.
    """
    rows_N, count = offered.ids, len(offered.ids)
    order_N = rows_N.argsort()
    held_N = torch.zeros(count, dtype=torch.bool)
    wanted = min(max(round(rules.share * count), min(least, count // 3), min(1, count - 1)), most, count - 1)
    held_N[order_N[:wanted]] = True
    chosen_N = torch.zeros(count, dtype=torch.bool)
    if valid:
        rest = order_N[wanted:]
        chosen_N[rest[: min(max(round(rules.valid * len(rest)), 1), len(rest) - 1)]] = True
    keys_N = row_keys(offered.raw.table)
    copies_N = torch.from_numpy(np.isin(keys_N, keys_N[held_N.numpy()])) & ~held_N
    if offered.names:
        _, class_N = np.unique(np.asarray(offered.names, dtype=object).astype(str), return_inverse=True)
        trains_N = (~held_N & ~chosen_N & ~copies_N).numpy()
        training_K = np.bincount(class_N[trains_N], minlength=class_N.max() + 1)
        for empty in np.flatnonzero(training_K == 0):
            own = order_N[torch.from_numpy(class_N[order_N.numpy()] == empty)]
            own = torch.from_numpy(keys_N == keys_N[int(own[-1])])  # with that content under any label
            held_N[own] = chosen_N[own] = copies_N[own] = False
    parts = [~held_N & ~chosen_N & ~copies_N, chosen_N & ~copies_N, held_N]
    train, selects, measures = (
        _table(offered, part.nonzero().flatten()) if bool(part.any()) else None for part in parts
    )
    assert train is not None, "one row trains at least"
    left = int(copies_N.sum())
    note = f"{left} rows of '{offered.path}' have the content of hold-out rows and are not trained on."
    return Divided(train, selects, measures, (note,) if left else ())


def _raw(data: Any, columns: Columns, objective: Objective) -> tuple[str, str | None, Raw]:
    named = {**columns.model_dump(exclude_none=True), "keep": "memory"}
    if isinstance(data, str | Path):
        path = Path(data)
        with decodable(f"'{path}'"):
            if path.is_dir():
                return str(data), None, TabularSource(**named).raw(_saved_dataset(path), objective, f"'{path}'")
            if not path.is_file():
                raise StreamError(
                    f"'{path}' was not found: name a JSONL, CSV or Parquet file, or a folder of `datasets`."
                )
            source = _Rows(path=str(path), **named)
            return str(data), file_sha256(path), source.parts({"train": path}, objective)["train"]
    if hasattr(data, "columns") and hasattr(data, "iloc"):
        import datasets

        data = datasets.Dataset.from_pandas(data, preserve_index=False)
    if hasattr(data, "column_names") and hasattr(data, "features"):
        return "rows", None, TabularSource(**named).raw(data, objective, "the rows")
    table = as_table(data, what="the rows")
    labels = labels_of(table) if "labels" in table.names else None
    ids = table.column("row") if "row" in table.names else None
    features = {name: column for name, column in _columns_of(table).items() if name not in ("labels", "row")}
    return "rows", None, Raw(TensorTable(features), labels, ids=ids)


class _Rows(FilesSource):
    """Whose ids are text, as they stand: 007 is not 7."""

    def string_columns(self, objective: Objective) -> tuple[str, ...]:
        named = super().string_columns(objective)
        return named if self.id is None else (*named, self.id)


def _saved_dataset(path: Path) -> Any:
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise StreamError(
            f"'{path}' is no folder that `datasets` saved ({error}): name one, or a file of rows."
        ) from error
    if isinstance(found, datasets.DatasetDict):
        if "train" not in found:
            raise StreamError(f"'{path}' has the parts {quoted(found)}: save the one to learn from by itself.")
        return found["train"]
    return found


def _columns_of(table: Table) -> dict[str, Any]:
    if isinstance(table, TensorTable):
        return dict(table.columns)
    return dict(table[torch.arange(len(table))])


def _table(offered: Offered, index: Tensor) -> Table:
    raw = take(offered.raw, index)
    columns: dict[str, Any] = {"row": offered.ids[index]}
    table = replace_columns(raw.table, columns)
    if offered.names:
        return _labelled(table, [offered.names[place] for place in index.tolist()])
    if raw.labels is not None:
        return replace_columns(table, {"labels": torch.as_tensor(np.asarray(raw.labels), dtype=torch.float32)})
    return table


def _labelled(table: Table, names: list[str]) -> Table:
    columns = {**_columns_of(table), "labels": names}
    return TensorTable(columns)


def _hashed(values: Any, salt: str) -> Tensor:
    key = bytes.fromhex(salt)
    found = [hashlib.blake2b(value.encode(), digest_size=8, key=key).digest() for value in values]
    whole_N = np.frombuffer(b"".join(found), dtype=">u8") & np.uint64(_SPAN - 1)
    return torch.from_numpy(whole_N.astype(np.int64))


def _checked_ids(values: Values, path: str) -> list[str]:
    """The ids of the rows as text: whole numbers or names, none missing, each once."""
    found: dict[str, None] = {}
    for place, value in enumerate(np.asarray(values).tolist()):
        text = str(value)
        if not text.strip() or text in _NO_ID:
            raise StreamError(f"row {place} of '{path}' has no id: give every row one, or leave the id column out.")
        if not isinstance(value, str | int) or isinstance(value, bool):
            raise StreamError(
                f"the id of row {place} of '{path}' is {shown(value)}: an id is text or a whole number, write it so in every row."
            )
        if text in found:
            raise StreamError(f"the id '{text}' is there twice in '{path}': give each row its own.")
        found[text] = None
    return list(found)


def _form(raw: Raw, objective: Objective) -> dict[str, str]:
    table = raw.table
    form = {}
    for name in table.names:
        if name == "inputs":
            width = "x".join(map(str, table[torch.zeros(1, dtype=torch.int64)]["inputs"].shape[1:])) or "1"
            form["features"] = f"{width} numbers"
        else:
            form[name] = "text"
    if objective == "classification":
        values = class_values(raw.labels, "the rows")
        form["labels"] = "names" if isinstance(values, list) else "whole numbers"
    return form


def _is(form: str | None) -> str:
    return "are not there" if form is None else f"are {form}"


def _plain(name: str) -> str:
    return _SEPARATOR.sub("", name.casefold().strip(" \t\n_.,:;!?'\"()")) or name
