"""Our parts inside a user's Avalanche strategy: one plugin that calls their hooks where Avalanche has hooks of its own.

The parts see a :class:`~continual.parts.context.TrainingContext` over the strategy's model. What Avalanche does stays as it
is: its loader, its criterion, its optimiser. Rows that a memory keeps and a Fisher reads are those of the experience's data
set under its transform for evaluation; a batch under training carries no row ids, so parts that take rows from batches are
refused.

| ours | Avalanche's |
|---|---|
| ``begin`` | ``before_training_exp`` |
| ``extend`` | ``before_forward`` |
| ``loss`` | ``before_backward`` |
| ``edit_gradients`` | ``after_backward`` |
| ``after_step`` | ``after_update`` |
| ``end`` | ``after_training_exp`` |

Imported after :func:`continual.foreign.imported` only.

Letters: B rows of a batch, N rows of a data set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from avalanche.models.utils import avalanche_forward
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor, nn

from continual.errors import CompositionError, quoted, shown
from continual.kinds import Objective, Scenario
from continual.models.output import Output
from continual.parts.context import TrainingContext
from continual.parts.part import SLOTS, Part
from continual.parts.replay.rehearsal import Rehearsal
from continual.streams.experience import Experience
from continual.streams.sources.experiences import read_rows
from continual.table import Batch, Table

ALLOWED = ("penalty", "distillation", "projection")
"""Slots of which every part works that does not ask for a head of ours; of ``replay``, rehearsal does."""
_ROOM = 2**32


class Model(nn.Module):
    """The strategy's model as parts call it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Batch) -> Output:
        """Logits (B, K) of ``inputs`` (B, ...), with the column ``task`` (B,) for a model that takes task labels."""
        return Output(avalanche_forward(self.module, batch["inputs"], batch["task"]))


class Rows(Table):
    """A data set of Avalanche as a table with ``inputs``, ``labels``, ``task`` and ``row``; inputs are read when asked for."""

    def __init__(self, dataset: Any, index: int) -> None:
        self.dataset = dataset
        size = len(dataset)
        tasks, rows = getattr(dataset, "targets_task_labels", None), getattr(dataset, "row", None)
        self._columns = {
            "labels": torch.tensor([int(label) for label in dataset.targets], dtype=torch.int64),
            "task": torch.tensor([int(task) for task in tasks] if tasks is not None else [0] * size, dtype=torch.int64),
            "row": torch.arange(size) + index * _ROOM if rows is None else torch.tensor([int(row) for row in rows]),
        }

    def __len__(self) -> int:
        return len(self._columns["row"])

    def __getitem__(self, index_B: Tensor) -> Batch:
        inputs, _ = read_rows(self.dataset, index_B.tolist())
        return {"inputs": inputs, **{name: column[index_B] for name, column in self._columns.items()}}

    @property
    def names(self) -> tuple[str, ...]:
        return ("inputs", *self._columns)

    def column(self, name: str) -> Tensor:
        if name == "inputs":
            return read_rows(self.dataset, range(len(self)))[0]
        if name not in self._columns:
            raise self.missing(name)
        return self._columns[name]

    def strings(self, name: str) -> Sequence[Any]:
        raise self.missing(name)


class Context(TrainingContext):
    """What the parts see; the optimiser's parameters are Avalanche's business."""

    def sync_optimizer(self) -> None:
        """Avalanche has put new parameters into its optimiser already."""

    @property
    def adapter(self) -> Model:
        """The model, as what it is."""
        assert isinstance(self.model, Model)
        return self.model


class Plugin(SupervisedPlugin):  # type: ignore[misc]
    """Drives parts of ours; made by :func:`continual.interop.avalanche.as_plugin`.

    Attributes:
        parts: with their state, in the order in which their hooks are called.
    """

    def __init__(self, parts: Sequence[Part], *, seed: int, scenario: Scenario, objective: Objective) -> None:
        super().__init__()
        self.parts = sorted(parts, key=lambda part: SLOTS.index(part.slot))
        self._seed, self._scenario, self._objective = seed, scenario, objective
        self._context: Context | None = None
        self._batch: Batch = {}

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        context = self._attached(strategy)
        index = context.experience_index + 1
        dataset = strategy.experience.dataset
        table = Rows(dataset, index)
        classes = tuple(sorted({int(label) for label in dataset.targets.uniques}))
        experience = Experience(
            index, f"experience {index}", table, classes=classes, scenario=self._scenario, objective=self._objective
        )
        context.batch_size = strategy.train_mb_size
        batches = len(strategy.dataloader) if hasattr(strategy.dataloader, "__len__") else 0
        context.begin(experience, steps=strategy.train_epochs * batches)

    def before_forward(self, strategy: Any, **kwargs: Any) -> None:
        x, y = strategy.mb_x, strategy.mb_y
        task = strategy.mb_task_id if len(strategy.mbatch) > 2 else torch.zeros_like(y)
        batch = self._context_now.extend({"inputs": x, "labels": y, "task": task})
        if "weight" in batch:
            raise CompositionError(
                "a part weighs the rows of a batch, and Avalanche's criterion weighs them alike: take weighting: rows."
            )
        if len(batch["labels"]) > len(y):
            strategy.mbatch[0], strategy.mbatch[1] = batch["inputs"], batch["labels"]
            if len(strategy.mbatch) > 2:
                strategy.mbatch[-1] = batch["task"]
        self._batch = batch

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        context, output = self._context_now, Output(strategy.mb_output)
        terms = context.terms(self._batch, output, lambda: strategy.loss.detach().reshape(1))
        for _, term in terms[1:]:
            strategy.loss = strategy.loss + term
        context.keep(self._batch, output)

    def after_backward(self, strategy: Any, **kwargs: Any) -> None:
        self._context_now.edit_gradients()

    def after_update(self, strategy: Any, **kwargs: Any) -> None:
        self._context_now.after_step()

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        self._context_now.epoch += 1

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self._context_now.end()
        self._batch = {}

    @property
    def _context_now(self) -> Context:
        assert self._context is not None, "before_training_exp comes first"
        return self._context

    def _attached(self, strategy: Any) -> Context:
        if self._context is None:
            self._context = Context(
                Model(strategy.model),
                self.parts,
                strategy.optimizer,
                seed=self._seed,
                objective=self._objective,
                scenario=self._scenario,
                competition="all",
                device=strategy.device,
                batch_size=strategy.train_mb_size,
            )
        self._context.adapter.module, self._context.optimizer = strategy.model, strategy.optimizer
        return self._context


def make_plugin(parts: Sequence[Part], *, seed: int, scenario: Scenario, objective: Objective) -> Plugin:
    """See :func:`continual.interop.avalanche.as_plugin`."""
    if not parts:
        raise CompositionError("as_plugin() was given no part: name one, such as EWC(strength=10.0).")
    for part in parts:
        if not isinstance(part, Part):
            raise CompositionError(
                f"as_plugin() takes parts one by one, as in as_plugin(EWC(strength=10.0), Rehearsal()), and was given {shown(part)}."
            )
        if part.slot not in (*ALLOWED, "replay") or (part.slot == "replay" and not isinstance(part, Rehearsal)):
            raise CompositionError(
                f"{part.name} cannot be a plugin of Avalanche: take a part of the slots {quoted(ALLOWED)}, or replay/rehearsal."
            )
        if part.needs_head:
            raise CompositionError(f"{part.name} needs features of a model of ours: take it with our learner.")
        if isinstance(part, Rehearsal) and (part.settings.insert == "step" or part.settings.select == "herding"):
            raise CompositionError(
                f"{part.name} as a plugin of Avalanche takes rows when an experience ends, and has no features: leave insert "
                "and select: herding out."
            )
        if isinstance(part, Rehearsal) and part.settings.weighting == "experiences":
            raise CompositionError(
                f"{part.name}: Avalanche's criterion weighs the rows of a batch alike: leave weighting: experiences out."
            )
        for other in parts:
            for key in (other.slot, f"{other.slot}/{other.kind}"):
                if other is not part and key in part.excludes:
                    raise CompositionError(f"{part.name} cannot be combined with {other.name}: {part.excludes[key]}")
    return Plugin(parts, seed=seed, scenario=scenario, objective=objective)
