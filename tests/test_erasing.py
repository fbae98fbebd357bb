"""Erased rows are found nowhere: in no byte of what is saved, and in nothing that a learner can reach."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from battery import ENGINES, STRATEGIES, learner_for, same_weights, tiny_stream
from erasing_bench import any_of, distinct, held, rows_of, saved, seeds_of
from torch import Tensor

from continual import Learner, Stream
from continual.streams.experience import Experience

ERASABLE = [name for name in STRATEGIES if name not in ENGINES]
WITH_MEMORY = {
    "adalora-rehearsal", "agem", "der", "der-plus-plus", "er-ace", "ewc-rehearsal", "gdumb", "gem", "herding-rehearsal", "icarl",
    "lm-lora-rehearsal", "lora-rehearsal", "mir", "rehearsal", "ring-rehearsal",
}  # fmt: skip


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
        assert any_of(trained.content(), before) and any_of(trained.ids_as_bytes(), before), "the memory is there"
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
