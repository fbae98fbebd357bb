"""Per-row gradients for parameters without a closed form: ``torch.func``, and the slow loop of single rows.

``vmap(grad(functional_call))`` (the per-sample gradients of torch.func) works for most modules; where it cannot follow
the model (a recurrent layer, a data-dependent branch such as the attention masks of transformers under sdpa), each row
is passed forward and backward by itself.

Letters: B rows, P parameters.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from continual.errors import CompositionError, quoted
from continual.parts.part import Context
from continual.parts.passes import Swapped
from continual.parts.penalty.fisher_forms import LIMIT
from continual.parts.penalty.fisher_labels import Target
from continual.table import Batch

_log = logging.getLogger(__name__)

Take = Callable[[str, Tensor], None]
"""Takes the gradients of some rows, float32 (B, *shape), of the parameter with this name."""


class RowGradients:
    """The per-row gradients of some parameters, handed on as they come.

    Args:
        parameters: name in the model → parameter.
        loop: rows one by one from the start.
        strict: raise instead of falling back on the loop.
    """

    def __init__(self, context: Context, parameters: dict[str, nn.Parameter], *, loop: bool, strict: bool) -> None:
        self.context, self.parameters, self.loop, self.strict = context, parameters, loop, strict
        self._swapped = Swapped(context)

    def add(self, target: Target, take: Take) -> None:
        """Give ``take`` the gradients of the rows of ``target``, in their order, a few rows at a time."""
        rows = len(target.batch["labels"])
        done = 0
        if not self.loop:
            done = self._vectorised(target, take, rows)
        if self.loop:
            for row in range(done, rows):
                self._single(_slice(target, slice(row, row + 1)), take)

    def _vectorised(self, target: Target, take: Take, rows: int) -> int:
        """How many rows were done before ``torch.func`` gave up (all, where it did not)."""
        step = max(1, LIMIT // max(sum(p.numel() for p in self.parameters.values()), 1))
        values = {name: parameter.detach() for name, parameter in self.parameters.items()}

        def loss(values: dict[str, Tensor], row: Batch, active: Tensor | None, root: Tensor | None) -> Tensor:
            batch = {name: column.unsqueeze(0) for name, column in row.items()}
            output = self._swapped(values, batch)
            return replace(target, batch=batch, active=active, root=root).losses(self.context, output).sum()

        for start in range(0, rows, step):
            part = _slice(target, slice(start, start + step))
            per_row = part.active is not None and part.active.dim() == 2
            dims = (None, 0, 0 if per_row else None, None if part.root is None else 0)
            try:
                with torch.no_grad(), warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
                    gradients = vmap(grad(loss), in_dims=dims)(values, part.batch, part.active, part.root)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
                why = " ".join(str(error).split())[:200]
                if self.strict:
                    raise CompositionError(
                        f"torch.func cannot follow this model ({why}): use way='auto' or way='loop'."
                    ) from error
                _log.info("Gradients of %s: row by row, torch.func cannot follow (%s).", quoted(self.parameters), why)
                self.loop = True
                return start
            for name in self.parameters:
                take(name, gradients[name].float())
        return rows

    def _single(self, target: Target, take: Take) -> None:
        with torch.enable_grad():
            loss = target.losses(self.context, self.context.forward(target.batch)).sum()
            gradients = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        for (name, parameter), gradient in zip(self.parameters.items(), gradients, strict=True):
            take(name, (torch.zeros_like(parameter) if gradient is None else gradient).float()[None])


def _slice(target: Target, part: slice) -> Target:
    batch = {name: column[part] for name, column in target.batch.items()}
    active = target.active[part] if target.active is not None and target.active.dim() == 2 else target.active
    return replace(target, batch=batch, active=active, root=None if target.root is None else target.root[part])
