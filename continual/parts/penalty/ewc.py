"""Elastic weight consolidation: weights that earlier tasks depend on are held by springs as stiff as their Fisher.

``loss + strength/2 sum_t sum_p F_t,p (theta_p - theta*_t,p)^2`` (Kirkpatrick et al. 2017, arXiv 1612.00796, eq. 3),
all tasks in one quadratic (:mod:`~continual.parts.penalty.quadratic`), so that neither time nor memory grows with their
number. ``mode: online`` is the variant of Schwarz et al. 2018 (arXiv 1805.06370): one decaying Fisher, anchored at the
latest weights. Its gradient is added after backward instead of a term to the loss, so nothing is built into the graph.

The Fisher is exact (:mod:`~continual.parts.penalty.fisher`); a strength from a program that squares a batch's mean
gradient must be found anew. EWC by itself is no protection in class-incremental learning (van de Ven & Tolias 2019,
arXiv 1904.07734): combine it with replay there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from continual.errors import CompositionError, TrainingError
from continual.models.lowrank import adapted_layers, effective_weight, is_adaptive
from continual.objective import Objective
from continual.parts.part import Context, Part, Slot
from continual.parts.penalty.fisher import Space, diagonal_fisher, tracked
from continual.parts.penalty.fisher_labels import Labels, check_labels
from continual.parts.penalty.quadratic import Quadratic
from continual.spec import Spec
from continual.streams.experience import Experience


class EWCSettings(Spec):
    """Settings of :class:`EWC`.

    Attributes:
        strength: lambda ≥ 0; 0 switches the pull off.
        labels: which labels the Fisher is taken at: ``true``, ``sampled`` from the model, ``predicted``, or the exact
            expectation over ``all`` (classification only).
        rows: how many rows of an experience the Fisher is computed from, drawn at random; null for every row.
        mode: ``all`` keeps every task's anchor exactly; ``online`` keeps the latest.
        decay: gamma of ``online``, what is left of the old Fisher at each task, in (0, 1]; null for 1.
        space: ``parameters`` holds the trainable parameters; ``weights`` the effective weights of adapted layers, which
            stay comparable when an adapter is merged or replaced between tasks, and the parameters of no adapter;
            ``auto`` takes ``weights`` where that happens, or where the adapter is AdaLoRA.
    """

    kind: Literal["ewc"] = "ewc"
    strength: float = Field(default=1.0, ge=0)
    labels: Labels = "sampled"
    rows: int | None = Field(default=None, ge=1)
    mode: Literal["all", "online"] = "all"
    decay: float | None = Field(default=None, gt=0, le=1)
    space: Literal["auto", "parameters", "weights"] = "auto"

    @model_validator(mode="after")
    def _decay_is_read(self) -> EWCSettings:
        if self.decay is not None and self.mode == "all":
            raise ValueError(
                "decay belongs to mode 'online' and means nothing with mode 'all': set mode, or leave decay out"
            )
        return self


@dataclass(frozen=True)
class _Held:
    """What trains now and has a curvature: plain parameters, adapted layers, and the parameters of their adapters."""

    names: list[str]
    parameters: list[nn.Parameter]
    layer_names: list[str]
    layers: list[nn.Module]
    adapter: list[nn.Parameter]


class EWC(Part):
    """Pulls weights back to where earlier tasks left them, by how much those tasks depend on each.

    Before the end of the first experience it does nothing. A parameter that no longer trains is left alone; a parameter
    that has grown along its first axis (a head) is held in its old rows.
    """

    slot: ClassVar[Slot] = "penalty"
    Settings: ClassVar[type[Spec]] = EWCSettings
    settings: EWCSettings

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._quadratic = Quadratic()
        self._space: Space | None = None
        self._held: _Held | None = None

    def attach(self, context: Context) -> None:
        super().attach(context)
        self._held = None

    def check_objective(self, objective: Objective) -> None:
        """Refuse labels that mean nothing for the objective."""
        check_labels(self.settings.labels, objective)

    def begin(self, context: Context, experience: Experience) -> None:
        """Refuse what cannot work before anything is trained.

        Raises:
            CompositionError: the labels mean nothing for the objective, or there is no adapted layer for ``weights``.
        """
        self._held = None
        check_labels(self.settings.labels, context.objective)
        if self.settings.space == "weights" and not adapted_layers(context.model):
            raise CompositionError(
                "the penalty's space is 'weights' and the model has no adapted layer: add an adapter, or set space to "
                "'parameters'."
            )

    def edit_gradients(self) -> None:
        """Add ``strength * A (theta - mu)`` to the gradients; no sync of the device."""
        if not self._quadratic.curvature or not self.settings.strength:
            return
        held = self._hold()
        strength = self.settings.strength
        if held.names:
            _add_to_gradients(held.parameters, self._quadratic.pull(held.names, held.parameters, strength))
        if held.layers:
            with torch.enable_grad():
                weights = [effective_weight(layer) for layer in held.layers]
            pull = self._quadratic.pull(held.layer_names, [weight.detach() for weight in weights], strength)
            pull = [one.to(weight.dtype) for one, weight in zip(pull, weights, strict=True)]
            _add_to_gradients(held.adapter, torch.autograd.grad(weights, held.adapter, pull, allow_unused=True))

    def end(self, context: Context, experience: Experience) -> None:
        """Compute the Fisher of the experience and add its springs.

        Raises:
            TrainingError: a Fisher that is not finite.
        """
        if self._space is None:
            self._space = _space(self.settings.space, context.model)
        randomness = context.randomness
        batches = context.batches(experience.train, limit=self.settings.rows, generator=randomness.generator("fisher"))
        fisher = diagonal_fisher(
            context,
            batches,
            labels=self.settings.labels,
            space=self._space,
            generator=randomness.generator("fisher-labels"),
        )
        _check_finite(fisher)
        parameters, layers = tracked(context, self._space)
        with torch.no_grad():
            theta: dict[str, Tensor] = {name: effective_weight(layer.module) for name, layer in layers.items()}
        theta.update(parameters)
        if self.settings.mode == "all":
            self._quadratic.add(fisher, theta)
        else:
            self._quadratic.decay_and_move(fisher, theta, 1.0 if self.settings.decay is None else self.settings.decay)
        self._held = None

    def value(self) -> Tensor:
        """The penalty now, of what trains now: ``strength/2 (sum A (theta - mu)^2 + c)``, a scalar tensor, no sync."""
        held = self._hold()
        with torch.no_grad():
            theta = [*held.parameters, *map(effective_weight, held.layers)]
            return 0.5 * self.settings.strength * self._quadratic.value([*held.names, *held.layer_names], theta)

    def state_dict(self) -> dict[str, Any]:
        return {"space": self._space, "quadratic": self._quadratic.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._space = state["space"]
        self._quadratic.load_state_dict(state["quadratic"])
        self._held = None

    def _hold(self) -> _Held:
        """Line up what trains now with what is remembered; once for each experience."""
        if self._held is None:
            parameters, layers = tracked(self.context, self._space or "parameters")
            known = self._quadratic.curvature
            plain = {name: parameter for name, parameter in parameters.items() if name in known}
            adapted = {name: layer for name, layer in layers.items() if name in known}
            with torch.no_grad():
                for name, parameter in plain.items():
                    self._quadratic.grown(name, parameter)
                for name, layer in adapted.items():
                    self._quadratic.grown(name, effective_weight(layer.module))
            self._held = _Held(
                names=list(plain),
                parameters=list(plain.values()),
                layer_names=list(adapted),
                layers=[layer.module for layer in adapted.values()],
                adapter=[p for layer in adapted.values() for p in layer.parameters.values()],
            )
        return self._held


def _space(wanted: Literal["auto", "parameters", "weights"], model: nn.Module) -> Space:
    if wanted != "auto":
        return wanted
    layers = adapted_layers(model)
    replaced = getattr(model, "adapter_replaced", False) is True
    return "weights" if layers and (replaced or any(map(is_adaptive, layers.values()))) else "parameters"


def _check_finite(fisher: dict[str, Tensor]) -> None:
    if not fisher:
        return
    device = next(iter(fisher.values())).device
    finite = torch.stack([torch.isfinite(tensor).all().to(device) for tensor in fisher.values()]).tolist()
    bad = [name for name, fine in zip(fisher, finite, strict=True) if not fine]
    if bad:
        raise TrainingError(
            f"the Fisher of '{bad[0]}' is not finite ({len(bad)} of {len(fisher)} tensors): a Fisher must be finite; "
            "look at the inputs of this experience, lower training.lr, or train in fp32."
        )


@torch.no_grad()
def _add_to_gradients(parameters: list[nn.Parameter], pull: Any) -> None:
    into: list[Tensor] = []
    what: list[Tensor] = []
    for parameter, one in zip(parameters, pull, strict=True):
        if one is None:
            continue
        if parameter.grad is None:
            parameter.grad = one.to(parameter.dtype)
        else:
            into.append(parameter.grad)
            what.append(one)
    if into:
        torch._foreach_add_(into, what)
