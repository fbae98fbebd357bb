"""The gradient of the loss over rows of earlier experiences, which must not rise.

It comes from a pass of its own, in the precision of the run and in eval mode: it is the loss of the model as it answers
that must not rise, nothing is drawn, and no running statistic moves.

Letters: B rows of a batch, N rows of the memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from continual.parts.part import Context
from continual.parts.passes import as_at_test
from continual.parts.replay.memory import Memory
from continual.table import to_device


def memory_gradient(
    context: Context, memory: Memory, index_N: Tensor, parameters: Sequence[nn.Parameter]
) -> list[Tensor | None]:
    """The gradient of the mean loss over the rows at ``index_N`` (int64 CPU, at least one), by parameter.

    ``.grad`` and the state of every generator are as before; None where the loss does not depend on a parameter.
    """
    total: list[Tensor | None] = [None] * len(parameters)
    counted = torch.zeros((), device=context.device)
    with torch.enable_grad(), as_at_test(context.model):
        for index_B in torch.split(index_N, context.batch_size):
            batch = to_device(memory.batch(index_B), context.device)
            loss_B = context.loss_rows(context.forward(batch), batch).float()
            weight_B = batch.get("weight", torch.ones_like(loss_B))
            counted = counted + weight_B.sum()
            found = torch.autograd.grad((weight_B * loss_B).sum(), list(parameters), allow_unused=True)
            total = [_added(one, other) for one, other in zip(total, found, strict=True)]
    return [None if one is None else one / counted for one in total]


def _added(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return one if other is None else other.float()
    return one + other.float()
