"""O-LoRA: the adapter of a new experience is kept orthogonal to the frozen ones of the experiences before it.

Source: Wang et al. 2023 (arXiv 2310.14152). The rows of A span the subspace that an update reads its inputs from, and for
every adapted layer the overlaps ``O_i = A_t A_iᵀ`` of the new A_t with each earlier A_i are added to the loss,

    strength · Σ_layers Σ_{i<t} Σ_{j,k} |O_i[j,k]|        ``absolute``
    strength · Σ_layers Σ_{i<t} Σ_{j,k} O_i[j,k]²         ``squared``

together with ``shrink`` · Σ ‖p‖₂ over the matrices p of the new adapter. The paper's equation squares; the program that its
figures and its λ₁ = 0.5 come from sums absolute values, and its λ₂ weighs norms that are not squared. So ``absolute`` is
the default, and λ₁ and λ₂ of the published scripts are ``strength`` and ``shrink`` as they stand.

Departures: the gradient, which has a closed form, is added after backward instead of a term to the loss; directions that
an earlier AdaLoRA adapter has pruned count for nothing.

Letters: L layers of one shape, r rank of the new adapter, R rank of all earlier ones together, D inputs of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from continual.errors import CompositionError
from continual.models.lowrank import adapted_layers, adapter_parameters
from continual.parts.part import Context, Part, Slot
from continual.parts.penalty.springs import add_to_gradients
from continual.spec import Spec
from continual.state import tensor_bytes
from continual.streams.experience import Experience


class OrthogonalSettings(Spec):
    """Settings of :class:`Orthogonal`.

    Attributes:
        strength: λ₁ ≥ 0 of the overlaps; 0 leaves them alone.
        form: how overlaps are summed.
        shrink: λ₂ ≥ 0 of the norms of the new adapter's matrices.
    """

    kind: Literal["orthogonal"] = "orthogonal"
    strength: float = Field(default=0.5, ge=0)
    form: Literal["absolute", "squared"] = "absolute"
    shrink: float = Field(default=0.0, ge=0)


@dataclass(frozen=True)
class _Group:
    """Layers of one shape: the new A of each, (r, D), and the rows of their earlier ones, float32 (L, R, D)."""

    new: list[nn.Parameter]
    old: Tensor

    def overlaps(self) -> Tensor:
        """A Aᵀ of the new rows and the earlier ones, float32 (L, r, R)."""
        new_LrD = torch.stack([parameter.float() for parameter in self.new])
        return new_LrD @ self.old.mT


class Orthogonal(Part):
    """Pulls the adapter that trains out of the subspaces of the frozen ones, which must still be in the model.

    In the first experience it does nothing but shrink.
    """

    slot: ClassVar[Slot] = "penalty"
    Settings: ClassVar[type[Spec]] = OrthogonalSettings
    needs_stacking: ClassVar[bool] = True
    settings: OrthogonalSettings

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._groups: list[_Group] | None = None
        self._trained: list[nn.Parameter] = []

    def attach(self, context: Context) -> None:
        super().attach(context)
        self._release()

    def begin(self, context: Context, experience: Experience) -> None:
        """Refuse what cannot work before anything is trained.

        Raises:
            CompositionError: no layer carries an adapter, or one adapter trains on through all experiences.
        """
        self._release()
        if not adapted_layers(context.model) or getattr(context.model, "adapter_replaced", False) is not True:
            raise CompositionError(
                f"{self.name} compares a new adapter with those before it, and this model has no adapter of its own for "
                "each experience: set adapter to kind 'lora' with across_tasks 'stack'."
            )

    @torch.no_grad()
    def edit_gradients(self) -> None:
        """Add the gradient of both terms; no sync of the device."""
        strength, shrink = self.settings.strength, self.settings.shrink
        if self._groups is None:
            self._groups, self._trained = self._line_up()
        for group in self._groups if strength else []:
            overlaps_LrR = group.overlaps()
            slope_LrR = overlaps_LrR.sign() if self.settings.form == "absolute" else 2 * overlaps_LrR
            add_to_gradients(group.new, list((strength * slope_LrR @ group.old).unbind(0)))
        if shrink and self._trained:
            norms = [torch.linalg.vector_norm(parameter) for parameter in self._trained]
            rates = [torch.where(norm > 0, shrink / norm, 0.0) for norm in norms]
            add_to_gradients(self._trained, [p * rate for p, rate in zip(self._trained, rates, strict=True)])

    def end(self, context: Context, experience: Experience) -> None:
        """Give up the copies of the frozen adapters."""
        self._release()

    @torch.no_grad()
    def value(self) -> Tensor:
        """Both terms now, a scalar tensor, no sync."""
        groups, trained = self._line_up()
        total = torch.zeros((), device=self.context.device)
        for group in groups:
            overlaps_LrR = group.overlaps()
            sizes_LrR = overlaps_LrR.abs() if self.settings.form == "absolute" else overlaps_LrR.square()
            total += self.settings.strength * sizes_LrR.sum()
        for parameter in trained:
            total += self.settings.shrink * torch.linalg.vector_norm(parameter)
        return total

    def nbytes(self) -> int:
        """Bytes of the copies that it holds while an experience is trained on."""
        return tensor_bytes([group.old for group in self._groups or []])

    def _release(self) -> None:
        self._groups, self._trained = None, []

    def _line_up(self) -> tuple[list[_Group], list[nn.Parameter]]:
        """Layers of one shape together, and every parameter of the adapters that train."""
        found: dict[tuple[torch.Size, ...], tuple[list[nn.Parameter], list[Tensor]]] = {}
        trained: list[nn.Parameter] = []
        for layer in adapted_layers(self.context.model).values():
            factors: Any = layer.lora_A
            adapters = [adapter_parameters(layer, name) for name in factors]
            new = [own for own in adapters if own["lora_A"].requires_grad]
            trained += [parameter for own in new for parameter in own.values()]
            old = [_rows(own) for own in adapters if not own["lora_A"].requires_grad]
            if new and old:
                old_RD = torch.cat(old)
                news, olds = found.setdefault((new[-1]["lora_A"].shape, old_RD.shape), ([], []))
                news.append(new[-1]["lora_A"])
                olds.append(old_RD)
        return [_Group(news, torch.stack(olds)) for news, olds in found.values()], trained


def _rows(adapter: dict[str, nn.Parameter]) -> Tensor:
    """The directions that a frozen adapter reads, float32 (r, D)."""
    A_rD = adapter["lora_A"].detach().float()
    return A_rD[adapter["lora_E"].detach().flatten() != 0] if "lora_E" in adapter else A_rD
