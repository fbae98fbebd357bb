"""The learner with data that people have, its refusals, and the same parts in a loop of one's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from battery import MODEL, learner_for, tiny_stream, weights
from text_bench import text_stream, tiny_bert
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from continual import Learner, Strategy, TrainingContext
from continual.errors import CompositionError, ModelError, SpecError, StateError, TrainingError
from continual.learner.checkpoint import table_from_state, table_state
from continual.learner.optimizer import make_optimizer, rate_factor
from continual.models.build import build_model
from continual.parts.head.linear import LinearHead
from continual.parts.penalty.ewc import EWC
from continual.parts.replay.rehearsal import Rehearsal
from continual.randomness import Randomness
from continual.state import load_state, save_state, tensor_bytes
from continual.table import Ragged, TensorTable
from continual.training import Training


def points(seed: int, rows: int = 60) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (rows,), generator=generator)
    return TensorDataset(torch.randn(rows, 5, generator=generator) + 2 * labels[:, None], labels)


def test_loaders_of_ones_own_and_a_module() -> None:
    learner = Learner(nn.Linear(5, 3), strategy="ewc", progress=False)
    learner.update(DataLoader(points(0), batch_size=8), test=DataLoader(points(1), batch_size=8), name="q1-fraud")
    update = learner.update(DataLoader(points(2)), test=points(3), name="q2-fraud")
    shown = str(update)
    assert "q1-fraud" in shown and "q2-fraud" in shown and "what to do" in shown
    found = learner.predict(points(3).tensors[0])
    assert found["scores"].shape == (60, 3) and len(found["names"]) == 60
    assert torch.allclose(found["scores"].sum(1), torch.ones(60))


def test_a_loop_says_how_a_module_that_takes_no_batch_is_handed_in() -> None:
    class Anything(nn.Linear):
        def forward(self, batch: Any) -> torch.Tensor:
            return super().forward(batch["inputs"])

    experience = tiny_stream(experiences=2)[0]
    inputs = experience.train.column("inputs").shape[1]
    for module, said in ((nn.Linear(inputs, 6), "fails with"), (Anything(inputs, 6), "gives Tensor where a batch")):
        with pytest.raises(ModelError, match=said) as caught:
            TrainingContext(module, [Rehearsal()]).begin(experience)
        assert "hand in build_model(model)" in str(caught.value)

    class Typo(nn.Module):
        def forward(self, batch: Any) -> Any:
            return self.lin(batch["inputs"])

    with pytest.raises(AttributeError, match="has no attribute 'lin'"):
        TrainingContext(Typo(), []).begin(experience)
    loop = TrainingContext(build_model(nn.Linear(inputs, 6)), [Rehearsal()])
    loop.begin(experience)
    assert loop.backward(experience.train[torch.arange(4)]).isfinite()


def test_a_loop_of_ones_own_equals_the_learner() -> None:
    stream = tiny_stream(experiences=2)
    training = {"optimizer": "sgd", "lr": 0.05, "epochs": 2, "batch_size": 16}
    strategy = Strategy(LinearHead(), Rehearsal(capacity=20), EWC(strength=1.0), training=training)
    learner = Learner(MODEL, strategy, seed=5, device="cpu", progress=False, monitor=False)
    learner.run(stream)

    randomness = Randomness(5)
    with randomness.framework():
        model = build_model(
            MODEL, objective="classification", example=stream[0].train[torch.zeros(1, dtype=torch.int64)]
        )
        loop = TrainingContext(model, strategy.make_parts(), randomness=randomness, batch_size=16)
        for experience in stream:
            loop.begin(experience)
            loop.optimizer = loop.optimizer or make_optimizer(Training(**training), loop.parameters())
            model.train()
            for _ in range(2):
                for batch in loop.shuffled(experience.train, batch_size=16):
                    loop.optimizer.zero_grad()
                    loop.backward(batch)
                    loop.optimizer.step()
                    loop.after_step()
            loop.end()
    ours, own = weights(learner), model.state_dict()
    assert all(torch.equal(ours[name], own[name]) for name in own)


def test_a_loss_that_is_not_finite_stops_with_step_rows_and_part() -> None:
    stream = tiny_stream(experiences=1)
    learner = learner_for(Strategy(training={"optimizer": "sgd", "lr": 1e30, "batch_size": 8}))
    with pytest.raises(TrainingError, match=r"not finite at step \d+ \(from objective; rows \d+"):
        learner.run(stream)


def test_accumulation_equals_one_large_batch() -> None:
    stream = tiny_stream(experiences=1)
    rows = len(stream[0].train)
    models = []
    for batch_size, accumulate in ((rows, 1), (rows // 2, 2)):
        training = {"optimizer": "sgd", "lr": 0.1, "epochs": 3, "batch_size": batch_size, "accumulate": accumulate}
        even = stream[0].train.select(torch.arange(rows // 2 * 2))
        learner = learner_for(Strategy(training=training))
        learner.update(replace(stream[0], train=even))
        models.append(weights(learner))
    for name in models[0]:
        torch.testing.assert_close(models[0][name], models[1][name], rtol=1e-4, atol=1e-6)


def test_every_key_of_training_changes_something() -> None:
    stream = tiny_stream(experiences=2)
    base = {"optimizer": "sgd", "lr": 0.05, "epochs": 2, "batch_size": 16}

    def trained(**changes: object) -> dict[str, torch.Tensor]:
        settings = {key: value for key, value in (base | changes).items() if value is not None}
        learner = learner_for(Strategy(training=settings))
        learner.run(stream)
        return weights(learner)

    plain = trained()
    changes: list[dict[str, object]] = [
        {"optimizer": "adam"},
        {"optimizer": "adamw"},
        {"lr": 0.06},
        {"head_lr": 0.1},
        {"momentum": 0.5},
        {"weight_decay": 0.1},
        {"epochs": 3},
        {"epochs": None, "iterations": 5},
        {"batch_size": 8},
        {"accumulate": 2},
        {"clip": 0.01},
        {"schedule": "linear"},
        {"schedule": "cosine"},
        {"warmup": 0.5},
        {"precision": "bf16"},
        {"active": "experience"},
    ]
    for change in changes:
        changed = trained(**change)
        assert any(not torch.equal(plain[name], changed[name]) for name in plain), change
    momentum = {"momentum": 0.9}
    kept, fresh = trained(**momentum), trained(**momentum, fresh_optimizer=True)
    assert any(not torch.equal(kept[name], fresh[name]) for name in kept)


def test_rates() -> None:
    linear = Training(schedule="linear", warmup=0.2)
    assert [rate_factor(linear, step, 10) for step in (0, 1, 2, 6)] == [0.5, 1.0, 1.0, 0.5]
    assert rate_factor(Training(schedule="cosine"), 5, 10) == pytest.approx(0.5)
    assert rate_factor(Training(), 9, 10) == 1.0


def test_early_stopping_takes_the_best_weights_and_needs_valid_rows() -> None:
    training = {"optimizer": "sgd", "lr": 0.1, "epochs": 40, "batch_size": 16, "early_stopping": {"patience": 1}}
    experience = tiny_stream(experiences=1)[0]
    learner = learner_for(Strategy(training=training))
    with pytest.raises(TrainingError, match="no valid rows"):
        learner.update(replace(experience, valid=None))
    learner = learner_for(Strategy(training=training))
    update = learner.update(replace(experience, valid=experience.train.select(torch.arange(40))))
    assert update.stopped_early and update.steps < 40 * (-(-len(experience.train) // 16))


def test_impossible_compositions_say_why() -> None:
    with pytest.raises(CompositionError, match="frozen"):
        Strategy.load({"adapter": {"kind": "lora"}, "backbone": "frozen"})
    with pytest.raises(CompositionError, match="needs a model that gives features"):
        Learner(nn.Linear(64, 10), "frozen", progress=False).run(tiny_stream())
    with pytest.raises(SpecError, match="epochs or iterations"):
        Strategy(training={"epochs": 1, "iterations": 5})
    with pytest.raises(SpecError, match="Did you mean 'training'"):
        Strategy.load({"trainning": {}})
    with pytest.raises(ModelError, match="at least as many outputs"):
        Learner(nn.Linear(64, 3), "naive", progress=False).run(tiny_stream())


def test_a_state_of_another_strategy_stream_or_order_is_refused(tmp_path: Path) -> None:
    learner = learner_for("naive")
    stream = tiny_stream()
    learner.run(stream[:1])
    learner.save(tmp_path / "state")
    with pytest.raises(StateError, match="another strategy"):
        Learner.load(tmp_path / "state", strategy="ewc", progress=False)
    loaded = Learner.load(tmp_path / "state", device="cpu", progress=False)
    with pytest.raises(StateError, match="another stream"):
        loaded.run(tiny_stream(seed=9))
    with pytest.raises(StateError, match="in their order"):
        loaded.update(stream[2])
    with pytest.raises(StateError, match="holds no saved state"):
        Learner.load(tmp_path / "nothing")


def test_a_full_disk_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_state(tmp_path / "state", {"a": torch.ones(3)})

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("continual.state.save_file", full)
    with pytest.raises(StateError, match="No space left on device"):
        save_state(tmp_path / "state", {"a": torch.zeros(3)})
    assert torch.equal(load_state(tmp_path / "state")["a"], torch.ones(3))
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    save_state(tmp_path / "state", {"a": torch.ones(3)})
    (tmp_path / "state").rename(tmp_path / ".state.12345678.old")
    assert torch.equal(load_state(tmp_path / "state")["a"], torch.ones(3))


def test_an_adapter_is_exported_by_the_run(tmp_path: Path) -> None:
    learner = learner_for("lora")
    learner.run(tiny_stream(experiences=2))
    assert (learner.export(tmp_path / "adapter") / "adapter_model.safetensors").is_file()
    with pytest.raises(CompositionError, match="trains no adapter"):
        plain = learner_for("naive")
        plain.run(tiny_stream(experiences=1))
        plain.export(tmp_path / "none")


def test_a_checkpoint_due_at_the_end_of_an_epoch_is_written(tmp_path: Path) -> None:
    experience = tiny_stream(experiences=1)[0]
    even = experience.train.select(torch.arange(64))
    learner = learner_for(
        Strategy(training={"optimizer": "sgd", "lr": 0.05, "epochs": 3, "batch_size": 32}),
        folder=tmp_path / "checkpoint",
        save_every=2,
    )
    saved: list[int] = []
    write = learner._checkpoint

    def counting(progress: Any) -> None:
        write(progress)
        saved.append(progress.step if progress else -1)

    learner._checkpoint = counting  # type: ignore[method-assign]
    learner.update(replace(experience, train=even))
    assert saved == [2, 4, 6, -1]


def test_joint_is_refused_update_by_update() -> None:
    with pytest.raises(CompositionError, match=r"call run\(stream\)"):
        learner_for("joint").update(tiny_stream()[0])


def test_an_unknown_tracker_and_device_are_refused() -> None:
    with pytest.raises(SpecError, match=r"unknown tracker 'tensorbord'.*Did you mean 'tensorboard'"):
        learner_for("naive", track="tensorbord")
    with pytest.raises(SpecError, match="unknown device 'meta'"):
        learner_for("naive", device="meta")


def test_a_tracker_writes(tmp_path: Path) -> None:
    learner = learner_for("naive", folder=tmp_path / "checkpoint", track="tensorboard")
    learner.run(tiny_stream(experiences=2))
    assert list((tmp_path / "tracking").rglob("events.*"))


def test_recovery_takes_the_whole_state_and_leaves_no_debris(tmp_path: Path) -> None:
    save_state(tmp_path / "state", {"a": torch.ones(3)})
    (tmp_path / "state").rename(tmp_path / ".state.ffffffff.old")
    (tmp_path / ".state.00000000.old").mkdir()
    assert torch.equal(load_state(tmp_path / "state")["a"], torch.ones(3))
    save_state(tmp_path / "state", {"a": torch.zeros(3)})
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("labels", [[[7], [8, 9, 10]], [[-100, 2, 3], [4]], [[7, 8, 9, 9], [5]]], ids=str)
def test_a_table_of_tokens_comes_back_as_it_was(labels: list[list[int]]) -> None:
    columns = {
        "input_ids": Ragged.from_lists([[1, 2, 3], [4]], 0),
        "labels": Ragged.from_lists(labels, -100),
        "row": torch.arange(2),
    }
    table, everything = TensorTable(columns), torch.arange(2)
    again = table_from_state(table_state(table))
    assert again[everything].keys() == table[everything].keys()
    for name, column in table[everything].items():
        assert torch.equal(again[everything][name], column), name


def test_joint_training_keeps_the_tasks_apart_in_the_task_scenario() -> None:
    learner = learner_for("joint")
    learner.run(tiny_stream("task"))
    assert learner.context.owner == [0, 0, 1, 1, 2, 2]
    stream = tiny_stream("task")
    for experience in stream:
        batch = experience.test[torch.arange(20)]  # type: ignore[index]
        mask_BK = learner.context.active_at_test(batch)
        assert mask_BK is not None
        assert mask_BK.nonzero()[:, 1].unique().tolist() == list(experience.classes)
        found = learner.predict({"inputs": batch["inputs"], "labels": batch["labels"]}, experience=experience.index)
        assert set(found["labels"].tolist()) <= set(experience.classes)


@pytest.mark.parametrize("strategy", ["lora", "inc-lora", "adalora", "prompt"])
def test_no_byte_is_counted_twice(strategy: str, tmp_path: Path) -> None:
    base = tiny_bert(tmp_path / "base")
    learner = Learner(
        {"kind": "pretrained", "name": str(base), "max_length": 16}, strategy, device="cpu", progress=False
    )
    learner.run(text_stream(base, tmp_path)[:2])
    sizes = learner.state_bytes()
    beside = sum(tensor_bytes(part.state_dict()) for part in learner.parts)
    assert sum(sizes.values()) - sizes["optimizer"] == tensor_bytes(learner.model.saved_tensors()) + beside
