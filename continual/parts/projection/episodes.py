"""Rows of earlier experiences whose loss must not rise, and the gradient of that loss.

The rows are copied into a :class:`~continual.parts.replay.memory.Memory`, chosen by a
:class:`~continual.parts.replay.select.Selection`. The gradient comes from a pass of its own, in the precision of the run
and in eval mode: it is the loss of the model as it answers that must not rise, nothing is drawn, and no running statistic
moves.

Letters: B rows of a batch, N rows of a table or of the memory, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from continual.errors import CompositionError
from continual.parts.part import Context
from continual.parts.passes import as_at_test
from continual.parts.replay.memory import Memory
from continual.parts.replay.select import Selection
from continual.randomness import derive_seed
from continual.streams.experience import Experience
from continual.table import to_device

Select = Literal["reservoir", "class-balanced", "experience-balanced"]

BLOCK = 1024
"""Rows of a table read at once."""


class Episodes:
    """Rows that are kept of every experience that ended.

    Args:
        owner: how error messages call the part.
        capacity: rows.
        select: ``reservoir`` keeps every row of the stream with equal probability; ``class-balanced`` and
            ``experience-balanced`` give each class or experience an equal share of the places.
    """

    def __init__(self, owner: str, capacity: int, select: Select) -> None:
        self.owner, self.select = owner, select
        self.memory = Memory(capacity, storage="device")
        self.selection = Selection(0, grouped=select != "reservoir")
        self._seeded = False

    def __len__(self) -> int:
        return len(self.memory)

    def attach(self, context: Context) -> None:
        """Lie where the training is; the first time, take the keys' seed from it."""
        self.memory.to(context.device)
        if not self._seeded:
            self.selection.seed, self._seeded = derive_seed(context.randomness.seed, "replay keys"), True

    def check(self, experience: Experience) -> None:
        """Raise :class:`CompositionError` where rows have no class and the selection needs one."""
        if self.select != "class-balanced":
            return
        labels_N = experience.train.column("labels") if experience.objective == "classification" else None
        if labels_N is None or labels_N.dim() != 1 or (len(labels_N) and int(labels_N.min()) < 0):
            raise CompositionError(
                f"{self.owner} with select: class-balanced needs one class a row and some rows of '{experience.name}' have "
                "none: take select: reservoir or experience-balanced."
            )

    def offer(self, experience: Experience) -> None:
        """Offer all training rows of an experience; only those that are accepted are read."""
        table = experience.train
        rows_N = table.column("row").to("cpu", torch.int64)
        groups_N = None
        if self.select == "experience-balanced":
            groups_N = torch.full_like(rows_N, experience.index)
        elif self.select == "class-balanced":
            groups_N = table.column("labels").to("cpu", torch.int64)
        index_C = self.selection.candidates(rows_N, groups_N)
        if not len(index_C):
            return
        groups_C = None if groups_N is None else groups_N[index_C]
        plan = self.selection.plan(rows_N[index_C], groups_C, self.memory.capacity)
        device = table.column("row").device
        for block, places in zip(torch.split(index_C[plan.index], BLOCK), torch.split(plan.places, BLOCK), strict=True):
            if len(block):
                self.memory.put(places, table[block.to(device)])
        self.selection.accept(plan, self.memory.capacity)

    def gradient(self, context: Context, index_N: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
        """The gradient of the mean loss over the rows at ``index_N`` (int64 CPU, at least one), by parameter.

        ``.grad`` and the state of every generator are as before; None where the loss does not depend on a parameter.
        """
        total: list[Tensor | None] = [None] * len(parameters)
        counted = torch.zeros((), device=context.device)
        with torch.enable_grad(), as_at_test(context.model):
            for index_B in torch.split(index_N, max(context.batch_size, 128)):
                batch = to_device(self.memory.batch(index_B), context.device)
                loss_B = context.loss_rows(context.forward(batch), batch).float()
                weight_B = batch.get("weight", torch.ones_like(loss_B))
                counted = counted + weight_B.sum()
                found = torch.autograd.grad((weight_B * loss_B).sum(), list(parameters), allow_unused=True)
                total = [_added(one, other) for one, other in zip(total, found, strict=True)]
        return [None if one is None else one / counted for one in total]

    def rows(self) -> Tensor:
        """Ids of the rows held, int64 CPU (N,)."""
        return self.memory.rows()

    def erase(self, rows: Tensor) -> int:
        """Give up the rows with these ids; returns how many there were."""
        stays_N = ~torch.isin(self.memory.rows(), rows.to("cpu", torch.int64))
        self.selection.keep(stays_N.nonzero().flatten())
        return self.memory.erase(rows)

    def nbytes(self) -> int:
        """Bytes held."""
        return self.memory.nbytes() + self.selection.nbytes()

    def state_dict(self) -> dict[str, Any]:
        return {"memory": self.memory.state_dict(), "selection": self.selection.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``, with the keys of the run that made it.

        Raises:
            StateError: it holds more rows than fit here.
        """
        self.memory.load_state_dict(state["memory"])
        self.selection.load_state_dict(state["selection"], self.memory.capacity)
        self._seeded = True


def _added(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return one if other is None else other.float()
    return one + other.float()
