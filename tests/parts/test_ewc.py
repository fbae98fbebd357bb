"""EWC against the sum over tasks that it stands for, written out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from penalty_bench import FakeContext, Wrapped
from torch import Tensor, nn

from continual.errors import CompositionError, SpecError, TrainingError
from continual.models.lowrank import adapted_layers, effective_weight
from continual.parts.part import overriding
from continual.parts.penalty.ewc import EWC
from continual.parts.penalty.fisher import diagonal_fisher
from continual.state import load_state, save_state, tensor_bytes
from continual.streams.experience import Experience
from continual.table import TensorTable

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(autouse=True)
def _own_draws() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        yield


def experience(index: int, rows: int = 12, classes: int = 3) -> Experience:
    table = TensorTable({"inputs": torch.randn(rows, 4) + index, "labels": torch.randint(classes, (rows,))})
    return Experience(index, f"task {index}", table, classes=tuple(range(classes)))


def small_model() -> nn.Module:
    return Wrapped(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))


def adapted(adaptive: bool = False) -> nn.Module:
    plain = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    config: Any
    if adaptive:
        config = AdaLoraConfig(init_r=2, target_r=1, target_modules=["0"], total_step=9, tinit=1, tfinal=1)
    else:
        config = LoraConfig(r=2, target_modules=["0"])
    model = Wrapped(get_peft_model(plain, config))
    model.get_submodule("inner.base_model.model.2").requires_grad_(True)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.4)
    return model


def start(model: nn.Module | None = None, **settings: Any) -> tuple[EWC, FakeContext]:
    context = FakeContext(small_model() if model is None else model)
    part = EWC(**{"labels": "true", "strength": 3.0, **settings})
    part.attach(context)
    return part, context


def move(context: FakeContext, by: float = 0.3) -> None:
    with torch.no_grad():
        for parameter in context.parameters().values():
            parameter.add_(torch.randn_like(parameter), alpha=by)


def pulled(part: EWC, context: FakeContext) -> dict[str, Tensor]:
    """What ``edit_gradients`` adds to gradients of one."""
    for parameter in context.parameters().values():
        parameter.grad = torch.ones_like(parameter)
    part.edit_gradients()
    added = {}
    for name, parameter in context.parameters().items():
        assert parameter.grad is not None
        added[name], parameter.grad = parameter.grad - 1, None
    return added


def learn(part: EWC, context: FakeContext, task: Experience) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One experience; gives its Fisher and where it left the parameters."""
    part.begin(context, task)
    move(context)
    part.end(context, task)
    fisher = diagonal_fisher(context, context.batches(task.train), labels="true")
    return fisher, {name: p.detach().clone() for name, p in context.parameters().items()}


def same(got: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-4) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=rtol, atol=1e-5 * float(tensor.abs().max()))


def explicit(context: FakeContext, tasks: list[tuple[dict[str, Tensor], dict[str, Tensor]]], strength: float) -> Tensor:
    terms = [
        (fisher[name] * (parameter - anchor[name]).square()).sum()
        for fisher, anchor in tasks
        for name, parameter in context.parameters().items()
    ]
    return 0.5 * strength * torch.stack(terms).sum()


def test_all_tasks_in_one_quadratic_are_the_sum_over_tasks() -> None:
    part, context = start()
    tasks = [learn(part, context, experience(index)) for index in range(4)]
    for _ in range(2):
        move(context)
        value = explicit(context, tasks, 3.0)
        torch.testing.assert_close(part.value(), value.detach(), rtol=1e-5, atol=0)
        gradients = torch.autograd.grad(value, [*context.parameters().values()])
        same(pulled(part, context), dict(zip(context.parameters(), gradients, strict=True)))


@pytest.mark.parametrize("decay", [0.6, 1.0, None])
def test_online_is_one_decayed_fisher_at_the_latest_anchor(decay: float | None) -> None:
    part, context = start(mode="online", decay=decay)
    tasks = [learn(part, context, experience(index)) for index in range(3)]
    gamma = 1.0 if decay is None else decay
    total = {name: gamma * (gamma * tasks[0][0][name] + tasks[1][0][name]) + f for name, f in tasks[2][0].items()}
    assert float(part.value()) == 0.0
    move(context)
    value = explicit(context, [(total, tasks[2][1])], 3.0)
    torch.testing.assert_close(part.value(), value.detach(), rtol=1e-5, atol=0)
    gradients = torch.autograd.grad(value, [*context.parameters().values()])
    same(pulled(part, context), dict(zip(context.parameters(), gradients, strict=True)))


def test_at_the_anchor_there_is_no_pull_however_strong() -> None:
    part, context = start(strength=1e10)
    learn(part, context, experience(0))
    assert all(not tensor.any() for tensor in pulled(part, context).values())


def test_nothing_before_the_first_end() -> None:
    part, context = start()
    part.begin(context, experience(0))
    forwards = context.forwards
    assert all(not tensor.any() for tensor in pulled(part, context).values())
    assert part.nbytes() == tensor_bytes(part.state_dict()) == 4
    assert float(part.value()) == 0.0 and context.forwards == forwards


def test_hooks_that_cost_nothing_are_not_there() -> None:
    part, _ = start()
    assert [hook for hook in ("extend", "loss", "edit_gradients", "after_step") if overriding([part], hook)] == [
        "edit_gradients"
    ]


def test_strength_scales_and_zero_is_off() -> None:
    part, context = start()
    learn(part, context, experience(0))
    move(context)
    one = pulled(part, context)
    for strength in (6.0, 0.0):
        other, _ = start(strength=strength)
        other.attach(context)
        other.load_state_dict(part.state_dict())
        same(pulled(other, context), {name: tensor * strength / 3.0 for name, tensor in one.items()})


def test_parameters_without_a_gradient_get_one() -> None:
    part, context = start()
    learn(part, context, experience(0))
    move(context)
    expected = pulled(part, context)
    part.edit_gradients()
    same({name: p.grad for name, p in context.parameters().items() if p.grad is not None}, expected)


def test_memory_does_not_grow_with_tasks() -> None:
    part, context = start()
    sizes = []
    for index in range(5):
        learn(part, context, experience(index))
        sizes.append(part.nbytes())
    parameters = sum(p.numel() for p in context.parameters().values())
    assert sizes == [2 * 4 * parameters + 4] * 5


def test_state_goes_to_disk_and_back(tmp_path: Path) -> None:
    part, context = start(labels="sampled", rows=7)
    for index in range(2):
        learn(part, context, experience(index))
    save_state(tmp_path / "part", part.state_dict())
    drawn = context.randomness.state_dict()
    last = experience(2)
    part.begin(context, last)
    move(context)
    expected = pulled(part, context)
    part.end(context, last)

    again, _ = start(labels="sampled", rows=7)
    again.attach(context)
    again.load_state_dict(load_state(tmp_path / "part"))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in pulled(again, context).items())
    context.randomness.load_state_dict(drawn)
    again.end(context, last)
    move(context)
    once, twice = pulled(part, context), pulled(again, context)
    assert all(torch.equal(tensor, twice[name]) for name, tensor in once.items())
    assert torch.equal(part.value(), again.value()) and part.nbytes() == again.nbytes()


def test_loaded_state_is_not_shared() -> None:
    part, context = start()
    learn(part, context, experience(0))
    other, _ = start()
    other.attach(context)
    other.load_state_dict(part.state_dict())
    one, two = (p.state_dict()["quadratic"] for p in (part, other))
    for kind in ("curvature", "anchor"):
        for name, tensor in one[kind].items():
            assert torch.equal(tensor, two[kind][name]) and tensor.data_ptr() != two[kind][name].data_ptr()


def test_a_head_that_grew_is_held_in_its_old_rows() -> None:
    part, context = start()
    fisher, anchor = learn(part, context, experience(0))
    old = context.model.inner[2]
    new = nn.Linear(5, 5)
    with torch.no_grad():
        new.weight[:3], new.bias[:3] = old.weight, old.bias
    context.model.inner[2] = new
    second = experience(1, classes=5)
    part.begin(context, second)
    move(context)
    got = pulled(part, context)
    for name in ("inner.2.weight", "inner.2.bias"):
        now = context.parameters()[name].detach()
        torch.testing.assert_close(got[name][:3], 3.0 * fisher[name] * (now[:3] - anchor[name]), rtol=1e-4, atol=1e-6)
        assert not got[name][3:].any()
    part.end(context, second)
    later = {name: p.detach().clone() for name, p in context.parameters().items()}
    second_fisher = diagonal_fisher(context, context.batches(second.train), labels="true")
    padded = [
        {
            name: torch.cat([tensor, tensor.new_zeros(len(later[name]) - len(tensor), *tensor.shape[1:])])
            for name, tensor in one.items()
        }
        for one in (fisher, anchor)
    ]
    move(context)
    value = explicit(context, [(padded[0], padded[1]), (second_fisher, later)], 3.0)
    torch.testing.assert_close(part.value(), value.detach(), rtol=1e-5, atol=0)
    gradients = torch.autograd.grad(value, [*context.parameters().values()])
    same(pulled(part, context), dict(zip(context.parameters(), gradients, strict=True)))


def test_another_shape_is_refused() -> None:
    part, context = start()
    learn(part, context, experience(0))
    context.model.inner[2] = nn.Linear(5, 2)
    part.begin(context, experience(1))
    with pytest.raises(CompositionError, match="grow along their first axis only"):
        part.edit_gradients()


def test_what_no_longer_trains_is_left_alone() -> None:
    part, context = start()
    fisher, anchor = learn(part, context, experience(0))
    context.model.inner[0].requires_grad_(False)
    part.begin(context, experience(1))
    move(context)
    got = pulled(part, context)
    assert set(got) == {"inner.2.weight", "inner.2.bias"}
    expected = {name: 3.0 * fisher[name] * (context.parameters()[name].detach() - anchor[name]) for name in got}
    same(got, expected)
    assert context.model.inner[0].weight.grad is None


@pytest.mark.parametrize("labels", ["true", "sampled", "predicted", "all"])
def test_labels_and_rows_reach_the_fisher(labels: Any) -> None:
    part, context = start(labels=labels, rows=5)
    task = experience(0)
    part.begin(context, task)
    state = context.randomness.state_dict()
    part.end(context, task)
    other = FakeContext(context.model)
    other.randomness.load_state_dict(state)
    batches = other.batches(task.train, limit=5, generator=other.randomness.generator("fisher"))
    expected = diagonal_fisher(other, batches, labels=labels, generator=other.randomness.generator("fisher-labels"))
    got = part.state_dict()["quadratic"]["curvature"]
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_impossible_labels_are_refused_before_training() -> None:
    part, context = start(labels="all")
    context.objective = "causal-lm"
    with pytest.raises(CompositionError, match="set labels to 'sampled' or 'true'"):
        part.begin(context, experience(0))


def test_a_fisher_that_is_not_finite_names_its_parameter() -> None:
    part, context = start()
    task = experience(0)
    part.begin(context, task)
    with torch.no_grad():
        context.model.inner[2].weight[0, 0] = torch.inf
    with pytest.raises(TrainingError, match=r"the Fisher of 'inner\.0\.weight' is not finite"):
        part.end(context, task)
    assert not part.state_dict()["quadratic"]["curvature"]


@pytest.mark.parametrize(
    "settings,sentence",
    [
        ({"decay": 0.9}, "decay belongs to mode 'online'"),
        ({"mode": "online", "decay": 0.0}, "greater than 0"),
        ({"mode": "online", "decay": 1.1}, "less than or equal to 1"),
        ({"strength": -1.0}, "greater than or equal to 0"),
        ({"rows": 0}, "greater than or equal to 1"),
        ({"labels": "false"}, "'true', 'sampled', 'predicted' or 'all'"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SpecError, match=sentence):
        EWC(**settings)


def test_weights_need_an_adapted_layer() -> None:
    part, context = start(space="weights")
    with pytest.raises(CompositionError, match="no adapted layer"):
        part.begin(context, experience(0))


@pytest.mark.parametrize("adaptive", [False, True])
def test_effective_weights_are_held_through_their_adapters(adaptive: bool) -> None:
    part, context = start(adapted(adaptive), space="weights")
    terms = []
    for index in range(2):
        task = experience(index)
        part.begin(context, task)
        move(context)
        part.end(context, task)
        fisher = diagonal_fisher(context, context.batches(task.train), labels="true", space="weights")
        terms.append((fisher, {name: tensor.detach().clone() for name, tensor in _points(context).items()}))
    move(context)
    value = torch.stack(
        [(F[name] * (x - anchor[name]).square()).sum() for F, anchor in terms for name, x in _points(context).items()]
    ).sum()
    value = 0.5 * 3.0 * value
    torch.testing.assert_close(part.value(), value.detach(), rtol=1e-5, atol=0)
    gradients = torch.autograd.grad(value, [*context.parameters().values()])
    assert len(gradients) == (5 if adaptive else 4)
    same(pulled(part, context), dict(zip(context.parameters(), gradients, strict=True)))


def _points(context: FakeContext) -> dict[str, Tensor]:
    points = {name: effective_weight(layer) for name, layer in adapted_layers(context.model).items()}
    return points | {name: p for name, p in context.parameters().items() if "lora_" not in name}


def test_effective_weights_outlive_their_adapter() -> None:
    """Merged, and a fresh adapter begun: the anchor is where it was, and the fresh adapter feels it."""
    part, context = start(adapted(), space="auto")
    context.model.adapter_replaced = True
    first = experience(0)
    part.begin(context, first)
    move(context)
    part.end(context, first)
    layer: Any = next(iter(adapted_layers(context.model).values()))
    with torch.no_grad():
        layer.get_base_layer().weight += layer.get_delta_weight("default")
        layer.lora_B["default"].weight.zero_()
    part.begin(context, experience(1))
    assert float(part.value()) < 1e-10
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    assert float(part.value()) > 1e-4
    assert pulled(part, context)["inner.base_model.model.0.lora_B.default.weight"].any()


@pytest.mark.parametrize(
    "adaptive,replaced,expected",
    [(False, False, "parameters"), (False, True, "weights"), (True, False, "weights"), (None, True, "parameters")],
)
def test_auto_space(adaptive: bool | None, replaced: bool, expected: str) -> None:
    part, context = start(small_model() if adaptive is None else adapted(adaptive))
    context.model.adapter_replaced = replaced
    part.begin(context, experience(0))
    assert part.state_dict()["space"] is None
    part.end(context, experience(0))
    assert part.state_dict()["space"] == expected
    names = set(part.state_dict()["quadratic"]["curvature"])
    assert ("inner.base_model.model.0" in names) == (expected == "weights")


def test_half_precision_parameters_are_pulled() -> None:
    part, context = start()
    fisher, anchor = learn(part, context, experience(0))
    context.model.to(torch.bfloat16)
    part.begin(context, experience(1))
    for name, parameter in context.parameters().items():
        parameter.grad = torch.zeros_like(parameter)
        with torch.no_grad():
            parameter.copy_(anchor[name] + 0.5)
    part.edit_gradients()
    for name, parameter in context.parameters().items():
        assert parameter.grad is not None and parameter.grad.dtype == torch.bfloat16
        expected = 3.0 * fisher[name] * (parameter.detach().float() - anchor[name])
        torch.testing.assert_close(parameter.grad.float(), expected, rtol=0.01, atol=1e-5)
