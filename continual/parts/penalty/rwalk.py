"""Riemannian walk: EWC's Fisher, kept as a running average, and a score of what each parameter did on the way.

``loss + lambda sum_p (F_p + s_p) (theta_p - theta~_p)^2`` (Chaudhry et al. 2018, arXiv 1801.10112, eq. 9), theta~ where
the last experience ended. After every ``interval`` steps

    F <- alpha F_batch + (1 - alpha) F                                     (eq. 7, "EWC++")
    s <- s + max(0, dL / (1/2 F dtheta^2 + epsilon))                       (eq. 8)

with dL the fall of the loss that the parameter brought about in the interval (:mod:`~continual.parts.penalty.path`) and
dtheta its movement: the score is the fall of the loss for each step on the manifold of distributions. At the end of an
experience the scores are averaged with those of the experiences before, and F and s are each divided by their largest
value, so that lambda does not depend on their scale.

Departures: F_batch is exact, the mean of squared gradients of each row of the batch at its true label, from a pass of its
own, and the F of eq. 8 is that of the end of the interval; under accumulation the rows are those of the step's first pass. All is
one quadratic: time and memory are constant.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from continual.models.output import Output
from continual.objective import Criterion
from continual.parts.part import Context, Part, Slot
from continual.parts.penalty.fisher import diagonal_fisher
from continual.parts.penalty.path import Path
from continual.parts.penalty.quadratic import grown
from continual.parts.penalty.springs import Springs, check_finite, check_lasting
from continual.spec import Spec
from continual.streams.experience import Experience
from continual.table import Batch


class RWalkSettings(Spec):
    """Settings of :class:`RWalk`.

    Attributes:
        strength: lambda ≥ 0; 0 switches the pull off.
        alpha: weight of the newest batch in the running Fisher, in (0, 1].
        interval: optimiser steps between two estimates; each costs a forward and a backward pass.
        epsilon: damping of the score, > 0.
    """

    kind: Literal["rwalk"] = "rwalk"
    strength: float = Field(default=1.0, ge=0)
    alpha: float = Field(default=0.9, gt=0, le=1)
    interval: PositiveInt = 10
    epsilon: float = Field(default=1e-3, gt=0)


class RWalk(Part):
    """Pulls parameters back to where the last experience left them, by Fisher and path score together.

    In its first experience it only watches.
    """

    slot: ClassVar[Slot] = "penalty"
    Settings: ClassVar[type[Spec]] = RWalkSettings
    needs_lasting_parameters: ClassVar[bool] = True
    needs_criterion: ClassVar[Criterion | None] = "cross-entropy"
    settings: RWalkSettings

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._springs, self._path = Springs(), Path()
        self._fisher: dict[str, Tensor] = {}
        self._scores: dict[str, Tensor] = {}
        self._earlier: dict[str, Tensor] = {}
        self._since = 0

    def attach(self, context: Context) -> None:
        super().attach(context)
        self._springs.release()

    def begin(self, context: Context, experience: Experience) -> None:
        """Begin a path.

        Raises:
            CompositionError: the adapter is replaced at every experience.
        """
        check_lasting(self.name, context.model)
        self._springs.release()
        self._path.begin()
        self._scores, self._since = {}, 0

    def edit_gradients(self) -> None:
        """Look at the gradients, then add ``2 lambda (F + s)(theta - theta~)`` to them; no sync of the device."""
        self._path.before_step(self.context.parameters())
        self._springs.pull(self.context, 2 * self.settings.strength)

    def after_step(self, batch: Batch, output: Output) -> None:
        """Add the step, and after ``interval`` of them estimate from the experience's own rows of the batch."""
        if not self._path.after_step():
            return
        self._since += 1
        if self._since == self.settings.interval:
            self._estimate({name: column[: self.context.current_rows] for name, column in batch.items()})

    def end(self, context: Context, experience: Experience) -> None:
        """Close the last interval, average the scores, and move the anchor here.

        Raises:
            TrainingError: a Fisher or a score that is not finite.
        """
        if self._since:
            generator = context.randomness.generator("rwalk")
            batches = context.batches(experience.train, limit=context.batch_size, generator=generator, gradients=True)
            self._estimate(next(iter(batches)))
        for name, score in self._scores.items():
            known = self._earlier.get(name)
            self._earlier[name] = score if known is None else 0.5 * (grown(name, known, score) + score)
        check_finite("running Fisher", self._fisher)
        check_finite("path score", self._earlier)
        parameters = context.parameters()
        trained = [name for name in self._scores if name in parameters]
        fisher, scores = _normalised(self._fisher, trained), _normalised(self._earlier, trained)
        self._springs.settle("parameters", context.model)
        importance = {name: fisher[name] + scores[name] for name in trained}
        self._springs.quadratic.decay_and_move(importance, dict(parameters), 0.0)
        self._springs.release()
        self._path.begin()
        self._scores = {}

    def value(self) -> Tensor:
        """The penalty now, ``lambda sum (F + s) (theta - theta~)^2``, a scalar tensor, no sync."""
        return self._springs.value(self.context, 2 * self.settings.strength)

    def state_dict(self) -> dict[str, Any]:
        return {
            **self._springs.state_dict(),
            "path": self._path.state_dict(),
            "fisher": dict(self._fisher),
            "scores": dict(self._scores),
            "earlier": dict(self._earlier),
            "since": self._since,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._springs.load_state_dict(state)
        self._path.load_state_dict(state["path"])
        self._fisher, self._scores, self._earlier = (
            {name: tensor.clone() for name, tensor in state[key].items()} for key in ("fisher", "scores", "earlier")
        )
        self._since = int(state["since"])

    @torch.no_grad()
    def _estimate(self, batch: Batch) -> None:
        """Take a batch into the running Fisher, and the interval into the scores."""
        alpha, context = self.settings.alpha, self.context
        for name, F in diagonal_fisher(context, [batch], labels="true").items():
            known = self._fisher.get(name)
            self._fisher[name] = F if known is None else alpha * F + (1 - alpha) * grown(name, known, F)
        for name, movement in self._path.movement(context.parameters()).items():
            distance = 0.5 * self._fisher[name] * movement.square()
            gained = (self._path.work[name] / (distance + self.settings.epsilon)).clamp(min=0)
            known = self._scores.get(name)
            self._scores[name] = gained if known is None else grown(name, known, gained) + gained
        self._path.begin()
        self._since = 0


def _normalised(values: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """Each over the largest of all; zeros stay zeros."""
    if not names:
        return {}
    device = values[names[0]].device
    largest = torch.stack([values[name].max().to(device) for name in names if values[name].numel()]).max()
    largest = largest.clamp(min=torch.finfo(torch.float32).tiny)
    return {name: values[name] / largest.to(values[name].device) for name in names}
