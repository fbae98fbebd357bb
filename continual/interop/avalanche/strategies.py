"""Which strategies and plugins Avalanche has, the arguments that they take, and where they cannot work.

Imported after :func:`continual.foreign.imported` only.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import avalanche.training.plugins
import avalanche.training.supervised
from avalanche.training.plugins import SupervisedPlugin
from avalanche.training.templates import SupervisedTemplate

from continual.errors import CompositionError, SpecError, unknown
from continual.kinds import Scenario
from continual.spec import load_object

OURS = {
    "model": "the model of the run",
    "slda_model": "the model of the run",
    "feature_extractor": "the model of the run",
    "classifier": "the head of the run",
    "input_size": "the size of the model's features",
    "num_classes": "the number of the stream's classes",
    "optimizer": "training.optimizer, lr, momentum and weight_decay",
    "criterion": "cross-entropy",
    "train_mb_size": "training.batch_size",
    "train_epochs": "training.epochs or training.iterations",
    "eval_mb_size": "the learner",
    "device": "the device of the run",
    "plugins": "engine.plugins",
    "evaluator": "our monitor",
    "eval_every": "our monitor",
    "peval_mode": "our monitor",
}
"""Arguments that are filled in, and what with."""
FEATURES = {"slda_model", "feature_extractor", "classifier", "input_size"}
"""Arguments that need a model with features and a head."""
DEFAULTS: dict[str, dict[str, Any]] = {"ICaRL": {"buffer_transform": None, "fixed_memory": True}}
"""Values of arguments for which Avalanche has no default and which nobody needs to think of."""
REFUSED: dict[tuple[str, Scenario], str] = {
    (
        "DER",
        "task",
    ): "it calls the model without task labels when it stores logits: take it in the scenarios 'class' and "
    "'domain', or our 'der' in all three",
    (
        "ICaRL",
        "domain",
    ): "its loss takes classes that come again for old ones: take it in the scenarios 'class' and 'task'",
}
NOTES: dict[tuple[str, Scenario], str] = {
    (
        "MIR",
        "domain",
    ): "it replays no class that was in the last batch of an experience, which here are mostly all of them, so "
    "little or nothing was replayed",
}


def strategy_class(name: str) -> type[Any]:
    """Avalanche's strategy of that name, or the one behind ``package.module:Class``.

    Raises:
        SpecError: there is none, or it is no supervised strategy.
    """
    if ":" in name:
        own = load_object(name, "engine, strategy")
        if not (isinstance(own, type) and issubclass(own, SupervisedTemplate)):
            raise SpecError(
                f"engine: '{name}' is no strategy: derive it from avalanche.training.templates.SupervisedTemplate."
            )
        return own
    known = _classes(avalanche.training.supervised, SupervisedTemplate)
    if name not in known:
        raise SpecError(f"engine: {unknown('strategy', name, known)}")
    return known[name]


def plugin_class(name: str) -> type[Any]:
    """Avalanche's plugin of that name.

    Raises:
        SpecError: there is none.
    """
    known = _classes(avalanche.training.plugins, SupervisedPlugin)
    if name not in known:
        raise SpecError(f"engine: {unknown('plugin', name, known)}")
    return known[name]


def check_arguments(found: type[Any], given: Mapping[str, Any], *, gives_features: bool = True) -> None:
    """Raise where a strategy or plugin lacks an argument, is given one that it does not take, or one that is ours to give.

    Raises:
        SpecError: such an argument.
        CompositionError: the strategy needs features, and the model gives logits itself.
    """
    names = parameters(found)
    strategy = issubclass(found, SupervisedTemplate)
    for name in given:
        if strategy and name in OURS:
            raise SpecError(f"engine, {found.__name__}: '{name}' is given by {OURS[name]}: leave the argument out.")
        if name not in names:
            allowed = [known for known in names if not (strategy and known in OURS)]
            raise SpecError(f"engine, {found.__name__}: {unknown('argument', name, allowed)}")
    filled = {*given, *(OURS if strategy else ()), *DEFAULTS.get(found.__name__, {})}
    lacking = [name for name, p in names.items() if p.default is p.empty and name not in filled]
    if lacking:
        raise SpecError(f"engine, {found.__name__}: the argument '{lacking[0]}' is missing: add it under 'arguments'.")
    if strategy and not gives_features and FEATURES & names.keys():
        raise CompositionError(
            f"Avalanche's {found.__name__} works on features, and this model gives logits itself: take 'mlp' or a model with a "
            "head."
        )
    if found.__name__ in ("GEM", "GEMPlugin") and find_spec("quadprog") is None:
        raise SpecError(
            "Avalanche's GEM solves its quadratic programs with quadprog, which is not installed here: pip install "
            "'continual-memory[avalanche]'."
        )


def check_scenario(name: str, scenario: Scenario) -> None:
    """Raise :class:`CompositionError` where a strategy cannot work in the scenario."""
    why = REFUSED.get((name, scenario))
    if why is not None:
        raise CompositionError(f"Avalanche's {name} cannot be trained in the scenario '{scenario}': {why}.")


def parameters(found: type[Any]) -> dict[str, inspect.Parameter]:
    """The named parameters of its constructor; one that passes the model and all the rest on has those of its base as well."""
    signature = inspect.signature(found.__init__).parameters
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    own = {name: p for name, p in signature.items() if name != "self" and p.kind not in kinds}
    passes_on = (
        any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.values()) and not own.keys() & OURS.keys()
    )
    if passes_on and found is not SupervisedTemplate and issubclass(found, SupervisedTemplate):
        return {**parameters(found.__mro__[1]), **own}
    return own


def _classes(module: Any, base: type[Any]) -> dict[str, type[Any]]:
    return {
        name: found
        for name, found in vars(module).items()
        if isinstance(found, type) and issubclass(found, base) and found is not base and not name.startswith("_")
    }
