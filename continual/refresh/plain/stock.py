"""Models of ``transformers`` that were handed in as objects, such as a classifier with a head of its own.

**The head of a classifier** (``RobertaForSequenceClassification`` and its like) begins at random and trains in full beside an
adapter. PEFT's own way is ``modules_to_save``, which vLLM refuses, so it lies in ``head.safetensors`` under the names that
it has in the classifier: stock transformers makes the classifier on the base, the head's tensors are loaded over those
made at random, then the adapter. Such a model came as an object, of whose base no SHA-256 was taken; and an adapter loads
on any base of its shapes without a word. So the frozen weights are compared with what lies under the base's name, and a
model whose base is not there, or is another one, is refused.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from continual.errors import CompositionError, ModelError
from continual.learner import Learner
from continual.models.hub import base_sha256, on_disk
from continual.models.lowrank import merge_fold
from continual.models.pretrained import quiet
from continual.parts.adapter.adalora import AdaLoRA
from continual.parts.adapter.lora import LoRA
from continual.parts.adapter.prefix import Prefix
from continual.parts.adapter.prompt import Prompt
from continual.parts.adapter.targets import linear_layers, task_heads
from continual.refresh.plain.adapters import Adapter, check_single, write_adapters
from continual.refresh.plain.body import Body, base_told, dtype_name
from continual.refresh.plain.tensors import plain_state


def is_stock(module: nn.Module) -> bool:
    """Whether its class is one of ``transformers``."""
    import transformers

    return isinstance(module, transformers.PreTrainedModel) and (
        getattr(transformers, type(module).__name__, None) is type(module)
    )


def write_stock(
    learner: Learner, module: Any, adapter: Adapter | None, folder: Path, max_rank: int | None, only: int | None
) -> Body:
    """The whole model by ``save_pretrained``; or an adapter, its config, and its head for ``head.safetensors``.

    Raises:
        CompositionError: adapters that stock libraries cannot use here.
        ModelError: the base of an adapter is not there, or is another one.
    """
    body = Body("transformer", {"class": type(module).__name__, "dtype": dtype_name(module)})
    if adapter is None:
        with quiet():
            module.save_pretrained(folder)
        return body
    heads = task_heads(module)
    if isinstance(adapter, Prompt | Prefix) and heads:
        raise CompositionError(
            f"{adapter.name} before the rows of {type(module).__name__} moves the token that its head reads: name the base "
            "model, so that a head of ours reads it, or take adapter kind 'lora'."
        )
    check_single(adapter, only, "no stock library sends a row to its own")
    name = str(getattr(module.config, "_name_or_path", "") or "")
    body.told |= base_told(name, _checked_base(module, name, heads, adapter))
    body.told |= write_adapters(learner.model, adapter, folder, max_rank, only, with_head=False)
    module.config.save_pretrained(folder)
    for head, layers in heads.items():
        body.head |= {f"{head}.{key}": tensor.detach().cpu().clone() for key, tensor in layers.state_dict().items()}
    return body


def _checked_base(module: Any, name: str, heads: dict[str, nn.Module], adapter: Adapter) -> str:
    """The SHA-256 of the base called ``name``, whose weights are, bit for bit, those that the adapter was trained on."""
    found = on_disk(name) if name else None
    kind = type(module).__name__
    remedy = "load the object with from_pretrained() before it learns, or train it without an adapter, which is exported whole."
    if found is None:
        raise ModelError(
            f"the {kind} was handed in as an object whose config names the base '{name}', which is not on this machine, and an "
            f"adapter is nothing without its base: {remedy}"
        )
    with quiet(), torch.random.fork_rng(devices=[]):
        pristine = type(module).from_pretrained(
            found, config=copy.deepcopy(module.config), dtype=module.dtype, local_files_only=True, use_safetensors=True
        )
    if isinstance(adapter, LoRA | AdaLoRA):
        layers = linear_layers(pristine)
        for layer, fold in (pair for folds in adapter.adapters.merged for pair in folds.items() if pair[1][0].shape[0]):
            merge_fold(layers[layer], fold)
    wanted = pristine.state_dict()
    for key, tensor in plain_state(module).items():
        if key.startswith(("virtual_tokens.", *(f"{head}." for head in heads))):
            continue
        if key not in wanted or not torch.equal(wanted[key], tensor.cpu()):
            raise ModelError(
                f"'{key}' of the {kind} is not that of '{name}', which its config names as its base, and an adapter fits no "
                f"other: {remedy}"
            )
    return base_sha256(found)
