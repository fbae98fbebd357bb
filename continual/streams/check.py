"""What is wrong with a stream, in sentences: what was found, what is allowed, what to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from continual.errors import StreamError, quoted
from continual.streams.content import Keys, finite_rows, row_keys
from continual.streams.experience import Experience
from continual.streams.sources.rows import PARTS
from continual.streams.stream import Stream
from continual.table import IGNORED, Concat, Mapped, Table, View

_BLOCK = 1024


def check_stream(stream: Stream) -> list[str]:
    """Everything that is wrong; empty where nothing is.

    It proves that no test row is among the training and valid rows of any experience, by id and by content (text or
    feature bytes; where pixels are permuted or rotated, before that).
    """
    if len(stream) == 0 and not stream.open:
        return ["the stream has no experiences: give it at least one."]
    experiences = list(stream)
    found = [*_names(experiences)]
    for experience in experiences:
        found.extend(_experience(experience))
    found.extend(_classes(stream, experiences))
    found.extend(_leaks(experiences))
    found.extend(_repeated_ids(experiences))
    return found


def require_stream(stream: Stream) -> None:
    """Raise :class:`StreamError` with the first sentence of :func:`check_stream`, if there is one."""
    found = check_stream(stream)
    if found:
        more = f" ({len(found) - 1} more: see `continual check`)" if len(found) > 1 else ""
        raise StreamError(f"the stream '{stream.name}': {found[0]}{more}")


def require_experience(experience: Experience) -> None:
    """Raise :class:`StreamError` for what :func:`check_stream` would find in one experience that arrives by itself.

    It may lack a test set.
    """
    found = [*_experience(experience, test_needed=False), *_leaks([experience])]
    if found:
        more = f" ({len(found) - 1} more)" if len(found) > 1 else ""
        raise StreamError(f"{found[0]}{more}")


def _names(experiences: list[Experience]) -> Iterator[str]:
    for name, count in Counter(experience.name for experience in experiences).items():
        if count > 1:
            yield f"{count} experiences are called '{name}': give each its own name."


def _experience(experience: Experience, *, test_needed: bool = True) -> Iterator[str]:
    where = f"experience '{experience.name}'"
    if len(experience.train) == 0:
        yield f"{where} has no training rows: leave it out or give it some."
    if test_needed and (experience.test is None or len(experience.test) == 0):
        yield f"{where} has no test rows: without them nothing can be said of what is remembered; give it some."
    for part in PARTS:
        table: Table | None = getattr(experience, part)
        if table is None or len(table) == 0:
            continue
        if "row" not in table.names:
            yield f"{where}, {part} has no column 'row': give each row an id that is its own."
        bad = int((~finite_rows(table)).sum())
        if bad:
            yield f"{where}, {part} has {bad} rows with NaN or infinite values: leave them out or fill them."
        if experience.objective == "classification":
            yield from _labels(experience, part, table, where)
        elif experience.objective in ("causal-lm", "seq2seq") and "labels" in table.names:
            yield from _counted(part, table, where)


def _labels(experience: Experience, part: str, table: Table, where: str) -> Iterator[str]:
    if "labels" not in table.names:
        yield f"{where}, {part} has no column 'labels': give each row a class id."
        return
    labels = table.column("labels")
    if labels.is_floating_point() or labels.dim() != 1:
        yield f"{where}, {part} has labels of type {labels.dtype} and shape {tuple(labels.shape)}: one int64 id a row."
        return
    met = range(len(experience.class_names))
    allowed = experience.classes if part == "train" or experience.scenario == "task" else met
    wrong = sorted(set(torch.unique(labels).tolist()) - set(allowed))
    if wrong:
        shown = quoted(wrong[:5])
        yield f"{where}, {part} has labels {shown}, none of its class ids ({_span(list(allowed))}): mend them."


def _counted(part: str, table: Table, where: str) -> Iterator[str]:
    blocks = torch.split(torch.arange(len(table)), _BLOCK)
    empty = sum(int((table[index_B]["labels"] == IGNORED).all(1).sum()) for index_B in blocks)
    if empty:
        yield f"{where}, {part} has {empty} rows of which no token counts (every label is {IGNORED}): leave them out."


def _repeated_ids(experiences: list[Experience]) -> Iterator[str]:
    """An id names one row: the same one in two experiences would be taken for one that the memory has met."""
    ids = _ids([t for e in experiences for t in (e.train, e.valid) if t is not None])
    found, counts = np.unique(ids, return_counts=True)
    if len(found) < len(ids):
        yield (
            f"{int((counts > 1).sum())} row ids are used by several training or valid rows (one of them is "
            f"{found[counts > 1][0]}): give each row an id of its own."
        )


def _classes(stream: Stream, experiences: list[Experience]) -> Iterator[str]:
    if stream.objective != "classification" or not experiences:
        return
    classes = {c for experience in experiences for c in experience.classes}
    if len(classes) < 2 and not stream.open:
        yield "the whole stream has one class: classification needs two at least; give it rows of another."
    if stream.scenario != "task":
        return
    owner: dict[int, str] = {}
    for experience in experiences:
        shared = [c for c in experience.classes if c in owner]
        if shared:
            yield (
                f"experiences '{owner[shared[0]]}' and '{experience.name}' share the class ids {quoted(shared[:5])}, "
                "and in the scenario 'task' each has its own: give new ids or use the scenario 'domain'."
            )
        owner |= dict.fromkeys(experience.classes, experience.name)


def _leaks(experiences: list[Experience]) -> Iterator[str]:
    learnt = [t for e in experiences for t in (e.train, e.valid) if t is not None and len(t)]
    tests = [e.test for e in experiences if e.test is not None and len(e.test)]
    if not learnt or not tests:
        return
    shared_ids = np.intersect1d(_ids(learnt), _ids(tests))
    if len(shared_ids):
        yield (
            f"{len(shared_ids)} test rows are training or valid rows too, by id (one of them is row {shared_ids[0]}): "
            "take them out of one side."
        )
    shared = np.intersect1d(_keys(learnt), _keys(tests))
    if len(shared):
        example = _example(tests, shared[0])
        yield (
            f"{len(shared)} test rows have the same content as training or valid rows (one of them is {example}): take "
            "them out of one side, or set 'overlap: drop' in a source of files."
        )


def _ids(tables: list[Table]) -> npt.NDArray[np.int64]:
    found = [table.column("row").cpu().numpy() for table in tables if "row" in table.names]
    return np.concatenate(found) if found else np.empty(0, dtype=np.int64)


def _keys(tables: list[Table]) -> Keys:
    """The keys of all rows, those of each base table once however often its rows are seen."""
    used: dict[int, tuple[Table, Tensor]] = {}
    for table in tables:
        for base, index in _bases(table, torch.arange(len(table))):
            _, mask = used.setdefault(id(base), (base, torch.zeros(len(base), dtype=torch.bool)))
            mask[index] = True
    return np.concatenate([row_keys(base)[mask.numpy()] for base, mask in used.values()])


def _bases(table: Table, index: Tensor) -> list[tuple[Table, Tensor]]:
    """Where the rows at ``index`` lie: tables that are neither views nor mapped, and the places in them."""
    if isinstance(table, Mapped):
        return _bases(table.base, index)
    if isinstance(table, View):
        return _bases(table.base, table.index_N[index])
    if isinstance(table, Concat):
        found, start = [], 0
        for part in table.tables:
            inside = (index >= start) & (index < start + len(part))
            found += _bases(part, index[inside] - start)
            start += len(part)
        return found
    return [(table, index)]


def _example(tables: list[Table], key: np.int64) -> str:
    for table in tables:
        places = np.flatnonzero(row_keys(table) == key)
        if len(places):
            text = next((name for name in ("text", "prompt", "messages") if name in table.names), None)
            if text is not None:
                return repr(str(table.strings(text)[int(places[0])])[:60])
            return (
                f"row {int(table.column('row')[int(places[0])])}" if "row" in table.names else f"row {int(places[0])}"
            )
    raise AssertionError("the key is among the test rows")


def _span(ids: list[int]) -> str:
    if not ids:
        return "none"
    return f"{ids[0]} to {ids[-1]}" if ids == list(range(ids[0], ids[-1] + 1)) else ", ".join(map(str, ids))
