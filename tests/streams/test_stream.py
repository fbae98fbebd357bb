from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from continual.errors import StreamError
from continual.library import library_names
from continual.streams.check import check_stream
from continual.streams.experience import Experience
from continual.streams.stream import Stream
from continual.table import Mapped, TensorTable, View


def points(count: int = 60, classes: int = 6, seed: int = 0) -> tuple[torch.Tensor, np.ndarray[Any, Any]]:
    inputs = torch.rand(count, 4, generator=torch.Generator().manual_seed(1000 * seed + count))
    return inputs, np.array([f"c{n % classes}" for n in range(count)])


def stream(scenario: Any = "class", split: dict[str, Any] | None = None, **options: Any) -> Stream:
    split = split or {"by": "class", "size": 2, "order": ["c4", "c1", "c5", "c0", "c3", "c2"]}
    return Stream.from_tables(points(), points(30), points(12), split=split, scenario=scenario, **options)


def names_of(experience: Experience, found: Stream) -> set[str]:
    return {found.class_names[c] for c in torch.unique(experience.train.column("labels")).tolist()}


def test_class_ids_come_in_order_of_arrival() -> None:
    found = stream()
    assert [e.classes for e in found] == [(0, 1), (2, 3), (4, 5)]
    assert found.class_names == ("c4", "c1", "c5", "c0", "c3", "c2") and found.total_classes == 6
    assert found[1].class_names == ("c4", "c1", "c5", "c0") and found[1].total_classes == 6
    source = dict(zip(map(tuple, points()[0].tolist()), points()[1], strict=True))
    for experience in found:
        for inputs, label in zip(experience.train.column("inputs"), experience.train.column("labels"), strict=True):
            assert source[tuple(inputs.tolist())] == found.class_names[label]


def test_scenario_task_has_ids_of_its_own_in_each_experience() -> None:
    found = stream("task")
    assert [e.classes for e in found] == [(0, 1), (2, 3), (4, 5)] and found.class_names[0] == "c4"
    again = stream("task", {"by": "permutation", "count": 3})
    assert [e.classes for e in again] == [tuple(range(6 * n, 6 * n + 6)) for n in range(3)]
    assert again.total_classes == 18 and again.class_names[0] == "c0" and again.class_names[6] == "permutation 2/c0"
    labels = [e.train.column("labels") for e in again]
    assert torch.equal(labels[2], labels[0] + 12) and torch.equal(
        again[2].train[torch.tensor([7])]["labels"], labels[2][7:8]
    )
    domains = {"train": ["x", "y"] * 30, "test": ["x", "y"] * 15, "valid": ["x", "y"] * 6}
    split = stream("task", {"by": "domain"}, domain=domains)
    assert [e.classes for e in split] == [(0, 1, 2), (3, 4, 5)]
    assert check_stream(split) == []


def test_scenario_domain_has_fixed_ids() -> None:
    found = stream("domain")
    assert [e.classes for e in found] == [(0, 1)] * 3 and found.total_classes == 2
    first, second = (e.train.column("labels") for e in found[:2])
    assert torch.unique(first).tolist() == torch.unique(second).tolist() == [0, 1]
    inputs, labels = points()
    places = {tuple(row): label for row, label in zip(inputs.tolist(), labels, strict=True)}
    batch = found[0].train[torch.arange(len(found[0].train))]
    assert all(
        (places[tuple(row.tolist())] == "c1") == bool(y)
        for row, y in zip(batch["inputs"], batch["labels"], strict=True)
    )
    again = stream("domain", {"by": "permutation", "count": 3})
    assert [e.classes for e in again] == [tuple(range(6))] * 3 and again.class_names == tuple(f"c{n}" for n in range(6))
    with pytest.raises(StreamError, match="needs as many classes in each experience, and there are 2 to 4"):
        stream("domain", {"by": "class", "size": 4})
    with pytest.raises(StreamError, match="one class in each experience"):
        stream("domain", {"by": "class", "size": 1})


def test_classes_that_come_again_keep_their_ids() -> None:
    labels = np.array(["b", "a", "b", "a", "c", "a", "c", "a"])
    inputs = torch.rand(8, 4)
    time = {"train": np.arange(8), "test": np.array([0, 1, 6, 7])}
    test = (torch.rand(4, 4), np.array(["a", "c", "a", "b"]))
    split = {"by": "time", "periods": 2}
    found = Stream.from_tables((inputs, labels), test, split=split, scenario="class", time=time)
    assert found.class_names == ("b", "a", "c") and [e.classes for e in found] == [(0, 1, 2), (0, 1, 2)]
    assert found[1].train.column("labels").tolist() == [2, 1, 2, 1]
    alone = Stream.from_tables((inputs, labels), split=split, scenario="class", time=time)
    assert [e.classes for e in alone] == [(0, 1), (1, 2)] and alone[0].class_names == ("b", "a")


def test_experiences_are_views_of_shared_tables_and_built_when_asked_for() -> None:
    found = stream()
    assert isinstance(found[0].train, View) and isinstance(found[2].train, View)
    assert found[0].train.base is found[2].train.base and found[0] is found[0]
    turned = stream("domain", {"by": "permutation", "count": 3})
    assert isinstance(turned[1].train, Mapped) and isinstance(turned[2].train, Mapped)
    assert turned[1].train.base is turned[2].train.base
    built: list[int] = []

    def make() -> Experience:
        built.append(1)
        return found[0]

    lazy = Stream([make, make])
    assert len(lazy) == 2 and len(lazy[1:]) == 1 and not built
    assert lazy[0] is lazy[0] and built == [1]


def test_a_slice_is_a_stream_whose_experiences_keep_their_ids() -> None:
    found = stream()
    part = found[1:]
    assert isinstance(part, Stream) and len(part) == 2 and part[0] is found[1]
    assert part[0].index == 1 and part[0].classes == (2, 3) and part.class_names == found.class_names
    assert [e.name for e in found[::-1]] == ["c3, c2", "c5, c0", "c4, c1"] and found[-1].index == 2
    with pytest.raises(IndexError):
        found[3]


def test_joint_holds_every_row_once() -> None:
    found = stream()
    joint = found.joint()
    assert len(joint) == 1 and joint[0].classes == tuple(range(6)) and joint[0].class_names == found.class_names
    for part in ("train", "valid", "test"):
        rows = torch.cat([getattr(e, part).column("row") for e in found])
        assert torch.equal(getattr(joint[0], part).column("row"), rows)
    assert isinstance(joint[0].train, View) and joint.name == "arrays (joint)" and check_stream(joint) == []
    turned = stream("domain", {"by": "permutation", "count": 2}).joint()
    assert len(turned[0].train) == 120 and len(torch.unique(turned[0].train.column("row"))) == 120
    with pytest.raises(StreamError, match="has no experiences yet"):
        Stream.from_experiences([], open=True).joint()


def test_open_stream_grows_with_new_classes() -> None:
    found = Stream.from_experiences([], name="months", open=True)
    assert len(found) == 0 and found.total_classes is None and check_stream(found) == []
    first = found.append(points(12, 2), test=points(6, 2, seed=1), name="january")
    assert first.classes == (0, 1) and found.class_names == ("c0", "c1")
    inputs, labels = points(12, 2, seed=2)
    labels = np.array(["c1", "new"] * 6)
    second = found.append((inputs, labels), test=points(6, 1, seed=3), valid=points(6, 2, seed=4))
    assert second.name == "experience 2" and second.classes == (1, 2) and found.class_names == ("c0", "c1", "new")
    assert second.test is not None and torch.unique(second.test.column("labels")).tolist() == [0]
    assert second.train.column("labels").tolist() == [1, 2] * 6 and second.class_names == ("c0", "c1", "new")
    assert check_stream(found) == [] and [e.index for e in found] == [0, 1]
    with pytest.raises(StreamError, match="has an experience 'january' already"):
        found.append(points(12, 2, seed=5), name="january")
    with pytest.raises(StreamError, match="is closed"):
        stream().append(points())
    with pytest.raises(StreamError, match="is closed"):
        found[:1].append(points())


def test_open_stream_iterates_over_what_is_appended_meanwhile() -> None:
    found = Stream.from_experiences([], open=True)
    found.append(points(12, 2), name="a")
    seen = []
    for experience in found:
        seen.append(experience.name)
        if len(found) < 3:
            found.append(points(12, 2, seed=len(found)), name="abc"[len(found)])
    assert seen == ["a", "b", "c"]


def test_whole_experiences_are_appended_when_their_names_fit() -> None:
    given = stream()
    found = Stream.from_experiences([given[0]], open=True)
    found.append(given[1])
    assert found.class_names == given[1].class_names and found[1] is given[1]
    other = Experience(2, "other", given[0].train, classes=(0, 1), class_names=("x", "y"))
    with pytest.raises(StreamError, match="has other class names"):
        found.append(other)
    with pytest.raises(StreamError, match="is of scenario 'task'"):
        Stream.from_experiences(list(stream("task")))


def test_fingerprint_follows_content_and_settings_only() -> None:
    one = stream().fingerprint()
    assert one == stream(name="another name").fingerprint() and len(one) == 64
    assert one != stream("task").fingerprint()
    assert one != stream(split={"by": "class", "size": 2}).fingerprint()
    inputs, labels = points()
    changed = inputs.clone()
    changed[3, 2] += 1e-6
    same = {"split": {"by": "class", "size": 2}, "scenario": "class"}
    assert (
        Stream.from_tables((inputs, labels), **same).fingerprint()
        != Stream.from_tables((changed, labels), **same).fingerprint()
    )
    permuted = [stream("domain", {"by": "permutation", "count": 2}, seed=seed).fingerprint() for seed in (0, 0, 1)]
    assert permuted[0] == permuted[1] != permuted[2]
    found = Stream.from_experiences([], open=True)
    found.append(points(12, 2))
    before = found.fingerprint()
    found.append(points(12, 3))
    assert found.fingerprint() != before == found[:1].fingerprint()


def test_regression_and_language_model_streams() -> None:
    inputs = torch.rand(20, 3)
    found = Stream.from_tables(
        (inputs, inputs.sum(1)), split={"by": "time", "periods": 2}, scenario="domain", objective="regression",
        time={"train": np.arange(20)},
    )  # fmt: skip
    assert len(found) == 2 and found[0].classes == () and found[0].total_classes is None
    assert torch.equal(found[1].train.column("labels"), inputs.sum(1)[10:])
    chats = {"prompt": ["a", "b", "c"], "completion": ["x", "y", "z"]}
    found = Stream.from_tables(
        chats, split={"by": "domain"}, scenario="domain", objective="causal-lm", domain={"train": ["u", "v", "u"]}
    )
    assert list(found[0].train.strings("prompt")) == ["a", "c"]
    with pytest.raises(StreamError, match="a split by class needs classes"):
        Stream.from_tables(chats, split={"by": "class", "size": 1}, scenario="class", objective="causal-lm")


def test_library_streams_of_every_machine() -> None:
    assert {"split-digits", "docstrings", "clinc150", "split-mnist", "permuted-mnist", "rotated-mnist"} <= set(
        library_names("streams")
    )
    digits = Stream.load("split-digits", seed=3)
    assert len(digits) == 5 and digits.model == {"kind": "mlp", "hidden": [256, 256]} and check_stream(digits) == []
    assert digits.class_names != Stream.load("split-digits", seed=4).class_names
    assert [e.classes for e in Stream.load("split-digits", scenario="domain")] == [(0, 1)] * 5
    texts = Stream.load("docstrings")
    assert len(texts) == 4 and check_stream(texts) == [] and texts.model == "sentence-transformers/all-MiniLM-L6-v2"
    assert all(len(e.train) == 80 and e.test is not None and len(e.test) == 60 for e in texts)


@pytest.mark.parametrize("name", ["clinc150", "split-mnist", "permuted-mnist"])
def test_library_streams_of_real_data(data_folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = data_folder / "clinc150" if name == "clinc150" else data_folder
    found = Stream.load(name, data=folder)
    assert check_stream(found[:3]) == []
    sizes = {"clinc150": (15, 150), "split-mnist": (5, 10), "permuted-mnist": (20, 10)}
    assert (len(found), found.total_classes) == sizes[name]
    monkeypatch.setenv("CONTINUAL_DATA", str(data_folder))
    assert Stream.load(name)[:3].fingerprint() == found[:3].fingerprint()


def test_tables_of_ones_own_keep_their_row_ids() -> None:
    table = TensorTable(
        {"inputs": torch.rand(4, 2), "labels": torch.tensor([0, 1, 0, 1]), "row": torch.tensor([9, 8, 7, 6])}
    )
    found = Stream.from_tables(table, split={"by": "joint"}, scenario="class")
    assert found[0].train.column("row").tolist() == [9, 8, 7, 6]
