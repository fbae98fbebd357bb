"""What each parameter did for the loss along the way: gradient times movement, summed over the optimiser's steps.

``omega_p = -sum_t g_p(t) (theta_p(t+1) - theta_p(t))`` (Zenke et al. 2017, arXiv 1703.04200, eq. 3): to first order the
fall of the loss that parameter p brought about. The gradient is the one before clipping, the movement what the optimiser
made of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from continual.parts.penalty.quadratic import grown


class Path:
    """Sums along a path.

    Attributes:
        work: omega, float32 by name.
        start: where the path began, float32 by name; empty before the first step.
    """

    def __init__(self) -> None:
        self.work: dict[str, Tensor] = {}
        self.start: dict[str, Tensor] = {}
        self._aligned = False
        self._step: tuple[list[str], list[nn.Parameter], list[Tensor], list[Tensor]] | None = None

    def begin(self) -> None:
        """A new path, from where the parameters are at the next step."""
        self.work, self.start, self._aligned, self._step = {}, {}, False, None

    @torch.no_grad()
    def before_step(self, parameters: dict[str, nn.Parameter]) -> None:
        """Keep gradients and places until the optimiser has moved."""
        if not self._aligned:
            self._align(parameters)
        moved = {name: parameter for name, parameter in parameters.items() if parameter.grad is not None}
        gradients = [p.grad.to(torch.float32, copy=True) for p in moved.values() if p.grad is not None]
        theta = [p.to(torch.float32, copy=True) for p in moved.values()]
        self._step = list(moved), list(moved.values()), gradients, theta

    @torch.no_grad()
    def after_step(self) -> bool:
        """Add the step; False where :meth:`before_step` was not called since the last one."""
        if self._step is None:
            return False
        names, parameters, gradients, theta = self._step
        self._step = None
        if names:
            movement = torch._foreach_sub([p.float() for p in parameters], theta)
            torch._foreach_addcmul_([self.work[name] for name in names], list(movement), gradients, value=-1.0)
        return True

    def movement(self, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """theta now minus :attr:`start`, float32, of what trained on this path and still trains."""
        return {
            name: parameters[name].detach().float() - start for name, start in self.start.items() if name in parameters
        }

    def state_dict(self) -> dict[str, Any]:
        return {"work": dict(self.work), "start": dict(self.start)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.begin()
        self.work = {name: tensor.clone() for name, tensor in state["work"].items()}
        self.start = {name: tensor.clone() for name, tensor in state["start"].items()}

    def _align(self, parameters: dict[str, nn.Parameter]) -> None:
        """Where a path begins, zeros and a copy; after loading, what is there on the parameters' device."""
        for name, parameter in parameters.items():
            for held, new in ((self.work, torch.zeros_like), (self.start, torch.clone)):
                known = held.get(name)
                held[name] = grown(name, known, parameter) if known is not None else new(parameter.detach().float())
        self._aligned = True
