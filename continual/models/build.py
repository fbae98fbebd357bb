"""From what the user names to a :class:`~continual.models.model.Model`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from continual.errors import ModelError, SpecError, quoted
from continual.kinds import Objective
from continual.models.hub import base_sha256, on_disk
from continual.models.mlp import MLP
from continual.models.model import Model
from continual.models.module import UserModule
from continual.models.spec import MLPSpec, ModuleSpec, PretrainedSpec, parse_model_spec
from continual.spec import load_object
from continual.table import Batch

_FEATURES: tuple[Objective, ...] = ("classification", "regression")


def build_model(
    spec: str | Mapping[str, Any] | nn.Module,
    *,
    objective: Objective = "classification",
    example: Batch | None = None,
    device: torch.device | str | None = None,
) -> Model:
    """The model that ``spec`` names, on ``device``; without one, a module that is handed in stays where it is.

    Initial weights and the constructors of users' modules draw from the process-wide generators: call it inside
    :meth:`~continual.randomness.Randomness.framework`, as the learner does.

    Args:
        spec: ``mlp``, ``package.module:Class``, a model of the Hugging Face hub or a local folder; a mapping with a
            ``kind`` (``Model.spec`` among them); a torch module that gives logits; or a finished model, which is
            returned as it is.
        objective: what it is trained for.
        example: a batch of the rows to come; an mlp takes the number of its inputs from it.

    Raises:
        SpecError: an unknown kind or key, or a class that cannot be imported.
        ModelError: the model cannot be found or made, or cannot be trained for the objective.
    """
    model = _build(spec, objective, example)
    if objective not in model.objectives:
        raise ModelError(
            f"this model cannot be trained for {objective}, only for {quoted(model.objectives)}: name a model that can."
        )
    return model if device is None else model.to(torch.device(device))


def gives_features(spec: str | Mapping[str, Any] | nn.Module, objective: Objective) -> bool:
    """Whether the model that ``spec`` names gives features for a head, or logits itself; it need not be made for that.

    Raises:
        SpecError: an unknown kind or key.
    """
    if isinstance(spec, nn.Module):
        return isinstance(spec, Model) and spec.gives_features
    if isinstance(spec, Mapping) and spec.get("kind") == "object":
        return False
    settings = parse_model_spec(spec)
    if isinstance(settings, PretrainedSpec):
        return objective in _FEATURES
    return isinstance(settings, MLPSpec)


def base_on_disk(spec: str | Mapping[str, Any] | nn.Module) -> str | None:
    """SHA-256 of the weights of the pretrained base that ``spec`` names, as they lie on this machine now.

    None for a model without one, and for a base that would have to be fetched.

    Raises:
        SpecError: an unknown kind or key.
        ModelError: its folder holds no weights.
    """
    if isinstance(spec, nn.Module):
        return spec.base_sha256 if isinstance(spec, Model) else None
    settings = None if isinstance(spec, Mapping) and spec.get("kind") == "object" else parse_model_spec(spec)
    if not isinstance(settings, PretrainedSpec):
        return None
    folder = on_disk(settings.name)
    return None if folder is None else base_sha256(folder)


def _build(spec: str | Mapping[str, Any] | nn.Module, objective: Objective, example: Batch | None) -> Model:
    if isinstance(spec, Model):
        return spec
    if isinstance(spec, nn.Module):
        name = f"{type(spec).__module__}:{type(spec).__qualname__}"
        return _user_model(spec, objective, {"kind": "object", "class": name})
    if isinstance(spec, Mapping) and spec.get("kind") == "object":
        raise ModelError(
            f"the model was an object of '{spec.get('class')}' that was handed in: hand it in again to go on with it."
        )
    settings = parse_model_spec(spec)
    if isinstance(settings, PretrainedSpec):
        from continual.models.pretrained import load_pretrained

        return load_pretrained(settings, objective)
    if isinstance(settings, ModuleSpec):
        return _user_model(_construct(settings), objective, settings.model_dump(by_alias=True))
    return _mlp(settings, example)


def _mlp(settings: MLPSpec, example: Batch | None) -> Model:
    inputs = settings.inputs
    if example is not None and "inputs" not in example:
        raise ModelError(
            f"an mlp reads the column 'inputs', and these rows have {quoted(sorted(example))}: "
            "use a pretrained model for text."
        )
    if inputs is None:
        if example is None:
            raise ModelError("an mlp must know how many inputs a row has: give it rows, or the key 'inputs'.")
        inputs = example["inputs"][0].numel()
    backbone = MLP(inputs, settings.hidden, settings.activation, settings.dropout)
    return Model(
        backbone,
        gives_features=True,
        objectives=_FEATURES,
        spec={**settings.model_dump(), "hidden": list(settings.hidden), "inputs": inputs},
        feature_size=backbone.feature_size,
    )


def module_class(settings: ModuleSpec) -> type[nn.Module]:
    """The class of a module of the user's.

    Raises:
        SpecError: it cannot be imported, or is something else.
    """
    found = load_object(settings.class_, "the model")
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise SpecError(f"the model: '{settings.class_}' is not a torch module: name a subclass of torch.nn.Module.")
    return found


def _construct(settings: ModuleSpec) -> nn.Module:
    found = module_class(settings)
    try:
        return found(**settings.arguments)
    except (TypeError, ValueError) as error:
        raise ModelError(f"'{settings.class_}' could not be made ({error}): see to 'arguments'.") from error


def _user_model(module: nn.Module, objective: Objective, spec: dict[str, Any]) -> Model:
    backbone: nn.Module = UserModule(module, objective)
    if objective == "seq2seq":
        from continual.models.transformer import LanguageModel

        if not hasattr(module, "prepare_decoder_input_ids_from_labels"):
            raise ModelError(
                f"{type(module).__name__} has no prepare_decoder_input_ids_from_labels(labels), which seq2seq "
                "feeds the decoder with: add it, or name a model of Hugging Face."
            )
        backbone = LanguageModel(module, seq2seq=True)
    return Model(backbone, gives_features=False, objectives=(objective,), spec=spec)
