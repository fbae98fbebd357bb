"""Merged adapters against slow loops over entries, and the error that each way reports."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_bench import Bench, base_of, batch_of, tensors_of
from battery import learner_for, tiny_stream
from peft import PeftModel
from torch import Tensor

from continual import Strategy
from continual.errors import CompositionError, SpecError
from continual.models.lowrank import Fold
from continual.parts.adapter.export import export_adapter, task_folds, total_folds
from continual.parts.adapter.lora import LoRA
from continual.parts.adapter.merging import merge

TASKS, OUT, IN, RANK = 3, 7, 5, 2


def adapters(tasks: int = TASKS) -> list[dict[str, Fold]]:
    draw = torch.Generator().manual_seed(4)
    shapes = {"one": (OUT, IN), "two": (IN, 9)}
    return [
        {
            name: (torch.randn(RANK, width, generator=draw), torch.randn(rows, RANK, generator=draw))
            for name, (rows, width) in shapes.items()
        }
        for _ in range(tasks)
    ]


def exact(given: list[dict[str, Fold]], name: str) -> Tensor:
    return sum((folds[name][1].double() @ folds[name][0].double() for folds in given), torch.zeros(()).double())


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def relative(given: list[dict[str, Fold]], found: Any, names: tuple[str, ...] = ("one", "two")) -> float:
    wrong = sum(float((found.delta(name).double() - exact(given, name)).norm() ** 2) for name in names)
    return math.sqrt(wrong / sum(float(exact(given, name).norm() ** 2) for name in names))


def slow_ties(deltas: list[Tensor], density: float) -> Tensor:
    """Entry by entry."""
    merged = torch.zeros_like(deltas[0])
    trimmed = []
    for delta in deltas:
        kept = max(1, round(density * delta.numel()))
        border = sorted(delta.abs().flatten().tolist(), reverse=True)[kept - 1]
        trimmed.append(torch.where(delta.abs() >= border, delta, 0.0))
    for place in range(merged.numel()):
        values = [float(one.flatten()[place]) for one in trimmed]
        sign = math.copysign(1.0, sum(values)) if sum(values) else 0.0
        agreeing = [value for value in values if value and math.copysign(1.0, value) == sign]
        merged.view(-1)[place] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return merged


def test_cat_is_exact() -> None:
    given = adapters()
    found = merge(given)
    assert found.error < 1e-6 and found.folds["one"][0].shape == (TASKS * RANK, IN)
    for name in ("one", "two"):
        torch.testing.assert_close(found.delta(name).double(), exact(given, name), rtol=1e-5, atol=1e-5)
    assert found.error == pytest.approx(relative(given, found), abs=1e-9)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_svd_is_the_best_of_its_rank(rank: int) -> None:
    given = adapters()
    found = merge(given, "svd", rank=rank)
    for name in ("one", "two"):
        U, s, Vh = torch.linalg.svd(exact(given, name), full_matrices=False)
        best = U[:, :rank] * s[:rank] @ Vh[:rank]
        torch.testing.assert_close(found.delta(name).double(), best, rtol=1e-4, atol=1e-4)
        assert found.folds[name][0].shape[0] == rank
        assert found.errors[name] == pytest.approx(math.sqrt(float((s[rank:] ** 2).sum() / (s**2).sum())), rel=1e-4)
    assert merge(given, "svd", rank=50).error < 1e-6


@pytest.mark.parametrize("density", [0.05, 0.2, 0.6, 1.0])
def test_ties_is_the_slow_loop(density: float) -> None:
    given = adapters()
    found = merge(given, "ties", density=density, scale=0.5)
    for name in ("one", "two"):
        slow = 0.5 * slow_ties([folds[name][1] @ folds[name][0] for folds in given], density)
        torch.testing.assert_close(found.delta(name), slow)
    assert found.error == pytest.approx(relative(given, found)) and found.error > 0.3
    alone = merge(given[:1], "ties", density=1.0)
    torch.testing.assert_close(alone.delta("one").double(), exact(given[:1], "one"), rtol=1e-5, atol=1e-5)


def test_dare_keeps_a_share_of_the_entries_and_the_mean_of_many_draws_is_the_sum() -> None:
    given = adapters()
    one = merge(given[:1], "dare", density=0.5, generator=generator())
    whole = given[0]["one"][1] @ given[0]["one"][0]
    kept = one.delta("one") != 0
    assert 5 < int(kept.sum()) < OUT * IN - 5
    torch.testing.assert_close(one.delta("one")[kept], 2 * whole[kept])
    draws = generator(1)
    many = torch.stack([merge(given, "dare", density=0.5, generator=draws).delta("one") for _ in range(3000)])
    assert (many.mean(0).double() - exact(given, "one")).abs().max() < 0.3
    again = [merge(given, "dare", generator=generator(seed)) for seed in (5, 5, 6)]
    assert torch.equal(again[0].delta("one"), again[1].delta("one"))
    assert not torch.equal(again[0].delta("one"), again[2].delta("one"))
    assert again[0].error == pytest.approx(relative(given, again[0])) and again[0].error > 1.0
    assert merge(given, "dare", density=1.0, generator=generator()).error < 1e-6


@pytest.mark.parametrize("method", ["cat", "ties", "dare"])
def test_a_rank_costs_what_the_error_says(method: Any) -> None:
    given = adapters()
    options = {"generator": generator()} if method == "dare" else {}
    found = merge(given, method, rank=1, **options)
    assert found.folds["one"][0].shape == (1, IN) and not found.deltas
    assert found.error == pytest.approx(relative(given, found), rel=1e-5)


@pytest.mark.parametrize("method", ["cat", "ties", "dare"])
def test_scale_multiplies(method: Any) -> None:
    given = adapters()
    single, double = (merge(given, method, scale=scale, generator=generator()) for scale in (1.0, 2.0))
    torch.testing.assert_close(double.delta("one"), 2 * single.delta("one"))


def test_layers_that_some_tasks_lack() -> None:
    given = adapters()
    del given[1]["two"]
    given[2]["two"] = (torch.zeros(0, 9), torch.zeros(IN, 0))
    for method in ("cat", "ties"):
        found = merge(given, method, density=1.0 if method == "ties" else None)
        torch.testing.assert_close(found.delta("two").double(), exact(given[:1], "two"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "slerp"}, "'cat', 'dare', 'svd', 'ties'"),
        ({"method": "svd"}, "give the rank"),
        ({"method": "cat", "density": 0.5}, "leave it out"),
        ({"method": "ties", "density": 0.0}, "above 0"),
        ({"method": "ties", "density": 1.5}, "at most 1"),
        ({"method": "ties", "scale": 0.0}, "scale"),
        ({"method": "dare"}, "torch.Generator"),
        ({"method": "cat", "rank": 0}, "1 or more"),
    ],
)
def test_impossible_arguments_are_one_sentence(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        merge(adapters(), **arguments)
    with pytest.raises(CompositionError, match="no adapter to merge"):
        merge([])


def stacked(across: str = "stack") -> Bench:
    bench = Bench("bert", LoRA(rank=3, across_tasks=across), lr=3e-2)
    for task in range(3):
        bench.task(task, 5)
    return bench


@pytest.mark.parametrize("across", ["stack", "merge"])
@pytest.mark.parametrize("method", ["svd", "ties", "dare"])
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT 0.21's, 2026
def test_exported_merges_are_read_by_stock_peft(across: str, method: Any, tmp_path: Path) -> None:
    bench = stacked(across)
    before = tensors_of(bench)
    folder = export_adapter(
        bench.model, bench.part, tmp_path / "adapter", max_rank=4, method=method, generator=generator(3)
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(bench).items())
    record = json.loads((folder / "continual.json").read_text())
    wanted = merge(task_folds(bench.part.adapters), method, rank=4, generator=generator(3))
    assert record["merge"] == method and record["relative_error"] == wanted.error > 0.01
    assert set(record["ranks"].values()) == {4}
    stock = PeftModel.from_pretrained(base_of("bert"), folder)
    batch = batch_of("bert", 7)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    pristine = base_of("bert")
    with torch.no_grad():
        for name, module in pristine.named_modules():
            if name in wanted.folds:
                module.weight += wanted.delta(name)  # type: ignore[operator]
        expected = pristine(**inputs).last_hidden_state
        torch.testing.assert_close(stock.eval()(**inputs).last_hidden_state, expected, rtol=0, atol=1e-5)


def test_the_exact_sum_stays_the_default_and_needs_no_rank(tmp_path: Path) -> None:
    bench = stacked()
    folder = export_adapter(bench.model, bench.part, tmp_path / "adapter")
    record = json.loads((folder / "continual.json").read_text())
    assert (record["merge"], record["relative_error"]) == ("cat", 0.0)
    found = merge(task_folds(bench.part.adapters))
    for name, (A, B) in total_folds(bench.part.adapters).items():
        assert torch.equal(A, found.folds[name][0]) and torch.equal(B, found.folds[name][1])
    with pytest.raises(SpecError, match="give max_rank"):
        export_adapter(bench.model, bench.part, folder, method="ties")
    with pytest.raises(SpecError, match="leave it out"):
        export_adapter(bench.model, bench.part, folder, density=0.5)
    with pytest.raises(SpecError, match="'slerp'"):
        export_adapter(bench.model, bench.part, folder, method="slerp")  # type: ignore[arg-type]
    with pytest.raises(CompositionError, match="merge by 'svd'"):
        export_adapter(bench.model, bench.part, folder, max_rank=4)


def test_a_learner_exports_the_same_draw_every_time_and_draws_nothing_of_its_training(tmp_path: Path) -> None:
    learner = learner_for(Strategy.load("inc-lora"))
    learner.run(tiny_stream(experiences=2))
    state = learner.randomness.state_dict()
    contents = []
    for name in "ab":
        folder = learner.export(tmp_path / name, max_rank=2, merge="dare", density=0.5)
        contents.append((folder / "adapter_model.safetensors").read_bytes())
    assert contents[0] == contents[1]
    after = learner.randomness.state_dict()
    assert str(state) == str(after)
