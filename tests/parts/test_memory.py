"""The memory's storage and the selection of what it keeps."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from scipy import stats
from torch import Tensor

from continual.errors import SpecError, StateError, StreamError
from continual.parts.replay.columns import parse_bytes
from continual.parts.replay.cycle import Cycle
from continual.parts.replay.memory import Memory
from continual.parts.replay.select import Selection, equal_quotas, row_keys
from continual.state import load_state, save_state
from continual.table import Batch, Ragged, TensorTable, concat_batches


def dense(*rows: int, width: int = 5) -> Batch:
    ids = torch.tensor(rows)
    return {"inputs": ids[:, None] * torch.ones(width), "labels": ids % 4, "row": ids}


def text(rows: list[list[int]], first: int = 0) -> Batch:
    table = TensorTable(
        {
            "input_ids": Ragged.from_lists(rows, pad=7),
            "labels": torch.arange(len(rows)),
            "row": torch.arange(first, first + len(rows)),
        }
    )
    return table[torch.arange(len(rows))]


def held_bytes(memory: Memory) -> int:
    tensors = [*memory._values.values(), *memory._lengths.values()]
    return sum(t.untyped_storage().nbytes() for t in tensors)


# Storage


def test_rows_come_back_as_they_went_in() -> None:
    memory = Memory(8)
    memory.put(torch.arange(3), dense(10, 11, 12))
    memory.put(torch.tensor([1, 3]), dense(20, 21))
    batch = memory.batch(torch.tensor([3, 0, 1]))
    expected = dense(21, 10, 20)
    assert list(batch) == list(expected)
    for name, column in expected.items():
        assert torch.equal(batch[name], column) and batch[name].dtype == column.dtype
    assert memory.rows().tolist() == [10, 20, 12, 21]


def test_memory_copies_and_allocates_once() -> None:
    memory, batch = Memory(4), dense(1, 2)
    memory.put(torch.arange(2), batch)
    address = memory._values["inputs"].data_ptr()
    batch["inputs"].fill_(-1)
    memory.put(torch.tensor([2, 0]), dense(3, 4))
    assert memory._values["inputs"].data_ptr() == address
    assert memory.batch(torch.arange(3))["inputs"][:, 0].tolist() == [4, 2, 3]


@pytest.mark.parametrize("storage", ["cpu", "memmap"])
def test_bytes_reported_are_bytes_held(storage: str, tmp_path: Path) -> None:
    folder = tmp_path if storage == "memmap" else None
    memory = Memory(10, storage=storage, folder=folder)  # type: ignore[arg-type]
    assert memory.nbytes() == 0
    memory.put(torch.arange(2), dense(1, 2))
    assert memory.nbytes() == held_bytes(memory) == 10 * (5 * 4 + 8 + 8)
    tokens = Memory(10, storage=storage, folder=folder)  # type: ignore[arg-type]
    tokens.put(torch.arange(2), text([[1, 2, 3], [300]]))
    assert tokens.nbytes() == held_bytes(tokens) == 10 * (3 * 2 + 4 + 8 + 8)


def test_text_is_padded_to_the_longest_row_drawn_and_joins_a_batch() -> None:
    rows = [[1, 2, 3], [4], [5, 6, 8, 9, 70000], []]
    memory = Memory(4)
    memory.put(torch.arange(2), text(rows[:2]))
    assert memory.forms["input_ids"].dtype == torch.int8
    memory.put(torch.arange(2, 4), text(rows[2:], first=2))
    assert memory.forms["input_ids"].dtype == torch.int32 and memory.forms["input_ids"].shape == (5,)
    narrow = memory.batch(torch.tensor([1, 0]))
    assert narrow["input_ids"].tolist() == [[4, 0, 0], [1, 2, 3]]
    assert narrow["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert narrow["input_ids"].dtype == narrow["attention_mask"].dtype == torch.int64
    assert memory.batch(torch.tensor([3]))["attention_mask"].tolist() == [[0]]
    wide = memory.batch(torch.tensor([2, 1]))
    assert wide["input_ids"].tolist() == [rows[2], [4, 0, 0, 0, 0]]
    joined = concat_batches([text([[1, 2]]), wide])
    assert joined["input_ids"].shape == joined["attention_mask"].shape == (3, 5)
    assert "attention_mask" not in memory._values


def test_labels_of_a_causal_model_go_with_its_tokens_and_those_of_seq2seq_have_their_own_length() -> None:
    causal = text([[1, 2, 3, 4], [5, 6]])
    causal["labels"] = torch.tensor([[-100, 2, 3, -100], [-100, 6, -100, -100]])
    memory = Memory(2)
    memory.put(torch.arange(2), causal)
    batch = memory.batch(torch.tensor([0]))
    assert batch["labels"].tolist() == [[-100, 2, 3, -100]] and batch["input_ids"].shape == (1, 4)
    assert memory.batch(torch.tensor([1]))["labels"].tolist() == [[-100, 6]]
    seq2seq = text([[1, 2, 3, 4], [5, 6]])
    seq2seq["labels"] = torch.tensor([[9, 8, -100], [7, -100, -100]])
    memory = Memory(2)
    memory.put(torch.arange(2), seq2seq)
    assert memory.batch(torch.arange(2))["labels"].tolist() == [[9, 8], [7, -100]]
    assert memory.batch(torch.tensor([1]))["labels"].tolist() == [[7]]
    longer = text([[1], [2]], first=2)
    longer["labels"] = torch.tensor([[5, 5, 5, 5], [6, -100, -100, -100]])
    memory.resize(4)
    memory.put(torch.tensor([2, 3]), longer)
    assert memory.batch(torch.tensor([2, 1]))["labels"].tolist() == [[5, 5, 5, 5], [7, -100, -100, -100]]


def test_what_cannot_be_kept_is_refused() -> None:
    memory = Memory(4)
    memory.put(torch.arange(2), dense(1, 2))
    with pytest.raises(StreamError, match="columns"):
        memory.put(torch.tensor([2]), {k: v for k, v in dense(3).items() if k != "inputs"})
    with pytest.raises(StreamError, match="'inputs'"):
        memory.put(torch.tensor([2]), dense(3, width=6))
    with pytest.raises(StreamError, match="'inputs'"):
        memory.put(torch.tensor([2]), {**dense(3), "inputs": torch.ones(1, 5, dtype=torch.float64)})
    left = text([[1, 2, 3], [4]])
    left["attention_mask"] = left["attention_mask"].flip(1)
    with pytest.raises(StreamError, match="on the right"):
        Memory(2).put(torch.arange(2), left)
    with pytest.raises(SpecError, match="holds no row"):
        Memory(0)
    with pytest.raises(SpecError, match="folder"):
        Memory(3, storage="memmap")


@pytest.mark.parametrize(
    ("given", "found"), [("20MB", 20_000_000), ("512KiB", 524_288), ("1.5 kb", 1500), ("2GiB", 2 << 30), ("7B", 7)]
)
def test_bytes_as_people_write_them(given: str, found: int) -> None:
    assert parse_bytes(given) == found


@pytest.mark.parametrize("given", ["20", "MB", "-3MB", "3 parsec"])
def test_bytes_that_are_none(given: str) -> None:
    with pytest.raises(SpecError, match="no size"):
        parse_bytes(given)


def test_capacity_in_bytes_counts_rows_and_shrinks_for_longer_rows() -> None:
    memory = Memory("1kB", beside=24)
    memory.fit(dense(1))
    assert memory.capacity == 1000 // (5 * 4 + 8 + 8 + 24)
    assert memory.nbytes() <= 1000
    with pytest.raises(SpecError, match=r"100 bytes holds no row.*'176B'"):
        Memory("100B").fit(dense(1, width=40))
    tokens = Memory("200B")
    tokens.put(torch.arange(3), text([[1], [2], [3]]))
    before = tokens.capacity
    tokens.fit(text([[4] * 60], first=9), keep=lambda capacity: torch.arange(3)[-capacity:])
    assert before == 200 // 21 and tokens.capacity == 2 and tokens.rows().tolist() == [1, 2]
    assert tokens.nbytes() <= 200
    assert tokens.batch(torch.arange(2))["input_ids"].tolist() == [[2], [3]]


def test_erased_rows_leave_no_byte_behind(tmp_path: Path) -> None:
    memory = Memory(6)
    memory.put(torch.arange(4), dense(1001, 1002, 1003, 1004))
    secret = torch.tensor([1002.0]).numpy().tobytes() + torch.tensor([1002.0]).numpy().tobytes()
    identity = torch.tensor([1002]).numpy().tobytes()
    raw = memory._values["inputs"].numpy().tobytes() + memory._values["row"].numpy().tobytes()
    assert secret in raw and identity in raw
    assert memory.erase(torch.tensor([1002, 5, 1004])) == 2
    assert memory.rows().tolist() == [1001, 1003]
    assert memory.batch(torch.arange(2))["inputs"][:, 0].tolist() == [1001, 1003]
    for name, values in memory._values.items():
        assert not values[2:].any(), name
    save_state(tmp_path / "s", memory.state_dict())
    raw = (tmp_path / "s" / "tensors.safetensors").read_bytes()
    assert secret not in raw and identity not in raw
    assert memory.erase(torch.tensor([1002])) == 0
    assert memory.erase(torch.tensor([1001, 1003])) == 2 and len(memory) == 0


@pytest.mark.parametrize("storage", ["cpu", "memmap"])
@pytest.mark.parametrize("kind", ["dense", "text"])
def test_saved_and_loaded(storage: str, kind: str, tmp_path: Path) -> None:
    def fresh(capacity: int = 5) -> Memory:
        folder = tmp_path / "maps" if storage == "memmap" else None
        return Memory(capacity, storage=storage, folder=folder)  # type: ignore[arg-type]

    memory, other = fresh(), fresh()
    memory.put(torch.arange(3), dense(4, 5, 6) if kind == "dense" else text([[1, 2, 3], [400], []]))
    save_state(tmp_path / "s", memory.state_dict())
    other.load_state_dict(load_state(tmp_path / "s"))
    assert other.nbytes() == memory.nbytes() and len(other) == 3 and other.forms == memory.forms
    expected, found = memory.batch(torch.arange(3)), other.batch(torch.arange(3))
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], column) for name, column in expected.items())
    other.put(torch.tensor([3]), dense(9) if kind == "dense" else text([[8]]))
    assert len(other) == 4 and len(memory) == 3
    if storage == "memmap":
        assert list((tmp_path / "maps").iterdir()) == []
    with pytest.raises(StateError, match=r"holds 3 rows.*room for 2"):
        fresh(2).load_state_dict(memory.state_dict())
    damaged = memory.state_dict()
    damaged["columns"]["row"] = damaged["columns"]["row"][:2]
    with pytest.raises(StateError, match="damaged"):
        fresh().load_state_dict(damaged)


def test_only_the_filled_part_is_saved() -> None:
    memory = Memory(1000)
    memory.put(torch.arange(2), dense(1, 2))
    assert {name: len(column) for name, column in memory.state_dict()["columns"].items()} == {
        "inputs": 2,
        "labels": 2,
        "row": 2,
    }
    empty = Memory(3)
    empty.load_state_dict(Memory(3).state_dict())
    assert len(empty) == 0 and empty.rows().numel() == 0


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    memory = Memory(3, storage="memmap", folder=tmp_path / "file")
    with pytest.raises(StateError, match="name a folder"):
        memory.put(torch.arange(1), dense(1))


def test_memory_grows() -> None:
    memory = Memory(2)
    memory.put(torch.arange(2), text([[1, 2], [3]]))
    memory.resize(5)
    memory.put(torch.tensor([4, 3, 2]), text([[4], [5], [6]], first=2))
    assert memory.batch(torch.arange(5))["input_ids"].tolist() == [[1, 2], [3, 0], [6, 0], [5, 0], [4, 0]]


# Keys and quotas


def test_keys_are_the_outputs_of_splitmix64() -> None:
    found = [key % 2**64 for key in row_keys(torch.arange(3), 0).tolist()]
    assert found == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def slow_quotas(counts: list[int], capacity: int, priority: list[int]) -> list[int]:
    quotas = [0] * len(counts)
    for _ in range(capacity):
        open_ = [g for g in range(len(counts)) if quotas[g] < counts[g]]
        if not open_:
            break
        least = min(quotas[g] for g in open_)
        quotas[min((g for g in open_ if quotas[g] == least), key=lambda g: priority[g])] += 1
    return quotas


def test_quotas_are_equal_and_what_is_left_over_is_given_out() -> None:
    numbers = random.Random(0)
    for _ in range(200):
        groups = numbers.randint(1, 7)
        counts = [numbers.randint(1, 20) for _ in range(groups)]
        priority = numbers.sample(range(100), groups)
        capacity = numbers.randint(1, 60)
        found = equal_quotas(torch.tensor(counts), capacity, torch.tensor(priority)).tolist()
        assert found == slow_quotas(counts, capacity, priority)


# Selection


class Kept:
    """A selection and the ids in its places, as a memory would hold them."""

    def __init__(self, seed: int, capacity: int, *, grouped: bool = False, quota: int | None = None) -> None:
        self.selection = Selection(seed, grouped=grouped, quota=quota)
        self.capacity, self.places = capacity, torch.zeros(0, dtype=torch.int64)

    def offer(self, rows: Tensor, groups: Tensor | None = None) -> None:
        index = self.selection.candidates(rows, groups)
        if not len(index):
            return
        rows, groups = rows[index], None if groups is None else groups[index]
        plan = self.selection.plan(rows, groups, self.capacity)
        self.selection.accept(plan, self.capacity)
        grown = torch.full((len(self.selection),), -1)
        grown[: len(self.places)] = self.places
        grown[plan.places] = rows[plan.index]
        self.places = grown

    @property
    def rows(self) -> set[int]:
        assert torch.equal(row_keys(self.places, self.selection.seed), self.selection.keys_N)
        return set(self.places.tolist())


def reference(rows: list[int], groups: list[int], seed: int, capacity: int, quota: int | None) -> set[int]:
    """Every distinct row ever offered, sorted by key within its group, as many as the quota."""
    key = {row: int(row_keys(torch.tensor([row]), seed)) for row in rows}
    members: dict[int, set[int]] = {}
    for row, group in zip(rows, groups, strict=True):
        members.setdefault(group, set()).add(row)
    ids = sorted(members)
    priority = [int(row_keys(torch.tensor([group]), seed)) for group in ids]
    counts = [len(members[group]) for group in ids]
    quotas = [quota] * len(ids) if quota else slow_quotas(counts, capacity, priority)
    return {
        row
        for group, many in zip(ids, quotas, strict=True)
        for row in sorted(members[group], key=lambda row: key[row])[:many]
    }


@pytest.mark.parametrize("kind", ["reservoir", "balanced", "quota"])
def test_selection_equals_the_reference_in_any_order_and_batches(kind: str) -> None:
    numbers = random.Random(1)
    for seed in range(25):
        rows = numbers.sample(range(10_000), 120)
        group_of = {row: min(int(numbers.expovariate(0.6)), 6) if kind != "reservoir" else 0 for row in rows}
        quota = 7 if kind == "quota" else None
        capacity = 49 if quota else numbers.randint(1, 60)
        expected = reference(rows, [group_of[row] for row in rows], seed, capacity, quota)
        for ordered in (False, True):
            order = rows + numbers.sample(rows, 30)
            order.sort(key=lambda row: group_of[row]) if ordered else numbers.shuffle(order)
            kept = Kept(seed, capacity, grouped=kind != "reservoir", quota=quota)
            while order:
                block, order = order[: (size := numbers.randint(1, 40))], order[size:]
                groups = torch.tensor([group_of[row] for row in block])
                kept.offer(torch.tensor(block), None if kind == "reservoir" else groups)
            assert kept.rows == expected
            assert len(kept.places) == len(expected)


def test_equal_probability_old_rows_no_better_than_new() -> None:
    counts = torch.zeros(60)
    for seed in range(600):
        kept = Kept(seed * 7919, 12)
        for block in torch.split(torch.arange(60), 7):
            kept.offer(block)
        assert len(kept.places) == 12
        counts[kept.places] += 1
    expected = 600 * 12 / 60
    variance = expected * (1 - 12 / 60)
    chi_square = float(((counts - expected) ** 2 / variance).sum()) * 59 / 60
    assert 0.001 < stats.chi2.sf(chi_square, 59) < 0.999
    halves = counts[:30].sum() / counts.sum()
    assert abs(float(halves) - 0.5) < 0.02


def test_each_of_three_rows_is_kept_with_probability_one_third() -> None:
    counts = torch.zeros(3)
    for seed in range(3000):
        kept = Kept(seed * 104_729, 1)
        for row in range(3):
            kept.offer(torch.tensor([row]))
        counts[kept.places] += 1
    assert (counts / 3000 - 1 / 3).abs().max() < 0.03


@pytest.mark.parametrize("grouped", [False, True])
def test_a_resumed_selection_goes_on_as_one_never_saved(grouped: bool) -> None:
    def groups(rows: Tensor) -> Tensor | None:
        return rows % 3 if grouped else None

    whole, first = Kept(5, 50, grouped=grouped), Kept(5, 50, grouped=grouped)
    old, new = torch.arange(1000), torch.arange(1000, 2000)
    for kept in (whole, first):
        kept.offer(old, groups(old))
    resumed = Kept(999, 50, grouped=grouped)
    resumed.selection.load_state_dict(first.selection.state_dict(), 50)
    resumed.places = first.places.clone()
    for kept in (whole, resumed):
        kept.offer(new, groups(new))
    assert torch.equal(whole.places, resumed.places)
    survivors = sum(row < 1000 for row in resumed.rows)
    assert 12 <= survivors <= 38, "half of the places belong to the older half of the rows"


@pytest.mark.parametrize(("grouped", "quota"), [(False, None), (True, None), (True, 10)])
def test_after_an_erasure_no_row_is_favoured_and_none_comes_back(grouped: bool, quota: int | None) -> None:
    kept = Kept(3, 20, grouped=grouped, quota=quota)

    def offer(rows: list[int]) -> None:
        ids = torch.tensor(rows)
        kept.offer(ids, ids % 2 if grouped else None)

    offer(list(range(200)))
    before = kept.rows
    stays = torch.arange(20)[5:]
    erased = set(kept.places[:5].tolist())
    kept.selection.keep(stays)
    kept.places = kept.places[stays]
    offer([row for row in range(200) if row not in erased])
    assert kept.rows == before - erased
    offer(list(range(200, 2000)))
    everything = [row for row in range(2000) if row not in erased]
    groups = [row % 2 if grouped else 0 for row in everything]
    assert kept.rows == reference(everything, groups, 3, 20, quota)


@pytest.mark.parametrize(("grouped", "quota"), [(False, None), (True, None), (True, 10)])
@pytest.mark.parametrize("empty", [False, True])
def test_a_ceiling_tells_no_id_of_an_erased_row(grouped: bool, quota: int | None, empty: bool) -> None:
    """It may be the key of a row that was given up long ago, and keys are ids in another order."""
    kept = Kept(3, 20, grouped=grouped, quota=quota)
    rows = torch.arange(200)
    kept.offer(rows, rows % 2 if grouped else None)
    selection = kept.selection
    before = selection._ceilings_G.clone()
    named = rows[torch.isin(row_keys(rows, 3), before)]
    assert len(named) == (2 if grouped else 1) and not set(named.tolist()) & kept.rows
    selection.forget(torch.tensor([row for row in range(200) if row not in kept.rows and row not in named]))
    assert torch.equal(selection._ceilings_G, before), "that of another row stays"
    if empty:
        selection.keep(rows[:0])
        kept.places = kept.places[:0]
    erased = set(named.tolist())
    selection.forget(named)
    after = selection._ceilings_G
    assert not torch.isin(row_keys(rows, 3), after).any() and (after < before).all()
    for ceiling, old in zip(after.tolist(), before.tolist(), strict=True):
        least = -(2**63)
        assert ceiling - least > 0.75 * (old - least) - 1, "little room is lost"
        if empty:
            assert (ceiling - least).bit_length() - 3 <= ((ceiling - least) & -(ceiling - least)).bit_length() - 1
    offer = [row for row in range(2000) if row not in erased]
    held = kept.rows
    ids = torch.tensor(offer[:198])
    kept.offer(ids, ids % 2 if grouped else None)
    assert kept.rows == held or empty, "what is held is every row below the ceiling"
    ids = torch.tensor(offer)
    kept.offer(ids, ids % 2 if grouped else None)
    if not empty:
        groups = [row % 2 if grouped else 0 for row in offer]
        assert kept.rows == reference(offer, groups, 3, 20, quota)
    assert not kept.rows & erased


def test_trimmed_to_fewer_places() -> None:
    kept = Kept(3, 20, grouped=True)
    rows = torch.arange(200)
    kept.offer(rows, rows % 2)
    kept.places = kept.places[kept.selection.trim(9)]
    kept.capacity = 9
    assert kept.rows == reference(rows.tolist(), (rows % 2).tolist(), 3, 9, None)
    more = torch.arange(200, 400)
    kept.offer(more, more % 2)
    assert kept.rows == reference(list(range(400)), [row % 2 for row in range(400)], 3, 9, None)


def test_a_full_selection_holds_what_it_reports() -> None:
    kept = Kept(3, 20, grouped=True)
    rows = torch.arange(200)
    kept.offer(rows, rows % 2)
    own = [value for value in vars(kept.selection).values() if isinstance(value, Tensor)]
    assert kept.selection.nbytes() == sum(t.untyped_storage().nbytes() for t in own) == 2 * 20 * 8 + 2 * 8


# Cycle


def test_cycle_takes_each_place_equally_often_and_never_twice_in_a_draw() -> None:
    generator, cycle = torch.Generator().manual_seed(0), Cycle()
    counts = torch.zeros(10, dtype=torch.int64)
    for _ in range(70):
        index = cycle.draw(7, 10, generator)
        assert len(set(index.tolist())) == 7
        counts[index] += 1
        assert counts.max() - counts.min() <= 1
    assert counts.tolist() == [49] * 10
    assert sorted(cycle.draw(10, 10, generator).tolist()) == list(range(10))


def test_cycle_begins_anew_when_the_memory_grows_and_goes_on_after_loading() -> None:
    cycle = Cycle()
    cycle.draw(3, 4, torch.Generator().manual_seed(0))
    assert sorted(cycle.draw(6, 6, torch.Generator().manual_seed(0)).tolist()) == list(range(6))
    a, b = torch.Generator().manual_seed(1), torch.Generator()
    cycle.draw(4, 9, a)
    other = Cycle()
    other.load_state_dict(cycle.state_dict())
    b.set_state(a.get_state())
    for _ in range(5):
        assert torch.equal(cycle.draw(4, 9, a), other.draw(4, 9, b))


def test_cycle_draws_rows_of_a_length_and_still_each_place_once_a_walk() -> None:
    generator, cycle = torch.Generator().manual_seed(0), Cycle()
    lengths = torch.randint(1, 40, (23,), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(23, dtype=torch.int64)
    for draw in range(46):
        width, walks = [5, 38, 12, 25][draw % 4], 5 * draw // 23
        left = [place for place in range(23) if seen[place] == walks]
        index = cycle.draw(5, 23, generator, lengths, width)
        assert len(set(index.tolist())) == 5
        if len(left) > 5:
            fitting = sorted((int(lengths[place]) for place in left if lengths[place] <= width), reverse=True)[:5]
            wanted = fitting if len(fitting) == 5 else sorted(int(lengths[place]) for place in left)[:5]
            assert sorted(lengths[index].tolist()) == sorted(wanted)
        seen[index] += 1
        assert int(seen.max() - seen.min()) <= 1
    assert seen.tolist() == [10] * 23
