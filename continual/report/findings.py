"""What the figures say, in computed sentences: the best strategy, its lead, the bound above, plain training below."""

from __future__ import annotations

from continual.report.aggregate import Estimate, StrategySummary, StreamSummary, difference
from continual.report.numbers import MINUS, Scale

FORGETTING_NOTE = (
    "Forgetting takes the best of several noisy measurements and is therefore biased upwards: with no forgetting at "
    "all it reads about 4 points at 5 tasks of 100 test rows. Judge by BWT and by paired drops."
)


def headline(stream: StreamSummary) -> str:
    """One sentence: the best strategy that is not a bound, its score, and the gap to joint training if that was run."""
    scale = Scale.of(stream)
    best = best_of(stream)
    if best is None:
        return f"No strategy on {stream.stream} has a final {stream.score}."
    found = best.metrics["accuracy"]
    assert found is not None
    updates = len(best.matrix)
    opening = f"Best is {best.strategy}:" if len(_rivals(stream)) > 1 else f"{best.strategy} ends at"
    sentence = (
        f"{opening} {scale.text(found.mean)}{scale.unit} {stream.score} on {stream.stream} "
        f"after {updates} update{'' if updates == 1 else 's'}{_certainty(scale, found)}"
    )
    joint = next((one for one in stream.strategies if one.joint and one is not best and one.metrics["accuracy"]), None)
    if joint is not None and (reference := joint.metrics["accuracy"]) is not None:
        gap = difference(joint, best)
        width = gap.mean if gap is not None else reference.mean - found.mean
        side = "below" if width >= 0 else "above"
        sentence += f", {_points(scale, abs(width))} {side} joint training on all rows at once"
    return sentence + "."


def findings(stream: StreamSummary) -> list[str]:
    """What else a reader should know: what plain training loses, and whether the lead over the second is certain."""
    scale, best = Scale.of(stream), best_of(stream)
    sentences = []
    naive = next((one for one in stream.strategies if one.naive and one.metrics["accuracy"]), None)
    if naive is not None and (left := naive.metrics["accuracy"]) is not None:
        lost = naive.metrics["forgetting"]
        forgets = f" and forgets {_points(scale, lost.mean)} of what it had learnt" if lost else ""
        sentences.append(
            f"With nothing against forgetting, {naive.strategy} ends at {scale.text(left.mean)}{scale.unit}{forgets}."
        )
    rivals = [one for one in _rivals(stream) if one is not best]
    if naive is None and rivals and (left := rivals[-1].metrics["accuracy"]) is not None:
        lost = rivals[-1].metrics["forgetting"]
        forgets = f" and forgets {_points(scale, lost.mean)}" if lost else ""
        sentences.append(f"Last is {rivals[-1].strategy}: it ends at {scale.text(left.mean)}{scale.unit}{forgets}.")
    if best is not None and rivals:
        sentences.append(_lead(scale, best, rivals[0]))
    return sentences


def best_of(stream: StreamSummary) -> StrategySummary | None:
    """The strategy with the best final score among those that are not bounds; a bound where there is nothing else."""
    rivals = _rivals(stream)
    scored = [one for one in stream.strategies if one.metrics["accuracy"]]
    return rivals[0] if rivals else scored[0] if scored else None


def _rivals(stream: StreamSummary) -> list[StrategySummary]:
    return [one for one in stream.strategies if not one.bound and one.metrics["accuracy"]]


def _lead(scale: Scale, best: StrategySummary, second: StrategySummary) -> str:
    lead = difference(best, second)
    if lead is None:
        return f"{best.strategy} and {second.strategy} share no seed, so the lead of the one has no interval."
    width = _points(scale, lead.mean)
    if lead.over != "seeds" or lead.low is None or lead.high is None:
        return (
            f"{best.strategy} leads {second.strategy} by {width} with one seed; what another seed would change is not "
            "known, so run more seeds before ranking the two."
        )
    reach = f"95 % interval {scale.interval(lead, sign=True)} over {lead.count} shared seeds"
    if lead.low > 0:
        return f"The lead of {best.strategy} over {second.strategy} is {width} ({reach})."
    return (
        f"{best.strategy} leads {second.strategy} by {width}, but the {reach} includes zero, so the order of the two "
        "is not certain."
    )


def _certainty(scale: Scale, found: Estimate) -> str:
    if found.over is None:
        return " (one seed)"
    what = f"{found.count} seeds" if found.over == "seeds" else "test rows, one seed"
    return f" (95 % interval {scale.interval(found)} over {what})"


def _points(scale: Scale, value: float) -> str:
    text = scale.text(value)
    return f"{text} point{'' if text in ('1.0', MINUS + '1.0') else 's'}" if scale.percent else text
