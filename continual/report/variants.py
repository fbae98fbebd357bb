"""Runs that bear the name of one strategy and were not made alike, told apart by what they differ in.

Two runs are alike when their strategies, their models and the weights of their base models are. Settings that the
version of one run did not have count at their defaults.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from continual.errors import ContinualError
from continual.report.load import Result

SHOWN = 3
"""Differences that a name tells; more are counted."""

Flat = dict[str, Any]


def variants(runs: Sequence[Result]) -> tuple[dict[str, list[Result]], tuple[str, ...]]:
    """Name → runs that are alike, for the runs of one strategy; and the settings in which they differ, if they do.

    A name is the strategy's own where all are alike, else with what sets these runs apart:
    ``rehearsal (training.epochs=8)``.
    """
    name = runs[0].strategy
    if len({_quick(run) for run in runs}) == 1:
        return {name: list(runs)}, ()
    told = all(run.provenance.settings is not None for run in runs)
    kinds: list[tuple[Flat, list[Result]]] = []
    for run in runs:
        made = _made_of(run, told)
        alike = next((group for known, group in kinds if known == made), None)
        if alike is None:
            kinds.append((made, [run]))
        else:
            alike.append(run)
    if len(kinds) == 1:
        return {name: list(runs)}, ()
    differences = _differences([made for made, _ in kinds])
    keys = tuple(dict.fromkeys(key for found in differences for key in found))
    labels = [_label(name, found) for found in differences]
    found: dict[str, list[Result]] = {}
    for label, difference, (_, group) in zip(labels, differences, kinds, strict=True):
        whole = label if labels.count(label) == 1 else _label(name, difference, len(difference))
        found[whole] = group
    return found, keys


def _quick(run: Result) -> str:
    """Equal for runs that are alike without a doubt."""
    origin = run.provenance
    return json.dumps([origin.strategy_fingerprint, origin.base_model_sha256, origin.model], sort_keys=True)


def _made_of(run: Result, told: bool) -> Flat:
    """What decides a run's figures beside stream and seed, by dotted key."""
    origin = run.provenance
    base, model = origin.base_model_sha256, _whole_model(origin.model or {})
    content: dict[str, Any] = {"model": model if base is None else {k: v for k, v in model.items() if k != "name"}}
    content["base_model_sha256"] = base and base[:12]
    if told:
        content |= _completed(origin.settings or {})
    else:
        content["strategy_fingerprint"] = (origin.strategy_fingerprint or "unknown")[:12]
    return _flat(content)


def _completed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a strategy with the defaults of those that were added since.

    They stay as they are where that is not known, or where it could only be known from code that they name.
    """
    from continual.strategy import Strategy
    from continual.trust import wishes

    try:
        whole = dict(settings) if wishes(settings) else Strategy.load(settings).to_dict()
    except (ContinualError, TypeError):
        whole = dict(settings)
    return {key: value for key, value in whole.items() if key not in ("summary", "source", "tuned")}


def _whole_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a model with the defaults of those that were added since, where it is one of ours."""
    from continual.models.spec import KINDS
    from continual.spec import parse

    try:
        return {**parse(KINDS[str(model.get("kind"))], dict(model), "the model").model_dump(mode="json"), **model}
    except (ContinualError, KeyError):
        return dict(model)


def _flat(content: Mapping[str, Any], above: str = "") -> Flat:
    found: Flat = {}
    for key, value in content.items():
        inside = (
            dict(enumerate(value)) if isinstance(value, list) and any(isinstance(v, dict) for v in value) else value
        )
        if isinstance(inside, dict) and inside:
            found |= _flat({str(name): one for name, one in inside.items()}, f"{above}{key}.")
        else:
            found[f"{above}{key}"] = value
    return found


def _differences(made: Sequence[Flat]) -> list[dict[str, str]]:
    """For each kind of run the settings that set it apart; a part that others lack is named by its kind."""
    found: list[dict[str, str]] = [{} for _ in made]
    slots = dict.fromkeys(key.partition(".")[0] for flat in made for key in flat)
    for slot in slots:
        inside = [{key: value for key, value in flat.items() if key.partition(".")[0] == slot} for flat in made]
        if not all(inside):
            for one, own in zip(found, inside, strict=True):
                kinds = [str(value) for key, value in own.items() if key.rpartition(".")[2] == "kind"]
                one[slot] = "+".join(kinds) or _text(own.get(slot))
        having = [own for own in inside if own]
        keys = dict.fromkeys(key for own in having for key in own)
        differing = [key for key in keys if any(own.get(key) != having[0].get(key) for own in having)]
        for one, own in zip(found, inside, strict=True):
            one.update({key: _text(own.get(key)) for key in differing if own})
    return found


def _label(name: str, differences: Mapping[str, str], shown: int = SHOWN) -> str:
    pairs = [f"{key}={value}" for key, value in differences.items()]
    more = [f"{len(pairs) - shown} more"] if len(pairs) > shown else []
    return f"{name} ({', '.join([*pairs[:shown], *more])})"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
