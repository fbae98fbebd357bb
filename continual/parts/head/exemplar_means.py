"""iCaRL's classifier: a linear head trains the backbone, and rows are told apart by the means of kept exemplars.

Source: Rebuffi et al. 2017, iCaRL (arXiv 1611.07725), algorithm 1: a row gets the class whose mean of exemplars is
nearest,

    y = argmin over k of ‖ φ(x) − μ_k ‖,    μ_k the mean of φ(p) over the exemplars p of class k,

with features φ of length 1, and means brought to length 1 as well (section 2.1). Exemplars are whatever rows a replay part
keeps when an experience has ended (``select: herding`` for those of the paper); their features are those of the backbone
as it then is, so means are computed anew at every end.

Inside an experience the linear head answers, in training and in every pass that a part makes; early stopping looks at it
too. Between experiences, where rows are measured and predicted, the means do, with −‖ φ(x) − μ_k ‖² as the logit. A class
of several experiences (in ``domain``) has one mean over the exemplars of all of them.

Letters: B rows, D features, K classes (or outputs).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from continual.kinds import Objective
from continual.parts.head.class_sums import ClassSums, features_model
from continual.parts.head.closed_form import UNKNOWN
from continual.parts.head.linear import LinearHead
from continual.parts.head.nearest_mean import NearestMeans
from continual.parts.part import Context, Part, Slot
from continual.parts.passes import as_at_test
from continual.parts.replay.store import KeepsRows
from continual.spec import Spec
from continual.streams.batching import evaluation_batches
from continual.streams.experience import Experience
from continual.table import Batch, to_device

_RULE = NearestMeans("euclidean", 1.0)


class ExemplarMeansSettings(Spec):
    """Settings of :class:`ExemplarMeansHead`: none, as in the paper."""

    kind: Literal["exemplar-means"] = "exemplar-means"


class ExemplarMeans(nn.Module):
    """The head's module: a linear head, and in its place the means of exemplars while there are some.

    Attributes:
        linear: the head that trains, set by the part.
        means: float32 (K, D), each of length 1, zeros for a class without exemplars; empty inside an experience.
    """

    means: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear: nn.Module | None = None
        self.register_buffer("means", torch.zeros(0, 0), persistent=False)

    def forward(self, features_BD: Tensor) -> Tensor:
        """Logits float32 (B, K); by means computed in float32 also under autocast, :data:`UNKNOWN` without exemplars."""
        assert self.linear is not None, "attach comes first"
        if not len(self.means):
            logits_BK: Tensor = self.linear(features_BD)
            return logits_BK
        with torch.autocast(features_BD.device.type, enabled=False):
            scores_BK = _RULE.scores({"means": self.means}, F.normalize(features_BD.float(), dim=1))
        return scores_BK.masked_fill(~self.means.any(1), UNKNOWN)


class ExemplarMeansHead(Part):
    """Trains a linear head and answers by the means of the exemplars that a replay part keeps.

    It holds no row itself; rows that are erased leave the means too.
    """

    slot: ClassVar[Slot] = "head"
    Settings: ClassVar[type[Spec]] = ExemplarMeansSettings
    objectives: ClassVar[tuple[Objective, ...]] = ("classification",)
    needs_head: ClassVar[bool] = True
    needs_stored_rows: ClassVar[bool] = True
    settings: ExemplarMeansSettings

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.linear, self.module = LinearHead(), ExemplarMeans()

    def attach(self, context: Context) -> None:
        """Set the head of the model.

        Raises:
            CompositionError: the model gives logits itself.
        """
        super().attach(context)
        self.linear.attach(context)
        self.module.linear = self.linear.module
        features_model(context, self.name).head = self.module.to(context.device)

    def begin(self, context: Context, experience: Experience) -> None:
        """Let the linear head answer, with outputs for what arrives first in this experience."""
        self.module.means = self.module.means.new_zeros(0, 0)
        self.linear.begin(context, experience)

    def grow_to(self, classes: int, context: Context) -> None:
        """Have at least ``classes`` outputs."""
        self.linear.grow_to(classes, context)

    def end(self, context: Context, experience: Experience) -> None:
        """Let the means answer, of what is kept now; the linear head does where no row is."""
        self.module.means = self._means(context, torch.empty(0, dtype=torch.int64))

    def erase(self, rows: Tensor) -> int:
        """Take the means over the other rows; returns 0, for the rows are another part's."""
        if len(self.module.means):
            self.module.means = self._means(self.context, rows.to("cpu", torch.int64))
        return 0

    def state_dict(self) -> dict[str, Any]:
        return {"linear": self.linear.state_dict(), "means": self.module.means}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Rebuild the linear head's shape; its weights belong to the model and are loaded there."""
        self.linear.load_state_dict(state["linear"])
        self.module.means = state["means"].to(self.module.means.device, torch.float32, copy=True)

    @torch.no_grad()
    def _means(self, context: Context, without: Tensor) -> Tensor:
        """Means float32 (K, D) of the rows that are kept, but for those with the ids ``without``."""
        model, linear = features_model(context, self.name), self.linear.module
        assert model.feature_size is not None and linear is not None
        sums = ClassSums()
        sums.to(context.device)
        sums.grow(len(linear.weight), model.feature_size)
        with as_at_test(context.model):
            for batch in _kept(context, without):
                features_BD = context.forward(batch).features
                assert features_BD is not None
                sums.add(F.normalize(features_BD.double(), dim=1), batch["labels"])
        if not bool(sums.counts_K.any()):
            return self.module.means.new_zeros(0, 0)
        return F.normalize(sums.means_KD(), dim=1).float()


def _kept(context: Context, without: Tensor) -> Iterator[Batch]:
    """The rows of every store, but for some, on the device in batches of an evaluation."""
    size = max(context.batch_size, min(8 * context.batch_size, 256))
    for part in context.parts:
        if not isinstance(part, KeepsRows) or not len(part.store):
            continue
        memory = part.store.memory
        place_N = (~torch.isin(memory.rows(), without)).nonzero().flatten()
        lengths = None if memory.lengths is None else memory.lengths[place_N]
        for index_B in evaluation_batches(lengths, len(place_N), size):
            yield to_device(memory.batch(place_N[index_B]), context.device)
