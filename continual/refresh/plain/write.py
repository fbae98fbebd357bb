"""What lies below a head, written so that stock libraries load it.

* A transformer of Hugging Face: with an adapter, PEFT's folder, on the base that it was trained on; frozen, nothing, for the
  base is what it was; trained in full, ``save_pretrained``.
* A model of ``transformers`` that was handed in as an object: :mod:`~continual.refresh.plain.stock`.
* An mlp, a module of the user's: bare tensors (:mod:`~continual.refresh.plain.tensors`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from continual.errors import CompositionError, ModelError
from continual.learner import Learner
from continual.models.mlp import MLP
from continual.models.model import Model
from continual.models.module import UserModule
from continual.models.pretrained import quiet
from continual.models.transformer import LanguageModel, PooledTransformer
from continual.parts.adapter.export import base_name
from continual.refresh.plain.adapters import Adapter, adapter_of, check_single, write_adapters
from continual.refresh.plain.body import Body, base_told, dtype_name
from continual.refresh.plain.stock import is_stock, write_stock
from continual.refresh.plain.tensors import write_mlp, write_module


def write_body(learner: Learner, folder: Path, *, max_rank: int | None, only: int | None) -> Body:
    """Write the body of a learner's model into ``folder``.

    Raises:
        CompositionError: parts, or settings, that have no form which stock libraries load.
        ModelError: a backbone of the user's own, or an adapter whose base is not known.
    """
    adapter = adapter_of(learner, max_rank, only)
    model, backbone = learner.model, learner.model.backbone
    own = _handed_in(model)
    if own is not None and is_stock(own):
        body = write_stock(learner, own, adapter, folder, max_rank, only)
    elif own is not None:
        body = write_module(own, model.spec, adapter, folder, only)
    elif isinstance(backbone, PooledTransformer | LanguageModel):
        body = _write_pretrained(learner, backbone, adapter, folder, max_rank, only)
    elif isinstance(backbone, MLP):
        body = write_mlp(backbone, adapter, folder, only)
    else:
        raise ModelError(
            f"{type(backbone).__name__} is a backbone of your own, which nobody else has: save its state_dict yourself, or learn "
            "with a model of Hugging Face, an mlp, or a module that gives logits."
        )
    body.told["autocast"] = "bfloat16" if learner.strategy.training.precision == "bf16" else None
    return body


def _handed_in(model: Model) -> nn.Module | None:
    """The module of the user's that gives logits, where the model is made around one."""
    if isinstance(model.backbone, UserModule):
        return model.backbone.module
    if isinstance(model.backbone, LanguageModel) and model.spec.get("kind") in ("object", "module"):
        return model.backbone.transformer
    return None


def _write_pretrained(
    learner: Learner,
    backbone: PooledTransformer | LanguageModel,
    adapter: Adapter | None,
    folder: Path,
    max_rank: int | None,
    only: int | None,
) -> Body:
    model, transformer = learner.model, backbone.transformer
    config: Any = transformer.config
    language = isinstance(backbone, LanguageModel)
    encoder = not language and bool(config.is_encoder_decoder)
    body = Body("language" if language else "features")
    body.told = {
        "dtype": dtype_name(transformer),
        "options": {"add_pooling_layer": False} if getattr(transformer, "pooler", transformer) is None else {},
        "encoder": encoder,
    }
    if isinstance(backbone, PooledTransformer):
        body.told |= {"pooling": backbone.pooling, "layers": backbone.layers, "features": model.feature_size}
    name = base_name(model)
    if adapter is None and (learner.strategy.backbone != "frozen" or not name):
        if encoder:
            raise CompositionError(
                f"the encoder of an encoder-decoder ({config.model_type}) was trained in full, and transformers has no class that "
                "loads it alone: train an adapter, which goes on the whole base, or take an encoder."
            )
        saving: Any = transformer
        with quiet():
            saving.save_pretrained(folder)
        return body
    if not name:
        raise ModelError(
            "the model does not say what its pretrained base is called, and an adapter is nothing without it: name the model "
            "when the learner is made, as in Learner('sentence-transformers/all-MiniLM-L6-v2')."
        )
    body.told |= base_told(name, model.base_sha256)
    if adapter is not None:
        if language:
            check_single(adapter, only, "no stock library sends a language model's rows to their own")
        body.told |= write_adapters(model, adapter, folder, max_rank, only)
    return body
