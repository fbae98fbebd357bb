"""What heads without gradients share: sums of features go in, or features of rows; a rule makes class scores of them.

Each such head is a :class:`ClosedFormHead` with a rule (nearest mean, linear discriminants, ridge regression, a vote of
neighbours), which its :class:`ClosedForm` applies. The rows of an experience are added at its end, in one
pass.

**First session.** Where the backbone trains while nothing has been added up yet (``adapter/lora`` with ``across_tasks:
first``), the model has a cosine head with class means as its first weights (``linear.py``) until the experience ends;
then that head is dropped and the rule takes over (Panos et al. 2023, arXiv 2303.13199; McDonnell et al. 2023, arXiv
2307.02251, phase 1). A backbone that trains on later is refused, since the sums would be those of other features.

Letters: B rows, D features, M lifted features, K outputs, k classes when the rule was last solved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from continual.kinds import Objective
from continual.parts.head.class_sums import (
    check_steady,
    class_sums,
    features_model,
    sweep,
)
from continual.parts.head.lift import Lift
from continual.parts.head.linear import LinearHead
from continual.parts.part import Context, Part, Slot
from continual.state import tensor_bytes
from continual.streams.experience import Experience
from continual.table import Batch, Table

UNKNOWN = torch.finfo(torch.float32).min / 4
"""The score of a class without rows: finite, and far below all others."""
EXCLUDES = {
    "replay": "it has no gradients, and what it keeps of earlier rows stays exact, so nothing would learn from replayed "
    "ones: leave replay out, or take head/linear",
    "penalty": "what it keeps cannot be forgotten and no parameter trains after the first experience, so there is nothing to "
    "hold: leave the penalty out, or take head/linear",
    "distillation": "what it keeps cannot be forgotten and no parameter trains after the first experience, so there is nothing "
    "to distil: leave distillation out, or take head/linear",
    "projection": "no parameter trains after the first experience, so there is no gradient to project: leave projection "
    "out, or take head/linear",
}
"""What no head without gradients can be combined with."""

Solution = dict[str, Tensor]


@runtime_checkable
class Familiar(Protocol):
    """A head that can say how much a row is like what was learnt, in order to turn away what is out of scope."""

    def familiarity(self, features_BD: Tensor) -> Tensor:
        """float32 (B,), higher is more familiar; the scale is the head's own, so a threshold is set on known rows."""


class Collected(Protocol):
    """What is kept of rows: :class:`~continual.parts.head.class_sums.ClassSums`, or
    :class:`~continual.parts.head.feature_rows.FeatureRows`."""

    @property
    def counts_K(self) -> Tensor:
        """Rows of each class, int64 (K,)."""

    def grow(self, classes: int, features: int) -> None:
        """Have at least ``classes`` classes, of ``features`` features."""

    def add(self, features_BD: Tensor, labels_B: Tensor, rows_B: Tensor | None = None) -> None:
        """Add rows with labels and ids; :meth:`close` comes after the last."""

    def close(self) -> None:
        """Bring everything up to date with the rows added."""

    def first(self, classes: int) -> Self:
        """The same without the classes from ``classes`` on."""

    def rows(self) -> Tensor:
        """Ids of the rows that can be given up, int64 CPU."""

    def erase(self, rows: Tensor) -> int:
        """Give up these rows; returns how many there were."""

    def to(self, device: torch.device) -> None:
        """Move to ``device``."""

    def state_dict(self) -> dict[str, Any]:
        """All of it."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""


Held = TypeVar("Held", bound=Collected)
Held_contra = TypeVar("Held_contra", contravariant=True)


class Rule(Protocol[Held_contra]):
    """Class scores in closed form."""

    def solve(self, held: Held_contra, /) -> Solution:
        """What the scores need, by name, in float32; at least one class has rows."""

    def scores(self, solution: Solution, lifted_BM: Tensor) -> Tensor:
        """Scores float32 (B, k), any finite value for a class without rows."""

    def familiarity(self, solution: Solution, lifted_BM: Tensor, best_B: Tensor) -> Tensor:
        """float32 (B,), from the best score of a known class."""


class ClassScores(nn.Module):
    """The head's module: scores of ``outputs`` classes by a rule. Its buffers are made from what is kept, not saved."""

    known: Tensor

    def __init__(self, rule: Rule[Any], lift: Lift) -> None:
        super().__init__()
        self.rule, self.lift, self.outputs = rule, lift, 0
        self.solved: tuple[str, ...] = ()
        self.register_buffer("known", torch.zeros(0, dtype=torch.bool), persistent=False)

    def solve(self, held: Collected) -> None:
        """Take over what is kept."""
        self.known = held.counts_K > 0
        solution = self.rule.solve(held) if bool(self.known.any()) else {}
        for name in self.solved:
            delattr(self, name)
        self.solved = tuple(solution)
        for name, tensor in solution.items():
            self.register_buffer(name, tensor, persistent=False)

    def solution(self) -> Solution:
        """The buffers that the rule made; none before the first rows."""
        return {name: self.get_buffer(name) for name in self.solved}

    def forward(self, features_BD: Tensor) -> Tensor:
        """Logits float32 (B, K), computed in float32 also under autocast; :data:`UNKNOWN` for a class without rows."""
        if not self.solved:
            return features_BD.new_full((len(features_BD), self.outputs), UNKNOWN, dtype=torch.float32)
        with torch.autocast(features_BD.device.type, enabled=False):
            scores_Bk = self.rule.scores(self.solution(), self.lift(features_BD.float()))
        scores_Bk = scores_Bk.masked_fill(~self.known, UNKNOWN)
        return F.pad(scores_Bk, (0, self.outputs - scores_Bk.shape[1]), value=UNKNOWN)

    def familiarity(self, features_BD: Tensor) -> Tensor:
        """float32 (B,), see :class:`Familiar`; :data:`UNKNOWN` while nothing is known."""
        if not self.solved:
            return features_BD.new_full((len(features_BD),), UNKNOWN, dtype=torch.float32)
        with torch.autocast(features_BD.device.type, enabled=False):
            solution, lifted_BM = self.solution(), self.lift(features_BD.float())
            scores_Bk = self.rule.scores(solution, lifted_BM).masked_fill(~self.known, UNKNOWN)
            return self.rule.familiarity(solution, lifted_BM, scores_Bk.amax(1))


class ClosedForm(Generic[Held]):
    """What is kept, rule and first session of one head.

    Args:
        rule: makes scores of what is kept.
        lift: what features become before they are added.
        held: what is kept of rows.
    """

    def __init__(self, rule: Rule[Held], lift: Lift, held: Held) -> None:
        self.held = held
        self.module = ClassScores(rule, lift)
        self.first: LinearHead | None = None
        self._name = ""
        self._solved = 0

    def attach(self, context: Context, name: str) -> None:
        """Set the head of the model.

        Raises:
            CompositionError: the model gives logits itself.
        """
        model = features_model(context, name)
        self._name = name
        self.held.to(context.device)
        model.head = self.module.to(context.device)
        if self.first is not None:
            self.first.attach(context)

    def begin(self, context: Context, experience: Experience) -> None:
        """Add outputs for classes that arrive first; they become known at the end.

        Raises:
            CompositionError: the backbone trains, and rows have been added up already.
        """
        if bool(self.held.counts_K.any()):
            check_steady(context, self._name)
        elif features_model(context, self._name).backbone_trains:
            self.first = LinearHead(init="mean", normalize=True)
            self.first.attach(context)
            self.first.begin(context, experience)
        self.grow_to(max(experience.classes, default=-1) + 1, context)

    def grow_to(self, classes: int, context: Context) -> None:
        """Have at least ``classes`` outputs."""
        features = features_model(context, self._name).feature_size
        assert features is not None
        lift = self.module.lift
        lift.draw(features, context.randomness.generator("random features"))
        self.held.grow(classes, lift.width(features))
        self.module.outputs = len(self.held.counts_K)
        if self.first is not None:
            self.first.grow_to(self.module.outputs, context)

    def end(self, context: Context, experience: Experience) -> None:
        """Add the experience's rows and solve."""
        self.collect(context, experience.train)
        self.solve()

    def collect(self, context: Context, table: Table, also: Callable[[Tensor, Batch], None] | None = None) -> None:
        """End a first session and add rows; ``also`` sees their lifted features float64 (B, M) as well."""
        if self.first is not None:
            features_model(context, self._name).head, self.first = self.module, None

        lift = self.module.lift
        if lift.center and lift.mean is None:
            sums_KD, counts_K = class_sums(context, table, len(self.held.counts_K), normalize=lift.normalize)
            lift.mean = (sums_KD.sum(0) / counts_K.sum().clamp(min=1)).float()

        def take(features_BD: Tensor, batch: Batch) -> None:
            lifted_BM = lift(features_BD)
            self.held.add(lifted_BM, batch["labels"], batch.get("row"))
            if also is not None:
                also(lifted_BM, batch)

        sweep(context, table, take)
        self.held.close()

    def solve(self) -> None:
        """Bring the scores up to date with what is kept."""
        self._solved = len(self.held.counts_K)
        self.module.solve(self.held)

    def rows(self) -> Tensor:
        """Ids of the rows that can be given up, int64; of sums those that are the only one of their class."""
        return self.held.rows()

    def erase(self, rows: Tensor) -> int:
        """Take such rows out of what is kept, and of the scores; returns how many there were."""
        erased = self.held.erase(rows)
        if erased:
            self.module.solve(self.held.first(self._solved))
        return erased

    def state_dict(self) -> dict[str, Any]:
        return {
            **self.held.state_dict(),
            "drawn": self.module.lift.drawn(),
            "solved": self._solved,
            "first": None if self.first is None else self.first.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], context: Context | None) -> None:
        """Go on from ``state``: the scores are solved again from the very numbers of the last time, so to the same bits."""
        self.held.load_state_dict(state)
        self.module.lift.load_drawn(state["drawn"])
        self.module.outputs, self._solved = len(self.held.counts_K), int(state["solved"])
        self.module.solve(self.held.first(self._solved))
        if state["first"] is not None:
            self.first = LinearHead(init="mean", normalize=True)
            if context is not None:
                self.first.attach(context)
            self.first.load_state_dict(state["first"])

    def nbytes(self) -> int:
        """Bytes of what is kept, of what was drawn, and of what was solved; a first session's head is among the weights."""
        return tensor_bytes([self.state_dict(), self.module.solution(), self.module.known])


class ClosedFormHead(Part, Generic[Held]):
    """What such heads share as parts: each sets its settings and ``closed_form``, and overrides what it does otherwise."""

    slot: ClassVar[Slot] = "head"
    objectives: ClassVar[tuple[Objective, ...]] = ("classification",)
    needs_head: ClassVar[bool] = True
    needs_steady_features: ClassVar[bool] = True
    excludes: ClassVar[dict[str, str]] = EXCLUDES
    closed_form: ClosedForm[Held]

    def attach(self, context: Context) -> None:
        """Set the head of the model.

        Raises:
            CompositionError: the model gives logits itself.
        """
        super().attach(context)
        self.closed_form.attach(context, self.name)

    def begin(self, context: Context, experience: Experience) -> None:
        self.closed_form.begin(context, experience)

    def end(self, context: Context, experience: Experience) -> None:
        self.closed_form.end(context, experience)

    def grow_to(self, classes: int, context: Context) -> None:
        """Have at least ``classes`` outputs."""
        self.closed_form.grow_to(classes, context)

    def rows(self) -> Tensor:
        return self.closed_form.rows()

    def erase(self, rows: Tensor) -> int:
        return self.closed_form.erase(rows)

    def state_dict(self) -> dict[str, Any]:
        return self.closed_form.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.closed_form.load_state_dict(state, getattr(self, "context", None))

    def nbytes(self) -> int:
        return self.closed_form.nbytes()
