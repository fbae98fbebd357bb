"""What penalties share: one quadratic over what trains, whose pull is added to the gradients after backward.

Nothing is built into the graph of the loss, and time and memory do not grow with the number of experiences
(:mod:`~continual.parts.penalty.quadratic`). In the space ``weights`` the quadratic holds the effective weights of
adapted layers, and its pull reaches their adapters by the chain rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from continual.errors import CompositionError, TrainingError
from continual.models.lowrank import adapted_layers, effective_weight, is_adaptive
from continual.parts.part import Context
from continual.parts.penalty.fisher import Space, tracked
from continual.parts.penalty.quadratic import Quadratic

WantedSpace = Literal["auto", "parameters", "weights"]
"""``parameters`` holds the trainable parameters; ``weights`` the effective weights of adapted layers, which stay comparable
when an adapter is merged or replaced between experiences, and the parameters of no adapter; ``auto`` takes ``weights``
where that happens, or where the adapter is AdaLoRA."""


@dataclass(frozen=True)
class _Held:
    """What trains now and has a curvature: plain parameters, adapted layers, and the parameters of their adapters."""

    names: list[str]
    parameters: list[nn.Parameter]
    layer_names: list[str]
    layers: list[nn.Module]
    adapter: list[nn.Parameter]


class Springs:
    """A quadratic and what it holds.

    A parameter that no longer trains is left alone; one that has grown along its first axis (a head) is held in its old
    rows.

    Attributes:
        quadratic: the curvature and the anchor.
        space: what it holds on to; None before :meth:`settle`.
    """

    def __init__(self) -> None:
        self.quadratic = Quadratic()
        self.space: Space | None = None
        self._held: _Held | None = None

    def release(self) -> None:
        """What trains may have changed: line it up anew at the next step."""
        self._held = None

    def settle(self, wanted: WantedSpace, model: nn.Module) -> Space:
        """The space, decided once, when there is something to hold."""
        if self.space is None:
            self.space = _space(wanted, model)
        return self.space

    def points(self, context: Context) -> dict[str, Tensor]:
        """What trains now, by name: parameters, and effective weights without a graph."""
        parameters, layers = tracked(context, self.space or "parameters")
        with torch.no_grad():
            theta: dict[str, Tensor] = {name: effective_weight(layer.module) for name, layer in layers.items()}
        theta.update(parameters)
        return theta

    def pull(self, context: Context, strength: float) -> None:
        """Add ``strength * A (theta - mu)`` to the gradients; no sync of the device."""
        if not self.quadratic.curvature or not strength:
            return
        held = self._hold(context)
        if held.names:
            add_to_gradients(held.parameters, self.quadratic.pull(held.names, held.parameters, strength))
        if held.layers:
            with torch.enable_grad():
                weights = [effective_weight(layer) for layer in held.layers]
            pull = self.quadratic.pull(held.layer_names, [weight.detach() for weight in weights], strength)
            pull = [one.to(weight.dtype) for one, weight in zip(pull, weights, strict=True)]
            add_to_gradients(held.adapter, torch.autograd.grad(weights, held.adapter, pull, allow_unused=True))

    def value(self, context: Context, strength: float) -> Tensor:
        """``strength/2 (sum A (theta - mu)^2 + c)`` of what trains now, a scalar tensor, no sync."""
        held = self._hold(context)
        with torch.no_grad():
            theta = [*held.parameters, *map(effective_weight, held.layers)]
            return 0.5 * strength * self.quadratic.value([*held.names, *held.layer_names], theta)

    def state_dict(self) -> dict[str, Any]:
        return {"space": self.space, "quadratic": self.quadratic.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.space = state["space"]
        self.quadratic.load_state_dict(state["quadratic"])
        self.release()

    def _hold(self, context: Context) -> _Held:
        """Line up what trains now with what is remembered; once for each experience."""
        if self._held is None:
            parameters, layers = tracked(context, self.space or "parameters")
            known = self.quadratic.curvature
            plain = {name: parameter for name, parameter in parameters.items() if name in known}
            adapted = {name: layer for name, layer in layers.items() if name in known}
            with torch.no_grad():
                for name, parameter in plain.items():
                    self.quadratic.grown(name, parameter)
                for name, layer in adapted.items():
                    self.quadratic.grown(name, effective_weight(layer.module))
            self._held = _Held(
                names=list(plain),
                parameters=list(plain.values()),
                layer_names=list(adapted),
                layers=[layer.module for layer in adapted.values()],
                adapter=[p for layer in adapted.values() for p in layer.parameters.values()],
            )
        return self._held


def check_space(wanted: WantedSpace, model: nn.Module) -> None:
    """Raise :class:`CompositionError` where nothing can be held in the space asked for."""
    if getattr(model, "router", None) is not None:
        raise CompositionError(
            "every experience has an adapter of its own, which later ones do not change, so there is nothing for a penalty to "
            "hold: leave it out, or set adapter.across_tasks to 'continue' or 'stack'."
        )
    if wanted == "weights" and not adapted_layers(model):
        raise CompositionError(
            "the penalty's space is 'weights' and the model has no adapted layer: add an adapter, or set space to "
            "'parameters'."
        )


def check_lasting(name: str, model: nn.Module) -> None:
    """Raise :class:`CompositionError` where parameters live for one experience only: no path leads from one to the next."""
    if adapted_layers(model) and getattr(model, "adapter_replaced", False) is True:
        raise CompositionError(
            f"{name} follows the path of each parameter, and this adapter is replaced at every experience: set the "
            "adapter to kind 'lora' with across_tasks 'continue', or take penalty 'ewc', 'mas' or 'l2', which can hold "
            "effective weights."
        )


def check_finite(what: str, tensors: dict[str, Tensor]) -> None:
    """Raise :class:`TrainingError` where a curvature is not finite, before it is added to anything. One sync."""
    if not tensors:
        return
    device = next(iter(tensors.values())).device
    finite = torch.stack([torch.isfinite(tensor).all().to(device) for tensor in tensors.values()]).tolist()
    bad = [name for name, fine in zip(tensors, finite, strict=True) if not fine]
    if bad:
        raise TrainingError(
            f"the {what} of '{bad[0]}' is not finite ({len(bad)} of {len(tensors)} tensors), and it must be to hold "
            "anything: look at the inputs of this experience, lower training.lr, or train in fp32."
        )


@torch.no_grad()
def add_to_gradients(parameters: Sequence[nn.Parameter], what: Sequence[Tensor | None]) -> None:
    """Add to ``.grad``, which is made where there was none; None adds nothing."""
    into: list[Tensor] = []
    added: list[Tensor] = []
    for parameter, one in zip(parameters, what, strict=True):
        if one is None:
            continue
        if parameter.grad is None:
            parameter.grad = one.to(parameter.dtype)
        else:
            into.append(parameter.grad)
            added.append(one)
    if into:
        torch._foreach_add_(into, added)


def _space(wanted: WantedSpace, model: nn.Module) -> Space:
    if wanted != "auto":
        return wanted
    layers = adapted_layers(model)
    replaced = getattr(model, "adapter_replaced", False) is True
    return "weights" if layers and (replaced or any(map(is_adaptive, layers.values()))) else "parameters"
