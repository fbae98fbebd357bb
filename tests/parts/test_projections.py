"""A-GEM, GEM and OGD against their definitions, written out row by row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loop_bench import close, experience, growing_model, looped, make, plain_model, step, train, values
from peft import LoraConfig, get_peft_model
from penalty_bench import FakeContext, Wrapped
from torch import Tensor, nn
from torch.nn import functional as F

from continual import Strategy
from continual.errors import CompositionError, SpecError, TrainingError
from continual.parts.context import TrainingContext
from continual.parts.projection.gem import dual
from continual.parts.projection.memory_gradient import memory_gradient
from continual.state import load_state, save_state
from continual.table import Batch, TensorTable

Values = dict[str, Tensor]
TASKS = (experience(0), experience(1, classes=(1, 2)), experience(2, classes=(0, 3)))


@pytest.fixture(autouse=True)
def _own_draws() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        yield


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def gradient(model: nn.Module, batch: Batch) -> Tensor:
    """Of the mean loss, added up row by row in eval mode, flat."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    total = torch.zeros(sum(p.numel() for p in model.parameters()))
    for row in range(len(batch["labels"])):
        logits = model({name: column[row : row + 1] for name, column in batch.items()}).logits
        loss = F.cross_entropy(logits, batch["labels"][row : row + 1])
        total += flat(torch.autograd.grad(loss, [*model.parameters()])) / len(batch["labels"])
    for module, flag in flags.items():
        module.training = flag
    return total


def set_gradient(model: nn.Module, vector: Tensor) -> None:
    for p, part in zip(model.parameters(), vector.split([p.numel() for p in model.parameters()]), strict=True):
        p.grad = part.view_as(p).clone()


def edited(loop: TrainingContext, vector: Tensor) -> Tensor:
    """What ``edit_gradients`` makes of a gradient."""
    set_gradient(loop.model, vector)
    loop.edit_gradients()
    return flat(p.grad for p in loop.model.parameters() if p.grad is not None)


def learnt(part: Any, tasks: int = 1, **options: Any) -> TrainingContext:
    """A loop in the middle of the experience after ``tasks`` others."""
    loop = looped(part, **{"model": plain_model(), "competition": "all", **options})
    for task in TASKS[:tasks]:
        train(loop, task)
    loop.begin(TASKS[tasks], steps=3)
    return loop


def held_by(part: Any, group: int | None = None) -> Batch:
    episodes = part.store
    places = torch.arange(len(episodes))
    if group is not None:
        places = places[episodes.selection.groups_N == group]
    return episodes.memory.batch(places)


def test_agem_takes_out_what_points_against_the_memory() -> None:
    part = make("agem", capacity=9, rows=9, epsilon=1e-5)
    loop = learnt(part)
    r = gradient(loop.model, held_by(part))
    for _ in range(4):
        g = torch.randn_like(r)
        g = g if g @ r < 0 else -g
        expected = g - (g @ r) / (r @ r + 1e-5) * r
        got = edited(loop, g)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
        assert float(got @ r) > -1e-3 * float(g.norm() * r.norm())
        assert torch.equal(edited(loop, -g), -g)


def test_agem_looks_at_other_rows_every_step() -> None:
    part = make("agem", capacity=12, rows=4)
    loop = learnt(part)
    g = torch.randn(sum(p.numel() for p in loop.model.parameters()))
    found = [edited(loop, -10 * g) for _ in range(2)] + [edited(loop, 10 * g) for _ in range(2)]
    assert any(not torch.equal(found[i], found[j]) for i, j in ((0, 1), (2, 3)))
    assert part.cycle.position in (4, 12)


@pytest.mark.parametrize("select", ["reservoir", "class-balanced", "experience-balanced"])
def test_what_agem_keeps(select: str) -> None:
    part = make("agem", capacity=8, select=select)
    loop = looped(part, model=plain_model(), competition="all")
    for task in TASKS:
        train(loop, task)
    memory, labels = part.rows(), held_by(part)["labels"]
    assert len(memory) == 8 == len(set(memory.tolist()))
    if select == "experience-balanced":
        assert sorted((memory // 1000).bincount().tolist()) == [2, 3, 3]
    if select == "class-balanced":
        assert labels.bincount().tolist() == [2, 2, 2, 2]
    assert part.erase(memory[:2]) == 2 and not torch.isin(memory[:2], part.rows()).any()


def test_class_balanced_needs_classes() -> None:
    part = make("agem", select="class-balanced")
    loop = looped(part, model=plain_model(), competition="all")
    task = experience(0, classes=(-100, 1))
    with pytest.raises(CompositionError, match="one class a row"):
        loop.begin(task)


@pytest.mark.parametrize("kind", ["agem", "gem"])
def test_memory_passes_leave_everything_else_alone(kind: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        inner = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 4))
    part = make(kind)
    loop = learnt(part, model=Wrapped(inner).train())
    inner[2].eval()
    buffers = {name: buffer.clone() for name, buffer in inner.named_buffers()}
    vector = torch.randn(sum(p.numel() for p in inner.parameters()))
    drawn = torch.get_rng_state()
    edited(loop, vector)
    assert torch.equal(drawn, torch.get_rng_state())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in inner.named_buffers())
    assert inner[0].training and not inner[2].training


@pytest.mark.parametrize("kind", ["agem", "gem"])
def test_memory_passes_are_in_the_precision_of_the_run(kind: str) -> None:
    seen = []

    def low() -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16)

    part = make(kind)
    loop = learnt(part, autocast=low)
    loop.model.inner[2].register_forward_hook(lambda m, a, output: seen.append(output.dtype))
    edited(loop, torch.randn(sum(p.numel() for p in loop.model.parameters())))
    assert seen and set(seen) == {torch.bfloat16}
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in loop.model.parameters())


@pytest.mark.parametrize("kind", ["agem", "gem"])
def test_rows_weigh_what_they_say(kind: str) -> None:
    part = make(kind)
    loop = looped(part, model=plain_model(), competition="all")
    table = TASKS[0].train
    columns: Any = {name: table.column(name) for name in table.names}
    weight = torch.tensor([0.0, 1.0]).repeat(6)
    train(loop, replace(TASKS[0], train=TensorTable({**columns, "weight": weight})))
    held = held_by(part)
    counted = {name: column[held["weight"] > 0] for name, column in held.items()}
    found = memory_gradient(loop, part.store.memory, torch.arange(12), list(loop.model.parameters()))
    torch.testing.assert_close(flat(found), gradient(loop.model, counted), rtol=1e-4, atol=1e-6)


@given(st.integers(1, 5), st.integers(1, 7), st.sampled_from([0.0, 0.5, 2.0]), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_the_dual_meets_the_conditions_of_its_minimum(t: int, size: int, margin: float, seed: int) -> None:
    """Karush, Kuhn and Tucker: feasible, gradient ≥ 0, and zero wherever v is above the margin; G may be singular."""
    random = np.random.default_rng(seed)
    G, g = random.normal(size=(t, size)) * 10.0 ** random.integers(-3, 3), random.normal(size=size)
    gram = G @ G.T
    epsilon = 10.0 ** random.integers(-6, 1)
    v = dual(gram, G @ g, margin, epsilon)
    slope = (gram + epsilon * np.eye(t)) @ v + G @ g
    scale = float(np.abs(gram).max() * max(np.abs(v).max(), 1) + np.abs(G @ g).max())
    assert (v >= margin - 1e-12).all()
    assert (slope >= -1e-5 * scale).all()
    assert (np.abs((v - margin) * slope) <= 1e-5 * scale * max(np.abs(v).max(), 1)).all()


def test_the_dual_is_that_of_the_program_that_avalanche_solves() -> None:
    import quadprog

    random = np.random.default_rng(0)
    for t in (1, 3, 8):
        G, g = random.normal(size=(t, 40)), random.normal(size=40)
        K = G @ G.T + 1e-3 * np.eye(t)
        wanted, *_ = quadprog.solve_qp(K, -(G @ g), np.eye(t), np.full(t, 0.5))
        np.testing.assert_allclose(dual(G @ G.T, G @ g, 0.5, 1e-3), wanted, rtol=1e-7, atol=1e-9)


def test_the_dual_of_nothing_and_of_a_memory_learnt_by_heart() -> None:
    assert (dual(np.zeros((2, 2)), np.zeros(2), 0.5, 1e-3) == 0.5).all()
    G = 1e-7 * np.random.default_rng(0).normal(size=(6, 40))
    v = dual(G @ G.T, G @ -np.ones(40), 0.5, 1e-3)
    assert v.min() == 0.5 and v.max() < 0.6, "gradients that are noise do not bind"


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_gem_is_the_nearest_gradient_that_works_against_no_experience(margin: float) -> None:
    from scipy.optimize import minimize

    part = make("gem", capacity=10, margin=margin, epsilon=1e-9)
    loop = learnt(part, tasks=2)
    G = torch.stack([gradient(loop.model, held_by(part, group)) for group in (0, 1)])
    projected = 0
    for _ in range(6):
        g = torch.randn(G.shape[1]) - G.sum(0) * float(torch.rand(()) * 3)
        got = edited(loop, g)
        if bool((G @ g >= 0).all()):
            assert torch.equal(got, g)
            continue
        projected += 1
        gram, dots = (G @ G.T).double().numpy(), (G @ g).double().numpy()
        slow = minimize(
            lambda v, K=gram, c=dots: 0.5 * v @ K @ v + c @ v,
            np.full(2, margin + 0.1),
            jac=lambda v, K=gram, c=dots: K @ v + c,
            bounds=[(margin, None)] * 2,
            method="L-BFGS-B",
            options={"ftol": 1e-15, "gtol": 1e-12},
        )
        torch.testing.assert_close(got, g + torch.tensor(slow.x).float() @ G, rtol=1e-3, atol=1e-4)
        assert bool((G @ got >= -1e-3 * G.norm(dim=1) * g.norm()).all())
    assert projected


def test_gem_shares_its_memory_among_experiences_and_needs_no_classes() -> None:
    part = make("gem", capacity=10)
    loop = looped(part, model=plain_model(), competition="all")
    sizes = []
    for task in TASKS:
        train(loop, task)
        sizes.append(sorted((part.rows() // 1000).bincount().tolist()))
    assert sizes == [[10], [5, 5], [3, 3, 4]]


def test_gem_says_that_a_gradient_is_not_finite() -> None:
    loop = learnt(make("gem"))
    with pytest.raises(TrainingError, match="not finite"):
        edited(loop, torch.full((sum(p.numel() for p in loop.model.parameters()),), torch.nan))


@pytest.mark.parametrize("kind", ["agem", "gem", "ogd"])
def test_a_gradient_that_is_not_there_counts_as_zero(kind: str) -> None:
    loop = learnt(make(kind))
    g = torch.randn(sum(p.numel() for p in loop.model.parameters()))
    size = loop.model.inner[0].weight.numel()
    for vector in (g, -g):
        vector = torch.cat([torch.zeros(size), vector[size:]])
        state = [part.state_dict() for part in loop.parts]
        expected = edited(loop, vector)
        for part, before in zip(loop.parts, state, strict=True):
            part.load_state_dict(before)
        set_gradient(loop.model, vector)
        loop.model.inner[0].weight.grad = None
        loop.edit_gradients()
        got = flat(torch.zeros_like(p) if p.grad is None else p.grad for p in loop.model.parameters())
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def slow_basis(model: nn.Module, batch: Batch, logits: str, basis: list[Tensor]) -> list[Tensor]:
    """Gram-Schmidt over the gradients of logits, row by row."""
    basis = list(basis)
    model.eval()
    for row in range(len(batch["labels"])):
        logits_K = model({name: column[row : row + 1] for name, column in batch.items()}).logits[0]
        label = int(batch["labels"][row])
        wanted = {"true": [logits_K[label]], "mean": [logits_K.mean()], "all": list(logits_K)}[logits]
        for logit in wanted:
            v = flat(torch.autograd.grad(logit, [*model.parameters()], retain_graph=True)).double()
            size = v.norm()
            for _ in range(3):
                for direction in basis:
                    v = v - (v @ direction) * direction
            if v.norm() > 1e-4 * size:
                basis.append(v / v.norm())
    model.train()
    return basis


def projector(basis: Tensor) -> Tensor:
    return basis.T @ basis


@pytest.mark.parametrize("logits", ["true", "mean", "all"])
def test_ogd_spans_what_gram_schmidt_spans(logits: str) -> None:
    part = make("ogd", logits=logits, rows=5)
    loop = looped(part, model=plain_model(), competition="all")
    expected: list[Tensor] = []
    for task in TASKS[:2]:
        generator = loop.randomness.generator("ogd")
        state = generator.get_state()
        train(loop, task)
        after = generator.get_state()
        generator.set_state(state)
        (batch,) = loop.batches(task.train, limit=5, generator=generator)
        generator.set_state(after)
        expected = slow_basis(loop.model, batch, logits, expected)
        V = torch.cat([part.basis[name].flatten(1) for name in loop.parameters()], 1)
        assert V.shape[0] == len(expected) > 0
        torch.testing.assert_close(V @ V.T, torch.eye(len(V)), rtol=0, atol=1e-5)
        torch.testing.assert_close(projector(V), projector(torch.stack(expected).float()), rtol=0, atol=2e-3)
    g = torch.randn(V.shape[1])
    loop.begin(TASKS[2], steps=1)
    torch.testing.assert_close(edited(loop, g), g - projector(V) @ g, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
def test_ogd_keeps_every_step_orthogonal_whatever_the_optimiser(optimizer: str) -> None:
    part = make("ogd", rows=6)
    loop = looped(part, model=plain_model(), competition="all", momentum=0.9 if optimizer == "momentum" else 0.0)
    if optimizer == "adamw":
        loop.optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=0.05, weight_decay=0.1)
    train(loop, TASKS[0])
    V = torch.cat([part.basis[name].flatten(1) for name in loop.parameters()], 1)
    loop.begin(TASKS[1], steps=3)
    for index in torch.arange(12).split(4):
        before = flat(loop.model.parameters())
        step(loop, TASKS[1].train[index])
        moved = flat(loop.model.parameters()) - before
        assert moved.norm() > 1e-3
        assert (V @ moved).norm() < 1e-4 * moved.norm()


def test_ogd_leaves_old_logits_to_first_order_where_they_are() -> None:
    changes = []
    for rows in (12, 1):
        loop = learnt(make("ogd", rows=rows))
        old, places = TASKS[0].train[torch.arange(12)], torch.arange(12)
        loop.optimizer.param_groups[0]["lr"] = 1e-3  # type: ignore[union-attr]
        with torch.no_grad():
            before = loop.forward(old).logits[places, old["labels"]]
        step(loop, TASKS[1].train[torch.arange(12)])
        with torch.no_grad():
            changes.append(float((loop.forward(old).logits[places, old["labels"]] - before).abs().max()))
    assert changes[0] < 0.02 * changes[1]


def test_ogd_keeps_the_leading_directions() -> None:
    whole, some = make("ogd", rows=6), make("ogd", rows=6, directions=2)
    for part in (whole, some):
        train(looped(part, model=plain_model(), competition="all"), TASKS[0])
    one, two = (torch.cat([t.flatten(1) for t in part.basis.values()], 1) for part in (whole, some))
    assert len(two) == 2 < len(one) == 6
    torch.testing.assert_close(one[:2], two)


def test_ogd_follows_a_head_that_grows() -> None:
    part = make("ogd", rows=6)
    loop = looped(part, model=growing_model())
    train(loop, experience(0))
    before = {name: tensor.clone() for name, tensor in part.basis.items()}
    loop.begin(experience(1), steps=1)
    step(loop, experience(1).train[torch.arange(4)])
    for name, tensor in part.basis.items():
        old = before[name]
        assert torch.equal(tensor[:, : old.shape[1]], old) and not tensor[:, old.shape[1] :].any()
    assert part.basis["head.weight"].shape[1] == 4
    loop.end()
    V = torch.cat([tensor.flatten(1) for tensor in part.basis.values()], 1)
    torch.testing.assert_close(V @ V.T, torch.eye(len(V)), rtol=0, atol=1e-5)


def test_ogd_refuses_what_it_cannot_follow() -> None:
    plain = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    context: Any = FakeContext(Wrapped(get_peft_model(plain, LoraConfig(r=2, target_modules=["0"]))))
    context.model.adapter_replaced = True
    part = make("ogd")
    part.attach(context)
    with pytest.raises(CompositionError, match="take projection 'agem' or 'gem'"):
        part.begin(context, TASKS[0])
    loop = learnt(make("ogd"))
    loop.model.inner[2] = nn.Linear(5, 2)
    loop._parameters = None
    loop.parts[0].attach(loop)
    with pytest.raises(CompositionError, match="grow along their first axis only"):
        loop.edit_gradients()


@pytest.mark.parametrize("logits", ["true", "all"])
def test_ogd_gives_up_the_directions_of_one_row_alone(logits: str) -> None:
    """Such a direction of a first layer is the row itself, but for a factor."""
    part = make("ogd", logits=logits, rows=1)
    loop = looped(part, model=plain_model(), competition="all")
    for task in TASKS[:2]:
        train(loop, task)
    table = TASKS[0].train
    one = int(part.rows()[torch.isin(part.rows(), table.column("row"))])
    x = table[(table.column("row") == one).nonzero().flatten()]["inputs"][0]

    def likeness() -> float:
        rows = part.basis["inner.0.weight"].flatten(0, 1)
        found = (rows @ x).abs() / (torch.linalg.vector_norm(rows, dim=1).clamp(min=1e-12) * x.norm())
        return float(found.max())

    assert len(part.rows()) == 2 and likeness() > 0.99999
    directions, before = len(part.of_N), part.nbytes()
    assert (directions > 2) == (logits == "all")
    other = part.rows()[part.rows() != one]
    left = {name: tensor[part.of_N == other] for name, tensor in part.basis.items()}
    assert part.erase(torch.tensor([5, 10**9])) == 0 and part.erase(torch.tensor([one])) == 1
    assert likeness() < 0.9999 and part.rows().tolist() == other.tolist() and part.nbytes() < before
    assert all(torch.equal(part.basis[name], tensor) for name, tensor in left.items())
    twin = make("ogd", logits=logits, rows=1)
    twin.load_state_dict(part.state_dict())
    assert torch.equal(twin.rows(), other)
    train(loop, TASKS[2])
    assert len(part.rows()) == 2
    assert part.erase(part.rows()) == 2 and not part.basis and not len(part.rows())
    train(loop, TASKS[0])
    assert len(part.rows()) == 1


def test_ogd_keeps_the_directions_that_several_rows_gave() -> None:
    part = make("ogd", rows=2)
    loop = looped(part, model=plain_model(), competition="all")
    train(loop, TASKS[0])
    assert len(part.of_N) == 2 and not len(part.rows()) and part.erase(TASKS[0].train.column("row")) == 0


def test_ogd_says_that_a_gradient_is_not_finite() -> None:
    part = make("ogd")
    loop = looped(part, model=plain_model(), competition="all")
    loop.begin(TASKS[0], steps=1)
    with torch.no_grad():
        loop.model.inner[2].weight[0, 0] = torch.nan
    with pytest.raises(TrainingError, match="logits is not finite"):
        loop.end()
    assert not part.basis


@pytest.mark.parametrize("kind", ["agem", "gem", "ogd"])
def test_cut_and_resumed_is_uncut(kind: str, tmp_path: Path) -> None:
    loops = [learnt(make(kind), tasks=2) for _ in range(2)]
    batches = [TASKS[2].train[index] for index in torch.arange(12).split(4)]
    step(loops[0], batches[0])
    step(loops[1], batches[0])
    part = loops[1].parts[0]
    save_state(tmp_path / "part", part.state_dict())
    assert part.nbytes() > 0
    again = make(kind)
    cut = looped(again, model=loops[1].model, competition="all")
    cut.optimizer = loops[1].optimizer
    cut.randomness.load_state_dict(loops[1].randomness.state_dict())
    again.load_state_dict(load_state(tmp_path / "part"))
    cut.experience, cut.experience_index, cut.step = TASKS[2], 2, 1
    for batch in batches[1:]:
        step(loops[0], batch)
        step(cut, batch)
    loops[0].end()
    cut.end()
    whole, resumed = values(loops[0].model), values(cut.model)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    close(_tensors(loops[0].parts[0].state_dict()), _tensors(again.state_dict()), rtol=0, atol=0)


def _tensors(value: Any, name: str = "") -> Values:
    if isinstance(value, Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else ()
    return {key: tensor for k, item in items for key, tensor in _tensors(item, f"{name}/{k}").items()}


def test_one_projection_only() -> None:
    with pytest.raises(CompositionError, match="undo the first"):
        Strategy(make("agem"), make("ogd"))


@pytest.mark.parametrize(
    "kind,given_settings",
    [
        ("agem", {"capacity": 0}),
        ("agem", {"rows": 0}),
        ("agem", {"epsilon": 0.0}),
        ("agem", {"select": "herding"}),
        ("gem", {"margin": -1.0}),
        ("gem", {"epsilon": 0.0}),
        ("gem", {"capacity": 0}),
        ("ogd", {"rows": 0}),
        ("ogd", {"logits": "some"}),
        ("ogd", {"directions": 0}),
    ],
)
def test_impossible_settings_are_refused(kind: str, given_settings: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=next(iter(given_settings))):
        make(kind, **given_settings)
