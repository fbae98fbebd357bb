"""What the comparison of new rows with those at hand found, in sentences for an engineer: what, how large, what to do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from continual.refresh.copies import Near
from continual.refresh.form import Change
from continual.refresh.labels import Dispute, Disputes, Likeness
from continual.refresh.records import Found
from continual.refresh.rules import DriftRules, Finding
from continual.refresh.shifts import Shift

NAMES = 20
"""Names that a finding lists."""
_SPELT_OUT = 3


@dataclass(frozen=True)
class Bar:
    """What a shift must clear.

    Attributes:
        level: its p-value is smaller.
        effect: its size is as large or larger.
    """

    level: float
    effect: float

    def cleared(self, effect: float, p_value: float) -> bool:
        return p_value < self.level and effect >= self.effect

    def said(self, effect: float, p_value: float) -> str:
        return f"size {effect:.2f} of 1, reported from {self.effect:g} on; {_p(p_value)}, reported below {self.level:g}"


def leakage(ids: Sequence[str], rows: int) -> Found:
    """``ids``: of the new rows concerned."""
    hits = len(ids)
    return Found(
        kind="leakage",
        sentence=(
            f"{hits} of the {rows} new rows ({percent(hits / rows)}) have the very content of a hold-out row: the update trains "
            "on none of them, or the score of the hold-out would be that of rows that were learnt; find out how they came into the "
            "new rows."
        ),
        effect=hits / rows,
        rows=hits,
        names=tuple(ids[:NAMES]),
    )


def unknown_classes(hits: int, rows: int, counts: Sequence[tuple[str, int]]) -> Found:
    """``counts``: name and rows of each new class, the largest first."""
    listed = _some(f"'{name}' ({_rows(count)})" for name, count in counts)
    return Found(
        kind="unknown-classes",
        sentence=(
            f"{hits} of the {rows} new rows ({percent(hits / rows)}) are of {_classes(len(counts))} not known before: "
            f"{listed}. Nothing is to be done where new classes are meant; "
            "otherwise mend the labels."
        ),
        effect=hits / rows,
        rows=hits,
        names=tuple(name for name, _ in counts[:NAMES]),
    )


def near_duplicates(near: Near, rows: int, at_hand: int, similar: float, level: float, ids: Sequence[str]) -> Found:
    return Found(
        kind="near-duplicates",
        sentence=(
            f"{percent(near.share)} of the {rows} new rows that were looked at are near-duplicates (cosine of {similar:g} or more) "
            f"of one of {at_hand} rows at hand, which have {percent(near.usual)} of them among each other ({_p(near.p_value)}, "
            f"reported below {level:g}): find out whether rows were sent again; scores on hold-outs that they resemble flatter."
        ),
        effect=near.share,
        p_value=near.p_value,
        rows=len(ids),
        names=tuple(ids[:NAMES]),
    )


def disputed_labels(found: Disputes, named: Sequence[Dispute], names: Sequence[str], bar: Bar) -> Found:
    """``named``: the classes that clear the bar by themselves; where there are none, all of them do together."""
    classes = named or [one for one in found.classes if one.wrong]
    listed = _some(
        f"rows labelled '{names[one.label]}' look like '{names[one.answer]}' ({one.times} of {one.rows}"
        + (f", and {one.wrong - one.times} like others" if one.wrong > one.times else "")
        + f"; of its hold-out rows {one.held_wrong} of {one.held} look like another class)"
        for one in classes
    )
    effect, p_value = (named[0].effect, named[0].p_value) if named else (found.effect, found.p_value)
    opening = "to the live version, " + ("" if named else "rows of many labels look like other classes, most of all: ")
    return Found(
        kind="disputed-labels",
        sentence=(
            f"{opening}{listed} ({bar.said(effect, p_value)}). Read some of these rows: labels that are swapped or mistaken "
            "would be learnt, and rows that have changed would teach the class anew."
        ),
        effect=max(effect, 0.0),
        p_value=p_value,
        rows=sum(one.wrong for one in classes),
        names=tuple(names[one.label] for one in classes[:NAMES]),
    )


def renamed_labels(alike: Sequence[Likeness], names: Sequence[str], rules: DriftRules) -> Found:
    """``alike``: new labels whose rows look like a known class, the most alike first."""
    listed = _some(
        f"'{names[one.label]}' looks like the known '{names[one.answer]}' ({one.times} of {one.rows} rows)"
        for one in alike
    )
    first = alike[0]
    return Found(
        kind="renamed-labels",
        sentence=(
            f"to the live version, the new label {listed}, as surely as hold-out rows of that class itself (reported from "
            f"{percent(rules.renamed)} of the rows on; {_p(first.p_value)}, reported below {rules.level:g}): if it is that class by "
            f"another name, write the known one, or two outputs compete for the same rows; if not, --new-label says so."
        ),
        effect=first.times / first.rows,
        p_value=first.p_value,
        rows=sum(one.times for one in alike),
        names=tuple(names[one.label] for one in alike[:NAMES]),
    )


def label_shift(shift: Shift, names: Sequence[str], bar: Bar) -> Found:
    listed = [
        f"'{names[place]}' is {percent(new)} of the new rows and was {percent(old)}"
        for place, new, old in zip(shift.classes, *shift.shares, strict=True)
    ]
    return Found(
        kind="label-shift",
        sentence=(
            f"the shares of {_classes(len(listed))} that are on both sides have shifted: {_some(listed)} "
            f"({bar.said(shift.effect, shift.p_value)}). If the world has not changed so, see how the rows were sampled or labelled."
        ),
        effect=shift.effect,
        p_value=shift.p_value,
        rows=shift.rows,
        names=tuple(names[place] for place in shift.classes[:NAMES]),
    )


def covariate_shift(shift: Shift, names: Sequence[str] | None, bar: Bar) -> Found:
    """``names`` of the classes; None where there are none."""
    called = [] if names is None else [names[place] for place in shift.classes]
    most = _some(f"'{name}'" for name in called)
    of = f" of the same {_classes(len(called))}, most of all of {most}," if called else ""
    return Found(
        kind="covariate-shift",
        sentence=(
            f"new rows can be told from rows at hand{of} by their features ({bar.said(shift.effect, shift.p_value)}; the size is "
            f"2 AUC - 1 on rows that the classifier did not see). Read some of both: if the source, the wording or the meaning "
            "of a label has changed, the hold-outs no longer stand for what comes."
        ),
        effect=shift.effect,
        p_value=shift.p_value,
        rows=shift.rows,
        names=tuple(called[:NAMES]),
    )


def form_shift(found: Sequence[Change], bar: Bar) -> Found:
    """``found``: the columns that clear the bar, the largest change first."""
    advice = "See how these rows were collected, cut or converted before the model learns from them."
    return _columns("form-shift", "the form of the rows has changed", found, bar, advice)


def target_shift(found: Sequence[Change], bar: Bar) -> Found:
    """The same for the labels of a regression."""
    advice = "If the world has not changed so, see to the unit and the sampling of the labels."
    return _columns("label-shift", "the labels have shifted", found, bar, advice)


def percent(share: float) -> str:
    """``12 %``, ``0.4 %``, ``0 %``."""
    value = 100 * share
    return f"{value:.0f} %" if value >= 10 or value == 0 else f"{value:.1f} %" if value >= 0.05 else "less than 0.1 %"


def _columns(kind: Finding, opening: str, found: Sequence[Change], bar: Bar, advice: str) -> Found:
    first, of_each = found[0], {change.column: change for change in reversed(found)}
    columns = [change for change in found if of_each[change.column] is change]
    measured = f"; chance is measured by how {first.topics} classes at hand differ" if first.topics else ""
    return Found(
        kind=kind,
        sentence=(
            f"{opening}: {_some(map(_change, columns), '; ')} ({bar.said(first.effect, first.p_value)}{measured}). {advice}"
        ),
        effect=first.effect,
        p_value=first.p_value,
        rows=first.rows,
        names=tuple(change.column for change in columns[:NAMES]),
    )


def _change(change: Change) -> str:
    new, old = change.new, change.old
    if change.column == "length":
        longer = f"{new / old:.1f} times as long" if old and abs(new / old - 1) >= 0.05 else "of other lengths"
        return f"rows are {longer} ({new:.1f} tokens on average against {old:.1f})"
    if change.column == "unknown tokens":
        return f"{percent(new)} unknown tokens against {percent(old)}"
    if change.column == "word pieces":
        return f"{percent(new)} of the tokens go on a word against {percent(old)}"
    if change.column == "word order":
        return f"{percent(new)} of neighbouring tokens stand in their usual order against {percent(old)}"
    return (
        f"{change.column} has mean {new:.3g} and standard deviation {change.new_spread:.3g} against {old:.3g} and "
        f"{change.old_spread:.3g}"
    )


def _some(said: Iterable[str], between: str = ", ") -> str:
    """The first few, and how many more there are."""
    listed = list(said)
    more = len(listed) - _SPELT_OUT
    return between.join(listed[:_SPELT_OUT]) + (f" and {more} more" if more > 0 else "")


def _classes(count: int) -> str:
    return "1 class" if count == 1 else f"{count} classes"


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def _p(p_value: float) -> str:
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.2g}"
