"""Whether the closed forms are right for this model: compared with autograd on two rows before anything is summed.

The two rows go through the model, and a random cotangent at the logits of the *first* row alone goes back. Every closed
form must give autograd's gradient of its parameter, and nothing may arrive at the second row. A parameter that is also
used outside its module, a layer with rows on another axis, an overridden forward, rows that see each other: all fail.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from continual.models.lowrank import effective_weight
from continual.parts.part import Context
from continual.parts.penalty.fisher_hooks import Recorder
from continual.table import Batch


@dataclass(frozen=True)
class Layer:
    """An adapted layer whose effective weight is asked for, and the adapter parameters that it depends on."""

    module: nn.Module
    parameters: dict[str, nn.Parameter]


def mistaken(
    context: Context, recorder: Recorder, batch: Batch, parameters: dict[str, nn.Parameter], layers: dict[str, Layer]
) -> set[str]:
    """The keys whose closed form must not be used. One sync of the device.

    Args:
        batch: at least one row.
        parameters: key → parameter with a closed form.
        layers: key → adapted layer; its closed form is right when it gives its adapter's gradients by the chain rule.
    """
    two = {name: column[:2] if len(column) > 1 else torch.cat([column, column]) for name, column in batch.items()}
    with torch.enable_grad(), recorder.record(2):
        logits = context.forward(two).logits
    edges: list[Any] = [call.edge for call in recorder.calls]
    leaves: list[Any] = [*parameters.values(), *(p for layer in layers.values() for p in layer.parameters.values())]
    if not logits.requires_grad:
        return set()
    found = torch.autograd.grad(logits, edges + leaves, _cotangent(logits), allow_unused=True)
    deltas, direct = found[: len(edges)], dict(zip(map(id, leaves), found[len(edges) :], strict=True))

    wrong: set[str] = set()
    tests: list[tuple[str, Tensor]] = []
    compared: list[tuple[str, Tensor, Tensor | None]] = []
    used: list[Tensor | None] = []
    for call, delta in zip(recorder.calls, deltas, strict=True):
        by_rows = len(call.a) == 2 and call.rows == 2
        used.append(delta if by_rows else None)
        if not by_rows:
            wrong.update(call.site.forms)
        elif delta is not None:
            tests += [(key, delta[1:].any()) for key in call.site.forms]
    low = any(delta is not None and delta.dtype != torch.float32 for delta in deltas)
    uses = recorder.uses(used)
    for key in {**parameters, **layers}:
        summed = [form.rows(a, d).sum(0) for form, a, d in uses.get(key, ())]
        total = torch.stack(summed).sum(0) if summed else None
        if key in parameters:
            pairs = [(direct[id(parameters[key])], total)]
        else:
            ours = _through(layers[key], total)
            pairs = [
                (direct[id(p)], gradient) for p, gradient in zip(layers[key].parameters.values(), ours, strict=True)
            ]
        compared += [(key, expected.float(), got) for expected, got in pairs if expected is not None]
    floor = _floor([expected for _, expected, _ in compared]) * (1e-3 if low else 1e-6)
    tests += [(key, _differ(expected, got, 0.1 if low else 0.01, floor)) for key, expected, got in compared]
    if tests:
        verdicts = torch.stack([verdict.to(logits.device) for _, verdict in tests]).tolist()
        wrong.update(key for (key, _), verdict in zip(tests, verdicts, strict=True) if verdict)
    return wrong


def _cotangent(logits: Tensor) -> Tensor:
    """Random for row 0, zero for row 1; always the same numbers."""
    cotangent = torch.zeros_like(logits)
    cotangent[0] = torch.randn(logits[0].shape, generator=torch.Generator().manual_seed(0)).to(logits)
    return cotangent


def _through(layer: Layer, gradient: Tensor | None) -> Iterable[Tensor | None]:
    """The gradients of the adapter's parameters that follow from the gradient (out, in) of the effective weight."""
    if gradient is None:
        return [None] * len(layer.parameters)
    with torch.enable_grad():
        weight = effective_weight(layer.module)
    if not weight.requires_grad or weight.shape != gradient.shape:
        return [None] * len(layer.parameters)
    return torch.autograd.grad(weight, list(layer.parameters.values()), gradient.to(weight.dtype), allow_unused=True)


def _floor(gradients: list[Tensor]) -> Tensor:
    """The largest norm: what is tiny beside it (a bias that attention cancels) is rounding, not gradient."""
    if not gradients:
        return torch.zeros(())
    norms = [torch.linalg.vector_norm(gradient).to(gradients[0].device) for gradient in gradients]
    return torch.stack(norms).max()


def _differ(expected: Tensor, got: Tensor | None, tolerance: float, floor: Tensor) -> Tensor:
    """Whether two gradients differ by more than ``tolerance`` of their norm and by more than ``floor``: bool, 0-d."""
    floor = floor.to(expected.device)
    if got is None:
        missing: Tensor = torch.linalg.vector_norm(expected) > floor
        return missing
    if got.shape != expected.shape:
        return torch.ones((), dtype=torch.bool, device=expected.device)
    scale = torch.maximum(torch.linalg.vector_norm(expected), torch.linalg.vector_norm(got.float()))
    close: Tensor = torch.linalg.vector_norm(expected - got.float()) <= tolerance * scale + floor
    return ~close
