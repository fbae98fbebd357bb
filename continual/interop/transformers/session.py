"""What outlives a trainer: the model as parts see it, the parts, the monitor, and what they have been through.

A trainer runs one experience after another through it, by :meth:`Session.begin`, :meth:`Session.loss`,
:meth:`Session.edit_gradients`, :meth:`Session.after_step` and :meth:`Session.end`. Parts draw from generators of their own and
from process-wide generators of ours, so that the trainer's draws are what they would be without them.

Letters: B rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from continual.errors import StateError, StreamError
from continual.interop.transformers.fit import digest, wrapped
from continual.interop.transformers.rows import DatasetTable, batch_of, owned
from continual.kinds import Objective, Scenario
from continual.learner.ledger import Ledger
from continual.learner.update import Update
from continual.models.model import Model
from continual.models.module import UserModule
from continual.monitor.evaluation import evaluating, score_tables
from continual.monitor.monitor import Monitor
from continual.parts.context import TrainingContext, not_finite
from continual.parts.part import Part
from continual.randomness import Randomness
from continual.strategy import Strategy
from continual.streams.content import row_keys
from continual.streams.experience import Experience
from continual.table import Batch


class Session:
    """One model, one strategy, and the experiences that trainers run through them.

    Args:
        module: the trainer's model, on its device.
        strategy: what fits it (:func:`~continual.interop.transformers.fit.fitted`).
        monitor: what measures retention, None for nothing.
        autocast: makes the context manager around each forward pass.
    """

    def __init__(
        self,
        module: nn.Module,
        strategy: Strategy,
        *,
        objective: Objective,
        scenario: Scenario,
        seed: int,
        monitor: Monitor | None,
        autocast: Callable[[], Any],
    ) -> None:
        self.module, self.monitor, self.scenario = module, monitor, scenario
        self.model: Model = wrapped(module, objective)
        self.names: list[str] = []
        self.updates: list[Update] = []
        self.ledger = Ledger()
        self.under_way: str | None = None
        self.rows = 0
        self.base_names: list[str] = []
        self.base_sha256: str | None = None
        self._came = dict(module.named_parameters())
        self._batch: Batch = {}
        self._terms: list[tuple[str, Tensor]] = []
        self._notes: list[str] = []
        self._clock = 0.0
        self._evaluation_rows = 256
        device = next(module.parameters()).device
        self.loop = TrainingContext(
            self.model,
            strategy.make_parts(),
            objective=objective,
            scenario=scenario,
            competition=strategy.training.active or ("experience" if scenario == "task" else "seen"),
            device=device,
            randomness=Randomness(seed, device),
            autocast=autocast,
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """What the model reads of a batch."""
        return cast(UserModule, self.model.backbone).columns

    @property
    def parts(self) -> list[Part]:
        """The parts of the strategy, with their state."""
        return self.loop.parts

    # One experience

    def begin(
        self,
        name: str,
        train: DatasetTable,
        test: DatasetTable | None,
        *,
        steps: int,
        optimizer: torch.optim.Optimizer | None,
        batch_size: int,
        evaluation_rows: int,
        note: str | None = None,
    ) -> None:
        """Before the first step of an experience, or where it is gone on with.

        Args:
            note: what the user should know of it.

        Raises:
            StateError: a name that was used, or another experience than the one that was cut off.
            StreamError: training rows that are test rows, now or earlier.
            ContinualError: what a part refuses.
        """
        self._clock = time.perf_counter()
        resumed = self.under_way is not None
        experience = self._experience(name, train, test)
        self._notes += [] if note is None else [note]
        self.loop.optimizer, self.loop.batch_size = optimizer, batch_size
        self._evaluation_rows = evaluation_rows
        if resumed:
            self.loop.experience = experience
            return
        self.rows = 0
        with self.loop.randomness.framework():
            self.under_way = experience.name
            self.loop.begin(experience, steps=steps)
            self.model.mark_altered(self.loop.parameters().values())
            self.place()
            if self.base_sha256 is None:
                self._record_base()
            self._came = {}
            self._measure_before(experience)

    def place(self) -> None:
        """Put what was added to the model where the model is."""
        if any(parameter.device != self.loop.device for parameter in self.model.parameters()):
            self.model.to(self.loop.device)

    def loss(self, inputs: Any) -> Tensor:
        """The whole loss of one forward pass, a scalar: extended batch, objective, and the parts' own terms."""
        batch = batch_of(inputs, self.columns)
        if "row" not in batch:
            raise StreamError(
                "the batches do not say which rows they hold, since get_train_dataloader() was overridden without calling "
                "Trainer's: call super().get_train_dataloader() there, or leave it out."
            )
        batch = self.loop.extend(batch)
        output = self.loop.forward(batch)
        terms = self.loop.terms(batch, output)
        self.loop.keep(batch, output)
        self.rows += len(batch["labels"])
        self._batch, self._terms = batch, [(name, term.detach()) for name, term in terms]
        return terms[0][1] if len(terms) == 1 else torch.stack([term for _, term in terms]).sum()

    def check_finite(self, loss: Tensor) -> None:
        """Raise :class:`TrainingError` for a loss that is not finite, before the optimiser has stepped."""
        if not bool(torch.isfinite(loss)):
            raise not_finite(self.loop.step, self._terms, self._batch)

    def edit_gradients(self, scale: float = 1.0) -> None:
        """Let the parts change the gradients, which are multiplied by ``scale`` for half precision."""
        if scale == 1.0:
            self.loop.edit_gradients()
            return
        grads = self._gradients()
        if grads and not bool(torch.stack([torch.isfinite(grad).all() for grad in grads]).all()):
            return  # the scaler leaves this step out
        for grad in grads:
            grad.div_(scale)
        self.loop.edit_gradients()
        for grad in self._gradients():
            grad.mul_(scale)

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.loop.parameters().values() if parameter.grad is not None]

    def after_step(self, skipped: bool) -> None:
        """Tell the parts that the optimiser has stepped, gradients being still there, or left the step out."""
        if skipped:
            self.loop.skip_step()
        else:
            self.loop.after_step()

    def end(self) -> Update:
        """After the last step: the parts look back, and every test set so far is measured."""
        experience = self.loop.experience
        assert experience is not None, "end() follows begin()"
        notes, self._notes = self._notes, []
        with self.loop.randomness.framework():
            self.loop.end()
            for part in self.parts:
                report = getattr(part, "report", None)
                sentence = report() if report is not None else None
                if sentence:
                    notes.append(f"{part.name}: {sentence}")
            self.ledger.add(experience)
            trained = time.perf_counter()
            self._measure(experience)
        slots = sorted({part.slot for part in self.parts})
        measured = self.monitor is not None and self.monitor.measured
        self.updates.append(
            Update(
                index=experience.index,
                name=experience.name,
                retention=self.monitor.latest(hint=slots, name=experience.name) if measured else None,  # type: ignore[union-attr]
                steps=self.loop.step,
                rows=self.rows,
                train_seconds=trained - self._clock,
                monitor_seconds=time.perf_counter() - trained,
                notes=tuple(notes),
            )
        )
        self.names.append(experience.name)
        self.loop.experience, self.under_way, self._batch = None, None, {}
        return self.updates[-1]

    # Data

    def _experience(self, name: str, train: DatasetTable, test: DatasetTable | None) -> Experience:
        index = len(self.names)
        if name in self.names:
            raise StateError(
                f"an experience called '{name}' was learnt already: give this one a name of its own, Continual(..., "
                "name=...) or memory.name = ... before train()."
            )
        if self.under_way is not None and name != self.under_way:
            raise StateError(
                f"the checkpoint stands in the middle of '{self.under_way}', and '{name}' was given: go on with the same "
                "experience."
            )
        classes: tuple[int, ...] = ()
        if self.loop.objective == "classification":
            classes = tuple(label for label in torch.unique(train.column("labels")).tolist() if label >= 0)
        labels = getattr(getattr(self.module, "config", None), "id2label", None) or {}
        names = tuple(str(labels.get(label, label)) for label in range(max(classes, default=-1) + 1))
        experience = Experience(
            index,
            name,
            train,
            None,
            None if test is None else owned(test),
            classes,
            names,
            self.scenario,
            self.loop.objective,
        )
        return self._admitted(experience)

    def _admitted(self, experience: Experience) -> Experience:
        """The experience without test rows that earlier ones trained on.

        Raises:
            StreamError: training rows with the content of test rows: the trainer reads them, so they cannot be left out here.
        """
        admitted, self._notes = self.ledger.admit(experience)
        left_out = len(experience.train) - len(admitted.train)
        if left_out:
            raise StreamError(
                f"{left_out} training rows of '{experience.name}' have the same content as test rows of earlier experiences: "
                "take them out of train_dataset, or the measurement says nothing."
            )
        if admitted.test is not None:
            shared = np.intersect1d(row_keys(experience.train), row_keys(admitted.test))
            if len(shared):
                raise StreamError(
                    f"{len(shared)} test rows of '{experience.name}' have the same content as its training rows: take them "
                    "out of one side."
                )
        return replace(admitted, train=experience.train)

    def _record_base(self) -> None:
        """Which parameters stay as they came, and what they are: a state does not hold them, but knows them."""
        self.base_names = [name for name, parameter in self._came.items() if not parameter.requires_grad]
        self.base_sha256 = self.digest(self.base_names)

    def digest(self, names: Iterable[str]) -> str:
        """SHA-256 of these parameters of the model as it came; before its first experience.

        Raises:
            StateError: it has no such parameter.
        """
        absent = [name for name in names if name not in self._came]
        if absent:
            raise StateError(
                f"the state belongs to another model: this one has no parameter '{absent[0]}'. "
                "Hand in the base as it was fetched, not a model that the trainer has changed already."
            )
        return digest(self._came[name] for name in names)

    # Measuring

    def _measure_before(self, experience: Experience) -> None:
        """What the model scored before any update, where all its outputs mean something from the start."""
        monitor = self.monitor
        if monitor is None or experience.index > 0 or self.loop.objective == "classification":
            return
        if experience.test is not None:
            monitor.register(experience.index, experience.name, experience.test)
        tables, probes = monitor.tables(), monitor.probes
        with evaluating(self.model):
            scores = score_tables(
                [*tables.values(), *probes.values()],
                self.loop.forward,
                self.loop.active_at_test,
                self.loop.objective,
                self.loop.device,
                self._evaluation_rows,
            )
        monitor.record_initial(
            dict(zip(tables, scores, strict=False)), dict(zip(probes, scores[len(tables) :], strict=True))
        )

    def _measure(self, experience: Experience) -> None:
        monitor = self.monitor
        if monitor is None:
            return
        if experience.test is not None:
            monitor.register(experience.index, experience.name, experience.test)
        with evaluating(self.model):
            monitor.measure(
                experience.index,
                self.loop.forward,
                self.loop.active_at_test,
                self.loop.objective,
                self.loop.device,
                batch_size=monitor.batch_size or self._evaluation_rows,
            )
