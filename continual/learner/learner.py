"""The learner: a model, a strategy, and one update after another."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from continual.errors import CompositionError, ModelError, SpecError, StateError
from continual.learner.checkpoint import FORMAT, check_same, table_from_state, table_state
from continual.learner.optimizer import load_optimizer_state, make_optimizer, optimizer_state
from continual.learner.result import result_of
from continual.learner.trainer import Progress, Trainer
from continual.learner.update import Run, Update
from continual.models.build import build_model
from continual.models.model import Model
from continual.monitor.evaluation import evaluating, score_tables
from continual.monitor.monitor import Monitor
from continual.objective import Objective
from continual.parts.adapter.adalora import AdaLoRA
from continual.parts.adapter.export import export_adapter
from continual.parts.adapter.lora import LoRA
from continual.parts.context import TrainingContext
from continual.parts.head.linear import LinearHead
from continual.parts.part import SLOTS, Part
from continual.provenance import now
from continual.randomness import Randomness
from continual.state import load_state, save_state, tensor_bytes
from continual.strategy import Strategy
from continual.streams.check import require_stream
from continual.streams.convert import as_experience, as_table
from continual.streams.experience import Experience, Scenario
from continual.streams.stream import Stream
from continual.streams.text import encode
from continual.table import Table, TensorTable, concat, to_device

TEXT_COLUMNS = ("text", "prompt", "messages")


class Learner:
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

    def __init__(
        self,
        model: str | Mapping[str, Any] | nn.Module = "mlp",
        strategy: str | Path | Mapping[str, Any] | Strategy = "naive",
        *,
        seed: int = 0,
        device: str = "auto",
        monitor: Monitor | bool | None = None,
        objective: Objective = "classification",
        scenario: Scenario = "class",
        folder: Path | str | None = None,
        save_every: int | None = None,
        track: str | None = None,
        progress: bool | None = None,
    ) -> None:
        self.strategy = Strategy.load(strategy)
        self.seed = int(seed)
        self.randomness = Randomness(self.seed)
        self.device = resolve_device(device)
        self.monitor: Monitor | None = Monitor() if monitor is None or monitor is True else (monitor or None)
        self.objective, self.scenario = objective, scenario
        self.folder = Path(folder) if folder is not None else None
        self.save_every, self.track, self.progress = save_every, track, progress
        self.class_names: tuple[str, ...] = ()
        self.stream_name: str | None = None
        self.stream_fingerprint: str | None = None
        self.updates = 0
        self.experience_names: list[str] = []
        self.cost: dict[str, float] = {"train_seconds": 0.0, "monitor_seconds": 0.0, "rows_trained": 0}
        self.notes: list[str] = []
        self.started = now()
        self._model_spec: str | Mapping[str, Any] | nn.Module = model
        self._model: Model | None = None
        self._context: TrainingContext | None = None
        self._past: list[tuple[Table, Table | None]] = []
        self._pending: Progress | None = None
        self._pending_name: str | None = None
        self._tracking = False
        self.accelerator = self._accelerator()

    # The model and what surrounds it

    @property
    def model(self) -> Model:
        """The model as it is now.

        Raises:
            ModelError: it is made at the first update, and there was none yet.
        """
        if self._model is None:
            raise ModelError("the model is made at the first update, which has not been: call update() first.")
        return self._model

    @property
    def context(self) -> TrainingContext:
        """What the parts see."""
        if self._context is None:
            raise ModelError("the parts are made at the first update, which has not been: call update() first.")
        return self._context

    @property
    def parts(self) -> list[Part]:
        """The parts of the strategy, with their state."""
        return self.context.parts

    def update(
        self,
        data: Any,
        *,
        test: Any = None,
        valid: Any = None,
        name: str | None = None,
    ) -> Update:
        """Learn from one experience and measure every test set so far.

        Args:
            data: an :class:`Experience`, or the training rows as a ``Table``, a torch ``Dataset`` or ``DataLoader``, a
                ``datasets.Dataset``, ``(inputs, labels)``, a mapping of columns or a data frame.
            test, valid: rows of the same kind to measure and to select on.
            name: shown in the retention tree.

        Raises:
            ContinualError: data, model or strategy that cannot be; training whose loss is not finite.
        """
        if isinstance(data, Experience):
            experience = data
        else:
            experience = as_experience(
                data,
                index=self.updates,
                name=name or f"update-{self.updates}",
                test=test,
                valid=valid,
                known_names=self.class_names,
                scenario=self.scenario,
                objective=self.objective,
            )
        return self._update(experience)

    def run(self, stream: Stream | str | Path | Mapping[str, Any], *, data: Path | None = None) -> Run:
        """Update on every experience of a stream that has not been learnt yet; goes on where a loaded state stands.

        Raises:
            StreamError: what ``check_stream`` finds.
            StateError: the learner's state belongs to another stream.
        """
        if not isinstance(stream, Stream):
            stream = Stream.load(stream, data=data, seed=self.seed)
        require_stream(stream)
        self.strategy.check(objective=stream.objective, gives_features=True, open_stream=stream.open)
        fingerprint = stream.fingerprint()
        if self.stream_fingerprint is not None:
            check_same("stream", self.stream_fingerprint, fingerprint)
        self.stream_name, self.stream_fingerprint = stream.name, fingerprint
        run = Run(self)
        for experience in self._todo(stream):
            run.updates.append(self._update(experience, stream))
        run.result = result_of(self, stream.summary, stream.scenario)
        return run

    def predict(self, rows: Any, *, experience: int | None = None, batch_size: int = 256) -> dict[str, Any]:
        """Predictions for rows: ``labels`` (class ids (N,), values (N, K)) and ``scores`` (probabilities (N, K)).

        Args:
            rows: a list of texts, a tensor or array of inputs, or anything that :meth:`update` takes.
            experience: in the task scenario, whose classes compete.

        Raises:
            ModelError: nothing was learnt yet, or the objective has no such prediction.
        """
        if self.objective not in ("classification", "regression"):
            raise ModelError("predict() is for classification and regression: call the model's own generate() instead.")
        context = self.context
        table = self._encoded(_unlabelled(rows))
        found = []
        with self.randomness.framework(), evaluating(self.model):
            for start in range(0, len(table), batch_size):
                index = torch.arange(start, min(start + batch_size, len(table)))
                found.append(context.forward(to_device(table[index], self.device)).logits.float().cpu())
        logits_NK = torch.cat(found) if found else torch.empty(0, len(context.owner))
        if self.objective == "regression":
            return {"labels": logits_NK}
        owner = torch.tensor(context.owner)
        competes = owner == experience if experience is not None else owner >= 0
        scores_NK = logits_NK.masked_fill(~competes, -torch.inf).softmax(-1)
        labels_N = scores_NK.argmax(-1)
        return {"labels": labels_N, "names": [self.class_names[i] for i in labels_N.tolist()], "scores": scores_NK}

    # State

    def save(self, folder: Path | str) -> Path:
        """Write the whole state, test sets included, so that :meth:`load` goes on bit for bit.

        Raises:
            StateError: the folder cannot be written; what was there is untouched.
        """
        save_state(Path(folder), self._state(with_tests=True))
        return Path(folder)

    def export(self, folder: Path | str, *, max_rank: int | None = None) -> Path:
        """Write what the adapters learnt as one plain LoRA folder that stock PEFT loads on the original base.

        Args:
            max_rank: refuse a rank above it, such as a server's limit.

        Raises:
            CompositionError: the strategy trains no adapter.
        """
        for part in self.parts:
            if isinstance(part, LoRA | AdaLoRA):
                return export_adapter(self.model, part, Path(folder), max_rank=max_rank)
        raise CompositionError(f"strategy '{self.strategy.name}' trains no adapter: export() is for those that do.")

    @classmethod
    def load(
        cls,
        source: Path | str,
        /,
        *,
        model: nn.Module | None = None,
        strategy: str | Path | Mapping[str, Any] | Strategy | None = None,
        **options: Any,
    ) -> Learner:
        """A learner as :meth:`save` or a checkpoint left it.

        Args:
            model: the module, where the learner was made with an ``nn.Module`` object.
            strategy: when given, it must be the one that was saved.
            options: as for the constructor (``device``, ``monitor``, ``folder`` …).

        Raises:
            StateError: damaged, or of another strategy.
            ModelError: the base model is not the one that was recorded.
        """
        state = load_state(Path(source))
        if state.get("format") != FORMAT:
            raise StateError(f"'{source}' has format {state.get('format')!r}, this version reads {FORMAT}.")
        saved = Strategy.load({**state["strategy"], "name": state["strategy_name"]})
        if strategy is not None:
            check_same("strategy", saved.fingerprint(), Strategy.load(strategy).fingerprint())
        spec = state["model_spec"]
        if model is None and isinstance(spec, dict) and spec.get("kind") == "object":
            raise StateError(
                f"'{source}' was made with a model object ({spec.get('class')}): hand the same model in, "
                "Learner.load(folder, model=...)."
            )
        learner = cls(
            model if model is not None else spec,
            saved,
            seed=state["seed"],
            objective=state["objective"],
            scenario=state["scenario"],
            **options,
        )
        learner._restore(state)
        return learner

    def _state(self, *, with_tests: bool, progress: Progress | None = None) -> dict[str, Any]:
        context = self.context
        optimizer = context.optimizer
        return {
            "format": FORMAT,
            "seed": self.seed,
            "strategy": self.strategy.to_dict(),
            "strategy_name": self.strategy.name,
            "model_spec": dict(self.model.spec),
            "base_model_sha256": self.model.base_sha256,
            "objective": self.objective,
            "scenario": self.scenario,
            "class_names": list(self.class_names),
            "stream": {"name": self.stream_name, "fingerprint": self.stream_fingerprint},
            "updates": self.updates,
            "experience_names": list(self.experience_names),
            "cost": dict(self.cost),
            "notes": list(self.notes),
            "started": self.started,
            "owner": list(context.owner),
            "position": {
                "index": context.experience_index,
                "step": context.step,
                "steps": context.steps,
                "epoch": context.epoch,
                "name": context.experience.name if context.experience else None,
            },
            "progress": progress.state_dict() if progress else None,
            "parts": {f"{i}:{part.name}": part.state_dict() for i, part in enumerate(context.parts)},
            "weights": self.model.saved_tensors(),
            "optimizer": optimizer_state(optimizer, context.parameters()) if optimizer else None,
            "randomness": self.randomness.state_dict(),
            "monitor": self.monitor.state_dict() if self.monitor else None,
            "tests": {str(i): table_state(table) for i, table in self._tests().items()} if with_tests else {},
        }

    def _restore(self, state: dict[str, Any]) -> None:
        with self.randomness.framework():
            self._build(None, state)
            model, context = self.model, self.context
            if state["base_model_sha256"] != model.base_sha256:
                raise ModelError(
                    f"the base model has SHA-256 {str(model.base_sha256)[:12]}…, the state was made on "
                    f"{str(state['base_model_sha256'])[:12]}…: give the same base model."
                )
            for index, part in enumerate(context.parts):
                part.load_state_dict(state["parts"][f"{index}:{part.name}"])
            model.load_saved(state["weights"])
            model.to(self.device)
            context.set_owner(state["owner"])
            position = state["position"]
            context.experience_index, context.step = position["index"], position["step"]
            context.steps, context.epoch = position["steps"], position["epoch"]
            context._parameters = None
            if state["optimizer"] is not None:
                context.optimizer = make_optimizer(self.strategy.training, context.parameters())
                load_optimizer_state(context.optimizer, context.parameters(), state["optimizer"])
            self.class_names = tuple(state["class_names"])
            self.stream_name, self.stream_fingerprint = state["stream"]["name"], state["stream"]["fingerprint"]
            self.updates, self.experience_names = state["updates"], list(state["experience_names"])
            self.cost, self.notes, self.started = dict(state["cost"]), list(state["notes"]), state["started"]
            if self.monitor is not None and state["monitor"] is not None:
                self.monitor.load_state_dict(state["monitor"])
            for index, table in state["tests"].items():
                self._keep_test(int(index), self.experience_names[int(index)], table_from_state(table))
            if state["progress"] is not None:
                self._pending = Progress(**state["progress"])
            self.randomness.load_state_dict(state["randomness"])

    # One update

    def _update(self, experience: Experience, stream: Stream | None = None) -> Update:
        with self.randomness.framework():
            if self._model is None:
                self._build(experience)
            experience = self._prepared(experience)
            self._look_at(experience, stream)
            notes_before = len(self.notes)
            progress = self._begin(experience, stream)
            trainer = Trainer(
                self.context,
                self.strategy.training,
                self.accelerator,
                save_every=self.save_every,
                checkpoint=self._checkpoint if self.folder is not None else None,
                log=self._log if self._tracking else None,
                show_progress=self.progress,
            )
            if self.context.experience is None:
                self.context.experience = experience
            trainer.fit(experience, progress)
            started = time.perf_counter()
            self.context.end()
            progress.seconds += time.perf_counter() - started
            for part in self.parts:
                report = getattr(part, "report", None)
                sentence = report() if report is not None else None
                if sentence:
                    self.notes.append(f"{experience.name}: {part.name}: {sentence}")
            self.cost["train_seconds"] += progress.seconds
            self.cost["rows_trained"] += progress.rows
            self.updates += 1
            started = time.perf_counter()
            self._measure(experience, stream)
            monitor_seconds = time.perf_counter() - started
            self.cost["monitor_seconds"] += monitor_seconds
            self._pending = None
            if self.folder is not None:
                self._checkpoint(None)
        slots = sorted({part.slot for part in self.parts})
        retention = self.monitor.latest(hint=slots) if self.monitor and self.monitor.measured else None
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
            self.accelerator.log(figures, step=self.updates)
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
        started = time.perf_counter()
        context.begin(experience, steps=steps)
        if context.optimizer is None and context.parameters():
            context.optimizer = make_optimizer(training, context.parameters())
        self._mark_altered()
        self.model.to(self.device)
        progress = Progress(seconds=time.perf_counter() - started)
        if experience.index == 0 and stream is not None and self.monitor is not None and self._comparable(experience):
            self._register_ahead(stream, range(len(stream)))
            tables = self.monitor.tables()
            with evaluating(self.model):
                scores = score_tables(
                    list(tables.values()), context.forward, context.active_at_test, self.objective, self.device
                )
            self.monitor.record_initial(dict(zip(tables, scores, strict=True)))
        return progress

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
                experience.index, context.forward, context.active_at_test, self.objective, self.device, known
            )

    def _register_ahead(self, stream: Stream, indices: Iterable[int]) -> None:
        """Let the monitor see test sets that are not learnt yet, for forward transfer."""
        for index in indices:
            test = stream[index].test
            if self.monitor is not None and test is not None and len(test):
                self.monitor.register(index, stream[index].name, self._encoded(test), ahead=True)

    def _tests(self) -> dict[int, Table]:
        """Test sets of the experiences learnt so far, or under way."""
        if self.monitor is None:
            return {}
        return {index: table for index, table in self.monitor.tables().items() if index < len(self.experience_names)}

    def _comparable(self, experience: Experience) -> bool:
        """Whether a test set can be measured before its experience was learnt: every class has an output from the start."""
        return self.objective != "classification" or (
            experience.scenario == "domain" and experience.total_classes is not None
        )

    def _prepared(self, experience: Experience) -> Experience:
        train, valid = self._encoded(experience.train), experience.valid
        valid = self._encoded(valid) if valid is not None and len(valid) else None
        if self.strategy.data == "cumulative":
            if experience.index != len(self._past):
                raise StateError(
                    f"data: cumulative needs the rows of all {experience.index} earlier experiences and has those of "
                    f"{len(self._past)}: run it over a stream, or update it from the first experience on."
                )
            self._past.append((train, valid))
            train = concat([table for table, _ in self._past])
            valids = [table for _, table in self._past if table is not None]
            valid = concat(valids) if valids else None
        return replace(
            experience,
            train=train,
            valid=valid,
            test=None if experience.test is None else self._encoded(experience.test),
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
        if len(experience.train) == 0:
            raise StateError(f"experience '{experience.name}' has no training rows: leave it out or give it some.")
        self.class_names = experience.class_names or self.class_names
        if self.strategy.data == "joint" and stream is not None:
            for each in stream:
                if each.test is not None and len(each.test):
                    self._keep_test(each.index, each.name, self._encoded(each.test))
            self.experience_names = [each.name for each in stream]
        else:
            self.experience_names = [*self.experience_names[: experience.index], experience.name]
            if experience.test is not None and len(experience.test):
                self._keep_test(experience.index, experience.name, experience.test)

    def _keep_test(self, index: int, name: str, table: Table) -> None:
        if self.monitor is not None:
            self.monitor.register(index, name, table)

    def _todo(self, stream: Stream) -> list[Experience] | Stream:
        if self.strategy.data == "joint":
            return [] if self.updates else [stream.joint()[0]]
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

    # Making things

    def _build(self, experience: Experience | None, state: dict[str, Any] | None = None) -> None:
        """Make the model and the parts, for an experience or as a state says."""
        if experience is not None:
            self.objective, self.scenario = experience.objective, experience.scenario
        example = None
        if experience is not None and not any(name in experience.train.names for name in TEXT_COLUMNS):
            example = experience.train[torch.zeros(1, dtype=torch.int64)]
        kind = self._model_spec.get("kind") if isinstance(self._model_spec, Mapping) else self._model_spec
        if experience is not None and example is None and kind == "mlp":
            raise ModelError(
                f"the rows of '{experience.name}' are text and an mlp has no tokenizer: name a Hugging Face model, such as "
                "sentence-transformers/all-MiniLM-L6-v2."
            )
        model = build_model(self._model_spec, objective=self.objective, example=example)
        if experience is not None and example is None and model.tokenizer is None:
            raise ModelError(
                f"the rows of '{experience.name}' are text and the model has no tokenizer: name a Hugging Face model, such "
                "as sentence-transformers/all-MiniLM-L6-v2."
            )
        self.strategy.check(objective=self.objective, gives_features=model.gives_features)
        parts = self.strategy.make_parts()
        if model.gives_features and not any(part.slot == "head" for part in parts):
            parts.append(LinearHead())
        parts.sort(key=lambda part: SLOTS.index(part.slot))
        if self.strategy.backbone == "frozen":
            model.backbone.requires_grad_(False)
        model.to(self.device)
        training = self.strategy.training
        competition = training.active or ("experience" if self.scenario == "task" else "seen")
        self._model = model
        self._pending_name = state["position"]["name"] if state else None
        self._context = TrainingContext(
            model,
            parts,
            objective=self.objective,
            scenario=self.scenario,
            competition=competition,
            device=self.device,
            randomness=self.randomness,
            autocast=self.accelerator.autocast if training.precision == "bf16" else nullcontext,
            batch_size=training.batch_size,
        )
        if experience is not None and competition == "all":
            if experience.total_classes is None:
                raise SpecError(
                    "training.active: all needs to know how many classes the stream will have, and this one is open: take "
                    "'seen' or 'experience'."
                )
            self._context.reserve_classes = experience.total_classes

    def _mark_altered(self) -> None:
        self.model.mark_altered(self.context.parameters().values())

    def _accelerator(self) -> Accelerator:
        AcceleratorState._reset_state(reset_partial_state=False)
        precision = "bf16" if self.strategy.training.precision == "bf16" else "no"
        accelerator = Accelerator(
            cpu=self.device.type == "cpu",
            mixed_precision=precision,
            log_with=self.track,
            project_dir=None if self.folder is None else str(self.folder.parent / "tracking"),
        )
        if self.track:
            accelerator.init_trackers("continual", config={"strategy": self.strategy.name, "seed": self.seed})
            self._tracking = True
        return accelerator

    def _encoded(self, table: Table) -> Table:
        if any(name in table.names for name in TEXT_COLUMNS) and "input_ids" not in table.names:
            model = self.model
            if model.tokenizer is None:
                raise ModelError("the rows are text and the model has no tokenizer: name a Hugging Face model.")
            assert model.max_length is not None, "a model with a tokenizer has a longest row"
            return encode(table, model.tokenizer, self.objective, model.max_length)
        return table

    def _checkpoint(self, progress: Progress | None) -> None:
        assert self.folder is not None
        if self.accelerator.is_main_process:
            save_state(self.folder, self._state(with_tests=self.stream_name is None, progress=progress))
        self.accelerator.wait_for_everyone()

    def _log(self, figures: dict[str, float], step: int) -> None:
        self.accelerator.log(figures, step=step)

    def state_bytes(self) -> dict[str, int]:
        """Bytes of each part's state, of the weights that are saved, and of the optimiser's state."""
        found = {part.name: part.nbytes() for part in self.parts}
        found["weights"] = tensor_bytes(self.model.saved_tensors())
        optimizer = self.context.optimizer
        found["optimizer"] = tensor_bytes(optimizer_state(optimizer, self.context.parameters())) if optimizer else 0
        return found


def resolve_device(name: str) -> torch.device:
    """``auto`` takes a GPU where there is one.

    Raises:
        SpecError: a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SpecError(f"unknown device '{name}': allowed are 'auto', 'cpu', 'cuda', 'cuda:0' and so on.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SpecError(
            f"the device '{name}' was asked for and this machine has {torch.cuda.device_count()} CUDA devices: take 'cpu' or "
            "'auto'."
        )
    return device


def _unlabelled(rows: Any) -> Table:
    """Rows to predict: a list of texts, a tensor or array of inputs, or anything that has labels as well."""
    if isinstance(rows, list) and rows and all(isinstance(row, str) for row in rows):
        return TensorTable({"text": rows})
    if isinstance(rows, torch.Tensor):
        return TensorTable({"inputs": rows})
    if isinstance(rows, np.ndarray) and rows.dtype.kind in "fiu":
        return TensorTable({"inputs": torch.tensor(rows, dtype=torch.float32)})
    return as_table(rows, what="predict")
