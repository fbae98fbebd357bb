"""The contract of a part: everything that a strategy is made of.

A part overrides the hooks it needs and no others; a loop calls only those that are overridden (:func:`overriding`), so a
hook that is not there costs nothing. What a part sees of the training is :class:`Context`, which our learner, a bare
loop and a foreign trainer can all give.

Order of one optimiser step: ``extend`` → forward → objective + ``loss`` → backward → ``edit_gradients`` → clipping →
optimiser → ``after_step``.

Where several processes train, every hook is called in each of them with the whole batch and its whole output, and must do the
same in all: draw from ``context.randomness`` only, and read nothing that differs between them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from continual.errors import CompositionError
from continual.kinds import Objective, Scenario
from continual.models.output import Output
from continual.objective import Criterion
from continual.randomness import Randomness
from continual.spec import Spec, parse
from continual.state import tensor_bytes
from continual.streams.experience import Experience
from continual.table import Batch, Table

Slot = Literal["adapter", "head", "replay", "penalty", "distillation", "projection", "recall"]
SLOTS: tuple[Slot, ...] = ("adapter", "head", "replay", "penalty", "distillation", "projection", "recall")
"""In the order in which hooks are called."""


class Context(Protocol):
    """What a part sees of the training."""

    @property
    def model(self) -> nn.Module:
        """``model(batch)`` gives an :class:`~continual.models.output.Output`; not wrapped for several devices."""

    @property
    def objective(self) -> Objective: ...

    @property
    def scenario(self) -> Scenario: ...

    @property
    def criterion(self) -> Criterion:
        """The loss of a classification."""

    @property
    def parts(self) -> Sequence[Part]:
        """All parts of the training, in the order in which their hooks are called."""

    @property
    def device(self) -> torch.device: ...

    @property
    def randomness(self) -> Randomness: ...

    @property
    def experience_index(self) -> int:
        """Index of the experience under way, or of the last one; -1 before the first."""

    @property
    def step(self) -> int:
        """Optimiser steps done in this experience."""

    @property
    def steps(self) -> int:
        """Optimiser steps planned for this experience (fewer when stopped early)."""

    @property
    def epoch(self) -> int:
        """Passes over the rows of this experience that are complete, from 0."""

    @property
    def batch_size(self) -> int:
        """Rows of the experience in one forward pass."""

    @property
    def full_rows(self) -> int:
        """Rows of the experience in a full batch: ``batch_size``, or all of them where there are fewer."""

    @property
    def current_rows(self) -> int:
        """How many rows at the head of the batch are the experience's own; what follows was added by ``extend``."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that train now, by name in ``model``."""

    def forward(self, batch: Batch) -> Output:
        """``model(batch)`` in the precision of the run; train or eval mode and gradients are as the caller set them."""

    def active(self, batch: Batch) -> Tensor | None:
        """Which classes compete in training for these rows: bool (K,) or (B, K), None for all."""

    def loss_rows(self, output: Output, batch: Batch) -> Tensor:
        """The objective's loss of each row, (B,), over the classes that compete in training."""

    def steady(self, table: Table) -> Table:
        """The table with features in the place of inputs, where the backbone does not train; else the table itself."""

    def as_trained_on(self, table: Table) -> Table:
        """The same for a table that is trained on."""

    def batches(
        self,
        table: Table,
        *,
        limit: int | None = None,
        generator: torch.Generator | None = None,
        gradients: bool = False,
    ) -> Iterator[Batch]:
        """The rows of a table on the device, once each: similar lengths together, the order the same every time.

        With ``limit``, at most so many rows, drawn without replacement by ``generator``. Say ``gradients`` where a
        backward pass follows, so that a batch holds no more rows than one of the training.
        """

    def replace_parameter(self, old: nn.Parameter, new: nn.Parameter) -> None:
        """``new`` has taken the place of ``old`` and begins with its rows: the optimiser keeps what it knew of them."""

    def forget(self, parameters: Iterable[nn.Parameter]) -> None:
        """These begin anew: the optimiser forgets what it knew of them."""

    def rates(self) -> dict[str, float]:
        """Learning rate of the next step for each parameter that trains, by name; empty where there is no optimiser."""


class Part:
    """Base of every part: settings, state, and hooks that do nothing.

    Class attributes:
        slot: the key of the strategy file that it stands under.
        Settings: the model of its settings, with a ``kind``.
        objectives: the objectives it works with.
        needs_head: it reads ``output.features`` or class scores of a head of ours.
        needs_steady_features: it adds up features of each experience's rows once, so the backbone must be frozen, or
            settle after the first experience.
        needs_lasting_parameters: it remembers something of each parameter that holds for that parameter only.
        needs_stacking: it reads the adapters of earlier experiences, which an adapter part must keep in the model.
        needs_tokens: it puts something before the tokens of a row, so the model must be a transformer.
        needs_stored_rows: it reads the rows that a replay part keeps (:class:`~continual.parts.replay.store.KeepsRows`).
        needs_criterion: the loss of a classification that it belongs to; None for any.
        excludes: ``slot`` or ``slot/kind`` that it cannot be combined with → why, and what to use instead.
    """

    slot: ClassVar[Slot]
    Settings: ClassVar[type[Spec]]
    objectives: ClassVar[tuple[Objective, ...]] = ("classification", "regression", "causal-lm", "seq2seq")
    needs_head: ClassVar[bool] = False
    needs_steady_features: ClassVar[bool] = False
    needs_lasting_parameters: ClassVar[bool] = False
    needs_stacking: ClassVar[bool] = False
    needs_tokens: ClassVar[bool] = False
    needs_stored_rows: ClassVar[bool] = False
    needs_criterion: ClassVar[Criterion | None] = None
    excludes: ClassVar[dict[str, str]] = {}

    context: Context

    def __init__(self, **settings: Any) -> None:
        kind = settings.get("kind", getattr(self.Settings.model_fields.get("kind"), "default", type(self).__name__))
        self.settings = parse(self.Settings, settings, f"{self.slot}/{kind}")

    @property
    def kind(self) -> str:
        return str(getattr(self.settings, "kind", type(self).__name__))

    @property
    def name(self) -> str:
        """``slot/kind``, as reports and error messages call it."""
        return f"{self.slot}/{self.kind}"

    @property
    def reference(self) -> str:
        """The ``kind`` that finds this class again: its short name, or ``package.module:Class`` for one of the user's."""
        own = type(self).__module__.startswith("continual.")
        return self.kind if own else f"{type(self).__module__}:{type(self).__qualname__}"

    @property
    def settles(self) -> bool:
        """Whether it trains the backbone in the first experience only, and holds it frozen from then on."""
        return False

    @property
    def replaces(self) -> bool:
        """Whether what it trains lives for one experience only, and other parameters come after it."""
        return False

    @property
    def refuses(self) -> dict[str, str]:
        """As ``excludes``, where it depends on the settings."""
        return {}

    @property
    def stacks(self) -> bool:
        """Whether it keeps the adapters of earlier experiences in the model, frozen and active."""
        return False

    def check_objective(self, objective: Objective) -> None:
        """Raise :class:`CompositionError` where its settings cannot work for one of ``objectives``; no data is there yet."""

    def attach(self, context: Context) -> None:
        """Called once, before any other hook and again after loading; the part keeps ``context``."""
        self.context = context

    def begin(self, context: Context, experience: Experience) -> None:
        """Before the first step of an experience."""

    def extend(self, batch: Batch) -> Batch:
        """Before the forward pass: rows may be added at the end, and a column ``weight`` float (B,) may weigh the loss."""
        return batch

    def loss(self, batch: Batch, output: Output) -> Tensor | None:
        """A term beside the objective, a scalar tensor, or None for none this time."""
        return None

    def edit_gradients(self) -> None:
        """After backward, before clipping and the optimiser: may change ``p.grad`` of the trainable parameters."""

    def after_step(self, batch: Batch, output: Output) -> None:
        """After the optimiser's step; gradients are still there. Once for each forward pass of the step."""

    def end(self, context: Context, experience: Experience) -> None:
        """After the last step of an experience, before it is measured; the head's comes after that of all other parts."""

    def state_dict(self) -> dict[str, Any]:
        """All that the part remembers: tensors and plain values, any nesting."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`; structure (adapters, heads) is rebuilt, weights in the model are loaded after."""

    def nbytes(self) -> int:
        """Bytes that the part holds."""
        return tensor_bytes(self.state_dict())

    def rows(self) -> Tensor:
        """Ids of the rows that it holds, int64 (N,): kept as they came, or as the only row in a sum, a mean or a prototype.

        What several rows went into (weights, sums, a Fisher) holds none of them.
        """
        return torch.empty(0, dtype=torch.int64)

    def erase(self, rows: Tensor) -> int:
        """Give up the rows with these ids, for good: no byte of them stays in memory or in the state, nor of what an id can be
        computed from. Returns how many it held.
        """
        return 0


def check_criterion(part: Part, criterion: Criterion) -> None:
    """Raise :class:`CompositionError` where a part belongs to another loss than ``criterion``."""
    if part.needs_criterion not in (None, criterion):
        raise CompositionError(
            f"{part.name} belongs to the loss '{part.needs_criterion}' and this training has '{criterion}': set training.loss: "
            f"{part.needs_criterion}, or leave {part.slot} out."
        )


def overriding(parts: Sequence[Part], hook: str) -> list[Any]:
    """The bound methods called ``hook`` of those parts that define it."""
    return [getattr(part, hook) for part in parts if getattr(type(part), hook) is not getattr(Part, hook)]
