"""What the gate found, in words for people who get an e-mail about it."""

from __future__ import annotations

from collections.abc import Sequence

from continual.monitor.gate import Answer
from continual.refresh.records import Check

MINUS = "−"
TESTED = ("max_drop", "max_drop_since_learnt", "floor", "new_floor", "negative_flips")
"""Rules whose answer comes from a test on rows, and holds at a confidence."""
DROPS = ("max_drop", "max_drop_since_learnt")
_AGAINST = {"max_drop": "against the live version", "max_drop_since_learnt": "since it was learnt"}
_COUNTED = {"fail": "failed", "cannot tell": "could not be told", "pass": "passed"}


def judgement_sentence(checks: Sequence[Check], new: str, earlier: int, percent: bool, confidence: float) -> str:
    """Why the gate answers as it does.

    Args:
        checks: the worst first.
        new: name of the experience that the update learnt.
        earlier: how many experiences and probes were measured before the update.
        percent: whether scores are shares, shown in per cent.
        confidence: of the answers, each of a one-sided test, and of each bound beside them.
    """
    nothing = f"nothing was learnt before '{new}'"
    if not checks:
        return f"{nothing}: there is nothing that it could have made the model forget."
    worst = checks[0]
    found = describe(worst, percent, confidence)
    if worst.answer != "pass":
        return "; ".join([found, *_beside(checks, worst), *([] if earlier else [nothing])]) + "."
    if worst.rule not in DROPS:
        return f"{nothing}; the rules hold: {found}."
    same = sum(check.rule == worst.rule for check in checks)
    others = _names(checks, "pass", worst.rule)
    held = f"{same} of {same} earlier test sets passed" if same > 1 else "the only earlier test set passed"
    most = "the largest change: " if same > 1 else ""
    return f"{held}; {most}{found}" + (f"; what else is asked for holds ({', '.join(others)})." if others else ".")


def describe(check: Check, percent: bool, confidence: float) -> str:
    """What was found of one check and what the rule says to it; no full stop."""
    found = _found(check, percent, confidence) + _against_limit(check, percent)
    if check.rule in TESTED and check.value is not None:
        found += f" at {_share(confidence)} confidence"
    if check.answer == "cannot tell" and check.rows_needed:
        found += f", about {check.rows_needed} would"
    return found


def _found(check: Check, percent: bool, confidence: float) -> str:
    who, value = _who(check.name), check.value
    if check.rule == "finite":
        return f"{_share(value or 0.0)} of the {check.rows} scores of {who} are not finite"
    if value is None:
        return f"{who} {'has scores that are not finite' if check.answer == 'fail' else 'was not measured on any row'}"
    ends = _interval(check, percent, confidence)
    if check.rule in DROPS:
        return f"{who} {_moved(value, percent)} {_AGAINST[check.rule]}{ends}"
    if check.rule in ("floor", "new_floor"):
        return f"{who} scores {_score(value, percent)}{ends}"
    if check.rule == "negative_flips":
        return (
            f"{_share(value)} of the {check.rows} earlier rows were right in the live version and are wrong now{ends}"
        )
    if check.rule == "slower":
        return f"a prediction takes {value:.2f} times as long as with the live version"
    return f"the version takes {_bytes(value)}"


def _against_limit(check: Check, percent: bool) -> str:
    if check.rule == "finite" or check.value is None:
        return ""
    within, beyond = ("above", "below") if check.rule in ("floor", "new_floor") else ("within", "more than")
    limit = _limit(check, percent)
    if check.answer == "cannot tell":
        rows = "1 row" if check.rows == 1 else f"{check.rows} rows"
        return f": {rows} cannot tell whether that is {within} {limit}"
    return f": {within if check.answer == 'pass' else beyond} {limit}"


def _limit(check: Check, percent: bool) -> str:
    if check.rule in ("floor", "new_floor"):
        return f"the floor of {f'{100 * check.limit:g} %' if percent else _plain(f'{check.limit:g}')}"
    if check.rule == "slower":
        return f"the {check.limit:g} times allowed"
    if check.rule == "largest":
        return f"the {_bytes(check.limit)} allowed"
    if check.rule == "negative_flips":
        return f"the {100 * check.limit:g} % allowed"
    return f"the {100 * check.limit:g} points allowed" if percent else f"the {check.limit:g} allowed"


def _beside(checks: Sequence[Check], worst: Check) -> list[str]:
    """How the other test sets of the worst check's rule stand, and which other rules say no or cannot be told."""
    found = []
    same = [check for check in checks if check.rule == worst.rule]
    if len(same) > 1:
        answers: tuple[Answer, ...] = ("fail", "cannot tell", "pass")
        counts = [(sum(check.answer == answer for check in same), _COUNTED[answer]) for answer in answers]
        parts = [f"{count} {word}" for count, word in counts if count]
        found.append(f"of {len(same)} test sets {', '.join(parts)}")
        needed = [check.rows_needed for check in same if check.answer == "cannot tell" and check.rows_needed]
        if worst.answer == "cannot tell" and len(needed) > 1:
            found.append(f"at most {max(needed)} rows of each would tell")
    for answer, words in (("fail", "not held either"), ("cannot tell", "not told either")):
        others = _names(checks, answer, worst.rule)
        if others:
            found.append(f"{words}: {', '.join(others)}")
    return found


def _names(checks: Sequence[Check], answer: str, besides: str) -> list[str]:
    """Rules other than one that have a check with this answer, each once, with the first experience it is about."""
    found: dict[str, str] = {}
    for check in checks:
        if check.answer == answer and check.rule != besides:
            found.setdefault(check.rule, f"{check.rule} of {_who(check.name)}" if check.name else check.rule)
    return [name if answer != "pass" else rule for rule, name in found.items()]


def _who(name: str) -> str:
    return f"'{name}'" if name else "the earlier experiences"


def _moved(drop: float, percent: bool) -> str:
    size = f"{100 * abs(drop):.1f} points" if percent else f"{abs(drop):.3f}"
    if float(size.split()[0]) == 0:
        return "did not change"
    return f"{'fell' if drop > 0 else 'rose'} by {size}"


def _interval(check: Check, percent: bool, confidence: float) -> str:
    if check.low is None or check.high is None:
        return ""
    share = check.rule == "negative_flips"
    low, high = (_plain(f"{100 * end:.1f}" if percent or share else f"{end:.3f}") for end in (check.low, check.high))
    of = " of the drop" if check.rule in DROPS else ""
    return f" (one-sided {_share(confidence)} bounds{of}: {low} and {high})"


def _score(value: float, percent: bool) -> str:
    return f"{100 * value:.1f} %" if percent else _plain(f"{value:.3f}")


def _share(value: float) -> str:
    return f"{100 * value:.3g} %"


def _bytes(value: float) -> str:
    size, units = value, ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.4g} {units[0]}"


def _plain(number: str) -> str:
    return number.replace("-", MINUS)


def in_numbers(check: Check, percent: bool) -> str:
    """Value, bounds and limit of a check, such as ``6.4 (4.1 to 8.9) points, limit 2``; a dash where it has no value."""
    value, low, high, limit = check.value, check.low, check.high, check.limit
    if value is None:
        return "–"
    if check.rule == "largest":
        return f"{_bytes(value)}, limit {_bytes(limit)}"
    shares = percent or check.rule in ("negative_flips", "finite")
    factor, digits = (100.0, 1) if shares and check.rule != "slower" else (1.0, 3)
    unit = "" if factor == 1.0 else " points" if check.rule in DROPS else " %"
    ends = "" if low is None or high is None else f" ({factor * low:.{digits}f} to {factor * high:.{digits}f})"
    return _plain(f"{factor * value:.{digits}f}{ends}{unit}, limit {factor * limit:g}")
