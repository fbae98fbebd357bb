"""Closed forms of per-row gradients: what a module's input and its output's gradient say about its parameters.

With ``a`` the input of a module and ``d`` the gradient of the loss at its output, the gradient of one row b is
``sum_t d_bt a_bt^T`` for a linear layer's weight (Goodfellow 2015, arXiv 1510.01799), and as short for the others here.
A form may be proposed for a module that it does not fit: :mod:`continual.parts.penalty.fisher_check` compares every
form with autograd before it is used.

Letters: B rows, T tokens (everything between the first and the last axis), I inputs, O outputs, D features, V entries
of an embedding, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LIMIT = 2**23
"""Floats of per-row gradients held at once (32 MiB)."""
Power = Literal[1, 2]
"""What is summed over rows: the absolute gradient, or its square."""


@dataclass(frozen=True)
class Form:
    """How one parameter's gradient follows from ``a`` and ``d`` (both float32, or integer ``a`` for an embedding).

    Attributes:
        rows: (a, d) → the gradient of each row, (B, *shape).
        powers: (total, a, d, power) → adds the sum over rows of |gradient|^power to ``total`` without forming them all;
            None where there is no shorter way.
    """

    rows: Callable[[Tensor, Tensor], Tensor]
    powers: Callable[[Tensor, Tensor, Tensor, Power], None] | None = None


Uses = Sequence[tuple[Form, Tensor, Tensor]]
"""(form, a, d) for every use of one parameter in one forward pass."""


def powered(x: Tensor, power: Power) -> Tensor:
    """|x|^power."""
    return x.square() if power == 2 else x.abs()


def add_powers(total: Tensor, uses: Uses, power: Power) -> None:
    """Add to ``total`` the sum over rows of |gradient|^power; a row's uses of the parameter are summed before that.

    Args:
        total: float32, the parameter's shape.
    """
    if len(uses) == 1 and uses[0][0].powers is not None:
        form, a, d = uses[0]
        assert form.powers is not None
        form.powers(total, a, d, power)
        return
    rows = uses[0][2].shape[0]
    step = max(1, LIMIT // max(total.numel(), 1))
    for start in range(0, rows, step):
        gradient = summed_rows(uses, slice(start, start + step))
        total.add_(powered(gradient, power).sum(0))


def summed_rows(uses: Uses, part: slice) -> Tensor:
    """The gradient of each of the rows in ``part``, (B, *shape), over all uses of the parameter."""
    gradient = uses[0][0].rows(uses[0][1][part], uses[0][2][part])
    for form, a, d in uses[1:]:
        gradient = gradient + form.rows(a[part], d[part])
    return gradient


def closed_forms(module: nn.Module) -> list[tuple[nn.Parameter, Form]]:
    """The parameters of ``module`` that have a closed form, with it; empty where there is none."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    forms: list[tuple[Any, Form]] = []
    if isinstance(module, nn.Linear):
        forms = [(weight, LINEAR), (bias, BIAS)]
    elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        forms = [(weight, TRANSPOSED), (bias, BIAS)]
    elif isinstance(module, nn.LayerNorm):
        forms = [(weight, _scale(module, _standardised)), (bias, _shift(module.normalized_shape))]
    elif type(module).__name__.endswith(("RMSNorm", "T5LayerNorm")):
        forms = [(weight, _scale(module, _unit_power))]
    elif isinstance(module, nn.Embedding) and not (module.sparse or module.scale_grad_by_freq or module.max_norm):
        forms = [(weight, _embedding(module))]
    elif hasattr(module, "lora_E") and hasattr(module, "ranknum"):
        forms = _adalora(module)
    return [(parameter, form) for parameter, form in forms if isinstance(parameter, nn.Parameter)]


def _tokens(x: Tensor) -> Tensor:
    """(B, ..., D) as (B, T, D)."""
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)


def _linear_rows(a: Tensor, d: Tensor) -> Tensor:
    return torch.bmm(_tokens(d).mT, _tokens(a))


def _linear_powers(total_OI: Tensor, a: Tensor, d: Tensor, power: Power) -> None:
    if a.dim() == 2:
        total_OI.addmm_(powered(d, power).T, powered(a, power))
    else:
        add_powers(total_OI, [(Form(_linear_rows), a, d)], power)


LINEAR = Form(_linear_rows, _linear_powers)
BIAS = Form(lambda a, d: d if d.dim() == 2 else _tokens(d).sum(1))
TRANSPOSED = Form(lambda a, d: torch.bmm(_tokens(a).mT, _tokens(d)))


def _standardised(module: Any, a: Tensor) -> Tensor:
    return F.layer_norm(a, module.normalized_shape, None, None, module.eps)


def _unit_power(module: Any, a: Tensor) -> Tensor:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return F.rms_norm(a, tuple(module.weight.shape), None, eps)


def _sum_to(x: Tensor, shape: Sequence[int]) -> Tensor:
    """(B, ..., *shape) summed to (B, *shape)."""
    return x.reshape(x.shape[0], -1, *shape).sum(1)


def _scale(module: Any, normalise: Callable[[Any, Tensor], Tensor]) -> Form:
    return Form(lambda a, d: _sum_to(d * normalise(module, a), module.weight.shape))


def _shift(shape: Sequence[int]) -> Form:
    return Form(lambda a, d: _sum_to(d, shape))


def _embedding(module: nn.Embedding) -> Form:
    def flat(ids: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        ids_BT = ids.reshape(ids.shape[0], -1)
        d_BTD = d.reshape(*ids_BT.shape, d.shape[-1])
        if module.padding_idx is not None:
            d_BTD = d_BTD * (ids_BT != module.padding_idx)[..., None]
        return ids_BT, d_BTD

    def rows(ids: Tensor, d: Tensor) -> Tensor:
        ids_BT, d_BTD = flat(ids, d)
        B, V, D = len(ids_BT), module.num_embeddings, d_BTD.shape[-1]
        place = ids_BT + torch.arange(B, device=ids.device)[:, None] * V
        return d_BTD.new_zeros(B * V, D).index_add_(0, place.flatten(), d_BTD.flatten(0, 1)).view(B, V, D)

    def powers(total_VD: Tensor, ids: Tensor, d: Tensor, power: Power) -> None:
        ids_BT, d_BTD = flat(ids, d)
        step = max(1, LIMIT // max(ids_BT.shape[1] * max(ids_BT.shape[1], d_BTD.shape[2]), 1))
        for i, g in zip(torch.split(ids_BT, step), torch.split(d_BTD, step), strict=True):
            same_BTT = (i[:, :, None] == i[:, None, :]).to(g.dtype)
            power_BTD = powered(torch.bmm(same_BTT, g), power).div_(same_BTT.sum(2, keepdim=True))
            total_VD.index_add_(0, i.flatten(), power_BTD.flatten(0, 1))

    return Form(rows, powers)


def _adalora(layer: Any) -> list[tuple[Any, Form]]:
    """A, E, B of the active adapters of an ``SVDLinear``: y = W x + s B (E * A) x, s = scaling / (ranknum + 1e-5)."""
    forms: list[tuple[Any, Form]] = []
    if layer.disable_adapters or layer.merged:
        return forms
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        A_RI, E_R1, B_OR = (getattr(layer, f"lora_{letter}")[name].detach().float() for letter in "AEB")
        scale = layer.scaling[name] / (layer.ranknum[name].detach().float() + 1e-5)
        forms += [
            (layer.lora_A[name], Form(_to_a(E_R1, B_OR, scale))),
            (layer.lora_E[name], Form(_to_e(A_RI, B_OR, scale))),
            (layer.lora_B[name], Form(_to_b(A_RI, E_R1, scale))),
        ]
    return forms


def _to_a(E_R1: Tensor, B_OR: Tensor, scale: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda a, d: torch.bmm((_tokens(d) @ B_OR * (scale * E_R1.T)).mT, _tokens(a))


def _to_e(A_RI: Tensor, B_OR: Tensor, scale: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda a, d: (_tokens(d) @ B_OR * (_tokens(a) @ A_RI.T) * scale).sum(1)[..., None]


def _to_b(A_RI: Tensor, E_R1: Tensor, scale: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda a, d: torch.bmm(_tokens(d).mT, _tokens(a) @ A_RI.T * (scale * E_R1.T))
