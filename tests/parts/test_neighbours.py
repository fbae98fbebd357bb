"""Nearest neighbours: the vote of its definition, the same rows kept in any order, any row given up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from test_closed_form import D, K, N, all_rows, counted, learn, model_of_inputs

from continual.errors import StreamError, TrainingError
from continual.parts.context import TrainingContext
from continual.parts.head import neighbours
from continual.parts.head.closed_form import UNKNOWN, Familiar
from continual.parts.head.neighbours import BEHIND, NeighboursHead
from continual.state import tensor_bytes
from continual.table import TensorTable


def slow(head: NeighboursHead, table: Any, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits and familiarity row by row in float64, from all rows of ``table``."""
    own = head.settings
    rows, labels = counted(table)
    if own.normalize:
        rows, queries = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (rows, queries))
    logits, familiar = [], []
    for query in queries:
        distance = np.array([np.linalg.norm(query - row) for row in rows])
        near = np.argsort(distance)[: own.neighbours]
        similar = -(distance**2) / 2 / own.temperature
        total = logsumexp(similar[near])
        logits.append(
            [
                logsumexp(similar[near][labels[near] == k]) - total
                if (labels[near] == k).any()
                else similar[labels == k].max() - total + np.log(BEHIND)
                for k in range(K)
            ]
        )
        familiar.append(-distance[near[-1]])
    return np.array(logits), np.array(familiar)


@pytest.mark.parametrize("block", [7, 2**17])
@pytest.mark.parametrize(
    "settings", [{}, {"neighbours": 3, "temperature": 0.5}, {"normalize": False}, {"neighbours": 1000}], ids=str
)
def test_equal_to_the_vote_written_out(settings: dict[str, Any], block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "BLOCK", block)
    head, table = NeighboursHead(**settings), all_rows()
    training = learn(head, table, [150, 250])
    queries = torch.randn(40, D, generator=torch.Generator().manual_seed(1)) * 3
    module = training.model.head
    assert isinstance(module, Familiar)
    logits, familiar = slow(head, table, queries.double().numpy())
    found = module(queries).numpy()
    np.testing.assert_allclose(np.exp(found), np.exp(logits), atol=2e-3)
    np.testing.assert_allclose(found, logits, rtol=1e-3, atol=5e-3)
    np.testing.assert_allclose(module.familiarity(queries).numpy(), familiar, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("per_class", [None, 5])
def test_the_same_to_the_bit_in_any_order_and_division(per_class: int | None) -> None:
    queries, table, found = torch.randn(50, D), all_rows(), []
    for order, sizes in ((torch.arange(N), [N]), (torch.randperm(N), [1, 250, 149]), (torch.randperm(N), [399, 1])):
        head = NeighboursHead(per_class=per_class)
        training = learn(head, table.select(order), sizes)
        found.append((head.rows(), training.model.head(queries), head.nbytes()))
    for rows, logits, size in found[1:]:
        assert torch.equal(rows, found[0][0]) and torch.equal(logits, found[0][1]) and size == found[0][2]
    counts = torch.bincount(table.column("labels").clamp(min=-1) + 1)[1:]
    assert len(found[0][0]) == (5 * K if per_class else int(counts.sum()))


def test_rows_kept_of_a_class_are_a_fair_draw() -> None:
    table, taken = all_rows(rows=4 * N), torch.zeros(4)
    head = NeighboursHead(per_class=100)
    learn(head, table, [4 * N])
    for row in ((head.rows() - 5) // 3).tolist():
        taken[row // N] += 1
    assert taken.sum() == 500 and (taken > 90).all(), "each quarter of the rows has about a quarter of them"


@pytest.mark.parametrize("per_class", [None, 30])
def test_rows_that_are_erased_leave_no_trace(per_class: int | None) -> None:
    table = all_rows()
    head = NeighboursHead(per_class=per_class)
    training = learn(head, table, [200, 200])
    two = head.rows()[head.closed_form.held.labels_N == 2]
    gone = torch.cat([two, head.rows()[:3]])
    traces = [head.closed_form.held.features_ND[head.closed_form.held.rows_N == row].numpy().tobytes() for row in gone]
    content = b"".join(each.numpy().tobytes() for each in head.state_dict().values() if isinstance(each, torch.Tensor))
    assert all(trace in content for trace in traces), "the test can fail"
    assert head.erase(gone) == len(gone) and head.erase(gone) == 0
    kept = {**head.state_dict(), **training.model.head.solution()}
    content = b"".join(each.contiguous().numpy().tobytes() for each in kept.values() if isinstance(each, torch.Tensor))
    assert not any(trace in content for trace in traces) and not torch.isin(head.rows(), gone).any()
    queries = torch.randn(20, D)
    logits = training.model.head(queries)
    assert logits.shape == (20, K) and (logits[:, 2] == UNKNOWN).all() and logits.softmax(1).isfinite().all()
    again = NeighboursHead(per_class=per_class)
    left = table.select((~torch.isin(table.column("row"), gone)).nonzero().flatten())
    if per_class is None:
        assert torch.equal(learn(again, left, [len(left)]).model.head(queries)[:, :2], logits[:, :2])


def test_the_last_row_may_be_given_up_and_a_new_class_arrives_without_rows() -> None:
    head = NeighboursHead()
    training = learn(head, all_rows().select(torch.tensor([1])), [1])
    head.grow_to(K + 3, training)
    assert training.model.head(torch.randn(2, D)).shape == (2, K + 3)
    assert head.erase(head.rows()) == 1
    assert (training.model.head(torch.randn(2, D)) == UNKNOWN).all()


@pytest.mark.parametrize("attached", [True, False])
def test_round_trip_of_the_state_to_the_bit(attached: bool) -> None:
    head, again = NeighboursHead(per_class=40), NeighboursHead(per_class=40)
    training = learn(head, all_rows(), [150, 150])
    head.grow_to(K + 2, training)
    if attached:
        other = TrainingContext(model_of_inputs(), [again], seed=9)
        again.load_state_dict(head.state_dict())
    else:
        again.load_state_dict(head.state_dict())
        other = TrainingContext(model_of_inputs(), [again], seed=9)
    queries = torch.randn(20, D)
    assert torch.equal(training.model.head(queries), other.model.head(queries))
    assert str(head.state_dict()) == str(again.state_dict()) and head.nbytes() == again.nbytes()
    own = 4 * len(head.rows()) + 8 * len(head.closed_form.held.first(K).counts_K)
    assert head.nbytes() == tensor_bytes(head.state_dict()) + own, "what is looked up is there once"


def test_rows_without_ids_are_kept_and_cannot_be_found_again() -> None:
    head = NeighboursHead()
    learn(head, all_rows(), [10])
    held, before = head.closed_form.held, len(head.rows())
    held.add(torch.randn(2, D).double(), torch.tensor([0, -100]))
    assert head.rows().tolist().count(-1) == 1 and len(head.rows()) == before + 1


def test_far_from_the_origin_nothing_is_lost() -> None:
    near = all_rows()
    far = TensorTable({**near.columns, "inputs": near.column("inputs") + 3000.0})
    queries, found = torch.randn(60, D), []
    for table, shift in ((near, 0.0), (far, 3000.0)):
        head = NeighboursHead(normalize=False)
        found.append(learn(head, table, [N]).model.head(queries + shift).exp())
    torch.testing.assert_close(found[0], found[1], atol=0.02, rtol=0.02)


def test_classes_without_a_neighbour_are_told_apart_by_their_nearest_row() -> None:
    """As in the task scenario, where the neighbours may all be rows of other tasks."""
    rows = torch.eye(D)[[0, 0, 0, 1, 2]] + 0.01 * torch.arange(5)[:, None]
    table = TensorTable({"inputs": rows, "labels": torch.tensor([0, 0, 0, 1, 2]), "row": torch.arange(5)})
    head = NeighboursHead(neighbours=2)
    module = learn(head, table, [5]).model.head
    query = torch.eye(D)[:1] + 0.3 * torch.eye(D)[2:3]
    logits = module(query)[0]
    assert logits[0] > logits[2] > logits[1] > UNKNOWN, "class 2 is nearer than class 1"


def test_rows_are_chosen_by_their_ids_only_where_there_are_some() -> None:
    head = NeighboursHead(per_class=2)
    learn(head, all_rows(), [10])
    with pytest.raises(StreamError, match="give them the column 'row', or set per_class: null"):
        head.closed_form.held.add(torch.randn(1, D).double(), torch.tensor([0]))


def test_features_that_are_not_finite_are_refused() -> None:
    head, table = NeighboursHead(), all_rows()
    learn(head, table, [100])
    before = head.rows()
    inputs = table.column("inputs").clone()
    inputs[120] = torch.nan
    broken = TensorTable({**table.columns, "inputs": inputs})
    with pytest.raises(TrainingError, match=r"the features of row 365 are not finite"):
        learn(head, broken.select(torch.arange(100, 200)), [100])
    assert torch.equal(head.rows(), before)
