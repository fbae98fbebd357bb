"""The engine ``avalanche``: a strategy of Avalanche 0.6 trains, our learner measures.

The training keys are ours and are translated; the classes that compete are masked in the logits that the strategy sees, as
Avalanche's own classifiers mask units not met yet. The head has an output for each class of the stream from the start, since
several strategies (DER, GDumb, iCaRL) cannot follow one that grows. Rows that are measured are answered by the strategy's own
``forward`` in its evaluation mode. Avalanche is imported in :meth:`AvalancheEngine.check`, not before.
"""

from __future__ import annotations

import importlib.metadata
import time
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from continual.engine import Engine, Trained
from continual.errors import CompositionError, ContinualError, SpecError, TrainingError
from continual.foreign import imported, quiet
from continual.kinds import Objective
from continual.models.output import Output
from continual.parts.context import TrainingContext
from continual.spec import Spec
from continual.state import tensor_bytes
from continual.streams.experience import Experience
from continual.table import Batch
from continual.training import Training

UNREAD: dict[str, Any] = {
    "head_lr": None,
    "accumulate": 1,
    "schedule": "constant",
    "warmup": 0.0,
    "precision": "fp32",
    "early_stopping": None,
    "loss": "cross-entropy",
}
"""Keys of ``training`` that Avalanche has nothing for, at the values that ask for nothing."""


UNMASKED = ("ICaRL", "StreamingLDA")
"""They make logits of their own, so that no class can be kept out of the training."""


class PluginChoice(Spec):
    """A plugin of Avalanche beside the strategy's own: its class's name, and its arguments."""

    plugin: str
    arguments: dict[str, Any] = Field(default_factory=dict)


class AvalancheSettings(Spec):
    """Settings of :class:`AvalancheEngine`.

    Attributes:
        strategy: a class of ``avalanche.training.supervised``, or ``package.module:Class`` of one's own.
        arguments: of its constructor, without those that the run gives (model, optimizer, batch size, ...).
        plugins: further ones, in the order in which they are called.
    """

    kind: Literal["avalanche"] = "avalanche"
    strategy: str
    arguments: dict[str, Any] = Field(default_factory=dict)
    plugins: list[PluginChoice] = Field(default_factory=list)


class AvalancheEngine(Engine):
    """Trains with one of Avalanche's strategies; for its settings see :class:`AvalancheSettings`."""

    Settings: ClassVar[type[Spec]] = AvalancheSettings
    settings: AvalancheSettings

    def check_training(self, training: Training, backbone: Literal["train", "frozen"]) -> None:
        for key, nothing in UNREAD.items():
            if getattr(training, key) != nothing:
                raise SpecError(f"{self.name} has no training.{key}: leave the key out.")
        if training.active == "asymmetric":
            raise SpecError(f"{self.name} has no training.active: asymmetric: take 'seen', 'experience' or 'all'.")
        name = self.settings.strategy
        if training.active is not None and name in UNMASKED:
            raise SpecError(
                f"Avalanche's {name} makes logits of its own and reads no training.active: leave the key out."
            )
        if training.iterations is not None and name == "StreamingLDA":
            raise SpecError("Avalanche's StreamingLDA takes whole epochs: give training.epochs in place of iterations.")

    def check(self, *, objective: Objective, gives_features: bool, open_stream: bool) -> None:
        """Raise where Avalanche is not installed, or the strategy or an argument cannot be.

        Raises:
            SpecError, CompositionError: what was asked for cannot be.
        """
        if objective != "classification":
            raise CompositionError(
                f"{self.name} trains classifiers, and the objective is {objective}: take parts of ours."
            )
        if open_stream:
            raise CompositionError(
                f"{self.name} needs to know all classes of the stream, and this one is open: close it."
            )
        imported("avalanche")
        with quiet("avalanche"):
            from continual.interop.avalanche.strategies import check_arguments, plugin_class, strategy_class

            found = strategy_class(self.settings.strategy)
            check_arguments(found, self.settings.arguments, gives_features=gives_features)
            for choice in self.settings.plugins:
                check_arguments(plugin_class(choice.plugin), choice.arguments)

    def attach(self, context: TrainingContext, training: Training, evaluation_rows: int) -> None:
        from continual.interop.avalanche.module import Competing
        from continual.interop.avalanche.strategies import check_scenario

        check_scenario(self.settings.strategy, context.scenario)
        if training.active == "experience" and context.scenario != "task":
            raise CompositionError(
                f"training.active: experience needs task labels, which {self.name} gives its strategy in the scenario 'task' "
                f"only: take 'seen' or 'all' in '{context.scenario}'."
            )
        self.context, self.training, self.evaluation_rows = context, training, evaluation_rows
        self._competing = Competing(context.competition)
        self._strategy: Any = None
        self._module: nn.Module | None = None
        self._past: list[tuple[int, ...]] = []

    def begin(self, experience: Experience) -> None:
        """Make the strategy at the first experience; tell its masks what is met by now.

        Raises:
            StreamError: rows that Avalanche cannot take.
            SpecError: it refuses the arguments.
        """
        from continual.interop.avalanche.benchmark import check_dense

        check_dense(experience.train)
        with quiet("avalanche"):
            if self._strategy is None:
                self._make()
        self._competing.owner_K = torch.tensor(self.context.owner, dtype=torch.int64, device=self.context.device)

    def fit(self, experience: Experience) -> Trained:
        """Train.

        Raises:
            TrainingError: the loss is not finite, or Avalanche fails.
        """
        strategy, name = self._strategy, self.settings.strategy
        with quiet("avalanche"):
            now = self._view(experience)
            if self.training.fresh_optimizer and strategy.optimizer is not None:
                strategy.optimizer.state.clear()
            started = time.perf_counter()
            try:
                strategy.train(now, eval_streams=[])
            except ContinualError:
                raise
            except Exception as error:
                raise TrainingError(
                    f"Avalanche's {name} failed on experience '{experience.name}' ({type(error).__name__}: "
                    f"{' '.join(str(error).split())[:300]}): see whether it is made for the scenario '{experience.scenario}' and "
                    "this model, or take a strategy of ours."
                ) from error
            seconds = time.perf_counter() - started
        self._past.append(experience.classes)
        if self._module is not None and strategy.model is not self._module:
            self._module.load_state_dict(strategy.model.state_dict())
        return Trained(self._watch.steps, self._watch.rows, seconds)

    def forward(self, batch: Batch) -> Output:
        """The strategy's answer, (B, K)."""
        strategy = self._strategy
        inputs = batch["inputs"]
        tasks_B = torch.zeros(len(inputs), dtype=torch.int64, device=inputs.device)
        strategy.model.eval()
        self._competing.masks = False
        try:
            with quiet("avalanche"):
                strategy.is_training = False
                strategy.experience = _Answering()
                strategy.mbatch = [inputs, batch.get("labels", tasks_B), tasks_B]
                strategy._before_eval_forward()
                strategy.mb_output = strategy.forward()
                strategy._after_eval_forward()
                logits_BK = strategy.mb_output
        finally:
            self._competing.masks = True
            strategy.mbatch = strategy.mb_output = strategy.experience = None
        missing = len(self.context.owner) - logits_BK.shape[1]
        if missing > 0:
            logits_BK = nn.functional.pad(logits_BK, (0, missing), value=-torch.inf)
        return Output(logits_BK)

    def nbytes(self) -> int:
        """Bytes of buffers, copies of models and data sets that the strategy keeps alive, as they are now."""
        from continual.interop.avalanche.watch import bytes_kept, storages_of

        return bytes_kept(
            self._strategy, storages_of(self._strategy.model, self.context.model, self._strategy.optimizer)
        )

    def optimizer_bytes(self) -> int:
        from continual.interop.avalanche.watch import optimizer_tensors

        optimizer = self._strategy.optimizer
        return 0 if optimizer is None else tensor_bytes(optimizer_tensors(optimizer))

    def report(self) -> str | None:
        from continual.interop.avalanche.strategies import NOTES

        return NOTES.get((self.settings.strategy, self.context.scenario)) if len(self._past) > 1 else None

    def versions(self) -> dict[str, str]:
        found = {}
        for name in ("avalanche-lib", "torchvision", "qpsolvers", "quadprog"):
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return found

    def _make(self) -> None:
        from continual.interop.avalanche.making import make_strategy
        from continual.interop.avalanche.watch import Watch

        self._watch = Watch(self.training.clip, self.training.iterations)
        own, context = self.settings, self.context
        plugins = [(choice.plugin, choice.arguments) for choice in own.plugins]
        self._strategy, self._module = make_strategy(
            own.strategy,
            own.arguments,
            plugins,
            context=context,
            training=self.training,
            competing=self._competing,
            watch=self._watch,
            evaluation_rows=self.evaluation_rows,
        )

    def _view(self, experience: Experience) -> Any:
        """The experience as Avalanche sees it; of later ones nothing is known but how many classes they bring."""
        from continual.interop.avalanche.benchmark import data_set, decorated, order_of, owners

        order = order_of([*self._past, experience.classes])
        rest = sorted(set(range(len(self.context.owner))) - set(order.classes_order))
        order.n_classes_per_exp = [*order.n_classes_per_exp, *([len(rest)] if rest else [])]
        order.classes_order, order.n_classes = [*order.classes_order, *rest], len(self.context.owner)
        return decorated(
            data_set(experience.train, owners(experience)),
            experience.index,
            before={label for classes in self._past for label in classes},
            after=set(order.classes_order),
            benchmark=order,
        )


class _Answering:
    """Stands for the experience while rows are measured: the model is called with task labels where it takes any."""

    task_labels = (0,)

    def logging(self) -> _Answering:
        """What Avalanche's evaluator asks for; it has no metrics here."""
        return self
