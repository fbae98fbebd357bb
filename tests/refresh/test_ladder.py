"""Tries that come to nothing: a loss that is not finite, too little memory, what nobody has thought of; and their time."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bad_store_bench import columns, copied, quick_store, rows
from store_bench import bytes_of

from continual import Learner, Strategy
from continual.errors import StateError, TrainingError
from continual.refresh import Store, update

GATE = {"max_drop": 0.9, "unsure": "promote"}
NEVER = {"new_floor": 1.5}
WILD: dict[str, Any] = {"training.lr": 1e30, "training.optimizer": "adam", "training.epochs": 5}
TAME = {"training.lr": 0.02}


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quick_store(tmp_path_factory.mktemp("grown"), 1).path


@pytest.fixture
def path(grown: Path, tmp_path: Path) -> Path:
    return copied(grown, tmp_path)


def ruled(path: Path, gate: dict[str, Any], *settings: dict[str, Any], alerts: bool = False, **ladder: Any) -> Store:
    told = f"alerts: {{command: [{sys.executable}, -c, \"import sys; open('told', 'a').write(sys.stdin.read())\"]}}\n"
    text = f"gate: {gate}\nladder: { ({'settings': list(settings), **ladder}) }\nsave_every: 1\n" + told * alerts
    (path / "rules.yaml").write_text(text, encoding="utf-8")
    return Store(path, trust=[sys.executable])


def learn(store: Store, month: int = 1, **options: Any) -> Any:
    return store.update(columns(rows(month)), name=f"month-{month}", device="cpu", progress=False, **options)


def untamed(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let the strategy as it is diverge, as settings of a ladder may; what is listed are the rates that were trained with."""
    whole, tried = Learner.update, []

    def fails(self: Learner, *given: Any, **named: Any) -> Any:
        tried.append(self.strategy.training.lr)
        if tried[-1] == 0.02 and self.strategy.training.epochs == 1:
            raise TrainingError("the loss is not finite at step 3.")
        return whole(self, *given, **named)

    monkeypatch.setattr(Learner, "update", fails)
    return tried


def test_a_loss_that_is_not_finite_is_a_failed_try(path: Path) -> None:
    store, notes = ruled(path, NEVER, WILD, TAME), list[str]()
    outcome = learn(store, on_note=notes.append)
    assert (outcome.happened, outcome.attempts, outcome.version) == ("failed", 3, 3)
    assert [store.manifest(number).attempt for number in (2, 3)] == [0, 2]
    assert any("not finite" in note and "The next try: {'training.lr': 0.02}" in note for note in notes)
    (said,) = [note for note in outcome.notes if "came to nothing" in note]
    assert said.startswith("the try {'training.epochs': 5") and "not finite" in said and said in store.report(3).notes
    assert store.verify() == [] and not store.folder.work.exists()


def test_the_last_try_may_be_the_one_that_diverges(path: Path) -> None:
    outcome = learn(ruled(path, NEVER, WILD))
    assert (outcome.happened, outcome.attempts, outcome.version) == ("failed", 2, 2)
    assert any("came to nothing" in note for note in outcome.notes)


def test_a_ladder_leads_out_of_a_strategy_that_diverges(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = untamed(monkeypatch)
    outcome = learn(ruled(path, GATE, {"training.lr": 0.01}))
    assert (outcome.happened, outcome.version, outcome.live, outcome.attempts) == ("promoted", 2, 2, 2)
    assert tried == [0.02, 0.01] and any("the try of the strategy as it is came to nothing" in n for n in outcome.notes)


def test_where_no_try_comes_to_its_end_it_is_said_told_and_written_down(tmp_path: Path) -> None:
    store = ruled(quick_store(tmp_path, 1).path, GATE, alerts=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(update.Strategy, "load", _wild(Strategy.load))
        with pytest.raises(TrainingError, match=r"not finite at step 1 .*rows [0-9]+, [0-9]+") as said:
            learn(store)
    assert store.live == 1 and store.versions() == [1] and not store.folder.work.exists() and store.verify() == []
    last = store.history()[-1]
    assert last.event == "stopped" and "'month-1' was not learnt: the loss is not finite at step 1" in last.sentence
    assert "the last update was stopped: 'month-1' was not learnt" in str(store.status())
    told = (store.path / "told").read_text(encoding="utf-8")
    assert told.count('"happened": "failed"') == 1 and "not finite" in told and '"live": 1' in told
    row = str(said.value).partition("rows ")[2].partition(",")[0]
    assert not any(row.encode() in content for content in bytes_of(store.path).values()), "it could never be erased"


def _wild(load: Any) -> Any:
    return lambda given, overrides=None: load(given, overrides={**WILD, **(overrides or {})})


@pytest.mark.parametrize("other", [False, True])
def test_a_try_that_diverged_before_a_kill_is_not_trained_again(
    other: bool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = untamed(monkeypatch)
    store = ruled(path, GATE, {"training.lr": 0.01})
    with monkeypatch.context() as patch:
        patch.setattr(update, "judge", lambda *_, **__: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            learn(store)
    if other:
        with pytest.raises(StateError, match="with other rows"):
            learn(store, 2)
    outcome = learn(Store(path))
    assert outcome.happened == "promoted" and outcome.attempts == 2 and tried == [0.02, 0.01]


def test_an_update_that_was_refused_before_a_kill_is_told_of_when_other_rows_come(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ruled(path, NEVER, alerts=True)
    with monkeypatch.context() as patch:
        patch.setattr(update.Update, "_ended", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            learn(store)
    assert store.versions() == [1, 2] and not (path / "told").exists()
    assert learn(store, 2).version == 3
    told = (path / "told").read_text(encoding="utf-8")
    assert [told.count(f'"experience": "month-{month}"') for month in (1, 2)] == [1, 1]


# Time


@pytest.mark.parametrize("where", ["uncut", "between", "training"])
def test_the_time_before_a_kill_counts(where: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries of 40 s each by a clock of the test's own, with a minute to begin in: two are begun, killed or not."""
    clock = [0.0]
    monkeypatch.setattr(update, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    whole, loaded, calls = Learner.update, Learner.load, list[int]()

    def slow(self: Learner, *given: Any, **named: Any) -> Any:
        calls.append(len(calls))
        if where == "between" and len(calls) == 2:
            raise Killed
        done = whole(self, *given, **named)
        clock[0] += 40
        return done

    def slow_before(*given: Any, **named: Any) -> Learner:
        learner = loaded(*given, **named)
        assert learner._pending is not None
        learner._pending.seconds = 40.0
        return learner

    monkeypatch.setattr(Learner, "update", slow)
    store = ruled(path, NEVER, *[{"training.lr": 0.01 * (place + 1)} for place in range(4)], minutes=1)
    if where == "training":
        saved = Learner._checkpoint
        with monkeypatch.context() as patch, pytest.raises(Killed):

            def dies(self: Learner, progress: Any) -> None:
                saved(self, progress)
                raise Killed

            patch.setattr(Learner, "_checkpoint", dies)
            learn(store)
        monkeypatch.setattr(Learner, "load", slow_before)
    if where == "between":
        with pytest.raises(Killed):
            learn(store)
        clock[0] += 5000  # while nothing ran
    assert learn(Store(path)).attempts == (1 if where == "training" else 2)
    last = store.report(max(store.versions())).cost
    assert last["rest"] <= 40, "of this try, not of those before"


# What nobody has thought of


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (KeyError("deep inside"), TrainingError, r"learning 'month-1' broke off \(KeyError: 'deep inside'\)"),
        (RuntimeError("a\nb"), TrainingError, r"broke off \(RuntimeError: a b\)"),
        (MemoryError(), TrainingError, r"ran out of memory \(MemoryError\).*smaller training.batch_size"),
        (torch.OutOfMemoryError("CUDA out of memory"), TrainingError, "ran out of memory.*batch_size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), TrainingError, "ran out of memory"),
        (OSError(5, "Input/output error"), StateError, "broke off.*Input/output error.*same command"),
        (AssertionError("of a part of the user's"), TrainingError, "broke off"),
    ],
)
def test_any_exception_in_training_is_a_sentence(
    error: Exception, kind: type[Exception], words: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(*_: Any, **__: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "update", raises)
        with pytest.raises(kind, match=words) as said:
            learn(ruled(path, GATE))
    assert said.value.__cause__ is error and "\n" not in str(said.value)
    store = Store(path)
    assert store.live == 1 and store.verify() == [] and learn(store).happened == "promoted"


def test_a_try_with_smaller_batches_follows_one_that_ran_out_of_memory(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Learner.update

    def large(self: Learner, *given: Any, **named: Any) -> Any:
        if self.strategy.training.batch_size > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, *given, **named)

    monkeypatch.setattr(Learner, "update", large)
    outcome = learn(ruled(path, GATE, {"training.batch_size": 4}))
    assert outcome.happened == "promoted" and outcome.attempts == 2


def test_outside_the_training_the_update_can_be_gone_on_with(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("deep")

    for owner, name in ((update, "read_rows"), (update, "judge"), (update, "split")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, raises)
            with pytest.raises(StateError, match=r"broke off \(ZeroDivisionError: deep\).*--abandon") as said:
                learn(ruled(path, GATE))
        assert isinstance(said.value.__cause__, ZeroDivisionError)
    assert learn(Store(path)).happened == "promoted"


def test_a_mistake_of_ours_and_the_end_of_the_process_stay_what_they_are(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for end in (KeyboardInterrupt, SystemExit):
        with monkeypatch.context() as patch, pytest.raises(end):
            patch.setattr(Learner, "update", lambda *_, end=end, **__: (_ for _ in ()).throw(end))
            learn(ruled(path, GATE))
    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr("continual.refresh.objects.Objects.put", lambda self, state: self.path("no digest"))
        learn(Store(path))
