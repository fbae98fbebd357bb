"""The processes that train one model together, started by ``accelerate launch`` or ``torchrun``; mostly there is one.

All of them run the same program on the same rows. What is written or decided by one alone is done by the main process,
and the others hear of the outcome: :meth:`Processes.from_main`. Messages are JSON, never pickled objects.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch import Tensor, distributed

from continual import errors
from continual.errors import ContinualError, SpecError, StateError, TrainingError, quoted

T = TypeVar("T")

_OTHER_WAYS = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")
"""What ``accelerate launch`` can be configured for and is not done here."""


class Processes:
    """The processes of a run, seen from one of them.

    Attributes:
        count, rank: how many there are, and which one this is, from 0; the main process is 0.
        device: where this one trains: as asked for where there is one, else the device that is its own.
    """

    def __init__(self, device: torch.device) -> None:
        """Join the others, if this process was started as one of several.

        Raises:
            SpecError: they were started in a way, or for a device, that cannot be.
        """
        other = [way for way in _OTHER_WAYS if os.environ.get(f"ACCELERATE_USE_{way}", "false").lower() == "true"]
        if other:
            raise SpecError(
                f"accelerate is configured for {quoted(other)}, and training here is data-parallel, each process with the "
                "whole model: start it with `accelerate launch --multi_gpu`, or with torchrun."
            )
        started, here = _variable("WORLD_SIZE"), _variable("LOCAL_WORLD_SIZE")
        if device.type == "cuda" and here > torch.cuda.device_count():
            raise SpecError(
                f"{here} processes were started on this machine, which has {torch.cuda.device_count()} CUDA devices: start "
                "at most one for each device, or take device 'cpu'."
            )
        state = PartialState(cpu=device.type == "cpu")
        self.count, self.rank, self.device = state.num_processes, state.process_index, device
        if self.count == 1 < started:
            raise SpecError(
                f"{started} processes were started and do not know of each other, for accelerate was set up without a way "
                "to join them: make no Accelerator before the learner, or make it with cpu=True where there is no GPU."
            )
        if self.count == 1:
            return
        if state.distributed_type not in (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
            raise SpecError(
                f"the processes were joined for {state.distributed_type.value}: allowed are CPUs and CUDA devices, with the "
                "whole model in each process."
            )
        if device.type != state.device.type or device.index not in (None, state.device.index):
            raise SpecError(
                f"the device '{device}' was asked for and this is one of {self.count} processes, with '{state.device}' for "
                "its own: take 'auto' or leave the device out."
            )
        self.device = state.device
        if self.device.type == "cpu":
            atexit.unregister(_leave)
            atexit.register(_leave)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return bool(self.rank == 0)

    def from_main(self, work: Callable[[], T]) -> T:
        """What ``work`` gives in the main process, in all of them; they wait for it. It must be plain JSON values.

        Raises:
            ContinualError: what it raised there, in all of them.
        """
        if self.count == 1:
            return work()
        if not self.is_main:
            return _opened(json.loads(self._text(None)))  # type: ignore[no-any-return]
        try:
            found = work()
            answer = json.dumps({"value": found})
        except Exception as error:
            self._text(json.dumps({"error": type(error).__name__, "message": str(error)}))
            raise
        self._text(answer)
        return found

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Give ``tensors`` the values that they have in the main process."""
        waiting = []
        for tensor in tensors:
            if not tensor.numel():
                continue
            value = tensor.detach().to(self.device).contiguous()
            waiting.append((tensor.detach(), value, distributed.broadcast(as_bytes(value), 0, async_op=True)))
        for tensor, value, work in waiting:
            if work is not None:
                work.wait()
            if value.data_ptr() != tensor.data_ptr() and not torch.equal(value, tensor.to(value.device)):
                tensor.copy_(value)

    def number(self, value: float) -> float:
        """The main process's value."""
        if self.count == 1:
            return value
        held = torch.tensor([value], dtype=torch.float64, device=self.device)
        distributed.broadcast(held, 0)
        return float(held)

    def check_alike(self, what: Mapping[str, bytes]) -> None:
        """Raise :class:`TrainingError`, in all processes, where they do not hold the same under the same key."""
        own = b"".join(hashlib.sha256(value).digest() for value in what.values())
        own_M = torch.tensor(list(own), dtype=torch.uint8, device=self.device)
        all_RM = own_M.new_empty(self.count, len(own_M))
        distributed.all_gather(list(all_RM.unbind()), own_M)
        alike = (all_RM == all_RM[0]).view(self.count, len(what), -1).all(2).all(0).tolist()
        wrong = [key for key, same in zip(what, alike, strict=True) if not same]
        if wrong:
            raise TrainingError(
                f"the {self.count} processes differ in {wrong[0]}: run the same program with the same settings in all of "
                "them and give each one all rows, which are divided batch by batch."
            )

    def leave(self) -> None:
        """Part from the others at the end of a program that went well; on CPUs it happens by itself."""
        if self.count > 1:
            _leave()

    def _text(self, text: str | None) -> str:
        """The main process's text, in all of them."""
        given = text.encode() if text is not None else b""
        size = torch.tensor([len(given)], device=self.device)
        distributed.broadcast(size, 0)
        letters = torch.tensor(list(given) or [0] * int(size), dtype=torch.uint8, device=self.device)
        distributed.broadcast(letters, 0)
        return bytes(letters.tolist()).decode()


def as_bytes(tensor: Tensor) -> Tensor:
    """The same memory as uint8, for not every dtype travels everywhere; ``tensor`` is contiguous."""
    return tensor.view(-1).view(torch.uint8)


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _opened(answer: dict[str, Any]) -> Any:
    if "error" not in answer:
        return answer["value"]
    kind = getattr(errors, answer["error"], None)
    if isinstance(kind, type) and issubclass(kind, ContinualError):
        raise kind(answer["message"])
    raise StateError(
        f"the main process could not go on ({answer['error']}: {answer['message']}): see what it says itself."
    )


def _variable(name: str) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdigit() else 1
