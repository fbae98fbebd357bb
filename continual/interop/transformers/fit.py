"""What of a strategy fits a trainer, and what of a trainer fits a strategy; the rest is refused or named in one warning."""

from __future__ import annotations

import hashlib
import inspect
import warnings
from collections.abc import Iterable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import Trainer
from transformers.models.auto import modeling_auto

from continual.errors import CompositionError, ModelError, quoted
from continual.kinds import Objective
from continual.models.model import Model
from continual.models.module import UserModule
from continual.strategy import Strategy

OWN = ("Continual", "ContinualMixin")
_NEEDED = (
    "compute_loss",
    "training_step",
    "create_optimizer",
    "get_batch_samples",
    "get_train_dataloader",
    "save_model",
)
_INNER = ("_get_train_sampler", "_remove_unused_columns", "_get_collator_with_removed_columns", "_load_from_checkpoint")
_KINDS: dict[Objective, tuple[str, ...]] = {
    "causal-lm": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",),
    "classification": (
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
        "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
        "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    ),
}


def base_of(model: nn.Module) -> Any:
    """The model without what PEFT has put around it."""
    getter = getattr(model, "get_base_model", None)
    return model if getter is None else getter()


def is_peft(model: nn.Module) -> bool:
    """Whether it came as a ``PeftModel``."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def objective_of(model: nn.Module) -> Objective:
    """What a Hugging Face model is trained for, by its class and its configuration.

    Raises:
        ModelError: it is trained for something else, or cannot be told.
    """
    base = base_of(model)
    config, name = getattr(base, "config", None), type(base).__name__
    kind = getattr(config, "problem_type", None)
    if kind == "multi_label_classification":
        raise ModelError(
            "the model has problem_type 'multi_label_classification', and a row has one class here: train one model for each "
            "label, or leave Continual out."
        )
    if getattr(config, "is_encoder_decoder", False) and hasattr(base, "prepare_decoder_input_ids_from_labels"):
        raise ModelError(f"{name} has an encoder and a decoder: train it with continual.Learner, objective='seq2seq'.")
    for objective, mappings in _KINDS.items():
        known = {found for mapping in mappings for found in _flat(getattr(modeling_auto, mapping, {}).values())}
        if name in known:
            regression = kind == "regression" or (kind is None and getattr(config, "num_labels", 2) == 1)
            return "regression" if objective == "classification" and regression else objective
    raise ModelError(
        f"what {name} is trained for cannot be told from its class: say it, Continual(..., objective='causal-lm') or "
        "'classification' or 'regression', if its forward gives such logits without labels."
    )


def wrapped(module: nn.Module, objective: Objective) -> Model:
    """The trainer's model as parts see it; everything in it is as it came."""
    base = base_of(module)
    columns = tuple(name for name in inspect.signature(base.forward).parameters if name != "labels")
    name = f"{type(base).__module__}:{type(base).__qualname__}"
    backbone = UserModule(module, objective, columns)
    model = Model(backbone, gives_features=False, objectives=(objective,), spec={"kind": "object", "class": name})
    model.mark_pristine(module.parameters())
    return model


def fitted(strategy: Strategy, module: nn.Module, objective: Objective) -> tuple[Strategy, list[str]]:
    """The strategy with what works inside a trainer, and what of it is left out.

    The trainer has its own training: of ``training`` only ``active`` is used. A linear head gives way to the model's own,
    and an adapter to that of a ``PeftModel``.

    Raises:
        CompositionError: it cannot work on this model, or needs more than the rows that arrive.
    """
    if strategy.data != "experience":
        raise CompositionError(
            f"strategy '{strategy.name}' has data: {strategy.data}, and a trainer reads its own train_dataset: give it those "
            "rows there with strategy 'naive', or take continual.Learner."
        )
    left_out = [f"training.{key}" for key in strategy.training.model_fields_set if key != "active"]
    parts = []
    for part in strategy.make_parts():
        if part.name == "head/linear":
            left_out.append("head (the model's own is trained)")
        elif part.slot == "adapter" and is_peft(module):
            left_out.append("adapter (the model came with one of PEFT's)")
        else:
            parts.append(part)
    used = Strategy(
        *parts, name=strategy.name, training={"active": strategy.training.active}, backbone=strategy.backbone
    )
    used.check(objective=objective, gives_features=False)
    return used, left_out


def check_trainer(trainer: Any, adapts: bool) -> None:
    """Refuse, before anything has changed, a trainer whose settings cannot be kept.

    Args:
        adapts: the strategy puts its own adapter into the model.

    Raises:
        CompositionError: one sentence for the first setting that cannot be.
    """
    args = trainer.args
    optim = str(getattr(args.optim, "value", args.optim))
    absent = [name for name in (*_NEEDED, *_INNER) if not hasattr(Trainer, name)]
    problems = [
        (
            absent,
            f"transformers {transformers.__version__} has no {quoted(absent)} in its Trainer: install 5.17 or later",
        ),
        (
            args.world_size > 1
            or args.n_gpu > 1
            or trainer.is_model_parallel
            or trainer.is_deepspeed_enabled
            or trainer.is_fsdp_enabled,
            "the trainer runs on several devices or shards its model, and here parts see one process with the whole model: "
            "make one GPU visible (CUDA_VISIBLE_DEVICES=0), or take continual.Learner under torchrun",
        ),
        (trainer.model_init is not None, "model_init makes a new model in every training: give the trainer a model"),
        (args.auto_find_batch_size, "auto_find_batch_size begins a training anew in its middle: set it to False"),
        (args.torch_compile, "torch_compile cannot follow batches and adapters that change: set it to False"),
        (
            "lomo" in optim or "layerwise" in optim,
            f"optim '{optim}' steps during the backward pass, where no part can see the gradients: take adamw_torch",
        ),
        (
            trainer.compute_loss_func is not None
            or getattr(args, "loss_type", "nll") not in (None, "nll")
            or not _own_loss(type(trainer)),
            f"{type(trainer).__name__} has a loss of its own (compute_loss, compute_loss_func or loss_type), and parts need "
            "the objective's loss of every row: take Trainer's or SFTTrainer's, with loss_type 'nll'",
        ),
        (
            getattr(trainer, "padding_free", False),
            "rows that are packed into one (padding_free, or packing with strategy 'bfd') have no loss of their own: set "
            "packing=False and padding_free=False",
        ),
        (
            adapts and args.load_best_model_at_end,
            "load_best_model_at_end would load a checkpoint over the adapter: set it to False",
        ),
        *_peft_problems(trainer.model),
    ]
    for found, sentence in problems:
        if found:
            raise CompositionError(f"{sentence}.")


def warn_left_out(trainer: Any, strategy: Strategy, left_out: Iterable[str]) -> None:
    """One warning that names every setting, of the strategy or of the trainer, that nothing reads."""
    found = [f"'{one}'" for one in left_out]
    if trainer.args.label_smoothing_factor:
        found.append("the trainer's label_smoothing_factor (the loss is the objective's, row by row)")
    if getattr(trainer, "aux_loss_enabled", False):
        found.append("the trainer's router_aux_loss_coef (the loss is the objective's, row by row)")
    if found:
        warnings.warn(
            f"strategy '{strategy.name}' in {type(trainer).__name__}: the trainer has its own optimiser, schedule, epochs and "
            f"batches, so these settings are not used: {', '.join(found)}.",
            UserWarning,
            stacklevel=5,
        )


def digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of tensors: type, shape and bytes of each."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _own_loss(kind: type) -> bool:
    """Whether the loss is that of Trainer or SFTTrainer."""
    owner = next(one for one in kind.__mro__ if "compute_loss" in vars(one) and one.__name__ not in OWN)
    return owner is Trainer or (owner.__name__ == "SFTTrainer" and owner.__module__.startswith("trl."))


def _peft_problems(model: nn.Module) -> list[tuple[bool, str]]:
    configs = list(getattr(model, "peft_config", {}).values()) if is_peft(model) else []
    return [
        (
            any("ADALORA" in str(config.peft_type) for config in configs),
            "the model came with PEFT's AdaLoRA, whose budget only our part drives over many tasks: give the base model and "
            "a strategy with adapter: {kind: adalora}",
        ),
        (
            any(config.is_prompt_learning for config in configs),
            "the model came with virtual tokens of PEFT (prompt or prefix tuning), which have no labels: take LoRA",
        ),
    ]


def _flat(values: Iterable[Any]) -> Iterable[str]:
    for value in values:
        yield from value if isinstance(value, tuple | list) else (value,)
