"""Per-row gradients for parameters without a closed form: ``torch.func``, and the slow loop of single rows.

``vmap(grad(functional_call))`` (the per-sample gradients of torch.func) works for most modules; where it cannot follow
the model (a recurrent layer, a data-dependent branch such as the attention masks of transformers under sdpa), each row
is passed forward and backward by itself.

Letters: B rows, P parameters.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from continual.errors import CompositionError, quoted
from continual.models.output import Output
from continual.parts.part import Context
from continual.parts.penalty.fisher_forms import LIMIT
from continual.parts.penalty.fisher_labels import Target
from continual.table import Batch

_log = logging.getLogger(__name__)


class _Forward(nn.Module):
    """``context.forward`` as a module, so that its parameters can be swapped."""

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.model, self.context = context.model, context

    def forward(self, batch: Batch) -> Output:
        return self.context.forward(batch)


class RowGradients:
    """Adds squared per-row gradients of some parameters to their totals.

    Args:
        parameters: name in the model → parameter.
        loop: rows one by one from the start.
        strict: raise instead of falling back on the loop.
    """

    def __init__(self, context: Context, parameters: dict[str, nn.Parameter], *, loop: bool, strict: bool) -> None:
        self.context, self.parameters, self.loop, self.strict = context, parameters, loop, strict
        self._module = _Forward(context)

    def add(self, target: Target, totals: dict[str, Tensor]) -> None:
        """Add the sum over the rows of ``target`` of the squared gradients to ``totals``."""
        rows = len(target.batch["labels"])
        done = 0
        if not self.loop:
            done = self._vectorised(target, totals, rows)
        if self.loop:
            for row in range(done, rows):
                self._single(_slice(target, slice(row, row + 1)), totals)

    def _vectorised(self, target: Target, totals: dict[str, Tensor], rows: int) -> int:
        """How many rows were done before ``torch.func`` gave up (all, where it did not)."""
        step = max(1, LIMIT // max(sum(p.numel() for p in self.parameters.values()), 1))
        values = {f"model.{name}": parameter.detach() for name, parameter in self.parameters.items()}
        for start in range(0, rows, step):
            part = _slice(target, slice(start, start + step))
            per_row = part.active is not None and part.active.dim() == 2
            dims = (None, 0, 0 if per_row else None, None if part.root is None else 0)
            try:
                with torch.no_grad(), warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
                    gradients = vmap(grad(self._loss), in_dims=dims)(values, part.batch, part.active, part.root)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
                why = " ".join(str(error).split())[:200]
                if self.strict:
                    raise CompositionError(
                        f"torch.func cannot follow this model ({why}): use way='auto' or way='loop'."
                    ) from error
                _log.info("Fisher of %s: row by row, torch.func cannot follow (%s).", quoted(self.parameters), why)
                self.loop = True
                return start
            for name in self.parameters:
                totals[name].add_(gradients[f"model.{name}"].float().square().sum(0))
        return rows

    def _loss(self, values: dict[str, Tensor], row: Batch, active: Tensor | None, root: Tensor | None) -> Tensor:
        batch = {name: column.unsqueeze(0) for name, column in row.items()}
        output: Any = functional_call(self._module, values, (batch,))
        return Target(batch, active, root).losses(self.context, output).sum()

    def _single(self, target: Target, totals: dict[str, Tensor]) -> None:
        with torch.enable_grad():
            loss = target.losses(self.context, self.context.forward(target.batch)).sum()
            gradients = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        for name, gradient in zip(self.parameters, gradients, strict=True):
            if gradient is not None:
                totals[name].add_(gradient.float().square())


def _slice(target: Target, part: slice) -> Target:
    batch = {name: column[part] for name, column in target.batch.items()}
    active = target.active[part] if target.active is not None and target.active.dim() == 2 else target.active
    return Target(batch, active, None if target.root is None else target.root[part])
