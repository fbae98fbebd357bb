"""The monitor: its matrix, the tree, what it saves, what it gives up, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from continual.errors import StateError, StreamError
from continual.models.output import Output
from continual.monitor.advice import EXACT
from continual.monitor.bootstrap import Resampled, bootstrap
from continual.monitor.evaluation import evaluating
from continual.monitor.gate import gate
from continual.monitor.monitor import THINNING, Monitor
from continual.monitor.retention import Retention, judge
from continual.parts.replay.select import row_keys
from continual.state import load_state, save_state
from continual.table import TensorTable

ACCURACY = "accuracy"
KEYS = {"accuracy", "learning_accuracy", "bwt", "forgetting", "fwt", "retention", "negative_flips"}


def table(start: int, rows: int) -> TensorTable:
    return TensorTable({"row": torch.arange(start, start + rows)})


def scores(rows: int, wrong: int | range, name: str = ACCURACY) -> dict[str, Tensor]:
    """0/1 scores, 0 for the rows in ``wrong``."""
    score = torch.ones(rows)
    score[list(wrong if isinstance(wrong, range) else range(wrong))] = 0
    return {name: score}


def three_updates(rows: int = 1000, **settings: object) -> Monitor:
    """q1 is kept, q2 loses 8 points at the last update."""
    monitor = Monitor(resamples=200, **settings)  # type: ignore[arg-type]
    part = rows // 100
    monitor.register(0, "q1", table(0, rows))
    monitor.record(0, {0: scores(rows, 6 * part)})
    monitor.register(1, "q2", table(rows, rows))
    monitor.record(1, {0: scores(rows, range(2 * part, 8 * part)), 1: scores(rows, 5 * part)})
    monitor.register(2, "q3", table(2 * rows, rows))
    last = {0: scores(rows, range(part, 7 * part)), 1: scores(rows, 13 * part), 2: scores(rows, 4 * part)}
    monitor.record(2, last)
    return monitor


def test_matrix_and_metrics() -> None:
    monitor = three_updates()
    nan = float("nan")
    np.testing.assert_allclose(monitor.matrix(), [[0.94, nan, nan], [0.94, 0.95, nan], [0.94, 0.87, 0.96]], rtol=1e-6)
    metrics = monitor.metrics()
    assert set(metrics) == KEYS
    assert metrics["bwt"] == pytest.approx(-0.04) and metrics["fwt"] is None
    assert metrics["negative_flips"] == pytest.approx((0.01 + 0.08) / 2)
    assert monitor.names() == ["q1", "q2", "q3"]
    json.dumps([metrics, monitor.intervals()], allow_nan=False)
    for name, (low, high) in monitor.intervals().items():
        value = metrics[name]
        assert value is not None and low - 1e-6 <= value <= high + 1e-6


def test_intervals_are_computed_once_for_each_record(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*given: Any) -> Resampled:
        calls.append(1)
        return bootstrap(*given)

    monkeypatch.setattr("continual.monitor.monitor.bootstrap", counted)
    monitor = three_updates()
    monitor.metrics()
    assert not calls
    before = monitor.intervals()
    monitor.latest()
    assert monitor.intervals() == before and len(calls) == 1
    monitor.record(2, {0: scores(1000, 500)})
    assert monitor.intervals() != before and len(calls) == 2


def test_tree() -> None:
    retention = three_updates().latest(["replay"])
    text = str(retention)
    lines = text.splitlines()
    assert lines[0].startswith("update 3 · q3") and "accuracy 0.923 [" in lines[0]
    assert lines[1].startswith("├── q1   0.940 → 0.940   0.0 pts [") and "kept (smallest detectable drop" in lines[1]
    assert lines[2].startswith("├── q2   0.950 → 0.870   −8.0 pts [−") and lines[2].endswith("FORGOTTEN")
    assert lines[3].startswith("└── q3   —     → 0.960") and lines[3].endswith("new")
    assert "retention 0.958 · bwt −0.040 · forgetting 0.040 (max-based, biased upwards: about 0.0" in lines[4]
    assert lines[5].startswith("what to do: 'q2' lost 8.0 points: raise the capacity") and len(lines) == 6
    json.dumps(retention.to_dict(), allow_nan=False)
    assert retention.to_dict()["lines"][1]["status"] == "forgotten"


@pytest.mark.parametrize(
    ("wrong", "rows", "status"),
    [
        (range(40), 1000, "kept"),
        (range(10, 51), 1000, "kept"),
        (range(0, 56), 1000, "lost some"),
        (range(0, 140), 1000, "forgotten"),
        (range(0, 3), 50, "cannot tell"),
    ],
)
def test_status_follows_the_paired_interval(wrong: range, rows: int, status: str) -> None:
    before = scores(rows, 40 * rows // 1000)[ACCURACY].numpy()
    line = judge("q1", before, scores(rows, wrong)[ACCURACY].numpy(), 0.03)
    assert line.status == status
    assert (line.rows_needed is not None) == (status == "cannot tell")
    assert line.low is not None and line.high is not None and line.change is not None
    assert line.low <= line.change <= line.high


@pytest.mark.parametrize(
    ("last", "slots", "expected"),
    [
        (400, None, "replay some of its rows, or more"),
        (400, [], "add replay of some of its rows"),
        (400, ["penalty"], "beside the penalty, which alone is weak"),
        (400, ["replay"], "raise the capacity or the share"),
        (60, ["replay"], "nothing: every test set that could be compared has kept its score"),
        (75, ["replay"], "which is real, if not surely more than the tolerance"),
    ],
)
def test_advice_fits_what_happened_and_the_parts_in_use(last: int, slots: list[str] | None, expected: str) -> None:
    monitor = Monitor(resamples=20)
    for index in range(2):
        monitor.register(index, f"q{index + 1}", table(index * 1000, 1000))
    monitor.record(0, {0: scores(1000, 60)})
    monitor.record(1, {0: scores(1000, last), 1: scores(1000, 50)})
    assert expected in monitor.latest(slots).advice


@pytest.mark.parametrize(
    ("slots", "expected"),
    [(["penalty"], "lower the strength of the penalty"), (["adapter"], "raise the rank"), (None, "train longer")],
)
def test_advice_on_a_new_experience_that_was_hardly_learnt(slots: list[str] | None, expected: str) -> None:
    monitor = Monitor(resamples=20)
    for index in range(2):
        monitor.register(index, f"q{index + 1}", table(index * 1000, 1000))
    monitor.record(0, {0: scores(1000, 60)})
    monitor.record(1, {0: scores(1000, 60), 1: scores(1000, 700)})
    advice = monitor.latest(slots).advice
    assert "'q2' was learnt to 0.300 only" in advice and expected in advice


def test_advice_on_a_test_set_that_is_too_small() -> None:
    monitor = Monitor(resamples=20)
    for index in range(2):
        monitor.register(index, f"q{index + 1}", table(index * 40, 40))
    monitor.record(0, {0: scores(40, 4)})
    monitor.record(1, {0: scores(40, range(2, 7)), 1: scores(40, 4)})
    retention = monitor.latest()
    needed = retention.lines[0].rows_needed
    assert needed is not None and needed > 800 and "for any practical number of them" in retention.advice


def test_first_update_and_joint_bound_have_nothing_to_compare() -> None:
    monitor = Monitor(resamples=20)
    monitor.register(0, "q1", table(0, 50))
    monitor.record(0, {0: scores(50, 5)})
    assert (
        str(monitor.latest()).splitlines()[-1] == "what to do: nothing yet: there is no earlier score to compare with."
    )
    joint = Monitor(resamples=20)
    for index in range(3):
        joint.register(index, f"q{index + 1}", table(index * 50, 50))
    joint.record(0, {index: scores(50, 5 * index) for index in range(3)})
    assert joint.metrics() == {**dict.fromkeys(KEYS), "accuracy": pytest.approx(0.9)}
    latest = joint.latest()
    assert {line.status for line in latest.lines} == {"new"} and latest.name == "all at once"
    assert set(joint.intervals()) == {"accuracy"}


def test_tolerance_decides_what_counts_as_forgotten() -> None:
    assert [line.status for line in three_updates(tolerance=0.2).latest().lines] == ["kept", "lost some", "new"]


def test_confidence_and_seed_count() -> None:
    wide, narrow = three_updates(confidence=0.99).latest(), three_updates(confidence=0.5).latest()
    assert wide.lines[1].low < narrow.lines[1].low  # type: ignore[operator]
    assert wide.intervals["bwt"][0] < narrow.intervals["bwt"][0]
    assert three_updates(seed=1).intervals() != three_updates(seed=2).intervals()


def test_forward_transfer_waits_for_its_experience() -> None:
    monitor = Monitor(resamples=50)
    monitor.record_initial({0: scores(100, 90), 1: scores(100, 80)})
    monitor.register(0, "q1", table(0, 100))
    monitor.register(1, "q2", table(100, 100), ahead=True)
    monitor.record(0, {0: scores(100, 10), 1: scores(100, 60)})
    assert monitor.matrix().shape == (1, 1) and monitor.metrics()["accuracy"] == pytest.approx(0.9)
    assert len(monitor.latest().lines) == 1
    monitor.register(1, "q2", table(100, 100))
    monitor.record(1, {0: scores(100, 10), 1: scores(100, 10)})
    monitor.register(0, "q1", table(0, 100), ahead=True)
    assert monitor.initial() == pytest.approx([0.1, 0.2])
    assert monitor.metrics()["fwt"] == pytest.approx(0.4 - 0.2)
    assert "fwt" in monitor.intervals()
    assert [line.status for line in monitor.latest().lines] == ["cannot tell", "new"]


@pytest.mark.parametrize("name", ["log-likelihood per token", "negative squared error"])
def test_other_scores_are_shown_as_they_are(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    monitor = Monitor(resamples=50)
    monitor.register(0, "news", table(0, 500))
    monitor.register(1, "code", table(500, 500))
    then = -torch.rand(500, generator=generator) - 1
    right = (torch.rand(500, generator=generator) < 0.5).float()
    tokens = name.startswith("log")

    def both(score: Tensor, match: Tensor) -> dict[str, Tensor]:
        return {name: score, "exact match": match} if tokens else {name: score}

    monitor.record(0, {0: both(then, right)})
    monitor.record(1, {0: both(then * 1.5, right * 0), 1: both(then, right)})
    text = str(monitor.latest())
    assert f"{name} −1.8" in text and "pts" not in text and "FORGOTTEN" in text and "lost 0.7" in text
    flips = float(right.mean()) if tokens else None
    assert monitor.metrics()["negative_flips"] == (None if flips is None else pytest.approx(flips))
    expected = float(torch.exp(0.5 * then.mean())) if tokens else 1 / 1.5
    assert monitor.metrics()["retention"] == pytest.approx(expected, rel=1e-5)
    assert np.isnan(monitor.matrix("exact match")[1, 0]) != tokens


def test_scores_that_ceased_to_be_finite_are_forgotten() -> None:
    monitor = Monitor(resamples=20)
    monitor.register(0, "news", table(0, 50))
    monitor.register(1, "code", table(50, 50))
    name = "log-likelihood per token"
    monitor.record(0, {0: {name: -torch.ones(50)}})
    monitor.record(1, {0: {name: torch.full((50,), -torch.inf)}, 1: {name: -torch.ones(50)}})
    latest = monitor.latest()
    assert latest.lines[0].status == "forgotten" and "no longer finite" in latest.advice
    assert "FORGOTTEN" in str(latest)
    json.dumps(latest.to_dict(), allow_nan=False)


def test_probes_are_compared_with_their_first_score() -> None:
    monitor = Monitor({"safety": table(0, 1000)}, resamples=50)
    monitor.register(0, "q1", table(0, 1000))
    monitor.record_initial({}, {"safety": scores(1000, 10)})
    monitor.record(0, {0: scores(1000, 20)}, {"safety": scores(1000, 300)})
    retention = monitor.latest(["replay"])
    line = retention.lines[-1]
    assert line.probe and line.status == "forgotten" and line.change == pytest.approx(-0.29)
    assert "└── probe safety   0.990 → 0.700" in str(retention) and "lower the learning rate" in retention.advice
    history = monitor.probe_history()
    assert history["safety"]["updates"] == [-1, 0] and history["safety"]["scores"] == pytest.approx([0.99, 0.7])
    assert [verdict.name for verdict in gate(monitor.pairs())] == ["probe safety"]
    assert monitor.matrix().shape == (1, 1)


def test_probes_alone_can_be_monitored() -> None:
    monitor = Monitor({"safety": table(0, 30)}, resamples=20)
    for update in range(2):
        monitor.record(update, {}, {"safety": scores(30, update)})
    assert monitor.metrics() == dict.fromkeys(KEYS) and monitor.intervals() == {}
    assert [line.name for line in monitor.latest().lines] == ["safety"]


def test_pairs_for_the_gate() -> None:
    monitor = three_updates()
    verdicts = gate(monitor.pairs(), margin=0.02)
    assert [(verdict.name, verdict.verdict) for verdict in verdicts] == [("q2", "fail"), ("q1", "pass")]
    assert set(monitor.pairs(before=0, after=1)) == {"q1"}


def test_state_goes_through_a_folder_and_back(tmp_path: Path) -> None:
    monitor = three_updates()
    probes = {"safety": table(0, 7)}
    monitor = Monitor(probes, resamples=200)
    monitor.load_state_dict(three_updates().state_dict())
    monitor.record(2, {}, {"safety": scores(7, 1)})
    monitor.record_initial({3: scores(5, 2)})
    save_state(tmp_path / "state", monitor.state_dict())
    again = Monitor(probes, resamples=200)
    again.load_state_dict(load_state(tmp_path / "state"))
    assert again.latest().to_dict() == monitor.latest().to_dict() and again.intervals() == monitor.intervals()
    assert again.probe_history() == monitor.probe_history() and again.nbytes() == monitor.nbytes() > 0
    assert torch.equal(again.rows(), monitor.rows())
    assert list(again.tables()) == [] and list(again.probes) == ["safety"]
    again.register(3, "q4", table(3000, 5), ahead=True)
    again.register(3, "q4", table(3000, 5))
    assert again.initial()[3] == pytest.approx(0.6)


def test_loading_keeps_tables_that_are_registered() -> None:
    monitor = Monitor()
    monitor.register(0, "q1", table(0, 1000))
    monitor.load_state_dict(three_updates().state_dict())
    assert list(monitor.tables()) == [0] and len(monitor.tables()[0]) == 1000


def test_bytes_reported_are_bytes_held() -> None:
    monitor = three_updates(rows=100)
    assert monitor.nbytes() == 3 * 100 * 8 + 6 * 100 * 4


def test_erased_rows_are_gone_from_every_score() -> None:
    monitor = three_updates(rows=100)
    before = monitor.intervals()
    assert monitor.erase(torch.tensor([0, 1, 2, 250, 9999])) == 4
    assert not torch.isin(torch.tensor([0, 1, 2, 250]), monitor.rows()).any() and len(monitor.rows()) == 296
    assert monitor.matrix()[0, 0] == pytest.approx(94 / 97)
    assert monitor.matrix()[2, 0] == pytest.approx(93 / 97)
    assert monitor.intervals() != before
    assert len(monitor.tables()[0]) == 97 and torch.equal(monitor.tables()[0].column("row"), torch.arange(3, 100))
    fresh = Monitor(resamples=200)
    fresh.load_state_dict(monitor.state_dict())
    fresh.register(0, "q1", table(0, 100))
    assert torch.equal(fresh.tables()[0].column("row"), torch.arange(3, 100))
    assert monitor.erase(monitor.rows()) == 296 and monitor.metrics()["accuracy"] is None
    str(monitor.latest())


def test_tables_that_were_views_of_one_are_copied_by_an_erasure() -> None:
    base = TensorTable({"row": torch.arange(30), "inputs": torch.rand(30, 2)})
    monitor = Monitor({"safety": base.select(torch.arange(20, 25))})
    monitor.register(0, "q1", base.select(torch.arange(10)))
    monitor.register(1, "q2", base.select(torch.arange(10, 20)))
    monitor.record(0, {0: scores(10, 1), 1: scores(10, 2)}, {"safety": scores(5, 1)})
    assert monitor.erase(torch.tensor([3, 22])) == 1
    for own, rows in ((monitor.tables()[0], 9), (monitor.tables()[1], 10), (monitor.probes["safety"], 5)):
        assert isinstance(own, TensorTable) and len(own) == rows
        assert own.column("inputs").untyped_storage().nbytes() == rows * 2 * 4
        assert torch.equal(own.column("inputs"), base.column("inputs")[own.column("row")])
    assert 22 in monitor.probes["safety"].column("row"), "a probe's rows are no rows of the stream"


def grown(updates: int, trim: bool, rows: int = 40) -> Monitor:
    """One experience an update, all measured at each, some scores before any update, a probe."""
    monitor = Monitor({"safety": table(10**6, rows)}, resamples=100)
    draws = np.random.default_rng(0)

    def drawn() -> dict[str, Tensor]:
        return {ACCURACY: torch.from_numpy(draws.integers(0, 2, rows).astype(np.float32))}

    monitor.record_initial({index: drawn() for index in range(updates)}, {"safety": drawn()})
    for update in range(updates):
        monitor.register(update, f"q{update}", table(1000 * update, rows))
        monitor.record(update, {index: drawn() for index in range(update + 1)}, {"safety": drawn()})
        if trim:
            monitor.trim()
    return monitor


def test_a_trimmed_monitor_keeps_two_scores_a_row_and_says_the_same() -> None:
    updates, rows = 6, 40
    whole, trimmed, once = grown(updates, trim=False), grown(updates, trim=True), grown(updates, trim=False)
    once.trim()
    assert str(once.state_dict()) == str(trimmed.state_dict()), "trimmed at every update or once"
    assert trimmed.nbytes() == rows * (7 * 8 + (2 * 7 - 1) * 4) < whole.nbytes()
    one, other = whole.matrix(), trimmed.matrix()
    stays = np.eye(updates, dtype=bool)
    stays[-1] = True
    np.testing.assert_array_equal(other[stays], one[stays])
    assert np.isnan(other[~stays]).all() and trimmed.updates() == updates and trimmed.names() == whole.names()
    before, after = whole.metrics(), trimmed.metrics()
    same = ("accuracy", "learning_accuracy", "bwt", "retention", "negative_flips")
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
    assert after["fwt"] is None and trimmed.initial() == [None] * updates
    assert after["forgetting"] == pytest.approx(np.mean(np.diagonal(one)[:-1] - one[-1, :-1]))
    assert after["forgetting"] < before["forgetting"]  # type: ignore[operator]
    assert set(trimmed.intervals()) == set(whole.intervals())
    assert trimmed.last_intervals().shape == (2, updates)
    ours, theirs = trimmed.pairs(), whole.pairs()
    assert list(ours) == list(theirs) and len(ours) == updates
    for name, pair in ours.items():
        assert all(np.array_equal(a, b) for a, b in zip(pair, theirs[name], strict=True))
    assert [line.change for line in trimmed.latest().lines] == [line.change for line in whole.latest().lines]
    assert str(trimmed.latest()) and trimmed.pairs(before=2).keys() == {"q2"}
    history = trimmed.probe_history()["safety"]
    assert (
        history["updates"] == [-1, updates - 1] and history["scores"][0] == whole.probe_history()["safety"]["scores"][0]
    )


def test_trimming_keeps_the_last_scores_of_what_was_left_out_since() -> None:
    monitor = Monitor(resamples=10)
    for index in range(2):
        monitor.register(index, f"q{index}", table(100 * index, 10))
    monitor.register(5, "later", table(900, 10), ahead=True)
    monitor.record(0, {0: scores(10, 1), 5: scores(10, 9)})
    monitor.record(1, {0: scores(10, 2), 1: scores(10, 3), 5: scores(10, 8)})
    monitor.record(2, {0: scores(10, 4), 5: scores(10, 7)})
    monitor.record(3, {1: scores(10, 5)})
    monitor.trim()
    kept = {name for name in monitor.tensors() if not name.endswith("rows")}
    assert kept == {f"{key}/{ACCURACY}" for key in ("0/0", "0/2", "1/1", "1/3", "5/2")}
    assert monitor.updates() == 4 and monitor.latest().lines[0].status == "not measured"
    Monitor().trim()


def test_a_thinned_monitor_keeps_the_rows_of_smallest_hash() -> None:
    monitor = three_updates(rows=200)
    monitor.register(3, "short", table(9000, 30))
    whole = {index: test.clone() for index, test in ((i, t.column("row")) for i, t in monitor.tables().items())}
    first = monitor.tensors()[f"0/1/{ACCURACY}"]
    assert monitor.thin(50) == 3 * 150 and monitor.thin(50) == 0
    for index, rows in whole.items():
        slow = sorted(rows.tolist(), key=lambda row: int(row_keys(torch.tensor([row]), THINNING)))[:50]
        kept = monitor.tables()[index].column("row")
        assert kept.tolist() == sorted(slow), "in the order in which they were"
        assert torch.equal(monitor.tensors()[f"{index}/rows"], kept)
    assert torch.equal(monitor.tensors()[f"0/1/{ACCURACY}"], first[monitor.tables()[0].column("row")])
    own = monitor.tables()[0]
    assert isinstance(own, TensorTable) and own.column("row").untyped_storage().nbytes() == 50 * 8
    assert len(monitor.tables()[3]) == 30 and monitor.matrix().shape == (3, 4)
    other, least = three_updates(rows=200), three_updates(rows=200)
    other.thin(100)
    other.thin(50)
    assert str(other.state_dict()) == str(thinned(three_updates(rows=200), 50).state_dict())
    least.thin(10, least=50)
    assert str(least.state_dict()) == str(other.state_dict())
    assert str(monitor.latest()) and set(monitor.pairs()) == {"q1", "q2"}
    fresh = Monitor()
    fresh.load_state_dict(other.state_dict())
    fresh.register(0, "q1", table(0, 200))
    assert torch.equal(fresh.tables()[0].column("row"), other.tables()[0].column("row"))
    for wrong in ((0, 0), (5, -1)):
        with pytest.raises(StreamError, match="give at least 1, and 0"):
            monitor.thin(*wrong)


def thinned(monitor: Monitor, limit: int) -> Monitor:
    monitor.thin(limit)
    return monitor


def test_one_pass_measures_everything_and_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def rows(start: int) -> TensorTable:
        inputs, labels = torch.randn(30, 4, generator=generator), torch.randint(0, 3, (30,), generator=generator)
        return TensorTable({"inputs": inputs, "labels": labels, "row": torch.arange(start, start + 30)})

    sizes: list[int] = []

    def forward(batch: dict[str, Tensor]) -> Output:
        sizes.append(len(batch["labels"]))
        return Output(model(batch["inputs"]))

    monitor = Monitor({"probe": rows(0)}, resamples=20, batch_size=70)
    monitor.register(0, "a", rows(0))
    monitor.register(1, "b", rows(30))
    draws = torch.get_rng_state()
    with evaluating(model):
        monitor.measure(0, forward, lambda batch: None, "classification", torch.device("cpu"))
        assert sizes == [60, 30]
        monitor.measure(1, forward, lambda batch: None, "classification", torch.device("cpu"), experiences=[1])
    assert torch.equal(torch.get_rng_state(), draws)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert np.isnan(monitor.matrix()[1, 0]) and monitor.matrix()[1, 1] == monitor.matrix()[0, 1]
    assert monitor.probe_history()["probe"]["updates"] == [0, 1]
    latest = monitor.latest()
    assert isinstance(latest, Retention) and latest.lines[0].status == "not measured"


def test_what_it_refuses() -> None:
    monitor = Monitor()
    with pytest.raises(StreamError, match="nothing was measured yet"):
        monitor.latest()
    assert not monitor.measured and monitor.metrics() == dict.fromkeys(KEYS) and monitor.intervals() == {}
    monitor.register(0, "q1", table(0, 10))
    with pytest.raises(StreamError, match=r"experience 1 has scores but no test set: register it first"):
        monitor.record(0, {1: scores(10, 1)})
    with pytest.raises(StreamError, match=r"experience 0 has 10 rows and scores of .*: give one for each row"):
        monitor.record(0, {0: scores(9, 1)})
    with pytest.raises(StreamError, match="updates count from 0"):
        monitor.record(-1, {0: scores(10, 1)})
    with pytest.raises(StreamError, match=r"probe 'x' has scores but no test set"):
        monitor.record(0, {}, {"x": scores(10, 1)})
    with pytest.raises(StreamError, match="lacks 3 of the 10 rows"):
        monitor.register(0, "q1", table(3, 10))
    with pytest.raises(StreamError, match="lacks 10 of the 10 rows"):
        monitor.register(0, "q1", table(3, 0))
    with pytest.raises(StreamError, match="no column 'row'"):
        monitor.register(1, "q2", TensorTable({"inputs": torch.ones(3, 2)}))
    probed = Monitor({"safety": table(0, 5)})
    probed.record(0, {}, {"safety": scores(5, 1)})
    with pytest.raises(StateError, match="the probe 'safety' has 6 rows and was measured with 5"):
        Monitor({"safety": table(0, 6)}).load_state_dict(probed.state_dict())


@pytest.mark.parametrize("settings", [{"resamples": 0}, {"confidence": 1.0}, {"batch_size": 0}, {"tolerance": -0.1}])
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(StreamError, match="cannot be: give at least 1"):
        Monitor(**settings)  # type: ignore[arg-type]


def test_scores_and_pairs_by_name() -> None:
    monitor = three_updates(100)
    monitor.register(3, "q4", table(300, 100), ahead=True)
    assert {name: None if one is None else float(one.sum()) for name, one in monitor.scores(1).items()} == {
        "q1": 94,
        "q2": 95,
        "q3": None,
    }
    assert list(monitor.scores()) == ["q1", "q2", "q3"] and monitor.right_or_wrong == ACCURACY
    assert set(monitor.pairs(before=1, score=ACCURACY)) == {"q1", "q2"} and monitor.pairs(score="exact match") == {}


def test_a_head_that_keeps_what_it_learnt_is_not_told_to_replay() -> None:
    monitor = Monitor()
    table = TensorTable({"row": torch.arange(400), "labels": torch.zeros(400)})
    monitor.register(0, "q1", table)
    monitor.record(0, {0: {"accuracy": torch.ones(400)}})
    monitor.register(1, "q2", TensorTable({"row": torch.arange(400) + 400, "labels": torch.zeros(400)}))
    monitor.record(1, {0: {"accuracy": torch.zeros(400)}, 1: {"accuracy": torch.ones(400)}})
    assert "add replay" in str(monitor.latest(hint=["head"])) and "add replay" not in str(
        monitor.latest(hint=["head", EXACT])
    )
    assert "given to classes that came later" in str(monitor.latest(hint=["head", EXACT]))
