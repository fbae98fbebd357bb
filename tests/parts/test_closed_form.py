"""Heads without gradients: equal to one computation over all rows, however the rows arrive."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge

from continual import Learner, Strategy
from continual.errors import CompositionError, SpecError, TrainingError
from continual.models.build import build_model
from continual.parts.context import TrainingContext
from continual.parts.head.class_sums import ClassSums
from continual.parts.head.closed_form import UNKNOWN, Familiar
from continual.parts.head.klda import KLDAHead
from continual.parts.head.lift import Lift, filled
from continual.parts.head.nearest_mean import NearestMeanHead
from continual.parts.head.packed import pack, unpack
from continual.parts.head.ridge import CANDIDATES, RidgeHead, choose_strength, ridge_weights
from continual.parts.head.slda import SLDAHead
from continual.state import tensor_bytes
from continual.streams.experience import Experience
from continual.table import TensorTable

D, K, N = 7, 5, 400
HEADS: dict[str, Any] = {
    "nearest-mean": (NearestMeanHead, {}),
    "slda": (SLDAHead, {"shrinkage": 0.01}),
    "klda": (KLDAHead, {"dimension": 30, "bandwidth": 0.7, "shrinkage": 0.02}),
    "ridge": (RidgeHead, {"dimension": 30, "strength": 0.5}),
}


def all_rows(seed: int = 0, rows: int = N) -> TensorTable:
    """Rows in correlated clouds about one mean a class, some of them not counted."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(K, (rows,), generator=generator)
    means, mix = torch.randn(K, D, generator=generator) * 2, torch.randn(D, D, generator=generator)
    inputs = means[labels] + torch.randn(rows, D, generator=generator) @ mix + 1.0
    labels[::17] = -100
    return TensorTable({"inputs": inputs, "labels": labels, "row": torch.arange(rows) * 3 + 5})


def model_of_inputs() -> Any:
    return build_model({"kind": "mlp", "hidden": [], "inputs": D}, objective="classification")


def learn(head: Any, table: Any, sizes: list[int], seed: int = 0) -> TrainingContext:
    """Hand the table over in experiences of ``sizes`` rows."""
    training = TrainingContext(model_of_inputs(), [head], seed=seed)
    start = 0
    for index, size in enumerate(sizes):
        part = table.select(torch.arange(start, start + size))
        classes = tuple(sorted({int(label) for label in part.column("labels") if label >= 0}))
        training.begin(Experience(index, f"e{index}", part, classes=classes))
        training.end()
        start += size
    return training


def counted(table: Any) -> tuple[np.ndarray, np.ndarray]:
    labels = table.column("labels")
    kept = labels >= 0
    return table.column("inputs")[kept].double().numpy(), labels[kept].numpy()


def lifted(head: Any, inputs: np.ndarray) -> np.ndarray:
    """What becomes of rows, written out in numpy."""
    lift = head.closed_form.module.lift
    if lift.normalize:
        inputs = inputs / np.linalg.norm(inputs, axis=1, keepdims=True)
    if lift.dimension is None:
        return inputs
    projected = inputs @ lift.weight.double().numpy()
    if lift.activation == "relu":
        return np.maximum(projected, 0)
    return np.sqrt(2 / lift.dimension) * np.cos(projected + lift.phase.double().numpy())


def slow(head: Any, table: Any, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and familiarity, from all rows at once in float64, row by row and class by class."""
    inputs, labels = counted(table)
    rows, asked = lifted(head, inputs), lifted(head, queries)
    means = [rows[labels == k].mean(0) for k in range(K)]
    if isinstance(head, NearestMeanHead):
        squares = np.array([[((a - m) ** 2).sum() for m in means] for a in asked])
        return -squares, -squares.min(1)
    if isinstance(head, RidgeHead):
        gram = sum(np.outer(r, r) for r in rows) + head.strength * np.eye(rows.shape[1])
        logits = asked @ np.linalg.inv(gram) @ (rows.T @ np.eye(K)[labels])
        return logits, logits.max(1)
    covariance = sum(np.outer(r - means[k], r - means[k]) for r, k in zip(rows, labels, strict=True)) / len(rows)
    s, width = head.settings.shrinkage, rows.shape[1]
    inverse = np.linalg.inv((1 - s) * covariance + s * np.trace(covariance) / width * np.eye(width))
    squares = np.array([[(a - m) @ inverse @ (a - m) for m in means] for a in asked])
    centre = rows.mean(0)
    offset = np.array([(a - centre) @ inverse @ (a - centre) for a in asked])
    return 0.5 * (offset[:, None] - squares), -squares.min(1)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("seed", range(4))
def test_equal_to_all_rows_at_once_in_any_order_and_division(name: str, seed: int) -> None:
    make, settings = HEADS[name]
    head, table = make(**settings), all_rows()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(N, generator=generator)
    cuts = torch.randperm(N - 1, generator=generator)[:seed].sort().values + 1
    sizes = torch.diff(torch.cat([torch.tensor([0]), cuts, torch.tensor([N])])).tolist()
    training = learn(head, table.select(order), sizes)
    queries = torch.randn(50, D, generator=generator) * 3
    module = training.model.head
    logits, familiar = slow(head, table, queries.double().numpy())
    found = module(queries)
    np.testing.assert_allclose(found.numpy(), logits, rtol=1e-3, atol=2e-3)
    assert (found.argmax(1).numpy() == logits.argmax(1)).mean() >= 0.98
    assert isinstance(module, Familiar)
    np.testing.assert_allclose(module.familiarity(queries).numpy(), familiar, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("name", HEADS)
def test_sums_are_equal_to_float64_rounding_in_any_order_and_division(name: str) -> None:
    make, settings = HEADS[name]
    table, found = all_rows(), []
    for order, sizes in ((torch.arange(N), [N]), (torch.randperm(N), [1, 250, 149])):
        head = make(**settings)
        learn(head, table.select(order), sizes)
        found.append(head.closed_form.held)
    assert torch.equal(found[0].counts_K, found[1].counts_K)
    torch.testing.assert_close(found[0].sums_KD, found[1].sums_KD, rtol=1e-12, atol=1e-12)
    if found[0].second_DD is not None:
        torch.testing.assert_close(found[0].second_DD, found[1].second_DD, rtol=1e-12, atol=1e-12)
        assert found[0].second_DD.dtype == torch.float64


@pytest.mark.parametrize("name", HEADS)
def test_memory_does_not_grow_with_the_rows(name: str) -> None:
    make, settings = HEADS[name]
    sizes = []
    for rows in (100, N):
        head = make(**settings)
        training = learn(head, all_rows(rows=rows), [rows])
        sizes.append(head.nbytes())
        assert head.rows().numel() == 0 and not training.parameters()
        held = tensor_bytes(head.state_dict()) + tensor_bytes(training.model.head.solution())
        assert head.nbytes() == held + K
    assert sizes[0] == sizes[1]


def alone(extra: int) -> tuple[TensorTable, TensorTable]:
    """Rows of the classes 0 and 1, one row of class 2 and ``extra`` more of it; and the same without the one row."""
    table = all_rows()
    labels = table.column("labels")
    two = (labels == 2).nonzero().flatten()
    kept = torch.cat([((labels == 0) | (labels == 1)).nonzero().flatten()[:60], two[1 : 1 + extra]])
    return (
        TensorTable(table.select(torch.cat([kept, two[:1]]))[torch.arange(len(kept) + 1)]),
        TensorTable(table.select(kept)[torch.arange(len(kept))]),
    )


@pytest.mark.parametrize("cuts", [[61], [30, 31], [60, 1]], ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_a_class_of_one_row_is_given_up_with_it(name: str, cuts: list[int]) -> None:
    make, settings = HEADS[name]
    head, never = make(**settings), make(**settings)
    whole, without = alone(0)
    training = learn(head, whole, cuts)
    other = learn(never, without, [60])
    never.grow_to(3, other)
    lone = whole.column("row")[-1:]
    assert head.rows().tolist() == lone.tolist() and not len(never.rows())
    row = head.closed_form.held.sums_KD[2].clone()
    assert head.erase(torch.tensor([1, 2])) == 0 == head.erase(whole.column("row")[:5]), "sums of several rows stay"
    assert head.erase(torch.cat([lone, torch.tensor([1])])) == 1 and head.erase(lone) == 0 == len(head.rows())
    sums, wanted = head.closed_form.held, never.closed_form.held
    assert torch.equal(sums.counts_K, wanted.counts_K) and not sums.sums_KD[2].any()
    torch.testing.assert_close(sums.sums_KD, wanted.sums_KD, rtol=1e-12, atol=1e-12)
    if sums.second_DD is not None:
        torch.testing.assert_close(sums.second_DD, wanted.second_DD, rtol=1e-10, atol=1e-10)
    queries = torch.randn(30, D) * 3
    found = training.model.head(queries)
    assert (found[:, 2] == UNKNOWN).all()
    torch.testing.assert_close(found, other.model.head(queries), rtol=1e-4, atol=1e-4)
    content = b"".join(
        one.numpy().tobytes() for one in [*tensors_in(head.state_dict()), *training.model.head.solution().values()]
    )
    assert not any(pair.numpy().tobytes() in content for pair in [row[:2], row[:2].float(), lone])
    assert not torch.equal(row[:2], torch.zeros(2)), "the test can fail"
    again = make(**settings)
    again.load_state_dict(head.state_dict())
    assert torch.equal(again.closed_form.module(queries), found)


def test_the_last_row_of_all_may_be_given_up() -> None:
    for make, settings in HEADS.values():
        head = make(**settings)
        training = learn(head, all_rows().select(torch.tensor([1])), [1])
        assert head.erase(head.rows()) == 1
        module = training.model.head
        assert (module(torch.randn(2, D)) == UNKNOWN).all() and not module.solution()
        assert {name.split(".")[0] for name, _ in module.named_buffers()} <= {"known", "lift"}


@pytest.mark.parametrize("together", [True, False])
def test_two_rows_of_a_class_are_a_sum(together: bool) -> None:
    whole, _ = alone(1)
    head = NearestMeanHead()
    training = learn(head, whole, [62] if together else [61, 1])
    assert not len(head.rows()) and head.erase(whole.column("row")) == 0
    assert int(head.closed_form.held.counts_K[2]) == 2
    again = NearestMeanHead()
    learn(again, whole, [61])
    first = again.rows()
    assert len(first) == 1
    again.closed_form.held.add(torch.randn(1, D, dtype=torch.float64), torch.tensor([2]))
    assert not len(again.rows()), "a second row without an id makes a sum too"
    assert training.model.head is head.closed_form.module


def tensors_in(state: Any) -> list[torch.Tensor]:
    if isinstance(state, dict):
        return [tensor for value in state.values() for tensor in tensors_in(value)]
    return [state] if isinstance(state, torch.Tensor) else []


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("name", [*HEADS, "held-out"])
def test_round_trip_of_the_state_to_the_bit(name: str, attached: bool) -> None:
    make, settings = HEADS["ridge" if name == "held-out" else name]
    if name == "held-out":
        settings = {"dimension": 30}
    table = all_rows()
    head, again = make(**settings), make(**settings)
    training = learn(head, table, [150, 150])
    head.grow_to(K + 2, training)
    if attached:
        other = TrainingContext(model_of_inputs(), [again], seed=9)
        again.load_state_dict(head.state_dict())
    else:
        again.load_state_dict(head.state_dict())
        other = TrainingContext(model_of_inputs(), [again], seed=9)
    queries = torch.randn(20, D) * 3
    assert training.model.head(queries).shape == (20, K + 2)
    other.randomness.seed = training.randomness.seed
    for step in range(2):
        ours, theirs = training.model.head, other.model.head
        assert torch.equal(ours(queries), theirs(queries))
        assert torch.equal(ours.familiarity(queries), theirs.familiarity(queries))
        assert str(head.state_dict()) == str(again.state_dict()) and head.nbytes() == again.nbytes()
        if step == 0:
            last = Experience(2, "last", table.select(torch.arange(300, N)), classes=tuple(range(K)))
            for each in (training, other):
                each.begin(last)
                each.end()


@pytest.mark.parametrize(
    ("make", "one", "other"),
    [
        (SLDAHead, {}, {"shrinkage": 0.5}),
        (SLDAHead, {}, {"normalize": False}),
        (KLDAHead, {"dimension": 20}, {"dimension": 21}),
        (KLDAHead, {"dimension": 20}, {"dimension": 20, "bandwidth": 1.0}),
        (KLDAHead, {"dimension": 20}, {"dimension": 20, "shrinkage": 0.5}),
        (KLDAHead, {"dimension": 20}, {"dimension": 20, "normalize": False}),
        (RidgeHead, {"dimension": 20, "strength": 1.0}, {"dimension": 20, "strength": 10.0}),
        (RidgeHead, {"dimension": 20, "strength": 1.0}, {"dimension": 20, "strength": "held-out"}),
        (RidgeHead, {"dimension": 20}, {"dimension": 21}),
        (RidgeHead, {"dimension": 20}, {"dimension": 20, "normalize": False}),
        (RidgeHead, {"dimension": 20}, {"dimension": 20, "projection": "orthogonal"}),
        (RidgeHead, {"dimension": 20}, {"dimension": 20, "center": True}),
    ],
)
def test_every_setting_changes_the_logits(make: Any, one: dict[str, Any], other: dict[str, Any]) -> None:
    queries = torch.randn(20, D)
    first, second = (learn(make(**settings), all_rows(), [N]).model.head(queries) for settings in (one, other))
    assert not torch.allclose(first, second, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (SLDAHead, {"shrinkage": 0.0}),
        (KLDAHead, {"bandwidth": 0.0}),
        (KLDAHead, {"dimension": 0}),
        (RidgeHead, {"strength": 0.0}),
        (RidgeHead, {"strength": "test"}),
    ],
)
def test_impossible_settings_are_refused(make: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        make(**settings)


def test_slda_is_the_linear_discriminant_analysis_of_scikit_learn() -> None:
    table = all_rows()
    head = SLDAHead(shrinkage=0.2, normalize=False)
    module = learn(head, table, [200, 200]).model.head
    inputs, labels = counted(table)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.2, priors=np.bincount(labels) / len(labels))
    theirs.fit(inputs, labels)
    asked = all_rows(seed=1).column("inputs")
    wanted = theirs.decision_function(asked.double().numpy()) - np.log(np.bincount(labels) / len(labels))
    wanted -= wanted.mean(1, keepdims=True)
    found = module(asked).double().numpy()
    np.testing.assert_allclose(found - found.mean(1, keepdims=True), wanted, rtol=1e-3, atol=2e-3)


def test_ridge_is_that_of_scikit_learn_on_the_lifted_rows() -> None:
    table, head = all_rows(), RidgeHead(dimension=25, strength=3.0)
    module = learn(head, table, [100, 300]).model.head
    inputs, labels = counted(table)
    theirs = Ridge(alpha=3.0, fit_intercept=False).fit(lifted(head, inputs), np.eye(K)[labels])
    asked = all_rows(seed=1).column("inputs")
    wanted = theirs.predict(lifted(head, asked.double().numpy()))
    np.testing.assert_allclose(module(asked).numpy(), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("projection", "features"), [("gaussian", D), ("orthogonal", 200)])
def test_fourier_features_have_the_gaussian_kernel_as_inner_product(projection: Any, features: int) -> None:
    lift = Lift(normalize=False, dimension=40_000, activation="fourier", bandwidth=1.5, projection=projection)
    lift.draw(features, torch.Generator().manual_seed(0))
    rows = torch.randn(12, features, dtype=torch.float64) * (D / features) ** 0.5
    kernel = torch.exp(-torch.cdist(rows, rows).square() / (2 * 1.5**2))
    torch.testing.assert_close(lift(rows) @ lift(rows).T, kernel, rtol=0, atol=0.03)


@pytest.mark.parametrize("features", [1, 2, 5, 8, 20])
def test_the_orthogonal_projection_is_a_product_of_matrices(features: int) -> None:
    lift = Lift(normalize=False, dimension=2 * filled(features) - 1, projection="orthogonal")
    lift.draw(features, torch.Generator().manual_seed(0))
    width = filled(features)
    turn = torch.from_numpy(scipy.linalg.hadamard(width)).double() / width**0.5
    blocks = []
    for block in lift.weight.double():
        product = torch.eye(width, dtype=torch.float64)
        for sign in block:
            product = product @ torch.diag(sign) @ turn
        torch.testing.assert_close(product @ product.T, torch.eye(width, dtype=torch.float64))
        blocks.append(width**0.5 * product)
    rows = torch.randn(6, features, dtype=torch.float64)
    wanted = (torch.nn.functional.pad(rows, (0, width - features)) @ torch.cat(blocks, 1))[:, : 2 * width - 1]
    torch.testing.assert_close(lift(rows), wanted.relu())
    assert lift.weight.dtype == torch.int8 and lift.weight.numel() == (3 if features == 1 else 6) * width


def test_rows_are_centred_by_the_first_experience_alone() -> None:
    table = all_rows()
    head = RidgeHead(dimension=25, strength=3.0, center=True)
    module = learn(head, table, [100, 300]).model.head
    rows = torch.nn.functional.normalize(table.column("inputs"), dim=1)
    labelled = table.column("labels")[:100] >= 0
    mean = rows[:100][labelled].double().mean(0)
    torch.testing.assert_close(module.lift.mean.double(), mean, rtol=1e-5, atol=1e-6)
    lifted_rows = torch.nn.functional.normalize(rows - mean.float(), dim=1) @ module.lift.weight
    torch.testing.assert_close(module.lift(table.column("inputs")), lifted_rows.relu(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 6, 7])
def test_a_packed_matrix_is_half_as_large_and_comes_back(size: int) -> None:
    rows = torch.randn(9, size, dtype=torch.float64)
    whole = rows.T @ rows
    packed = pack(whole)
    even = size + size % 2
    assert packed.numel() == even * (even + 1) // 2
    torch.testing.assert_close(unpack(packed, size), whole)
    assert torch.equal(unpack(pack(unpack(packed, size)), size), unpack(packed, size))


@pytest.mark.parametrize("make", [KLDAHead, RidgeHead])
def test_random_features_come_from_the_seed_alone(make: Any) -> None:
    before = torch.get_rng_state()
    drawn = []
    for seed in (0, 0, 1):
        head = make(dimension=10)
        learn(head, all_rows(), [100, 100], seed=seed)
        drawn.append(head.closed_form.module.lift.weight)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_held_out_strength_is_the_one_of_a_slow_search_over_rows() -> None:
    table = all_rows()
    head = RidgeHead(dimension=30)
    learn(head, table, [N])
    inputs, labels = counted(table)
    rows, targets = lifted(head, inputs), np.eye(K)[labels]
    generator = np.random.default_rng(0)
    held = generator.random(len(rows)) < 0.2
    total, out = ClassSums(second=True), ClassSums(second=True)
    for sums, kept in ((total, np.ones(len(rows), bool)), (out, held)):
        sums.grow(K, 30)
        sums.add(torch.from_numpy(rows[kept]), torch.from_numpy(labels[kept]))
    unit = np.trace(rows.T @ rows) / 30
    errors = []
    for candidate in CANDIDATES:
        gram = rows[~held].T @ rows[~held] + candidate * unit * np.eye(30)
        weights = np.linalg.solve(gram, rows[~held].T @ targets[~held])
        errors.append(((rows[held] @ weights - targets[held]) ** 2).sum())
    assert choose_strength(total, out) == pytest.approx(CANDIDATES[int(np.argmin(errors))] * unit)
    assert head.strength is not None and any(head.strength == pytest.approx(c * unit, rel=0.2) for c in CANDIDATES)
    assert choose_strength(total, ClassSums(second=True)) is None and choose_strength(total, total) is None


def test_held_out_rows_are_training_rows_whatever_their_order() -> None:
    table, strengths = all_rows(), []
    for order in (torch.arange(N), torch.randperm(N)):
        head = RidgeHead(dimension=30)
        training = TrainingContext(model_of_inputs(), [head], seed=0)
        garbage = TensorTable(
            {"inputs": torch.full((3, D), torch.nan), "labels": torch.zeros(3).long(), "row": torch.arange(3)}
        )
        experience = Experience(0, "e", table.select(order), valid=garbage, test=garbage, classes=tuple(range(K)))
        training.begin(experience)
        training.end()
        strengths.append(head.strength)
    assert strengths[0] == pytest.approx(strengths[1], rel=1e-12)


def test_noisy_rows_get_a_larger_strength_than_clean_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (300,), generator=generator)
    clean = torch.nn.functional.one_hot(labels, D).float() + 0.01 * torch.randn(300, D, generator=generator)
    noise = torch.randn(300, D, generator=generator)
    found = []
    for inputs in (clean, noise):
        head = RidgeHead(dimension=200)
        learn(head, TensorTable({"inputs": inputs, "labels": labels, "row": torch.arange(300)}), [300])
        found.append(head.strength)
    assert found[0] < found[1]


def test_one_row_alone_still_has_a_strength() -> None:
    head = RidgeHead(dimension=10)
    module = learn(head, all_rows().select(torch.tensor([1])), [1]).model.head
    assert head.strength is not None and head.strength > 0
    assert torch.isfinite(module(torch.randn(3, D))).all()


def test_a_strength_that_float64_cannot_solve_is_refused_in_one_sentence() -> None:
    assert ridge_weights(-torch.eye(3, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64), 0.5) is None
    head = RidgeHead(dimension=60, strength=1e-30)
    with pytest.raises(TrainingError, match="raise strength"):
        learn(head, all_rows().select(torch.arange(10)), [10])


@pytest.mark.parametrize("make", [SLDAHead, KLDAHead])
def test_one_row_a_class_makes_it_the_nearest_mean(make: Any) -> None:
    rows = torch.tensor([1, 2, 3, 4, 5, 6])
    table = all_rows().select(rows)
    labels = torch.arange(6)
    table = TensorTable({"inputs": table.column("inputs"), "labels": labels, "row": labels})
    head = make()
    module = learn(head, table, [6]).model.head
    asked = torch.randn(30, D)
    _, means = lifted(head, asked.double().numpy()), lifted(head, table.column("inputs").double().numpy())
    nearest = ((lifted(head, asked.double().numpy())[:, None] - means[None]) ** 2).sum(2).argmin(1)
    assert torch.isfinite(module(asked)).all()
    assert (module(asked).argmax(1).numpy() == nearest).mean() > 0.95


@pytest.mark.parametrize("name", HEADS)
def test_classes_without_rows_are_never_chosen_and_nothing_known_is_nothing_familiar(name: str) -> None:
    make, settings = HEADS[name]
    head = make(**settings)
    training = TrainingContext(model_of_inputs(), [head])
    table = all_rows()
    only = (table.column("labels") == 3).nonzero().flatten()
    training.begin(Experience(0, "e", table.select(only), classes=(0, 3)))
    module, asked = training.model.head, torch.randn(9, D)
    assert torch.equal(module(asked), torch.full((9, 4), UNKNOWN))
    assert torch.equal(module.familiarity(asked), torch.full((9,), UNKNOWN))
    training.end()
    assert (module(asked).argmax(1) == 3).all() and torch.isfinite(module(asked)).all()
    assert (module.familiarity(asked) > UNKNOWN / 2).all()


@pytest.mark.parametrize("name", HEADS)
def test_rows_like_those_learnt_are_more_familiar(name: str) -> None:
    make, settings = HEADS[name]
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(2).repeat(100)
    inputs = torch.nn.functional.one_hot(labels, D) * 4 + torch.randn(200, D, generator=generator) * 0.3
    table = TensorTable({"inputs": inputs, "labels": labels, "row": torch.arange(200)})
    module = learn(make(**settings), table, [200]).model.head
    strange = torch.nn.functional.one_hot(labels + 3, D) * 4 + torch.randn(200, D, generator=generator) * 0.3
    known, other = module.familiarity(inputs), module.familiarity(strange)
    assert (known[:, None] > other[None]).double().mean() > 0.95


@pytest.mark.parametrize("name", HEADS)
def test_autocast_leaves_the_scores_in_float32(name: str) -> None:
    make, settings = HEADS[name]
    module = learn(make(**settings), all_rows(), [N]).model.head
    asked = torch.randn(9, D)
    with torch.autocast("cpu", torch.bfloat16):
        inside, familiar = module(asked), module.familiarity(asked)
    assert torch.equal(inside, module(asked)) and torch.equal(familiar, module.familiarity(asked))


@pytest.mark.parametrize("name", HEADS)
def test_a_backbone_that_trains_on_is_refused(name: str) -> None:
    make, settings = HEADS[name]
    parts: list[Any] = [make(**settings)]
    with pytest.raises(CompositionError, match="backbone: frozen"):
        Strategy(*parts)
    with pytest.raises(CompositionError, match="take data: experience"):
        Strategy(*parts, backbone="frozen", data="cumulative")
    Strategy(*parts, backbone="frozen")
    head = make(**settings)
    training = TrainingContext(
        build_model({"kind": "mlp", "hidden": [6], "inputs": D}, objective="classification"), [head]
    )
    table = all_rows()
    training.begin(Experience(0, "e", table, classes=tuple(range(K))))
    training.end()
    with pytest.raises(CompositionError, match="no longer fit"):
        training.begin(Experience(1, "f", table, classes=tuple(range(K))))


@pytest.mark.parametrize(
    "other", [{"penalty": {"kind": "ewc"}}, {"replay": {"kind": "rehearsal"}}, {"replay": {"kind": "gaussian"}}]
)
@pytest.mark.parametrize("name", HEADS)
def test_parts_that_need_a_head_with_gradients_are_refused(name: str, other: dict[str, Any]) -> None:
    with pytest.raises(CompositionError, match="cannot be combined"):
        Strategy.load({"head": {"kind": name}, "backbone": "frozen", **other})


def test_predict_says_how_familiar_rows_are() -> None:
    table = all_rows()
    kept = table.select((table.column("labels") >= 0).nonzero().flatten())
    learner = Learner({"kind": "mlp", "hidden": []}, "slda", device="cpu", progress=False)
    learner.update((kept.column("inputs"), kept.column("labels")))
    found = learner.predict(torch.cat([kept.column("inputs"), torch.full((1, D), -50.0)]))
    assert found["familiar"].shape == (len(kept) + 1,) and found["familiar"].dtype == torch.float32
    assert found["familiar"][:-1].median() > found["familiar"][-1]
    naive = Learner({"kind": "mlp", "hidden": []}, "naive", device="cpu", progress=False)
    naive.update((kept.column("inputs"), kept.column("labels")))
    assert "familiar" not in naive.predict(kept.column("inputs"))
