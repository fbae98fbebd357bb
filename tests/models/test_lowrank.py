"""Matrices of PEFT's layers against what the layers compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, AdaLoraModel, LoraConfig, LoraModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from continual.models.lowrank import (
    adapted_layers,
    adapter_bytes,
    adapter_parameters,
    base_weight,
    delta_weight,
    effective_weight,
    fold,
    is_adaptive,
    merge_fold,
    ranks,
    stack_folds,
)

# B rows, I inputs, O outputs
I, O = 6, 5  # noqa: E741
KINDS = ("lora", "rslora", "adalora")
SHAPES = ("linear", "transposed")


def wrapped(kind: str, shape: str, adapters: tuple[str, ...] = ("a",)) -> Any:
    """A model with one adapted layer ``0``, its factors random."""
    model = nn.Sequential(nn.Linear(I, O) if shape == "linear" else Conv1D(O, I), nn.ReLU())
    tuner: Any = None
    for name in adapters:
        common: dict[str, Any] = {"target_modules": "0", "lora_alpha": 7, "fan_in_fan_out": shape == "transposed"}
        if kind == "adalora":
            config: Any = AdaLoraConfig(init_r=4, target_r=2, total_step=10, **common)
        else:
            config = LoraConfig(r=3, use_rslora=kind == "rslora", **common)
        if tuner is None:
            tuner = (AdaLoraModel if kind == "adalora" else LoraModel)(model, config, name)
        else:
            for old in tuner.peft_config.values():
                old.inference_mode = True
            tuner.peft_config[name] = config
            tuner.inject_adapter(model, name)
    generator = torch.Generator().manual_seed(4)
    layer: Any = model[0]
    with torch.no_grad():
        for name in adapters:
            for parameter in adapter_parameters(layer, name).values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    tuner.set_adapter(list(adapters))
    return layer.eval()


def of_outputs(layer: Any) -> torch.Tensor:
    """The weight (O, I) that the layer's outputs show: its answers to unit vectors, less its answer to zero."""
    with torch.no_grad():
        shown: torch.Tensor = (layer(torch.eye(I)) - layer(torch.zeros(1, I))).T
    return shown


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_effective_weight_is_what_the_layer_computes_with(kind: str, shape: str) -> None:
    for adapters in (("a",), ("a", "b")):
        layer = wrapped(kind, shape, adapters)
        torch.testing.assert_close(effective_weight(layer).detach(), of_outputs(layer), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(of_outputs(layer), base_weight(layer))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_effective_weight_follows_what_is_active_switched_off_or_merged(kind: str, shape: str) -> None:
    layer = wrapped(kind, shape, ("a", "b"))
    layer.set_adapter("b")
    torch.testing.assert_close(effective_weight(layer).detach(), of_outputs(layer), rtol=1e-5, atol=1e-5)
    layer.merge()
    torch.testing.assert_close(effective_weight(layer).detach(), of_outputs(layer), rtol=1e-5, atol=1e-5)
    layer.enable_adapters(False)
    expected = effective_weight(layer).detach()
    torch.testing.assert_close(expected, of_outputs(layer), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(effective_weight(layer).detach(), base_weight(layer).detach(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_effective_weight_passes_gradients_to_the_adapter_only(kind: str, shape: str) -> None:
    layer = wrapped(kind, shape)
    inputs_BI = torch.randn(8, I, generator=torch.Generator().manual_seed(1))
    parameters = list(adapter_parameters(layer, "a").values())
    assert len(parameters) == (3 if kind == "adalora" else 2)
    wanted = torch.autograd.grad(layer(inputs_BI).square().sum(), parameters)
    bias = layer.get_base_layer().bias
    found = torch.autograd.grad((inputs_BI @ effective_weight(layer).T + bias).square().sum(), parameters)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert not layer.get_base_layer().weight.requires_grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_fold_merge_and_stack_are_exact(kind: str, shape: str) -> None:
    layer = wrapped(kind, shape, ("a", "b"))
    wanted = of_outputs(layer)
    folds = [fold(layer, name) for name in ("a", "b")]
    for name, (A, B) in zip(("a", "b"), folds, strict=True):
        assert A.shape[1] == I and B.shape[0] == O and A.is_contiguous() and B.is_contiguous()
        torch.testing.assert_close(B @ A, delta_weight(layer, name).detach(), rtol=1e-5, atol=1e-6)
    A, B = stack_folds(folds)
    assert A.shape[0] == sum(part.shape[0] for part, _ in folds)
    torch.testing.assert_close(base_weight(layer).detach() + B @ A, wanted, rtol=1e-5, atol=1e-5)
    plain = layer.get_base_layer()
    for folded in folds:
        merge_fold(plain, folded)
    torch.testing.assert_close(of_outputs(plain), wanted, rtol=1e-5, atol=1e-5)


def test_a_fold_is_a_copy() -> None:
    layer = wrapped("lora", "linear")
    A, B = fold(layer, "a")
    parameters = adapter_parameters(layer, "a")
    before = A.clone(), B.clone()
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.zero_()
    assert torch.equal(A, before[0]) and torch.equal(B, before[1]) and not A.requires_grad


def test_directions_without_a_singular_value_are_left_out() -> None:
    layer = wrapped("adalora", "linear")
    with torch.no_grad():
        adapter_parameters(layer, "a")["lora_E"][[1, 3]] = 0.0
    A, B = fold(layer, "a")
    assert A.shape == (2, I) and B.shape == (O, 2) and ranks({"0": layer}, "a") == {"0": 2}
    torch.testing.assert_close(B @ A, delta_weight(layer, "a").detach())
    with torch.no_grad():
        adapter_parameters(layer, "a")["lora_E"].zero_()
    assert fold(layer, "a")[0].shape == (0, I) and ranks({"0": layer}, "a") == {"0": 0}


def test_what_is_found() -> None:
    layer = wrapped("lora", "linear", ("a", "b"))
    model = nn.Sequential(layer, nn.Linear(O, O))
    assert adapted_layers(model) == {"0": layer}
    assert not is_adaptive(layer) and is_adaptive(wrapped("adalora", "linear"))
    assert ranks({"0": layer}, "b") == {"0": 3} and ranks({"0": layer}, "c") == {}
    assert adapter_bytes([layer], ["a", "b"]) == 2 * 4 * 3 * (I + O)
    assert adapted_layers(nn.Linear(2, 2)) == {}
