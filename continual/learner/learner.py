"""The learner: a model, a strategy, and one update after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from continual.engine import Engine
from continual.errors import CompositionError, ModelError, StateError, StreamError, TrainingError, quoted
from continual.learner.checkpoint import check_same
from continual.learner.erasing import Erasing
from continual.learner.optimizer import load_optimizers, make_optimizer
from continual.learner.result import result_of
from continual.learner.trainer import Progress, Trainer
from continual.learner.update import Run, Update
from continual.monitor.advice import EXACT
from continual.monitor.evaluation import evaluating, score_tables
from continual.parts.head.closed_form import Familiar
from continual.parts.part import Part
from continual.streams.check import require_experience, require_stream
from continual.streams.convert import as_experience, as_table
from continual.streams.experience import Experience
from continual.streams.stream import Stream
from continual.table import Batch, Table, TensorTable, concat, to_device


class Learner(Erasing):
    """Keeps one model learning.

    Args:
        model: a Hugging Face name or folder, ``mlp``, ``package.module:Class``, a mapping as in a stream's ``model``
            key, or an ``nn.Module`` (called with the inputs of a batch; gives logits).
        strategy: a name of the library, a YAML file, a mapping, or a :class:`~continual.strategy.Strategy`.
        seed: root of every random draw.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` …
        monitor: what measures retention; None makes one, False measures nothing.
        objective, scenario: for :meth:`update` with data of your own; a stream brings its own.
        folder: where checkpoints go; None keeps none.
        save_every: optimiser steps between checkpoints within an experience; None saves at boundaries only.
        track: name of a tracker of ``accelerate`` (``tensorboard``, ``wandb``, ``mlflow`` …).
        progress: progress bars; None shows them only on a terminal.

    Raises:
        SpecError, ModelError, CompositionError: what was asked for cannot be.
    """

    def update(
        self,
        data: Any,
        *,
        test: Any = None,
        valid: Any = None,
        name: str | None = None,
        tree: bool = True,
    ) -> Update:
        """Learn from one experience and measure every test set so far.

        No test row may be among the training or valid rows, by id or by content. Training rows with the content of an
        earlier test row, and test rows with the content of a row that was trained on, are left out; the update's notes
        say so.

        Args:
            data: an :class:`Experience`, or the training rows as a ``Table``, a torch ``Dataset`` or ``DataLoader``, a
                ``datasets.Dataset``, ``(inputs, labels)``, a mapping of columns or a data frame.
            test, valid: rows of the same kind to measure and to select on.
            name: shown in the retention tree.
            tree: False leaves the tree and its intervals out, which take time where there are hundreds of test sets.

        Raises:
            ContinualError: data, model or strategy that cannot be; training whose loss is not finite.
        """
        if isinstance(data, Experience):
            experience = data
        else:
            experience = as_experience(
                data,
                index=self.updates,
                name=name or f"update-{self.updates + 1}",
                test=test,
                valid=valid,
                known_names=self.class_names if self._pending is None else self.known_names,
                scenario=self.scenario,
                objective=self.objective,
            )
        require_experience(experience)
        return self._update(experience, tree=tree)

    def run(
        self,
        stream: Stream | str | Path | Mapping[str, Any],
        *,
        data: Path | None = None,
        on_update: Callable[[Update], None] | None = None,
    ) -> Run:
        """Update on every experience of a stream that has not been learnt yet; goes on where a loaded state stands.

        A stream to which experiences were appended since, or a longer slice of it, is gone on with as well.

        Args:
            data: folder of the stream's data, where the stream is a name, a file or a mapping.
            on_update: called after each update.

        Raises:
            StreamError: what ``check_stream`` finds.
            StateError: the learner's state belongs to another stream.
        """
        if not isinstance(stream, Stream):
            stream = Stream.load(stream, data=data, seed=self.seed)
        require_stream(stream)
        self.strategy.check(objective=stream.objective, gives_features=True, open_stream=stream.open)
        begun = self.updates + (self._pending is not None)
        if self.learnt_fingerprint is not None and begun:
            learnt = len(stream) if self.strategy.data == "joint" else begun
            given = stream.fingerprint(learnt) if learnt <= len(stream) else f"{len(stream)} of {learnt} experiences"
            check_same("stream", self.learnt_fingerprint, given)
        elif begun and self.strategy.data != "joint" and begun <= len(stream):
            names = stream[begun - 1].class_names
            if names != self.class_names:
                raise StateError(
                    f"the learner knows the classes {quoted(self.class_names)}, and after {begun} experiences this stream has "
                    f"{quoted(names)}: where all rows of a class were erased, go on with update(), which goes by names."
                )
        self.stream_name, self.stream_fingerprint = stream.name, stream.fingerprint()
        self.notes.extend(note for note in stream.notes if note not in self.notes)
        run = Run()
        for experience in self._todo(stream):
            run.updates.append(self._update(experience, stream))
            if on_update is not None:
                on_update(run.updates[-1])
        run.result = result_of(self, stream.summary, stream.scenario)
        return run

    def predict(self, rows: Any, *, experience: int | None = None, batch_size: int | None = None) -> dict[str, Any]:
        """Predictions for rows: ``labels`` (class ids (N,), values (N, K)) and ``scores`` (probabilities (N, K)).

        A head without gradients also says how ``familiar`` each row is, float32 (N,): higher is more like what was learnt.

        Args:
            rows: a list of texts, a tensor or array of inputs, or anything that :meth:`update` takes.
            experience: in the task scenario, whose classes compete, and whose adapter answers where each has its own.
            batch_size: rows of one forward pass; None takes those of the evaluation.

        Raises:
            ModelError: nothing was learnt yet, or the objective has no such prediction.
        """
        if self.objective not in ("classification", "regression"):
            raise ModelError("predict() is for classification and regression: call the model's own generate() instead.")
        context = self.context
        table = self._encoded(_unlabelled(rows))
        batch_size = batch_size or self.evaluation_rows
        found: list[torch.Tensor] = []
        familiar: list[torch.Tensor] = []
        head = self.model.head
        with self.randomness.framework(), evaluating(self.model):
            for start in range(0, len(table), batch_size):
                index = torch.arange(start, min(start + batch_size, len(table)))
                batch = to_device(table[index], self.device)
                if experience is not None:
                    batch["experience"] = torch.full((len(index),), experience, device=self.device)
                output = self.answer(batch)
                found.append(output.logits.float().cpu())
                if isinstance(head, Familiar) and output.features is not None:
                    familiar.append(head.familiarity(output.features).cpu())
        logits_NK = torch.cat(found) if found else torch.empty(0, len(context.owner))
        if self.objective == "regression":
            return {"labels": logits_NK}
        owner = torch.tensor(context.owner)
        competes = owner == experience if experience is not None else owner >= 0
        if not bool(competes.any()):
            raise ModelError(f"experience {experience} has no classes here: name one from 0 to {self.updates - 1}.")
        scores_NK = logits_NK.masked_fill(~competes, -torch.inf).softmax(-1)
        labels_N = scores_NK.argmax(-1)
        names = [self.class_names[i] for i in labels_N.tolist()]
        extra = {"familiar": torch.cat(familiar)} if familiar else {}
        return {"labels": labels_N, "names": names, "scores": scores_NK, **extra}

    # One update

    def _update(self, experience: Experience, stream: Stream | None = None, tree: bool = True) -> Update:
        if stream is None and self.strategy.data == "joint":
            raise CompositionError(
                "data: joint trains once on a whole stream: call run(stream), or take 'cumulative' to update step by step."
            )
        if self._failed is not None:
            raise StateError(
                f"the update on '{self._failed}' broke off in the middle, and the learner holds what it had reached: go on "
                "from its last save with Learner.load(folder), or make a new learner."
            )
        with self.randomness.framework():
            if self._model is None:
                self._build(experience)
            notes_before = len(self.notes)
            found = self._admitted(experience) if stream is None else experience
            own = self._encode_all(found)
            experience = self._with_past(own)
            self._check(experience)
            self._look_at(experience, stream)
            self._failed = experience.name
            progress = self._begin(experience, stream)
            if self.context.experience is None:
                self.context.experience = experience
            self._fit(experience, progress)
            started = time.perf_counter()
            self.context.end()
            progress.seconds += time.perf_counter() - started
            reporting: list[Part | Engine] = [*self.parts, *([] if self._engine is None else [self._engine])]
            for part in reporting:
                report = getattr(part, "report", None)
                sentence = report() if report is not None else None
                if sentence:
                    self.notes.append(f"{experience.name}: {part.name}: {sentence}")
            self.cost["train_seconds"] += progress.seconds
            self.cost["rows_trained"] += progress.rows
            self.updates += 1
            self.steps += progress.step
            if self.strategy.data == "cumulative":
                self._past.append((own.train, own.valid))
            if stream is None:
                self.ledger.add(found)
            started = time.perf_counter()
            self._measure(experience, stream)
            monitor_seconds = time.perf_counter() - started
            self.cost["monitor_seconds"] += monitor_seconds
            self._pending = None
            if self.folder is not None and self._engine is None:
                self._checkpoint(None)
            self._failed = None
        slots: list[str] | None = sorted({part.slot for part in self.parts}) if self._engine is None else None
        if slots is not None and any(part.slot == "head" and "replay" in part.excludes for part in self.parts):
            slots.append(EXACT)
        measured = tree and self.monitor is not None and self.monitor.measured
        retention = self.monitor.latest(hint=slots, name=experience.name) if measured and self.monitor else None
        update = Update(
            index=experience.index,
            name=experience.name,
            retention=retention,
            steps=progress.step,
            rows=progress.rows,
            train_seconds=progress.seconds,
            monitor_seconds=monitor_seconds,
            stopped_early=progress.stopped_early,
            notes=tuple(self.notes[notes_before:]),
        )
        if self._tracking and retention is not None:
            figures = {f"monitor/{k}": v for k, v in self.monitor.metrics().items() if v is not None}  # type: ignore[union-attr]
            self.accelerator.log(figures, step=self.steps)
        return update

    def _begin(self, experience: Experience, stream: Stream | None) -> Progress:
        training, context = self.strategy.training, self.context
        if self._pending is not None:
            context.experience = experience
            return self._pending
        batches = -(-len(experience.train) // training.batch_size)
        per_epoch = -(-batches // training.accumulate)
        steps = training.iterations or (training.epochs or 1) * per_epoch
        context.batch_size = training.batch_size
        if training.fresh_optimizer:
            context.optimizer = None
        if any(parameter.requires_grad for parameter in self.model.parameters()):
            load_optimizers()
        started = time.perf_counter()
        context.begin(experience, steps=steps)
        if self._engine is not None:
            self._engine.begin(experience)
        elif context.optimizer is None and context.parameters():
            context.optimizer = make_optimizer(training, context.parameters())
        self._mark_altered()
        self.model.to(self.device)
        progress = Progress(seconds=time.perf_counter() - started)
        if experience.index == 0 and self.monitor is not None and self._comparable(experience):
            if stream is not None:
                self._register_ahead(stream, range(len(stream)))
            tables, probes = self.monitor.tables(), self.monitor.probes
            with evaluating(self.model):
                scores = score_tables(
                    self._measurable([*tables.values(), *probes.values()]),
                    self.answer,
                    context.active_at_test,
                    self.objective,
                    self.device,
                    self.evaluation_rows,
                )
            self.monitor.record_initial(
                dict(zip(tables, scores, strict=False)), dict(zip(probes, scores[len(tables) :], strict=True))
            )
        return progress

    def _fit(self, experience: Experience, progress: Progress) -> None:
        """Train on an experience: our loop, or the engine in its place."""
        if self._engine is not None:
            trained = self._engine.fit(experience)
            progress.step, progress.rows = trained.steps, trained.rows
            progress.seconds += trained.seconds
            progress.done = True
            return
        trainer = Trainer(
            self.context,
            self.strategy.training,
            self.processes,
            save_every=self.save_every,
            checkpoint=self._checkpoint if self.folder is not None else None,
            log=self._log if self._tracking else None,
            show_progress=self.progress,
            evaluation_rows=self.evaluation_rows,
        )
        trainer.fit(experience, progress)

    def _measure(self, experience: Experience, stream: Stream | None) -> None:
        if self.monitor is None:
            return
        known = list(self._tests())
        if stream is not None and self.strategy.data != "joint" and self._comparable(experience):
            following = range(experience.index + 1, min(experience.index + 2, len(stream)))
            self._register_ahead(stream, following)
            known = [*known, *following]
        context = self.context
        with evaluating(self.model):
            self.monitor.measure(
                experience.index,
                self.answer,
                context.active_at_test,
                self.objective,
                self.device,
                known,
                self.evaluation_rows,
                self._measurable,
            )

    def _measurable(self, tables: list[Table]) -> list[Table]:
        """The tables as they are measured: with features in the place of inputs where the backbone does not train."""
        if self._engine is not None:
            return tables
        return self.context.features.of(tables, self.evaluation_rows, "tests")

    def _register_ahead(self, stream: Stream, indices: Iterable[int]) -> None:
        """Let the monitor see test sets that are not learnt yet, for forward transfer."""
        for index in indices:
            test = stream[index].test
            if self.monitor is not None and test is not None and len(test):
                self.monitor.register(index, stream[index].name, self._encoded(test), ahead=True)

    def _comparable(self, experience: Experience) -> bool:
        """Whether a test set can be measured before its experience was learnt: every class has an output from the start."""
        return self.objective != "classification" or (
            experience.scenario == "domain" and experience.total_classes is not None
        )

    def _encode_all(self, experience: Experience) -> Experience:
        valid = experience.valid
        return replace(
            experience,
            train=self._encoded(experience.train),
            valid=self._encoded(valid) if valid is not None and len(valid) else None,
            test=None if experience.test is None else self._encoded(experience.test),
        )

    def _with_past(self, experience: Experience) -> Experience:
        """The experience with the rows of all earlier ones, where the strategy trains on them."""
        if self.strategy.data != "cumulative":
            return experience
        if experience.index != len(self._past):
            raise StateError(
                f"data: cumulative needs the rows of all {experience.index} earlier experiences and has those of "
                f"{len(self._past)}: run it over a stream, or update it from the first experience on."
            )
        valids = [table for _, table in [*self._past, (experience.train, experience.valid)] if table is not None]
        return replace(
            experience,
            train=concat([*(table for table, _ in self._past), experience.train]),
            valid=concat(valids) if valids else None,
        )

    def _admitted(self, experience: Experience) -> Experience:
        """The experience without rows that would spoil a measurement; says what is left out and what is not measured."""
        admitted, notes = self.ledger.admit(experience)
        if self._pending is not None:
            return admitted  # said before the run was cut off
        self.notes += notes
        absent = self.monitor.absent() if self.monitor is not None else {}
        names = [name for index, name in absent.items() if index < experience.index]
        if names:
            self.notes.append(
                f"the state that was loaded is a checkpoint of a run, without the test sets of {quoted(names)}: they are "
                "not measured here; go on with run(stream), or load what Learner.save() wrote."
            )
        return admitted

    def _check(self, experience: Experience) -> None:
        """Refuse, before anything has changed, what could only fail later."""
        if len(experience.train) == 0:
            raise StateError(f"experience '{experience.name}' has no training rows: leave it out or give it some.")
        if self._pending is None and experience.name in self.experience_names[: experience.index]:
            raise StateError(
                f"an experience called '{experience.name}' was learnt already: give each its own name, since reports and "
                "the gate speak of them by name."
            )
        if self.strategy.training.early_stopping is not None and (
            experience.valid is None or len(experience.valid) == 0
        ):
            raise TrainingError(
                f"training.early_stopping needs rows to select on, and experience '{experience.name}' has no valid rows: "
                "give it some, or leave early_stopping out (it never looks at test rows)."
            )
        self._check_rows(experience)
        if not self.model.gives_features:
            self.context.check_outputs(experience)

    def _check_rows(self, experience: Experience) -> None:
        """Rows of one form in all parts, and of earlier test sets, which the backbone can read."""
        first = torch.zeros(1, dtype=torch.int64)
        wanted = experience.train[first]
        with evaluating(self.model):
            self.model.backbone(to_device(wanted, self.device))
        others = {f"test rows of '{self.experience_names[i]}'": table for i, table in self._tests().items()}
        others |= {"valid rows": experience.valid, "test rows": experience.test}  # type: ignore[dict-item]
        for what, table in others.items():
            if table is None or not len(table):
                continue
            one, other = _form(wanted), _form(table[first])
            if one != other:
                raise StreamError(
                    f"the training rows of '{experience.name}' have {one} and the {what} have {other}: give all rows of a "
                    "stream the same form."
                )

    def _look_at(self, experience: Experience, stream: Stream | None) -> None:
        """Take in what an experience says of itself, and keep its test set."""
        if self._pending is not None:
            if self._pending_name != experience.name:
                raise StateError(
                    f"the saved state stands in the middle of experience '{self._pending_name}', and '{experience.name}' was "
                    "given: go on with the same experience."
                )
        elif experience.index != self.updates and self.strategy.data != "joint":
            raise StateError(
                f"experience '{experience.name}' has index {experience.index}, and the next one to learn is "
                f"{self.updates}: give the experiences in their order."
            )
        if self._pending is None:
            self.known_names = self.class_names
        self.class_names = experience.class_names or self.class_names
        if stream is not None:
            reach = len(stream) if self.strategy.data == "joint" else experience.index + 1
            self.learnt_fingerprint = stream.fingerprint(reach)
        if self.strategy.data == "joint" and stream is not None:
            for each in stream:
                if each.test is not None and len(each.test):
                    self._keep_test(each.index, each.name, self._encoded(each.test))
            self.experience_names = [each.name for each in stream]
        else:
            self.experience_names = [*self.experience_names[: experience.index], experience.name]
            if experience.test is not None and len(experience.test):
                self._keep_test(experience.index, experience.name, experience.test)

    def _todo(self, stream: Stream) -> list[Experience] | Stream:
        if self.strategy.data == "joint":
            return [] if self.updates else [stream.joint()[0]]
        self._past = []
        for experience in stream[: self.updates]:
            if self.strategy.data == "cumulative":
                valid = experience.valid
                self._past.append(
                    (
                        self._encoded(experience.train),
                        self._encoded(valid) if valid is not None and len(valid) else None,
                    )
                )
            if experience.test is not None and len(experience.test):
                self._keep_test(experience.index, experience.name, self._encoded(experience.test))
        return stream[self.updates :]

    def _log(self, figures: dict[str, float], step: int) -> None:
        self.accelerator.log(figures, step=self.steps + step)


def _form(batch: Batch) -> str:
    """What a model reads of a row; tokens have no width of their own."""
    if "input_ids" in batch:
        return "tokens"
    if "inputs" in batch:
        return f"{' × '.join(map(str, batch['inputs'].shape[1:])) or '1'} inputs"
    return quoted(sorted(batch))


def _unlabelled(rows: Any) -> Table:
    """Rows to predict: a list of texts, a tensor or array of inputs, or anything that has labels as well."""
    if isinstance(rows, list) and rows and all(isinstance(row, str) for row in rows):
        return TensorTable({"text": rows})
    if isinstance(rows, torch.Tensor):
        return TensorTable({"inputs": rows})
    if isinstance(rows, np.ndarray) and rows.dtype.kind in "fiu":
        return TensorTable({"inputs": torch.tensor(rows, dtype=torch.float32)})
    return as_table(rows, what="predict")
