"""What a trainer's callback does in the trainer: find it, begin with it, step with it, end and save with it.

transformers hands a callback no trainer, and the loss is the trainer's: so :meth:`Hooks.on_init_end` looks up which trainer is
calling it, and lets it take on :class:`~continual.interop.transformers.mixin.ContinualMixin`. Where that cannot be (a trainer
that was made before), :meth:`Hooks.attach` is called by the user.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from continual.errors import CompositionError, StateError, StreamError, quoted
from continual.interop.transformers.fit import check_trainer, fitted, is_peft, objective_of, warn_left_out
from continual.interop.transformers.mixin import ContinualMixin, Rider
from continual.interop.transformers.rows import DatasetTable, row_ids
from continual.interop.transformers.session import Session
from continual.interop.transformers.state import read_state, restore, session_state
from continual.kinds import Objective, Scenario
from continual.learner.checkpoint import check_same
from continual.monitor.monitor import Monitor
from continual.parts.adapter.adalora import AdaLoRA
from continual.parts.adapter.export import export_adapter
from continual.parts.adapter.lora import LoRA
from continual.state import save_state
from continual.strategy import Strategy

FOLDER = "continual"
"""Beside the trainer's own files in a checkpoint."""


class Hooks(Rider):
    """What :class:`~continual.interop.transformers.Continual` is to its trainer; the arguments are said there."""

    def __init__(
        self,
        strategy: str | Path | Mapping[str, Any] | Strategy,
        *,
        name: str | None = None,
        test: Any = None,
        seed: int = 0,
        scenario: Scenario = "class",
        objective: Objective | None = None,
        monitor: Monitor | bool | None = None,
    ) -> None:
        self.strategy = Strategy.load(strategy)
        self.name, self.test, self.seed, self.scenario, self.objective = name, test, int(seed), scenario, objective
        self._own_monitor = monitor is None or monitor is True
        self.monitor: Monitor | None = Monitor() if monitor is None or monitor is True else (monitor or None)
        self.trainer: Any = None
        self.training = False
        self.step_rows = 1
        self._session: Session | None = None
        self._state: dict[str, Any] | None = None
        self._tables: dict[int, DatasetTable] = {}
        self._slots = {part.slot for part in self.strategy.prototypes}

    def attach(self, trainer: Any) -> None:
        """Work in this trainer from now on; a trainer that is made with the callback is found without it.

        Raises:
            CompositionError: another ``Continual`` works in it.
            ModelError, CompositionError: its model or its settings cannot be.
        """
        if self.trainer is trainer:
            return
        if self.training:
            raise CompositionError(
                "this Continual is in the middle of another trainer's training: give each trainer its own."
            )
        callbacks = trainer.callback_handler.callbacks
        if any(isinstance(callback, Hooks) and callback is not self for callback in callbacks):
            raise CompositionError("the trainer has two callbacks of Continual: give it one, with one strategy.")
        module = trainer.model
        if self._session is not None and module is not self._session.module:
            raise CompositionError(
                "this Continual has learnt with another model object: hand the same model to the new trainer, or save() it "
                "and take Continual.load(folder) for the new model."
            )
        fitted(self.strategy, module, self.objective or objective_of(module))
        check_trainer(trainer, "adapter" in self._slots and not is_peft(module))
        if not isinstance(trainer, ContinualMixin):
            kind = type(trainer)
            trainer.__class__ = type(kind.__name__, (ContinualMixin, kind), {"__module__": kind.__module__})
        if any(callback is self for callback in callbacks):
            callbacks.remove(self)
        callbacks.insert(0, self)  # so that trackers hear of the figures before they close
        self.trainer, trainer.continual = trainer, self

    @property
    def session(self) -> Session:
        """Model, parts and monitor.

        Raises:
            StateError: no training has begun.
        """
        if self._session is None:
            raise StateError("nothing has been trained yet: call trainer.train() first.")
        return self._session

    @property
    def adapts(self) -> bool:
        """Whether the strategy trains an adapter of ours in the trainer's model."""
        return "adapter" in self._slots and self.trainer is not None and not is_peft(self.trainer.model)

    def prepare(self, checkpoint: Path | None) -> None:
        """Before a training: make the parts, or bring them to the state of a checkpoint or of :meth:`load`.

        Raises:
            StateError: a checkpoint without our state, or a training that broke off.
            ModelError: a model that is not the saved one's.
        """
        trainer = self.trainer
        if checkpoint is not None:
            if self._session is not None:
                raise StateError(
                    "resume_from_checkpoint begins with a model as it came: make the model, Continual and the trainer anew."
                )
            if not (checkpoint / FOLDER).is_dir():
                raise StateError(
                    f"'{checkpoint}' was written without Continual, or not to its end: resume from another checkpoint."
                )
            self._state = read_state(checkpoint / FOLDER, self.strategy, ())
            check_same("strategy", Strategy.load(self._state["strategy"]).fingerprint(), self.strategy.fingerprint())
        elif self._session is not None and self._session.under_way is not None:
            raise StateError(
                f"the training of '{self._session.under_way}' broke off in its middle: go on from a checkpoint, with the "
                "model, Continual and the trainer made anew and trainer.train(resume_from_checkpoint=True)."
            )
        check_trainer(trainer, self.adapts)
        if self._session is None:
            session = self._open()
            if self._state is not None:
                restore(session, self._state, self._own_monitor)
            self._session, self._state = session, None
        self.training, self._tables = True, {}

    def begin(self) -> None:
        """Parts begin, once the trainer knows how many steps it takes; called before its optimiser is made."""
        trainer, session = self.trainer, self.session
        test, note = (None, None) if self.monitor is None else self._test_rows()
        default = session.under_way or f"update-{len(session.names) + 1}"
        session.begin(
            self.name or default,
            self.table(trainer.train_dataset, 0),
            None if test is None else self.table(test, 2),
            steps=trainer.state.max_steps,
            optimizer=_plain(trainer.optimizer),
            batch_size=trainer.args.per_device_train_batch_size,
            evaluation_rows=trainer.args.per_device_eval_batch_size,
            note=note,
        )

    def table(self, dataset: Any, part: int) -> DatasetTable:
        """Rows of the trainer, 0 for training and 2 for test, as parts read them; the same object in one training."""
        if part not in self._tables:
            trainer, what = self.trainer, "train_dataset" if part == 0 else "the test set"
            rows_N = row_ids(dataset, len(self.session.names), part, what)
            if trainer.args.remove_unused_columns and not set(dataset[0]) & set(self.session.columns):
                raise StreamError(
                    f"{what} has the columns {quoted(dataset[0])} and the model reads none of them: tokenise it, or give it to "
                    "the trainer as eval_dataset where the trainer does so."
                )
            if hasattr(dataset, "column_names"):
                dataset, collate = trainer._remove_unused_columns(dataset, description=what), trainer.data_collator
            else:
                collate = trainer._get_collator_with_removed_columns(trainer.data_collator, description=what)
            self._tables[part] = DatasetTable(dataset, collate, self.session.columns, rows_N)
        return self._tables[part]

    def after_backward(self, loss: Tensor) -> None:
        """Look at the loss; where the backward pass completes a step, let parts change the gradients."""
        accelerator, session = self.trainer.accelerator, self.session
        scaler = accelerator.scaler
        half = scaler is not None and scaler.is_enabled()
        if not half:
            session.check_finite(loss)
        if accelerator.sync_gradients:
            session.edit_gradients(float(scaler.get_scale()) if half else 1.0)

    def write_adapter(self, folder: Path) -> None:
        """The adapter as a plain LoRA folder, among what lies in ``folder`` already."""
        part = next(part for part in self.session.parts if isinstance(part, LoRA | AdaLoRA))
        with tempfile.TemporaryDirectory(dir=folder) as place:
            written = export_adapter(self.session.model, part, Path(place) / "adapter")
            for file in ("adapter_model.safetensors", "adapter_config.json", "continual.json"):
                shutil.move(written / file, folder / file)

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the trainer that is being made."""
        trainer = _caller(self)
        if trainer is not None:
            self.attach(trainer)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimiser is there now."""
        if not self.training:
            raise CompositionError(
                "Continual was added to a trainer that was made before: hand it over when the trainer is made, "
                "callbacks=[Continual(...)], or call memory.attach(trainer)."
            )
        self.session.loop.optimizer = _plain(self.trainer.optimizer)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Passes that are complete."""
        self.session.loop.epoch = int(state.epoch or 0)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the optimiser's step, before gradients are cleared."""
        self.session.after_step(bool(self.trainer.accelerator.optimizer_step_was_skipped))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Our state into the checkpoint that was just written."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        save_state(folder / FOLDER, session_state(self.session, self.strategy, self.seed))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Parts look back, every test set so far is measured, and the figures are logged."""
        update = self.session.end()
        self.name = self.test = None
        self._tables = {}
        if update.retention is not None and self.monitor is not None:
            figures = {
                f"continual/{name}": value for name, value in self.monitor.metrics().items() if value is not None
            }
            lines = {
                f"continual/score/{line.name}": line.after for line in update.retention.lines if line.after is not None
            }
            self.trainer.log({**figures, **lines})

    def _open(self) -> Session:
        trainer = self.trainer
        objective = self.objective or objective_of(trainer.model)
        used, left_out = fitted(self.strategy, trainer.model, objective)
        if self._state is None:
            warn_left_out(trainer, self.strategy, left_out)
        return Session(
            trainer.model,
            used,
            objective=objective,
            scenario=self.scenario,
            seed=self.seed,
            monitor=self.monitor,
            autocast=lambda: self.trainer.accelerator.autocast(),
        )

    def _test_rows(self) -> tuple[Any, str | None]:
        """The data set that measures this experience, or None and perhaps why."""
        trainer, given = self.trainer, self.test
        sets = trainer.eval_dataset
        if isinstance(given, str):
            if not isinstance(sets, Mapping) or given not in sets:
                names = quoted(sets) if isinstance(sets, Mapping) else "none, for it is no mapping"
                raise StreamError(f"test='{given}' names one of the trainer's eval_dataset, which has {names}.")
            return sets[given], None
        if given is not None or sets is None:
            return given, None
        if isinstance(sets, Mapping):
            return None, f"eval_dataset holds {quoted(sets)}: to measure by one of them, name it, test=..."
        stops = any(isinstance(callback, EarlyStoppingCallback) for callback in trainer.callback_handler.callbacks)
        if stops or trainer.args.load_best_model_at_end:
            return None, "the trainer selects by eval_dataset, so it cannot measure too: give other rows, test=..."
        return sets, None


def _plain(optimizer: Any) -> torch.optim.Optimizer | None:
    """The optimiser without what accelerate has put around it."""
    inner = getattr(optimizer, "optimizer", None)
    found: torch.optim.Optimizer | None = inner if isinstance(inner, torch.optim.Optimizer) else optimizer
    return found


def _caller(callback: TrainerCallback) -> Any:
    """The trainer that is calling a callback, which its handler does not say."""
    frame = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer) and any(one is callback for one in found.callback_handler.callbacks):
            return found
        frame = frame.f_back  # type: ignore[assignment]
    return None
