"""What low-rank adapter layers do to the weights that they wrap, in matrices.

Knows the layers that PEFT puts in place of linear ones, LoRA (Hu et al. 2021, arXiv 2106.09685) and AdaLoRA (Zhang et
al. 2023, arXiv 2303.10512), and nothing of parts. A layer with weight W (out, in) and active adapters a computes with

    W + Σ_a s_a B_a A_a                             LoRA, s = alpha / r (alpha / √r with rslora)
    W + Σ_a s_a B_a diag(E_a) A_a / (ranknum_a + 1e-5)   AdaLoRA, s = alpha

Transposed layers (``Conv1D`` of GPT-2 keeps W as (in, out)) are turned around here, so that everything that leaves this
file is (out, in).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Fold = tuple[Tensor, Tensor]
"""A (r, in) and B (out, r), float32, with B @ A the exact change of the weight."""

_FACTORS = ("lora_A", "lora_B", "lora_E")


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of ``model`` that carry LoRA or AdaLoRA adapters, by module name, in the model's order."""
    if "peft" not in sys.modules:
        return {}
    from peft.tuners.adalora import SVDLinear
    from peft.tuners.lora import Linear

    return {name: module for name, module in model.named_modules() if isinstance(module, Linear | SVDLinear)}


def is_adaptive(layer: nn.Module) -> bool:
    """Whether the layer's adapters are AdaLoRA's: A, B and singular values E."""
    return hasattr(layer, "lora_E")


def adapter_parameters(layer: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """One adapter's parameters in a layer: ``lora_A`` (r, in), ``lora_B`` (out, r), with AdaLoRA ``lora_E`` (r, 1)."""
    found: dict[str, nn.Parameter] = {}
    for factor in _FACTORS:
        container: Any = getattr(layer, factor, {})
        if adapter in container:
            entry: Any = container[adapter]
            found[factor] = getattr(entry, "weight", entry)
    return found


def delta_weight(layer: nn.Module, adapter: str) -> Tensor:
    """What one adapter adds to the weight, (out, in), differentiable in the adapter's parameters."""
    A, B = _factors(layer, adapter)
    return B @ A


def effective_weight(layer: nn.Module) -> Tensor:
    """The weight that the layer computes with now, (out, in), differentiable in the parameters of its active adapters.

    Honours what PEFT keeps track of: an adapter that is merged is in the base weight already and is not added twice
    (PEFT then adds none); with adapters switched off the base weight alone is given.
    """
    peft_layer: Any = layer
    weight = base_weight(layer)
    if peft_layer.disable_adapters:
        for adapter in peft_layer.merged_adapters:
            weight = weight - delta_weight(layer, adapter).to(weight.dtype)
    elif not peft_layer.merged:
        for adapter in peft_layer.active_adapters:
            if adapter in peft_layer.lora_A:
                weight = weight + delta_weight(layer, adapter).to(weight.dtype)
    return weight


def base_weight(layer: nn.Module) -> Tensor:
    """The weight of the wrapped layer (or of a plain one), as a view (out, in)."""
    base = _base_layer(layer)
    weight: Tensor = base.weight
    return weight.T if is_transposed(base) else weight


def is_transposed(layer: nn.Module) -> bool:
    """Whether a plain layer keeps its weight as (in, out)."""
    return type(layer).__name__ == "Conv1D"


@torch.no_grad()
def fold(layer: nn.Module, adapter: str) -> Fold:
    """One adapter as plain factors with no scaling beside them: ``B @ A`` is exactly what it adds to the weight.

    Of AdaLoRA the singular values go into A and the directions with E = 0 are left out, so r may be 0.
    """
    A, B = _factors(layer, adapter)
    if is_adaptive(layer):
        kept = adapter_parameters(layer, adapter)["lora_E"].flatten() != 0
        A, B = A[kept], B[:, kept]
    return _own(A), _own(B)


def stack_folds(folds: Sequence[Fold]) -> Fold:
    """The sum of several changes of one weight, exact: factors side by side, so the ranks add up."""
    assert folds, "at least one fold"
    return torch.cat([A for A, _ in folds]), torch.cat([B for _, B in folds], dim=1)


@torch.no_grad()
def merge_fold(layer: nn.Module, folded: Fold) -> None:
    """Add ``B @ A`` to the weight of the wrapped (or plain) layer, in place.

    The product is formed on the CPU whatever the device, so that the same folds give the same bits everywhere.
    """
    A, B = folded
    weight = base_weight(layer)
    weight += (B.cpu() @ A.cpu()).to(device=weight.device, dtype=weight.dtype)


def ranks(layers: dict[str, nn.Module], adapter: str) -> dict[str, int]:
    """Rank of one adapter in each layer; with AdaLoRA the directions whose E is not 0. One sync of the device."""
    names = [name for name, layer in layers.items() if adapter_parameters(layer, adapter)]
    counts = [_rank(layers[name], adapter) for name in names]
    return dict(zip(names, torch.stack(counts).tolist(), strict=True)) if counts else {}


def adapter_bytes(layers: Iterable[nn.Module], adapters: Sequence[str]) -> int:
    """Bytes of the parameters of these adapters."""
    return sum(
        parameter.numel() * parameter.element_size()
        for layer in layers
        for adapter in adapters
        for parameter in adapter_parameters(layer, adapter).values()
    )


def _factors(layer: nn.Module, adapter: str) -> Fold:
    peft_layer: Any = layer
    parameters = adapter_parameters(layer, adapter)
    A, B, scaling = parameters["lora_A"], parameters["lora_B"], peft_layer.scaling[adapter]
    if is_adaptive(layer):
        return A * parameters["lora_E"] * (scaling / (peft_layer.ranknum[adapter] + 1e-5)), B
    return A, B * scaling


def _own(factor: Tensor) -> Tensor:
    return factor.detach().float().clone(memory_format=torch.contiguous_format)


def _rank(layer: nn.Module, adapter: str) -> Tensor:
    parameters = adapter_parameters(layer, adapter)
    if "lora_E" in parameters:
        return torch.count_nonzero(parameters["lora_E"].detach())
    return torch.tensor(parameters["lora_A"].shape[0], device=parameters["lora_A"].device)


def _base_layer(layer: nn.Module) -> Any:
    peft_layer: Any = layer
    return peft_layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
