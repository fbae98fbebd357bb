"""The rule file of a store (``rules.yaml``): what an update must hold to, and what is done where it does not."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from continual.errors import SpecError
from continual.spec import Spec, parse, read_yaml

Happened = Literal["promoted", "failed", "cannot tell", "stopped"]
"""What became of an update."""

Finding = Literal[
    "label-shift",
    "covariate-shift",
    "form-shift",
    "unknown-classes",
    "near-duplicates",
    "leakage",
    "disputed-labels",
    "renamed-labels",
]
"""What the comparison of new rows with those at hand may find."""

_PHRASE = re.compile(r"max drop (\d*\.?\d+%?)(?: at (\d*\.?\d+)%)?")
_SIZE = re.compile(r"(\d*\.?\d+)\s*([kmgt]?)i?b?", re.IGNORECASE)
_ATTRIBUTE = re.compile(r" {8}(\w+): (.+)")
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


class GateRules(Spec):
    """When an update may go live.

    Attributes:
        max_drop: largest drop of an earlier experience's mean score against the version that is live, in the unit of the
            score (.02 is two points of accuracy); tested row by row, each experience by itself.
        max_drop_since_learnt: the same against the version that learnt the experience; null asks for nothing.
        confidence: of every answer, in (.5, 1); each comes of a one-sided test, and the bounds beside it are one-sided too.
        floor: least mean score of every experience, the new one among them.
        new_floor: least mean score of the new experience.
        negative_flips: largest share of the rows of earlier experiences that were right in the live version and are wrong now.
        slower: largest ratio of the time of a prediction to that of the live version, measured in turns.
        largest: largest size of the model's state (weights, parts, optimiser) in bytes; ``200MB`` is read as well.
        unsure: what becomes of an update that the rows at hand can neither pass nor fail: ``hold`` keeps the live version,
            ``promote`` goes live.
    """

    max_drop: NonNegativeFloat = 0.02
    max_drop_since_learnt: NonNegativeFloat | None = None
    confidence: float = Field(0.95, gt=0.5, lt=1)
    floor: float | None = None
    new_floor: float | None = None
    negative_flips: float | None = Field(None, ge=0, le=1)
    slower: PositiveFloat | None = None
    largest: PositiveInt | None = None
    unsure: Literal["hold", "promote"] = "hold"

    @field_validator("largest", mode="before")
    @classmethod
    def _bytes(cls, given: Any) -> Any:
        found = _SIZE.fullmatch(given.strip()) if isinstance(given, str) else None
        return given if found is None else round(float(found[1]) * 1000 ** _POWERS[found[2].lower()])


class LadderRules(Spec):
    """What is tried where the gate says no.

    Attributes:
        settings: for each further try the settings of the strategy that change, such as ``{training.lr: 1.0e-4}``; the parts
            stay the same.
        minutes: no try begins after so many minutes of the update; those before it was killed count, up to its last save.
    """

    settings: list[dict[str, Any]] = Field(default_factory=list)
    minutes: PositiveFloat | None = None


class HoldoutRules(Spec):
    """Which of the new rows are never trained on and become the experience's test set, chosen by a hash of the row id.

    Attributes:
        share: of the new rows; more, up to a third of them, so that the gate can still pass where one row was lost (max_drop 0.02
            at 0.95 takes 236 rows for that, and 149 where none is lost; 0.05 takes 93 and 59).
        rows: of one experience, at most.
        total: of all experiences, at most; the sets of all experiences shrink alike, to rows of smallest hash.
        valid: share of the rows that a strategy with early stopping selects on.
    """

    share: float = Field(0.2, gt=0, lt=1)
    rows: PositiveInt = 500
    total: PositiveInt = 20_000
    valid: float = Field(0.1, gt=0, lt=1)


class DriftRules(Spec):
    """How new rows are compared with those at hand.

    Attributes:
        rows: of each side that are looked at, at most.
        level: chance of a false alarm in each kind of finding.
        similar: cosine of two rows' features from which on they count as near-duplicates.
        effect: least size of a shift that is reported: how far the two sides can be told apart, from 0 (not at all) to 1; of a
            label, the share of its new rows that the live version answers with another one, less that of its hold-out rows.
        renamed: share of a new label's rows from which on it is reported as a known class by another name: of those that the live
            version answers with one and the same class, as surely as that class's own hold-out rows.
        stop: findings that stop an update before any training.
    """

    rows: PositiveInt = 1000
    level: float = Field(0.01, gt=0, lt=0.5)
    similar: float = Field(0.98, gt=0, le=1)
    effect: float = Field(0.1, ge=0, lt=1)
    renamed: float = Field(0.8, gt=0.5, le=1)
    stop: list[Finding] = Field(default_factory=list)


class AlertRules(Spec):
    """Who is told, once at least, of what became of an update; each of them must be named with --trust as well.

    Attributes:
        command: program and arguments, started without a shell; the outcome as JSON on its standard input.
        webhook: address that the same JSON is posted to (https, or http on this machine).
        prometheus: file for Prometheus' text collector, below the store unless the path is absolute.
        outcomes: which of them ``command`` and ``webhook`` hear of.
        timeout: seconds that each of them may take.
    """

    command: list[str] | None = Field(default=None, min_length=1)
    webhook: str | None = Field(default=None, pattern=r"^(https://|http://(localhost|127\.0\.0\.1|\[::1\])[:/])")
    prometheus: str | None = None
    outcomes: tuple[Happened, ...] = ("promoted", "failed", "cannot tell", "stopped")
    timeout: PositiveFloat = 10.0

    def any(self) -> bool:
        """Whether anybody is named."""
        return any(one is not None for one in (self.command, self.webhook, self.prometheus))


class Rules(Spec):
    """Everything that a store holds its updates to.

    Attributes:
        save_every: optimiser steps between two points from which a killed update goes on.
    """

    gate: GateRules = GateRules()
    ladder: LadderRules = LadderRules()
    holdout: HoldoutRules = HoldoutRules()
    drift: DriftRules = DriftRules()
    alerts: AlertRules = AlertRules()
    save_every: NonNegativeInt = 50

    @classmethod
    def load(cls, path: Path) -> Rules:
        """The rules of a file.

        Raises:
            SpecError: it cannot be read, or says something that is not allowed.
        """
        return parse(cls, read_yaml(path), f"'{path}'")


def gate_phrase(phrase: str) -> dict[str, float]:
    """``max drop 0.02 at 95%`` as keys of :class:`GateRules`; the drop may be written as ``2%`` too.

    Raises:
        SpecError: another form.
    """
    found = _PHRASE.fullmatch(" ".join(phrase.split()))
    if found is None:
        raise SpecError(
            f"the gate '{phrase}' is not understood: write it as 'max drop 0.02 at 95%', or give a rule file."
        )
    drop = float(found[1].removesuffix("%")) / (100 if found[1].endswith("%") else 1)
    chosen = {"max_drop": drop} if found[2] is None else {"max_drop": drop, "confidence": float(found[2]) / 100}
    parse(GateRules, chosen, f"the gate '{phrase}'")
    return chosen


def explained(rules: Rules) -> str:
    """The rules as YAML, with what every key means beside it, as the docstrings here have it."""
    lines = []
    for name, value in rules:
        if not isinstance(value, Spec):
            lines += [*_comment(_meanings(Rules)[name], ""), f"{name}: {value}"]
            continue
        lines.append(f"{name}:  # {(type(value).__doc__ or '').splitlines()[0]}")
        meanings = _meanings(type(value))
        for key, own in value.model_dump(mode="json").items():
            lines += [
                *_comment(meanings[key], "  "),
                f"  {key}: {yaml.safe_dump(own, default_flow_style=True).splitlines()[0]}",
            ]
    return "\n".join(lines) + "\n"


def _meanings(kind: type[Spec]) -> dict[str, str]:
    """Key → its words in the docstring's list of attributes."""
    found: dict[str, str] = {}
    name = ""
    for line in (kind.__doc__ or "").partition("Attributes:")[2].splitlines():
        head = _ATTRIBUTE.fullmatch(line)
        if head is not None:
            name = head[1]
            found[name] = head[2]
        elif name and line.strip():
            found[name] += f" {line.strip()}"
    return found


def _comment(words: str, indent: str) -> list[str]:
    return textwrap.wrap(words.replace("``", ""), 110, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
