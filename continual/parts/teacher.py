"""The model as it was when the experience began, cheaply: the values of what trains now, and nothing else.

At the beginning of an experience the adapter and the head have already made room for it without changing what the model
says (a fresh adapter adds zero, a merged one is in the base weights, a head keeps its old rows). So the old model is
today's modules with the values that the trainable parameters and the buffers have now. Frozen tensors are shared, whatever
their size; with an adapter the copy is as small as the adapter. A resumed run gets its modules back from the parts that
made them, and the values from here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from continual.models.output import Output
from continual.parts.part import Context
from continual.parts.passes import Swapped, as_at_test
from continual.table import Batch


class Teacher:
    """Values by name, and forward passes with them.

    Attributes:
        tensors: of the trainable parameters and of the buffers that a model is saved with; empty before :meth:`copy`.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._swapped: Swapped | None = None

    def __bool__(self) -> bool:
        return bool(self.tensors)

    def copy(self, context: Context) -> None:
        """Remember the model as it is now."""
        saved = context.model.state_dict()
        buffers = {name: buffer for name, buffer in context.model.named_buffers() if name in saved}
        self.tensors = {name: t.detach().clone() for name, t in {**context.parameters(), **buffers}.items()}
        self._swapped = None

    @torch.no_grad()
    def __call__(self, context: Context, batch: Batch) -> Output:
        """What the old model says, in eval mode and in the precision of the run, without a graph."""
        if self._swapped is None:
            self._swapped = Swapped(context)
            self.tensors = {name: tensor.to(context.device) for name, tensor in self.tensors.items()}
        with as_at_test(context.model):
            return self._swapped(self.tensors, batch)

    def state_dict(self) -> dict[str, Any]:
        return dict(self.tensors)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tensors = {name: tensor.clone() for name, tensor in state.items()}
        self._swapped = None
