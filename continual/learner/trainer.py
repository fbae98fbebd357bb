"""The loop over the rows of one experience."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from continual.errors import TrainingError
from continual.learner.optimizer import set_rate
from continual.learner.parallel import Parallel
from continual.learner.processes import Processes
from continual.monitor.evaluation import evaluating, score_tables
from continual.parts.context import TrainingContext, not_finite
from continual.parts.steady import training_mode
from continual.streams.batching import training_batches
from continual.streams.experience import Experience
from continual.table import Batch, Table, TensorTable, View, to_device
from continual.training import Training

LOOK_EVERY = 16
"""Steps between two looks at the loss on an accelerator; steps with a loss that is not finite are skipped on the device."""


@dataclass
class Progress:
    """Where in an experience the training stands, and what it has cost so far."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    done: bool = False
    order: Tensor | None = None
    best_score: float | None = None
    best_epoch: int = 0
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    stopped_early: bool = False
    rows: int = 0
    seconds: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return dict(vars(self))


class Trainer:
    """Runs the optimiser's steps of one experience, from any position.

    Args:
        checkpoint: called with the progress after every ``save_every`` steps.
        log: called with a dict of figures and the step, where trackers want them.
    """

    def __init__(
        self,
        context: TrainingContext,
        training: Training,
        processes: Processes,
        *,
        save_every: int | None = None,
        checkpoint: Callable[[Progress], None] | None = None,
        log: Callable[[dict[str, float], int], None] | None = None,
        show_progress: bool | None = None,
        evaluation_rows: int = 256,
    ) -> None:
        self.context, self.training, self.processes = context, training, processes
        self._parallel = Parallel(processes, context, training) if processes.count > 1 else None
        self.save_every, self.checkpoint, self.log = save_every, checkpoint, log
        self.show_progress = show_progress if processes.is_main else False
        self.evaluation_rows = evaluation_rows
        self._on_device = context.device.type != "cpu"
        self._recent: list[tuple[int, list[tuple[str, Tensor]], Batch]] = []
        self._bad: Tensor | None = None

    def fit(self, experience: Experience, progress: Progress) -> Progress:
        """Train until the epochs or iterations are done; ``progress`` says where to begin and is kept up to date.

        Raises:
            TrainingError: a loss that is not finite.
        """
        context, training = self.context, self.training
        optimizer = context.optimizer
        if optimizer is None or not context.parameters():
            progress.done = True
        if progress.done:
            return progress
        assert optimizer is not None
        started, before = time.perf_counter(), progress.seconds
        table = place(context.as_trained_on(experience.train), context.device)
        generator = context.randomness.generator("order")
        context.step, context.epoch = progress.step, progress.epoch
        if self._parallel is not None:
            self._parallel.begin(experience.train, (progress.epoch, progress.batch, progress.step))
        bar = tqdm(
            total=context.steps,
            initial=progress.step,
            desc=experience.name,
            disable=None if self.show_progress is None else not self.show_progress,
            leave=False,
        )
        training_mode(context.model)
        try:
            while not progress.done:
                if progress.batch == 0:
                    progress.order = generator.get_state()
                else:
                    assert progress.order is not None
                    generator.set_state(progress.order)
                groups = training_batches(table.lengths, len(table), training.batch_size, generator)
                for start in range(progress.batch, len(groups), training.accumulate):
                    self._step(optimizer, table, groups[start : start + training.accumulate], progress)
                    progress.batch = start + training.accumulate
                    progress.step = context.step
                    progress.seconds = before + time.perf_counter() - started
                    bar.update()
                    if training.iterations is not None and progress.step >= training.iterations:
                        progress.done = True
                        break
                    if self.save_every and progress.step % self.save_every == 0 and self.checkpoint:
                        self._look()
                        self._align()
                        self.checkpoint(progress)
                progress.epoch += 1
                progress.batch = 0
                context.epoch = progress.epoch
                if training.iterations is None and progress.epoch >= (training.epochs or 1):
                    progress.done = True
                if training.early_stopping is not None:
                    self._early_stopping(experience, progress)
            self._look()
            self._align()
        finally:
            bar.close()
            optimizer.zero_grad(set_to_none=True)
        progress.seconds = before + time.perf_counter() - started
        return progress

    def _step(self, optimizer: torch.optim.Optimizer, table: Table, groups: list[Tensor], progress: Progress) -> None:
        context = self.context
        optimizer.zero_grad(set_to_none=True)
        set_rate(optimizer, self.training, context.step, context.steps)
        whole_step = sum(len(index_B) for index_B in groups)
        for turn, index_B in enumerate(groups):
            batch = context.extend(to_device(table[index_B], context.device))
            if self._parallel is None:
                output = context.forward(batch)
                terms = context.terms(batch, output)
            else:
                output, terms = self._parallel.forward(batch, turn)
            loss = terms[0][1] if len(terms) == 1 else torch.stack([term for _, term in terms]).sum()
            self._watch(optimizer, loss, terms, batch)
            scale = len(index_B) / whole_step
            loss = loss if scale == 1 else loss * scale
            loss.backward()  # type: ignore[no-untyped-call]
            context.keep(batch, output)
            progress.rows += len(batch["labels"])
        if self._parallel is not None:
            self._parallel.average_gradients()
        context.edit_gradients()
        if self.training.clip is not None:
            nn.utils.clip_grad_norm_(list(context.parameters().values()), self.training.clip)
        optimizer.step()
        context.after_step()
        if self.log is not None and context.step % 50 == 0:
            self.log({f"train/{name}": float(term.detach()) for name, term in terms}, context.step)

    def _watch(
        self, optimizer: torch.optim.Optimizer, loss: Tensor, terms: list[tuple[str, Tensor]], batch: Batch
    ) -> None:
        if not self._on_device:
            if not torch.isfinite(loss):
                self._check_weights()
                raise not_finite(self.context.step, terms, batch)
            return
        bad = (~torch.isfinite(loss.detach())).to(torch.float32)
        self._bad = bad if self._bad is None else torch.maximum(self._bad, bad)
        optimizer.found_inf = self._bad  # type: ignore[attr-defined]
        self._recent.append((self.context.step, [(name, term.detach()) for name, term in terms], batch))
        if len(self._recent) >= LOOK_EVERY:
            self._look()

    def _look(self) -> None:
        if self._bad is not None and bool(self._bad):
            for step, terms, batch in self._recent:
                if not bool(torch.isfinite(torch.stack([term for _, term in terms]).sum())):
                    raise not_finite(step, terms, batch)
        self._recent.clear()
        self._check_weights()

    def _check_weights(self) -> None:
        """Gradients that are not finite spoil the weights though every loss was finite. One sync of the device."""
        parameters = self.context.parameters()
        fine = torch.stack([torch.isfinite(parameter).all() for parameter in parameters.values()]).tolist()
        for name, finite in zip(parameters, fine, strict=True):
            if not finite:
                raise TrainingError(
                    f"the weights '{name}' are not finite after step {self.context.step}, though every loss was: the last "
                    "checkpoint is kept; lower training.lr or a penalty's strength, or set training.clip."
                )

    def _early_stopping(self, experience: Experience, progress: Progress) -> None:
        context, rule = self.context, self.training.early_stopping
        assert rule is not None and experience.valid is not None
        self._align()
        with evaluating(context.model):
            scores = score_tables(
                context.features.of([experience.valid], self.evaluation_rows, "valid"),
                context.forward,
                context.active_at_test,
                context.objective,
                context.device,
                self.evaluation_rows,
            )
        score = self.processes.number(float(next(iter(scores[0].values())).double().mean()))
        if progress.best_score is None or score > progress.best_score + rule.min_delta:
            progress.best_score, progress.best_epoch = score, progress.epoch
            progress.best_weights = {n: tensor.detach().clone() for n, tensor in self._moving().items()}
        elif progress.epoch - progress.best_epoch >= rule.patience and not progress.done:
            progress.done = progress.stopped_early = True
        if progress.done:
            with torch.no_grad():
                for name, tensor in self._moving().items():
                    tensor.copy_(progress.best_weights[name])
            progress.best_weights = {}

    def _moving(self) -> dict[str, Tensor]:
        """What training changes in the model: the parameters that train, and every buffer (running means, counts)."""
        return {**self.context.parameters(), **dict(self.context.model.named_buffers())}

    def _align(self) -> None:
        """Before anything but a training step reads the model, all processes have the same one."""
        if self._parallel is not None:
            self._parallel.align()


def place(table: Table, device: torch.device) -> Table:
    """A table in memory with its dense columns on an accelerator, so that a batch is one gather there.

    Of a view only its own rows are copied; tables of tokens and memory-mapped ones stay where they are.
    """
    if device.type == "cpu":
        return table
    base = table.base if isinstance(table, View) else table
    if not isinstance(base, TensorTable) or base.lengths is not None:
        return table
    if not isinstance(table, View):
        return base.to(device)
    dense = {name: column for name, column in base.columns.items() if isinstance(column, Tensor)}
    own = {name: column.index_select(0, table.index_N.to(column.device)) for name, column in dense.items()}
    return TensorTable({name: column.to(device) for name, column in own.items()})
