"""Feature distillation: the backbone goes on giving rows the features that the old model gave them.

``l2``: ``strength/2 ||f_old - f_new||^2`` (less-forgetting learning, Jung et al. 2016, arXiv 1607.00122, eq. 2).
``cosine``: ``strength (1 - cos(f_old, f_new))`` (Hou et al. 2019, LUCIR, CVPR, eq. 6), which leaves the length free.

The mean over all rows of the batch, those that replay adds included, as in LUCIR. Departure from Jung et al.: the head is
not frozen.

Letters: B rows, D features.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from continual.kinds import Objective
from continual.models.output import Output
from continual.parts.part import Context, Part, Slot
from continual.parts.teacher import Teacher
from continual.spec import Spec
from continual.streams.experience import Experience
from continual.table import Batch


class FeatureDistillationSettings(Spec):
    """Settings of :class:`FeatureDistillation`.

    Attributes:
        strength: weight of the distance, ≥ 0.
        distance: ``l2``, half the squared distance; ``cosine``, 1 minus the cosine.
    """

    kind: Literal["feature-distillation"] = "feature-distillation"
    strength: float = Field(default=1.0, ge=0)
    distance: Literal["l2", "cosine"] = "l2"


class FeatureDistillation(Part):
    """Holds the features of the rows of a batch where the model that began the experience had them.

    In its first experience it does nothing. A step costs one more forward pass.
    """

    slot: ClassVar[Slot] = "distillation"
    Settings: ClassVar[type[Spec]] = FeatureDistillationSettings
    objectives: ClassVar[tuple[Objective, ...]] = ("classification", "regression")
    needs_head: ClassVar[bool] = True
    settings: FeatureDistillationSettings

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.teacher = Teacher()
        self._learnt = 0

    def begin(self, context: Context, experience: Experience) -> None:
        """Keep the model as it is, where it has learnt something before."""
        if self._learnt and self.settings.strength:
            self.teacher.copy(context)

    def loss(self, batch: Batch, output: Output) -> Tensor | None:
        """The mean distance of the rows' features, a scalar."""
        if not self.teacher:
            return None
        old_BD, new_BD = self.teacher(self.context, batch).features, output.features
        assert old_BD is not None and new_BD is not None, "a model with a head gives features"
        if self.settings.distance == "l2":
            each_B = 0.5 * (new_BD.float() - old_BD.float()).square().sum(1)
        else:
            each_B = 1 - F.cosine_similarity(new_BD.float(), old_BD.float(), dim=1)
        return self.settings.strength * each_B.mean()

    def end(self, context: Context, experience: Experience) -> None:
        """There is something to keep from now on."""
        self._learnt += 1

    def state_dict(self) -> dict[str, Any]:
        return {"teacher": self.teacher.state_dict(), "learnt": self._learnt}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.teacher.load_state_dict(state["teacher"])
        self._learnt = int(state["learnt"])
