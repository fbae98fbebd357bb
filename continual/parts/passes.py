"""Forward passes that a part makes for itself, and that leave the model as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from continual.models.output import Output
from continual.parts.part import Context
from continual.table import Batch


@contextmanager
def as_at_test(model: nn.Module) -> Iterator[None]:
    """Eval mode, each module's flag put back: nothing is drawn and no running statistic moves.

    Recurrent layers go outside cuDNN meanwhile, which has no backward pass in eval mode.
    """
    flags = {module: module.training for module in model.modules()}
    cudnn = torch.backends.cudnn.enabled
    model.eval()
    try:
        torch.backends.cudnn.enabled = cudnn and not any(isinstance(module, nn.RNNBase) for module in flags)
        yield
    finally:
        torch.backends.cudnn.enabled = cudnn
        for module, flag in flags.items():
            module.training = flag


class Swapped:
    """``context.forward`` with other tensors in the place of some parameters and buffers of the model."""

    def __init__(self, context: Context) -> None:
        self._module = _Forward(context)

    def __call__(self, tensors: Mapping[str, Tensor], batch: Batch) -> Output:
        """The output with ``tensors``, by their names in the model; they may have other shapes than what they replace."""
        renamed = {f"model.{name}": tensor for name, tensor in tensors.items()}
        output: Output = functional_call(self._module, renamed, (batch,))
        return output


class _Forward(nn.Module):
    def __init__(self, context: Context) -> None:
        super().__init__()
        self.model, self.context = context.model, context

    def forward(self, batch: Batch) -> Output:
        return self.context.forward(batch)
