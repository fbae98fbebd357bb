"""The optimiser, its learning rate over an experience, and its state by parameter name."""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import Tensor, nn

from continual.errors import StateError
from continual.training import Training


def load_optimizers() -> None:
    """Import what torch's optimisers import at their first step: a second or more, which is no training."""
    importlib.import_module("torch._dynamo")


def make_optimizer(training: Training, parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    """Two groups, body and head (names that begin with ``head.``), either of which may be empty for now."""
    head_lr = training.head_lr or training.lr
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in parameters.items() if not n.startswith("head.")], "lr": training.lr},
        {"params": [p for n, p in parameters.items() if n.startswith("head.")], "lr": head_lr},
    ]
    decay = training.weight_decay
    if training.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=training.momentum, weight_decay=decay, fused=True)
    kind = torch.optim.Adam if training.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, weight_decay=decay, fused=True)


def rate_factor(training: Training, step: int, steps: int) -> float:
    """What the learning rate is multiplied with at ``step`` (from 0) of ``steps``."""
    warmup = int(training.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    if training.schedule == "linear":
        return 1.0 - done
    if training.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    return 1.0


def set_rate(optimizer: torch.optim.Optimizer, training: Training, step: int, steps: int) -> None:
    """Set the learning rates for ``step``; nothing is done where they never change."""
    if training.schedule == "constant" and not training.warmup:
        return
    factor = rate_factor(training, step, steps)
    for group, rate in zip(optimizer.param_groups, (training.lr, training.head_lr or training.lr), strict=True):
        group["lr"] = rate * factor


def optimizer_state(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> dict[str, Any]:
    """Its state by parameter name, and the order of the names in each group."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    state = {
        names[id(parameter)]: {key: value for key, value in entries.items() if value is not None}
        for parameter, entries in optimizer.state.items()
        if id(parameter) in names
    }
    return {
        "groups": [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups],
        "state": state,
    }


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], saved: dict[str, Any]
) -> None:
    """Put :func:`optimizer_state` back; the rates stay those of the training that the optimiser was made for.

    Raises:
        StateError: it names a parameter that does not train here.
    """
    for group, names in zip(optimizer.param_groups, saved["groups"], strict=True):
        absent = [name for name in names if name not in parameters]
        if absent:
            raise StateError(
                f"the saved optimiser knows the parameter '{absent[0]}', which does not train here: the state belongs to "
                "another strategy or model."
            )
        group["params"] = [parameters[name] for name in names]
    optimizer.state.clear()
    for name, entries in saved["state"].items():
        device = parameters[name].device
        optimizer.state[parameters[name]] = {
            key: value.to(device).clone() if isinstance(value, Tensor) else value for key, value in entries.items()
        }
