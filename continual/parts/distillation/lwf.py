"""Learning without forgetting: on the new rows, the old classes keep the probabilities that the old model gave them.

``loss + strength T^2 KL(softmax(old / T) || softmax(new / T))`` over the old classes' logits, the mean over the current
rows (Li & Hoiem 2016, arXiv 1606.09282, eq. 2 to 4, whose cross-entropy differs by a constant; T^2 of Hinton et al. 2015,
arXiv 1503.02531, keeps the gradient's size as T grows). Rows that replay adds are left out.

* ``class``: one softmax over all classes of earlier experiences; with ``over: all`` over every output that there is, so that on
  new rows the old model's answers hold the new classes down too, as in the repository of van de Ven et al. 2022
  (GMvandeVen/continual-learning, with all outputs competing), which leaves T^2 out as well: a strength of 1/T^2 here.
* ``domain``: one softmax over the classes that the experiences share.
* ``task``: a softmax for each earlier experience over its own classes, averaged over experiences.
* Language models: over the vocabulary at every counted token, the mean over a row's tokens first.

``weighting: experiences`` is van de Ven et al. 2022: 1/t of the objective and 1 - 1/t of the distillation, at the t-th
experience.

Letters: B current rows, K classes, N counted tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from continual.errors import CompositionError
from continual.kinds import Objective
from continual.models.output import Output
from continual.objective import Criterion
from continual.parts.part import Context, Part, Slot
from continual.parts.teacher import Teacher
from continual.spec import Spec
from continual.streams.experience import Experience
from continual.table import IGNORED, Batch


class LwFSettings(Spec):
    """Settings of :class:`LwF`.

    Attributes:
        strength: weight of the distillation, the paper's lambda_o, ≥ 0.
        temperature: T > 0.
        weighting: ``sum`` adds the distillation to the objective; ``experiences`` weighs the objective 1/t and the
            distillation 1 - 1/t.
        over: the outputs of a classification that are held: those of the ``old`` classes, or ``all`` (not in the task scenario).
    """

    kind: Literal["lwf"] = "lwf"
    strength: float = Field(default=1.0, ge=0)
    temperature: float = Field(default=2.0, gt=0)
    weighting: Literal["sum", "experiences"] = "sum"
    over: Literal["old", "all"] = "old"


class LwF(Part):
    """Distils the model as it was when the experience began into itself, on the rows of the experience.

    In its first experience it does nothing. A step costs one more forward pass, over the current rows.
    """

    slot: ClassVar[Slot] = "distillation"
    Settings: ClassVar[type[Spec]] = LwFSettings
    objectives: ClassVar[tuple[Objective, ...]] = ("classification", "causal-lm", "seq2seq")
    needs_criterion: ClassVar[Criterion | None] = "cross-entropy"
    settings: LwFSettings

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.teacher = Teacher()
        self._classes: list[list[int]] = []
        self._index: list[Tensor] | None = None

    def attach(self, context: Context) -> None:
        super().attach(context)
        if self.settings.over == "all" and (context.scenario == "task" or context.objective != "classification"):
            raise CompositionError(
                f"{self.name} with over: all holds every output of one classification, and here the scenario is '{context.scenario}' "
                f"and the objective '{context.objective}': leave over out."
            )
        self._index = None

    def begin(self, context: Context, experience: Experience) -> None:
        """Keep the model as it is, where it has learnt something before."""
        self._index = None
        if self._classes and self.settings.strength:
            self.teacher.copy(context)

    def loss(self, batch: Batch, output: Output) -> Tensor | None:
        """The distillation, a scalar; with ``weighting: experiences`` also what the objective weighs less."""
        if not self.teacher:
            return None
        context = self.context
        rows = context.current_rows
        current = {name: column[:rows] for name, column in batch.items()}
        old = self.teacher(context, current).logits
        distilled = self.settings.strength * self._distance(output.logits[:rows], old, current)
        if self.settings.weighting == "sum":
            return distilled
        loss_B, weight_B = context.loss_rows(output, batch), batch.get("weight")
        objective = loss_B.mean() if weight_B is None else (weight_B * loss_B).sum() / weight_B.sum()
        return (1 - 1 / (len(self._classes) + 1)) * (distilled - objective)

    def end(self, context: Context, experience: Experience) -> None:
        """Remember which classes there were."""
        self._classes.append(sorted(experience.classes))

    def state_dict(self) -> dict[str, Any]:
        return {"teacher": self.teacher.state_dict(), "classes": [list(classes) for classes in self._classes]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.teacher.load_state_dict(state["teacher"])
        self._classes = [[int(label) for label in classes] for classes in state["classes"]]
        self._index = None

    def _distance(self, new: Tensor, old: Tensor, current: Batch) -> Tensor:
        """T^2 KL of what the old model says and what the new one says, a scalar."""
        T = self.settings.temperature
        if self.context.objective == "classification":
            if self._index is None:
                self._index = [torch.tensor(group, device=new.device) for group in self._groups(old.shape[1])]
            groups = [divergence(new[:, index_k], old[:, index_k], T).mean() for index_k in self._index]
            return torch.stack(groups).mean()
        labels_BT = current["labels"]
        if self.context.objective == "causal-lm":
            new, old, labels_BT = new[:, :-1], old[:, :-1], labels_BT[:, 1:]
        counted_BT = labels_BT != IGNORED
        each_BT = torch.zeros(counted_BT.shape, device=new.device)
        each_BT = each_BT.masked_scatter(counted_BT, divergence(new[counted_BT], old[counted_BT], T))
        return (each_BT.sum(1) / counted_BT.sum(1).clamp(min=1)).mean()

    def _groups(self, outputs: int) -> list[list[int]]:
        """Which classes compete with one another in the old model's answers."""
        if self.context.scenario == "task":
            return [classes for classes in self._classes if classes]
        if self.settings.over == "all":
            return [list(range(outputs))]
        return [sorted({label for classes in self._classes for label in classes})]


def divergence(new: Tensor, old: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(softmax(old / T) || softmax(new / T))`` over the last axis, float32."""
    log_new, log_old = (F.log_softmax(logits.float() / temperature, dim=-1) for logits in (new, old))
    return temperature**2 * F.kl_div(log_new, log_old, reduction="none", log_target=True).sum(-1)
