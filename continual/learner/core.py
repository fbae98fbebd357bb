"""What a learner is made of: the model, the parts, the monitor, and what they have been through."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from torch import nn

from continual.engine import Engine
from continual.errors import CompositionError, ModelError, SpecError, unknown
from continual.kinds import Objective, Scenario
from continual.learner.ledger import Ledger
from continual.learner.optimizer import optimizer_state
from continual.learner.processes import Processes
from continual.learner.trainer import Progress
from continual.models.build import build_model
from continual.models.model import Model
from continual.models.output import Output
from continual.monitor.monitor import Monitor
from continual.parts.context import TrainingContext
from continual.parts.head.linear import LinearHead
from continual.parts.part import SLOTS, Part
from continual.provenance import now
from continual.randomness import Randomness
from continual.state import tensor_bytes
from continual.strategy import Strategy
from continual.streams.experience import Experience
from continual.streams.text import encode
from continual.table import Batch, Table
from continual.training import Training

TEXT_COLUMNS = ("text", "prompt", "messages")
ADAPTED = ("lora_", "virtual_tokens.")
"""In the names of weights that belong to an adapter part, which counts them itself."""


class Core:
    """Model, parts and monitor of a learner; :class:`~continual.learner.Learner` says what the arguments are."""

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
        self.processes = Processes(resolve_device(device))
        if self.strategy.engine is not None and self.processes.count > 1:
            raise CompositionError(
                f"{self.strategy.engine.name} trains in one process, and there are {self.processes.count}: start it alone."
            )
        self.device = self.processes.device
        self.randomness = Randomness(self.seed, self.device)
        self._own_monitor = monitor is None or monitor is True
        self.monitor: Monitor | None = Monitor() if monitor is None or monitor is True else (monitor or None)
        self.ledger = Ledger()
        self.objective, self.scenario = objective, scenario
        self.folder = Path(folder) if folder is not None else None
        self.save_every, self.track, self.progress = save_every, track, progress
        self.class_names: tuple[str, ...] = ()
        self.known_names: tuple[str, ...] = ()
        self.stream_name: str | None = None
        self.stream_fingerprint: str | None = None
        self.learnt_fingerprint: str | None = None
        self.updates = 0
        self.steps = 0
        self.experience_names: list[str] = []
        self.cost: dict[str, float] = {"train_seconds": 0.0, "monitor_seconds": 0.0, "rows_trained": 0}
        self.notes: list[str] = []
        self.started = now()
        self._model_spec: str | Mapping[str, Any] | nn.Module = model
        self._model: Model | None = None
        self._context: TrainingContext | None = None
        self._engine: Engine | None = None
        self._past: list[tuple[Table, Table | None]] = []
        self._pending: Progress | None = None
        self._pending_name: str | None = None
        self._failed: str | None = None
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

    @property
    def evaluation_rows(self) -> int:
        """Rows of one forward pass of the evaluation: the monitor's, where it was told.

        Else those of the training for a language model, whose logits are large, and for the others eight times as many,
        256 at most.
        """
        if self.monitor is not None and self.monitor.batch_size is not None:
            return self.monitor.batch_size
        own = self.strategy.training.batch_size
        return own if self.objective in ("causal-lm", "seq2seq") else max(own, min(8 * own, 256))

    @property
    def answer(self) -> Callable[[Batch], Output]:
        """Gives the output for the rows of a batch: the model, or the engine in its place."""
        return self.context.forward if self._engine is None else self._engine.forward

    def whereabouts(self) -> str:
        """Where the learner stands, in a few words."""
        step = "" if self._pending is None else f", at step {self._pending.step} of '{self._pending_name}'"
        return (
            f"goes on after {self.updates} updates{step}"
            if self.updates or step
            else "begins anew: no checkpoint was written"
        )

    def state_bytes(self) -> dict[str, int]:
        """Bytes of each part's state, of the weights that are saved beside them, and of the optimiser's state."""
        found = {part.name: part.nbytes() for part in self.parts}
        weights = self.model.saved_tensors().items()
        found["weights"] = sum(
            tensor_bytes(value) for name, value in weights if not any(own in name for own in ADAPTED)
        )
        if self._engine is not None:
            return {**found, self._engine.name: self._engine.nbytes(), "optimizer": self._engine.optimizer_bytes()}
        optimizer = self.context.optimizer
        found["optimizer"] = tensor_bytes(optimizer_state(optimizer, self.context.parameters())) if optimizer else 0
        return found

    def _build(self, experience: Experience | None, state: dict[str, Any] | None = None) -> None:
        """Make the model and the parts, for an experience or as a state says; all of them or, after an error, none."""
        try:
            self._make(experience, state)
        except BaseException:
            self._model = self._context = self._engine = None
            raise

    def _make(self, experience: Experience | None, state: dict[str, Any] | None) -> None:
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
        if self.processes.count > 1 and model.base_sha256 is None:
            self.processes.broadcast([*model.parameters(), *model.buffers()])
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
            criterion=training.loss,
            device=self.device,
            randomness=self.randomness,
            autocast=self._bf16 if training.precision == "bf16" else nullcontext,
            batch_size=training.batch_size,
        )
        if self.monitor is not None:
            self.monitor.prepare_probes(self._encoded)
        self._engine = self.strategy.make_engine()
        if experience is not None and (competition == "all" or self._engine is not None):
            if experience.total_classes is None:
                what, instead = "training.active: all", "take 'seen' or 'experience'"
                if self._engine is not None:
                    what, instead = self._engine.name, "give it a stream that is closed"
                raise SpecError(
                    f"{what} needs to know how many classes the stream will have, and this one is open: {instead}."
                )
            self._context.reserve_classes = experience.total_classes
        if self._engine is not None:
            self._engine.attach(self._context, training, self.evaluation_rows)

    def close(self) -> None:
        """Finish the tracker, where there is one; what it was told is then on its disk or server."""
        if self._tracking:
            for tracker in self.accelerator.trackers:
                tracker.finish()
            self._tracking = False

    def _mark_altered(self) -> None:
        self.model.mark_altered(self.context.parameters().values())

    def _bf16(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16)

    def _accelerator(self) -> Accelerator:
        if self.track is not None and self.track not in trackers():
            raise SpecError(f"{unknown('tracker', self.track, trackers())} Those are the ones installed here.")
        accelerator = Accelerator(
            mixed_precision=None if AcceleratorState._shared_state else "no",
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

    def _tests(self) -> dict[int, Table]:
        """Test sets of the experiences learnt so far, or under way."""
        if self.monitor is None:
            return {}
        return {index: table for index, table in self.monitor.tables().items() if index < len(self.experience_names)}

    def _keep_test(self, index: int, name: str, table: Table) -> None:
        if self.monitor is not None:
            self.monitor.register(index, name, table)


def trackers() -> list[str]:
    """Names of the trackers of ``accelerate`` whose package is installed."""
    return sorted(tracker.value for tracker in get_available_trackers())


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
    if device.type not in ("cpu", "cuda"):
        raise SpecError(f"unknown device '{name}': allowed are 'auto', 'cpu', 'cuda', 'cuda:0' and so on.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SpecError(
            f"the device '{name}' was asked for and this machine has {torch.cuda.device_count()} CUDA devices: take 'cpu' or "
            "'auto'."
        )
    return device


def slow_precision(training: Training, device: torch.device) -> str | None:
    """One sentence where the precision asked for has no instructions on this processor and is far slower, else None."""
    if training.precision != "bf16" or device.type != "cpu" or _has_bf16():
        return None
    return (
        "this processor has no instructions for bf16 and computes it several times slower than fp32: take --precision fp32 "
        "(in a study or a strategy's file, training.precision: fp32)."
    )


def _has_bf16() -> bool:
    return bool(torch._C._has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported())
