"""The rehearsal part: what it keeps, what it replays, how it weighs."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from continual.errors import CompositionError, SpecError, StateError, StreamError
from continual.models.output import Output
from continual.parts.context import TrainingContext
from continual.parts.part import Part
from continual.parts.registry import part_class
from continual.parts.replay.rehearsal import Rehearsal
from continual.parts.replay.select import row_keys
from continual.randomness import derive_seed
from continual.state import load_state, save_state
from continual.streams.experience import Experience
from continual.table import Batch, Ragged, TensorTable

WIDTH = 6


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 10)

    def forward(self, batch: Batch) -> Output:
        return Output(self.layer(batch["inputs"]))


def experience(index: int, rows: int = 60, classes: tuple[int, ...] | None = None, **columns: Any) -> Experience:
    ids = torch.arange(1000 * index, 1000 * index + rows)
    classes = classes or (2 * index, 2 * index + 1)
    labels = torch.tensor(classes)[torch.arange(rows) % len(classes)]
    inputs = ids[:, None].float() / 1000 + torch.arange(WIDTH) / 8
    table = TensorTable({"inputs": inputs, "labels": labels, "row": ids, **columns})
    test = TensorTable({"inputs": inputs, "labels": labels, "row": ids + 500})
    return Experience(index, f"e{index}", table, test=test, classes=classes)


def words(index: int, longest: int) -> Experience:
    rows = [[1 + (place + n) % 99 for place in range(1 + n % longest)] for n in range(40)]
    ids = torch.arange(1000 * index, 1000 * index + 40)
    table = TensorTable({"input_ids": Ragged.from_lists(rows, 0), "labels": torch.arange(40) % 4, "row": ids})
    return Experience(index, f"w{index}", table, classes=(0, 1, 2, 3))


def looped(seed: int = 0, **settings: Any) -> tuple[TrainingContext, Rehearsal]:
    part = Rehearsal(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Linear()
    return TrainingContext(model, [part], torch.optim.SGD(model.parameters(), lr=0.1), seed=seed, batch_size=16), part


def train(loop: TrainingContext, given: Experience, epochs: int = 1, batch_size: int = 16) -> list[Batch]:
    seen: list[Batch] = []
    loop.begin(given)
    for _ in range(epochs):
        for batch in loop.shuffled(given.train, batch_size):
            assert loop.optimizer is not None
            loop.optimizer.zero_grad()
            loop.backward(batch)
            loop.optimizer.step()
            seen.extend(whole for whole, _, _ in loop._last)
            loop.after_step()
    loop.end()
    return seen


def begun(loop: TrainingContext, *experiences: Experience) -> None:
    """Begin and end all experiences but the last, which is begun."""
    for given in experiences[:-1]:
        loop.begin(given)
        loop.end()
    loop.begin(experiences[-1])


def smallest(rows: Tensor, seed: int, count: int) -> set[int]:
    keys = row_keys(rows, derive_seed(seed, "replay keys"))
    return set(rows[keys.argsort()[:count]].tolist())


# What is kept


@pytest.mark.parametrize("insert", ["end", "step"])
def test_keeps_a_uniform_sample_of_the_training_rows(insert: str) -> None:
    loop, part = looped(capacity=25, insert=insert)
    for index in range(3):
        train(loop, experience(index), epochs=2)
    offered = torch.cat([experience(index).train.column("row") for index in range(3)])
    assert set(part.rows().tolist()) == smallest(offered, 0, 25)
    places = part.memory.batch(torch.arange(25))
    assert torch.allclose(places["inputs"][:, 0], places["row"] / 1000)
    assert torch.equal(places["labels"], 2 * (places["row"] // 1000) + places["row"] % 2)


def test_insertion_by_step_takes_each_row_of_the_first_epoch_and_no_replayed_one() -> None:
    loop, part = looped(capacity=1000, insert="step")
    train(loop, experience(0), epochs=2)
    assert sorted(part.rows().tolist()) == list(range(60))
    loop.begin(experience(1))
    batch = loop.extend(experience(1).train[torch.arange(16)])
    assert len(batch["row"]) == 32
    loop.epoch = 1
    part.after_step(batch, Output(torch.zeros(0)))
    assert len(part.memory) == 60
    loop.epoch = 0
    part.after_step(batch, Output(torch.zeros(0)))
    assert len(part.memory) == 76 and len(set(part.rows().tolist())) == 76


def test_classes_share_the_capacity_equally() -> None:
    loop, part = looped(capacity=20, select="class-balanced")
    begun(loop, experience(0), experience(1, rows=7, classes=(2,)), experience(2))
    held = Counter(part.memory.batch(torch.arange(20))["labels"].tolist())
    assert held[2] in (6, 7) and sum(held.values()) == 20 and set(held) == {0, 1, 2}
    loop.end()
    held = Counter(part.memory.batch(torch.arange(20))["labels"].tolist())
    assert held == dict.fromkeys((0, 1, 2, 4, 5), 4)


def test_experiences_share_the_capacity_equally() -> None:
    loop, part = looped(capacity=21, select="experience-balanced")
    for index, rows in enumerate((60, 30, 45)):
        begun(loop, experience(index, rows=rows))
        loop.end()
    assert Counter((part.rows() // 1000).tolist()) == {0: 7, 1: 7, 2: 7}


def test_rows_per_class_grow_with_the_classes() -> None:
    loop, part = looped(per_class=5)
    assert part.settings.select == "class-balanced"
    for index in range(3):
        begun(loop, experience(index))
        loop.end()
        assert part.memory.capacity == len(part.memory) == 10 * (index + 1)
    assert set(Counter(part.memory.batch(torch.arange(30))["labels"].tolist()).values()) == {5}
    begun(loop, experience(3, rows=60, classes=(0, 6)))
    loop.end()
    assert part.memory.capacity == 35
    other = Rehearsal(per_class=5)
    other.load_state_dict(part.state_dict())
    assert other.memory.capacity == 35 and torch.equal(other.rows(), part.rows())


def test_no_test_row_is_kept_and_no_table_stays_alive() -> None:
    loop, part = looped(capacity=30)
    given = experience(0)
    alive = [weakref.ref(table) for table in (given.train, given.test)]
    tests = set(given.test.column("row").tolist()) if given.test else set()
    columns = weakref.ref(given.train.column("inputs"))
    train(loop, given)
    loop.experience = None
    del given
    gc.collect()
    assert [ref() for ref in alive] == [None, None] and columns() is None
    assert tests.isdisjoint(part.rows().tolist()) and len(part.rows()) == 30


@pytest.mark.parametrize("select", ["reservoir", "class-balanced"])
@pytest.mark.parametrize("capacity", [30, "4kB"])
def test_bytes_reported_are_bytes_held(select: str, capacity: int | str) -> None:
    loop, part = looped(capacity=capacity, select=select, weighting="experiences")
    for index in range(2):
        train(loop, experience(index))
    found: dict[int, int] = {}

    def walk(value: object) -> None:
        if isinstance(value, Tensor):
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict | list | tuple):
            for item in value.values() if isinstance(value, dict) else value:
                walk(item)
        elif type(value).__module__.startswith("continual.parts.replay"):
            walk(vars(value))

    walk({name: value for name, value in vars(part).items() if name != "context"})
    assert part.nbytes() == sum(found.values()) > 0
    if capacity == "4kB":
        assert part.memory.nbytes() + part.selection.nbytes() + part.cycle.nbytes() <= 4000 + 8 * 4
        assert part.memory.capacity == len(part.memory) == 4000 // (WIDTH * 4 + 8 + 8 + 24)


def test_text_in_a_capacity_in_bytes_keeps_the_smallest_keys_when_rows_get_longer() -> None:
    loop, part = looped(capacity="900B")
    part.begin(loop, words(0, 3))
    part.end(loop, words(0, 3))
    short = len(part.memory)
    part.end(loop, words(1, 30))
    assert len(part.memory) == part.memory.capacity < short
    assert part.memory.nbytes() + 24 * len(part.memory) <= 900
    offered = torch.cat([torch.arange(40), torch.arange(1000, 1040)])
    assert set(part.rows().tolist()) == smallest(offered, 0, part.memory.capacity)
    batch = part.memory.batch(torch.arange(len(part.memory)))
    for tokens, mask, row in zip(batch["input_ids"], batch["attention_mask"], batch["row"].tolist(), strict=True):
        n, longest = row % 1000, 30 if row >= 1000 else 3
        assert tokens[mask.bool()].tolist() == [1 + (place + n) % 99 for place in range(1 + n % longest)]


# What is replayed


@pytest.mark.parametrize(("share", "replayed"), [(0.5, 16), (0.25, 5), (0.75, 48), (0.6, 24), (0.01, 0)])
def test_share_of_the_forward_batch(share: float, replayed: int) -> None:
    loop, _ = looped(capacity=50, share=share)
    first, second = experience(0), experience(1)
    begun(loop, first, second)
    current = second.train[torch.arange(16)]
    batch = loop.extend(current)
    assert len(batch["row"]) == 16 + replayed and "weight" not in batch
    for name, column in current.items():
        assert torch.equal(batch[name][:16], column)
    assert bool((batch["row"][16:] < 1000).all()) and len(set(batch["row"].tolist())) == 16 + replayed
    expected = first.train[batch["row"][16:]]
    assert all(torch.equal(batch[name][16:], column) for name, column in expected.items())


def test_the_last_batch_of_an_epoch_gets_as_many_rows_as_a_full_one() -> None:
    loop, part = looped(capacity=50, share=0.25)
    train(loop, experience(0))
    rows = [len(batch["row"]) for batch in train(loop, experience(1, rows=37))]
    assert rows == [21, 21, 10] and part.shortfall == 0
    few = [len(batch["row"]) for batch in train(loop, experience(2, rows=6), epochs=2)]
    assert few == [8, 8], "an experience smaller than a batch is a full one"


def test_a_loop_that_says_no_batch_size_replays_beside_its_largest_batch() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Linear()
    loop = TrainingContext(model, [Rehearsal(capacity=50)], torch.optim.SGD(model.parameters(), lr=0.1))
    begun(loop, experience(0), experience(1))
    assert [len(loop.extend(experience(1).train[torch.arange(n)])["row"]) for n in (4, 12, 3)] == [8, 24, 15]


def test_first_experience_replays_nothing_and_misses_nothing() -> None:
    loop, part = looped()
    loop.begin(experience(0))
    batch = experience(0).train[torch.arange(8)]
    assert loop.extend(batch) is batch
    assert part.shortfall == 0 and part.report() is None


def test_shortfall_is_counted_and_said() -> None:
    loop, part = looped(capacity=10)
    begun(loop, experience(0), experience(1))
    for _ in range(3):
        batch = loop.extend(experience(1).train[torch.arange(16)])
        assert sorted(batch["row"][16:].tolist()) == sorted(part.rows().tolist())
    assert part.shortfall == 18
    assert "18 of the 48 rows" in str(part.report())
    loop.end()
    loop.begin(experience(2))
    assert part.shortfall == 0 and part.report() is None


def test_every_row_is_replayed_equally_often() -> None:
    loop, _ = looped(capacity=24)
    begun(loop, experience(0), experience(1))
    counts: Counter[int] = Counter()
    for _ in range(30):
        counts.update(loop.extend(experience(1).train[torch.arange(16)])["row"][16:].tolist())
    assert set(counts.values()) == {20} and len(counts) == 24


def test_text_rows_of_other_widths_are_joined() -> None:
    loop, part = looped(capacity=40)
    part.end(loop, words(0, 9))
    loop.experience_index = 1
    loop.batch_size = 4
    current = words(1, 3).train[torch.arange(4)]
    batch = part.extend(current)
    assert batch["input_ids"].shape == batch["attention_mask"].shape and batch["input_ids"].shape[0] == 8
    assert torch.equal(batch["input_ids"][:4, :3], current["input_ids"])
    assert batch["attention_mask"][:4].sum(1).tolist() == current["attention_mask"].sum(1).tolist()
    assert batch["attention_mask"][4:].sum(1).tolist() == [1 + row % 9 for row in batch["row"][4:].tolist()]


@pytest.mark.parametrize("share", [0.5, 0.25])
def test_weighting_by_experiences_is_the_formula(share: float) -> None:
    loop, _ = looped(capacity=40, share=share, weighting="experiences")
    first = experience(0).train[torch.arange(16)]
    begun(loop, experience(0))
    assert loop.extend(first) is first
    loop.end()
    for index in (1, 2):
        loop.begin(experience(index))
        batch = loop.extend(experience(index).train[torch.arange(16)])
        output = loop.forward(batch)
        loss_B = loop.loss_rows(output, batch)
        expected = loss_B[:16].mean() / (index + 1) + (1 - 1 / (index + 1)) * loss_B[16:].mean()
        torch.testing.assert_close(loop.terms(batch, output)[0][1], expected)
        loop.end()


def test_weights_that_rows_bring_are_kept() -> None:
    weight = 1 + torch.arange(60) / 10
    for weighting in ("rows", "experiences"):
        loop, _ = looped(capacity=40, weighting=weighting)
        begun(loop, experience(0, weight=weight), experience(1, weight=weight))
        batch = loop.extend(experience(1, weight=weight).train[torch.arange(16)])
        own = 1 + (batch["row"] % 1000) / 10
        if weighting == "rows":
            assert torch.equal(batch["weight"], own)
        else:
            expected = torch.cat([own[:16] / own[:16].sum(), own[16:] / own[16:].sum()]) / 2
            torch.testing.assert_close(batch["weight"], expected)
    loop, _ = looped(capacity=40)
    begun(loop, experience(0), experience(1))
    batch = loop.extend({**experience(1).train[torch.arange(16)], "weight": torch.full((16,), 2.0)})
    assert batch["weight"].tolist() == [2.0] * 16 + [1.0] * 16


def test_inserted_rows_bring_no_weight_of_ours() -> None:
    loop, part = looped(capacity=40, weighting="experiences", insert="step")
    for index in range(2):
        train(loop, experience(index))
    assert "weight" not in part.memory.names


# Same, again and after a break


@pytest.mark.parametrize("insert", ["end", "step"])
@pytest.mark.parametrize("select", ["reservoir", "class-balanced"])
def test_same_seed_same_batches_and_cut_and_resumed_the_same(insert: str, select: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"capacity": 21, "insert": insert, "select": select, "share": 0.3}
    runs = []
    for cut in (False, False, True):
        loop, part = looped(seed=3, **settings)
        train(loop, experience(0))
        given = experience(1)
        seen: list[Tensor] = []
        loop.begin(given)
        for start in range(0, 48, 8):
            if cut and start == 24:
                save_state(tmp_path / "s", {"part": part.state_dict(), "random": loop.randomness.state_dict()})
                saved = load_state(tmp_path / "s")
                loop, part = looped(seed=77, **settings)
                part.load_state_dict(saved["part"])
                loop.randomness.load_state_dict(saved["random"])
                part.attach(loop)
                loop.experience, loop.experience_index = given, 1
                loop.set_owner([0, 0, 1, 1])
            batch = loop.extend(given.train[torch.arange(start, start + 8)])
            seen.append(batch["row"])
            part.after_step(batch, Output(torch.zeros(0)))
        wanted = (part._wanted, part.shortfall)
        loop.end()
        train(loop, experience(2))
        runs.append((torch.cat(seen).tolist(), part.rows().tolist(), wanted, part.nbytes()))
    assert runs[0] == runs[1] == runs[2]


def test_another_seed_keeps_other_rows() -> None:
    held = []
    for seed in (0, 1):
        loop, part = looped(seed=seed, capacity=10)
        train(loop, experience(0))
        held.append(part.rows().tolist())
    assert held[0] != held[1]


def test_state_with_more_rows_than_fit() -> None:
    loop, part = looped(capacity=20)
    train(loop, experience(0))
    with pytest.raises(StateError, match="room for 10"):
        Rehearsal(capacity=10).load_state_dict(part.state_dict())


@pytest.mark.parametrize("storage", ["device", "cpu", "memmap"])
def test_storage_changes_no_batch(storage: str, tmp_path: Path) -> None:
    folder: dict[str, Any] = {"folder": str(tmp_path / "maps")} if storage == "memmap" else {}
    loop, part = looped(capacity=20, storage=storage, **folder)
    plain, reference = looped(capacity=20)
    for index in range(3):
        expected, found = train(plain, experience(index)), train(loop, experience(index))
        assert [b["row"].tolist() for b in expected] == [b["row"].tolist() for b in found]
    assert torch.equal(part.rows(), reference.rows())
    assert (tmp_path / "maps").is_dir() == (storage == "memmap")


def test_erased_rows_are_gone_from_memory_state_and_replay(tmp_path: Path) -> None:
    loop, part = looped(capacity=20)
    train(loop, experience(0))
    gone, rest = part.rows()[:6], set(part.rows()[6:].tolist())
    loop.begin(experience(1))
    loop.extend(experience(1).train[torch.arange(8)])
    assert part.erase(torch.cat([gone, torch.tensor([999_999])])) == 6
    assert set(part.rows().tolist()) == rest
    for _ in range(4):
        assert set(loop.extend(experience(1).train[torch.arange(8)])["row"][8:].tolist()) <= rest
    save_state(tmp_path / "s", part.state_dict())
    raw = (tmp_path / "s" / "tensors.safetensors").read_bytes()
    table = experience(0).train
    for row in gone.tolist():
        assert table.column("inputs")[row].numpy().tobytes() not in raw
        assert row_keys(torch.tensor([row]), part.selection.seed).numpy().tobytes() not in raw
    other = Rehearsal(capacity=20)
    other.load_state_dict(load_state(tmp_path / "s"))
    assert set(other.rows().tolist()) == rest
    assert other.erase(other.rows()) == 14 and len(other.rows()) == 0


# What is refused


def test_class_balanced_needs_classes() -> None:
    loop, part = looped(select="class-balanced")
    given = experience(0)
    tokens = Experience(0, "lm", given.train, objective="causal-lm")
    with pytest.raises(CompositionError, match=r"causal-lm: take select: reservoir"):
        part.begin(loop, tokens)
    labels = given.train.column("labels").clone()
    labels[3] = -100
    columns: dict[str, Any] = {
        "inputs": given.train.column("inputs"),
        "labels": labels,
        "row": given.train.column("row"),
    }
    with pytest.raises(CompositionError, match=r"-100.*take select: reservoir"):
        part.begin(loop, Experience(0, "e", TensorTable(columns)))
    with pytest.raises(CompositionError, match="labels of another form"):
        part.begin(loop, Experience(0, "e", TensorTable({**columns, "labels": torch.rand(60)})))
    looped(select="reservoir")[1].begin(loop, tokens)


def test_a_capacity_that_holds_no_row_is_said_before_training() -> None:
    loop, part = looped(capacity="50B")
    with pytest.raises(SpecError, match="64 bytes"):
        part.begin(loop, experience(0))


def test_a_batch_with_other_columns_is_refused() -> None:
    loop, _ = looped(capacity=20)
    begun(loop, experience(0), experience(1))
    batch = {**experience(1).train[torch.arange(4)], "extra": torch.zeros(4)}
    with pytest.raises(StreamError, match="'extra'"):
        loop.extend(batch)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"capacity": 0}, "greater than 0"),
        ({"capacity": "many"}, "no size"),
        ({"capacity": 10, "per_class": 2}, "not both"),
        ({"per_class": 2, "select": "reservoir"}, "leave select out"),
        ({"share": 0.0}, "greater than 0"),
        ({"share": 1.0}, "less than 1"),
        ({"storage": "memmap"}, "folder"),
        ({"folder": "x"}, "folder"),
        ({"capacty": 3}, "unknown key"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        Rehearsal(**settings)


def test_settings_survive_being_written_out() -> None:
    for settings in ({}, {"per_class": 3}, {"capacity": "20MB"}, {"capacity": 5, "select": "experience-balanced"}):
        part = Rehearsal(**settings)
        assert Rehearsal(**part.settings.model_dump()).settings == part.settings
    assert Rehearsal().settings.capacity == 200
    assert part_class("replay", "rehearsal", "here") is Rehearsal and issubclass(Rehearsal, Part)
