"""Text tokenised once: views and mapped tables share the tokens of their base, and a file keeps them for the next run.

The file is found by content: SHA-256 of the texts, of the tokenizer (vocabulary, rules, special tokens, chat template)
and of the settings. A damaged file is made anew. What cannot be written is not kept; nothing else changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from continual.kinds import Objective
from continual.streams.content import text_key
from continual.streams.folders import cache_folder
from continual.streams.sources.tabular import quiet
from continual.streams.tokens import needed_columns, pad_id, tokenise
from continual.table import IGNORED, ArrowTable, Concat, Mapped, Ragged, Table, TensorTable, View

if TYPE_CHECKING:
    import datasets

_FORMAT = 2
_CHUNK = 1000

_encoded: WeakKeyDictionary[Table, dict[str, Table]] = WeakKeyDictionary()
_tokenizers: WeakKeyDictionary[Any, tuple[str, str]] = WeakKeyDictionary()


def encode(table: Table, tokenizer: Any, objective: Objective, max_length: int, cache: Path | None = None) -> Table:
    """``table`` with token ids.

    Args:
        table: with ``text``, ``prompt`` and ``completion``, or ``messages``, as the objective needs; a table that has
            ``input_ids`` already comes back as it is.
        tokenizer: of Hugging Face.
        objective: classification and regression read ``text``; ``causal-lm`` puts the loss on the completion, the
            assistant's turns, or all of ``text``; ``seq2seq`` reads ``prompt`` and answers ``completion``.
        max_length: tokens of a row at most; what is longer is cut on the right.
        cache: folder of the files; None: ``CONTINUAL_CACHE`` or ``~/.cache/continual``.

    Returns:
        A table of the same form with ragged ``input_ids`` (padded with the tokenizer's padding token, else its end
        token) and, for language models, ragged ``labels`` (padded with -100).

    Raises:
        StreamError: no such column, or a row of which no token counts.
    """
    if "input_ids" in table.names:
        return table
    if isinstance(table, View):
        return View(encode(table.base, tokenizer, objective, max_length, cache), table.index_N)
    if isinstance(table, Mapped):
        return Mapped(encode(table.base, tokenizer, objective, max_length, cache), table.functions)
    if isinstance(table, Concat):
        return Concat([encode(part, tokenizer, objective, max_length, cache) for part in table.tables])
    settings = f"{_FORMAT}/{objective}/{max_length}/{tokenizer_key(tokenizer)}"
    known = _encoded.setdefault(table, {})
    if settings not in known:
        folder = (cache or cache_folder()) / "tokens"
        names = needed_columns(table.names, objective)
        worker = _Worker(table, names, tokenizer, objective, max_length)
        if isinstance(table, ArrowTable):
            known[settings] = _encode_arrow(table, worker, folder, settings)
        else:
            known[settings] = _encode_memory(table, worker, folder, settings)
    return known[settings]


def tokenizer_key(tokenizer: Any) -> str:
    """SHA-256 of all that decides how a tokenizer turns text into ids."""
    state = json.dumps(
        [len(tokenizer), tokenizer.chat_template, tokenizer.special_tokens_map], default=str, sort_keys=True
    )
    known = _tokenizers.get(tokenizer)
    if known is None or known[0] != state:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            rules = json.loads(backend.to_str())
            rules = {name: value for name, value in rules.items() if name not in ("truncation", "padding")}
        else:
            rules = {"class": type(tokenizer).__qualname__, "vocabulary": tokenizer.get_vocab()}
        content = json.dumps([state, rules], sort_keys=True)
        known = (state, hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest())
        _tokenizers[tokenizer] = known
    return known[1]


class _Worker:
    """Turns some rows of one table into tokens."""

    def __init__(
        self, table: Table, names: tuple[str, ...], tokenizer: Any, objective: Objective, max_length: int
    ) -> None:
        self.table, self.names, self.tokenizer = table, names, tokenizer
        self.objective, self.max_length = objective, max_length
        self.pads = {"input_ids": pad_id(tokenizer)}
        if objective in ("causal-lm", "seq2seq"):
            self.pads["labels"] = IGNORED

    def __call__(self, texts: dict[str, Sequence[Any]], start: int) -> dict[str, list[list[int]]]:
        def row_name(place: int) -> str:
            if "row" in self.table.names:
                return f"row {int(self.table.column('row')[start + place])}"
            return f"row {start + place}"

        return tokenise(texts, self.tokenizer, self.objective, self.max_length, row_name)


def _encode_memory(table: Table, worker: _Worker, folder: Path, settings: str) -> Table:
    texts = {name: table.strings(name) for name in worker.names}
    content = [settings, *(f"{name}={text_key(values)}" for name, values in texts.items())]
    path = folder / f"{hashlib.sha256('/'.join(content).encode()).hexdigest()}.safetensors"
    tokens = _read(path, worker.pads, len(table))
    if tokens is None:
        rows: dict[str, list[list[int]]] = {name: [] for name in worker.pads}
        for start in range(0, len(table), _CHUNK):
            part = worker({name: values[start : start + _CHUNK] for name, values in texts.items()}, start)
            for name, found in part.items():
                rows[name].extend(found)
        tokens = {name: _ragged(found, worker.pads[name]) for name, found in rows.items()}
        _write(path, tokens)
    others: dict[str, Tensor | Ragged | list[Any]] = {}
    if isinstance(table, TensorTable):
        others = table.columns
    else:
        everything = torch.arange(len(table))
        others = {**table[everything], **{name: list(values) for name, values in texts.items()}}
    return TensorTable({**others, **tokens})


def _encode_arrow(table: ArrowTable, worker: _Worker, folder: Path, settings: str) -> Table:
    import datasets

    texts = table.dataset.select_columns(list(worker.names))
    digest = hashlib.sha256(settings.encode())
    for batch in texts.iter(10_000):
        for name in worker.names:
            digest.update(f"{name}={text_key(list(batch[name]))}".encode())
    mark = digest.hexdigest()
    path = folder / f"{mark}.arrow"

    def rows(batch: dict[str, list[Any]], places: list[int]) -> dict[str, list[list[int]]]:
        return worker(dict(batch), places[0])

    def mapped(reuse: bool) -> datasets.Dataset:
        features = datasets.Features({name: datasets.List(datasets.Value("int32")) for name in worker.pads})
        return texts.map(
            rows,
            batched=True,
            with_indices=True,
            batch_size=_CHUNK,
            remove_columns=list(worker.names),
            features=features,
            cache_file_name=str(path),
            load_from_cache_file=reuse,
            new_fingerprint=mark,
        )

    path.parent.mkdir(parents=True, exist_ok=True)
    with quiet():
        try:
            tokens = mapped(True)
            whole = len(tokens) == len(table) and list(tokens.column_names) == list(worker.pads)
        except (OSError, ValueError):
            whole = False
        if not whole:
            path.unlink(missing_ok=True)
            tokens = mapped(False)
        others = table.dataset.remove_columns([name for name in worker.pads if name in table.names])
        joined = datasets.concatenate_datasets([tokens, others], axis=1)
    return ArrowTable(joined, {**table.pads, **worker.pads})


def _ragged(rows: list[list[int]], pad: int) -> Ragged:
    lengths_N = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    values_V = np.fromiter(chain.from_iterable(rows), dtype=np.int32, count=int(lengths_N.sum()))
    offsets_N1 = np.concatenate([np.zeros(1, dtype=np.int64), lengths_N.cumsum()])
    return Ragged(torch.from_numpy(values_V), torch.from_numpy(offsets_N1), pad)


def _read(path: Path, pads: dict[str, int], rows: int) -> dict[str, Ragged] | None:
    """What :func:`_write` wrote, or None where it is not there or a byte of it has changed."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            seal = (file.metadata() or {}).get("sha256")
        if seal != _seal(tensors):
            return None
        found = {n: Ragged(tensors[f"{n}.values"], tensors[f"{n}.offsets"], pad) for n, pad in pads.items()}
    except (OSError, SafetensorError, KeyError):
        return None
    return found if all(len(ragged) == rows for ragged in found.values()) else None


def _write(path: Path, tokens: dict[str, Ragged]) -> None:
    tensors: dict[str, Tensor] = {}
    for name, ragged in tokens.items():
        tensors |= {f"{name}.values": ragged.values_V, f"{name}.offsets": ragged.offsets_N1}
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with suppress(OSError, SafetensorError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(tensors, temporary, metadata={"sha256": _seal(tensors)})
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _seal(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, piece in _pieces(tensors):
        digest.update(name.encode() + piece)
    return digest.hexdigest()


def _pieces(tensors: dict[str, Tensor]) -> Iterator[tuple[str, bytes]]:
    for name in sorted(tensors):
        yield name, tensors[name].contiguous().numpy().tobytes()
