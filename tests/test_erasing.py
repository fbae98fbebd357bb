"""Erased rows are found nowhere: in no byte of what is saved, and in nothing that a learner can reach."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from battery import (
    ENGINES,
    STRATEGIES,
    CutOff,
    _cut_after,
    learner_for,
    same_weights,
    tiny_stream,
)
from erasing_bench import RARE, Rows, all_of, any_of, distinct, held, rows_of, saved, seeds_of
from text_bench import WORDS, tiny_bert
from torch import Tensor

from continual import Learner, Monitor, Strategy, Stream
from continual.errors import StateError, StreamError, TrainingError
from continual.parts.replay.rehearsal import Rehearsal
from continual.streams.experience import Experience
from continual.table import TensorTable, View

ERASABLE = [name for name in STRATEGIES if name not in ENGINES]
WITH_MEMORY = {
    "adalora-rehearsal", "agem", "der", "der-plus-plus", "er-ace", "ewc-rehearsal", "gdumb", "gem", "herding-rehearsal", "icarl",
    "lm-lora-rehearsal", "lora-rehearsal", "mir", "neighbours", "rehearsal", "ring-rehearsal",
}  # fmt: skip
FEATURES = {"neighbours"}
"""They hold features in the place of rows (tests/parts/test_neighbours.py looks for those)."""


def experiences() -> list[Experience]:
    return [distinct(each, 10_000_000 * (1 + each.index)) for each in tiny_stream()]


def learnt(name: str, given: list[Experience], **options: object) -> Learner:
    """A learner that learnt two of the experiences, or all of them at once."""
    learner = learner_for(name, **options)
    if learner.strategy.data == "joint":
        learner.run(Stream.from_experiences(given, name="rare", scenario="class"))
        return learner
    for experience in given[:2]:
        learner.update(experience)
    return learner


def some_rows(learner: Learner, given: list[Experience]) -> Tensor:
    """Ids from the training and the test sets of two experiences, and half of what is held by memories."""
    tables = [table for each in given[:2] for table in (each.train, each.test) if table is not None]
    ids = [table.column("row")[2:40:9] for table in tables]
    return torch.unique(torch.cat([*ids, *(part.rows()[::2] for part in learner.parts)]))


@pytest.mark.parametrize("name", ERASABLE)
def test_erased_rows_are_found_nowhere_and_everything_goes_on(name: str, tmp_path: Path) -> None:
    given = experiences()
    learner = learnt(name, given, folder=tmp_path / "checkpoint")
    joint = learner.strategy.data == "joint"
    ids = some_rows(learner, given)
    gone = rows_of(given, ids)
    in_memories = torch.unique(torch.cat([torch.empty(0, dtype=torch.int64), *(p.rows() for p in learner.parts)]))
    in_memories = in_memories[torch.isin(in_memories, ids)]
    assert (len(in_memories) > 0) == (name in WITH_MEMORY)

    patterns = [*gone.content(), *gone.ids_as_bytes(seeds_of(learner))]
    trained = rows_of(given, in_memories) if len(in_memories) else None
    before = saved(learner, tmp_path / "before")
    assert any_of(patterns, before), "the test sets are there"
    if trained is not None:
        assert any_of(trained.ids_as_bytes(), before), "the memory is there"
        assert name in FEATURES or any_of(trained.content(), before)
    assert any_of(gone.content(), held(learner))
    kept = {part.name: len(part.rows()) for part in learner.parts}

    found = learner.erase(ids)
    for part in learner.parts:
        assert not torch.isin(part.rows(), ids).any() and len(part.rows()) == kept[part.name] - found[part.name]
    tests = torch.cat([each.test.column("row") for each in given[: 3 if joint else 2]])  # type: ignore[union-attr]
    assert found["test sets"] == int(torch.isin(tests, ids).sum()) > 0
    assert found["ledger"] == (0 if joint else len(ids))
    trains = torch.cat([each.train.column("row") for each in given[:2]])
    assert found["past"] == (int(torch.isin(trains, ids).sum()) if name == "cumulative" else 0)

    after = saved(learner, tmp_path / "after")
    checkpoint = b"".join(path.read_bytes() for path in (tmp_path / "checkpoint").iterdir())
    for where in (after, checkpoint, held(learner)):
        assert not any_of(patterns, where)
    again = learner.erase(ids)
    assert not any(again.values()) and saved(learner, tmp_path / "again") == after, "nothing is left to erase"

    rest = given[2].test
    assert rest is not None
    assert len(learner.predict(rest.select(torch.arange(4)))["labels"]) == 4
    loaded = Learner.load(tmp_path / "after", device="cpu", progress=False)
    assert saved(loaded, tmp_path / "loaded") == after
    if not joint:
        learner.update(given[2])
        loaded.update(given[2])
        same_weights(learner, loaded)
        assert learner.monitor is not None and learner.monitor.metrics()["accuracy"] is not None
    assert not any_of(patterns, saved(learner, tmp_path / "later")) and not any_of(patterns, held(learner))


@pytest.mark.parametrize("name", ERASABLE)
def test_everything_may_be_erased(name: str, tmp_path: Path) -> None:
    given = experiences()
    learner = learnt(name, given)
    reach = given if learner.strategy.data == "joint" else given[:2]
    first = reach[0]
    assert first.test is not None
    learner.erase(torch.cat([first.train.column("row"), first.test.column("row")]))
    assert learner.monitor is not None and len(learner.monitor.tables()[0]) == 0
    str(learner.monitor.latest())
    learner.erase(torch.cat([table.column("row") for each in reach for table in (each.train, each.test) if table]))
    assert learner.monitor.metrics()["accuracy"] is None and not len(learner.monitor.rows())
    assert all(not len(part.rows()) for part in learner.parts)
    before = saved(learner, tmp_path / "state")
    loaded = Learner.load(tmp_path / "state", device="cpu", progress=False)
    assert saved(loaded, tmp_path / "loaded") == before
    if learner.strategy.data != "joint":
        for each in (learner, loaded):
            update = each.update(given[2])
            assert update.retention is not None and str(update)
        same_weights(learner, loaded)
        again = replace(given[0], index=3, name="again")
        assert learner.update(again).steps == loaded.update(again).steps, "its ids and its content are new ones"


def test_what_nobody_holds_changes_nothing(tmp_path: Path) -> None:
    given = experiences()
    for name in ("icarl", "cumulative", "routed-lora"):
        learner = learnt(name, given)
        before = saved(learner, tmp_path / "before")
        for ids in (torch.empty(0, dtype=torch.int64), torch.tensor([5, 6], dtype=torch.int32)):
            assert not any(learner.erase(ids).values())
        assert saved(learner, tmp_path / "after") == before
    fresh = learner_for("rehearsal")
    assert fresh.erase(torch.tensor([5])) == {"test sets": 0, "past": 0, "ledger": 0}
    unseen = learner_for("rehearsal", monitor=False)
    unseen.update(given[0])
    assert unseen.erase(given[0].train.column("row"))["replay/rehearsal"] == 20


def test_it_says_what_each_place_gave_up() -> None:
    given = experiences()
    learner = learnt("cumulative", given)
    test = given[1].test
    assert test is not None
    ids = torch.cat([given[0].train.column("row")[:3], test.column("row")[:2]])
    assert learner.erase(ids) == {"head/linear": 0, "test sets": 2, "past": 3, "ledger": 5}
    replayed = learnt("rehearsal", given)
    stored = replayed.parts[1].rows()[:4]
    assert replayed.erase(stored) == {"head/linear": 0, "replay/rehearsal": 4, "test sets": 0, "past": 0, "ledger": 4}


def test_erased_rows_may_come_again_as_new_ones() -> None:
    given = experiences()
    learner = learnt("rehearsal", given)
    again = replace(given[0], index=2, name="again")
    with pytest.raises(StreamError, match=r"row ids of 'again' were used by earlier updates"):
        learner.update(again)
    learner.erase(given[0].train.column("row"))
    with pytest.raises(StreamError, match=r"row ids of 'again' were used by earlier updates"):
        learner.update(again)
    learner.erase(given[0].test.column("row"))  # type: ignore[union-attr]
    assert learner.update(again).steps > 0


@pytest.mark.parametrize("name", ["rehearsal", "cumulative"])
def test_nothing_is_erased_in_the_middle_of_an_update(name: str, tmp_path: Path) -> None:
    given = experiences()
    learner = learnt(name, given[:1], folder=tmp_path / "state", save_every=2)
    _cut_after(learner, 1)
    with pytest.raises(CutOff):
        learner.update(given[1])
    ids = given[0].train.column("row")[:3]
    for one in (learner, Learner.load(tmp_path / "state", device="cpu", progress=False)):
        with pytest.raises(StateError, match=f"stands in the middle of the update on '{given[1].name}'.*then erase"):
            one.erase(ids)
    resumed = Learner.load(tmp_path / "state", device="cpu", progress=False)
    resumed.update(given[1])
    assert resumed.erase(ids)["ledger"] == 3
    failed = learner_for(Strategy(training={"optimizer": "sgd", "lr": 1e30, "epochs": 2, "batch_size": 8}))
    with pytest.raises(TrainingError):
        failed.update(given[0])
    with pytest.raises(StateError, match="stands in the middle"):
        failed.erase(ids)


@pytest.mark.parametrize(
    "wrong", [torch.tensor(5), torch.tensor([[5]]), torch.tensor([True]), torch.tensor([0.5])], ids=str
)
def test_what_are_no_ids_is_refused(wrong: Tensor) -> None:
    with pytest.raises(StreamError, match=r"rows to be erased were given as .*: give their ids"):
        learner_for("naive").erase(wrong)


@pytest.mark.filterwarnings("ignore")
def test_an_engine_cannot_give_up_rows() -> None:
    pytest.importorskip("avalanche")
    learner = learner_for("avalanche-naive")
    learner.run(tiny_stream(experiences=2))
    with pytest.raises(StateError, match="cannot be erased row by row: learn the stream anew"):
        learner.erase(torch.tensor([5]))


@pytest.mark.parametrize("name", ["rehearsal", "cumulative"])
def test_a_run_goes_on_over_what_is_left_of_its_stream(name: str, tmp_path: Path) -> None:
    given = experiences()
    ids = torch.cat(
        [given[0].train.column("row")[::2], given[2].train.column("row")[:3], given[0].test.column("row")[:9]]
    )  # type: ignore[union-attr]

    def stream(until: int, without: Tensor, start: int = 0) -> Stream:
        found = []
        for each in given[start:until]:
            kept = {
                part: table.select((~torch.isin(table.column("row"), without)).nonzero().flatten())
                for part, table in (("train", each.train), ("test", each.test))
                if table is not None
            }
            found.append(replace(each, **kept))
        return Stream.from_experiences(found, name="rare", scenario="class")

    learner = learner_for(name, folder=tmp_path / "state")
    learner.run(stream(2, ids[:0]))
    found = learner.erase(ids)
    past = len(given[0].train.column("row")[::2]) if name == "cumulative" else 0
    assert (found["test sets"], found["past"], found["ledger"]) == (9, past, 0)
    loaded = Learner.load(tmp_path / "state", device="cpu", progress=False)
    patterns = [*rows_of(given, ids).content(), *rows_of(given, ids).ids_as_bytes()]
    for one in (learner, loaded):
        run = one.run(stream(3, ids))
        assert len(run.updates) == 1 and len(run.result["matrix"]) == 3
        assert not any_of(patterns, saved(one, tmp_path / "last"))
    same_weights(learner, loaded)
    with pytest.raises(StateError, match="the saved state belongs to another stream"):
        learner.run(stream(3, ids[:0]))
    other = learner_for(name)
    other.run(stream(2, ids[:0]))
    other.erase(given[0].train.column("row"))
    shifted = [replace(each, index=place, class_names=each.class_names[2:]) for place, each in enumerate(given[1:])]
    shifted = [replace(each, classes=tuple(c - 2 for c in each.classes)) for each in shifted]
    for each in shifted:
        table: Any = each.train
        each.train.base.columns["labels"] = table.base.columns["labels"] - 2  # type: ignore[attr-defined]
    with pytest.raises(StateError, match=r"the learner knows the classes .* go on with update"):
        other.run(Stream.from_experiences(shifted, name="rare", scenario="class"))


@pytest.mark.parametrize("storage", ["cpu", "memmap"])
def test_places_of_a_memory_are_overwritten_where_they_lie(storage: str, tmp_path: Path) -> None:
    given = experiences()
    where = {"storage": storage} if storage == "cpu" else {"storage": storage, "folder": str(tmp_path / "maps")}
    learner = learner_for(
        Strategy(Rehearsal(capacity=20, **where), training={"lr": 0.05, "epochs": 1, "batch_size": 8})
    )
    learner.update(given[0])
    part = learner.parts[1]
    assert isinstance(part, Rehearsal)
    values = part.memory._values["inputs"]
    ids = part.rows()[:7]
    patterns = rows_of(given, ids).content()
    raw = values.numpy().tobytes()
    assert any_of(patterns, raw)
    learner.erase(ids)
    assert part.memory._values["inputs"] is values and len(part.memory) == 13, "the storage is the same"
    assert not any_of(patterns, values.numpy().tobytes()) and not values[13:].any()


def test_probes_stay_and_let_go_of_the_table_they_were_cut_from(tmp_path: Path) -> None:
    given = experiences()
    train = given[0].train
    assert isinstance(train, View)
    learner = learner_for("naive", monitor=Monitor({"safety": train.select(torch.arange(50, 60))}))
    learner.update(replace(given[0], train=train.select(torch.arange(50))))
    ids = torch.cat([train.column("row")[:50:7], train.column("row")[52:53]])
    searched = rows_of(given, ids[:-1]).content()
    assert any_of(searched, held(learner))
    learner.erase(ids)
    assert not any_of(searched, held(learner)) and len(learner.monitor.probes["safety"]) == 10  # type: ignore[union-attr]


# Rows of text

TOKENS = (
    "rehearsal",
    "herding-rehearsal",
    "icarl",
    "gem",
    "cumulative",
    "lora-rehearsal",
    "prompt",
    "prefix",
    "s-prompts",
)


def texts(first: int, classes: tuple[str, str], rows: int) -> TensorTable:
    """Sentences of ten words drawn at random, so that no two have the same five in a row."""
    drawn = torch.randint(len(WORDS), (rows, 10), generator=torch.Generator().manual_seed(first))
    return TensorTable(
        {
            "text": [" ".join(WORDS[place] for place in row) for row in drawn.tolist()],
            "labels": [classes[row % 2] for row in range(rows)],
            "row": RARE + 1000 * first + 7 * torch.arange(rows),
        }
    )


def spoken(tables: list[TensorTable], ids: Tensor) -> tuple[Rows, list[bytes]]:
    """Rows as tokens of the tiny model (words count from 2), and as text."""
    found = [
        text
        for table in tables
        for row, text in zip(table.column("row").tolist(), table.strings("text"), strict=True)
        if row in ids.tolist()
    ]
    tokens = [[2 + WORDS.index(word) for word in text.split()] for text in found]
    return Rows(ids, tokens=tokens), [text.encode() for text in found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.mark.filterwarnings("ignore:.*(is_gradient_checkpointing|past_key_values):FutureWarning")
@pytest.mark.parametrize("name", TOKENS)
def test_erased_texts_are_found_nowhere(name: str, folder: Path, tmp_path: Path) -> None:
    tables = [texts(place, (f"a{place // 2}", f"b{place // 2}"), 24 if place % 2 == 0 else 12) for place in range(6)]
    learner = learner_for(name, model={"kind": "pretrained", "name": str(folder), "max_length": 16})
    for place in (0, 2):
        learner.update(tables[place], test=tables[place + 1], name=f"topics {place}")
    memories = [part.store.rows() for part in learner.parts if hasattr(part, "store")] + [torch.empty(0).long()]
    ids = torch.unique(
        torch.cat([*(table.column("row")[::5] for table in tables[:4]), *(rows[::3] for rows in memories)])
    )
    gone, sentences = spoken(tables, ids)
    patterns = [*gone.content(), *sentences, *gone.ids_as_bytes(seeds_of(learner))]
    before = saved(learner, tmp_path / "before")
    assert any_of(gone.content(), before) and any_of(sentences, held(learner))
    stored = torch.cat(memories)
    stored = stored[torch.isin(stored, ids)]
    if len(stored):
        inside = spoken(tables, stored)[0].content()
        kinds = [inside[place::4] for place in range(4)]
        state = saved_parts(learner, tmp_path / "parts")
        assert any(all_of(kind, state) for kind in kinds), "every row of a memory was there, in some type of numbers"
    learner.erase(ids)
    after = saved(learner, tmp_path / "after")
    assert not any_of(patterns, after) and not any_of(patterns, held(learner))
    loaded = Learner.load(tmp_path / "after", device="cpu", progress=False)
    assert saved(loaded, tmp_path / "loaded") == after
    for one in (learner, loaded):
        one.update(tables[4], test=tables[5], name="topics 4")
        assert len(one.predict(["red green", "up down"])["names"]) == 2
    same_weights(learner, loaded)
    assert not any_of(patterns, held(learner))


def saved_parts(learner: Learner, place: Path) -> bytes:
    """What the parts alone save."""
    from continual.state import save_state

    save_state(place, {part.name: part.state_dict() for part in learner.parts})
    return (place / "tensors.safetensors").read_bytes()


def test_ids_may_be_a_list_and_what_is_none_is_refused_in_a_sentence() -> None:
    given = experiences()
    learner = learnt("rehearsal", given)
    ids = learner.parts[0].rows() if learner.parts[0].slot == "replay" else learner.parts[-1].rows()
    assert len(ids) and sum(learner.erase(ids[:3].tolist()).values()) >= 3
    assert not any(learner.erase([]).values())
    for wrong in (["a"], [[1], [1, 2]], [1.5], None, [10**40]):
        with pytest.raises(StreamError, match="rows to be erased were given as"):
            learner.erase(wrong)  # type: ignore[arg-type]
