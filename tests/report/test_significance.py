"""Pairs of strategies: tests beside slow ones and those of scipy, what is not testable, and how it is shown."""

from __future__ import annotations

import csv
import io
import math
import re
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import stats
from test_cli import continual

from continual.errors import StateError
from continual.report import latex_tables, load_results, render_page, write_tables
from continual.report.aggregate import StreamSummary, aggregate
from continual.report.latex import escaped
from continual.report.rows import final_scores
from continual.report.significance import (
    FEW,
    Comparison,
    clustered_mcnemar,
    compare,
    csv_significance,
    paired_t,
    seeds_needed,
    signed_rank,
    with_best,
)

ROWS = (40, 20)
"""Test rows of the two experiences."""


@pytest.fixture
def study(make: Any, tmp_path: Path) -> Any:
    """Writes runs with the scores of their rows; ``rates`` gives each strategy its chances of a right answer."""

    def write(rates: dict[str, float], seeds: int, shared: bool = True, without: tuple[str, ...] = ()) -> StreamSummary:
        for strategy, rate in rates.items():
            for seed in range(seeds):
                # the same rows are hard for all strategies and seeds
                hard = np.random.default_rng(0).random(sum(ROWS))
                luck = np.random.default_rng([seed, *map(ord, strategy)]).normal(0, 0.02)
                noise = np.random.default_rng([9, seed, *map(ord, strategy)]).random(sum(ROWS)) * 0.2
                right = (hard + noise < rate + luck + 0.1).astype(np.float32)
                parts = np.split(right, [ROWS[0]])
                last = [float(part.mean()) for part in parts]
                folder = make(strategy, seed, [[1.0, None], last])
                found: dict[str, torch.Tensor] = {}
                for place, part in enumerate(parts):
                    ids = torch.arange(ROWS[place]) + 100 * place + (0 if shared else 1000 * seed)
                    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
                    found[f"{place}/rows"] = ids[order].contiguous()
                    found[f"{place}/1/accuracy"] = torch.from_numpy(part)[order].contiguous()
                    found[f"{place}/0/accuracy"] = torch.zeros(len(ids))
                if strategy not in without:
                    save_file(found, folder / "scores.safetensors")
        (summary,) = aggregate(load_results([tmp_path]))
        return summary

    return write


@pytest.mark.parametrize("seed", range(5))
def test_the_t_test_is_scipys(seed: int) -> None:
    generator = np.random.default_rng(seed)
    one, other = generator.random(6), generator.random(6)
    assert paired_t(one - other) == pytest.approx(float(stats.ttest_rel(one, other).pvalue))


def test_when_there_is_no_t_test() -> None:
    assert paired_t(np.array([0.1, 0.2])) is None
    assert paired_t(np.array([0.1, 0.1, 0.1])) is None
    assert paired_t(np.array([0.1, math.nan, 0.1])) is None
    assert paired_t(np.zeros(4)) == 1.0


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_signed_rank_test_counts_every_sign(seed: int, ties: bool) -> None:
    difference = np.random.default_rng(seed).normal(0.3, 1.0, 9)
    if ties:
        difference = np.round(difference, 0)
    apart = difference[difference != 0]
    ranks = stats.rankdata(np.abs(apart))
    smaller = min(ranks[apart > 0].sum(), ranks[apart < 0].sum())
    sums = [
        sum(rank for rank, sign in zip(ranks, signs, strict=True) if sign)
        for signs in product((0, 1), repeat=len(apart))
    ]
    wanted = min(1.0, 2 * sum(value <= smaller + 1e-9 for value in sums) / len(sums))
    assert signed_rank(difference) == pytest.approx(wanted)
    if not ties:
        assert signed_rank(difference) == pytest.approx(float(stats.wilcoxon(difference, method="exact").pvalue))


def test_equal_pairs_are_left_out_of_the_signed_rank_test() -> None:
    assert signed_rank(np.zeros(5)) is None
    assert signed_rank(np.array([0.0, 1.0, 2.0, 3.0])) == signed_rank(np.array([1.0, 2.0, 3.0])) == 0.25


@pytest.mark.parametrize("pairs", [1, 3, 10, 45])
def test_so_many_seeds_and_no_fewer_does_wilcoxons_test_need(pairs: int) -> None:
    needed = seeds_needed(pairs)
    best, short = (signed_rank(np.arange(1.0, n + 1)) for n in (needed, needed - 1))
    assert best is not None and short is not None and best * pairs <= 0.05 < short * pairs


def test_one_seed_is_mcnemars_test() -> None:
    difference = np.repeat([1.0, -1.0, 0.0], [30, 12, 100]) / 142
    assert clustered_mcnemar(difference) == pytest.approx(float(stats.chi2.sf((30 - 12) ** 2 / (30 + 12), 1)))
    few = np.repeat([1.0, -1.0, 0.0], [6, 1, 50])
    assert clustered_mcnemar(few) == pytest.approx(float(stats.binomtest(1, 7).pvalue))
    assert clustered_mcnemar(np.zeros(10)) == 1.0


def test_few_rows_that_differ_are_counted_flip_by_flip() -> None:
    difference = np.random.default_rng(3).normal(0.5, 1.0, FEW)
    total = abs(difference.sum())
    sums = [abs(sum(s * d for s, d in zip(signs, difference, strict=True))) for signs in product((-1, 1), repeat=FEW)]
    assert clustered_mcnemar(difference) == pytest.approx(np.mean([value >= total - 1e-12 for value in sums]))


def slow_rows(stream: StreamSummary, one: str, other: str) -> dict[int, float]:
    """d of each row id, a seed, an experience and a row at a time."""
    runs = {(run.strategy, run.seed): run for strategy in stream.strategies for run in strategy.runs}
    seeds = sorted({seed for name, seed in runs if name == one} & {seed for name, seed in runs if name == other})
    found: dict[int, float] = {}
    for seed in seeds:
        for place in range(2):
            left, right = (_final(runs[name, seed], place) for name in (one, other))
            for row, score in left.items():
                weight = 1 / (len(seeds) * 2 * len(left))
                found[row] = found.get(row, 0.0) + weight * (score - right[row])
    return found


def _final(run: Any, place: int) -> dict[int, float]:
    from safetensors.torch import load_file

    tensors = load_file(run.folder / "scores.safetensors")
    return dict(zip(tensors[f"{place}/rows"].tolist(), tensors[f"{place}/1/accuracy"].tolist(), strict=True))


@pytest.mark.parametrize("shared", [True, False])
def test_rows_of_several_seeds_are_clusters(study: Any, shared: bool) -> None:
    stream = study({"good": 0.8, "fair": 0.6}, 4, shared)
    (found,) = compare(stream)
    d = slow_rows(stream, found.one, found.other)
    assert found.rows == len(d) == sum(ROWS) * (1 if shared else 4)
    values = np.array(list(d.values()))
    assert found.difference == pytest.approx(values.sum())
    assert found.rows_p == pytest.approx(clustered_mcnemar(values))
    bootstrap = np.random.default_rng(0)
    drawn = [values[bootstrap.integers(len(values), size=len(values))].sum() for _ in range(4000)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    assert found.rows_low == pytest.approx(low, abs=0.02) and found.rows_high == pytest.approx(high, abs=0.02)


def test_the_same_answers_under_more_seeds_are_no_more_evidence() -> None:
    """Taken as rows of their own, ten seeds with the same answers would make any difference significant."""
    once = np.where(np.arange(60) < 20, 1.0, -1.0)[:35]
    assert clustered_mcnemar(once / 35) == pytest.approx(clustered_mcnemar(once))
    naive = clustered_mcnemar(np.tile(once, 10))
    assert naive < 0.05 < clustered_mcnemar(once)


def test_every_pair_with_holms_correction(study: Any) -> None:
    stream = study({"good": 0.8, "fair": 0.7, "poor": 0.3}, 5)
    found = compare(stream)
    assert [(one.one, one.other) for one in found] == [("good", "fair"), ("good", "poor"), ("fair", "poor")]
    for name in ("t", "rows"):
        raw = sorted((getattr(one, f"{name}_p"), getattr(one, f"{name}_holm")) for one in found)
        running = 0.0
        for place, (p_value, corrected) in enumerate(raw):
            running = max(running, min(1.0, p_value * (3 - place)))
            assert corrected == pytest.approx(running)
    assert all(one.wilcoxon_p is None and one.wilcoxon_seeds_needed == seeds_needed(3) == 7 for one in found)
    assert (
        found[1].verdict == "different" and found[1].over == "seeds" and found[1].low is not None and found[1].low > 0
    )


def test_wilcoxon_where_there_are_seeds_enough(study: Any) -> None:
    (found,) = compare(study({"good": 0.8, "poor": 0.3}, 6))
    assert found.wilcoxon_seeds_needed is None and found.wilcoxon_p == found.wilcoxon_holm == pytest.approx(2 / 2**6)


def test_too_few_seeds_and_missing_scores(study: Any) -> None:
    stream = study({"good": 0.8, "poor": 0.3, "mute": 0.5}, 2, without=("mute",))
    found = {(one.one, one.other): one for one in compare(stream)}
    told, mute = found["good", "poor"], found["good", "mute"]
    assert told.t_p is None and told.t_seeds_needed == 3 and told.rows_p is not None and told.over == "rows"
    assert told.verdict == "different" and told.low is not None
    assert mute.rows_p is None and mute.rows == 0 and mute.verdict == "not testable" and mute.over is None
    lines = list(csv.DictReader(io.StringIO(csv_significance([stream]))))
    assert len(lines) == 3 and lines[0]["t_seeds_needed"] == "3" and lines[0]["t_p"] == ""
    assert float(lines[0]["difference"]) == found[lines[0]["one"], lines[0]["other"]].difference
    assert {line["verdict"] for line in lines} == {"different", "not testable"}
    page = render_page([run for one in stream.strategies for run in one.runs], "t")
    assert "not testable: 2 of 3 seeds" in page and "yes, over rows of these seeds" in page
    text = latex_tables([run for one in stream.strategies for run in one.runs])
    assert r"$^\ddagger$" in text and "too few to speak of others" in text


def test_other_test_rows_are_not_compared(study: Any) -> None:
    stream = study({"good": 0.8, "poor": 0.3}, 1)
    run = next(one for one in stream.strategies if one.strategy == "poor").runs[0]
    assert run.folder is not None
    from safetensors.torch import load_file

    tensors = load_file(run.folder / "scores.safetensors")
    tensors["0/rows"] = tensors["0/rows"] + 1
    save_file(tensors, run.folder / "scores.safetensors")
    (found,) = compare(stream)
    assert found.rows_p is None and found.verdict == "not testable"
    del tensors["1/1/accuracy"]
    save_file(tensors, run.folder / "scores.safetensors")
    assert final_scores(run) is None
    (run.folder / "scores.safetensors").write_bytes(b"nothing")
    with pytest.raises(StateError, match="is damaged"):
        compare(stream)


def test_the_final_score_is_the_weighted_sum_of_the_rows(study: Any) -> None:
    for one in study({"good": 0.8}, 2).strategies[0].runs:
        found = final_scores(one)
        assert found is not None and (np.diff(found.rows) > 0).all()
        assert float(found.weights @ found.scores) == pytest.approx(one.metrics.accuracy)


def columns(line: str) -> list[str]:
    return [cell.strip() for cell in line.removesuffix(r"\\").split("&")]


def test_the_latex_table(study: Any) -> None:
    stream = study({"good_one": 0.8, "nearly": 0.795, "poor": 0.3, "joint": 0.9}, 5)
    results = [run for one in stream.strategies for run in one.runs]
    text = latex_tables(results)
    lines = [line for line in text.splitlines() if line.startswith(r"\texttt")]
    cells = {columns(line)[0]: columns(line) for line in lines}
    assert len(lines) == 4 and all(len(line) == 7 for line in cells.values())
    assert text.count("{") == text.count("}") and text.count("$") % 2 == 0 and "−" not in text and "–" not in text
    assert all(mark in text for mark in (r"\toprule", r"\midrule", r"\bottomrule", r"\end{tabular}", r"\end{table}"))
    own = next(one for one in stream.strategies if one.strategy == "good_one").metrics["accuracy"]
    assert own is not None and own.std is not None
    half = float(stats.t.ppf(0.975, 4)) * own.std / math.sqrt(5)
    assert cells[r"\texttt{good\_one}"][2] == rf"\textbf{{{100 * own.mean:.1f} $\pm$ {100 * half:.1f}}}"
    assert cells[r"\texttt{nearly}"][2].startswith(r"\underline{")
    assert "underline" not in cells[r"\texttt{poor}"][2] and "textbf" not in cells[r"\texttt{poor}"][2]
    assert "underline" not in cells[r"\texttt{joint}"][2] and "paired $t$ test over seeds" in text


def test_latex_with_one_seed(study: Any) -> None:
    stream = study({"good": 0.8, "mute": 0.79}, 1, without=("mute",))
    text = latex_tables([run for one in stream.strategies for run in one.runs])
    assert r"$^\dagger$" in text and "it takes 3 seeds" in text and r"\pm" not in text
    assert re.search(r"\d\d\.\d \[\d\d\.\d, \d\d\.\d\]", text)


@pytest.mark.parametrize(
    ("plain", "made"),
    [("a_b & 5%", r"a\_b \& 5\%"), ("{x}^~\\", r"\{x\}\textasciicircum{}\textasciitilde{}\textbackslash{}")],
)
def test_what_latex_would_read_as_a_command(plain: str, made: str) -> None:
    assert escaped(plain) == made


def test_the_page_shows_who_is_told_apart_from_the_best(study: Any) -> None:
    stream = study({"good": 0.8, "nearly": 0.795, "poor": 0.3}, 5)
    page = render_page([run for one in stream.strategies for run in one.runs], "t")
    (table,) = re.findall(r'aria-label="significance on digits">(.*?)</table>', page, flags=re.DOTALL)
    rows = {
        row[0]: row
        for row in re.findall(
            r'<th scope="row">(\w+)</th><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td>', table
        )
    }
    found = with_best(stream, compare(stream))
    best = next(one.strategy for one in stream.strategies)
    assert rows.keys() == found.keys() == {"good", "nearly", "poor"} - {best}
    assert rows["poor"][4] == "yes, over seeds" and rows["poor"][1].startswith("+")
    other = next(name for name in rows if name != "poor")
    assert rows[other][4] == "no, over seeds"


def test_the_sign_of_the_lead_when_a_bound_is_above(study: Any) -> None:
    stream = study({"good": 0.6, "joint": 0.95}, 3)
    page = render_page([run for one in stream.strategies for run in one.runs], "t")
    (row,) = re.findall(r'<th scope="row">joint</th><td>(.*?)<span class="small">(.*?)</span>', page)
    one = with_best(stream, compare(stream))["joint"]
    assert isinstance(one, Comparison) and one.one == "joint" and one.difference is not None and one.difference > 0
    assert row[0] == f"−{100 * one.difference:.1f}" and row[1].startswith("−")


def test_the_tables_beside_a_page(study: Any, tmp_path: Path) -> None:
    stream = study({"good": 0.8, "poor": 0.3}, 2)
    results = [run for one in stream.strategies for run in one.runs]
    paths = write_tables(results, tmp_path / "t")
    assert [path.name for path in paths] == ["results.csv", "significance.csv", "report.tex"]
    again = {path.name: path.read_bytes() for path in paths}
    write_tables(results[::-1], tmp_path / "t")
    assert {path.name: path.read_bytes() for path in paths} == again
    (tmp_path / "o").mkdir()
    for more in ([], ["--tables"]):
        done = continual("report", str(tmp_path / "digits"), "-o", str(tmp_path / "o" / "p.html"), *more)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "o" / "p.tex").is_file() == bool(more) == (tmp_path / "o" / "p-significance.csv").is_file()
