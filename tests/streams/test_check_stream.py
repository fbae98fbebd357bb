from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from continual.errors import StreamError
from continual.streams.check import check_stream, require_stream
from continual.streams.content import finite_rows, row_keys
from continual.streams.experience import Experience
from continual.streams.stream import Stream
from continual.table import Concat, Mapped, Ragged, Table, TensorTable, View


def table(start: int, classes: tuple[int, ...], count: int = 8) -> TensorTable:
    inputs = torch.arange(count, dtype=torch.float32)[:, None] + start + torch.tensor([0.0, 0.25])
    labels = torch.tensor([classes[n % len(classes)] for n in range(count)])
    return TensorTable({"inputs": inputs, "labels": labels, "row": torch.arange(start, start + count)})


def experience(index: int, scenario: Any = "class", **changes: Any) -> Experience:
    classes = (2 * index, 2 * index + 1)
    whole = Experience(
        index, f"step {index}", table(1000 * index, classes), table(1000 * index + 200, classes),
        table(1000 * index + 400, classes), classes, tuple("abcdef"[: 2 * index + 2]), scenario,
    )  # fmt: skip
    return replace(whole, **changes)


def findings(*experiences: Experience, scenario: Any = "class", open: bool = False) -> list[str]:
    return check_stream(Stream.from_experiences(experiences, scenario=scenario, open=open))


def with_columns(base: TensorTable, **columns: torch.Tensor) -> TensorTable:
    return TensorTable({**base.columns, **columns})


def test_nothing_to_say_of_a_sound_stream() -> None:
    assert findings(experience(0), experience(1)) == []
    require_stream(Stream.from_experiences([experience(0), experience(1)]))


def test_no_experiences() -> None:
    assert "no experiences" in findings()[0]
    assert findings(open=True) == []


NAN, INFINITE = torch.full((8, 2), torch.nan), torch.full((8, 2), torch.inf)
NEXT, LATER, LAST = table(1000, (2, 3)), table(1200, (2, 3)), table(1400, (2, 3))
UNLABELLED = TensorTable({"inputs": torch.rand(2, 2), "row": torch.arange(2) + 5000})
WITHOUT_IDS = TensorTable({"inputs": torch.rand(2, 2), "labels": torch.tensor([2, 3])})
FAULTS: list[tuple[str, dict[str, Any], str]] = [
    ("empty", {"train": table(0, (2, 3), 0)}, "'step 1' has no training rows"),
    ("no test", {"test": None}, "'step 1' has no test rows"),
    ("empty test", {"test": table(0, (2, 3), 0)}, "'step 1' has no test rows"),
    ("name twice", {"name": "step 0"}, "2 experiences are called 'step 0'"),
    ("NaN", {"train": with_columns(NEXT, inputs=NAN)}, "train has 8 rows with NaN"),
    ("infinite", {"test": with_columns(LAST, inputs=INFINITE)}, "test has 8 rows with NaN"),
    ("label too large", {"train": table(1000, (2, 9))}, "train has labels '9', none of its class ids (2 to 3)"),
    ("label of another", {"train": table(1000, (0, 3))}, "train has labels '0', none of its class ids (2 to 3)"),
    ("test label", {"test": table(1400, (2, 7))}, "test has labels '7', none of its class ids (0 to 3)"),
    ("float labels", {"train": with_columns(NEXT, labels=torch.rand(8))}, "labels of type torch.float32"),
    ("no labels", {"train": UNLABELLED}, "no column 'labels'"),
    ("no row ids", {"valid": WITHOUT_IDS}, "no column 'row'"),
    (
        "test by id",
        {"test": with_columns(LAST, row=torch.arange(207, 215))},
        "1 test rows are training or valid rows too",
    ),
    (
        "test by content",
        {"train": with_columns(table(403, (2, 3)), row=NEXT.column("row"))},
        "5 test rows have the same",
    ),
    (
        "valid by content",
        {"valid": with_columns(table(400, (2, 3)), row=LATER.column("row"))},
        "8 test rows have the same",
    ),
]


@pytest.mark.parametrize(("changes", "sentence"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS])
def test_each_fault_is_found(changes: dict[str, Any], sentence: str) -> None:
    faulty = Stream.from_experiences([experience(0), experience(1, **changes)])
    found = check_stream(faulty)
    assert any(sentence in line for line in found), found
    with pytest.raises(StreamError, match="the stream 'stream': "):
        require_stream(faulty)


def test_one_class_and_shared_classes() -> None:
    one = experience(0, classes=(0,), train=table(0, (0,)), valid=None, test=table(400, (0,)), class_names=("a",))
    assert "one class" in findings(one)[0]
    assert findings(one, open=True) == []
    again = experience(1, "task", classes=(1, 2), train=table(1000, (1, 2)), valid=None, test=table(1400, (1, 2)))
    assert "share the class ids '1'" in findings(experience(0, "task"), again, scenario="task")[0]
    assert findings(experience(0), replace(again, scenario="class")) == []


def test_leaks_are_seen_through_views_maps_and_texts() -> None:
    base = table(0, (0, 1), 20)
    shuffled = Mapped(base, {"inputs": lambda x: x.flip(1), "row": lambda row: row + 500})
    turned = experience(1, classes=(0, 1), train=View(shuffled, torch.arange(5)), valid=None, test=table(1400, (0, 1)))
    first = experience(0, train=View(base, torch.arange(6, 20)), valid=None, test=View(base, torch.tensor([2, 5])))
    assert [
        "1 test rows have the same content" in line for line in findings(first, replace(turned, scenario="class"))
    ] == [True]
    text = {"text": ["same words", "others"], "labels": torch.tensor([0, 1])}
    train, test = TensorTable({**text, "row": torch.arange(2)}), TensorTable({**text, "row": torch.arange(2) + 9})
    found = findings(experience(0, train=train, valid=None, test=test))
    assert "2 test rows have the same content" in found[0] and ("'same words'" in found[0] or "'others'" in found[0])


def test_permuted_rows_are_compared_before_the_permutation() -> None:
    inputs, labels = torch.rand(30, 9), torch.arange(30) % 3
    split = {"by": "permutation", "count": 3}
    assert (
        check_stream(
            Stream.from_tables((inputs[:20], labels[:20]), (inputs[20:], labels[20:]), split=split, scenario="domain")
        )
        == []
    )
    leaking = Stream.from_tables((inputs, labels), (inputs[20:], labels[20:]), split=split, scenario="domain")
    assert "10 test rows have the same content" in check_stream(leaking)[0]


def test_keys_are_those_of_the_content() -> None:
    base = table(0, (0, 1), 20)
    index = torch.tensor([3, 3, 7])
    assert row_keys(View(base, index)).tolist() == row_keys(base)[[3, 3, 7]].tolist()
    assert len(set(row_keys(base).tolist())) == 20
    both: Table = Concat([base, View(base, index)])
    assert row_keys(both).tolist() == [*row_keys(base).tolist(), *row_keys(View(base, index)).tolist()]
    assert bool(finite_rows(both).all())
    tokens = TensorTable({"input_ids": Ragged.from_lists([[1, 2], [1], [1, 2], [12]], 0)})
    keys = row_keys(tokens).tolist()
    assert keys[0] == keys[2] and len(set(keys)) == 3
    pairs = TensorTable({"prompt": ["ab", "a"], "completion": ["c", "bc"]})
    assert len(set(row_keys(pairs).tolist())) == 2
