"""Bodies that no library has a name for: an mlp, and a module of the user's.

Adapters are added to the weights, for nobody else has the base that they were trained on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from continual.errors import CompositionError
from continual.models.lowrank import adapted_layers, effective_weight, is_transposed
from continual.models.mlp import ACTIVATIONS, MLP
from continual.refresh.plain.adapters import Adapter, check_single
from continual.refresh.plain.body import Body


def write_mlp(backbone: MLP, adapter: Adapter | None, folder: Path, only: int | None) -> Body:
    """``model.safetensors`` with ``0.weight``, ``0.bias``, ``1.weight`` … of the layers, first to last."""
    weights = _weights(backbone, adapter, only)
    places = sorted({int(name.split(".")[1]) for name in weights})
    renamed = {
        f"{number}.{kind}": weights[f"layers.{place}.{kind}"]
        for number, place in enumerate(places)
        for kind in ("weight", "bias")
    }
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    used = [name for name, kind in ACTIVATIONS.items() for module in backbone.layers if type(module) is kind]
    told = {"hidden": len(places), "activation": used[0] if used else None, "inputs": backbone.inputs}
    return Body("mlp", told)


def write_module(
    module: nn.Module, spec: dict[str, Any], adapter: Adapter | None, folder: Path, only: int | None
) -> Body:
    """``model.safetensors`` with the module's ``state_dict``, under the names that it has without adapters."""
    save_file(_weights(module, adapter, only), folder / "model.safetensors", metadata={"format": "pt"})
    arguments = spec.get("arguments") if spec.get("kind") == "module" else None
    told = {"module": type(module).__module__, "class": type(module).__qualname__, "arguments": arguments}
    return Body("module", told)


def plain_state(module: nn.Module) -> dict[str, Tensor]:
    """The ``state_dict`` of a module under the names that it has without adapters, and without what they add."""
    layers = adapted_layers(module)
    found: dict[str, Tensor] = {}
    for name, tensor in module.state_dict().items():
        layer = next((layer for layer in layers if name.startswith(f"{layer}.")), None)
        rest = "" if layer is None else name.removeprefix(f"{layer}.")
        if layer is None:
            found[name] = tensor
        elif rest.startswith("base_layer."):
            found[f"{layer}.{rest.removeprefix('base_layer.')}"] = tensor
    return found


def _weights(module: nn.Module, adapter: Adapter | None, only: int | None) -> dict[str, Tensor]:
    if adapter is None or not adapter.adapters.apart:
        return _folded(module)
    check_single(adapter, only, "those of a model without a pretrained base are added to its weights")
    with adapter.adapters.only(adapter.adapters.names[only or 0]):
        return _folded(module)


@torch.no_grad()
def _folded(module: nn.Module) -> dict[str, Tensor]:
    """The state with what the active adapters change added to the weights, on the CPU, no tensor shared with another."""
    found = plain_state(module)
    for name, each in adapted_layers(module).items():
        adapted: Any = each
        weight = effective_weight(adapted)
        found[f"{name}.weight"] = weight.T if is_transposed(adapted.get_base_layer()) else weight
    if not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise CompositionError(
            f"the state_dict of {type(module).__name__} holds more than tensors, which safetensors cannot: leave "
            "get_extra_state out of the module, or save it yourself."
        )
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in found.items()}
