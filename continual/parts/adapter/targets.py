"""Which linear layers of a transformer get an adapter, and how their names are written for PEFT."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Literal

from torch import nn

from continual.errors import CompositionError, quoted
from continual.models.lowrank import is_transposed

Target = Literal["all-linear"] | list[str]
"""Every linear layer, or names: a whole one or its end (``q_proj``), as PEFT has them."""


def linear_layers(transformer: nn.Module) -> dict[str, nn.Module]:
    """The plain linear layers (``nn.Linear``, ``Conv1D``) that can be wrapped, by name.

    Left out: the output layer of a language model, which may share its weight with the embeddings, the head of a
    classifier (:func:`task_heads`), and layers whose weight torch reads without calling them (inside
    ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer``).
    """
    output = _output_layer(transformer)
    heads = {id(module) for head in task_heads(transformer).values() for module in head.modules()}
    unseen = {
        id(child)
        for module in transformer.modules()
        if isinstance(module, nn.MultiheadAttention | nn.TransformerEncoderLayer)
        for child in module.children()
    }
    return {
        name: module
        for name, module in transformer.named_modules()
        if name
        and (isinstance(module, nn.Linear) or is_transposed(module))
        and module is not output
        and id(module) not in unseen
        and id(module) not in heads
    }


def task_heads(transformer: nn.Module) -> dict[str, nn.Module]:
    """What a classifier or regressor of Hugging Face has on top of its base model, by name.

    These layers begin at random and so train in full, as PEFT's ``modules_to_save``. Empty for a language model, a bare
    base model and any module that is not of Hugging Face.
    """
    base = getattr(transformer, "base_model", None)
    if not hasattr(transformer, "base_model_prefix") or base is transformer or _output_layer(transformer) is not None:
        return {}
    return {
        name: child
        for name, child in transformer.named_children()
        if child is not base and next(child.parameters(), None) is not None
    }


def resolve(transformer: nn.Module, target: Target) -> list[str]:
    """Full names of the layers that ``target`` means.

    Raises:
        CompositionError: a name matches no linear layer; those that there are are listed.
    """
    names = list(linear_layers(transformer))
    wanted = names if target == "all-linear" else [name for name in names if any(_ends(name, end) for end in target)]
    idle = [] if target == "all-linear" else [end for end in target if not any(_ends(name, end) for name in names)]
    if not names:
        raise CompositionError(
            "this model has no linear layer that could carry an adapter: use one that has, or leave the adapter out."
        )
    if idle:
        raise CompositionError(
            f"adapter.target names {quoted(idle)}, which is no linear layer of this model: its linear layers are "
            f"{_listed(names)}; name some of them."
        )
    return wanted


def exactly(names: Sequence[str]) -> str:
    """A ``target_modules`` expression that matches these full names and no other."""
    return "|".join(re.escape(name) for name in names)


def shortest(modules: Iterable[str], wanted: Sequence[str]) -> list[str] | str:
    """``target_modules`` for a file that people and servers read: endings where they suffice, else full names.

    Args:
        modules: the names of all modules of the base model.
        wanted: those that carry an adapter.
    """
    every, goal = list(modules), set(wanted)
    for candidate in (sorted({name.rpartition(".")[2] for name in wanted}), sorted(wanted)):
        if {name for name in every if any(_ends(name, end) for end in candidate)} == goal:
            return candidate
    return exactly(sorted(wanted))


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _listed(names: Sequence[str]) -> str:
    shown = names if len(names) <= 20 else sorted({name.rpartition(".")[2] for name in names})
    return quoted(shown) or "none"


def _output_layer(transformer: nn.Module) -> object:
    getter = getattr(transformer, "get_output_embeddings", None)
    try:
        return getter() if getter is not None else None
    except (NotImplementedError, AttributeError):
        return None
