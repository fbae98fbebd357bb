"""The gate of a store: every rule against a slow reference, three answers, the order, the sentence, false alarms."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from scipy import stats

from continual.errors import StreamError
from continual.monitor.gate import gate
from continual.monitor.monitor import Monitor
from continual.refresh.bounds import hold_to
from continual.refresh.judge import judge
from continual.refresh.records import Check, Judgement
from continual.refresh.rules import GateRules
from continual.table import TensorTable

ACCURACY = "accuracy"
Given = Mapping[str, Mapping[int, np.ndarray]]
"""Experience → update → scores; the first update is the one that learnt it."""


def monitor_of(given: Given, score: str = ACCURACY, probes: Given | None = None) -> Monitor:
    """A monitor that was told these scores."""
    monitor, rows = Monitor(probes={name: _inputs(one) for name, one in (probes or {}).items()}), 0
    for index, (name, updates) in enumerate(given.items()):
        count = len(next(iter(updates.values())))
        monitor.register(index, name, TensorTable({"row": torch.arange(rows, rows + count)}))
        rows += count
    for update in sorted({u for one in [*given.values(), *(probes or {}).values()] for u in one}):
        tests = {i: _named(one[update], score) for i, one in enumerate(given.values()) if update in one}
        known = {name: _named(one[update], score) for name, one in (probes or {}).items() if update in one}
        monitor.record_initial(tests, known) if update < 0 else monitor.record(update, tests, known)
    return monitor


def _named(scores: np.ndarray, score: str) -> dict[str, torch.Tensor]:
    return {score: torch.as_tensor(np.asarray(scores), dtype=torch.float32)}


def _inputs(one: Mapping[int, np.ndarray]) -> TensorTable:
    return TensorTable({"inputs": torch.zeros(len(next(iter(one.values()))), 1)})


def right(count: int, rows: int) -> np.ndarray:
    """0/1 scores with so many right, the first ones."""
    return (np.arange(rows) < count).astype(np.float32)


def flipped(scores: np.ndarray, lost: int, won: int = 0) -> np.ndarray:
    """The same with the first ``lost`` right rows wrong and the first ``won`` wrong ones right."""
    after = scores.copy()
    after[np.flatnonzero(scores == 1)[:lost]] = 0
    after[np.flatnonzero(scores == 0)[:won]] = 1
    return after


def months(rows: int = 1000, lost: tuple[int, int] = (10, 5)) -> Monitor:
    """Three updates: jan fell by 30 rows at the second, and both fell by ``lost`` rows at the third."""
    jan, feb = right(900, rows), right(950, rows)
    jan2 = flipped(jan, 30)
    return monitor_of(
        {
            "jan": {0: jan, 1: jan2, 2: flipped(jan2, lost[0])},
            "feb": {1: feb, 2: flipped(feb, lost[1])},
            "mar": {2: right(800, rows)},
        }
    )


def ask(monitor: Monitor, new: str = "mar", size: int = 1, medians: tuple[float, float] | None = None, **rules: object):
    return judge(monitor, GateRules(**rules), new=new, slower=medians, size=size)  # type: ignore[arg-type]


def of(judgement: Judgement, rule: str) -> dict[str, Check]:
    return {check.name: check for check in judgement.checks if check.rule == rule}


def test_drops_are_those_of_the_gate() -> None:
    monitor = months(lost=(40, 5))
    found = ask(monitor, max_drop=0.02, max_drop_since_learnt=0.05, confidence=0.9)
    live = {name: (monitor.scores(1)[name], monitor.scores(2)[name]) for name in ("jan", "feb")}
    since = {name: (monitor.scores(i)[name], monitor.scores(2)[name]) for i, name in enumerate(("jan", "feb"))}
    for rule, pairs, margin in (("max_drop", live, 0.02), ("max_drop_since_learnt", since, 0.05)):
        checks = of(found, rule)
        assert set(checks) == {"jan", "feb"}
        for verdict in gate(pairs, margin, 1 - 0.9):  # type: ignore[arg-type]
            check = checks[verdict.name]
            assert (check.answer, check.value, check.low, check.high, check.p_value) == (
                verdict.verdict,
                verdict.drop,
                verdict.low,
                verdict.high,
                verdict.p_value,
            )
            assert (check.limit, check.rows, check.rows_needed) == (margin, verdict.rows, verdict.rows_needed)
    assert of(found, "max_drop")["jan"].value == pytest.approx(0.04)
    assert of(found, "max_drop_since_learnt")["jan"].value == pytest.approx(0.07)


def test_a_slow_fall_is_seen_since_it_was_learnt_only() -> None:
    monitor = months(lost=(0, 0))
    assert ask(monitor).answer == "pass"
    assert ask(monitor, max_drop_since_learnt=0.01).answer == "fail"


def test_three_answers_and_what_stands_first() -> None:
    assert ask(months()).answer == "pass"
    bad = ask(months(lost=(5, 80)))
    assert bad.answer == "fail" and [check.name for check in bad.checks] == ["feb", "jan"]
    assert bad.sentence == (
        "'feb' fell by 8.0 points against the live version (one-sided 95 % bounds of the drop: 6.6 and 9.6): more than the 2 points "
        "allowed at 95 % confidence; of 2 test sets 1 failed, 1 passed."
    )
    unsure = ask(months(rows=960, lost=(22, 5)))
    first = unsure.checks[0]
    assert unsure.answer == "cannot tell" and first.name == "jan" and first.rows_needed is not None
    assert (
        f"jan' fell by 2.3 points against the live version (one-sided 95 % bounds of the drop: {100 * (first.low or 0):.1f}"
        in (unsure.sentence)
    )
    assert (
        f"960 rows cannot tell whether that is within the 2 points allowed at 95 % confidence, about {first.rows_needed}"
        in (unsure.sentence)
    )
    assert unsure.sentence.endswith("would; of 2 test sets 1 could not be told, 1 passed.")


def test_the_sentence_of_a_pass_names_the_largest_change() -> None:
    found = ask(months(), floor=0.5, largest=100)
    assert found.answer == "pass"
    assert found.sentence.startswith(
        "2 of 2 earlier test sets passed; the largest change: 'jan' fell by 1.0 points against"
    )
    assert found.sentence.endswith(
        "within the 2 points allowed at 95 % confidence; what else is asked for holds (floor, largest)."
    )
    assert ask(months(lost=(0, 0))).sentence.count("did not change") == 1


def test_the_first_update_has_nothing_to_forget() -> None:
    first = monitor_of({"jan": {0: right(50, 100)}})
    found = ask(first, new="jan", slower=1.5, negative_flips=0.01, max_drop_since_learnt=0.0)
    assert (found.answer, found.checks) == ("pass", ())
    assert (
        found.sentence == "nothing was learnt before 'jan': there is nothing that it could have made the model forget."
    )
    low = ask(first, new="jan", floor=0.9)
    assert low.answer == "fail" and low.sentence == (
        "'jan' scores 50.0 % (one-sided 95 % bounds: 41.4 and 58.6): below the floor of 90 % at 95 % confidence; nothing was learnt "
        "before 'jan'."
    )
    held = ask(first, new="jan", floor=0.2)
    assert (
        held.answer == "pass"
        and "nothing was learnt before 'jan'; the rules hold: 'jan' scores 50.0 %" in held.sentence
    )


@pytest.mark.parametrize("least", [True, False])
@pytest.mark.parametrize(
    ("count", "rows", "limit"), [(42, 60, 0.8), (55, 60, 0.8), (58, 60, 0.8), (3, 400, 0.01), (0, 50, 0.1)]
)
def test_shares_are_held_by_exact_binomials(count: int, rows: int, limit: float, least: bool) -> None:
    (check,) = hold_to("floor", {"a": right(count, rows)}, limit, 0.05, least=least)
    chances = [math.comb(rows, k) * limit**k * (1 - limit) ** (rows - k) for k in range(rows + 1)]
    below, above = sum(chances[: count + 1]), sum(chances[count:])
    bad, good = (below, above) if least else (above, below)
    assert check.p_value == pytest.approx(bad)
    assert check.answer == ("fail" if bad < 0.05 else "pass" if good < 0.05 else "cannot tell")
    low = stats.beta.ppf(0.05, count, rows - count + 1) if count else 0.0
    assert (check.low, check.high) == pytest.approx((low, stats.beta.ppf(0.95, count + 1, rows - count)))


def test_other_scores_take_the_t_test() -> None:
    generator = np.random.default_rng(0)
    scores = generator.normal(-1.0, 0.5, size=50)
    for limit, answer in ((-1.5, "pass"), (-1.0, "cannot tell"), (-0.7, "fail")):
        (check,) = hold_to("floor", {"a": scores}, limit, 0.05, least=True)
        assert check.p_value == pytest.approx(stats.ttest_1samp(scores, limit, alternative="less").pvalue)
        low, high = stats.ttest_1samp(scores, limit).confidence_interval(0.9)
        assert (check.low, check.high) == pytest.approx((low, high)) and check.answer == answer
        (ceiling,) = hold_to("x", {"a": -scores}, -limit, 0.05, least=False)
        assert (ceiling.answer, ceiling.rows_needed) == (answer, check.rows_needed)
        assert ceiling.p_value == pytest.approx(check.p_value)


@pytest.mark.parametrize(("count", "rows", "limit"), [(75, 100, 0.8), (86, 100, 0.8), (48, 50, 0.9), (50, 50, 0.95)])
def test_so_many_rows_would_tell(count: int, rows: int, limit: float) -> None:
    """With the share measured as the truth, the exact test answers on that many rows with about 80 % power."""
    (check,) = hold_to("floor", {"a": right(count, rows)}, limit, 0.05, least=True)
    assert check.answer == "cannot tell" and check.rows_needed is not None and check.rows_needed > rows
    needed, share = check.rows_needed, count / rows
    told = "fail" if share < limit else "pass"
    answers = [hold_to("floor", {"a": right(k, needed)}, limit, 0.05, least=True)[0].answer for k in range(needed + 1)]
    power = sum(stats.binom.pmf(k, needed, share) for k, answer in enumerate(answers) if answer == told)
    assert power > 0.75 and (power < 0.95 or share == 1)


def test_limits_that_cannot_be_broken_or_reached() -> None:
    some, all_right = right(3, 9), right(9, 9)
    assert hold_to("floor", {"a": right(0, 9)}, 0.0, 0.05, least=True)[0].answer == "pass"
    assert hold_to("floor", {"a": some}, -1.0, 0.05, least=True)[0].answer == "pass"
    assert hold_to("floor", {"a": all_right}, 1.5, 0.05, least=True)[0].answer == "fail"
    assert hold_to("flips", {"a": all_right}, 1.0, 0.05, least=False)[0].answer == "pass"
    never = hold_to("floor", {"a": all_right}, 1.0, 0.05, least=True)[0]
    assert (never.answer, never.rows_needed) == ("cannot tell", None)
    assert hold_to("floor", {"a": right(8, 9)}, 1.0, 0.05, least=True)[0].answer == "fail"


def test_floors_are_alarms_of_one_family() -> None:
    low = {"low": right(70, 100)}
    many = low | {f"fine {place}": right(82, 100) for place in range(19)}
    alone, among = (hold_to("floor", given, 0.78, 0.05, least=True)[0] for given in (low, many))
    assert alone.answer == "fail" and among.answer == "cannot tell"
    assert among.p_value == pytest.approx(20 * (alone.p_value or 0.0))


def test_floors_hold_for_the_new_one_and_the_earlier() -> None:
    found = ask(months(), floor=0.7, new_floor=0.85)
    assert {name: check.answer for name, check in of(found, "floor").items()} == dict.fromkeys(
        ("jan", "feb", "mar"), "pass"
    )
    assert {name: check.answer for name, check in of(found, "new_floor").items()} == {"mar": "fail"}
    assert found.answer == "fail" and found.checks[0].rule == "new_floor"
    assert ask(months(), floor=0.87).checks[0].rule == "floor"


def test_negative_flips_count_rows_of_earlier_experiences() -> None:
    monitor = months(lost=(30, 10))
    check = of(ask(monitor, negative_flips=0.03), "negative_flips")[""]
    reference = stats.binomtest(40, 2000, 0.03, alternative="greater")
    assert (check.value, check.rows, check.answer) == (0.02, 2000, "pass")
    assert check.p_value == pytest.approx(reference.pvalue)
    assert ask(monitor, max_drop=0.5, negative_flips=0.01).sentence.startswith(
        "2 % of the 2000 earlier rows were right in the live version and are wrong now (one-sided 95 % bounds: 1.5 and 2.6): more than "
        "the 1 % allowed at 95 % confidence"
    )
    won = monitor_of({"a": {0: right(50, 100), 1: flipped(right(50, 100), 20, 20)}, "b": {1: right(9, 9)}})
    assert of(ask(won, new="b", negative_flips=0.5), "negative_flips")[""].value == 0.2


def test_negative_flips_need_scores_that_are_right_or_wrong() -> None:
    generator = np.random.default_rng(0)
    errors = -generator.random(40)
    given = {"a": {0: errors, 1: errors}, "b": {1: errors}}
    regression = ask(monitor_of(given, "negative squared error"), new="b", max_drop=0.1, negative_flips=0.1)
    assert regression.answer == "cannot tell" and regression.checks[0].rule == "negative_flips"
    assert "was not measured on any row" in regression.sentence
    words = monitor_of(given, "log-likelihood per token")
    for update in (0, 1):
        for index in range(update + 1):
            exact = {"exact match": torch.as_tensor(right(40 - 4 * update, 40))}
            kept = {"log-likelihood per token": torch.as_tensor(errors, dtype=torch.float32)}
            words.record(update, {index: kept | exact})
    assert of(ask(words, new="b", negative_flips=0.3), "negative_flips")[""].value == pytest.approx(0.1)


def test_time_and_size_pass_or_fail() -> None:
    monitor = months()
    assert ask(monitor, medians=(0.010, 0.012), slower=1.3, size=100, largest=100).answer == "pass"
    slow = ask(monitor, medians=(0.010, 0.014), slower=1.3)
    assert slow.answer == "fail" and slow.checks[0].value == pytest.approx(1.4)
    assert slow.sentence.startswith(
        "a prediction takes 1.40 times as long as with the live version: more than the 1.3 times"
    )
    big = ask(monitor, size=2_100_000, largest=2_000_000)
    assert big.answer == "fail" and "the version takes 2.1 MB: more than the 2 MB allowed" in big.sentence
    assert ask(monitor, slower=1.3).answer == "cannot tell"
    assert ask(monitor, medians=(0.01, math.nan), slower=1.3).answer == "fail"


def test_several_rules_that_say_no_are_all_named() -> None:
    found = ask(months(lost=(90, 5)), floor=0.9, largest=1, size=2)
    assert [check.rule for check in found.checks if check.answer == "fail"] == ["max_drop", "floor", "floor", "largest"]
    assert found.sentence.endswith("; of 2 test sets 1 failed, 1 passed; not held either: floor of 'jan', largest.")
    values = [check.value or 0.0 for check in found.checks if check.rule == "floor"]
    assert values == sorted(values)


@pytest.mark.parametrize("where", ["jan", "mar"])
def test_scores_that_are_not_finite_fail(where: str) -> None:
    bad = {"jan": {0: -np.ones(9), 1: -np.ones(9)}, "mar": {1: -np.ones(9)}}
    bad[where][1] = np.where(np.arange(9) < 2, np.nan, -1.0)
    found = ask(monitor_of(bad, "negative squared error"), max_drop=0.5)
    assert found.answer == "fail" and (found.checks[0].rule, found.checks[0].name) == ("finite", where)
    assert found.sentence.startswith(f"22.2 % of the 9 scores of '{where}' are not finite")
    first = ask(monitor_of({"jan": {0: bad[where][1]}}, "negative squared error"), new="jan")
    assert first.answer == "fail" and first.sentence.endswith("are not finite; nothing was learnt before 'jan'.")


def test_what_was_not_measured_does_not_pass() -> None:
    given = {"jan": {0: right(90, 100)}, "feb": {1: right(90, 100)}}
    found = ask(monitor_of(given), new="feb")
    assert found.answer == "cannot tell" and found.checks[0].value is None
    assert found.sentence == "'jan' was not measured on any row."
    empty = {"jan": {0: right(0, 0), 1: right(0, 0)}, "feb": {1: right(90, 100)}}
    assert ask(monitor_of(empty), new="feb", floor=0.5).answer == "cannot tell"


def test_probes_are_held_as_earlier_experiences_are() -> None:
    base, now = right(900, 1000), right(850, 1000)
    monitor = monitor_of({"jan": {0: right(90, 100)}}, probes={"general": {-1: base, 0: now}})
    found = ask(monitor, new="jan", floor=0.1)
    assert found.answer == "fail" and found.checks[0].name == "probe general"
    assert set(of(found, "floor")) == {"jan"}
    gone = monitor_of({"a": {0: base, 1: base}, "b": {1: base}}, probes={"general": {0: base}})
    lost = ask(gone, new="b")
    assert lost.answer == "cannot tell" and lost.sentence.startswith("'probe general' was not measured")


def test_two_experiences_of_one_name_are_refused() -> None:
    monitor = months()
    monitor.register(1, "jan", TensorTable({"row": torch.arange(1000, 2000)}))
    with pytest.raises(StreamError, match="two experiences are called 'jan'"):
        ask(monitor)


def test_a_score_from_before_it_was_learnt_is_no_earlier_experience() -> None:
    monitor = months(lost=(0, 0))
    monitor.record(1, {2: {ACCURACY: torch.ones(1000)}})
    assert "mar" not in of(ask(monitor), "max_drop")


def test_false_alarms_stay_below_the_level() -> None:
    """Six earlier experiences at the very edge of the margin, and floors at the very truth: at most 5 % of updates fail."""
    generator = np.random.default_rng(0)
    runs, alarms = 200, {"max_drop": 0, "floor": 0, "negative_flips": 0}
    for _ in range(runs):
        given = {"new": {6: (generator.random(200) < 0.88).astype(np.float32)}}
        for place in range(6):
            before = (generator.random(200) < 0.9).astype(np.float32)
            chance = generator.random(200)
            lost, won = (before == 1) & (chance < 0.06 / 0.9), (before == 0) & (chance < 0.04 / 0.1)
            given[str(place)] = {place: before, 5: before, 6: np.where(lost, 0, np.where(won, 1, before))}
        monitor = monitor_of({name: given[name] for name in [*map(str, range(6)), "new"]})
        found = ask(monitor, new="new", max_drop=0.02, floor=0.88, negative_flips=0.06)
        for rule in alarms:
            alarms[rule] += any(check.answer == "fail" for check in found.checks if check.rule == rule)
    ceiling = stats.binom.ppf(0.999, runs, 0.05) / runs
    assert all(count / runs <= ceiling for count in alarms.values()), alarms
    assert alarms["max_drop"] > 0, "a test that cannot fail"
