"""O-LoRA's penalty against a slow sum over pairs, and IncLoRA, which is O-LoRA without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapter_bench import Bench, assert_same, experience_of, model_of, tensors_of
from battery import learner_for, same_weights, tiny_stream
from torch import Tensor

from continual import Strategy
from continual.errors import CompositionError
from continual.models.lowrank import adapted_layers, adapter_parameters, effective_weight
from continual.parts.adapter.adalora import AdaLoRA
from continual.parts.adapter.lora import LoRA
from continual.parts.context import TrainingContext
from continual.parts.part import Part
from continual.parts.penalty.orthogonal import Orthogonal
from continual.parts.registry import part_class


class Two(Bench):
    """A bench with a penalty beside the adapter."""

    def __init__(self, family: str, adapter: Part, penalty: Orthogonal) -> None:
        super().__init__(family, adapter)
        self.penalty = penalty
        self.loop = TrainingContext(
            self.model, [adapter, penalty], self.optimizer, seed=3, objective=self.loop.objective
        )


def bench(family: str = "bert", tasks: int = 2, adapter: Part | None = None, **settings: Any) -> Two:
    """After so many tasks, at the beginning of one more."""
    found = Two(family, adapter or LoRA(rank=3, across_tasks="stack"), Orthogonal(**settings))
    for task in range(tasks):
        found.task(task, 3)
    found.begin(tasks, 3)
    found.step(tasks)
    return found


def slow_value(two: Two, strength: float, form: str, shrink: float) -> Tensor:
    """Pair by pair, layer by layer."""
    total = torch.zeros(())
    for layer in adapted_layers(two.model).values():
        names = list(layer.lora_A)
        new = adapter_parameters(layer, names[-1])
        for name in names[:-1]:
            overlap = new["lora_A"] @ adapter_parameters(layer, name)["lora_A"].T
            total = total + strength * (overlap.abs().sum() if form == "absolute" else (overlap**2).sum())
        for parameter in new.values():
            total = total + shrink * parameter.norm()
    return total


@pytest.mark.parametrize("form", ["absolute", "squared"])
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_value_and_gradient_are_those_of_the_slow_sum(family: str, form: Any) -> None:
    two = bench(family, strength=0.7, form=form, shrink=0.3)
    slow = slow_value(two, 0.7, form, 0.3)
    torch.testing.assert_close(two.penalty.value(), slow.detach())
    trained = [p for name, p in two.loop.parameters().items() if "lora_" in name]
    wanted = torch.autograd.grad(slow, trained)
    given = [torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) for p in trained]
    for parameter, gradient in zip(trained, given, strict=True):
        parameter.grad = gradient.clone()
    two.penalty.edit_gradients()
    for parameter, gradient, one in zip(trained, given, wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient + one, rtol=1e-4, atol=1e-5)


def test_shrink_of_a_matrix_that_is_zero_is_zero() -> None:
    two = Two("bert", LoRA(rank=3, across_tasks="stack"), Orthogonal(shrink=0.3))
    two.begin(0, 2)
    two.optimizer.zero_grad()
    two.penalty.edit_gradients()
    for layer in adapted_layers(two.model).values():
        own = adapter_parameters(layer, "t0001")
        assert not own["lora_B"].grad.count_nonzero()  # type: ignore[union-attr]
        torch.testing.assert_close(own["lora_A"].grad, 0.3 * own["lora_A"] / own["lora_A"].norm())


def test_pruned_directions_of_adalora_count_for_nothing() -> None:
    adapter = AdaLoRA(init_rank=4, target_rank=2, across_tasks="stack")
    two = bench("llama", tasks=2, adapter=adapter, strength=1.0)
    slow = torch.zeros(())
    pruned = 0
    for layer in adapted_layers(two.model).values():
        new = adapter_parameters(layer, "t0003")["lora_A"]
        for name in ("t0001", "t0002"):
            old = adapter_parameters(layer, name)
            kept = old["lora_E"].flatten() != 0
            pruned += int((~kept).sum())
            slow = slow + (new @ old["lora_A"][kept].T).abs().sum()
    assert pruned, "something was pruned"
    torch.testing.assert_close(two.penalty.value(), slow.detach())


def test_overlaps_shrink_and_the_frozen_adapters_stay() -> None:
    overlaps = {}
    for strength in (0.0, 0.5):
        two = bench(tasks=1, strength=strength)
        old = {name: tensor for name, tensor in tensors_of(two).items() if ".t0001" in name}
        two.step(1, 40)
        now = tensors_of(two)
        assert old and all(torch.equal(tensor, now[name]) for name, tensor in old.items())
        overlaps[strength] = float(slow_value(two, 1.0, "absolute", 0.0).detach())
    assert overlaps[0.5] < 0.3 * overlaps[0.0]


def test_without_strength_it_is_incremental_lora() -> None:
    alone = learner_for(Strategy.load("inc-lora"))
    beside = learner_for(Strategy.load("o-lora", overrides={"penalty.strength": 0.0}))
    held = learner_for(Strategy.load("o-lora"))
    for learner in (alone, beside, held):
        learner.run(tiny_stream(experiences=2))
    same_weights(beside, alone)
    one, other = dict(alone.model.named_parameters()), dict(held.model.named_parameters())
    assert any(not torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_incremental_lora_is_the_base_and_the_sum_of_all_adapters() -> None:
    """IncLoRA: one new pair (A, B) a task, beginning at no change, no regularisation, no replay, all of them summed."""
    learner = learner_for("inc-lora")
    learner.run(tiny_stream())
    part = learner.parts[0]
    assert isinstance(part, LoRA) and [one.slot for one in learner.parts] == ["adapter", "head"]
    for layer in adapted_layers(learner.model).values():
        wanted = layer.base_layer.weight.clone()
        for name in part.adapters.names:
            own = adapter_parameters(layer, name)
            wanted += 2.0 * own["lora_B"] @ own["lora_A"]
            assert own["lora_A"].requires_grad == (name == "t0003")
        torch.testing.assert_close(effective_weight(layer), wanted)


def test_copies_are_reported_while_they_are_held() -> None:
    two = bench(tasks=2)
    layers = adapted_layers(two.model).values()
    assert two.penalty.nbytes() == sum(2 * 4 * layer.lora_A["t0001"].weight.numel() for layer in layers)
    two.loop.end()
    assert two.penalty.nbytes() == 0


@pytest.mark.parametrize("changed", [{"strength": 2.0}, {"form": "squared"}, {"shrink": 1.0}], ids=str)
def test_every_setting_changes_something(changed: dict[str, Any]) -> None:
    plain, other = tensors_of(bench()), tensors_of(bench(**changed))
    assert any(not torch.equal(plain[name], other[name]) for name in plain)
    assert set(Orthogonal.Settings.model_fields) == {"kind", "strength", "form", "shrink"}


@pytest.mark.parametrize(
    "adapter", [None, {"kind": "lora"}, {"kind": "lora", "across_tasks": "merge"}, {"kind": "adalora"}]
)
def test_a_strategy_without_stacked_adapters_is_refused(adapter: dict[str, Any] | None) -> None:
    content = {"penalty": {"kind": "orthogonal"}, **({} if adapter is None else {"adapter": adapter})}
    with pytest.raises(CompositionError, match="across_tasks 'stack'"):
        Strategy.load(content)
    Strategy.load({"penalty": {"kind": "orthogonal"}, "adapter": {"kind": "adalora", "across_tasks": "stack"}})


def test_a_loop_without_stacked_adapters_is_refused() -> None:
    with pytest.raises(CompositionError, match="across_tasks 'stack'"):
        Two("bert", LoRA(), Orthogonal()).begin(0, 1)
    loop = TrainingContext(model_of("bert"), [Orthogonal()])
    with pytest.raises(CompositionError, match="across_tasks 'stack'"):
        loop.begin(experience_of("bert", 0))


def test_a_loaded_adapter_is_compared_with_its_own_past() -> None:
    two = bench(tasks=2, strength=0.5)
    value = two.penalty.value()
    state = two.save()
    again = Two("bert", LoRA(rank=3, across_tasks="stack"), Orthogonal(strength=0.5))
    again.part.load_state_dict(state["part"])
    again.model.load_saved(state["tensors"])
    assert_same(tensors_of(two), tensors_of(again))
    assert torch.equal(again.penalty.value(), value)


def test_registered() -> None:
    assert part_class("penalty", "orthogonal", "s.yaml") is Orthogonal
