"""AdaLoRA over several tasks: the budget is met in each of them, old adapters stay, a cut run goes on as it was."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from adapter_bench import FAMILIES, Bench, assert_same, base_of, batch_of, tensors_of
from peft import AdaLoraConfig, AdaLoraModel

from continual.errors import CompositionError, SpecError, TrainingError
from continual.models.lowrank import adapted_layers, adapter_parameters
from continual.models.output import Output
from continual.parts.adapter.adalora import AdaLoRA, AdaLoRASettings, orthogonality
from continual.parts.adapter.schedule import make_schedule
from continual.parts.registry import part_class
from continual.spec import parse

SMALL: dict[str, Any] = {"init_rank": 4, "target_rank": 2, "orthogonal": 0.1}


def part_of(bench: Bench) -> AdaLoRA:
    assert isinstance(bench.part, AdaLoRA)
    return bench.part


def ranks_of(bench: Bench, adapter: str) -> list[int]:
    layers = adapted_layers(bench.model).values()
    return [int((adapter_parameters(layer, adapter)["lora_E"] != 0).sum()) for layer in layers]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("across", ["merge", "stack"])
def test_every_task_meets_its_budget(family: str, across: str) -> None:
    bench = Bench(family, AdaLoRA(across_tasks=across, **SMALL))
    for task, steps in enumerate((12, 7, 20)):
        bench.begin(task, steps)
        name = part_of(bench).adapters.current
        layers = len(part_of(bench).adapters.layers)
        bench.step(task, steps)
        assert sum(ranks_of(bench, name)) == 2 * layers, "met before the end of the task, by its own schedule"
        bench.loop.end()
        assert sum(ranks_of(bench, name)) == 2 * layers
        assert part_of(bench).history[task]["adapter"] == name == f"t{task + 1:04d}"
        assert sum(part_of(bench).history[task]["ranks"].values()) == 2 * layers
    assert len(part_of(bench).adapters.names) == (3 if across == "stack" else 1)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_stack_keeps_old_adapters_bit_unchanged_while_the_new_one_is_pruned(family: str) -> None:
    bench = Bench(family, AdaLoRA(across_tasks="stack", **SMALL)).task(0, 10)
    old = {name: value for name, value in tensors_of(bench).items() if "t0001" in name}
    bench.task(1, 12)
    now = tensors_of(bench)
    assert old and all(torch.equal(value, now[name]) for name, value in old.items())
    assert sum(ranks_of(bench, "t0002")) == 2 * len(part_of(bench).adapters.layers)
    tuner = part_of(bench).adapters.tuner
    assert tuner.rankallocator.adapter_name == tuner.trainable_adapter_name == "t0002"


def test_a_fresh_adapter_changes_nothing_and_a_merge_is_exact() -> None:
    bench = Bench("llama", AdaLoRA(**SMALL))
    before = bench.answer()
    bench.begin(0, 10)
    assert torch.equal(bench.answer(), before)
    bench.step(0, 10)
    bench.loop.end()
    before = bench.answer()
    bench.begin(1, 10)
    torch.testing.assert_close(bench.answer(), before, rtol=0, atol=1e-5)
    assert all(list(layer.lora_A) == ["t0002"] for layer in adapted_layers(bench.model).values())
    assert sum(ranks_of(bench, "t0002")) == 0, "E begins at zero"


@pytest.mark.parametrize("across", ["merge", "stack"])
@pytest.mark.parametrize(
    ("family", "cut"), [("mlp", 1), ("mlp", 6), ("mlp", 9), ("llama", 6), ("bert", 6), ("gpt2", 9)]
)
def test_cut_in_mid_task_goes_on_bit_for_bit(family: str, across: str, cut: int) -> None:
    """Before the first allocation, in the midst of them, and after the last one (step 7 of 10)."""
    settings = {**SMALL, "across_tasks": across, "dropout": 0.2, "interval": 2}
    uncut = Bench(family, AdaLoRA(**settings)).task(0, 6)
    uncut.begin(1, 10)
    uncut.step(1, cut)
    state = uncut.save()
    uncut.step(1, 10 - cut)
    resumed = Bench.load(family, AdaLoRA(**settings), state, task=1)
    assert [n for n, p in resumed.model.named_parameters() if p.requires_grad] == state["trainable"]
    resumed.step(1, 10 - cut)
    for bench in (uncut, resumed):
        bench.loop.end()
        bench.task(2, 5)
    assert_same(tensors_of(uncut), tensors_of(resumed))
    assert part_of(uncut).history == part_of(resumed).history


def test_a_task_after_loading_meets_its_budget() -> None:
    """Stock PEFT, loaded with is_trainable=True and trained on from step 0, ends with rank 0 and no word."""
    bench = Bench("llama", AdaLoRA(**SMALL)).task(0, 10)
    for task in (1, 2, 3):
        bench = Bench.load("llama", AdaLoRA(**SMALL), bench.save(), task=task - 1)
        bench.task(task, 10)
        assert sum(part_of(bench).history[-1]["ranks"].values()) == 2 * 14
    assert len(part_of(bench).history) == 4


def test_one_task_is_what_stock_peft_does() -> None:
    steps, lr = 20, 1e-2
    bench = Bench("llama", AdaLoRA(**SMALL, warmup=0.2, final=0.25, interval=3, alpha=8), lr=lr)
    bench.begin(0, steps)
    base = base_of("llama").train()
    targets = "|".join(re.escape(name) for name in part_of(bench).adapters.layers)
    config = AdaLoraConfig(
        init_r=4,
        target_r=2,
        tinit=4,
        tfinal=5,
        deltaT=3,
        total_step=steps,
        orth_reg_weight=0.1,
        lora_alpha=8,
        target_modules=targets,
    )
    stock = AdaLoraModel(base, config, "t0001")
    start = {name: p for name, p in bench.model.transformer.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for name, parameter in stock.model.named_parameters():
            if name in start:
                parameter.copy_(start[name])
    optimizer = torch.optim.AdamW([p for p in stock.parameters() if p.requires_grad], lr=lr)
    batch = {name: value for name, value in batch_of("llama", 0).items() if name != "row"}
    for step in range(1, steps + 1):
        stock(**batch).loss.backward()
        optimizer.step()
        stock.update_and_allocate(step)
        optimizer.zero_grad()
    bench.step(0, steps)
    ours = dict(bench.model.transformer.named_parameters())
    for name, parameter in stock.model.named_parameters():
        if "lora_E" in name:
            assert torch.equal(parameter == 0, ours[name] == 0), name
        torch.testing.assert_close(parameter, ours[name], rtol=1e-3, atol=2e-4)


def test_the_orthogonality_term_is_pefts() -> None:
    bench = Bench("llama", AdaLoRA(**SMALL)).task(0, 4)
    stock = part_of(bench).adapters.tuner
    batch = {name: value for name, value in batch_of("llama", 0).items() if name != "row"}
    bench.model.eval()
    with torch.no_grad():
        added = stock(**batch).loss - stock.model(**batch).loss
    term = bench.part.loss({}, Output(torch.zeros(1)))
    assert term is not None and term.requires_grad
    torch.testing.assert_close(term.detach(), added, rtol=1e-4, atol=1e-5)
    factors = [adapter_parameters(layer, "t0001") for layer in adapted_layers(bench.model).values()]
    grams = [f["lora_A"] @ f["lora_A"].T for f in factors] + [f["lora_B"].T @ f["lora_B"] for f in factors]
    slow = sum(torch.linalg.norm(gram - torch.eye(4)) for gram in grams) / len(grams)
    torch.testing.assert_close(orthogonality(list(adapted_layers(bench.model).values()), "t0001"), slow)


@pytest.mark.parametrize("orthogonal", [0, 0.5])
def test_a_layer_that_is_not_used_takes_no_ranks_from_the_others(orthogonal: float) -> None:
    bench = Bench("bert", AdaLoRA(**{**SMALL, "orthogonal": orthogonal}))
    bench.begin(0, 8)
    assert (bench.part.loss({}, Output(torch.zeros(1))) is None) == (orthogonal == 0)
    bench.step(0, 8)
    pooler = part_of(bench).adapters.layers["pooler.dense"]
    unused = adapter_parameters(pooler, "t0001")
    assert unused["lora_E"].grad is None and (unused["lora_A"].grad is None) == (orthogonal == 0), (
        "gradients are put back"
    )
    bench.loop.end()
    left = part_of(bench).history[0]["ranks"]
    assert left["pooler.dense"] == 0 and sum(left.values()) == 2 * len(left)


@pytest.mark.parametrize("stopped", [1, 2, 5, 9])
def test_a_task_that_stops_early_meets_its_budget(stopped: int) -> None:
    bench = Bench("llama", AdaLoRA(**SMALL, warmup=0.3)).task(0, stopped, planned=20)
    assert sum(part_of(bench).history[0]["ranks"].values()) == 2 * 14
    bench.task(1, 20)
    assert sum(part_of(bench).history[1]["ranks"].values()) == 2 * 14


def test_weights_put_back_before_the_end_meet_the_budget_too() -> None:
    bench = Bench("llama", AdaLoRA(**SMALL))
    bench.begin(0, 10)
    bench.step(0, 3)
    best = {name: value.clone() for name, value in bench.model.saved_tensors().items()}
    bench.step(0, 7)
    bench.model.load_saved(best)
    bench.loop.end()
    assert 0 < sum(part_of(bench).history[0]["ranks"].values()) <= 2 * 14


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_very_short_tasks(steps: int) -> None:
    bench = Bench("gpt2", AdaLoRA(**SMALL)).task(0, steps).task(1, steps)
    layers = len(part_of(bench).adapters.layers)
    assert [sum(entry["ranks"].values()) for entry in part_of(bench).history] == [2 * layers] * 2


def test_several_forward_passes_of_one_step_count_once() -> None:
    bench = Bench("llama", AdaLoRA(**SMALL))
    bench.begin(0, 10)
    for _ in range(10):
        bench.optimizer.zero_grad()
        for task in (0, 1, 2):
            bench.loop.backward(batch_of("llama", task))
        bench.optimizer.step()
        bench.loop.after_step()
    assert part_of(bench).state_dict()["done"] == 10
    assert sum(ranks_of(bench, "t0001")) == 2 * 14


def test_pruned_directions_stay_shut_against_momentum() -> None:
    bench = Bench("llama", AdaLoRA(**SMALL, final=0.5))
    bench.begin(0, 12)
    bench.step(0, 6)
    shut = [adapter_parameters(layer, "t0001")["lora_E"] == 0 for layer in adapted_layers(bench.model).values()]
    assert sum(int(mask.sum()) for mask in shut) == 2 * 14
    for _ in range(6):
        bench.step(0)
        for layer, mask in zip(adapted_layers(bench.model).values(), shut, strict=True):
            assert torch.equal(adapter_parameters(layer, "t0001")["lora_E"] == 0, mask)


def test_losing_every_rank_is_an_error() -> None:
    bench = Bench("llama", AdaLoRA(**SMALL))
    bench.begin(0, 4)
    with pytest.raises(TrainingError, match="lost every rank of all 14 layers in experience 'task 0'"):
        bench.loop.end()


def test_names_are_no_beginning_of_each_other() -> None:
    """PEFT's allocator finds parameters by substring, so that 't1' would also drive 't10'."""
    bench = Bench("mlp", AdaLoRA(**SMALL, across_tasks="stack"))
    for task in range(11):
        bench.task(task, 2)
    names = part_of(bench).adapters.names
    assert len(names) == 11 and not any(a != b and b.startswith(a) for a in names for b in names)
    for task in range(11):
        assert sum(part_of(bench).history[task]["ranks"].values()) == sum(ranks_of(bench, names[task])) == 4


def test_without_a_number_of_steps_it_says_so() -> None:
    with pytest.raises(CompositionError, match="number of optimiser steps"):
        Bench("bert", AdaLoRA(**SMALL)).begin(0, 0)


def test_the_schedule_leaves_a_step_to_prune_in() -> None:
    for steps in range(1, 60):
        for warmup, final in ((0.0, 0.0), (0.1, 0.3), (0.6, 0.39), (0.0, 0.99), (0.99, 0.0)):
            plan = make_schedule(steps, warmup, final)
            assert plan.warmup < plan.last_allocation <= steps


@pytest.mark.parametrize(
    ("changed", "value"),
    [
        ("init_rank", 6),
        ("target_rank", 1),
        ("alpha", 3.0),
        ("warmup", 0.5),
        ("final", 0.6),
        ("interval", 5),
        ("beta1", 0.2),
        ("beta2", 0.2),
        ("orthogonal", 0.9),
        ("target", ["q_proj", "up_proj"]),
        ("dropout", 0.5),
        ("across_tasks", "stack"),
    ],
)
def test_every_setting_changes_something(changed: str, value: object) -> None:
    def weights(**settings: Any) -> list[torch.Tensor]:
        bench = Bench("llama", AdaLoRA(**settings), lr=3e-2).task(0, 12).task(1, 2)
        return [p.detach() for p in bench.model.parameters()]

    plain, other = weights(**SMALL), weights(**{**SMALL, changed: value})
    assert len(plain) != len(other) or any(
        a.shape != b.shape or not torch.equal(a, b) for a, b in zip(plain, other, strict=True)
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"init_rank": 8, "target_rank": 8}, "must be below init_rank"),
        ({"init_rank": 4}, "must be below init_rank"),
        ({"across_tasks": "continue"}, "use 'merge' or 'stack'"),
        ({"warmup": 0.7}, "no step is left to prune in"),
        ({"warmup": 0.5, "final": 0.5}, "no step is left to prune in"),
        ({"beta1": 1.0}, "beta1"),
        ({"target": []}, "empty"),
        ({"interval": 0}, "interval"),
    ],
)
def test_impossible_settings_are_one_sentence(settings: dict[str, object], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        parse(AdaLoRASettings, settings, "s.yaml")


def test_bytes_reported() -> None:
    bench = Bench("llama", AdaLoRA(**SMALL, across_tasks="stack"))
    empty = bench.part.nbytes()
    bench.task(0, 6)
    one = bench.part.nbytes()
    bench.task(1, 6)
    sizes = [p.numel() * 4 for n, p in bench.model.named_parameters() if "lora_" in n]
    assert empty == 0 and bench.part.nbytes() == sum(sizes) == 2 * one


def test_registered() -> None:
    assert part_class("adapter", "adalora", "s.yaml") is AdaLoRA
    assert AdaLoRA().name == "adapter/adalora"
