"""What a store is made with, and what of it cannot be, before anything is made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import NonNegativeInt

from continual.errors import CompositionError, SpecError
from continual.kinds import Objective, Scenario
from continual.models.spec import MLPSpec, ModelSpec, ModuleSpec, PretrainedSpec
from continual.refresh.folder import Columns
from continual.refresh.rules import Rules, explained
from continual.spec import Spec

if TYPE_CHECKING:
    from continual.strategy import Strategy

TEXT_MODEL = "a model of text, such as sentence-transformers/all-MiniLM-L6-v2"


class Asked(Spec):
    """What a store is made with, as far as nothing else checks it."""

    seed: NonNegativeInt
    scenario: Scenario
    objective: Objective


def check_columns(columns: Columns) -> None:
    """Raise :class:`SpecError` where texts and features are both named, or a column is two things."""
    given = columns.model_dump(exclude_none=True)
    text = next((name for name in ("text", "prompt", "completion", "messages") if name in given), None)
    if columns.features and text is not None:
        raise SpecError(f"the columns: both 'features' and '{text}' are named: name one of them.")
    met: dict[str, str] = {}
    for what, value in given.items():
        for name in value if isinstance(value, list) else [value]:
            if name in met:
                raise SpecError(
                    f"the columns: '{name}' is named for '{met[name]}' and for '{what}': name each column once."
                )
            met[name] = what


def check_model(spec: ModelSpec, base: str | None) -> None:
    """Raise where what the model is named by is not there; a name of the hub is only looked for when it is needed."""
    from continual.models.build import module_class
    from continual.models.hub import is_path, resolve

    if isinstance(spec, ModuleSpec):
        module_class(spec)
    if isinstance(spec, PretrainedSpec) and base is None and is_path(spec.name):
        resolve(spec.name)


def check_rows(spec: ModelSpec, strategy: Strategy, columns: Columns, objective: Objective) -> None:
    """Raise where the model cannot read such rows, or not with this strategy, which the first update would find out."""
    text = next((one for one in (columns.text, columns.prompt, columns.messages) if one is not None), None)
    if isinstance(spec, PretrainedSpec) and columns.features:
        raise SpecError(
            "a transformer reads text and the columns name 'features': name a column of text, or take 'mlp'."
        )
    if not isinstance(spec, MLPSpec):
        return
    tokens = [part.name for part in strategy.prototypes if part.needs_tokens]
    if objective not in ("classification", "regression"):
        raise SpecError(f"an mlp cannot be trained for {objective}: name a language model of Hugging Face.")
    if tokens:
        raise CompositionError(
            f"{tokens[0]} puts virtual tokens before those of a row, and an mlp reads none: name a transformer of Hugging Face as "
            "the model, or take adapter kind 'lora'."
        )
    if text is not None:
        raise SpecError(f"an mlp reads numbers and '{text}' is text: name {TEXT_MODEL}, or 'features'.")


def rule_text(rules: Any, checked: Rules) -> str:
    """What ``rules.yaml`` says: the file as it was given, comments and all, or every rule."""
    if isinstance(rules, str | Path):
        return Path(rules).read_text(encoding="utf-8")
    return explained(checked)
