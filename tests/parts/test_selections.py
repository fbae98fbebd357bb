"""Ring buffer and herding: which rows the memory of rehearsal keeps."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import pytest
import torch
from replay_bench import Linear, experience, looped, small_model, train
from torch import Tensor

from continual.errors import CompositionError, SpecError
from continual.parts.context import TrainingContext
from continual.parts.replay.herding import herding_order
from continual.parts.replay.rehearsal import Rehearsal
from continual.streams.experience import Experience
from continual.table import TensorTable

# D features, N rows


def by_class(part: Rehearsal) -> dict[tuple[int, int], list[int]]:
    """Rows held of each experience and class, in ascending order."""
    found: dict[tuple[int, int], list[int]] = defaultdict(list)
    batch = part.memory.batch(torch.arange(len(part.memory)))
    for row, label in sorted(zip(batch["row"].tolist(), batch["labels"].tolist(), strict=True)):
        found[row // 1000, label].append(row)
    return dict(found)


# Ring


@pytest.mark.parametrize("insert", ["end", "step"])
@pytest.mark.parametrize("domain", [False, True])
def test_a_ring_keeps_the_latest_rows_of_each_class_of_each_experience(insert: str, domain: bool) -> None:
    part = Rehearsal(select="ring", capacity=14, insert=insert)
    loop = looped(part)
    arrived: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, rows in enumerate((24, 5, 30)):
        given = experience(index, rows, classes=(0, 1) if domain else None)
        seen = train(loop, given, epochs=2)
        order = torch.cat([b["row"] for b in seen[: len(seen) // 2]]) if insert == "step" else given.train.column("row")
        for row in order.tolist():
            arrived[index, int(given.train.column("labels")[row % 1000])].append(row)
        held = by_class(part)
        for pair, rows_held in held.items():
            assert rows_held == sorted(arrived[pair][-len(rows_held) :])
        assert sum(map(len, held.values())) == min(14, sum(map(len, arrived.values())))
        largest = max(map(len, held.values()))
        assert all(len(held.get(pair, [])) >= min(largest - 1, len(came)) for pair, came in arrived.items())
    assert len(by_class(part)) == 6


def test_rows_of_each_class_in_a_ring() -> None:
    part = Rehearsal(select="ring", per_class=3, insert="step")
    loop = looped(part)
    for index in range(3):
        train(loop, experience(index))
    assert {pair: len(rows) for pair, rows in by_class(part).items()} == {(c // 2, c): 3 for c in range(6)}


def test_a_ring_of_rows_without_a_class_is_one_of_each_experience() -> None:
    part = Rehearsal(select="ring", capacity=6)
    loop = TrainingContext(Linear(), [part], objective="regression")
    for index in range(3):
        given = experience(index)
        columns: dict[str, Any] = {name: given.train.column(name) for name in ("inputs", "row")}
        table = TensorTable({**columns, "labels": torch.zeros(24, 10)})
        loop.begin(Experience(index, f"r{index}", table, objective="regression"))
        loop.end()
    assert sorted(part.rows().tolist()) == [22, 23, 1022, 1023, 2022, 2023]
    with pytest.raises(CompositionError, match="regression: take select: reservoir"):
        Rehearsal(select="ring", per_class=2).begin(loop, Experience(0, "r", table, objective="regression"))


def test_a_row_that_comes_again_is_held_once_and_an_erased_one_makes_room() -> None:
    part = Rehearsal(select="ring", capacity=8)
    loop = looped(part)
    train(loop, experience(0))
    again = experience(0)
    train(loop, Experience(1, "again", again.train, classes=again.classes))
    assert len(set(part.rows().tolist())) == len(part.memory) == 8
    assert part.erase(part.rows()[:5]) == 5 and len(part.memory) == 3
    train(loop, experience(2, classes=(2, 3)))
    assert len(part.memory) == 8


# Herding


def herding_loop(features_ND: Tensor, count: int) -> list[int]:
    """Equation 4 as it stands."""
    mean_D = features_ND.mean(0)
    chosen: list[int] = []
    for k in range(1, count + 1):
        distance = {}
        for n in range(len(features_ND)):
            if n not in chosen:
                total_D = features_ND[n] + sum((features_ND[j] for j in chosen), torch.zeros_like(mean_D))
                distance[n] = float((mean_D - total_D / k).norm())
        chosen.append(min(distance, key=lambda n: distance[n]))
    return chosen


@pytest.mark.parametrize(("rows", "count", "seed"), [(1, 1, 0), (17, 17, 1), (60, 20, 2)])
def test_herding_is_equation_4(rows: int, count: int, seed: int) -> None:
    features = torch.randn(rows, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    features = torch.nn.functional.normalize(features + 0.5, dim=1)
    assert herding_order(features, count).tolist() == herding_loop(features, count)


def test_a_memory_by_herding_drops_the_rows_ranked_last() -> None:
    part = Rehearsal(select="herding", capacity=12)
    loop = looped(part)
    ranked: dict[int, list[int]] = {}
    for index, kept in enumerate((6, 3, 2)):
        given = experience(index)
        train(loop, given, epochs=2)
        with torch.no_grad():
            features = torch.nn.functional.normalize(loop.forward(dict(given.train.columns)).features.double(), dim=1)  # type: ignore[attr-defined, union-attr]
        for label in given.classes:
            members = (given.train.column("labels") == label).nonzero().flatten()
            order = herding_loop(features[members], len(members))
            ranked[label] = given.train.column("row")[members[order]].tolist()
        assert by_class(part) == {(c // 2, c): sorted(rows[:kept]) for c, rows in ranked.items()}
    assert Counter((part.rows() // 1000).tolist()) == {0: 4, 1: 4, 2: 4}


def test_herding_by_class_and_in_bytes_and_from_a_state() -> None:
    part = Rehearsal(select="herding", per_class=2)
    loop = looped(part)
    for index in range(2):
        train(loop, experience(index))
    assert {pair: len(rows) for pair, rows in by_class(part).items()} == {(c // 2, c): 2 for c in range(4)}
    limited = Rehearsal(select="herding", capacity="600B")
    loop = looped(limited)
    for index in range(2):
        train(loop, experience(index))
    assert len(limited.memory) == 600 // (4 * 6 + 8 + 8 + 24)
    other = Rehearsal(select="herding", capacity="600B")
    other.load_state_dict(limited.state_dict())
    other.attach(loop)
    for each in (limited, other):
        each.begin(loop, experience(2))
        each.end(loop, experience(2))
    assert torch.equal(other.rows(), limited.rows()) and (other.rows() >= 2000).any()


def test_herding_leaves_the_model_as_it_was() -> None:
    part = Rehearsal(select="herding", capacity=6)
    loop = looped(part)
    loop.begin(experience(0))
    loop.model.train()
    loop.end()
    assert loop.model.training and all(parameter.grad is None for parameter in loop.model.parameters())


def test_herding_needs_features_and_the_end_of_an_experience() -> None:
    part = Rehearsal(select="herding", capacity=6)
    loop = TrainingContext(Linear(), [part])
    with pytest.raises(CompositionError, match=r"gives logits alone: take select: class-balanced"):
        loop.begin(experience(0))
    with pytest.raises(SpecError, match="leave insert out"):
        Rehearsal(select="herding", insert="step")
    with pytest.raises(SpecError, match="class-balanced, ring or herding"):
        Rehearsal(select="experience-balanced", per_class=2)
    assert small_model().gives_features
