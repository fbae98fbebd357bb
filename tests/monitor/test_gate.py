"""The gate: intervals against slow references, coverage and false alarms by simulation, three answers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import optimize, stats

from continual.monitor.gate import gate, holm, paired_drop, paired_interval, tango_interval


def pair(lost: int, won: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """0/1 scores before and after with so many rows lost and won."""
    before, after = np.zeros(rows, dtype=np.float32), np.zeros(rows, dtype=np.float32)
    before[:lost], after[lost : lost + won] = 1, 1
    before[lost + won :] = after[lost + won :] = 1
    return before, after


def slow_tango_statistic(lost: int, won: int, rows: int, delta: float) -> float:
    """The score statistic with the constrained maximum found by search instead of the quadratic formula."""

    def minus_log_likelihood(share: float) -> float:
        same = 1 - 2 * share - delta
        return -sum(
            n * math.log(max(p, 1e-300)) for n, p in ((won, share), (lost, share + delta), (rows - lost - won, same))
        )

    low, high = max(0.0, -delta), (1 - delta) / 2
    best = optimize.minimize_scalar(
        minus_log_likelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-12}
    ).x
    return (lost - won - rows * delta) / math.sqrt(rows * (2 * best + delta - delta**2))


@pytest.mark.parametrize(("lost", "won", "rows"), [(9, 4, 100), (30, 10, 200), (1, 0, 50), (0, 6, 80), (25, 25, 60)])
def test_tango_interval_solves_its_equation(lost: int, won: int, rows: int) -> None:
    z = stats.norm.ppf(0.975)
    low, high = tango_interval(lost, won, rows, 0.025)
    assert low < (lost - won) / rows < high
    assert slow_tango_statistic(lost, won, rows, low) == pytest.approx(z, rel=1e-3)
    assert slow_tango_statistic(lost, won, rows, high) == pytest.approx(-z, rel=1e-3)


def test_tango_interval_at_its_ends() -> None:
    """Without a change it has a closed form; exchanging before and after turns it round."""
    z = stats.norm.ppf(0.975)
    low, high = tango_interval(0, 0, 100, 0.025)
    assert high == pytest.approx(z**2 / (100 + z**2), rel=1e-6) and low == pytest.approx(-high)
    assert tango_interval(3, 1, 44, 0.025) == pytest.approx(
        tuple(-x for x in reversed(tango_interval(1, 3, 44, 0.025)))
    )
    assert tango_interval(10, 0, 10, 0.025)[1] == 1.0 and tango_interval(0, 10, 10, 0.025)[0] == -1.0


def test_at_no_margin_it_is_mcnemars_test() -> None:
    before, after = pair(20, 9, 300)
    expected = stats.norm.sf((20 - 9) / math.sqrt(20 + 9))
    assert paired_drop(before, after).p_value == pytest.approx(expected)


@pytest.mark.parametrize(("drop", "churn", "rows"), [(0.0, 0.02, 100), (0.03, 0.02, 200), (0.05, 0.005, 60)])
def test_interval_covers_the_true_drop(drop: float, churn: float, rows: int) -> None:
    generator = np.random.default_rng(0)
    tables = generator.multinomial(rows, [churn + drop, churn, 1 - 2 * churn - drop], size=1000)
    ends = [tango_interval(int(lost), int(won), rows, 0.05) for lost, won, _ in tables]
    covered = np.mean([low <= drop <= high for low, high in ends])
    assert 0.87 < covered <= 0.97


@pytest.mark.parametrize("rows", [30, 53, 58, 59, 100])
@pytest.mark.parametrize("margin", [0.02, 0.05])
def test_no_change_passes_where_so_many_right_rows_tell_it_exactly(rows: int, margin: float) -> None:
    """A true drop of the margin leaves all rows right with the chance (1 - margin) ** rows."""
    verdict = paired_drop(*pair(0, 0, rows), margin=margin, level=0.05)
    assert (verdict.verdict == "pass") == ((1 - margin) ** rows < 0.05)


@pytest.mark.parametrize(
    ("lost", "won", "rows"), [(0, 0, 40), (3, 0, 80), (0, 3, 80), (6, 2, 50), (2, 6, 50), (7, 7, 40)]
)
def test_the_interval_is_the_wider_of_two(lost: int, won: int, rows: int) -> None:
    low, high = paired_interval(lost, won, rows, 0.05)
    tango, net = tango_interval(lost, won, rows, 0.05), stats.binomtest(abs(lost - won), rows).proportion_ci(0.9)
    exact = (net.low, net.high) if lost > won else (-net.high, -net.low) if lost < won else (-net.high, net.high)
    assert (low, high) == pytest.approx((min(tango[0], exact[0]), max(tango[1], exact[1])))
    assert paired_interval(won, lost, rows, 0.05) == pytest.approx((-high, -low))


@pytest.mark.parametrize(("rows", "margin"), [(53, 0.05), (100, 0.02), (120, 0.05)])
def test_the_chance_of_a_wrong_answer_at_the_margin(rows: int, margin: float) -> None:
    """Over all tables, for a true drop of exactly the margin and several shares of rows won."""
    chances = {"pass": 0.0, "fail": 0.0}
    tables = [(lost, won) for lost in range(31) for won in range(min(31, rows - lost))]
    answers = [paired_drop(*pair(lost, won, rows), margin=margin, level=0.05).verdict for lost, won in tables]
    for share in (0.0, 0.005, 0.02, 0.05):
        table = stats.multinomial(rows, [share + margin, share, 1 - 2 * share - margin])
        chance = table.pmf([(lost, won, rows - lost - won) for lost, won in tables])
        for answer in chances:
            found = float(sum(p for p, said in zip(chance, answers, strict=True) if said == answer))
            chances[answer] = max(chances[answer], found)
    assert chances["pass"] < 0.053 and chances["fail"] < 0.066


def test_other_scores_take_the_paired_t_test() -> None:
    generator = np.random.default_rng(0)
    before = generator.normal(size=40)
    after = before - 0.2 + generator.normal(size=40) * 0.3
    verdict = paired_drop(before, after, margin=0.05)
    reference = stats.ttest_1samp(before - after, 0.05, alternative="greater")
    low, high = stats.ttest_rel(before, after).confidence_interval(0.9)
    assert verdict.p_value == pytest.approx(reference.pvalue)
    assert (verdict.low, verdict.high) == pytest.approx((low, high))


def test_three_answers() -> None:
    assert paired_drop(*pair(60, 5, 500), margin=0.02).verdict == "fail"
    passed = paired_drop(*pair(5, 5, 1000), margin=0.02)
    assert passed.verdict == "pass" and passed.rows_needed is None
    unsure = paired_drop(*pair(2, 2, 60), margin=0.02)
    assert unsure.verdict == "cannot tell" and unsure.rows_needed is not None and unsure.rows_needed > 60


@pytest.mark.parametrize(("lost", "won", "rows", "margin"), [(4, 3, 100, 0.03), (8, 3, 100, 0.01)])
def test_rows_needed_would_settle_it(lost: int, won: int, rows: int, margin: float) -> None:
    unsure = paired_drop(*pair(lost, won, rows), margin=margin)
    assert unsure.verdict == "cannot tell" and unsure.rows_needed is not None
    times = math.ceil(unsure.rows_needed / rows)
    settled = paired_drop(*pair(lost * times, won * times, rows * times), margin=margin)
    assert settled.verdict == ("fail" if (lost - won) / rows > margin else "pass")


@pytest.mark.parametrize("binary", [True, False])
def test_too_little_to_compare_cannot_tell(binary: bool) -> None:
    verdict = paired_drop(np.zeros(0), np.zeros(0))
    assert verdict.verdict == "cannot tell" and verdict.drop is verdict.low is verdict.rows_needed is None
    one = paired_drop(np.array([1.0 if binary else 0.7]), np.array([0.0 if binary else 0.2]))
    assert one.verdict == "cannot tell" and one.rows == 1


def test_scores_that_never_changed() -> None:
    same = np.linspace(0.1, 0.9, 20)
    assert paired_drop(same, same, margin=0.01).verdict == "pass"
    assert paired_drop(same, same).verdict == "cannot tell"
    assert paired_drop(same, same - 0.5).verdict == "fail"


def test_scores_that_ceased_to_be_finite_fail() -> None:
    good, bad = np.linspace(0.1, 0.9, 20), np.full(20, 0.5)
    bad[3] = np.nan
    for verdict in (paired_drop(good, bad, margin=0.5), *gate({"a": (good, bad)})):
        assert verdict.verdict == "fail" and verdict.drop is None
        json.dumps(verdict.to_dict(), allow_nan=False)
    never = paired_drop(bad, bad)
    assert never.verdict == "cannot tell" and never.p_value == 1.0
    assert paired_drop(bad, good).verdict == "cannot tell"


def test_holm_as_by_hand() -> None:
    np.testing.assert_allclose(holm(np.array([0.04, 0.01, 0.03, 0.9])), [0.09, 0.04, 0.09, 0.9])
    assert len(holm(np.array([]))) == 0


def test_gate_puts_the_worst_first_and_corrects_alarms() -> None:
    close = pair(12, 3, 300)
    assert paired_drop(*close, level=0.05).verdict == "fail"
    pairs = {"fine": pair(2, 40, 900), "close": close, "bad": pair(100, 5, 300)}
    names = [verdict.name for verdict in gate(pairs, margin=0.0)]
    assert names == ["bad", "close", "fine"]
    many = {f"same {place}": pair(5, 5, 300) for place in range(30)} | {"close": close}
    verdicts = {verdict.name: verdict for verdict in gate(many)}
    assert verdicts["close"].verdict == "cannot tell"
    assert verdicts["close"].p_value == pytest.approx(31 * paired_drop(*close).p_value)
    assert verdicts["close"].rows_needed is not None and verdicts["close"].rows_needed > 300
    json.dumps([verdict.to_dict() for verdict in gate(pairs)], allow_nan=False)


def test_false_alarms_of_a_whole_family_stay_below_the_level() -> None:
    generator = np.random.default_rng(0)
    alarms = 0
    for _ in range(400):
        tables = generator.multinomial(150, [0.04, 0.04, 0.92], size=8)
        pairs = {str(place): pair(int(lost), int(won), 150) for place, (lost, won, _) in enumerate(tables)}
        alarms += gate(pairs, level=0.05)[0].verdict == "fail"
    assert alarms / 400 < 0.08


def test_no_test_set_gives_no_verdict() -> None:
    assert gate({}) == []
