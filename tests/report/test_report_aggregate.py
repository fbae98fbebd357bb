"""Means and intervals against figures worked out by hand."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from report_runs import content, settings

from continual.errors import StateError
from continual.report import load_results
from continual.report.aggregate import aggregate, difference, estimate
from continual.report.findings import findings, headline
from continual.report.numbers import Scale, count, integers, seconds, size
from continual.report.svg import spread

T2 = 4.302652729911275
"""97.5 % point of Student's t with 2 degrees of freedom, from a table."""


def test_mean_standard_deviation_and_interval_over_seeds() -> None:
    found = estimate([0.70, 0.80, 0.75])
    assert found is not None and found.over == "seeds" and found.count == 3
    assert found.mean == pytest.approx(0.75) and found.std == pytest.approx(0.05)
    assert found.low == pytest.approx(0.75 - T2 * 0.05 / math.sqrt(3))
    assert found.high == pytest.approx(0.75 + T2 * 0.05 / math.sqrt(3))


def test_one_seed_shows_the_interval_over_rows(make: Any, tmp_path: Path) -> None:
    make("ewc", 0)
    found = aggregate(load_results([tmp_path]))[0].strategies[0].metrics["accuracy"]
    assert found is not None and (found.over, found.count, found.std) == ("rows", 1, None)
    assert (found.low, found.high) == (pytest.approx(0.70), pytest.approx(0.79))


def test_no_interval_is_invented() -> None:
    assert estimate([]) is None
    found = estimate([0.5], [None, None])
    assert found is not None and found.over is None and found.low is None


def test_intervals_of_shares_stay_within_what_a_share_can_be(make: Any, tmp_path: Path) -> None:
    for seed, level in enumerate((1.0, 0.9)):
        make("a", seed, [[level, None], [level, level]])
        make("b", seed, [[1.0, None], [0.8 * seed, 1.0]])
        flips = {**content("a", seed, [[level, None], [level, level]])["metrics"], "negative_flips": 0.1 * seed}
        plain = {"stream": "prices", "objective": "regression", "score": "negative squared error", "metrics": flips}
        make("a", seed, [[level, None], [level, level]], **plain)
    digits, prices = aggregate(load_results([tmp_path]))
    a, b = digits.strategies
    whole = estimate([1.0, 0.9])
    assert whole is not None and whole.high is not None and whole.high > 1.5 and whole.low is not None and whole.low > 0
    for found in (a.metrics["accuracy"], a.metrics["learning_accuracy"], *a.curve):
        assert found is not None and (found.low, found.high) == (pytest.approx(whole.low), 1.0)
    bwt, forgetting, retention = (b.metrics[name] for name in ("bwt", "forgetting", "retention"))
    assert bwt is not None and (bwt.low, bwt.high) == (-1.0, 1.0)
    assert forgetting is not None and (forgetting.low, forgetting.high) == (-1.0, 1.0)
    assert retention is not None and retention.low == 0.0 and retention.high is not None and retention.high > 1
    lead = difference(a, b)
    assert lead is not None and (lead.low, lead.high) == (-1.0, 1.0)
    error, turned = (prices.strategies[0].metrics[name] for name in ("accuracy", "negative_flips"))
    assert error is not None and error.high is not None and error.high > 1
    assert turned is not None and turned.low == 0.0 and turned.mean == pytest.approx(0.05)


def test_strategies_stand_by_accuracy_and_matrices_are_means(make: Any, tmp_path: Path) -> None:
    make("low", 0, [[0.9, None], [0.1, 0.9]])
    make("high", 0, [[0.9, None], [0.7, 0.8]])
    make("high", 1, [[0.7, None], [0.5, 1.0]])
    make("joint", 0, [[0.95, 0.85]])
    (stream,) = aggregate(load_results([tmp_path]))
    assert [one.strategy for one in stream.strategies] == ["joint", "high", "low"]
    high = stream.strategies[1]
    assert high.matrix[0][1] is None
    assert high.matrix[1] == (pytest.approx(0.6), pytest.approx(0.9))
    assert [point.mean if point else None for point in high.curve] == [pytest.approx(0.8), pytest.approx(0.75)]
    assert high.cost["train_seconds"] == 10.5 and high.state_bytes["head/linear"] == 345
    assert stream.strategies[0].bound and stream.strategies[0].curve == ()
    assert "not run with the same seeds" in stream.warnings[0]


def test_intransigence_is_measured_against_the_best_joint_run_of_the_same_seed(make: Any, tmp_path: Path) -> None:
    make("ewc", 0, [[0.9, None], [0.1, 0.7]])
    make("ewc", 1, [[0.8, None], [0.1, 0.6]])
    make("joint", 0, [[0.95, 0.85]])
    make("weak-joint", 0, [[0.5, 0.5]])
    (stream,) = aggregate(load_results([tmp_path]))
    found = {one.strategy: one.metrics["intransigence"] for one in stream.strategies}
    assert found["joint"] is None and found["weak-joint"] is None
    ewc = found["ewc"]
    assert ewc is not None and ewc.count == 1 and ewc.mean == pytest.approx((0.05 + 0.15) / 2)


def test_a_cell_that_one_seed_lacks_is_the_mean_of_the_others(make: Any, tmp_path: Path) -> None:
    make("a", 0, [[0.9, None], [0.5, 0.8]])
    make("a", 1, [[0.9, 0.3], [0.7, 0.8]])
    (stream,) = aggregate(load_results([tmp_path]))
    assert stream.strategies[0].matrix[0][1] == pytest.approx(0.3)


def test_experiences_named_differently_by_seed_are_numbered(make: Any, tmp_path: Path) -> None:
    make("a", 0), make("a", 1, experiences=["x", "y"])
    assert aggregate(load_results([tmp_path]))[0].experiences == ("1", "2")


def test_runs_on_other_data_are_told(make: Any, tmp_path: Path) -> None:
    make("a", 0), make("b", 0, provenance=_provenance("f" * 64))
    assert "different data" in aggregate(load_results([tmp_path]))[0].warnings[0]


@pytest.mark.parametrize(
    ("per_seed", "prints", "told"),
    [
        ((False, False), "aab", True),  # the split is the same for every seed, so the rows changed
        ((None, False), "aab", True),
        ((None, None), "aab", True),  # two seeds with the same rows: the split does not depend on the seed
        ((None, None), "abc", False),
        ((True, True), "abc", False),
        ((True, True), "aab", False),  # two seeds may draw the same split
        ((False, False), "aaa", False),
    ],
)
def test_rows_that_changed_between_seeds_are_told(
    make: Any, tmp_path: Path, per_seed: tuple[bool | None, ...], prints: str, told: bool
) -> None:
    for seed, letter in enumerate(prints):
        origin = {**content("a", seed)["provenance"], "stream_fingerprint": letter * 64}
        if (known := per_seed[min(seed, 1)]) is not None:
            origin["stream_per_seed"] = known
        make("a", seed, provenance=origin)
    warnings = aggregate(load_results([tmp_path]))[0].warnings
    assert len(warnings) == told and all("the split does not depend on the seed" in sentence for sentence in warnings)


def _made(fingerprint: str, **changes: Any) -> dict[str, Any]:
    """Provenance of a run of seed 1 whose settings, model or base are not those of the others."""
    whole = content(seed=1)["provenance"]
    training = whole["settings"]["training"] | changes.pop("training", {})
    made = whole["settings"] | {"training": training} | changes.pop("settings", {})
    return {**whole, "strategy_fingerprint": fingerprint * 64, "settings": made, **changes}


@pytest.mark.parametrize(
    ("changes", "names", "differing"),
    [
        (_made("6", training={"epochs": 1}), ["training.epochs=8", "training.epochs=1"], "'training.epochs'"),
        (_made("6", settings={"replay": {"kind": "rehearsal", "select": "class-balanced"}}),
         ["replay.select=reservoir", "replay.select=class-balanced"], "'replay.select'"),
        (_made("6", settings={"replay": None, "penalty": {"kind": "ewc"}}),
         ["replay=rehearsal, penalty=null", "replay=null, penalty=ewc"], "'replay', 'penalty'"),
        (_made("5", model={"kind": "mlp", "hidden": [32]}), ["model.hidden=[16]", "model.hidden=[32]"], "'model.hidden'"),
        (_made("5", base_model_sha256="ab" * 32),
         ["base_model_sha256=null", "base_model_sha256=abababababab"], "'base_model_sha256'"),
        ({**_made("6"), "settings": None},
         ["strategy_fingerprint=555555555555", "strategy_fingerprint=666666666666"], "'strategy_fingerprint'"),
    ],
)  # fmt: skip
def test_runs_that_were_not_made_alike_stand_in_rows_of_their_own(
    make: Any, tmp_path: Path, changes: dict[str, Any], names: list[str], differing: str
) -> None:
    make("er", 0), make("er", 1, [[0.9, None], [0.1, 0.2]], provenance=changes), make("joint", 0), make("joint", 1)
    (stream,) = aggregate(load_results([tmp_path]))
    rows = {one.strategy: one for one in stream.strategies}
    assert set(rows) == {f"er ({name})" for name in names} | {"joint"}
    assert rows[f"er ({names[0]})"].seeds == (0,) and rows[f"er ({names[1]})"].seeds == (1,)
    assert stream.warnings[0] == f"Runs of 'er' differ in {differing}: each kind stands in a row of its own."


def test_many_differences_are_counted_and_names_stay_apart(make: Any, tmp_path: Path) -> None:
    for seed in range(3):
        training = {"lr": 0.1, "epochs": 8, "batch_size": 8, "momentum": 0.5, "weight_decay": seed / 10}
        if seed:
            training |= {"lr": 0.2, "epochs": 1, "batch_size": 16}
        made = {**_made(str(seed), training=training), "seed": seed}
        make("er", seed, provenance=made)
    names = {one.strategy for one in aggregate(load_results([tmp_path]))[0].strategies}
    assert "er (training.lr=0.1, training.epochs=8, training.batch_size=8, 1 more)" in names
    assert "er (training.lr=0.2, training.epochs=1, training.batch_size=16, training.weight_decay=0.1)" in names
    assert "er (training.lr=0.2, training.epochs=1, training.batch_size=16, training.weight_decay=0.2)" in names


def test_runs_that_differ_in_name_only_are_alike(make: Any, tmp_path: Path) -> None:
    base, older = {"kind": "pretrained", "name": "a/base"}, _made("6", model=None)
    older["settings"]["training"] = {**older["settings"]["training"], "warmup": 0.0}
    older |= {"base_model_sha256": "ab" * 32, "model": {**base, "name": "/elsewhere/base", "layers": 1}}
    make("er", 0, provenance=_made("5", base_model_sha256="ab" * 32, model=base) | {"seed": 0})
    make("er", 1, provenance=older)
    (stream,) = aggregate(load_results([tmp_path]))
    assert [one.strategy for one in stream.strategies] == ["er"] and not stream.warnings


def test_settings_that_name_code_are_compared_and_not_loaded(make: Any, tmp_path: Path) -> None:
    for seed, kind in enumerate(("no_such_package:Part", "no_such_package:Other")):
        make("er", seed, provenance={**_made(str(seed), settings={"replay": {"kind": kind}}), "seed": seed})
    names = {one.strategy for one in aggregate(load_results([tmp_path]))[0].strategies}
    assert names == {"er (replay.kind=no_such_package:Part)", "er (replay.kind=no_such_package:Other)"}


def test_a_joint_run_counts_for_the_others_only_among_its_kind(make: Any, tmp_path: Path) -> None:
    make("er", 0, [[0.9, None], [0.1, 0.7]]), make("er", 1, [[0.9, None], [0.1, 0.7]])
    make("joint", 0, [[0.95, 0.85]])
    weak = {**_made("6", training={"epochs": 1}), "seed": 1}
    weak["settings"] = {**settings("joint"), "training": weak["settings"]["training"]}
    make("joint", 1, [[0.5, 0.5]], provenance=weak)
    (stream,) = aggregate(load_results([tmp_path]))
    found = next(one for one in stream.strategies if one.strategy == "er").metrics["intransigence"]
    assert found is not None and found.count == 1 and found.mean == pytest.approx((0.05 + 0.15) / 2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"score": "exact match"}, "differ in their score ('accuracy', 'exact match')"),
        ({"matrix": [[0.9, None, None], [0.9, 0.9, None], [0.9, 0.9, 0.9]]}, "different numbers of experiences"),
        ({"matrix": [[0.9, 0.8]]}, "different numbers of updates"),
    ],
)
def test_runs_that_cannot_stand_in_one_table(make: Any, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    make("a", 0), make("a", 1, **changes)
    with pytest.raises(StateError) as caught:
        aggregate(load_results([tmp_path]))
    assert said in str(caught.value)


def test_differences_are_paired_by_seed(make: Any, tmp_path: Path) -> None:
    for seed, level in ((0, 0.5), (1, 0.7), (2, 0.9)):
        make("a", seed, [[level, None], [level, level]])
        make("b", seed, [[level, None], [level - 0.1, level - 0.1]])
    one, other = aggregate(load_results([tmp_path]))[0].strategies
    lead = difference(one, other)
    assert lead is not None and lead.mean == pytest.approx(0.1) and lead.low == pytest.approx(0.1)


def test_the_headline_names_best_bound_and_floor(make: Any, tmp_path: Path) -> None:
    for seed in range(3):
        make("naive", seed, [[0.9, None], [0.1, 0.9 + 0.01 * seed]])
        make("rehearsal", seed, [[0.9, None], [0.8, 0.8 + 0.01 * seed]])
        make("joint", seed, [[0.95, 0.85 + 0.01 * seed]])
    (stream,) = aggregate(load_results([tmp_path]))
    reach = T2 * 0.5 / math.sqrt(3)
    assert headline(stream) == (
        f"Best is rehearsal: 80.5 % accuracy on digits after 2 updates (95 % interval {80.5 - reach:.1f} to "
        f"{80.5 + reach:.1f} over 3 seeds), 10.0 points below joint training on all rows at once."
    )
    assert findings(stream) == [
        "With nothing against forgetting, naive ends at 50.5 % and forgets 80.0 points of what it had learnt.",
        "The lead of rehearsal over naive is 30.0 points (95 % interval +30.0 to +30.0 over 3 shared seeds).",
    ]


def _of(name: str, seed: int = 0, **changes: Any) -> dict[str, Any]:
    return {**content(name, seed)["provenance"], "settings": {"data": "experience", "backbone": "train"} | changes}


LORA = {"kind": "lora", "rank": 8, "across_tasks": "continue"}


@pytest.mark.parametrize(
    ("made", "bound", "naive"),
    [
        ({"data": "cumulative"}, True, False),
        ({"data": "joint"}, True, False),
        ({}, False, True),
        ({"head": {"kind": "linear"}, "adapter": LORA}, False, True),
        ({"adapter": {**LORA, "across_tasks": "first"}}, False, False),
        ({"head": {"kind": "nearest-mean"}}, False, False),
        ({"backbone": "frozen"}, False, False),
        ({"replay": {"kind": "rehearsal"}}, False, False),
        ({"penalty": [{"kind": "ewc"}, {"kind": "si"}]}, False, False),
        ({"distillation": {"kind": "mine:Part"}}, False, False),
        ({"adapter": {"kind": "mine:Part"}}, False, False),
        ({"training": {"active": "asymmetric"}}, False, False),
        ({"training": {"active": "seen"}}, False, True),
    ],
)
@pytest.mark.parametrize("name", ["retrain-all", "naive-joint"])
def test_settings_decide_what_is_a_bound_and_what_is_plain(
    make: Any, tmp_path: Path, name: str, made: dict[str, Any], bound: bool, naive: bool
) -> None:
    make(name, 0, provenance=_of(name, **made))
    (one,) = aggregate(load_results([tmp_path]))[0].strategies
    assert (one.bound, one.naive) == (bound, naive)


def test_in_the_task_scenario_the_classes_of_the_task_compete_plainly(make: Any, tmp_path: Path) -> None:
    made = {"training": {"active": "experience"}}
    (
        make("a", 0, provenance=_of("a", **made)),
        make("a", 0, stream="tasks", scenario="task", provenance=_of("a", **made)),
    )
    assert [one.strategies[0].naive for one in aggregate(load_results([tmp_path]))] == [False, True]


def test_a_result_without_settings_claims_nothing_but_its_form(make: Any, tmp_path: Path) -> None:
    make("naive", 0, provenance=_provenance("f" * 64)), make("cumulative", 0, provenance=_provenance("f" * 64))
    make("all", 0, [[0.95, 0.85]], provenance=_provenance("f" * 64))
    found = {one.strategy: (one.bound, one.naive) for one in aggregate(load_results([tmp_path]))[0].strategies}
    assert found == {"naive": (False, False), "cumulative": (False, False), "all": (True, False)}


def test_words_in_a_name_crown_nobody(make: Any, tmp_path: Path) -> None:
    make("retrain-all", 0, [[0.9, None], [0.9, 0.9]], provenance=_of("retrain-all", data="cumulative"))
    make("naive-replay", 0, [[0.9, None], [0.8, 0.8]], provenance=_of("naive-replay", replay={"kind": "rehearsal"}))
    make("plain", 0, [[0.9, None], [0.1, 0.9]], provenance=_of("plain"))
    (stream,) = aggregate(load_results([tmp_path]))
    assert headline(stream).startswith("Best is naive-replay: 80.0 %")
    assert findings(stream)[0].startswith("With nothing against forgetting, plain ends at 50.0 %")


def test_a_lead_that_is_not_certain_says_so(make: Any, tmp_path: Path) -> None:
    for seed, lift in ((0, 0.2), (1, -0.1), (2, 0.0)):
        make("a", seed, [[0.9, None], [0.7 + lift, 0.7 + lift]])
        make("b", seed, [[0.9, None], [0.7, 0.7]])
    (stream,) = aggregate(load_results([tmp_path]))
    assert "includes zero, so the order of the two is not certain" in findings(stream)[-1]


def test_one_seed_ranks_nothing(make: Any, tmp_path: Path) -> None:
    make("a", 0), make("b", 0, [[0.9, None], [0.6, 0.6]])
    sentences = findings(aggregate(load_results([tmp_path]))[0])
    assert sentences[0].startswith("Last is b: it ends at 60.0 % and forgets 30.0 points.")
    assert "run more seeds before ranking the two" in sentences[1]


def test_numbers() -> None:
    share, plain = Scale(True), Scale(False)
    assert share.text(0.91349) == "91.3" and share.text(-0.4) == "−40.0" and share.text(-0.00001) == "0.0"
    assert plain.text(-1.23456) == "−1.235" and plain.text(0.5, "retention") == "50.0" and share.text(None) == "–"
    assert (seconds(0.421), seconds(4.21), seconds(12345.6)) == ("0.42", "4.2", "12 346")
    assert (size(0), size(999), size(54_400), size(999_600), size(1_234_000_000)) == (
        "0 B",
        "999 B",
        "54.4 kB",
        "1.0 MB",
        "1.2 GB",
    )
    assert count(22_713_216) == "22.7 M" and integers((0, 1, 2, 3)) == "0–3" and integers((0, 2)) == "0, 2"


def test_labels_are_spread_and_keep_their_order() -> None:
    placed = spread([10.0, 10.0, 10.5, 50.0], 5.0, 0.0, 100.0)
    assert placed[3] == 50.0
    assert [b - a for a, b in pairwise(placed[:3])] == [pytest.approx(5.0)] * 2
    assert sum(placed[:3]) == pytest.approx(30.5)
    edge = spread([99.0, 100.0, 100.0], 4.0, 0.0, 100.0)
    assert edge == [pytest.approx(92.0), pytest.approx(96.0), pytest.approx(100.0)]


def _provenance(fingerprint: str) -> dict[str, Any]:
    return {
        "commit": None,
        "versions": {},
        "hardware": "a machine",
        "seed": 0,
        "started": "2026-11-20T10:00:00+00:00",
        "stream_fingerprint": fingerprint,
        "strategy_fingerprint": None,
        "base_model_sha256": None,
    }
