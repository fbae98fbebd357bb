"""A sum of diagonal quadratics as one quadratic: the same cost and memory after any number of tasks.

``sum_t F_t (theta - theta_t)^2 = A (theta - mu)^2 + c`` with ``A = sum_t F_t``, ``b = sum_t F_t theta_t``,
``mu = b / A`` and c what the anchors scatter about their weighted mean. Half the gradient is ``A theta - b = A (theta -
mu)``; mu is kept in place of b because the centred form loses nothing to cancellation when a large strength multiplies
it. Mean and scatter are updated as Chan, Golub & LeVeque (1979) update a mean and a variance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from continual.errors import CompositionError


def grown(name: str, tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor`` on the device of ``like``, in its shape: rows that came since are zeros.

    Raises:
        CompositionError: another shape in any other way.
    """
    tensor = tensor.to(like.device)
    if tensor.shape == like.shape:
        return tensor
    if tensor.dim() != like.dim() or tensor.shape[1:] != like.shape[1:] or len(tensor) > len(like):
        raise CompositionError(
            f"'{name}' had shape {tuple(tensor.shape)} when the penalty was computed, now {tuple(like.shape)}: "
            "a penalty follows tensors that grow along their first axis only; set space to 'weights' where an "
            "adapter is replaced."
        )
    return torch.cat([tensor, tensor.new_zeros(len(like) - len(tensor), *tensor.shape[1:])])


class Quadratic:
    """``sum A (theta - mu)^2 + c`` over named tensors.

    Attributes:
        curvature: A, float32 by name.
        anchor: mu, float32 by name; 0 where A is 0 because the place did not exist when it was last set.
        scatter: c, float32 scalar tensor.
    """

    def __init__(self) -> None:
        self.curvature: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}
        self.scatter = torch.zeros(())

    def add(self, fisher: dict[str, Tensor], theta: dict[str, Tensor]) -> None:
        """Add ``fisher * (x - theta)^2``, exactly."""
        scatter = [self.scatter]
        for name, F in fisher.items():
            anchor = theta[name].detach().float()
            if name not in self.curvature:
                self._set(name, F.clone(), anchor.clone())
                continue
            A, mu = self.grown(name, F)
            total = A + F
            share = torch.where(total > 0, F / total, 1.0)
            difference = anchor - mu
            scatter.append((A * share * difference.square()).sum())
            self._set(name, total, mu + share * difference)
        self.scatter = torch.stack([part.to(scatter[-1].device) for part in scatter]).sum()

    def decay_and_move(self, fisher: dict[str, Tensor], theta: dict[str, Tensor], decay: float) -> None:
        """``A <- decay A + fisher``, all of it anchored at ``theta`` (Schwarz et al. 2018, arXiv 1805.06370, eq. 9)."""
        for name, F in fisher.items():
            A = self.grown(name, F)[0] if name in self.curvature else torch.zeros_like(F)
            self._set(name, A * decay + F, theta[name].detach().float().clone())

    def grown(self, name: str, like: Tensor) -> tuple[Tensor, Tensor]:
        """A and mu of ``name`` on the device of ``like``, in its shape: rows that came since have A = 0.

        Raises:
            CompositionError: another shape in any other way.
        """
        A, mu = (grown(name, tensor, like) for tensor in (self.curvature[name], self.anchor[name]))
        self._set(name, A, mu)
        return A, mu

    def pull(self, names: Sequence[str], theta: Sequence[Tensor], strength: float) -> list[Tensor]:
        """``strength * A (theta - mu)`` for tensors that have been :meth:`grown`, as new float32 tensors."""
        with torch.no_grad():
            pull = torch._foreach_sub([x.float() for x in theta], [self.anchor[name] for name in names])
            torch._foreach_mul_(pull, [self.curvature[name] for name in names])
            torch._foreach_mul_(pull, strength)
        return list(pull)

    def value(self, names: Sequence[str], theta: Sequence[Tensor]) -> Tensor:
        """``sum A (theta - mu)^2 + c`` over ``names``, a scalar tensor, without a sync of the device."""
        value = self.scatter
        for name, x in zip(names, theta, strict=True):
            term = (self.curvature[name] * (x.detach().float() - self.anchor[name]).square()).sum()
            value = value.to(term.device) + term
        return value

    def state_dict(self) -> dict[str, Any]:
        return {"curvature": dict(self.curvature), "anchor": dict(self.anchor), "scatter": self.scatter}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.curvature = {name: tensor.clone() for name, tensor in state["curvature"].items()}
        self.anchor = {name: tensor.clone() for name, tensor in state["anchor"].items()}
        self.scatter = state["scatter"].clone()

    def _set(self, name: str, curvature: Tensor, anchor: Tensor) -> None:
        self.curvature[name], self.anchor[name] = curvature, anchor
