"""Elastic weight consolidation: weights that earlier tasks depend on are held by springs as stiff as their Fisher.

``loss + strength/2 sum_t sum_p F_t,p (theta_p - theta*_t,p)^2`` (Kirkpatrick et al. 2017, arXiv 1612.00796, eq. 3),
all tasks in one quadratic (:mod:`~continual.parts.penalty.quadratic`), so that neither time nor memory grows with their
number. ``mode: online`` is the variant of Schwarz et al. 2018 (arXiv 1805.06370): one decaying Fisher, anchored at the
latest weights. Its gradient is added after backward instead of a term to the loss, so nothing is built into the graph.

The Fisher is exact (:mod:`~continual.parts.penalty.fisher`); a strength from a program that squares a batch's mean
gradient must be found anew. EWC by itself is no protection in class-incremental learning (van de Ven & Tolias 2019,
arXiv 1904.07734): combine it with replay there.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from continual.kinds import Objective
from continual.objective import Criterion
from continual.parts.part import Context, Part, Slot
from continual.parts.penalty.fisher import diagonal_fisher
from continual.parts.penalty.fisher_labels import Labels, check_labels
from continual.parts.penalty.springs import Springs, WantedSpace, check_finite, check_space
from continual.spec import Spec
from continual.streams.experience import Experience


class EWCSettings(Spec):
    """Settings of :class:`EWC`.

    Attributes:
        strength: lambda ≥ 0; 0 switches the pull off.
        labels: which labels the Fisher is taken at: ``true``, ``sampled`` from the model, ``predicted``, or the exact
            expectation over ``all`` (classification only).
        rows: how many rows of an experience the Fisher is computed from, drawn at random; null for every row.
        mode: ``all`` keeps every task's anchor exactly; ``online`` keeps the latest.
        decay: gamma of ``online``, what is left of the old Fisher at each task, in (0, 1]; null for 1.
        space: ``parameters`` holds the trainable parameters; ``weights`` the effective weights of adapted layers, which
            stay comparable when an adapter is merged or replaced between tasks, and the parameters of no adapter;
            ``auto`` takes ``weights`` where that happens, or where the adapter is AdaLoRA.
    """

    kind: Literal["ewc"] = "ewc"
    strength: float = Field(default=1.0, ge=0)
    labels: Labels = "sampled"
    rows: int | None = Field(default=None, ge=1)
    mode: Literal["all", "online"] = "all"
    decay: float | None = Field(default=None, gt=0, le=1)
    space: WantedSpace = "auto"

    @model_validator(mode="after")
    def _decay_is_read(self) -> EWCSettings:
        if self.decay is not None and self.mode == "all":
            raise ValueError(
                "decay belongs to mode 'online' and means nothing with mode 'all': set mode, or leave decay out"
            )
        return self


class EWC(Part):
    """Pulls weights back to where earlier tasks left them, by how much those tasks depend on each.

    Before the end of the first experience it does nothing. A parameter that no longer trains is left alone; a parameter
    that has grown along its first axis (a head) is held in its old rows.
    """

    slot: ClassVar[Slot] = "penalty"
    Settings: ClassVar[type[Spec]] = EWCSettings
    needs_criterion: ClassVar[Criterion | None] = "cross-entropy"
    settings: EWCSettings

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._springs = Springs()

    def attach(self, context: Context) -> None:
        super().attach(context)
        self._springs.release()

    def check_objective(self, objective: Objective) -> None:
        """Refuse labels that mean nothing for the objective."""
        check_labels(self.settings.labels, objective)

    def begin(self, context: Context, experience: Experience) -> None:
        """Refuse what cannot work before anything is trained.

        Raises:
            CompositionError: the labels mean nothing for the objective, or there is no adapted layer for ``weights``.
        """
        self._springs.release()
        check_labels(self.settings.labels, context.objective)
        check_space(self.settings.space, context.model)

    def edit_gradients(self) -> None:
        """Add ``strength * A (theta - mu)`` to the gradients; no sync of the device."""
        self._springs.pull(self.context, self.settings.strength)

    def end(self, context: Context, experience: Experience) -> None:
        """Compute the Fisher of the experience and add its springs.

        Raises:
            TrainingError: a Fisher that is not finite.
        """
        space = self._springs.settle(self.settings.space, context.model)
        randomness = context.randomness
        batches = context.batches(
            experience.train, limit=self.settings.rows, generator=randomness.generator("fisher"), gradients=True
        )
        fisher = diagonal_fisher(
            context,
            batches,
            labels=self.settings.labels,
            space=space,
            generator=randomness.generator("fisher-labels"),
        )
        check_finite("Fisher", fisher)
        theta, quadratic = self._springs.points(context), self._springs.quadratic
        if self.settings.mode == "all":
            quadratic.add(fisher, theta)
        else:
            quadratic.decay_and_move(fisher, theta, 1.0 if self.settings.decay is None else self.settings.decay)
        self._springs.release()

    def value(self) -> Tensor:
        """The penalty now, of what trains now: ``strength/2 (sum A (theta - mu)^2 + c)``, a scalar tensor, no sync."""
        return self._springs.value(self.context, self.settings.strength)

    def state_dict(self) -> dict[str, Any]:
        return self._springs.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._springs.load_state_dict(state)
