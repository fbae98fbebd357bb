"""What a rule file may ask for: tries that fit the strategy, and nothing run, told or written that nobody has named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from continual.errors import SpecError, StateError, quoted
from continual.refresh.rules import Rules
from continual.strategy import Strategy
from continual.trust import wishes


def check_ladder(strategy: Strategy, rules: Rules) -> None:
    """Raise :class:`SpecError` where a further try has a setting that there is not, or other parts."""
    for changed in rules.ladder.settings:
        tried = Strategy.load(strategy, overrides=changed)
        if _parts(tried) != _parts(strategy):
            raise SpecError(
                f"the rules: the try {changed} has the parts {quoted(_parts(tried)[0])}, and the strategy has "
                f"{quoted(_parts(strategy)[0])}: a try may change what a part does, and not which parts there are."
            )


def asked_by(rules: Rules, store: Path) -> set[str]:
    """What the rules of a store name that must not be used on the word of a folder alone.

    Code and folders of the tries; the program and the web hook that are told; the Prometheus file, where it is not in the store.
    """
    asked: set[str] = set()
    for changed in rules.ladder.settings:
        for key, value in changed.items():
            asked |= wishes({key.rpartition(".")[2]: value})
    alerts = rules.alerts
    asked |= {*(alerts.command or ())[:1], *([] if alerts.webhook is None else [alerts.webhook])}
    if alerts.prometheus is not None and not (store / alerts.prometheus).resolve().is_relative_to(store.resolve()):
        asked.add(alerts.prometheus)
    return asked


def check_rules(rules: Rules, store: Path, trust: set[str]) -> None:
    """Raise :class:`StateError` where the rules ask for anything that nobody has named."""
    asked = sorted(asked_by(rules, store) - trust)
    if asked:
        raise StateError(
            f"the rules of '{store}' ask to use {quoted(asked)}, and a folder must not decide what is run, told or written: if you "
            f"know it, name it, --trust NAME, or Store(folder, trust={asked})."
        )


def _parts(strategy: Strategy) -> tuple[Any, ...]:
    return sorted(part.name for part in strategy.make_parts()), strategy.data, strategy.backbone
