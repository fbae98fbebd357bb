"""Orthogonal subspace fine-tuning: nothing leaks into the protected directions, whatever the optimiser makes of a gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapter_bench import Bench, assert_same, batch_of, model_of, tensors_of
from battery import learner_for, tiny_stream
from torch import Tensor, nn

from continual import Strategy
from continual.errors import CompositionError, SpecError
from continual.models.lowrank import base_weight
from continual.parts.adapter.targets import linear_layers
from continual.parts.projection.osf import OSF
from continual.parts.registry import part_class

FAMILIES = ("llama", "bert", "gpt2", "mlp")
OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.1),
    "adam": lambda p, lr: torch.optim.Adam(p, lr=lr),
    "sgd": lambda p, lr: torch.optim.SGD(p, lr=100 * lr, momentum=0.9),
}


def bench(family: str = "bert", optimizer: str = "adamw", lr: float = 1e-3, **settings: Any) -> Bench:
    found = Bench(family, OSF(**settings))
    found.optimizer = OPTIMIZERS[optimizer]([nn.Parameter(torch.zeros(1))], lr)
    found.loop.optimizer = found.optimizer
    return found


def weights(bench: Bench) -> dict[str, Tensor]:
    layers = linear_layers(bench.model.transformer)
    return {name: base_weight(layer).detach().clone() for name, layer in layers.items()}


def slow_directions(weight: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """U (out, k) and V (in, k) in float64, one by one."""
    U, s, Vh = torch.linalg.svd(weight.double())
    kept = [index for index in range(len(s)) if index < max(1, int(share * len(s)))]
    return torch.stack([U[:, i] for i in kept], 1), torch.stack([Vh[i] for i in kept], 1)


def leak(before: Tensor, after: Tensor, share: float) -> float:
    """The share of a change (Frobenius) that lies in the leading directions of what was there before."""
    U, V = slow_directions(before, share)
    change = (after - before).double()
    inside = change - (torch.eye(len(U)) - U @ U.T) @ change @ (torch.eye(len(V)) - V @ V.T)
    return float(inside.norm() / change.norm())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_leaks_into_the_protected_directions(family: str, optimizer: str) -> None:
    found = bench(family, optimizer, base="protected").task(0, 5)
    for task in (1, 2):
        found.begin(task, 30)
        before = weights(found)
        found.step(task, 30)
        after = weights(found)
        for name, weight in before.items():
            if "pooler" in name:
                continue
            moved = float((after[name] - weight).norm() / weight.norm())
            assert moved > 1e-3, f"{name} trains"
            rounding = 2.4e-7 / moved if optimizer == "sgd" else 0.0
            assert leak(weight, after[name], 0.5) <= max(1e-5, rounding), name
        found.loop.end()


def test_projecting_gradients_alone_would_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trap that the projection after the step is there for."""
    monkeypatch.setattr(OSF, "after_step", lambda *_: None)
    found = bench(base="protected")
    found.begin(0, 30)
    before = weights(found)
    found.step(0, 30)
    leaks = [leak(weight, weights(found)[name], 0.5) for name, weight in before.items() if "pooler" not in name]
    assert min(leaks) > 0.02


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_gradients_are_projected_before_the_step(family: str) -> None:
    found = bench(family, base="protected")
    found.begin(0, 1)
    found.optimizer.zero_grad()
    found.loop.backward(batch_of(family, 0))
    for name, layer in linear_layers(found.model.transformer).items():
        if layer.weight.grad is None:
            continue
        gradient = layer.weight.grad if base_weight(layer).stride() == layer.weight.stride() else layer.weight.grad.T
        U, V = slow_directions(base_weight(layer).detach(), 0.5)
        assert (U.T @ gradient.double()).norm() < 1e-5 * max(gradient.norm(), 1e-3), name
        assert (gradient.double() @ V).norm() < 1e-5 * max(gradient.norm(), 1e-3), name
        assert gradient.norm() > 0


def test_outside_the_directions_a_step_is_the_optimisers_own() -> None:
    """With SGD the step is the projection of the step that plain SGD takes."""
    plain, found = Bench("mlp", OSF(base="free"), lr=0.1), Bench("mlp", OSF(base="protected", rest="train"), lr=0.1)
    for one in (plain, found):
        one.optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
        one.loop.optimizer = one.optimizer
        one.begin(0, 1)
    before = weights(plain)
    plain.step(0)
    found.step(0)
    for name, weight in before.items():
        U, V = slow_directions(weight, 0.5)
        step = (weights(plain)[name] - weight).double()
        wanted = step - U @ (U.T @ step)
        wanted = wanted - wanted @ V @ V.T
        torch.testing.assert_close((weights(found)[name] - weight).double(), wanted, rtol=1e-3, atol=1e-6)


def test_a_task_is_kept_when_the_next_begins() -> None:
    found = bench(base="protected", lr=1e-2).task(0, 10)
    answer = found.answer()
    found.begin(1, 2)
    assert torch.equal(found.answer(), answer)


def test_what_trains_and_what_is_frozen() -> None:
    found = bench("bert", base="protected")
    found.begin(0, 2)
    names = set(found.loop.parameters())
    assert all(name.startswith("head.") or name.endswith("weight") for name in names)
    assert not any("LayerNorm" in name or "embeddings" in name for name in names)
    assert len(names) == len(linear_layers(found.model.transformer)) + 2
    everything = bench("bert", base="protected", rest="train")
    everything.begin(0, 2)
    assert set(everything.loop.parameters()) == dict(everything.model.named_parameters()).keys()
    some = bench("bert", base="protected", target=["query"])
    some.begin(0, 2)
    assert {name.rpartition("attention.self.")[2] for name in some.loop.parameters() if "head" not in name} == {
        "query.weight"
    }


def test_a_model_from_scratch_is_free_at_first_and_a_pretrained_one_is_not() -> None:
    scratch = model_of("mlp")
    scratch.base_sha256 = None
    found = Bench("mlp", OSF(), scratch)
    found.begin(0, 2)
    assert not found.part.protected and "backbone.layers.0.bias" in found.loop.parameters()
    found.step(0, 2)
    found.loop.end()
    found.begin(1, 2)
    assert set(found.part.protected) == {"layers.0", "layers.2"}
    assert "backbone.layers.0.bias" not in found.loop.parameters()
    pretrained = bench("bert")
    pretrained.begin(0, 2)
    assert pretrained.part.protected
    free = bench("bert", base="free")
    free.begin(0, 2)
    assert not free.part.protected


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_cut_and_resumed_is_uncut(family: str) -> None:
    settings: dict[str, Any] = {"share": 0.4, "base": "protected"}
    whole = Bench(family, OSF(**settings)).task(0, 3)
    whole.begin(1, 6)
    whole.loop.model.mark_altered(whole.loop.parameters().values())
    whole.step(1, 2)
    again = Bench.load(family, OSF(**settings), whole.save(), task=1)
    assert set(again.loop.parameters()) == set(whole.loop.parameters())
    for one in (whole, again):
        one.step(1, 4)
        one.loop.end()
    assert_same(tensors_of(whole), tensors_of(again))
    assert again.part.nbytes() == whole.part.nbytes() > 0


@pytest.mark.parametrize(
    "changed", [{"share": 0.2}, {"base": "free"}, {"rest": "train"}, {"target": ["query", "key"]}], ids=str
)
def test_every_setting_changes_something(changed: dict[str, Any]) -> None:
    plain, other = (tensors_of(bench(**settings).task(0, 3)) for settings in ({}, changed))
    assert any(not torch.equal(plain[name], other[name]) for name in plain)
    assert {"kind", "share", "base", "rest", "target"} == set(OSF.Settings.model_fields)


def test_impossible_compositions_are_refused() -> None:
    with pytest.raises(CompositionError, match="which an adapter freezes"):
        Strategy.load({"projection": {"kind": "osf"}, "adapter": {"kind": "lora"}})
    with pytest.raises(CompositionError, match="undo the first"):
        Strategy.load({"projection": [{"kind": "osf"}, {"kind": "agem"}]})
    half = model_of("bert")
    half.backbone.to(torch.bfloat16)
    with pytest.raises(CompositionError, match="in float32"):
        Bench("bert", OSF(), half).begin(0, 1)
    frozen = learner_for(Strategy.load({"projection": {"kind": "osf"}, "backbone": "frozen"}))
    with pytest.raises(CompositionError, match="set backbone: train"):
        frozen.update(tiny_stream()[0])
    with pytest.raises(CompositionError, match="'quary'"):
        bench("bert", target=["quary"]).begin(0, 1)
    for settings in ({"share": 0.0}, {"share": 1.0}, {"target": []}, {"rest": "melted"}):
        with pytest.raises(SpecError, match=next(iter(settings))):
            OSF(**settings)


def test_registered() -> None:
    assert part_class("projection", "osf", "s.yaml") is OSF
