"""What our learner needs to know and do inside an Avalanche strategy, as a plugin; and what a strategy keeps alive."""

from __future__ import annotations

import gc
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor, nn

from continual.errors import TrainingError


class Watch(SupervisedPlugin, supports_distributed=True):  # type: ignore[misc, call-arg]
    """Counts steps and rows, clips gradients, ends an experience after so many steps, and refuses a loss that is not finite.

    Rows are those of the mini-batch and of the one that ER-ACE draws beside it; what MIR, GEM and A-GEM pass through the model
    on the side is not among them.
    """

    def __init__(self, clip: float | None, iterations: int | None) -> None:
        super().__init__()
        self.clip, self.iterations = clip, iterations
        self.steps = self.rows = 0
        self._bad: Tensor | None = None

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self.steps = self.rows = 0
        self._bad = None

    def after_backward(self, strategy: Any, **kwargs: Any) -> None:
        bad = ~torch.isfinite(strategy.loss.detach())
        self._bad = bad if self._bad is None else self._bad | bad
        if strategy.device.type == "cpu":
            self._look()

    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        if self.clip is not None:
            nn.utils.clip_grad_norm_(list(strategy.model.parameters()), self.clip)

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        self.steps += 1
        self.rows += len(strategy.mb_y)
        if getattr(strategy, "replay_loader", None) is not None and hasattr(strategy, "mb_buffer_y"):
            self.rows += len(strategy.mb_buffer_y)
        if self.iterations is not None and self.steps >= self.iterations:
            strategy.stop_training()

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        self._look()

    def _look(self) -> None:
        if self._bad is not None and bool(self._bad):
            raise TrainingError(
                f"the loss of Avalanche's strategy is not finite at step {self.steps}: lower training.lr or the strength of its "
                "penalty, or set training.clip."
            )


def bytes_kept(start: Any, without: set[int]) -> int:
    """Bytes of all tensors and arrays that an object keeps alive, each storage once.

    Args:
        without: addresses of storages that are counted elsewhere.
    """
    seen: set[int] = set()
    storages = set(without)
    total = 0
    waiting = [start]
    while waiting:
        found = waiting.pop()
        if id(found) in seen or isinstance(found, type | ModuleType | FunctionType | BuiltinFunctionType | str | bytes):
            continue
        seen.add(id(found))
        if isinstance(found, Tensor):
            storage = found.untyped_storage()
            if storage.data_ptr() not in storages:
                storages.add(storage.data_ptr())
                total += storage.nbytes()
            continue
        if isinstance(found, np.ndarray):
            base = found if found.base is None else found.base
            if isinstance(base, np.ndarray) and base.ctypes.data not in storages:
                storages.add(base.ctypes.data)
                total += base.nbytes
            continue
        waiting.extend(gc.get_referents(found))
    return total


def storages_of(*holders: Any) -> set[int]:
    """Addresses of the storages of modules' and optimisers' tensors."""
    tensors: list[Tensor] = []
    for holder in holders:
        if isinstance(holder, nn.Module):
            tensors += [*holder.parameters(), *holder.buffers()]
            tensors += [parameter.grad for parameter in holder.parameters() if parameter.grad is not None]
        elif holder is not None:
            tensors += optimizer_tensors(holder)
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors of its state."""
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
