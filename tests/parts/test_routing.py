"""Adapters kept apart: every row through its own, against one row at a time; where rows go when nobody says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_bench import Bench, base_of, batch_of, experience_of, model_of, tensors_of
from battery import learner_for, tiny_stream
from safetensors.torch import load_file
from torch import Tensor, nn

from continual import Learner, Strategy
from continual.errors import CompositionError, ModelError, SpecError
from continual.models.lowrank import adapted_layers, adapter_parameters
from continual.models.transformer import pool
from continual.parts.adapter.export import total_folds
from continual.parts.adapter.lora import LoRA
from continual.parts.adapter.routing import Router
from continual.parts.context import TrainingContext
from continual.parts.head.class_sums import NO_ROW
from continual.parts.penalty.l2 import L2
from continual.table import Batch

FAMILIES = ("llama", "bert", "gpt2", "mlp")
TASKS = 3


def trained(family: str = "bert", **settings: Any) -> Bench:
    bench = Bench(family, LoRA(rank=3, across_tasks="separate", **settings), lr=3e-2)
    for task in range(TASKS):
        bench.task(task, 4)
    return bench


def router_of(bench: Bench) -> Router:
    assert isinstance(bench.part, LoRA) and bench.part.router is not None
    return bench.part.router


def mixed(family: str) -> Batch:
    """Rows of all tasks, shuffled; token rows of two lengths."""
    batches = [batch_of(family, task) for task in range(TASKS)]
    order = torch.randperm(TASKS * 16, generator=torch.Generator().manual_seed(2))
    batch = {name: torch.cat([one[name] for one in batches])[order] for name in batches[0]}
    if "attention_mask" in batch:
        batch["attention_mask"] = batch["attention_mask"].clone()
        batch["attention_mask"][::3, 4:] = 0
    return batch


@torch.no_grad()
def one_by_one(bench: Bench, batch: Batch, places: list[int]) -> Tensor:
    """Row after row, with its own adapter alone."""
    found = []
    for row, place in enumerate(places):
        with bench.part.adapters.only(f"t{place + 1:04d}"):
            bench.model.router = None
            found.append(bench.model({name: column[row : row + 1] for name, column in batch.items()}).logits)
    bench.model.router = router_of(bench)
    return torch.cat(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_is_row_by_row(family: str) -> None:
    bench = trained(family)
    bench.model.eval()
    batch = mixed(family)
    places = router_of(bench).choose(bench.model.backbone, batch).tolist()
    assert len(set(places)) > 1, "the batch is mixed"
    with torch.no_grad():
        together = bench.model(batch).logits
    torch.testing.assert_close(together, one_by_one(bench, batch, places), rtol=1e-4, atol=1e-5)
    given = {**batch, "experience": torch.arange(TASKS * 16) % TASKS}
    with torch.no_grad():
        together = bench.model(given).logits
    wanted = one_by_one(bench, batch, given["experience"].tolist())
    torch.testing.assert_close(together, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_padding_decides_nothing(family: str) -> None:
    bench = trained(family)
    bench.model.eval()
    batch = mixed(family)
    wider = {
        **batch,
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 5), value=9),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 5)),
    }
    with torch.no_grad():
        torch.testing.assert_close(bench.model(wider).logits, bench.model(batch).logits, rtol=1e-4, atol=1e-5)


def test_a_new_adapter_begins_at_the_base_and_the_others_stay() -> None:
    bench = trained("llama")
    old = {name: tensor for name, tensor in tensors_of(bench).items() if "lora_" in name}
    bench.begin(3, 3)
    batch = {**batch_of("llama", 3), "experience": torch.full((16,), 3)}
    with torch.no_grad():
        fresh = bench.model.eval()(batch).logits
        plain = base_of("llama")(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(fresh, plain, rtol=0, atol=1e-6)
    bench.step(3, 3)
    now = tensors_of(bench)
    assert old and all(torch.equal(tensor, now[name]) for name, tensor in old.items())
    for layer in adapted_layers(bench.model).values():
        assert layer.active_adapters == ["t0004"]
        for name in layer.lora_A:
            assert all(p.requires_grad == (name == "t0004") for p in adapter_parameters(layer, name).values())


def test_rows_under_way_go_to_the_adapter_that_trains_whatever_they_look_like() -> None:
    bench = trained("bert")
    router = router_of(bench)
    alike = replace(experience_of("bert", 3), train=experience_of("bert", 0).train)
    rows = alike.train.column("row") + 500
    alike.train.columns["row"] = rows
    with bench.loop.randomness.framework():
        bench.loop.begin(alike, steps=1)
    batch = {**batch_of("bert", 0), "row": rows}
    assert router.choose(bench.model.backbone, batch).tolist() == [3] * 16
    strange = {**batch_of("bert", 1), "row": torch.arange(16) + 9000}
    assert router.choose(bench.model.backbone, strange).tolist() == [1] * 16
    bench.loop.end()
    again = router.choose(bench.model.backbone, batch)
    assert set(again.tolist()) <= {0, 3}, "afterwards they go by what they look like"


@pytest.mark.parametrize("family", ["bert", "mlp", "llama"])
def test_rows_go_to_the_nearest_prototype_of_the_frozen_base(family: str) -> None:
    bench = trained(family, prototypes=1)
    pristine = model_of(family).eval()
    means = []
    for task in range(TASKS):
        means.append(slow_features(pristine, batch_of(family, task)).double().mean(0))
    router = router_of(bench)
    torch.testing.assert_close(router.prototypes_PD.double(), torch.stack(means), rtol=1e-4, atol=1e-5)
    batch = mixed(family)
    features = slow_features(pristine, batch).double()
    wanted = [min(range(TASKS), key=lambda task: float((row - means[task]).norm())) for row in features]
    assert router.choose(bench.model.backbone, batch).tolist() == wanted


@torch.no_grad()
def slow_features(model: Any, batch: Batch) -> Tensor:
    if model.gives_features:
        features: Tensor = model.backbone(batch)
        return features
    body = model.transformer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return pool(body.last_hidden_state, batch["attention_mask"], "mean")


def test_prototypes_are_centres_of_their_rows() -> None:
    bench = trained("bert", prototypes=4)
    router = router_of(bench)
    assert router.prototypes_PD.shape == (4 * TASKS, 32) and router.place_P.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    features = slow_features(model_of("bert").eval(), batch_of("bert", 1))
    own = router.prototypes_PD[4:8]
    nearest = torch.cdist(features, own).argmin(1)
    for centre in range(4):
        torch.testing.assert_close(own[centre], features[nearest == centre].mean(0), rtol=1e-4, atol=1e-5)
    few = trained("bert", prototypes=40)
    assert len(router_of(few).prototypes_PD) == 16 * TASKS


def test_a_prototype_of_one_row_is_given_up_with_it() -> None:
    several = trained("bert", prototypes=9)
    router, part = router_of(several), several.part
    features = slow_features(model_of("bert").eval(), batch_of("bert", 0))
    nearest = torch.cdist(features, router.prototypes_PD[:9]).argmin(1)
    sizes = torch.bincount(nearest, minlength=9)
    ids = experience_of("bert", 0).train.column("row")
    expected = [int(ids[nearest == centre][0]) if sizes[centre] == 1 else NO_ROW for centre in range(9)]
    assert router.lone_P[:9].tolist() == expected and 0 < expected.count(NO_ROW) < 9

    few = trained("bert", prototypes=40)
    router, part = router_of(few), few.part
    router.lone_P += 1000 * router.place_P  # every task of the bench counts its rows from 0
    all_ids = torch.cat([experience_of("bert", task).train.column("row") + 1000 * task for task in range(TASKS)])
    assert sorted(part.rows().tolist()) == sorted(all_ids.tolist()) and NO_ROW not in part.rows()
    first = experience_of("bert", 0).train
    whose = {int(row): place for place, row in enumerate(first.column("row"))}
    gone = torch.tensor(sorted(whose))[:15]
    before = router.prototypes_PD.clone()
    assert part.erase(torch.cat([gone, torch.tensor([-5])])) == 15 and part.erase(gone) == 0
    left = (set(whose) - set(gone.tolist())).pop()
    assert len(router.prototypes_PD) == 16 * TASKS - 15 and router.place_P.tolist().count(0) == 1
    torch.testing.assert_close(router.prototypes_PD[:1], features[whose[left]][None], rtol=1e-4, atol=1e-5)
    state = b"".join(one.numpy().tobytes() for one in router.state_dict().values())
    found = [vector[:2].numpy().tobytes() in state for vector in before[:16]]
    assert found == [torch.equal(vector, router.prototypes_PD[0]) for vector in before[:16]] and sum(found) == 1
    again = Router(part.adapters, "features", 40)
    again.load_state_dict(router.state_dict())
    assert again.rows().tolist() == part.rows().tolist()

    few.model.eval()
    batch = {name: column for name, column in mixed("bert").items() if name != "row"}
    part.erase(torch.tensor([left]))
    assert 0 not in router.choose(few.model.backbone, batch).tolist()
    part.erase(all_ids)
    assert router.choose(few.model.backbone, batch).tolist() == [TASKS - 1] * len(batch["labels"])


def test_ids_of_rows_under_way_are_not_kept() -> None:
    router = router_of(trained("bert"))
    assert router.current_N.untyped_storage().nbytes() == 0


def test_an_answer_does_not_decide_where_a_language_models_row_goes() -> None:
    bench = trained("llama")
    batch = batch_of("llama", 1)
    labels = batch["labels"].clone()
    labels[:, :3] = -100
    asked = {**batch, "labels": labels}
    other = asked["input_ids"].clone()
    other[:, 3:] = (other[:, 3:] + 7) % 64
    router = router_of(bench)
    features = router.features(bench.model.backbone, asked)
    torch.testing.assert_close(features, router.features(bench.model.backbone, {**asked, "input_ids": other}))
    other[:, 0] = (other[:, 0] + 7) % 64
    assert not torch.equal(features, router.features(bench.model.backbone, {**asked, "input_ids": other}))
    short = {**asked, "attention_mask": batch["attention_mask"].clone()}
    short["attention_mask"][:, 5:] = 0
    torch.testing.assert_close(features, router.features(bench.model.backbone, short))


def test_after_an_exception_the_model_is_as_it_was() -> None:
    bench = trained("bert")
    before = bench.answer()
    flags = {name: p.requires_grad for name, p in bench.model.named_parameters()}
    layer = next(iter(adapted_layers(bench.model).values()))
    handle = layer.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("in the middle")))
    with pytest.raises(RuntimeError, match="in the middle"):
        bench.model(mixed("bert"))
    handle.remove()
    assert all(one.active_adapters == ["t0003"] for one in adapted_layers(bench.model).values())
    assert flags == {name: p.requires_grad for name, p in bench.model.named_parameters()}
    assert torch.equal(bench.answer(), before)


def routed(**settings: Any) -> Strategy:
    return Strategy.load("routed-lora", overrides={f"adapter.{key}": value for key, value in settings.items()})


@pytest.mark.parametrize("routing", ["task", "features"])
def test_where_the_task_is_given_nothing_of_the_backbone_is_forgotten(routing: str) -> None:
    stream = tiny_stream("task")
    learner = learner_for(routed(routing=routing))
    learner.update(stream[0])
    batch = stream[0].test[torch.arange(20)]  # type: ignore[index]
    learner.model.eval()
    with torch.no_grad():
        before = learner.model(batch).features
    learner.update(stream[1])
    learner.update(stream[2])
    learner.model.eval()
    with torch.no_grad():
        after = learner.model(batch).features
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    unlabelled = learner.predict(batch["inputs"], experience=0)
    found = learner.model.head(before).masked_fill(torch.tensor(learner.context.owner) != 0, -torch.inf)  # type: ignore[misc]
    torch.testing.assert_close(unlabelled["scores"], found.softmax(-1).detach(), rtol=1e-4, atol=1e-5)
    if routing == "task":
        with pytest.raises(ModelError, match="experience=0"):
            learner.predict(batch["inputs"])
        assert not learner.parts[0].state_dict()["router"]["prototypes"].numel()
    else:
        assert len(learner.predict(batch["inputs"])["labels"]) == 20


def test_replayed_rows_teach_the_head_and_no_other_adapter() -> None:
    content = {**routed().to_dict(), "replay": {"kind": "rehearsal", "capacity": 20}, "name": "with replay"}
    learner = learner_for(Strategy.load(content))
    stream = tiny_stream()
    learner.update(stream[0])
    old = {name: tensor.clone() for name, tensor in learner.model.state_dict().items() if "t0001" in name}
    learner.update(stream[1])
    now = learner.model.state_dict()
    assert old and all(torch.equal(tensor, now[name]) for name, tensor in old.items())


def test_every_adapter_is_exported_by_itself(tmp_path: Path) -> None:
    learner = learner_for(routed())
    learner.run(tiny_stream())
    part = learner.parts[0]
    assert isinstance(part, LoRA)
    folder = learner.export(tmp_path / "all")
    assert sorted(path.name for path in folder.iterdir()) == ["0", "1", "2"]
    alone = learner.export(tmp_path / "one", experience=1)
    content = load_file(alone / "adapter_model.safetensors")
    assert (alone / "adapter_model.safetensors").read_bytes() == (
        folder / "1" / "adapter_model.safetensors"
    ).read_bytes()
    for name, layer in part.adapters.layers.items():
        own = adapter_parameters(layer, "t0002")
        torch.testing.assert_close(content[f"base_model.model.{name}.lora_B.weight"], 2 * own["lora_B"].detach())
    assert next(iter(total_folds(part.adapters).values()))[0].shape[0] == 24
    with pytest.raises(CompositionError, match="count from 0"):
        learner.export(tmp_path / "none", experience=3)


@pytest.mark.parametrize("changed", [{"routing": "task"}, {"prototypes": 1}], ids=str)
def test_every_setting_changes_something(changed: dict[str, Any]) -> None:
    states = []
    for settings in ({}, changed):
        learner = learner_for(routed(**settings))
        learner.update(tiny_stream("task")[0])
        states.append(learner.parts[0].state_dict()["router"]["prototypes"])
    assert states[0].shape != states[1].shape


def test_what_cannot_be_is_refused() -> None:
    for slot, kind in (("penalty", "ewc"), ("penalty", "orthogonal"), ("distillation", "lwf"), ("projection", "ogd")):
        with pytest.raises(CompositionError):
            Strategy.load({**routed().to_dict(), slot: {"kind": kind}})
    with pytest.raises(CompositionError, match="no row says what task"):
        learner_for(routed(routing="task")).update(tiny_stream("class")[0])
    with pytest.raises(CompositionError, match="set routing to 'task'"):
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 6))
        strategy = Strategy(LoRA(across_tasks="separate"))
        Learner(model, strategy, device="cpu", progress=False).update(tiny_stream()[0])
    for settings, words in (
        ({"prototypes": 3}, "separate"),
        ({"routing": "task"}, "separate"),
        ({"across_tasks": "separate", "routing": "task", "prototypes": 2}, "leave them out"),
        ({"across_tasks": "separate", "prototypes": 0}, "prototypes"),
    ):
        with pytest.raises(SpecError, match=words):
            LoRA(**settings)
    part = LoRA(across_tasks="separate")
    loop = TrainingContext(model_of("bert"), [part, L2()])
    with pytest.raises(CompositionError, match="nothing for a penalty to hold"):
        loop.begin(experience_of("bert", 0))


def test_cut_in_mid_task_goes_on_bit_for_bit() -> None:
    settings: dict[str, Any] = {"rank": 3, "across_tasks": "separate", "dropout": 0.2, "prototypes": 2}
    whole = Bench("bert", LoRA(**settings)).task(0, 3).task(1, 3)
    whole.begin(2, 6)
    whole.step(2, 2)
    again = Bench.load("bert", LoRA(**settings), whole.save(), task=2)
    for bench in (whole, again):
        bench.step(2, 4)
        bench.loop.end()
    left, right = tensors_of(whole), tensors_of(again)
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert torch.equal(whole.answer(), again.answer())
    assert whole.part.nbytes() == again.part.nbytes()
