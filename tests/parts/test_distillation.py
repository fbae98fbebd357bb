"""LwF and feature distillation against their formulas, and the old model against a deep copy."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from adapter_bench import batch_of, experience_of, model_of
from loop_bench import close, experience, growing_model, looped, make, plain_model, step, train, values
from torch import Tensor, nn

from continual.errors import CompositionError, SpecError
from continual.models.output import Output
from continual.parts.adapter.adalora import AdaLoRA
from continual.parts.adapter.lora import LoRA
from continual.parts.context import TrainingContext
from continual.parts.part import Part
from continual.parts.replay.rehearsal import Rehearsal
from continual.state import tensor_bytes
from continual.strategy import Strategy
from continual.table import Batch

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(autouse=True)
def _own_draws() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        yield


def kl(new_K: Tensor, old_K: Tensor, T: float) -> Tensor:
    """T^2 sum p log(p / q), as it stands in the books."""
    p, q = (torch.exp(x / T) / torch.exp(x / T).sum() for x in (old_K, new_K))
    return T**2 * (p * (p / q).log()).sum()


def frozen(loop: TrainingContext) -> nn.Module:
    """The old model, whole."""
    return copy.deepcopy(loop.model).eval()


def middle(part: Part, *others: Part, tasks: int = 2, scenario: Any = "class", **options: Any) -> Any:
    """A loop in the middle of an experience after ``tasks`` others, and the model as it was when it began."""
    loop = looped(part, *others, model=growing_model(**options), scenario=scenario)
    for index in range(tasks):
        train(loop, experience(index, scenario=scenario))
    loop.begin(experience(tasks, scenario=scenario), steps=5)
    old = frozen(loop)
    for index in torch.arange(12).split(4)[:2]:
        step(loop, experience(tasks).train[index])
    return loop, old


def last_batch(tasks: int = 2) -> Batch:
    return experience(tasks).train[torch.arange(8, 12)]


def term_of(
    loop: TrainingContext, batch: Batch, slot: str = "distillation"
) -> tuple[Tensor, Output, dict[str, Tensor]]:
    batch = loop.extend(batch)
    output = loop.forward(batch)
    terms = dict(loop.terms(batch, output))
    (name,) = [name for name in terms if name.startswith(slot)]
    return terms[name], output, terms


@pytest.mark.parametrize("T,strength", [(2.0, 1.0), (1.0, 0.3)])
def test_lwf_is_its_formula_over_the_old_classes(T: float, strength: float) -> None:
    loop, old = middle(make("lwf", temperature=T, strength=strength))
    batch = last_batch()
    term, output, terms = term_of(loop, batch)
    before = old(batch).logits.detach()
    assert output.logits.shape[1] == 6
    expected = strength * torch.stack([kl(output.logits[b, :4], before[b, :4], T) for b in range(4)]).mean()
    torch.testing.assert_close(term, expected, rtol=1e-4, atol=1e-6)
    assert float(term.detach()) > 1e-4
    both = [torch.autograd.grad(x, [*loop.model.parameters()], retain_graph=True) for x in (term, expected)]
    for got, wanted in zip(*both, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-6)
    assert set(terms) == {"objective", "distillation/lwf"}


def test_lwf_over_all_outputs_holds_new_classes_down_too() -> None:
    loop, old = middle(make("lwf", over="all", strength=0.25))
    batch = last_batch()
    term, output, _ = term_of(loop, batch)
    before = old(batch).logits.detach()
    expected = 0.25 * torch.stack([kl(output.logits[b], before[b], 2.0) for b in range(4)]).mean()
    torch.testing.assert_close(term, expected, rtol=1e-4, atol=1e-6)
    assert output.logits.shape[1] == before.shape[1] == 6
    (pull,) = torch.autograd.grad(term, output.logits)
    assert (pull[:, 4:].abs() > 1e-4).any(), "new classes are held as well"


def test_lwf_over_all_outputs_needs_one_classification() -> None:
    with pytest.raises(CompositionError, match=r"the scenario is 'task'.*leave over out"):
        middle(make("lwf", over="all"), scenario="task")
    with pytest.raises(CompositionError, match="the objective 'causal-lm'"):
        looped(make("lwf", over="all"), model=model_of("llama"), objective="causal-lm")


def test_lwf_in_the_task_scenario_asks_each_experience_by_itself() -> None:
    loop, old = middle(make("lwf"), scenario="task")
    batch = last_batch()
    term, output, _ = term_of(loop, batch)
    before = old(batch).logits.detach()
    each = [kl(output.logits[b, part], before[b, part], 2.0) for b in range(4) for part in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(term, torch.stack(each).mean(), rtol=1e-4, atol=1e-6)


def test_lwf_weighs_experiences_alike() -> None:
    loop, old = middle(make("lwf", weighting="experiences", strength=0.7))
    batch = last_batch()
    _, output, terms = term_of(loop, batch)
    before = old(batch).logits.detach()
    distilled = 0.7 * torch.stack([kl(output.logits[b, :4], before[b, :4], 2.0) for b in range(4)]).mean()
    objective = loop.loss_rows(output, batch).mean()
    expected = objective / 3 + (1 - 1 / 3) * distilled
    torch.testing.assert_close(torch.stack([*terms.values()]).sum(), expected, rtol=1e-4, atol=1e-6)


def test_lwf_looks_at_the_current_rows_and_features_at_all() -> None:
    replay = {"capacity": 20, "weighting": "experiences"}
    for kind in ("lwf", "feature-distillation"):
        settings = {"weighting": "experiences"} if kind == "lwf" else {}
        loop, old = middle(make(kind, **settings), Rehearsal(**replay))
        loop.batch_size = 4
        batch = loop.extend(last_batch())
        assert len(batch["labels"]) == 8 and loop.current_rows == 4
        output = loop.forward(batch)
        terms = dict(loop.terms(batch, output))
        before = old(batch)
        if kind == "lwf":
            distilled = torch.stack([kl(output.logits[b, :4], before.logits[b, :4].detach(), 2.0) for b in range(4)])
            expected = (1 - 1 / 3) * (distilled.mean() - terms["objective"])
        else:
            expected = 0.5 * (output.features - before.features.detach()).square().sum(1).mean()
        torch.testing.assert_close(terms[f"distillation/{kind}"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("distance", ["l2", "cosine"])
def test_feature_distillation_is_its_formula(distance: str) -> None:
    loop, old = middle(make("feature-distillation", distance=distance, strength=0.7))
    batch = last_batch()
    term, output, _ = term_of(loop, batch)
    one, other = output.features, old(batch).features.detach()
    rows = []
    for b in range(4):
        cosine = (one[b] @ other[b]) / (one[b].norm() * other[b].norm())
        rows.append(0.5 * ((one[b] - other[b]) ** 2).sum() if distance == "l2" else 1 - cosine)
    torch.testing.assert_close(term, 0.7 * torch.stack(rows).mean(), rtol=1e-4, atol=1e-6)
    assert float(term.detach()) > 1e-5


@pytest.mark.parametrize("kind", ["lwf", "feature-distillation"])
def test_nothing_in_the_first_experience_nor_at_strength_zero(kind: str) -> None:
    for part, tasks in ((make(kind), 0), (make(kind, strength=0.0), 1)):
        loop = looped(part)
        for index in range(tasks):
            train(loop, experience(index))
        loop.begin(experience(tasks), steps=1)
        batch = experience(tasks).train[torch.arange(4)]
        assert [name for name, _ in loop.terms(batch, loop.forward(batch))] == ["objective"]
        loop.current_rows = 4
        assert part.nbytes() == 0


@pytest.mark.parametrize("kind", ["lwf", "feature-distillation"])
def test_the_old_model_draws_nothing_and_leaves_the_new_one_alone(kind: str) -> None:
    part: Any = make(kind)
    loop, old = middle(part, dropout=0.5)
    batch, drawn, before = last_batch(), torch.get_rng_state(), values(loop.model)
    got = part.teacher(loop, batch)
    assert torch.equal(drawn, torch.get_rng_state())
    assert torch.equal(got.logits, old(batch).logits) and not got.logits.requires_grad
    assert loop.model.training and all(torch.equal(t, before[n]) for n, t in values(loop.model).items())


def test_running_statistics_belong_to_the_old_model() -> None:
    model = growing_model()
    model.backbone.layers.insert(1, nn.BatchNorm1d(6))
    part: Any = make("feature-distillation")
    loop = looped(part, model=model)
    train(loop, experience(0))
    loop.begin(experience(1), steps=3)
    old, batch = frozen(loop), last_batch(1)
    for index in torch.arange(12).split(4):
        step(loop, experience(1).train[index])
    assert torch.equal(part.teacher(loop, batch).features, old(batch).features)


def tokens(batch: Batch) -> Batch:
    """With a prompt that is not counted, a row that counts for nothing, and padding."""
    labels, mask = batch["labels"].clone(), batch["attention_mask"].clone()
    labels[0, :3] = -100
    labels[1] = -100
    labels[2, 4:], mask[2, 4:] = -100, 0
    return {**batch, "labels": labels, "attention_mask": mask}


def test_lwf_of_a_language_model_is_its_formula_token_by_token() -> None:
    part = make("lwf")
    model = model_of("llama").requires_grad_(True).train()
    loop = looped(part, model=model, objective="causal-lm", lr=0.5)
    loop.begin(experience_of("llama", 0), steps=1)
    loop.end()
    loop.begin(experience_of("llama", 1), steps=1)
    old = frozen(loop)
    step(loop, batch_of("llama", 1))
    batch = {name: column[:5] for name, column in tokens(batch_of("llama", 1)).items()}
    term, output, _ = term_of(loop, batch)
    before = old(batch).logits.detach()
    rows = []
    for b in range(5):
        counted = [t for t in range(5) if batch["labels"][b, t + 1] != -100]
        each = [kl(output.logits[b, t], before[b, t], 2.0) for t in counted]
        rows.append(torch.stack(each).mean() if each else torch.zeros(()))
    torch.testing.assert_close(term, torch.stack(rows).mean(), rtol=1e-3, atol=1e-6)
    assert float(term.detach()) > 1e-5


ADAPTERS: dict[str, Any] = {
    "continue": lambda: LoRA(rank=2),
    "stack": lambda: LoRA(rank=2, across_tasks="stack"),
    "merge": lambda: LoRA(rank=2, across_tasks="merge", init="orthogonal"),
    "adalora-merge": lambda: AdaLoRA(init_rank=3, target_rank=2),
    "adalora-stack": lambda: AdaLoRA(init_rank=3, target_rank=2, across_tasks="stack"),
}


def adapted(across: str, family: str) -> tuple[TrainingContext, Any]:
    part: Any = make("lwf")
    model = model_of(family)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1e-2)
    objective: Any = "causal-lm" if family == "llama" else "classification"
    return TrainingContext(model, [ADAPTERS[across](), part], optimizer, seed=3, objective=objective), part


def run(loop: TrainingContext, family: str, task: int, steps: int = 3) -> None:
    loop.model.train()
    for _ in range(steps):
        step(loop, batch_of(family, task))


@pytest.mark.parametrize("across", ADAPTERS)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_with_an_adapter_the_old_model_is_what_the_last_experience_left(across: str, family: str) -> None:
    """Right through a merge or a new adapter, after training, and in a run that is cut and resumed."""
    loop, part = adapted(across, family)
    with loop.randomness.framework():
        loop.begin(experience_of(family, 0), steps=3)
        run(loop, family, 0)
        loop.end()
        loop.model.eval()
        with torch.no_grad():
            expected = loop.model(batch_of(family, 0)).logits
        loop.begin(experience_of(family, 1), steps=3)
        run(loop, family, 1)
        got = part.teacher(loop, batch_of(family, 0)).logits
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        loop.model.eval()
        with torch.no_grad():
            assert not torch.allclose(loop.model(batch_of(family, 0)).logits, expected, atol=1e-3)
    trained = tensor_bytes(list(loop.parameters().values()))
    assert trained <= part.nbytes() <= trained + 1000 < 0.6 * tensor_bytes(list(loop.model.parameters()))

    again, resumed = adapted(across, family)
    with again.randomness.framework():
        again.parts[0].load_state_dict(loop.parts[0].state_dict())
        resumed.load_state_dict(part.state_dict())
        again.model.load_saved(loop.model.saved_tensors())  # type: ignore[operator]
        again._parameters = None
        assert torch.equal(resumed.teacher(again, batch_of(family, 0)).logits, got)


def test_features_need_a_head_and_lwf_needs_classes() -> None:
    strategy = Strategy(make("feature-distillation"))
    with pytest.raises(CompositionError, match="gives features"):
        strategy.check(objective="classification", gives_features=False)
    with pytest.raises(CompositionError, match="does not work for regression"):
        Strategy(make("lwf")).check(objective="regression", gives_features=True)


@pytest.mark.parametrize(
    "kind,settings",
    [
        ("lwf", {"temperature": 0.0}),
        ("lwf", {"strength": -1.0}),
        ("lwf", {"weighting": "rows"}),
        ("feature-distillation", {"strength": -1.0}),
        ("feature-distillation", {"distance": "l1"}),
    ],
)
def test_impossible_settings_are_refused(kind: str, settings: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=next(iter(settings))):
        make(kind, **settings)


def test_a_plain_model_is_distilled_over_the_classes_so_far() -> None:
    part = make("lwf")
    loop = looped(part, model=plain_model(6), competition="seen")
    train(loop, experience(0))
    loop.begin(experience(1), steps=1)
    old = frozen(loop)
    step(loop, experience(1).train[torch.arange(4)])
    term, output, _ = term_of(loop, last_batch(1))
    before = old(last_batch(1)).logits.detach()
    expected = torch.stack([kl(output.logits[b, :2], before[b, :2], 2.0) for b in range(4)]).mean()
    close({"term": term.detach()}, {"term": expected.detach()})
