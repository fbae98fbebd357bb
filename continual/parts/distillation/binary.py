"""iCaRL's distillation: the sigmoid outputs of old classes are trained towards those of the old model, not to labels.

With the loss ``binary``, a row's old classes k have the targets q_k = sigmoid(old_k) of the model as it was when the
experience began, whether the row is new or replayed; its new classes have its label (Rebuffi et al. 2017, arXiv
1611.07725, algorithm 3):

    loss = Σ_new BCE(z_k, [k = y]) + Σ_old BCE(z_k, q_k)

The objective is Σ BCE(z_k, [k = y]) over all classes that compete. BCE is linear in its target, so what is added here is
Σ_old ([k = y] − q_k) z_k where the class competes, and BCE(z_k, q_k) where it does not (another task's, in ``task``).

``temperature`` T makes it q_k = sigmoid(old_k / T), with T = 2 in the repository of van de Ven et al. 2022 (GMvandeVen/
continual-learning), whose iCaRL this reproduces.

The paper has new classes only. A class that the experience brings again is learnt from its labels and not held: under
``domain``, where every experience brings all classes, nothing is left to distil.

Letters: B rows, K classes, O old ones among them.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from continual.kinds import Objective
from continual.models.output import Output
from continual.objective import Criterion
from continual.parts.part import Context, Part, Slot
from continual.parts.teacher import Teacher
from continual.spec import Spec
from continual.streams.experience import Experience
from continual.table import IGNORED, Batch


class BinaryDistillationSettings(Spec):
    """Settings of :class:`BinaryDistillation`.

    Attributes:
        temperature: what the old model's logits are divided by before the sigmoid; 1 in the paper.
    """

    kind: Literal["binary"] = "binary"
    temperature: float = Field(default=1.0, gt=0)


class BinaryDistillation(Part):
    """Puts the old model's sigmoid outputs in the place of labels for old classes, on every row of a batch.

    In its first experience it does nothing. A step costs one more forward pass.
    """

    slot: ClassVar[Slot] = "distillation"
    Settings: ClassVar[type[Spec]] = BinaryDistillationSettings
    objectives: ClassVar[tuple[Objective, ...]] = ("classification",)
    needs_criterion: ClassVar[Criterion | None] = "binary"
    settings: BinaryDistillationSettings

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.teacher = Teacher()
        self._met: list[int] = []
        self._old: list[int] = []
        self._index: Tensor | None = None

    def begin(self, context: Context, experience: Experience) -> None:
        """Keep the model as it is, where it knows classes that this experience does not bring."""
        self._old, self._index = sorted(set(self._met) - set(experience.classes)), None
        if self._old:
            self.teacher.copy(context)

    def loss(self, batch: Batch, output: Output) -> Tensor | None:
        """What turns the targets of old classes into those of the old model, a scalar."""
        if not self.teacher:
            return None
        context, labels_B = self.context, batch["labels"]
        if self._index is None:
            self._index = torch.tensor(self._old, device=labels_B.device)
        index_O, active = self._index, context.active(batch)
        target_BO = (_of(self.teacher(context, batch), index_O) / self.settings.temperature).sigmoid()
        logits_BO = _of(output, index_O)
        competes_BO = (labels_B != IGNORED)[:, None].expand(-1, len(index_O))
        if active is not None:
            competes_BO = competes_BO & active[..., index_O]
        label_BO = (labels_B[:, None] == index_O) & competes_BO
        loss_B = ((label_BO.float() - target_BO) * logits_BO + F.softplus(logits_BO) * ~competes_BO).sum(1)
        weight_B = batch.get("weight")
        return loss_B.mean() if weight_B is None else (weight_B * loss_B).sum() / weight_B.sum()

    def end(self, context: Context, experience: Experience) -> None:
        """Remember which classes there were; the old model is let go."""
        self._met = sorted({*self._met, *experience.classes})
        self.teacher.load_state_dict({})

    def state_dict(self) -> dict[str, Any]:
        return {"teacher": self.teacher.state_dict(), "met": list(self._met), "old": list(self._old)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.teacher.load_state_dict(state["teacher"])
        self._met, self._old = [int(k) for k in state["met"]], [int(k) for k in state["old"]]
        self._index = None


def _of(output: Output, index_O: Tensor) -> Tensor:
    """The logits of these classes, float32 (B, O)."""
    return output.logits.index_select(1, index_O).float()
