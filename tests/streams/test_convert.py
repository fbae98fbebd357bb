from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SubsetRandomSampler, TensorDataset

from continual.errors import StreamError
from continual.streams.convert import as_experience, as_table
from continual.table import ArrowTable, Mapped, Ragged, TensorTable, View

INPUTS = torch.arange(12, dtype=torch.float32).view(6, 2)
LABELS = torch.tensor([3, 1, 3, 1, 3, 1])


class Pairs(Dataset[Any]):
    def __init__(self, rows: list[Any]) -> None:
        self.rows, self.asked = rows, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        self.asked += 1
        return self.rows[index]


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield INPUTS[0], 1


FORMS: dict[str, Any] = {
    "pair of tensors": (INPUTS, LABELS),
    "pair of arrays": (INPUTS.double().numpy(), LABELS.numpy()),
    "pair of lists": [INPUTS.tolist(), LABELS.tolist()],
    "mapping": {"features": INPUTS.numpy(), "target": LABELS.tolist()},
    "table": TensorTable({"inputs": INPUTS, "labels": LABELS}),
    "tensor data set": TensorDataset(INPUTS, LABELS),
    "data set of pairs": Pairs([(row, int(label)) for row, label in zip(INPUTS, LABELS, strict=True)]),
    "data set of mappings": Pairs([{"x": row.numpy(), "y": label} for row, label in zip(INPUTS, LABELS, strict=True)]),
    "loader": DataLoader(TensorDataset(INPUTS, LABELS), batch_size=4),
    "datasets": datasets.Dataset.from_dict({"inputs": INPUTS.tolist(), "label": LABELS.tolist()}),
    "data frame": pd.DataFrame({"inputs": list(INPUTS.numpy()), "label": LABELS.numpy()}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_table(form: str) -> None:
    batch = as_table(FORMS[form])[torch.arange(6)]
    assert torch.equal(batch["inputs"], INPUTS) and batch["inputs"].dtype == torch.float32
    assert torch.equal(batch["labels"], LABELS) and batch["labels"].dtype == torch.int64


def test_texts_and_named_labels() -> None:
    texts, names = ["one", "two"], ["b", "a"]
    frame = pd.DataFrame({"text": texts, "label": names})
    rows = datasets.Dataset.from_dict({"text": texts, "label": names})
    for given in (
        (texts, names),
        {"text": texts, "labels": names},
        frame,
        rows,
        Pairs(list(zip(texts, names, strict=True))),
    ):
        table = as_table(given)
        assert list(table.strings("text")) == texts and list(table.strings("labels")) == names
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    named = as_table(datasets.Dataset.from_dict({"text": texts, "label": [1, 0]}, features))
    assert named.strings("labels") == ["yes", "no"]
    with pytest.raises(StreamError, match=r"row 1 has no label \(-1\)"):
        as_table(datasets.Dataset.from_dict({"text": texts, "label": [1, -1]}, features))


def test_tokens_of_different_lengths_are_ragged() -> None:
    rows = datasets.Dataset.from_dict(
        {"input_ids": [[1, 2, 3], [4]], "attention_mask": [[1, 1, 1], [1]], "label": [0, 1]}
    )
    table = as_table(rows)
    assert isinstance(table, TensorTable) and isinstance(table.columns["input_ids"], Ragged)
    batch = table[torch.tensor([0, 1])]
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 0, 0]] and batch["attention_mask"].tolist() == [
        [1, 1, 1],
        [1, 0, 0],
    ]


def test_big_data_stay_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("continual.streams.convert._IN_MEMORY", 10)
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": ["x", "y"]})
    assert isinstance(as_table(rows), ArrowTable)
    found = as_experience(rows, index=0, name="e")
    assert found.train.column("labels").tolist() == [0, 1] and found.class_names == ("x", "y")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    named = as_experience(
        datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features), index=0, name="e"
    )
    assert named.class_names == ("yes", "no")


def test_loaders_that_see_other_rows_than_their_data_set_are_iterated() -> None:
    data = TensorDataset(INPUTS, LABELS)
    subset = DataLoader(data, batch_size=2, sampler=SubsetRandomSampler([4, 5, 1]))
    assert sorted(as_table(subset).column("inputs")[:, 0].tolist()) == [2.0, 8.0, 10.0]
    assert len(as_table(DataLoader(data, batch_size=4, drop_last=True))) == 4
    more = DataLoader(data, batch_size=4, sampler=RandomSampler(data, replacement=True, num_samples=9))
    assert len(as_table(more)) == 9
    doubled = DataLoader(
        data, batch_size=2, collate_fn=lambda rows: (torch.stack([row[0] for row in rows]) * 2, torch.zeros(2))
    )
    assert torch.equal(as_table(doubled).column("inputs"), INPUTS * 2)
    shuffled = DataLoader(data, batch_size=2, shuffle=True)
    assert torch.equal(as_table(shuffled).column("inputs"), INPUTS)
    mappings = DataLoader(Pairs([{"x": row, "y": 1} for row in INPUTS]), batch_size=4, drop_last=True)
    assert as_table(mappings).column("inputs").shape == (4, 2)


def test_global_generators_are_left_alone() -> None:
    before = torch.get_rng_state()
    as_table(DataLoader(TensorDataset(INPUTS, LABELS), batch_size=2, shuffle=True, drop_last=True))

    class Noisy(Pairs):
        def __getitem__(self, index: int) -> Any:
            return torch.rand(2), 1

    as_table(Noisy([0, 1, 2]))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (3, "train is int: give a table"),
        (Endless(), "has no length"),
        (Pairs([]), "there are no rows"),
        (DataLoader(TensorDataset(INPUTS[:2], LABELS[:2]), batch_size=4, drop_last=True), "gives no batch"),
        (Pairs([(1, 2, 3)]), "a row has 3 parts"),
        (Pairs([(torch.zeros(2), 0), (torch.zeros(3), 1)]), "the rows of 'inputs' cannot be stacked"),
        ({"x": INPUTS, "inputs": INPUTS}, "'inputs' and another column are both 'inputs'"),
        ((INPUTS, LABELS[:3]), "different numbers of rows"),
    ],
)
def test_forms_that_cannot_be_used(given: Any, sentence: str) -> None:
    with pytest.raises(StreamError, match=sentence):
        as_table(given)


def test_experience_names_whole_numbers_by_their_digits() -> None:
    found = as_experience((INPUTS, LABELS), index=2, name="march", test=(INPUTS + 50, LABELS), known_names=("7", "3"))
    assert found.class_names == ("7", "3", "1") and found.classes == (1, 2)
    assert found.train.column("labels").tolist() == [1, 2, 1, 2, 1, 2]
    assert found.test is not None and found.test.column("labels").tolist() == [1, 2, 1, 2, 1, 2]
    assert (found.index, found.name, found.scenario, found.objective, found.valid) == (
        2,
        "march",
        "class",
        "classification",
        None,
    )


def test_row_ids_follow_from_index_part_and_place() -> None:
    made = [
        as_experience((INPUTS, LABELS), index=n, name="e", test=(INPUTS, LABELS), valid=(INPUTS, LABELS))
        for n in (0, 1, 0)
    ]
    rows = [t.column("row") for e in made[:2] for t in (e.train, e.valid, e.test) if t is not None]
    assert len(torch.unique(torch.cat(rows))) == 36
    assert torch.equal(made[0].train.column("row"), made[2].train.column("row"))
    given = {"inputs": INPUTS, "labels": LABELS, "row": torch.arange(6) + 40}
    assert as_experience(given, index=0, name="e").train.column("row").tolist() == [40, 41, 42, 43, 44, 45]
    with pytest.raises(StreamError, match="e: 6 row ids repeat"):
        as_experience(given, index=0, name="e", test=given)


def test_scenarios() -> None:
    task = as_experience((INPUTS, LABELS), index=1, name="b", known_names=("1", "3"), scenario="task")
    assert task.classes == (2, 3) and task.class_names == ("1", "3", "b/1", "b/3")
    domain = as_experience((INPUTS, LABELS), index=1, name="b", known_names=("3", "1"), scenario="domain")
    assert domain.classes == (0, 1) and domain.train.column("labels").tolist() == [0, 1] * 3
    with pytest.raises(StreamError, match="class '1' is new, and in the scenario 'domain'"):
        as_experience((INPUTS, LABELS), index=1, name="b", known_names=("3", "4"), scenario="domain")


def test_other_objectives() -> None:
    found = as_experience((INPUTS, LABELS.double() / 2), index=0, name="e", objective="regression")
    assert found.train.column("labels").dtype == torch.float32 and found.classes == () and found.class_names == ()
    chats = as_experience({"prompt": ["a"], "completion": ["b"]}, index=0, name="e", objective="causal-lm")
    assert chats.train.strings("prompt") == ["a"] and chats.train.column("row").tolist() == [0]


def test_experience_errors() -> None:
    with pytest.raises(StreamError, match="no training rows"):
        as_experience((INPUTS[:0], LABELS[:0]), index=0, name="e")
    with pytest.raises(StreamError, match="there are no labels"):
        as_experience({"inputs": INPUTS}, index=0, name="e")
    with pytest.raises(StreamError, match=r"label of row 0 is 0\.5"):
        as_experience((INPUTS, LABELS / 2 - 1), index=0, name="e")
    with pytest.raises(StreamError, match="class '5' is in test but has no training rows"):
        as_experience((INPUTS, LABELS), index=0, name="e", test=(INPUTS, LABELS + 2))
    with pytest.raises(StreamError, match="labels are not numbers"):
        as_experience((INPUTS, ["a"] * 6), index=0, name="e", objective="regression")


def test_known_class_may_be_in_the_test_only_and_one_class_is_enough() -> None:
    found = as_experience((INPUTS, [7] * 6), index=1, name="e", test=(INPUTS, LABELS), known_names=("3", "1", "x"))
    assert found.classes == (3,) and found.class_names == ("3", "1", "x", "7")
    assert found.test is not None and found.test.column("labels").tolist() == [0, 1] * 3


def test_views_and_maps_keep_their_base() -> None:
    base = TensorTable({"inputs": INPUTS, "labels": LABELS})
    view = as_experience(View(base, torch.tensor([5, 0])), index=0, name="e").train
    assert isinstance(view, View) and view.column("labels").tolist() == [0, 1] and view.column("row").tolist() == [0, 1]
    assert torch.equal(view.column("inputs"), INPUTS[[5, 0]])
    mapped = as_experience(Mapped(base, {"inputs": lambda x: x * 2}), index=0, name="e").train
    assert isinstance(mapped, Mapped) and torch.equal(mapped.column("inputs"), INPUTS * 2)
    assert mapped.column("labels").tolist() == [1, 0] * 3 and "row" in mapped.names


def test_words_in_numpy_arrays_and_numpy_words() -> None:
    found = as_experience((INPUTS, np.array(["x", "y"] * 3)), index=0, name="e")
    assert found.class_names == ("x", "y") and all(type(name) is str for name in found.class_names)
