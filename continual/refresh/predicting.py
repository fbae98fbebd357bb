"""A file of rows in, the same rows with what a version says of them out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from continual.errors import StateError, StreamError
from continual.refresh.objects import write_bytes
from continual.refresh.store import Store
from continual.streams.folders import own_cache
from continual.streams.sources.files import FilesSource, read_file
from continual.streams.sources.rows import check_features
from continual.streams.sources.tabular import decodable

KEYS = ("predicted", "score", "familiar", "out_of_scope", "version")


def predict_file(
    store: Store, rows: Path, out: Path, *, version: int | None = None, device: str = "auto", **options: Any
) -> tuple[int, int]:
    """Write the rows of a JSONL, CSV or Parquet file as JSONL, each with what a version says of it.

    Added keys: ``predicted`` (the class's name, or the value), ``score`` (its probability), ``familiar`` where the head says
    how much a row is like what was learnt, ``out_of_scope`` where a threshold is given for that, and ``version``.

    Args:
        version: None takes the live one.
        options: ``experience`` and ``out_of_scope``, as for :meth:`Store.predict`.

    Returns:
        How many rows, and by which version.

    Raises:
        ContinualError: rows that cannot be read, a column of theirs called like one that is added, no such version, or a place
            that cannot be written.
    """
    settings = store.folder.settings
    used = store.manifest(version).version
    with _cache_beside(out):
        source = FilesSource(path=str(rows), **{**settings.columns.model_dump(exclude_none=True), "keep": "memory"})
        if not rows.is_file():
            raise StreamError(f"'{rows}' was not found: name a JSONL, CSV or Parquet file.")
        with decodable(f"'{rows}'"):
            dataset = read_file(rows, source.string_columns(settings.objective))
            table = source.inputs(dataset, settings.objective, f"'{rows}'")
        check_features(table, f"'{rows}'")
        taken = sorted(set(KEYS) & set(dataset.column_names))
        if taken:
            raise StreamError(f"'{rows}' has a column '{taken[0]}', which the output adds: rename it.")
        found = store.predict(table, version=used, device=device, **options)
        lines = [
            json.dumps({**row, **added}, ensure_ascii=False, default=str)
            for row, added in zip(dataset, _added(found, used), strict=True)
        ]
    write_bytes(out, ("\n".join(lines) + "\n").encode())
    return len(lines), used


@contextmanager
def _cache_beside(out: Path) -> Iterator[None]:
    """What is cached inside lies where the output goes, and goes at the end."""
    there = next((folder for folder in out.absolute().parents if folder.exists()), out)
    try:
        folder = TemporaryDirectory(prefix=f".{out.name}.", dir=there, ignore_cleanup_errors=True)
    except OSError as error:
        raise StateError(
            f"'{out}' could not be written ({error.strerror or error}): free some space or name another place."
        ) from error
    with folder as name, own_cache(Path(name)):
        yield


def _added(found: dict[str, Any], version: int) -> list[dict[str, Any]]:
    count = len(found["labels"])
    if "names" not in found:
        return [{"predicted": value, "version": version} for value in found["labels"].tolist()]
    scores = found["scores"].max(-1).values.tolist()
    rows: list[dict[str, Any]] = [
        {"predicted": name, "score": round(score, 6) if math.isfinite(score) else None, "version": version}
        for name, score in zip(found["names"], scores, strict=True)
    ]
    if "familiar" in found:
        # unrounded, in the fewest digits that say it, so that the value of one row can be the threshold of the next call
        for place, value in enumerate(found["familiar"].cpu().numpy()):
            rows[place]["familiar"] = float(str(value))
    if "out_of_scope" in found:
        for row, beyond in zip(rows, found["out_of_scope"].tolist(), strict=True):
            row["out_of_scope"] = beyond
    assert len(rows) == count
    return rows
