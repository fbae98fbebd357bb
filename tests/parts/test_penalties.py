"""SI, MAS, RWalk and L2 against the same thing written out in a slow loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from loop_bench import close, experience, looped, make, plain_model, train, values
from peft import LoraConfig, get_peft_model
from penalty_bench import Branches, Everything, FakeContext, Recurrent, Reused, Tied, Wrapped
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from continual.errors import CompositionError, SpecError, TrainingError
from continual.models.lowrank import adapted_layers, effective_weight
from continual.parts.penalty.fisher_labels import Target
from continual.parts.penalty.mas import MAS, sensitivities, squared_norm
from continual.parts.penalty.rowwise import Stacks, per_row
from continual.table import Batch

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
Values = dict[str, Tensor]
TASKS = (experience(0), experience(1, classes=(1, 2)), experience(2, classes=(0, 3)))


@pytest.fixture(autouse=True)
def _own_draws() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        yield


class ByHand:
    """SGD with a penalty ``sum stiffness (theta - anchor)^2`` in the graph of the loss."""

    def __init__(self, lr: float = 0.3, momentum: float = 0.0) -> None:
        self.model = plain_model()
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = torch.optim.SGD(self.parameters.values(), lr=lr, momentum=momentum)
        self.stiffness = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.anchor = values(self.model)

    def step(self, batch: Batch) -> tuple[Values, Values]:
        """One step; gives the gradient of the objective alone, and the movement."""
        loss = F.cross_entropy(self.model(batch).logits, batch["labels"])
        gradients = torch.autograd.grad(loss, [*self.parameters.values()], retain_graph=True)
        penalty = sum(
            (self.stiffness[name] * (p - self.anchor[name]).square()).sum() for name, p in self.parameters.items()
        )
        self.optimizer.zero_grad()
        (loss + penalty).backward()
        before = values(self.model)
        self.optimizer.step()
        moved = {name: p.detach() - before[name] for name, p in self.parameters.items()}
        return dict(zip(self.parameters, gradients, strict=True)), moved


def pieces(task: Any) -> list[Batch]:
    return [task.train[index] for index in torch.arange(len(task.train)).split(4)]


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_si_is_the_path_integral_written_out(momentum: float) -> None:
    c, xi = 0.7, 0.05
    hand = ByHand(momentum=momentum)
    for task in TASKS:
        start, work = values(hand.model), {name: torch.zeros_like(p) for name, p in hand.parameters.items()}
        for batch in pieces(task):
            gradients, moved = hand.step(batch)
            for name in work:
                work[name] -= gradients[name] * moved[name]
        for name, parameter in hand.parameters.items():
            travelled = parameter.detach() - start[name]
            hand.stiffness[name] += c * work[name].clamp(min=0) / (travelled.square() + xi)
        hand.anchor = values(hand.model)
    part = make("si", strength=c, xi=xi)
    loop = looped(part, model=plain_model(), momentum=momentum, competition="all")
    for task in TASKS:
        train(loop, task)
    close(values(loop.model), values(hand.model))
    close({name: c * A for name, A in part.state_dict()["quadratic"]["curvature"].items()}, hand.stiffness)


def slow_fisher(model: nn.Module, batch: Batch) -> Values:
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for row in range(len(batch["labels"])):
        loss = F.cross_entropy(model({"inputs": batch["inputs"][row : row + 1]}).logits, batch["labels"][row : row + 1])
        for name, g in zip(parameters, torch.autograd.grad(loss, [*parameters.values()]), strict=True):
            total[name] += g.square() / len(batch["labels"])
    return total


def test_rwalk_is_its_equations_written_out() -> None:
    """Five steps with an interval of two: the last interval is closed at the end, on rows of the experience."""
    strength, alpha, epsilon = 0.6, 0.7, 1e-3
    hand = ByHand()
    fisher: Values = {}
    average: Values = {}
    for task in TASKS:
        batch = task.train[torch.arange(len(task.train))]
        scores = {name: torch.zeros_like(p) for name, p in hand.parameters.items()}
        for steps in (2, 2, 1):
            start, fall = values(hand.model), {name: torch.zeros_like(p) for name, p in hand.parameters.items()}
            for _ in range(steps):
                gradients, moved = hand.step(batch)
                for name in fall:
                    fall[name] -= gradients[name] * moved[name]
            for name, F_new in slow_fisher(hand.model, batch).items():
                fisher[name] = alpha * F_new + (1 - alpha) * fisher[name] if name in fisher else F_new
                distance = 0.5 * fisher[name] * (hand.parameters[name].detach() - start[name]).square()
                scores[name] += (fall[name] / (distance + epsilon)).clamp(min=0)
        average = {name: 0.5 * (average[name] + s) if average else s for name, s in scores.items()}
        largest_F, largest_s = (max(float(t.max()) for t in each.values()) for each in (fisher, average))
        hand.stiffness = {n: strength * (fisher[n] / largest_F + average[n] / largest_s) for n in fisher}
        hand.anchor = values(hand.model)
    part = make("rwalk", strength=strength, alpha=alpha, interval=2, epsilon=epsilon)
    loop = looped(part, model=plain_model(), competition="all")
    for task in TASKS:
        train(loop, task, [task.train[torch.arange(len(task.train))]] * 5)
    close(values(loop.model), values(hand.model))
    close({n: strength * A for n, A in part.state_dict()["quadratic"]["curvature"].items()}, hand.stiffness)


def test_rwalk_looks_at_the_experiences_own_rows() -> None:
    part = make("rwalk", interval=1)
    loop = looped(part, model=plain_model(), competition="all")
    task = TASKS[0]
    loop.begin(task, steps=1)
    batch = task.train[torch.arange(8)]
    output = loop.forward(batch)
    output.logits.sum().backward()
    loop.current_rows = 5
    loop.keep(batch, output)
    loop.edit_gradients()
    loop.after_step()
    expected = slow_fisher(loop.model, {name: column[:5] for name, column in batch.items()})
    close(part.state_dict()["fisher"], expected)


def test_l2_is_the_distance_to_the_last_model_written_out() -> None:
    hand = ByHand()
    for task in TASKS:
        for batch in pieces(task):
            hand.step(batch)
        hand.stiffness = {name: torch.full_like(p, 0.5 * 0.4) for name, p in hand.parameters.items()}
        hand.anchor = values(hand.model)
    part = make("l2", strength=0.4)
    loop = looped(part, model=plain_model(), competition="all")
    for task in TASKS:
        train(loop, task)
    close(values(loop.model), values(hand.model))


def slow_sensitivities(context: FakeContext, batch: Batch) -> Values:
    """Rows one by one: the definition."""
    context.model.eval()
    parameters = context.parameters()
    totals = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for row in range(len(batch["labels"])):
        one = {name: column[row : row + 1] for name, column in batch.items()}
        logits = context.forward(one).logits
        if context.objective == "causal-lm":
            counted = one["labels"][0, 1:] != -100
            norm = logits[0, :-1][counted].square().sum() / max(int(counted.sum()), 1)
        else:
            norm = (logits if context._active is None else logits[:, context._active]).square().sum()
        found = torch.autograd.grad(norm, [*parameters.values()], allow_unused=True)
        for name, g in zip(parameters, found, strict=True):
            if g is not None:
                totals[name] += g.abs()
    return {name: total / len(batch["labels"]) for name, total in totals.items()}


def dense(model: nn.Module, *shape: int) -> tuple[FakeContext, Batch]:
    return FakeContext(Wrapped(model)), {"inputs": torch.randn(6, *shape), "labels": torch.randint(3, (6,))}


def tokens(model: nn.Module) -> tuple[FakeContext, Batch]:
    return FakeContext(Wrapped(model)), {"inputs": torch.randint(5, (6, 5)), "labels": torch.randint(3, (6,))}


def llama() -> tuple[FakeContext, Batch]:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Wrapped(LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)), ("input_ids", "attention_mask"))
    ids = torch.randint(20, (4, 6))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[2, :3] = -100
    return FakeContext(model, "causal-lm"), {"input_ids": ids, "attention_mask": mask, "labels": labels}


CASES: dict[str, Callable[[], tuple[FakeContext, Batch]]] = {
    "mlp": lambda: dense(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), 4),
    "reused": lambda: dense(Reused(), 6),
    "tokens": lambda: dense(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(15, 3)), 3, 4),
    "tied": lambda: tokens(Tied(bare=True)),
    "everything": lambda: tokens(Everything()),
    "recurrent": lambda: dense(Recurrent(), 3, 4),
    "branches": lambda: dense(Branches(), 6),
    "llama": llama,
}


@pytest.mark.parametrize("case", CASES)
def test_sensitivities_are_absolute_gradients_row_by_row(case: str) -> None:
    context, batch = CASES[case]()
    expected = slow_sensitivities(context, batch)
    halves = [{name: column[part] for name, column in batch.items()} for part in (slice(0, 1), slice(1, None))]
    for batches in ([batch], halves):
        close(sensitivities(context, batches), expected, atol=2e-5 * max(float(t.max()) for t in expected.values()))


def test_sensitivities_are_those_of_the_classes_that_compete() -> None:
    context, batch = CASES["mlp"]()
    context._active = torch.tensor([True, False, True])
    close(sensitivities(context, [batch]), slow_sensitivities(context, batch))


def test_sensitivity_of_effective_weights_is_that_of_a_plain_layer() -> None:
    plain = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model = Wrapped(get_peft_model(plain, LoraConfig(r=2, target_modules=["0"])))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.4)
    batch = {"inputs": torch.randn(6, 4), "labels": torch.randint(3, (6,))}
    (name, layer), *_ = adapted_layers(model).items()
    got = sensitivities(FakeContext(model), [batch], space="weights")[name]
    flat = Wrapped(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    with torch.no_grad():
        flat.inner[0].weight.copy_(effective_weight(layer))
        flat.inner[0].bias.copy_(layer.get_base_layer().bias)
    flat.inner[2] = model.get_submodule("inner.base_model.model.2")
    torch.testing.assert_close(got, slow_sensitivities(FakeContext(flat.requires_grad_(True)), batch)["inner.0.weight"])


@pytest.mark.parametrize("case", ["mlp", "tied", "branches", "recurrent"])
def test_kept_gradients_are_those_of_each_row(case: str) -> None:
    context, batch = CASES[case]()
    parameters = context.parameters()
    stacks = Stacks(parameters)
    halves = [{name: column[part] for name, column in batch.items()} for part in (slice(0, 4), slice(4, None))]
    per_row(context, halves, lambda b, _: [Target(b, measure=squared_norm)], stacks, parameters)
    got = stacks.stacked()
    context.model.eval()
    for row in range(6):
        norm = context.forward({name: column[row : row + 1] for name, column in batch.items()}).logits.square().sum()
        found = torch.autograd.grad(norm, [*parameters.values()], allow_unused=True)
        for (name, parameter), g in zip(parameters.items(), found, strict=True):
            expected = torch.zeros_like(parameter) if g is None else g
            torch.testing.assert_close(got[name][row], expected, rtol=1e-4, atol=1e-5)


def test_mas_adds_sensitivities_up_and_holds_the_last_weights() -> None:
    part = make("mas", strength=0.8)
    loop = looped(part, model=plain_model(), competition="all")
    omega: Values = {}
    for task in TASKS[:2]:
        train(loop, task)
        batch = task.train[torch.arange(len(task.train))]
        for name, tensor in slow_sensitivities(FakeContext(loop.model), batch).items():
            omega[name] = omega.get(name, 0) + tensor
    anchor = values(loop.model)
    loop.begin(TASKS[2], steps=1)
    with torch.no_grad():
        for parameter in loop.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for parameter in loop.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    loop.edit_gradients()
    penalty = 0.8 * sum((omega[n] * (p - anchor[n]).square()).sum() for n, p in loop.model.named_parameters())
    got = {name: p.grad for name, p in loop.model.named_parameters() if p.grad is not None}
    found = torch.autograd.grad(penalty, [*loop.model.parameters()])
    close(got, dict(zip(anchor, found, strict=True)))
    assert isinstance(part, MAS)
    torch.testing.assert_close(part.value(), penalty.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind,what", [("mas", "sensitivity"), ("rwalk", "Fisher"), ("si", "path integral")])
def test_what_is_not_finite_is_said_and_nothing_is_held(kind: str, what: str) -> None:
    part = make(kind)
    loop = looped(part, model=plain_model(), competition="all")
    task = TASKS[0]
    loop.begin(task, steps=1)
    batch = task.train[torch.arange(4)]
    loop.optimizer.zero_grad()  # type: ignore[union-attr]
    loop.backward(batch)
    loop.optimizer.step()  # type: ignore[union-attr]
    with torch.no_grad():
        loop.model.inner[2].weight[0, 0] = torch.nan
    loop.after_step()
    with pytest.raises(TrainingError, match=f"{what}' of|{what} of '"):
        loop.end()
    assert not part.state_dict()["quadratic"]["curvature"]


@pytest.mark.parametrize("kind", ["si", "mas", "rwalk", "l2"])
def test_a_head_that_grew_is_held_in_its_old_rows(kind: str) -> None:
    part = make(kind, strength=5.0)
    loop = looped(part)
    train(loop, experience(0))
    loop.begin(experience(1), steps=1)
    for parameter in loop.parameters().values():
        parameter.grad = torch.zeros_like(parameter)
    with torch.no_grad():
        loop.model.head.weight.add_(1.0)  # type: ignore[union-attr, operator]
    loop.edit_gradients()
    grad = loop.model.head.weight.grad  # type: ignore[union-attr]
    assert isinstance(grad, Tensor) and grad.shape[0] == 4
    assert grad[:2].abs().sum() > 0 and not grad[2:].any()
    loop.end()
    assert part.state_dict()["quadratic"]["curvature"]["head.weight"].shape[0] == 4


@pytest.mark.parametrize("kind", ["si", "mas", "rwalk", "l2"])
def test_memory_does_not_grow_with_experiences(kind: str) -> None:
    part = make(kind)
    loop = looped(part, model=plain_model(), competition="all")
    sizes = []
    for index in range(4):
        train(loop, experience(index, classes=(0, 1, 2, 3)))
        sizes.append(part.nbytes())
    parameters = sum(p.numel() for p in loop.model.parameters())
    assert sizes == [{"rwalk": 4, "si": 2, "mas": 2, "l2": 2}[kind] * 4 * parameters + 4] * 4


@pytest.mark.parametrize("kind", ["si", "rwalk"])
def test_an_adapter_that_is_replaced_has_no_path(kind: str) -> None:
    plain = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    context: Any = FakeContext(Wrapped(get_peft_model(plain, LoraConfig(r=2, target_modules=["0"]))))
    part = make(kind)
    part.attach(context)
    part.begin(context, TASKS[0])
    context.model.adapter_replaced = True
    with pytest.raises(CompositionError, match="across_tasks 'continue'"):
        part.begin(context, TASKS[0])


@pytest.mark.parametrize("kind", ["mas", "l2"])
def test_effective_weights_are_held_where_an_adapter_is_replaced(kind: str) -> None:
    plain = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))
    model: Any = Wrapped(get_peft_model(plain, LoraConfig(r=2, target_modules=["0"])))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.4)
    model.adapter_replaced = True
    part = make(kind)
    loop = looped(part, model=model, competition="all")
    train(loop, TASKS[0])
    assert set(part.state_dict()["quadratic"]["curvature"]) == set(adapted_layers(model))
    plain_part = make(kind, space="weights")
    with pytest.raises(CompositionError, match="no adapted layer"):
        looped(plain_part, model=plain_model(), competition="all").begin(TASKS[0])


@pytest.mark.parametrize(
    "kind,settings",
    [
        ("si", {"xi": 0.0}),
        ("si", {"strength": -1}),
        ("mas", {"rows": 0}),
        ("mas", {"labels": "true"}),
        ("rwalk", {"alpha": 0.0}),
        ("rwalk", {"interval": 0}),
        ("rwalk", {"epsilon": 0.0}),
        ("l2", {"strength": -1}),
    ],
)
def test_impossible_settings_are_refused(kind: str, settings: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=next(iter(settings))):
        make(kind, **settings)
