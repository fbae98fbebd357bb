"""LoRA over several tasks, on tiny transformers: what trains, what stays, what a saved state brings back."""

from __future__ import annotations

import pytest
import torch
from adapter_bench import FAMILIES, Bench, assert_same, base_of, batch_of, model_of, tensors_of
from peft import LoraConfig, get_peft_model
from torch import nn

from continual.errors import CompositionError, ModelError, SpecError
from continual.models.lowrank import adapted_layers, adapter_parameters, effective_weight
from continual.models.model import Model
from continual.parts.adapter.lora import LoRA, LoRASettings
from continual.parts.registry import part_class
from continual.spec import parse

ACROSS = ("continue", "stack", "merge")


def trained(family: str, across: str, tasks: int = 3, steps: int = 3, **settings: object) -> Bench:
    bench = Bench(family, LoRA(across_tasks=across, rank=3, **settings))
    for task in range(tasks):
        bench.task(task, steps)
    return bench


def adapters_of(bench: Bench) -> list[str]:
    assert isinstance(bench.part, LoRA)
    return list(bench.part.adapters.names)


@pytest.mark.parametrize("family", FAMILIES)
def test_first_task_trains_adapter_and_head_only(family: str) -> None:
    bench = Bench(family, LoRA(rank=3))
    before, transformer = bench.answer(), bench.model.transformer
    bench.begin(0, 2)
    assert torch.equal(bench.answer(), before), "a fresh adapter changes nothing"
    assert bench.model.transformer is transformer, "wrapped in place"
    trainable = [name for name, parameter in bench.model.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name or name.startswith("head.") for name in trainable)
    assert sum(parameter.numel() for parameter in bench.loop.parameters().values()) == sum(
        parameter.numel() for name, parameter in bench.model.named_parameters() if name in trainable
    )
    weights = tensors_of(bench)
    bench.step(0, 2)
    after = tensors_of(bench)
    for name, value in weights.items():
        used = name in trainable and "pooler" not in name
        assert torch.equal(value, after[name]) == (not used), name
    assert not torch.equal(bench.answer(), before)
    assert {name for name in bench.model.saved_tensors() if "base_layer" in name} == (
        set() if family != "mlp" else {name for name in weights if "base_layer" in name}
    ), "the pretrained base is not saved"


@pytest.mark.parametrize("across", ACROSS)
def test_every_task_changes_the_model_and_keeps_the_count(across: str) -> None:
    bench = Bench("bert", LoRA(across_tasks=across, rank=3))
    counts, answers = [], []
    for task in range(3):
        bench.task(task, 2)
        counts.append(len(adapters_of(bench)))
        answers.append(bench.answer())
    assert counts == {"continue": [1, 1, 1], "stack": [1, 2, 3], "merge": [1, 1, 1]}[across]
    assert not torch.equal(answers[0], answers[1]) and not torch.equal(answers[1], answers[2])
    assert adapters_of(bench)[-1] == {"continue": "t0001", "stack": "t0003", "merge": "t0003"}[across]
    assert bench.model.adapter_replaced == (across != "continue")


def test_stack_keeps_old_adapters_bit_unchanged_and_active() -> None:
    bench = trained("llama", "stack", tasks=2, dropout=0.3)
    old = {name: value for name, value in tensors_of(bench).items() if ".t0001" in name or ".t0002" in name}
    before = bench.answer()
    bench.begin(2, 3)
    torch.testing.assert_close(bench.answer(), before, rtol=0, atol=0)
    bench.step(2, 3)
    now = tensors_of(bench)
    assert old and all(torch.equal(value, now[name]) for name, value in old.items())
    for layer in adapted_layers(bench.model).values():
        assert layer.active_adapters == ["t0001", "t0002", "t0003"]
        for name in layer.active_adapters:
            assert all(p.requires_grad == (name == "t0003") for p in adapter_parameters(layer, name).values())
        assert isinstance(layer.lora_dropout["t0001"], nn.Identity), "a frozen adapter is not noisy"
        assert isinstance(layer.lora_dropout["t0003"], nn.Dropout)


@pytest.mark.parametrize("family", FAMILIES)
def test_merge_moves_what_was_learned_into_the_base(family: str) -> None:
    bench = trained(family, "merge", tasks=1)
    wanted = {name: effective_weight(layer).detach().clone() for name, layer in adapted_layers(bench.model).items()}
    before = bench.answer()
    bench.begin(1, 2)
    torch.testing.assert_close(bench.answer(), before, rtol=0, atol=1e-5)
    layers = adapted_layers(bench.model)
    for name, layer in layers.items():
        torch.testing.assert_close(effective_weight(layer).detach(), wanted[name], rtol=0, atol=1e-6)
        assert list(layer.lora_A) == ["t0002"] and not layer.merged_adapters
    assert not any("t0001" in name for name in bench.model.state_dict())


def test_the_same_adapter_keeps_its_optimiser_state_and_a_new_one_begins_fresh() -> None:
    kept = trained("gpt2", "continue", tasks=1)
    states = {name: kept.optimizer.state[p]["exp_avg"].clone() for name, p in kept.loop.parameters().items()}
    kept.begin(1, 2)
    for name, parameter in kept.loop.parameters().items():
        assert torch.equal(kept.optimizer.state[parameter]["exp_avg"], states[name])
    for across in ("stack", "merge"):
        bench = trained("gpt2", across, tasks=1)
        bench.begin(1, 2)
        known = {name for name, p in bench.loop.parameters().items() if p in bench.optimizer.state}
        assert known == {"head.weight", "head.bias"}, "the head goes on, the new adapter is new"
        assert len(bench.optimizer.param_groups[0]["params"]) == len(bench.loop.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("across", ACROSS)
def test_cut_in_mid_task_goes_on_bit_for_bit(family: str, across: str) -> None:
    settings = {"across_tasks": across, "rank": 3, "dropout": 0.2}
    uncut = Bench(family, LoRA(**settings))
    for task in range(2):
        uncut.task(task, 2)
    uncut.begin(2, 4)
    uncut.step(2, 2)
    state = uncut.save()
    uncut.step(2, 2)
    resumed = Bench.load(family, LoRA(**settings), state, task=2)
    assert [n for n, p in resumed.model.named_parameters() if p.requires_grad] == state["trainable"]
    resumed.step(2, 2)
    assert_same(tensors_of(uncut), tensors_of(resumed))
    uncut.loop.end()
    resumed.loop.end()
    uncut.task(3, 2)
    resumed.task(3, 2)
    assert_same(tensors_of(uncut), tensors_of(resumed))


def test_rebuilding_moves_no_generator() -> None:
    state = trained("bert", "stack", tasks=2).part.state_dict()
    fresh = Bench("bert", LoRA(across_tasks="stack", rank=3))
    before = torch.get_rng_state()
    fresh.part.load_state_dict(state)
    assert torch.equal(before, torch.get_rng_state())
    assert adapters_of(fresh) == ["t0001", "t0002"]


def test_a_state_without_adapters_loads() -> None:
    bench = Bench("bert", LoRA())
    bench.part.load_state_dict(LoRA().state_dict())
    assert adapters_of(bench) == []
    bench.task(0, 1)


@pytest.mark.parametrize(
    ("changed", "value"),
    [
        ("rank", 2),
        ("alpha", 3.0),
        ("dropout", 0.5),
        ("target", ["query"]),
        ("across_tasks", "stack"),
        ("init", "gaussian"),
        ("init", "orthogonal"),
        ("use_rslora", True),
    ],
)
def test_every_setting_changes_something(changed: str, value: object) -> None:
    settings = {"rank": 4, "alpha": 8, "across_tasks": "merge"}

    def weights(**settings: object) -> list[torch.Tensor]:
        bench = Bench("bert", LoRA(**settings))
        bench.task(0, 2).task(1, 2)
        return [p.detach() for p in bench.model.parameters()]

    plain, other = weights(**settings), weights(**{**settings, changed: value})
    assert len(plain) != len(other) or any(
        a.shape != b.shape or not torch.equal(a, b) for a, b in zip(plain, other, strict=True)
    )


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal"])
def test_no_init_touches_the_base_or_the_answer(init: str) -> None:
    bench = Bench("gpt2", LoRA(init=init, rank=4))
    before, base = bench.answer(), base_of("gpt2").state_dict()
    bench.begin(0, 1)
    torch.testing.assert_close(bench.answer(), before, rtol=0, atol=1e-5)
    now = {n.replace(".base_layer.", "."): p for n, p in bench.model.transformer.state_dict().items()}
    assert all(torch.equal(value, now[name]) for name, value in base.items())


def test_targets_by_name_and_what_all_linear_leaves_out() -> None:
    bench = Bench("llama", LoRA(target=["q_proj", "model.layers.1.mlp.up_proj"]))
    bench.begin(0, 1)
    names = [name.removeprefix("backbone.transformer.") for name in adapted_layers(bench.model)]
    assert names == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    whole = Bench("llama", LoRA())
    whole.begin(0, 1)
    assert len(adapted_layers(whole.model)) == 14
    assert not any("lm_head" in name for name in adapted_layers(whole.model))


def test_layers_that_torch_never_calls_are_no_targets() -> None:
    backbone = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 4))
    model = Model(backbone, gives_features=False, objectives=("classification",), spec={})
    part = LoRA()
    part.adapters.add(model, part._config(), "all-linear")
    assert list(part.adapters.layers) == ["1"]


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (["q_projj"], ["'q_projj'", "q_proj", "down_proj"]),
        (["q_proj", "lm_head"], ["'lm_head'"]),
    ],
)
def test_targets_that_match_nothing_are_refused(target: list[str], words: list[str]) -> None:
    bench = Bench("llama", LoRA(target=target))
    with pytest.raises(CompositionError) as error:
        bench.begin(0, 1)
    assert all(word in str(error.value) for word in words)
    assert all(parameter.requires_grad for parameter in bench.model.parameters()), "nothing was frozen"


def test_a_model_without_linear_layers_is_refused() -> None:
    model = Model(nn.Sequential(nn.Conv2d(1, 4, 3)), gives_features=False, objectives=("classification",), spec={})
    part = LoRA()
    with pytest.raises(CompositionError, match="no linear layer"):
        part.adapters.add(model, part._config(), "all-linear")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT 0.21's, 2026
def test_a_model_that_carries_an_adapter_is_refused() -> None:
    model = model_of("bert")
    model.transformer = get_peft_model(model.transformer, LoraConfig(target_modules=["query"]))
    bench = Bench("bert", LoRA(), model)
    with pytest.raises(ModelError, match="already carries a PEFT adapter"):
        bench.begin(0, 1)


def test_merging_into_a_rounded_base_is_refused_before_anything_is_learned() -> None:
    model = model_of("bert")
    model.backbone.to(torch.bfloat16)
    with pytest.raises(CompositionError, match="float32"):
        Bench("bert", LoRA(across_tasks="merge"), model).begin(0, 1)
    stacked = Bench("bert", LoRA(across_tasks="stack"), model_of("bert"))
    stacked.model.backbone.to(torch.bfloat16)
    stacked.task(0, 2).task(1, 2)
    assert all(p.dtype == torch.float32 for p in stacked.loop.parameters().values())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 3, "init": "orthogonal"}, "even rank"),
        ({"target": []}, "empty"),
        ({"init": "pissa"}, "init"),
        ({"across_tasks": "unmerge"}, "across_tasks"),
        ({"rank": 0}, "rank"),
    ],
)
def test_impossible_settings_are_one_sentence(settings: dict[str, object], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        parse(LoRASettings, settings, "s.yaml")


def test_registered() -> None:
    assert part_class("adapter", "lora", "s.yaml") is LoRA
    assert LoRA().name == "adapter/lora"


def test_batches_of_all_families_are_fixed() -> None:
    for family in FAMILIES:
        first, second = batch_of(family, 1), batch_of(family, 1)
        assert all(torch.equal(first[name], second[name]) for name in first)
