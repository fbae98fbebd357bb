"""The model card of an export: ``README.md`` with the front matter of the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from continual.refresh.records import Check, Data, Judgement, Measured

SHARES = ("accuracy", "exact match")
"""Scores that are shares of rows, which a card gives in per cent."""
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+")


@dataclass(frozen=True)
class Card:
    """What a card says of a model, beside what the model itself says.

    Attributes:
        title: of the card.
        measured: each experience and probe as it was measured in this version.
        score: name of that score, higher is better.
        judgement: of the gate; None where there was none.
        version, created: of the store; ISO 8601.
        data: the rows of every update; names and fingerprints of them are shown, no row.
        base_model, base_sha256: name or folder of the pretrained base, and the SHA-256 of its weights.
        strategy, summary, source: name of the strategy, what it is, and where it comes from.
        code: versions of what it was made with, by package.
    """

    title: str
    measured: Sequence[Measured] = ()
    score: str = "accuracy"
    judgement: Judgement | None = None
    version: int | None = None
    created: str = ""
    data: Sequence[Data] = ()
    base_model: str | None = None
    base_sha256: str | None = None
    strategy: str = ""
    summary: str = ""
    source: str = ""
    code: Mapping[str, Any] = field(default_factory=dict)


def render_card(card: Card, told: Mapping[str, Any], code: str, files: Mapping[str, str], names: Sequence[str]) -> str:
    """The text of ``README.md``.

    Args:
        told: the content of ``inference.json``.
        code: the snippet.
        files: name of each file → what it holds.
        names: of the classes, by their ids.
    """
    percent = card.score in SHARES
    rows = [
        [
            one.name + (" (probe)" if one.probe else ""),
            str(one.rows),
            _figure(one.score, percent),
            "–"
            if one.low is None or one.high is None
            else f"{_figure(one.low, percent)} to {_figure(one.high, percent)}",
            _figure(one.learnt, percent),
            "–" if one.score is None or one.learnt is None else _figure(one.score - one.learnt, percent, sign=True),
        ]
        for one in card.measured
    ]
    unit = " %" if percent else ""
    heads = ["experience", "rows", f"{card.score}{unit}", "two-sided 95 % interval", "when learnt", "change"]
    checks = [] if card.judgement is None else [_check(one) for one in card.judgement.checks]
    data = [
        [
            PurePath(one.path.replace("\\", "/")).name or one.path,
            str(one.offered),
            str(one.trained),
            str(one.holdout),
            one.fingerprint,
        ]
        for one in card.data
    ]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["plain"] = plain
    return environment.get_template("card.md.j2").render(
        card=card,
        told=told,
        front=yaml.safe_dump(_front(card, told), sort_keys=False, allow_unicode=True),
        kind=_kind(told, names),
        base=_shown_base(card.base_model),
        on_hub=bool(told["base_model"]) and _on_hub(told["base_model"]),
        retention=_table(heads, rows, left=1) if rows else "",
        checks=_table(["rule", "of", "measured", "one-sided bounds", "limit", "answer"], checks, left=2)
        if checks
        else "",
        data=_table(["rows from", "offered", "trained", "held out", "fingerprint (SHA-256)"], data, left=1)
        if data
        else "",
        code=code,
        files=files,
        made="; ".join(f"{name} {value}" for name, value in sorted(card.code.items()) if isinstance(value, str)),
    )


def plain(text: object) -> str:
    """Text on one line that Markdown takes for nothing else."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(str(text).split()))


def _front(card: Card, told: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if card.base_model and _on_hub(card.base_model):
        found["base_model"] = card.base_model
        found["base_model_relation"] = "adapter" if told["adapters"] else "finetune"
    transformer = told["form"] in ("features", "language", "transformer")
    found["library_name"] = "peft" if told["adapters"] else "transformers" if transformer else "pytorch"
    tags = {"classification": "text-classification", "causal-lm": "text-generation"}
    if transformer and told["objective"] in tags:
        found["pipeline_tag"] = tags[told["objective"]]
    lora = told["adapters"] and not told["virtual"]
    found["tags"] = ["continual-learning", *([card.strategy] if card.strategy else []), *(["lora"] if lora else [])]
    return found


def _on_hub(name: str) -> bool:
    return not Path(name).expanduser().exists() and _HUB_NAME.fullmatch(name) is not None


def _shown_base(name: str | None) -> str:
    if not name:
        return ""
    return f"`{name}`" if _on_hub(name) else f"a local folder called `{Path(name).name}`"


def _kind(told: Mapping[str, Any], names: Sequence[str]) -> str:
    objective = told["objective"]
    if objective == "classification":
        shown = ", ".join(plain(name) for name in names[:12]) + (
            f" and {len(names) - 12} more" if len(names) > 12 else ""
        )
        return f"A classifier of {len(names)} classes ({shown})"
    return {"regression": "A regression", "causal-lm": "A language model"}.get(
        objective, "A sequence-to-sequence model"
    )


def _check(one: Check) -> list[str]:
    interval = "–" if one.low is None or one.high is None else f"{_number(one.low)} to {_number(one.high)}"
    return [one.rule, one.name or "the whole", _number(one.value), interval, _number(one.limit), one.answer]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}".replace("-", "−")


def _figure(value: float | None, percent: bool, *, sign: bool = False) -> str:
    if value is None:
        return "–"
    digits = 1 if percent else 3
    rounded = round(value * (100 if percent else 1), digits) + 0.0
    return f"{rounded:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def _table(heads: list[str], rows: list[list[str]], *, left: int) -> str:
    rule = ["---" if place < left else "--:" for place in range(len(heads))]
    cells = [heads, *([plain(cell) for cell in row] for row in rows)]
    lines = ["| " + " | ".join(row) + " |" for row in [cells[0], rule, *cells[1:]]]
    return "\n".join(lines)
