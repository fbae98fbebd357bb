"""The table of a paper: one booktabs table for each stream, with what is told apart from the best marked."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy.special import stdtrit

from continual.report.aggregate import Estimate, StrategySummary, StreamSummary, aggregate
from continual.report.findings import best_of
from continual.report.load import Result
from continual.report.markdown import SHOWN
from continual.report.numbers import MINUS, NONE, Scale
from continual.report.significance import LEVEL, Comparison, compare, with_best

_ESCAPES = {
    "\\": r"\textbackslash{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def latex_tables(results: Sequence[Result]) -> str:
    """A ``table`` for each stream, best first: mean ± half of the 95 % interval over seeds.

    The best final score is bold; those that are not significantly lower are underlined; what could not be tested against
    it bears a dagger; what is lower on the rows of these seeds, too few to speak of others, a double one. Needs the package
    booktabs.
    """
    tables = [_table(stream) for stream in aggregate(results)]
    return "% needs \\usepackage{booktabs}\n\n" + "\n\n".join(tables) + ("\n" if tables else "")


def _table(stream: StreamSummary) -> str:
    scale, best = Scale.of(stream), best_of(stream)
    comparisons = with_best(stream, compare(stream))
    heads = ["strategy", "seeds"]
    for metric, name in SHOWN.items():
        unit = scale.column_unit(metric)
        heads.append(f"{escaped(scale.title.lower() if metric == 'accuracy' else name)} ({escaped(unit)})")
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_caption(stream, best, comparisons)}}}",
        rf"\begin{{tabular}}{{lr{'r' * len(SHOWN)}}}",
        r"\toprule",
        " & ".join(heads) + r" \\",
        r"\midrule",
    ]
    for one in stream.strategies:
        cells = [_number(scale, one.metrics[metric], metric) for metric in SHOWN]
        cells[0] = _marked(cells[0], one, best, comparisons)
        lines.append(" & ".join([rf"\texttt{{{escaped(one.strategy)}}}", str(len(one.runs)), *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"])


def _caption(stream: StreamSummary, best: StrategySummary | None, comparisons: dict[str, Comparison]) -> str:
    several = any(len(one.runs) > 1 for one in stream.strategies)
    single = any(found and found.over == "rows" for one in stream.strategies for found in one.metrics.values())
    parts = [f"{escaped(stream.stream)}: {len(stream.experiences)} experiences, {stream.scenario}-incremental."]
    parts += [r"Mean $\pm$ half of the 95\,\% interval over seeds (Student's $t$)."] if several else []
    parts += [r"In brackets: 95\,\% interval over test rows, one seed."] if single else []
    if best is not None and comparisons:
        tests = {"seeds": "paired $t$ test over seeds", "rows": "McNemar's test over test rows"}
        used = [tests[over] for over in tests if any(one.over == over for one in comparisons.values())]
        parts.append(r"Bold: best.")
        if used:
            level = f"{LEVEL:g}".lstrip("0")
            parts.append(
                f"Underlined: not significantly different from the best ({', or '.join(used)}, Holm, {level} over all pairs)."
            )
        if any(one.verdict == "different" and one.over == "rows" for one in comparisons.values()):
            parts.append(r"$\ddagger$: lower on the test rows of these seeds, which are too few to speak of others.")
        if any(one.verdict == "not testable" for one in comparisons.values()):
            needed = max((one.t_seeds_needed or 0 for one in comparisons.values()), default=0)
            more = f"; it takes {needed} seeds" if needed else ""
            parts.append(rf"$\dagger$: not testable against the best{more}.")
    return " ".join(parts)


def _marked(cell: str, one: StrategySummary, best: StrategySummary | None, comparisons: dict[str, Comparison]) -> str:
    if one is best:
        return rf"\textbf{{{cell}}}"
    found = comparisons.get(one.strategy)
    if found is None or one.bound:
        return cell
    lower = cell if found.over == "seeds" else rf"{cell}$^\ddagger$"
    marks = {"not told apart": rf"\underline{{{cell}}}", "not testable": rf"{cell}$^\dagger$", "different": lower}
    return marks[found.verdict]


def _number(scale: Scale, found: Estimate | None, metric: str) -> str:
    value = _text(scale.text(found.mean if found else None, metric, sign=metric == "bwt"))
    if found is None or found.over is None or found.low is None or found.high is None:
        return value
    if found.over == "rows" or found.std is None:
        low, high = (_text(scale.text(end, metric, sign=metric == "bwt")) for end in (found.low, found.high))
        return f"{value} [{low}, {high}]"
    half = float(stdtrit(found.count - 1, 0.975)) * found.std / math.sqrt(found.count)
    return rf"{value} $\pm$ {_text(scale.text(half, metric))}"


def _text(number: str) -> str:
    if number == NONE:
        return "--"
    return f"${number.replace(MINUS, '-')}$" if number[:1] in (MINUS, "+") else number


def escaped(text: str) -> str:
    """``text`` with what LaTeX reads as a command made plain."""
    return "".join(_ESCAPES.get(sign, sign) for sign in text).replace(MINUS, "$-$").replace("²", "$^2$")
