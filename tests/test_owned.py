"""Rows of any kind of table, copied: the same batches, and nothing of the table they came from."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
import torch
from torch import Tensor

from continual.owned import owned
from continual.table import ArrowTable, Batch, Concat, Mapped, Ragged, Table, TensorTable, View

TOKENS = [[5, 6, 7], [8], [], [9, 10, 11, 12], [13, 14], [1, 2, 3, 4, 5]]


def dense(start: int = 0, rows: int = 6) -> TensorTable:
    inputs = torch.rand(rows, 2, 3, generator=torch.Generator().manual_seed(start))
    texts = [f"text {start + row}" for row in range(rows)]
    return TensorTable({"inputs": inputs, "text": texts, "row": torch.arange(start, start + rows)})


def tokens(pad: int = 3) -> TensorTable:
    return TensorTable(
        {
            "input_ids": Ragged.from_lists(TOKENS, pad),
            "labels": Ragged.from_lists([row[::-1] for row in TOKENS], -100),
            "row": torch.arange(100, 106),
        }
    )


def arrow() -> ArrowTable:
    content: dict[str, list[Any]] = {"input_ids": TOKENS, "labels": TOKENS[::-1], "row": list(range(6))}
    texts = [f"text {n}" for n in range(6)]
    return ArrowTable(datasets.Dataset.from_dict({**content, "text": texts}), {"input_ids": 3, "labels": -100})


class Own(Table):
    """A table of the user's."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index_B: Tensor) -> Batch:
        return {"inputs": index_B[:, None].float() * 2, "row": index_B + 50}

    @property
    def names(self) -> tuple[str, ...]:
        return ("inputs", "row", "text")

    def column(self, name: str) -> Tensor:
        return self[torch.arange(6)][name]

    def strings(self, name: str) -> list[str]:
        return [f"own {n}" for n in range(6)]


def double(column: Tensor) -> Tensor:
    return column * 2


TABLES: dict[str, Table] = {
    "dense": dense(),
    "tokens": tokens(),
    "view": View(View(dense(rows=9), torch.tensor([8, 1, 3, 3, 7, 0])), torch.tensor([5, 4, 3, 2, 1, 0])),
    "mapped": Mapped(dense(), {"inputs": double}),
    "mapped beside tokens": Mapped(tokens(), {"row": double}),
    "concat": Concat([dense(0, 2), View(dense(10, 5), torch.tensor([4, 0, 2])), dense(30, 1)]),
    "concat of tokens": Concat([View(tokens(), torch.arange(4)), View(tokens(), torch.tensor([5, 5]))]),
    "concat of kinds": Concat([View(tokens(), torch.arange(4)), View(arrow(), torch.arange(2))]),
    "arrow": arrow(),
    "view of arrow": View(arrow(), torch.tensor([5, 0, 3, 1, 2, 4])),
    "own": Own(),
}


@pytest.mark.parametrize("index", [None, [4, 0, 3], [2], []], ids=str)
@pytest.mark.parametrize("name", TABLES)
def test_the_same_batches_lengths_and_strings(name: str, index: list[int] | None) -> None:
    table = TABLES[name]
    places = torch.arange(len(table)) if index is None else torch.tensor(index, dtype=torch.int64)
    found = owned(table, None if index is None else places)
    assert isinstance(found, TensorTable) and len(found) == len(places)
    for turn in (torch.arange(len(places)), torch.arange(len(places)).flip(0)[:2]):
        mine, theirs = found[turn], table[places[turn]]
        assert mine.keys() == theirs.keys()
        counted = theirs.get("attention_mask", torch.ones(1, dtype=torch.int64))
        for column in mine:
            if not len(turn):
                assert len(mine[column]) == 0
                continue
            assert mine[column].dtype == theirs[column].dtype and mine[column].shape == theirs[column].shape
            if column == "input_ids":  # what several tables are padded with is that of neither
                assert torch.equal(mine[column] * counted, theirs[column] * counted)
            else:
                assert torch.equal(mine[column], theirs[column])
    lengths = table.lengths
    assert (found.lengths is None) == (lengths is None)
    if lengths is not None:
        assert torch.equal(found.lengths, lengths[places])  # type: ignore[arg-type]
    if "text" in table.names:
        assert list(found.strings("text")) == [table.strings("text")[place] for place in places.tolist()]


def test_tokens_that_cannot_stay_ragged_are_padded_with_their_mask() -> None:
    padded = TensorTable({**tokens()[torch.arange(6)]})
    for table in (Mapped(tokens(), {"input_ids": double}), Concat([tokens(), padded])):
        places = torch.tensor([3, len(table) - 6, 0])
        mine, theirs = owned(table, places)[torch.arange(3)], table[places]
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("name", TABLES)
def test_it_shares_no_memory_and_holds_no_more_than_its_rows(name: str) -> None:
    found = owned(TABLES[name], torch.tensor([1, 4]))
    for column in found.columns.values():
        for tensor in [column] if isinstance(column, Tensor) else []:
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
        if isinstance(column, Ragged):
            assert column.values_V.untyped_storage().nbytes() == column.values_V.nbytes
    slice_of_more = TensorTable({"inputs": torch.rand(100, 4)[:6], "row": torch.arange(6)})
    assert owned(slice_of_more).column("inputs").untyped_storage().nbytes() == 6 * 4 * 4
