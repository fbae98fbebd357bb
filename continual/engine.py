"""The contract of an engine: what trains a model in place of our loop and our parts.

A strategy names it under ``engine``; it has no parts then. The learner keeps the model, the test sets and the figures, and asks
the engine to train on one experience after another and to answer for the rows that are measured. What an engine remembers
cannot be saved, so a run of it is not gone on with.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from continual.errors import SpecError, unknown
from continual.kinds import Objective
from continual.models.output import Output
from continual.parts.context import TrainingContext
from continual.spec import Spec, load_object, parse
from continual.streams.experience import Experience
from continual.table import Batch
from continual.training import Training

ENGINES: dict[str, str] = {"avalanche": "continual.interop.avalanche.engine:AvalancheEngine"}
"""``kind`` → where its class lies. Nothing is imported until it is used."""


@dataclass(frozen=True)
class Trained:
    """What the training on one experience cost: optimiser steps, rows of their batches, seconds."""

    steps: int
    rows: int
    seconds: float


class Engine(ABC):
    """Trains and answers; its ``settings`` are those of the strategy file.

    Class attributes:
        Settings: the model of its settings, with a ``kind``.
    """

    Settings: ClassVar[type[Spec]]

    def __init__(self, **settings: Any) -> None:
        self.settings = parse(self.Settings, settings, f"engine/{settings.get('kind', type(self).__name__)}")

    @property
    def name(self) -> str:
        """``engine/kind``, as reports call it."""
        return f"engine/{getattr(self.settings, 'kind', type(self).__name__)}"

    @property
    def reference(self) -> str:
        """The ``kind`` that finds this class again: its short name, or ``package.module:Class`` for one of the user's."""
        own = type(self).__module__.startswith("continual.")
        found = getattr(self.settings, "kind", None)
        return str(found) if own else f"{type(self).__module__}:{type(self).__qualname__}"

    @abstractmethod
    def check_training(self, training: Training, backbone: Literal["train", "frozen"]) -> None:
        """Raise :class:`SpecError` for a key of ``training`` that it would not read; nothing is imported for that."""

    @abstractmethod
    def check(self, *, objective: Objective, gives_features: bool, open_stream: bool) -> None:
        """Raise :class:`ContinualError` for settings that cannot work, or a package that is not there."""

    @abstractmethod
    def attach(self, context: TrainingContext, training: Training, evaluation_rows: int) -> None:
        """Called once, with the model and its head in ``context``.

        Raises:
            CompositionError: it cannot work in the scenario.
        """

    @abstractmethod
    def begin(self, experience: Experience) -> None:
        """Before the training on an experience; the head has an output for each of its classes."""

    @abstractmethod
    def fit(self, experience: Experience) -> Trained:
        """Train on an experience. Everything random is drawn from the process-wide generators, which are ours meanwhile."""

    @abstractmethod
    def forward(self, batch: Batch) -> Output:
        """What it answers for these rows, with an output for each class; nothing is drawn and nothing changes."""

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that it keeps alive beside the model and the optimiser."""

    @abstractmethod
    def optimizer_bytes(self) -> int:
        """Bytes of the optimiser's state."""

    def report(self) -> str | None:
        """One sentence that the user should know of the experience just learnt, or None."""
        return None

    def versions(self) -> dict[str, str]:
        """Packages that its figures depend on."""
        return {}


def engine_class(kind: str, where: str) -> type[Engine]:
    """The class behind ``kind``, or behind ``package.module:Class``.

    Raises:
        SpecError: there is no such engine; the nearest name is offered.
    """
    if ":" not in kind and kind not in ENGINES:
        raise SpecError(f"{where}: {unknown('engine kind', kind, ENGINES)}")
    found = load_object(ENGINES.get(kind, kind), where)
    if not (isinstance(found, type) and issubclass(found, Engine)):
        raise SpecError(f"{where}: '{kind}' is not an engine: derive it from continual.engine.Engine.")
    return found
