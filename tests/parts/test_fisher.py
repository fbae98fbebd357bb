"""Every way to the Fisher against a slow loop that takes one row, one backward pass, and squares."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from penalty_bench import Branches, Everything, FakeContext, Recurrent, Reused, Tied, TokensFirst, Wrapped
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from continual.errors import CompositionError, TrainingError
from continual.kinds import Objective
from continual.models.lowrank import adapted_layers, effective_weight
from continual.parts.penalty import fisher_forms
from continual.parts.penalty.fisher import diagonal_fisher
from continual.table import Batch, TensorTable

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
Build = Callable[[], tuple[FakeContext, Batch]]


@pytest.fixture(autouse=True)
def _own_draws() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        yield


def slow_fisher(context: FakeContext, batch: Batch) -> dict[str, Tensor]:
    """Rows one by one: the definition."""
    context.model.eval()
    parameters = context.parameters()
    totals = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for row in range(len(batch["labels"])):
        one = {name: column[row : row + 1] for name, column in batch.items()}
        loss = context.loss_rows(context.forward(one), one).sum()
        for name, g in zip(
            parameters, torch.autograd.grad(loss, [*parameters.values()], allow_unused=True), strict=True
        ):
            if g is not None:
                totals[name] += g.square()
    return {name: total / len(batch["labels"]) for name, total in totals.items()}


def same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = float(tensor.abs().max())
        assert got[name].shape == tensor.shape and got[name].dtype == torch.float32
        assert not got[name].requires_grad
        torch.testing.assert_close(
            got[name], tensor, rtol=1e-4, atol=1e-6 * scale + 1e-20, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert any(float(tensor.abs().max()) > 0 for tensor in expected.values())


def pieces(batch: Batch, size: int) -> list[Batch]:
    columns = {name: column.split(size) for name, column in batch.items()}
    return [dict(zip(columns, parts, strict=True)) for parts in zip(*columns.values(), strict=True)]


def dense(model: nn.Module, *shape: int, rows: int = 6, classes: int = 3) -> tuple[FakeContext, Batch]:
    batch = {"inputs": torch.randn(rows, *shape), "labels": torch.randint(classes, (rows,))}
    return FakeContext(Wrapped(model)), batch


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)
    )


def ids(model: nn.Module, vocabulary: int, classes: int) -> tuple[FakeContext, Batch]:
    batch = {"inputs": torch.randint(vocabulary, (6, 5)), "labels": torch.randint(classes, (6,))}
    return FakeContext(Wrapped(model)), batch


def bert(adapter: bool = True) -> tuple[FakeContext, Batch]:
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=3
    )
    model: Any = BertForSequenceClassification(config)
    if adapter:
        model = get_peft_model(model, LoraConfig(r=3, target_modules=["query", "value", "dense"], lora_dropout=0.3))
    return FakeContext(Wrapped(awake(model), ("input_ids", "attention_mask"))), tokens(30)


def llama(adapter: Any = None, objective: Objective = "causal-lm") -> tuple[FakeContext, Batch]:
    config = LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        pad_token_id=0,
    )
    model: Any = LlamaForCausalLM(config)
    if adapter is not None:
        model = get_peft_model(model, adapter)
    batch = tokens(30)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return FakeContext(Wrapped(awake(model), ("input_ids", "attention_mask")), objective), batch


def gpt2() -> tuple[FakeContext, Batch]:
    config = GPT2Config(vocab_size=30, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1)
    batch = tokens(30)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return FakeContext(Wrapped(awake(GPT2LMHeadModel(config)), ("input_ids", "attention_mask")), "causal-lm"), batch


def awake(model: nn.Module) -> nn.Module:
    """With adapters that are not at their zero start."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def tokens(vocabulary: int) -> Batch:
    mask = (torch.arange(6) < torch.tensor([6, 3, 5, 2])[:, None]).to(torch.int64)
    return {
        "input_ids": torch.randint(1, vocabulary, (4, 6)) * mask,
        "attention_mask": mask,
        "labels": torch.tensor([0, 2, 1, 1]),
    }


LORA = LoraConfig(r=3, target_modules=["q_proj", "v_proj", "down_proj"], lora_alpha=5)
ADALORA = AdaLoraConfig(init_r=3, target_r=2, target_modules=["q_proj", "v_proj"], total_step=50, tinit=2, tfinal=5)

CASES: dict[str, Build] = {
    "mlp": lambda: dense(mlp(), 6),
    "tokens through linear": lambda: dense(
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(15, 3)), 3, 4
    ),
    "layer norm": lambda: dense(nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3)), 6),
    "layer norm over two axes": lambda: dense(
        nn.Sequential(nn.LayerNorm((3, 4)), nn.Flatten(), nn.Linear(12, 3)), 3, 4
    ),
    "layer called twice": lambda: dense(Reused(), 6),
    "tied modules": lambda: ids(Tied(bare=False), 7, 7),
    "tied, used bare": lambda: ids(Tied(bare=True), 7, 7),
    "rows on the second axis": lambda: dense(TokensFirst(), 2, 6),
    "everything": lambda: ids(Everything(), 9, 3),
    "recurrent": lambda: dense(Recurrent(), 3, 4),
    "branches by its data": lambda: dense(Branches(), 6),
    "bert, lora": bert,
    "bert, all": lambda: bert(adapter=False),
    "llama, lora": lambda: llama(LORA),
    "llama, adalora": lambda: llama(ADALORA),
    "llama, all": llama,
    "gpt2, all": gpt2,
}


@pytest.mark.parametrize("case", CASES)
def test_auto_is_the_slow_loop(case: str) -> None:
    context, batch = CASES[case]()
    expected = slow_fisher(context, batch)
    same(diagonal_fisher(context, [batch], labels="true"), expected)
    context.model.train()
    ragged = diagonal_fisher(context, pieces(batch, 3 if len(batch["labels"]) == 4 else 4), labels="true")
    same(ragged, expected)


@pytest.mark.parametrize("case", ["mlp", "tied modules", "everything"])
@pytest.mark.parametrize("way", ["vmap", "loop"])
def test_each_way_is_the_slow_loop(case: str, way: Any) -> None:
    context, batch = CASES[case]()
    same(diagonal_fisher(context, pieces(batch, 4), labels="true", way=way), slow_fisher(context, batch))


@pytest.mark.parametrize(
    "case", ["mlp", "bert, lora", "bert, all", "llama, lora", "llama, adalora", "llama, all", "gpt2, all"]
)
def test_closed_forms_carry_whole_transformers(case: str) -> None:
    """Two forward passes for one batch: the check and the pass itself; no row by row."""
    context, batch = CASES[case]()
    diagonal_fisher(context, [batch], labels="true")
    assert context.forwards == 2


def test_torch_func_says_when_it_cannot_follow() -> None:
    context, batch = CASES["branches by its data"]()
    with pytest.raises(CompositionError, match=r"torch\.func cannot follow this model .* use way='auto' or way='loop'"):
        diagonal_fisher(context, [batch], labels="true", way="vmap")


@settings(max_examples=25, deadline=None, database=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(3, 6), min_size=2, max_size=4),
    tokens_=st.integers(0, 3),
    rows=st.integers(1, 7),
    size=st.integers(1, 7),
)
def test_any_mlp_at_any_batch_size(sizes: list[int], tokens_: int, rows: int, size: int) -> None:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.GELU()]
    if tokens_:
        layers += [nn.Flatten(), nn.Linear(tokens_ * sizes[-1], 3)]
    else:
        layers += [nn.Linear(sizes[-1], 3)]
    context, batch = dense(nn.Sequential(*layers), *([tokens_] if tokens_ else []), sizes[0], rows=rows)
    same(diagonal_fisher(context, pieces(batch, size), labels="true"), slow_fisher(context, batch))


def test_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for case in ("tokens through linear", "tied modules", "everything"):
        context, batch = CASES[case]()
        expected = slow_fisher(context, batch)
        monkeypatch.setattr(fisher_forms, "LIMIT", 1)
        monkeypatch.setattr("continual.parts.penalty.fisher_rows.LIMIT", 1)
        monkeypatch.setattr("continual.parts.penalty.fisher_labels.LIMIT", 1)
        same(diagonal_fisher(context, [batch], labels="true"), expected)
        generators = [torch.Generator().manual_seed(1) for _ in range(2)]
        small = diagonal_fisher(context, [batch], labels="sampled", generator=generators[0])
        monkeypatch.undo()
        same(small, diagonal_fisher(context, [batch], labels="sampled", generator=generators[1]))


def enumerated(context: FakeContext, batch: Batch, weights_BK: Tensor) -> dict[str, Tensor]:
    """Sum over classes of weight × squared gradient of log p(class), one row and one class at a time."""
    rows, classes = weights_BK.shape
    sums: dict[str, Tensor] = {}
    for row in range(rows):
        for label in range(classes):
            if weights_BK[row, label] == 0:
                continue
            one = {**{n: c[row : row + 1] for n, c in batch.items()}, "labels": torch.tensor([label])}
            for name, tensor in slow_fisher(context, one).items():
                sums[name] = sums.get(name, torch.zeros(())) + weights_BK[row, label] * tensor / rows
    return sums


@pytest.mark.parametrize("way", ["auto", "vmap", "loop"])
@pytest.mark.parametrize("active", [None, torch.tensor([True, False, True]), torch.rand(6, 3) < 0.5])
def test_all_labels_are_the_expectation(way: Any, active: Tensor | None) -> None:
    context, batch = dense(mlp(), 6)
    if active is not None and active.dim() == 2:
        active[:, 1] = True
    context._active = active
    context.model.eval()
    with torch.no_grad():
        logits = context.forward(batch).logits
        p = (logits if active is None else logits.masked_fill(~active, -torch.inf)).softmax(1)
    for row_active in [active] if active is None or active.dim() == 1 else []:
        context._active = row_active
        same(diagonal_fisher(context, [batch], labels="all", way=way), enumerated(context, batch, p))
    if active is not None and active.dim() == 2:
        got = diagonal_fisher(context, [batch], labels="all", way=way)
        parts = []
        for row in range(6):
            context._active = active[row]
            one = {n: c[row : row + 1] for n, c in batch.items()}
            parts.append(enumerated(context, one, p[row : row + 1]))
        same(got, {name: torch.stack([part[name] for part in parts]).mean(0) for name in parts[0]})


def test_predicted_labels_are_the_most_likely() -> None:
    context, batch = dense(mlp(), 6)
    context.model.eval()
    predicted = context.forward(batch).logits.argmax(1)
    got = diagonal_fisher(context, [batch], labels="predicted")
    same(got, slow_fisher(context, {**batch, "labels": predicted}))


@pytest.mark.parametrize("active", [None, torch.tensor([True, False, True])])
def test_sampled_labels_follow_the_model(active: Tensor | None) -> None:
    context, batch = dense(mlp(), 6, rows=1)
    batch = {"inputs": batch["inputs"].repeat(4000, 1), "labels": batch["labels"].repeat(4000)}
    context._active = active
    generator = torch.Generator().manual_seed(1)
    sampled = diagonal_fisher(context, [batch], labels="sampled", generator=generator)
    exact = diagonal_fisher(context, [batch], labels="all")
    for name, tensor in exact.items():
        assert float((sampled[name] - tensor).norm() / tensor.norm()) < 0.1
    again = diagonal_fisher(context, [batch], labels="sampled", generator=torch.Generator().manual_seed(1))
    other = diagonal_fisher(context, [batch], labels="sampled", generator=torch.Generator().manual_seed(2))
    assert all(torch.equal(again[name], sampled[name]) for name in exact)
    assert any(not torch.equal(other[name], sampled[name]) for name in exact)


def test_sampled_labels_do_not_depend_on_the_batch_size() -> None:
    context, batch = dense(mlp(), 6, rows=21)
    whole = diagonal_fisher(context, [batch], labels="sampled", generator=torch.Generator().manual_seed(1))
    same(
        diagonal_fisher(context, pieces(batch, 4), labels="sampled", generator=torch.Generator().manual_seed(1)), whole
    )


def test_language_model_labels_stay_within_the_counted_tokens() -> None:
    context, batch = llama(LORA)
    context.model.eval()
    with torch.no_grad():
        predicted = context.forward(batch).logits[:, :-1].argmax(-1)
    labels = batch["labels"].clone()
    labels[:, 1:] = torch.where(labels[:, 1:] != -100, predicted, -100)
    same(diagonal_fisher(context, [batch], labels="predicted"), slow_fisher(context, {**batch, "labels": labels}))
    sampled = diagonal_fisher(context, [batch], labels="sampled", generator=torch.Generator().manual_seed(0))
    assert all(torch.isfinite(tensor).all() for tensor in sampled.values())
    context.objective = "seq2seq"
    with torch.no_grad():
        predicted = torch.where(batch["labels"] != -100, context.forward(batch).logits.argmax(-1), -100)
    same(diagonal_fisher(context, [batch], labels="predicted"), slow_fisher(context, {**batch, "labels": predicted}))


def test_rows_of_one_token_have_nothing_to_draw() -> None:
    context, batch = llama(LORA)
    first = {name: column[:, :1] for name, column in batch.items()}
    sampled = diagonal_fisher(context, [first], labels="sampled", generator=torch.Generator().manual_seed(0))
    assert all(not tensor.any() for tensor in sampled.values())


def test_regression_draws_from_the_normal_distribution_of_its_loss() -> None:
    """For K outputs with loss = mean of squares, the Fisher of the last bias is 2/K for each."""
    model = nn.Linear(4, 3)
    batch = {"inputs": torch.zeros(1, 4).repeat(6000, 1), "labels": torch.zeros(6000, 3)}
    context = FakeContext(Wrapped(model), "regression")
    bias = diagonal_fisher(context, [batch], labels="sampled", generator=torch.Generator().manual_seed(0))["inner.bias"]
    torch.testing.assert_close(bias, torch.full((3,), 2 / 3), rtol=0.1, atol=0)
    batch = {"inputs": torch.randn(6, 4), "labels": torch.randn(6, 3)}
    same(diagonal_fisher(context, [batch], labels="true"), slow_fisher(context, batch))


def test_rows_without_a_label_have_no_gradient() -> None:
    context, batch = dense(mlp(), 6)
    batch["labels"][1] = -100
    kept = torch.tensor([0, 2, 3, 4, 5])
    counted = {name: column[kept] for name, column in batch.items()}
    for labels in ("true", "predicted", "all"):
        got = diagonal_fisher(context, [batch], labels=labels)
        expected = diagonal_fisher(context, [counted], labels=labels)
        same(got, {name: tensor * 5 / 6 for name, tensor in expected.items()})


@pytest.mark.parametrize("labels,objective", [("all", "causal-lm"), ("all", "regression"), ("predicted", "regression")])
def test_labels_that_mean_nothing_are_refused(labels: Any, objective: Objective) -> None:
    context, batch = dense(mlp(), 6)
    context.objective = objective
    with pytest.raises(CompositionError, match="set labels to 'sampled' or 'true'"):
        diagonal_fisher(context, [batch], labels=labels)


def test_no_rows_are_refused() -> None:
    context, _ = dense(mlp(), 6)
    with pytest.raises(TrainingError, match="no row"):
        diagonal_fisher(context, [])


@pytest.mark.parametrize("adapter", [LORA, ADALORA], ids=["lora", "adalora"])
def test_effective_weights(adapter: Any) -> None:
    """Against a zero matrix added to each layer, whose gradient autograd gives row by row."""
    context, batch = llama(adapter)
    for parameter in [context.model.inner.base_model.model.lm_head.weight]:
        parameter.requires_grad_(True)
    layers = adapted_layers(context.model)
    probes = {name: torch.zeros_like(effective_weight(layer)).requires_grad_() for name, layer in layers.items()}
    handles = [
        layer.register_forward_hook(lambda _, args, out, z=probes[name]: out + F.linear(args[0], z))
        for name, layer in layers.items()
    ]
    expected = {name: torch.zeros_like(z) for name, z in probes.items()}
    context.model.eval()
    for row in range(4):
        one = {name: column[row : row + 1] for name, column in batch.items()}
        loss = context.loss_rows(context.forward(one), one).sum()
        for name, g in zip(probes, torch.autograd.grad(loss, [*probes.values()]), strict=True):
            expected[name] += g.square() / 4
    for handle in handles:
        handle.remove()
    head = "inner.base_model.model.lm_head.weight"
    expected[head] = slow_fisher(context, batch)[head]
    got = diagonal_fisher(context, pieces(batch, 2), labels="true", space="weights")
    same({name: got[name] for name in expected}, expected)
    assert set(got) == set(expected)


def test_dora_has_no_effective_weight() -> None:
    context, batch = llama(LoraConfig(r=3, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(CompositionError, match="DoRA"):
        diagonal_fisher(context, [batch], labels="true", space="weights")
    same(diagonal_fisher(context, [batch], labels="true"), slow_fisher(context, batch))


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 3:
            raise RuntimeError("no third")
        return x


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("way", ["auto", "vmap", "loop"])
def test_nothing_is_left_behind(breaks: bool, way: Any) -> None:
    context, batch = dense(nn.Sequential(mlp(), Fails(), nn.Conv1d(1, 1, 1), nn.Linear(3, 3)), 6, rows=7)
    context.model.inner[2] = nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 1, 1), nn.Flatten())
    context.model.train()
    context.model.inner[0].eval()
    flags = {name: module.training for name, module in context.model.named_modules()}
    before = {name: p.detach().clone() for name, p in context.parameters().items()}
    next(context.model.parameters()).grad = torch.ones(8, 6)
    drawn = torch.get_rng_state()
    batches = pieces(batch, 4) if breaks else [batch]
    if breaks:
        with pytest.raises(RuntimeError, match="no third"):
            diagonal_fisher(context, [*batches, {n: c[:3] for n, c in batch.items()}], labels="true")
    else:
        diagonal_fisher(context, batches, labels="true", way=way)
    assert {name: module.training for name, module in context.model.named_modules()} == flags
    grads = [p.grad for p in context.model.parameters()]
    assert torch.equal(grads[0], torch.ones(8, 6)) and all(grad is None for grad in grads[1:])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in context.model.modules())
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in context.parameters().items())
    assert torch.equal(torch.get_rng_state(), drawn)


def test_only_what_trains_is_measured() -> None:
    context, batch = dense(mlp(), 6)
    context.model.inner[0].requires_grad_(False)
    got = diagonal_fisher(context, [batch], labels="true")
    assert set(got) == {"inner.3.weight", "inner.3.bias", "inner.5.weight", "inner.5.bias"}
    same(got, slow_fisher(context, batch))


def test_half_precision_stays_close() -> None:
    context, batch = dense(mlp(), 6)
    expected = slow_fisher(context, batch)
    context.model.to(torch.bfloat16)
    batch["inputs"] = batch["inputs"].bfloat16()
    for name, tensor in diagonal_fisher(context, [batch], labels="true").items():
        assert tensor.dtype == torch.float32
        assert float((tensor - expected[name]).norm() / expected[name].norm()) < 0.1


def test_the_table_of_the_experience_is_enough() -> None:
    context, batch = dense(mlp(), 6, rows=9)
    table = TensorTable(dict(batch))
    same(diagonal_fisher(context, context.batches(table), labels="true"), slow_fisher(context, batch))
