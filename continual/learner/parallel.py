"""Training steps divided among processes: each has the whole model and every n-th row of each batch.

Every process draws the same batch and lets the parts extend it. It runs the model on its own rows; what comes out is
gathered, so that the loss, every part's term and every hook see the whole batch in all processes, and see the same. A
gradient is then the mean over processes. The step is that of one process with the whole batch, up to the rounding of
sums, whatever terms and weights there are; a term that reads no output, or that runs the model by itself, is right as
well (each process computes all of it).

Gradients are averaged by us, once for each optimiser step after all its forward passes, in place of a wrapper around the
model (Li et al. 2020, arXiv 2006.15704). Nothing needs to be wrapped anew when a head grows, an adapter is replaced or a
parameter takes no part in the loss, and parts see the model as it is. What is given up is that communication overlaps
with the backward pass.

Noise of the model (dropout) is drawn anew for each process and forward pass from the root seed and the place of the step:
the state of the generators stays the same in all processes, and a resumed run draws what the uncut one drew.

Buffers written by the forward pass (running means) are each process's own until they are read outside a training step;
those of the main process then hold for all.

Letters: B rows of the whole batch, b rows of this process, P places of a bucket of gradients.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn

from continual.learner.processes import Processes, as_bytes
from continual.models.output import Output
from continual.parts.context import TrainingContext
from continual.randomness import derive_seed
from continual.table import Batch, Table
from continual.training import Training

BUCKET_BYTES = 64 * 2**20
"""Gradients that travel together."""
LOOKED_AT = 64
"""Rows of an experience by which processes find out that they were given the same."""


class Parallel:
    """This process's part in the training steps of one experience.

    Args:
        processes: two or more.
        training: its settings, which must be the same in all.
    """

    def __init__(self, processes: Processes, context: TrainingContext, training: Training) -> None:
        self.processes, self.context, self.training = processes, context, training
        self._flags: dict[tuple[bool, ...], Tensor] = {}

    def begin(self, table: Table, position: tuple[int, ...]) -> None:
        """Find out whether all processes stand at the same place with the same rows, then begin with the same weights.

        Raises:
            TrainingError: they do not.
        """
        context = self.context
        shapes = [(name, tuple(p.shape), str(p.dtype)) for name, p in context.parameters().items()]
        self.processes.check_alike(
            {
                "their settings": f"{self.training.model_dump_json()} {context.randomness.seed}".encode(),
                "their training rows": _content(table),
                "where they stand in the training": f"{context.experience_index} {context.steps} {position}".encode(),
                "the parameters that train": repr(shapes).encode(),
                "the rows that they have kept": b"".join(part.rows().numpy().tobytes() for part in context.parts),
            }
        )
        self.align()

    def align(self) -> None:
        """Give every process the weights and buffers of the main one, which are the same already but for rounding."""
        self.processes.broadcast([*self.context.parameters().values(), *self.context.model.buffers()])

    def forward(self, batch: Batch, turn: int) -> tuple[Output, list[tuple[str, Tensor]]]:
        """Output and terms of the whole batch, of which only this process's rows are followed back.

        Args:
            turn: which forward pass of the step it is, from 0.
        """
        context, rows = self.context, len(batch["labels"])
        mine = share(batch, self.processes.rank, self.processes.count)
        with self._noise(turn):
            own = context.forward(mine)
        output = WholeOutput(own, rows, self.processes)

        def losses() -> Tensor:
            new_rows = context.current_rows
            context.current_rows = len(range(self.processes.rank, new_rows, self.processes.count))
            try:
                return whole(context.loss_rows(own, mine), rows, self.processes)
            finally:
                context.current_rows = new_rows

        return output, context.terms(batch, output, losses)

    def average_gradients(self) -> None:
        """Put the mean over all processes into every gradient; None stays where no process has one."""
        count, sent = self.processes.count, []
        for bucket in _buckets(self.context.parameters().values()):
            given = tuple(parameter.grad is not None for parameter in bucket)
            flat_P = torch.cat([*map(_flat_gradient, bucket), self._given(given, bucket[0])])
            sent.append((bucket, given, flat_P, distributed.all_reduce(flat_P, async_op=True)))
        for bucket, given, flat_P, work in sent:
            if work is not None:
                work.wait()
            sizes = [*(parameter.numel() for parameter in bucket), len(bucket)]
            *means, given_p = torch.split(flat_P.div_(count), sizes)
            somewhere = given if all(given) else (given_p > 0).tolist()
            into, what = [], []
            for parameter, mean, any_given in zip(bucket, means, somewhere, strict=True):
                if not any_given:
                    continue
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)
                into.append(parameter.grad)
                what.append(mean.view_as(parameter))
            if into:
                torch._foreach_copy_(into, what)

    def _given(self, given: tuple[bool, ...], like: Tensor) -> Tensor:
        if given not in self._flags:
            self._flags[given] = torch.tensor(given, dtype=like.dtype, device=like.device)
        return self._flags[given]

    @contextmanager
    def _noise(self, turn: int) -> Iterator[None]:
        context = self.context
        on_device = context.device.type == "cuda"
        key = f"process {self.processes.rank}/{context.experience_index}/{context.step}/{turn}"
        with torch.random.fork_rng(devices=[context.device] if on_device else []):
            seed = derive_seed(context.randomness.seed, key)
            torch.default_generator.manual_seed(seed)
            if on_device:
                torch.cuda.manual_seed(seed)
            yield


class WholeOutput(Output):
    """The output for all rows of a batch, in their order, gathered from all processes when it is first read.

    Gradients of this process's own rows lead into its model, ``count`` times as large, so that the mean over processes is
    the gradient for the whole batch.
    """

    def __init__(self, own: Output, rows: int, processes: Processes, live: WholeOutput | None = None) -> None:
        self._own, self._rows, self._processes, self._live = own, rows, processes, live
        self._found: dict[str, Tensor] = {}

    @property
    def logits(self) -> Tensor:  # type: ignore[override]
        """Logits of all rows."""
        return self._whole("logits")

    @property
    def features(self) -> Tensor | None:  # type: ignore[override]
        """Features of all rows, or None."""
        return None if self._own.features is None else self._whole("features")

    def detach(self) -> Output:
        """The same values, which no gradient follows, still gathered only when they are read."""
        return WholeOutput(self._own, self._rows, self._processes, live=self)

    def _whole(self, name: str) -> Tensor:
        if self._live is not None:
            return self._live._whole(name).detach()
        if name not in self._found:
            with torch.enable_grad():
                self._found[name] = whole(getattr(self._own, name), self._rows, self._processes)
        return self._found[name]


def share(batch: Batch, rank: int, count: int) -> Batch:
    """Rows ``rank``, ``rank + count`` … of a batch; one of the others, which will not count, where there is none."""
    rows = len(batch["labels"])
    start = rank if rank < rows else rank % rows
    return {name: column[start::count] if rank < rows else column[start : start + 1] for name, column in batch.items()}


def whole(own_b: Tensor, rows: int, processes: Processes) -> Tensor:
    """From each process's (b, ...) of :func:`share` the (B, ...) of all; the gradient of the own rows is ``count``-fold."""
    gathered: Tensor = _Gather.apply(own_b, rows, processes)
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own_b: Tensor, rows: int, processes: Processes) -> Tensor:
        ctx.rows, ctx.processes = rows, processes
        each = -(-rows // processes.count)
        sent = own_b.new_zeros(each, *own_b.shape[1:])
        sent[: len(own_b)] = own_b
        received = [torch.empty_like(sent) for _ in range(processes.count)]
        distributed.all_gather([as_bytes(part) for part in received], as_bytes(sent))
        return torch.stack(received, 1).flatten(0, 1)[:rows]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient_B,) = gradients
        processes = ctx.processes
        if processes.rank >= ctx.rows:
            return gradient_B.new_zeros(1, *gradient_B.shape[1:]), None, None
        return gradient_B[processes.rank :: processes.count] * processes.count, None, None


def _buckets(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters of one dtype and device together, in order, up to :data:`BUCKET_BYTES` (or one that is larger)."""
    buckets: list[list[nn.Parameter]] = []
    open_: dict[tuple[torch.dtype, torch.device], tuple[list[nn.Parameter], int]] = {}
    for parameter in parameters:
        key = (parameter.dtype, parameter.device)
        bucket, size = open_.get(key, ([], 0))
        if not bucket or size + parameter.nbytes > BUCKET_BYTES:
            bucket, size = [], 0
            buckets.append(bucket)
        bucket.append(parameter)
        open_[key] = (bucket, size + parameter.nbytes)
    return buckets


def _flat_gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        return parameter.new_zeros(parameter.numel())
    return parameter.grad.reshape(-1).to(parameter.dtype)


def _content(table: Table) -> bytes:
    """A digest of how many rows there are and of some of them."""
    index_N = torch.linspace(0, len(table) - 1, min(LOOKED_AT, len(table)), dtype=torch.float64).long()
    digest = hashlib.sha256(str(len(table)).encode())
    for name, column in sorted(table[index_N].items()):
        digest.update(f"{name} {tuple(column.shape)} {column.dtype}".encode())
        digest.update(as_bytes(column.cpu().contiguous()).numpy().tobytes())
    return digest.digest()
