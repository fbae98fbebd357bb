"""The adapters of one model over many tasks: made, frozen, folded into the base, and built again from a saved state.

PEFT's tuner works on the transformer in place: the module tree keeps its shape, a linear layer ``x`` becomes
``x.base_layer`` beside ``x.lora_A.t0001`` and so on, and ``model.transformer`` stays the object it was. The tuner's own
``forward`` (which adds AdaLoRA's term to the model's loss) is never used.

Adapters are called ``t0001``, ``t0002`` … in order of birth: PEFT's rank allocator finds parameters by substring, so no
name may be the beginning of another one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from continual.errors import CompositionError, ModelError, StateError
from continual.models.lowrank import (
    Fold,
    adapted_layers,
    adapter_bytes,
    adapter_parameters,
    base_weight,
    fold,
    merge_fold,
)
from continual.parts.adapter.targets import Target, exactly, linear_layers, resolve, task_heads
from continual.state import tensor_bytes

Tuner = Literal["lora", "adalora"]


class Adapters:
    """The adapters that one part has given to one model.

    Args:
        apart: only the last adapter is active, unless :meth:`only` says another; else all of them are.

    Attributes:
        names: adapters that are in the model, oldest first; the last one trains, the others are frozen.
        merged: of each adapter that was added to the base weights, in order: layer name → its fold, on the CPU.
        layers: the layers that carry adapters, by their name in the transformer.
    """

    def __init__(self, tuner: Tuner, *, apart: bool = False) -> None:
        self.kind, self.apart = tuner, apart
        self.names: list[str] = []
        self.merged: list[dict[str, Fold]] = []
        self.layers: dict[str, nn.Module] = {}
        self.tuner: Any = None

    @property
    def current(self) -> str:
        """The adapter that trains."""
        assert self.names, "there is an adapter after begin()"
        return self.names[-1]

    def parameters(self, adapter: str) -> list[nn.Parameter]:
        """All parameters of one adapter, layer by layer."""
        found = (adapter_parameters(layer, adapter) for layer in self.layers.values())
        return [parameter for parameters in found for parameter in parameters.values()]

    def add(self, model: nn.Module, config: Any, target: Target) -> str:
        """A new adapter that trains; the adapters before it are frozen and lose their dropout.

        Raises:
            ModelError: the model carries adapters that are not ours.
            CompositionError: no layer to adapt.
        """
        name = f"t{len(self.merged) + len(self.names) + 1:04d}"
        for old in self.names:
            self.tuner.peft_config[old].inference_mode = True
        self._inject(model, name, config, target)
        self.names.append(name)
        self._settle()
        return name

    def replace(self, model: nn.Module, config: Any, target: Target) -> str:
        """Fold every adapter into the base weights, for good, and put a new one in their place."""
        before = list(self.names)
        for adapter in before:
            folds = {name: _to_cpu(fold(layer, adapter)) for name, layer in self.layers.items()}
            _merge(self.layers, folds)
            self.merged.append(folds)
            self.tuner.peft_config[adapter].inference_mode = True
        self.names = []
        name = self.add(model, config, target)
        for adapter in before:
            del self.tuner.peft_config[adapter]
            for layer in self.layers.values():
                peft_layer: Any = layer
                peft_layer.delete_adapter(adapter)
        return name

    def settle(self) -> None:
        """Freeze every adapter for good; they stay active, without dropout."""
        for name in self.names:
            self.tuner.peft_config[name].inference_mode = True
            self._freeze(name)

    @contextmanager
    def only(self, name: str | None) -> Iterator[None]:
        """The model with one adapter, or with none; afterwards, also after an exception, as it was.

        PEFT's own ``set_adapter`` would make it trainable.
        """
        before: dict[Any, Any] = {layer: layer._active_adapter for layer in self.layers.values()}
        try:
            self._activate([] if name is None else [name])
            yield
        finally:
            for layer, active in before.items():
                layer._active_adapter = active

    def check_mergeable(self) -> None:
        """Raise :class:`CompositionError` unless adapters add to the base weights without rounding: float32."""
        for name, layer in self.layers.items():
            if base_weight(layer).dtype != torch.float32:
                raise CompositionError(
                    f"the weight of '{name}' is {base_weight(layer).dtype}: merging into it would round away what was "
                    "learned; load the model in float32, or set adapter.across_tasks to 'stack'."
                )

    def state_dict(self) -> dict[str, Any]:
        """The structure, and the folds of what was merged; the weights in the model are saved with the model."""
        return {
            "names": list(self.names),
            "merged": [{layer: {"A": A, "B": B} for layer, (A, B) in folds.items()} for folds in self.merged],
        }

    def rebuild(self, model: nn.Module, state: dict[str, Any], make_config: Callable[[], Any], target: Target) -> None:
        """Give a pristine model the structure of ``state``: the same merges in the same order, the same adapters.

        No generator moves. The values of the adapters' parameters are loaded with the model, afterwards.

        Raises:
            StateError: the state tells of layers that this model does not have.
        """
        names, merged = list(state["names"]), [_folds(entry) for entry in state["merged"]]
        if not names:
            return
        plain = linear_layers(transformer_of(model))
        for folds in merged:
            missing = [layer for layer in folds if layer not in plain]
            if missing:
                raise StateError(f"the saved adapters belong to another model: it has no linear layer '{missing[0]}'.")
            _merge(plain, folds)
            self.merged.append(folds)
        with torch.random.fork_rng(devices=[]):
            for name in names:
                assert self.add(model, make_config(), target) == name, "adapters are numbered in order of birth"

    def nbytes(self) -> int:
        """Bytes of the adapters in the model and of the folds of those that were merged."""
        return adapter_bytes(self.layers.values(), self.names) + tensor_bytes(self.state_dict())

    def _inject(self, model: nn.Module, name: str, config: Any, target: Target) -> None:
        transformer = transformer_of(model)
        if self.tuner is None:
            check_bare(transformer)
            targets = resolve(transformer, target)
            freeze(model)
        else:
            targets = list(self.layers)
        config.target_modules = exactly(targets)
        training = [parameter for parameter in head_parameters(transformer) if parameter.requires_grad]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            try:
                if self.tuner is None:
                    self.tuner = tuner_class(self.kind)(transformer, config, name)
                else:
                    self.tuner.peft_config[name] = config
                    self.tuner.inject_adapter(transformer, name)
            except (ValueError, TypeError) as error:
                raise CompositionError(
                    f"PEFT cannot put a {self.kind} adapter into this model ({error}): name other layers in "
                    "adapter.target."
                ) from error
        for parameter in training:
            parameter.requires_grad_(True)
        self.layers = adapted_layers(transformer)
        for layer in self.layers.values():
            peft_layer: Any = layer
            layer.train(peft_layer.get_base_layer().training)

    def _activate(self, names: list[str]) -> None:
        for layer in self.layers.values():
            peft_layer: Any = layer
            peft_layer._active_adapter = names

    def _settle(self) -> None:
        """Make all adapters active, the last one alone trainable, in float32; the older ones lose their dropout."""
        self.tuner.set_adapter(list(self.names))
        if self.apart:
            self._activate([self.current])
        for parameter in self.parameters(self.current):
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        for old in self.names[:-1]:
            self._freeze(old)

    def _freeze(self, name: str) -> None:
        for parameter in self.parameters(name):
            parameter.requires_grad_(False)
        for layer in self.layers.values():
            peft_layer: Any = layer
            peft_layer.lora_dropout[name] = nn.Identity()


def transformer_of(model: nn.Module) -> nn.Module:
    """What adapters go into: the transformer of a Hugging Face model, the whole backbone of any other."""
    for attribute in ("transformer", "backbone"):
        inner = getattr(model, attribute, None)
        if isinstance(inner, nn.Module):
            return inner
    return model


def head_parameters(transformer: nn.Module) -> list[nn.Parameter]:
    """Parameters of a Hugging Face classifier's own head."""
    return [parameter for head in task_heads(transformer).values() for parameter in head.parameters()]


def freeze(model: nn.Module) -> None:
    """Stop training everything but the head: ours, or that of a Hugging Face classifier."""
    head = getattr(model, "head", None)
    kept = {id(parameter) for parameter in head.parameters()} if isinstance(head, nn.Module) else set()
    kept |= {id(parameter) for parameter in head_parameters(transformer_of(model))}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)


def check_bare(transformer: nn.Module) -> None:
    """Raise :class:`ModelError` where the model comes with PEFT adapters of its own."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(transformer, PeftModel) or any(
        isinstance(module, BaseTunerLayer) for module in transformer.modules()
    ):
        raise ModelError(
            "the model already carries a PEFT adapter: give the base model, or merge the adapter first "
            "(`model = model.merge_and_unload()`)."
        )


def tuner_class(kind: Tuner) -> Any:
    """PEFT's class that puts adapters of this kind into a model."""
    from peft import AdaLoraModel, LoraModel

    return {"lora": LoraModel, "adalora": AdaLoraModel}[kind]


def _merge(layers: dict[str, nn.Module], folds: dict[str, Fold]) -> None:
    for name, folded in folds.items():
        if folded[0].shape[0]:
            merge_fold(layers[name], folded)


def _to_cpu(folded: Fold) -> Fold:
    return folded[0].cpu(), folded[1].cpu()


def _folds(entry: dict[str, dict[str, Tensor]]) -> dict[str, Fold]:
    return {layer: (factors["A"], factors["B"]) for layer, factors in entry.items()}
