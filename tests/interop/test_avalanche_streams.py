"""Avalanche's benchmarks as streams, and streams as Avalanche's benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import avalanche.benchmarks.classic as classics
import numpy as np
import pytest
import torch
from avalanche.benchmarks import (
    CLScenario,
    benchmark_from_datasets,
    nc_benchmark,
    ni_benchmark,
    split_online_stream,
    task_incremental_benchmark,
)
from avalanche.benchmarks.utils import DataAttribute, make_avalanche_dataset
from avalanche.benchmarks.utils.transform_groups import TransformGroups
from avalanche_bench import Items, digits, items
from PIL import Image

from continual import Learner, Stream
from continual.errors import SpecError, StreamError
from continual.foreign import quiet
from continual.interop.avalanche import benchmark_from, stream_from
from continual.kinds import Scenario
from continual.randomness import Randomness
from continual.streams.check import check_stream
from continual.streams.folders import Place
from continual.streams.sources.avalanche import AvalancheSource
from continual.streams.sources.experiences import as_tensor, read_rows
from continual.streams.spec import read_stream_spec
from continual.table import Table, TensorTable

TRAIN, TEST = items(60), items(24, start=1)


def rows(table: Table | None) -> dict[str, torch.Tensor]:
    assert table is not None
    return table[torch.arange(len(table))]


def classes_split(**options: Any) -> Any:
    with quiet("avalanche"):
        return nc_benchmark(TRAIN, TEST, 3, **{"task_labels": False, "seed": 1, **options})


@pytest.mark.parametrize("scenario", ["class", "task", "domain"])
def test_there_and_back_again(scenario: Scenario) -> None:
    stream = digits(scenario)
    benchmark = benchmark_from(stream)
    again = stream_from(benchmark)
    assert (again.scenario, len(again), check_stream(again)) == (scenario, len(stream), [])
    for ours, theirs in zip(stream, again, strict=True):
        for part in ("train", "test"):
            mine, back = rows(getattr(ours, part)), rows(getattr(theirs, part))
            assert mine.keys() == back.keys()
            assert all(torch.equal(mine[name], back[name]) for name in mine)
        assert ours.classes == theirs.classes


def test_the_slow_reference_of_a_benchmark_made_of_a_stream() -> None:
    stream = digits("task")
    benchmark = benchmark_from(stream)
    assert len(benchmark.train_stream) == len(benchmark.test_stream) == 3
    assert benchmark.n_classes_per_exp == [2, 2, 2] and benchmark.classes_order == [0, 1, 2, 3, 4, 5]
    for ours, theirs in zip(stream, benchmark.train_stream, strict=True):
        table = rows(ours.train)
        for place in range(len(theirs.dataset)):
            inputs, label, task = theirs.dataset[place]
            assert torch.equal(inputs, table["inputs"][place])
            assert (label, task) == (int(table["labels"][place]), ours.index)
        assert theirs.classes_in_this_experience == list(ours.classes)
        assert theirs.task_labels == [ours.index] and theirs.current_experience == ours.index
        assert theirs.previous_classes == set(range(2 * ours.index))
        assert theirs.future_classes == set(range(2 * ours.index + 2, 6))
    assert benchmark_from(digits("class")).train_stream[2].task_labels == [0]


def test_what_cannot_be_a_benchmark_is_said() -> None:
    with pytest.raises(StreamError, match="takes rows of dense 'inputs', and these have text"):
        benchmark_from(Stream.load("docstrings")[:1])
    table = {"inputs": torch.randn(4, 2), "labels": torch.randn(4)}
    regression = Stream.from_tables(table, table, split={"by": "joint"}, scenario="domain", objective="regression")
    with pytest.raises(StreamError, match="the objective of this stream is regression"):
        benchmark_from(regression)
    part = Stream.from_experiences([digits()[0], digits()[1].__class__(**{**vars(digits()[1]), "test": None})])
    with pytest.raises(StreamError, match="1 of 2 experiences have no test rows"):
        benchmark_from(part)


def test_new_classes_are_a_class_stream_and_task_labels_a_task_stream() -> None:
    stream = stream_from(classes_split())
    assert stream.scenario == "class" and [len(e.train) for e in stream] == [20, 20, 20]
    assert [e.classes for e in stream] == [(0, 1), (2, 3), (4, 5)] and check_stream(stream) == []
    assert stream_from(classes_split(task_labels=True)).scenario == "task"
    assert stream_from(classes_split(), scenario="task").scenario == "task"
    assert stream_from(classes_split(class_ids_from_zero_in_each_exp=True)).scenario == "domain"
    order = stream_from(classes_split(), order=["experience 2", "experience 0"])
    assert [e.name for e in order] == ["experience 2", "experience 0"]
    drawn = {tuple(e.name for e in stream_from(classes_split(), order="random", seed=seed)) for seed in range(6)}
    assert len(drawn) > 1


def test_a_benchmark_of_data_sets_and_its_task_labels() -> None:
    def labelled(data: Items) -> Any:
        return make_avalanche_dataset(data, data_attributes=[DataAttribute(data.targets, "targets")])

    with quiet("avalanche"):
        benchmark = benchmark_from_datasets(
            train=[labelled(items(12, start=s)) for s in (2, 3)], test=[labelled(items(6, start=s)) for s in (4, 5)]
        )
        with_tasks = task_incremental_benchmark(benchmark)
    assert stream_from(benchmark).scenario == "domain" and stream_from(with_tasks).scenario == "task"


def test_online_experiences_are_joined_into_those_that_they_were_cut_from() -> None:
    whole = classes_split()
    with quiet("avalanche"):
        online = CLScenario([split_online_stream(whole.train_stream, 6, seed=1), whole.test_stream])
    stream = stream_from(online)
    assert [len(e.train) for e in stream] == [20, 20, 20] and check_stream(stream) == []
    assert "12 online experiences were joined into the 3" in stream.notes[0] and "batch_size: 6" in stream.notes[0]
    plain = stream_from(whole)
    for one, other in zip(stream, plain, strict=True):
        assert torch.equal(rows(one.test)["inputs"], rows(other.test)["inputs"])
        mine, theirs = rows(one.train)["inputs"], rows(other.train)["inputs"]
        assert not torch.equal(mine, theirs)
        assert {tuple(row.tolist()) for row in mine} == {tuple(row.tolist()) for row in theirs}


def test_one_test_set_for_all_experiences_is_read_by_their_classes() -> None:
    with quiet("avalanche"):
        instances = ni_benchmark(TRAIN, TEST, 3, seed=1)
    stream = stream_from(instances)
    assert stream.scenario == "domain" and [len(e.test) for e in stream] == [24, 24, 24]  # type: ignore[arg-type]
    assert "1 test experiences for 3 of training" in stream.notes[0] and check_stream(stream) == []
    split = classes_split()
    with quiet("avalanche"):
        pooled = ni_benchmark(TRAIN, TEST, 1, seed=1)
        mixed = CLScenario([split.train_stream, pooled.test_stream])
    for one, other in zip(stream_from(mixed), stream_from(split), strict=True):
        assert set(rows(one.test)["row"].tolist()) and sorted(rows(one.test)["labels"].tolist()) == sorted(
            rows(other.test)["labels"].tolist()
        )
    tasks = classes_split(task_labels=True)
    with pytest.raises(StreamError, match="3 experiences of training and 1 of test, and with task labels each needs"):
        stream_from(CLScenario([tasks.train_stream, pooled.test_stream]))


def test_a_test_row_among_the_training_rows_is_found_or_dropped() -> None:
    leaking = Items(torch.cat([TRAIN.inputs, TEST.inputs[:4]]), torch.tensor(TRAIN.targets + TEST.targets[:4]))
    with quiet("avalanche"):
        benchmark = nc_benchmark(leaking, TEST, 3, task_labels=False, seed=1)
    assert "4 test rows have the same content" in check_stream(stream_from(benchmark))[0]
    dropped = stream_from(benchmark, overlap="drop")
    assert check_stream(dropped) == [] and sum(len(e.train) for e in dropped) == 60
    assert "4 of 64 training rows dropped" in dropped.notes[0]


def test_row_ids_are_stable_and_the_users_generators_untouched() -> None:
    benchmark, again = classes_split(), classes_split()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, other = stream_from(benchmark), stream_from(again)
    assert torch.equal(before, torch.get_rng_state())
    assert one.fingerprint() == other.fingerprint()
    ids = torch.cat([rows(table)["row"] for e in one for table in (e.train, e.test)])
    assert len(torch.unique(ids)) == 84


def test_images_are_read_through_the_transform_for_evaluation() -> None:
    pixels = np.arange(4 * 6 * 6 * 3, dtype=np.uint8).reshape(4, 6, 6, 3)
    images = [Image.fromarray(array) for array in pixels]
    data = Items(images, torch.tensor([0, 1, 0, 1]))
    inputs, labels = read_rows(data, [2, 1])
    assert inputs.dtype == torch.uint8 and labels.tolist() == [0, 1]
    assert torch.equal(inputs, torch.from_numpy(pixels[[2, 1]].transpose(0, 3, 1, 2).copy()))
    groups = TransformGroups(
        {
            "train": (lambda image: as_tensor(image) + 1, None),
            "eval": (lambda image: as_tensor(image).float() / 255, None),
        }
    )
    both = make_avalanche_dataset(
        data, data_attributes=[DataAttribute(data.targets, "targets")], transform_groups=groups
    )
    assert torch.equal(read_rows(both, [2])[0], inputs[:1].float() / 255)
    assert as_tensor(Image.fromarray(pixels[0, :, :, 0])).shape == (1, 6, 6)
    assert as_tensor(np.zeros(3)).dtype == torch.float32
    with pytest.raises(StreamError, match="a row is str"):
        as_tensor("words")
    with pytest.raises(StreamError, match="different shapes"):
        read_rows(Items([torch.zeros(2), torch.zeros(3)], torch.tensor([0, 1])), [0, 1])


def test_a_long_data_set_is_read_in_blocks() -> None:
    data = items(2500)
    inputs, labels = read_rows(data, range(2500))
    assert torch.equal(inputs, data.inputs) and labels.tolist() == data.targets


def test_streams_of_other_names_and_no_benchmark() -> None:
    split = classes_split()
    with quiet("avalanche"):
        benchmark = CLScenario([split.train_stream, split.test_stream])
    benchmark._streams = {"learn": benchmark._streams["train"], "look": benchmark._streams["test"]}
    assert len(stream_from(benchmark, train="learn", test="look")) == 3
    with pytest.raises(StreamError, match="no stream 'train_online': it has 'learn', 'look'"):
        stream_from(benchmark)
    with pytest.raises(StreamError, match="list has no streams"):
        stream_from([1])


# In YAML


def Tiny(
    n_experiences: int, *, seed: int | None = None, fixed_class_order: Any = None, dataset_root: Any = None
) -> Any:
    """Stands for one of Avalanche's classic benchmarks."""
    if dataset_root is None or "missing" in str(dataset_root):
        raise RuntimeError("Dataset not found.")
    print("Downloading …")
    return nc_benchmark(TRAIN, TEST, n_experiences, task_labels=False, seed=seed, fixed_class_order=fixed_class_order)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classics, "Tiny", Tiny, raising=False)


def test_a_classic_benchmark_in_yaml(tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text("source: {kind: avalanche, benchmark: Tiny, n_experiences: 3}\nmodel: {kind: mlp, hidden: [8]}\n")
    stream = Stream.load(path, data=tmp_path)
    assert (stream.name, stream.scenario, len(stream)) == ("tiny", "class", 3)
    assert capsys.readouterr().out == ""
    assert stream.fingerprint() == Stream.load(path, data=tmp_path, seed=7).fingerprint()
    run = Learner({"kind": "mlp", "hidden": [8]}, "naive", device="cpu", progress=False).run(stream)
    assert len(run.result["matrix"]) == 3
    settings = {"kind": "avalanche", "benchmark": "Tiny", "n_experiences": 3}
    names = Stream.load({"source": settings}, data=tmp_path).class_names
    assert Stream.load({"source": {**settings, "seed": 5}}, data=tmp_path).class_names != names
    fixed = Stream.load({"source": {**settings, "fixed_class_order": [5, 4, 3, 2, 1, 0]}}, data=tmp_path)
    assert set(fixed.class_names[:2]) == {"4", "5"}
    joint = Stream.load({"source": settings, "split": {"by": "joint"}, "scenario": "class"}, data=tmp_path)
    assert len(joint) == 1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"benchmark": "Tinny"}, "unknown benchmark 'Tinny': .*Did you mean 'Tiny'"),
        ({"n_experiences": None}, None),
        ({"n_experience": 3}, "unknown argument 'n_experience': allowed are .*Did you mean 'n_experiences'"),
        ({"n_experiences": 4}, "Tiny refuses these arguments"),
        ({"dataset_root": "here"}, "'dataset_root' is the folder named with --data or CONTINUAL_DATA"),
        ({"overlap": "keep"}, "'overlap' is 'keep'"),
    ],
)
def test_mistakes_in_yaml_are_sentences(
    tiny: None, tmp_path: Path, changes: dict[str, Any], sentence: str | None
) -> None:
    source = {"kind": "avalanche", "benchmark": "Tiny", "n_experiences": 3, **changes}
    if sentence is None:
        del source["n_experiences"]
        sentence = "the argument 'n_experiences' is missing"
    with pytest.raises(SpecError, match=sentence):
        Stream.load({"source": source}, data=tmp_path)


def test_the_folder_of_the_data_is_never_in_the_file(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"source": {"kind": "avalanche", "benchmark": "Tiny", "n_experiences": 3}}
    with pytest.raises(StreamError, match=r"could not be read or fetched in '.*missing' \(Dataset not found.\)"):
        Stream.load(settings, data=tmp_path / "missing")
    monkeypatch.setenv("CONTINUAL_DATA", str(tmp_path / "missing"))
    with pytest.raises(StreamError, match="missing"):
        Stream.load(settings)
    monkeypatch.setenv("CONTINUAL_DATA", str(tmp_path))
    assert len(Stream.load(settings)) == 3


def test_other_sources_need_a_split_and_a_scenario() -> None:
    with pytest.raises(SpecError, match="the key 'scenario' is missing: add it"):
        read_stream_spec({"source": {"kind": "digits"}, "split": {"by": "joint"}})
    with pytest.raises(SpecError, match="the key 'split' is missing: add it"):
        read_stream_spec({"source": {"kind": "digits"}, "scenario": "class"})
    with pytest.raises(StreamError, match="needs a source that comes in experiences"):
        Stream.load({"source": {"kind": "digits"}, "split": {"by": "experience"}, "scenario": "class"})
    with pytest.raises(SpecError, match="a benchmark that is made already takes none"):
        read_stream_spec({"source": {"kind": "avalanche", "benchmark": object(), "n_experiences": 2}})
    with pytest.raises(SpecError, match="the objective is regression"):
        AvalancheSource(benchmark="SplitMNIST").load(Place(), "regression")


def test_split_mnist_is_mnist(data_folder: Path) -> None:
    if not (data_folder / "MNIST" / "raw").is_dir():
        pytest.skip("no MNIST here")
    source = AvalancheSource.model_validate({"benchmark": "SplitMNIST", "n_experiences": 5, "seed": 0})
    with Randomness(0).framework():
        benchmark = source._made(Place(data_folder))
    experience = benchmark.test_stream[1]
    inputs, labels = read_rows(experience.dataset, range(40))
    digits_ = Stream.load(
        {"source": {"kind": "mnist"}, "split": {"by": "joint"}, "scenario": "class"}, data=data_folder
    )
    base = digits_[0].test
    assert base is not None and isinstance(base, TensorTable)
    wanted = base.column("labels") == labels[0]
    pixels = base.column("inputs")[wanted][:40].reshape(-1, 1, 28, 28)
    torch.testing.assert_close(inputs, (pixels - 0.1307) / 0.3081)
    assert set(labels.tolist()) == {int(labels[0])} < set(experience.classes_in_this_experience)
