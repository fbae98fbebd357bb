"""A strategy of Avalanche, made with our model, our training keys, and what its constructor asks for besides.

Imported after :func:`continual.foreign.imported` only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from continual.errors import SpecError
from continual.interop.avalanche.module import Competing, Features, Logits, TaskLogits
from continual.interop.avalanche.strategies import DEFAULTS, parameters, plugin_class, strategy_class
from continual.models.model import Model
from continual.parts.context import TrainingContext
from continual.training import Training


def make_strategy(
    name: str,
    arguments: Mapping[str, Any],
    plugins: Sequence[tuple[str, Mapping[str, Any]]],
    *,
    context: TrainingContext,
    training: Training,
    competing: Competing,
    watch: Any,
    evaluation_rows: int,
) -> tuple[Any, nn.Module | None]:
    """The strategy, and the module around our model that it trains; None where it made a module of its own around its parts.

    Args:
        arguments: of its constructor; the others are filled in by name.
        plugins: name and arguments of each further one.
        watch: our plugin, called before all others.

    Raises:
        SpecError: Avalanche refuses the arguments.
    """
    model = context.model
    assert isinstance(model, Model)
    kind = TaskLogits if context.scenario == "task" else Logits
    module: nn.Module = kind(model, competing).to(context.device)
    found = strategy_class(name)
    given: dict[str, Any] = {
        "model": module,
        "optimizer": make_optimizer(training, list(model.parameters())),
        "criterion": nn.CrossEntropyLoss(),
        "train_mb_size": training.batch_size,
        "train_epochs": training.iterations or training.epochs or 1,
        "eval_mb_size": evaluation_rows,
        "device": context.device,
        "evaluator": None,
        "num_classes": len(context.owner),
    }
    if model.gives_features:
        given |= {"slda_model": Features(model), "feature_extractor": Features(model), "classifier": model.head}
        given["input_size"] = model.feature_size
    taken = parameters(found)
    own = {**DEFAULTS.get(found.__name__, {}), **arguments}
    try:
        given["plugins"] = [watch, *(plugin_class(plugin)(**settings) for plugin, settings in plugins)]
        strategy = found(**{key: value for key, value in given.items() if key in taken}, **own)
    except (TypeError, ValueError, AssertionError) as error:
        raise SpecError(
            f"engine, {found.__name__}: Avalanche refuses these arguments ({' '.join(str(error).split())}): change them."
        ) from error
    return strategy, module if strategy.model is module else None


def make_optimizer(training: Training, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """One group, as Avalanche's examples have it."""
    if training.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=training.lr, momentum=training.momentum, weight_decay=training.weight_decay
        )
    kind = torch.optim.Adam if training.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, lr=training.lr, weight_decay=training.weight_decay)
