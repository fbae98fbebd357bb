"""Pretrained transformers of Hugging Face, from their folder to a model.

Only safetensors are read, and no code that lies in the folder is run.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn

from continual.errors import ModelError, quoted
from continual.kinds import Objective
from continual.models.hub import base_sha256, resolve
from continual.models.model import Model
from continual.models.spec import PretrainedSpec
from continual.models.transformer import LanguageModel, PooledTransformer

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
)


def load_pretrained(spec: PretrainedSpec, objective: Objective) -> Model:
    """The model that ``spec`` names, in eval mode on the CPU: features for a head, or the logits of a language model.

    Raises:
        ModelError: not found, not loadable without its own code, incomplete, or unfit for the objective.
    """
    language = objective in ("causal-lm", "seq2seq")
    if language and spec.pooling != "auto":
        raise ModelError(f"'pooling: {spec.pooling}' has no meaning for {objective}: leave it out.")
    if language and spec.layers > 1:
        raise ModelError(f"'layers: {spec.layers}' has no meaning for {objective}: leave it out.")
    folder = resolve(spec.name)
    digest = base_sha256(folder)
    with quiet():
        transformer, fresh = _load(folder, spec, objective)
        tokenizer = _tokenizer(folder)
    config = transformer.config
    max_length = _max_length(spec, tokenizer, config)
    settings = {**spec.model_dump(), "max_length": max_length}
    backbone: nn.Module
    if language:
        backbone = LanguageModel(transformer, seq2seq=objective == "seq2seq")
    else:
        settings["pooling"] = pooling = _pooling(folder, spec, config)
        _check_layers(spec, config)
        backbone = PooledTransformer(transformer, pooling, spec.layers)
    model = Model(
        backbone,
        gives_features=not language,
        objectives=(objective,) if language else ("classification", "regression"),
        spec=settings,
        feature_size=None if language else spec.layers * int(config.get_text_config().hidden_size),
        tokenizer=tokenizer,
        max_length=max_length,
        base_sha256=digest,
    )
    model.mark_pristine(p for name, p in transformer.named_parameters() if name not in fresh)
    return model


def check_base(recorded: str | None, model: Model) -> None:
    """Refuse a model that stands on another pretrained base than the one whose SHA-256 was recorded.

    Raises:
        ModelError: the two differ.
    """
    if recorded != model.base_sha256:
        raise ModelError(
            f"the pretrained base has SHA-256 {model.base_sha256 or 'none'} and the state was saved with "
            f"{recorded or 'none'}: give the base that it was trained from."
        )


def _load(folder: Path, spec: PretrainedSpec, objective: Objective) -> tuple[Any, set[str]]:
    """The transformer, and the names of parameters that its files do not hold (an unused pooler at most)."""
    import transformers

    classes: dict[Objective, Any] = {
        "causal-lm": transformers.AutoModelForCausalLM,
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
    }
    options: dict[str, Any] = {}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if objective not in classes and _takes_pooler(config):
            options["add_pooling_layer"] = False
        transformer, info = classes.get(objective, transformers.AutoModel).from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, spec.dtype),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"the model in '{folder}' could not be loaded for {objective} ({reason}): name another."
        ) from error
    missing = sorted(name for name in info["missing_keys"] if "pooler" not in name)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ModelError(
            f"the files in '{folder}' do not hold {quoted(missing[:3])}{more}, which "
            f"{type(transformer).__name__} needs: name a model that was trained for {objective}."
        )
    if objective not in classes and config.is_encoder_decoder:
        transformer = transformer.get_encoder()
    return transformer, set(info["missing_keys"])


def _takes_pooler(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    found = MODEL_MAPPING.get(type(config), None)
    return isinstance(found, type) and "add_pooling_layer" in inspect.signature(found).parameters


def _pooling(folder: Path, spec: PretrainedSpec, config: Any) -> Literal["mean", "cls", "last"]:
    if spec.pooling != "auto":
        return spec.pooling
    try:
        own = json.loads((folder / "1_Pooling" / "config.json").read_text(encoding="utf-8"))
        modes: dict[str, Literal["mean", "cls", "last"]] = {
            "pooling_mode_mean_tokens": "mean",
            "pooling_mode_cls_token": "cls",
            "pooling_mode_lasttoken": "last",
        }
        for key, mode in modes.items():
            if own.get(key) is True:
                return mode
    except (OSError, ValueError, AttributeError):
        pass
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    decoder = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING
    return "last" if decoder and not config.is_encoder_decoder else "mean"


def _check_layers(spec: PretrainedSpec, config: Any) -> None:
    there = int(config.get_text_config().num_hidden_layers) + 1
    if spec.layers > there:
        raise ModelError(
            f"'layers: {spec.layers}' is more than the {there} hidden states that '{spec.name}' has, its embeddings among "
            "them: lower it."
        )


def _tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, padding to the right; None where the folder has none."""
    import transformers

    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"the tokenizer in '{folder}' could not be loaded ({error}): fetch the model again."
        ) from error
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"the tokenizer in '{folder}' has no pad token and no end token: give it one of them.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _max_length(spec: PretrainedSpec, tokenizer: Any, config: Any) -> int:
    limits = [
        getattr(tokenizer, "model_max_length", None),
        getattr(config.get_text_config(), "max_position_embeddings", None),
    ]
    limit = min((int(found) for found in limits if found), default=spec.max_length)
    if spec.max_length > limit and "max_length" in spec.model_fields_set:
        raise ModelError(
            f"'max_length: {spec.max_length}' is more than the {limit} tokens that '{spec.name}' takes: lower it."
        )
    return min(spec.max_length, limit)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the load reports and progress bars of transformers; its settings are put back."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    settings: Any = transformers_logging

    logger = logging.getLogger("transformers")
    level, bars, hub_bars = logger.level, settings.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    settings.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            settings.enable_progress_bar()
        if hub_bars:
            enable_progress_bars()
        else:
            disable_progress_bars()
