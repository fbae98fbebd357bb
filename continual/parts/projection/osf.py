"""Orthogonal subspace fine-tuning: whole weights train, and their leading singular directions stay where they were.

Source: Nayak et al. 2025, "Sculpting Subspaces" (arXiv 2504.07097). At the beginning of an experience every weight W₀ of a
linear layer is decomposed; its ``share`` of leading directions, U (O, k) and V (I, k) with singular values s, holds what was
learnt before, and the change of the weight stays orthogonal to both sides of it:

    W − W₀ = (1 − U Uᵀ)(W − W₀)(1 − V Vᵀ),   that is   Uᵀ W = s Vᵀ   and   W V = U s   at every step.

Departures. The paper trains the factors of the other directions and projects their gradients, which AdamW does not
preserve: what it makes of a projected gradient leaks into U and V. Here W itself trains, gradients are projected so that
clipping and second moments see what will be used, and after the optimiser's step W is brought back onto the two
equations above, which are about W and not about the step: nothing leaks whatever the optimiser, its weight decay and its
momentum, errors do not add up, and no copy of the weights is kept. ``share`` is the same for every layer: the paper's
importance of a layer, the cosine of its input and its output, does not exist where these differ in size.

Letters: O outputs of a layer, I inputs, k protected directions.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from continual.errors import CompositionError
from continual.models.lowrank import base_weight, is_transposed
from continual.models.output import Output
from continual.parts.adapter.common import freeze, transformer_of
from continual.parts.adapter.lora import some_target
from continual.parts.adapter.targets import Target, linear_layers, resolve
from continual.parts.part import Context, Part, Slot
from continual.spec import Spec
from continual.streams.experience import Experience
from continual.table import Batch

Directions = tuple[Tensor, Tensor, Tensor]
"""U (O, k), s (k,) and V (I, k), float32."""


class OSFSettings(Spec):
    """Settings of :class:`OSF`.

    Attributes:
        share: of the singular directions of each weight that are protected, in (0, 1), rounded down to a whole number,
            one at least.
        base: whether the weights before the first experience are ``protected`` too; ``free`` trains all of the model
            there. ``auto`` protects those of a pretrained base.
        rest: what else the backbone has (biases, norms, embeddings, layers that are no ``target``), while weights are
            protected: ``frozen``, or left to ``train``.
        target: ``all-linear``, or names of linear layers (whole, or the end of a name as ``q_proj``).
    """

    kind: Literal["osf"] = "osf"
    share: float = Field(default=0.5, gt=0, lt=1)
    base: Literal["auto", "protected", "free"] = "auto"
    rest: Literal["frozen", "train"] = "frozen"
    target: Target = "all-linear"

    @field_validator("target")
    @classmethod
    def _some_target(cls, target: Target) -> Target:
        return some_target(target)


class OSF(Part):
    """Keeps the leading singular directions of every weight as the last experience left them.

    Attributes:
        protected: by name of the layer in the transformer; empty while everything is free.
    """

    slot: ClassVar[Slot] = "projection"
    Settings: ClassVar[type[Spec]] = OSFSettings
    excludes: ClassVar[dict[str, str]] = {
        "projection": "the second projection would undo the first, so keep one.",
        "replay/gaussian": "it trains the weights below the features whose Gaussians are kept: leave one of the two out.",
        "replay/feature-vae": "it trains the weights below the features that the generator makes: leave one of the two out.",
        "adapter": "it trains the weights themselves, which an adapter freezes: leave one of the two out.",
    }
    settings: OSFSettings

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.protected: dict[str, Directions] = {}
        self._met = 0
        self._weights: list[tuple[nn.Parameter, bool, Directions]] | None = None
        self._stepped = False

    def attach(self, context: Context) -> None:
        super().attach(context)
        self._weights = None

    def begin(self, context: Context, experience: Experience) -> None:
        """Decompose every weight as it is now, and freeze the rest.

        Raises:
            CompositionError: no layer matches ``target``, none of them trains, or a weight is not float32.
        """
        transformer = transformer_of(context.model)
        names = resolve(transformer, self.settings.target)
        layers = {name: layer for name, layer in linear_layers(transformer).items() if name in names}
        self._check(layers)
        base = self.settings.base
        pretrained = getattr(context.model, "base_sha256", None) is not None
        if self._met or base == "protected" or (base == "auto" and pretrained):
            self.protected = {
                name: _directions(base_weight(layer), self.settings.share) for name, layer in layers.items()
            }
            self._freeze_rest(context.model)
        self._weights = None
        self._met += 1

    @torch.no_grad()
    def edit_gradients(self) -> None:
        """Take what lies in the protected directions out of the gradients; no sync of the device."""
        for parameter, transposed, directions in self._lined_up():
            if parameter.grad is not None:
                gradient_OI = parameter.grad.T if transposed else parameter.grad
                U_Ok, _, V_Ik = directions
                gradient_OI -= _inside(U_Ok.T @ gradient_OI, gradient_OI @ V_Ik, directions)
        self._stepped = True

    @torch.no_grad()
    def after_step(self, batch: Batch, output: Output) -> None:
        """Bring the protected directions back to what they were, once for each step."""
        if not self._stepped:
            return
        self._stepped = False
        for parameter, transposed, directions in self._lined_up():
            weight_OI = parameter.T if transposed else parameter
            U_Ok, s_k, V_Ik = directions
            left_kI = U_Ok.T @ weight_OI - s_k[:, None] * V_Ik.T
            weight_OI -= _inside(left_kI, weight_OI @ V_Ik - U_Ok * s_k, directions)

    def state_dict(self) -> dict[str, Any]:
        return {
            "met": self._met,
            "protected": {name: {"U": U, "s": s, "V": V} for name, (U, s, V) in self.protected.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with these directions; what was frozen is frozen again."""
        self._met = int(state["met"])
        self.protected = {
            name: (one["U"].clone(), one["s"].clone(), one["V"].clone()) for name, one in state["protected"].items()
        }
        self._weights = None
        if self.protected:
            self._freeze_rest(self.context.model)

    def _check(self, layers: dict[str, nn.Module]) -> None:
        for name, layer in layers.items():
            weight = base_weight(layer)
            if weight.dtype != torch.float32:
                raise CompositionError(
                    f"the weight of '{name}' is {weight.dtype}, which rounds more than {self.name} protects: load the model "
                    "in float32 (training.precision may be bf16)."
                )
            if not _parameter(layer).requires_grad:
                raise CompositionError(
                    f"{self.name} trains the weight of '{name}', which is frozen: set backbone: train, or leave {self.name} "
                    "out."
                )

    def _freeze_rest(self, model: nn.Module) -> None:
        if self.settings.rest == "frozen":
            layers = linear_layers(transformer_of(model))
            freeze(model)
            for name in self.protected:
                _parameter(layers[name]).requires_grad_(True)

    def _lined_up(self) -> list[tuple[nn.Parameter, bool, Directions]]:
        """The weights that are protected, whether they are kept as (I, O), and the directions, beside them on the device."""
        if self._weights is None:
            layers = linear_layers(transformer_of(self.context.model)) if self.protected else {}
            for name, (U, s, V) in self.protected.items():
                device = _parameter(layers[name]).device
                self.protected[name] = U.to(device), s.to(device), V.to(device)
            self._weights = [
                (_parameter(layers[name]), is_transposed(layers[name]), directions)
                for name, directions in self.protected.items()
            ]
        return self._weights


def _parameter(layer: nn.Module) -> nn.Parameter:
    weight: Any = layer.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _directions(weight_OI: Tensor, share: float) -> Directions:
    """The leading directions of a weight, decomposed in float64, so that s and the weight agree to float32's last bits."""
    U, s, Vh = torch.linalg.svd(weight_OI.detach().double(), full_matrices=False)
    k = max(1, int(share * len(s)))
    U_Ok, s_k, V_Ik = U[:, :k].float(), s[:k].float(), Vh[:k].T.float()
    return U_Ok.contiguous(), s_k.contiguous(), V_Ik.contiguous()


def _inside(left_kI: Tensor, right_Ok: Tensor, directions: Directions) -> Tensor:
    """The part (O, I) of a matrix M that lies in the directions, from Uᵀ M and M V: U Uᵀ M + M V Vᵀ − U Uᵀ M V Vᵀ."""
    U_Ok, _, V_Ik = directions
    return U_Ok @ left_kI + (right_Ok - U_Ok @ (left_kI @ V_Ik)) @ V_Ik.T
