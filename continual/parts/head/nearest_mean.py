"""Nearest class mean: no weights to train, nothing to forget while the features stay as they are.

A row gets the class whose mean of features over all rows seen so far is nearest (Mensink et al. 2013, TPAMI; in
continual learning Rebuffi et al. 2017, iCaRL, arXiv 1611.07725, and Janson et al. 2022, arXiv 2210.04428). Sums are
kept in float64, so the order of the rows does not matter. The means are those of the features at the time the rows were
seen: with a backbone that trains on, older means grow stale.

    cosine:     logits_k = scale · (f/‖f‖)·(μ_k/‖μ_k‖)
    euclidean:  logits_k = −scale · ‖f − μ_k‖²

Letters: B rows, D features, K classes.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from continual.objective import Objective
from continual.parts.head.class_sums import class_sums, features_model
from continual.parts.part import Context, Part, Slot
from continual.spec import Spec
from continual.streams.experience import Experience

Distance = Literal["cosine", "euclidean"]


class NearestMeanSettings(Spec):
    """Settings of :class:`NearestMeanHead`.

    Attributes:
        distance: what nearest means.
        normalize: L2-normalise the features of each row, before they are averaged and before they are compared.
        scale: what logits are multiplied with; it changes confidences, never the class.
    """

    kind: Literal["nearest-mean"] = "nearest-mean"
    distance: Distance = "euclidean"
    normalize: bool = True
    scale: float = Field(default=1.0, gt=0)


class NearestMean(nn.Module):
    """The head's module: buffers ``means`` float32 (K, D) and ``known`` bool (K,), written by the part."""

    means: Tensor
    known: Tensor

    def __init__(self, features: int, distance: Distance, *, normalize: bool, scale: float) -> None:
        super().__init__()
        self.distance, self.normalize, self.scale = distance, normalize, scale
        self.register_buffer("means", torch.zeros(0, features), persistent=False)
        self.register_buffer("known", torch.zeros(0, dtype=torch.bool), persistent=False)

    def forward(self, features_BD: Tensor) -> Tensor:
        """Logits float32 (B, K); a class without rows gets a finite one far below all others."""
        features_BD, means_KD = features_BD.float(), self.means
        if self.normalize or self.distance == "cosine":
            features_BD = F.normalize(features_BD, dim=1)
        if self.distance == "cosine":
            logits_BK = features_BD @ F.normalize(means_KD, dim=1).T
        else:
            squares_BK = features_BD.square().sum(1, keepdim=True) + means_KD.square().sum(1)
            logits_BK = 2 * features_BD @ means_KD.T - squares_BK
        return (self.scale * logits_BK).masked_fill(~self.known, torch.finfo(torch.float32).min / 4)


class NearestMeanHead(Part):
    """Class means of the features, brought up to date at the end of each experience in one pass over its rows.

    It keeps sums and counts of classes and no row, so there is none to erase: a row that must leave the means too needs
    them computed anew.
    """

    slot: ClassVar[Slot] = "head"
    Settings: ClassVar[type[Spec]] = NearestMeanSettings
    objectives: ClassVar[tuple[Objective, ...]] = ("classification",)
    needs_head: ClassVar[bool] = True
    excludes: ClassVar[dict[str, str]] = {
        "adapter": "an adapter changes the features after the class means were taken, so they no longer fit: "
        "use head/linear with 'init: mean'",
    }
    settings: NearestMeanSettings

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.module: NearestMean | None = None
        self._sums_KD = torch.zeros(0, 0, dtype=torch.float64)
        self._counts_K = torch.zeros(0, dtype=torch.int64)

    def attach(self, context: Context) -> None:
        """Set the head of the model.

        Raises:
            CompositionError: the model gives logits itself.
        """
        super().attach(context)
        model = features_model(context, self.name)
        assert model.feature_size is not None
        if self.module is None:
            self.module = self._make(model.feature_size)
        model.head = self.module.to(context.device)
        self._sums_KD, self._counts_K = self._sums_KD.to(context.device), self._counts_K.to(context.device)

    def begin(self, context: Context, experience: Experience) -> None:
        """Add outputs for classes that arrive first; they become known at the end."""
        self.grow_to(max(experience.classes, default=-1) + 1, context)

    def end(self, context: Context, experience: Experience) -> None:
        """Add the experience's rows to the means."""
        sums_KD, counts_K = class_sums(
            context, experience.train, len(self._counts_K), normalize=self.settings.normalize
        )
        self._sums_KD = self._sums_KD + sums_KD
        self._counts_K = self._counts_K + counts_K
        self._write()

    def grow_to(self, classes: int, context: Context) -> None:
        """Have at least ``classes`` outputs."""
        assert self.module is not None, "attach comes first"
        more = classes - len(self._counts_K)
        if more > 0:
            self._sums_KD = torch.cat(
                [
                    self._sums_KD.reshape(-1, self.module.means.shape[1]),
                    self._sums_KD.new_zeros(more, self.module.means.shape[1]),
                ]
            )
            self._counts_K = torch.cat([self._counts_K, self._counts_K.new_zeros(more)])
            self._write()

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self._sums_KD, "counts": self._counts_K}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self._sums_KD.device
        self._sums_KD = state["sums"].to(device, torch.float64, copy=True)
        self._counts_K = state["counts"].to(device, torch.int64, copy=True)
        if self.module is None and self._sums_KD.shape[1]:
            self.module = self._make(self._sums_KD.shape[1])
        if self.module is not None:
            self._write()

    def _make(self, features: int) -> NearestMean:
        settings = self.settings
        self._sums_KD = self._sums_KD.reshape(-1, features)
        return NearestMean(features, settings.distance, normalize=settings.normalize, scale=settings.scale)

    def _write(self) -> None:
        assert self.module is not None
        self.module.known = self._counts_K > 0
        self.module.means = (self._sums_KD / self._counts_K.clamp(min=1)[:, None]).float()
