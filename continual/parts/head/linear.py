"""A linear head that grows with the classes: plain, or the cosine classifier of Hou et al. 2019 (LUCIR, CVPR, eq. 4).

    plain:   logits = scale · (F Wᵀ + b)
    cosine:  logits = scale · (F/‖F‖ (W/‖W‖)ᵀ + b)          (``normalize``)

Growing leaves the rows that are there unchanged to the bit. New rows begin with ``init``:

* ``uniform``: as ``torch.nn.Linear`` draws them, U(−1/√D, 1/√D), from the generator ``head``;
* ``zero``: zeros;
* ``mean``: from the mean μ_k of the class's features over up to ``init_rows`` rows, so that the new rows are the
  nearest-mean classifier before the first step (Qi et al. 2018, arXiv 1712.07136, for the cosine). Plain: w_k = μ_k and
  b_k = −½‖μ_k‖², since −½‖f − μ_k‖² = f·μ_k − ½‖μ_k‖² − ½‖f‖², whose last term is the same for every class. Cosine: the
  features of each row are normalised first, w_k = μ_k/‖μ_k‖ and b_k = 0. A class that has an output but no row yet is
  drawn as under ``uniform``, and gets its mean when its rows arrive.

Letters: B rows, N rows of a table, D features, K classes (or outputs).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from continual.errors import CompositionError, StreamError
from continual.kinds import Objective
from continual.parts.head.class_sums import class_sums, features_model
from continual.parts.part import Context, Part, Slot
from continual.spec import Spec
from continual.streams.experience import Experience
from continual.table import Table


class LinearHeadSettings(Spec):
    """Settings of :class:`LinearHead`.

    Attributes:
        init: how new rows begin.
        init_rows: rows of each new class that ``mean`` looks at.
        bias: whether there is a bias; by default only without ``normalize``.
        normalize: L2-normalise features and weights (cosine classifier).
        scale: what logits are multiplied with; by default 20 with ``normalize``, else 1.
    """

    kind: Literal["linear"] = "linear"
    init: Literal["uniform", "zero", "mean"] = "uniform"
    init_rows: int = Field(default=100, ge=1)
    bias: bool | None = None
    normalize: bool = False
    scale: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _possible(self) -> LinearHeadSettings:
        if self.normalize and self.init == "zero":
            raise ValueError("init 'zero' gives no direction to normalise: use 'uniform' or 'mean'")
        if self.init == "mean" and not self.normalize and self.bias is False:
            raise ValueError("init 'mean' without normalize needs the bias: leave 'bias' out, or set 'normalize: true'")
        if self.init_rows != 100 and self.init != "mean":
            raise ValueError("init_rows is read by init 'mean' only: leave it out")
        return self


class GrowingLinear(nn.Module):
    """The head's module: parameters ``weight`` (K, D) and ``bias`` (K,) or None."""

    def __init__(self, features: int, *, bias: bool, normalize: bool, scale: float) -> None:
        super().__init__()
        self.normalize, self.scale = normalize, scale
        self.weight = nn.Parameter(torch.empty(0, features))
        self.bias = nn.Parameter(torch.empty(0)) if bias else None

    def forward(self, features_BD: Tensor) -> Tensor:
        """Logits float32 (B, K), computed outside autocast: ten classes of a cosine head lie within one step of bf16."""
        device = features_BD.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self.forward(features_BD.float())
        weight_KD = F.normalize(self.weight, dim=1) if self.normalize else self.weight
        if self.normalize:
            features_BD = F.normalize(features_BD, dim=1)
        logits_BK = F.linear(features_BD, weight_KD, self.bias)
        return logits_BK if self.scale == 1.0 else logits_BK * self.scale


class LinearHead(Part):
    """A linear head; classes are added as they arrive, or all at once by :meth:`grow_to`.

    For regression, and under the scenario ``domain``, the number of outputs is fixed at the first experience.
    """

    slot: ClassVar[Slot] = "head"
    Settings: ClassVar[type[Spec]] = LinearHeadSettings
    objectives: ClassVar[tuple[Objective, ...]] = ("classification", "regression")
    needs_head: ClassVar[bool] = True
    settings: LinearHeadSettings

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.module: GrowingLinear | None = None
        self._met: set[int] = set()

    def check_objective(self, objective: Objective) -> None:
        """Refuse ``init: mean`` for a regression."""
        if objective == "regression" and self.settings.init == "mean":
            raise CompositionError(
                "head/linear: init 'mean' needs classes, and this is a regression: use 'uniform' (--set "
                "head.init=uniform) or 'zero'."
            )

    def attach(self, context: Context) -> None:
        """Set the head of the model.

        Raises:
            CompositionError: the model gives logits itself, or ``init: mean`` is asked of a regression.
        """
        super().attach(context)
        model = features_model(context, self.name)
        self.check_objective(context.objective)
        assert model.feature_size is not None
        if self.module is None:
            self.module = self._make(model.feature_size)
        model.head = self.module.to(context.device)

    def begin(self, context: Context, experience: Experience) -> None:
        """Add outputs for what arrives first in this experience.

        Raises:
            StreamError: a fixed head lacks an output for a class.
        """
        if context.objective == "regression":
            labels = experience.train[torch.zeros(1, dtype=torch.int64)]["labels"]
            self._grow(labels.reshape(1, -1).shape[1], context)
            return
        assert self.module is not None
        new = sorted(set(experience.classes) - self._met)
        needed = max(new, default=-1) + 1
        if context.scenario == "domain" and self._met and needed > len(self.module.weight):
            raise StreamError(
                f"experience '{experience.name}' brings class {needed - 1} and the head has {len(self.module.weight)} "
                "outputs, fixed by the first experience of a 'domain' stream: give every class there, or use the "
                "scenario 'class'."
            )
        self._grow(needed, context)
        if self.settings.init == "mean" and new:
            self._init_means(context, experience.train, new)
        self._met.update(new)

    def grow_to(self, classes: int, context: Context) -> None:
        """Have at least ``classes`` outputs, such as every class of the stream from the start."""
        self._grow(classes, context)

    def state_dict(self) -> dict[str, Any]:
        if self.module is None:
            return {"outputs": 0, "features": 0, "met": []}
        outputs, features = self.module.weight.shape
        return {"outputs": outputs, "features": features, "met": sorted(self._met)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Rebuild the head's shape; its weights belong to the model and are loaded there."""
        if state["features"]:
            module = self.module if self.module is not None else self._make(int(state["features"]))
            device = module.weight.device
            module.weight = nn.Parameter(torch.zeros(int(state["outputs"]), int(state["features"]), device=device))
            if module.bias is not None:
                module.bias = nn.Parameter(torch.zeros(int(state["outputs"]), device=device))
            self.module = module
        self._met = {int(index) for index in state["met"]}

    def _make(self, features: int) -> GrowingLinear:
        normalize, scale, bias = self.settings.normalize, self.settings.scale, self.settings.bias
        return GrowingLinear(
            features,
            bias=not normalize if bias is None else bias,
            normalize=normalize,
            scale=(20.0 if normalize else 1.0) if scale is None else scale,
        )

    def _grow(self, outputs: int, context: Context) -> None:
        module = self.module
        assert module is not None, "attach comes first"
        old, features = module.weight.shape
        if outputs <= old:
            return
        bound = 0.0 if self.settings.init == "zero" else 1 / math.sqrt(features)
        generator = context.randomness.generator("head")
        module.weight = self._extended(module.weight, _drawn((outputs - old, features), bound, generator), context)
        if module.bias is not None:
            module.bias = self._extended(module.bias, _drawn((outputs - old,), bound, generator), context)

    @staticmethod
    def _extended(old: nn.Parameter, rows: Tensor, context: Context) -> nn.Parameter:
        new = nn.Parameter(torch.cat([old.detach(), rows.to(old)]), requires_grad=old.requires_grad)
        context.replace_parameter(old, new)
        return new

    def _init_means(self, context: Context, table: Table, new: list[int]) -> None:
        module = self.module
        assert module is not None
        rows = _some_of_each(table.column("labels").cpu(), new, self.settings.init_rows, context)
        normalize = self.settings.normalize
        sums_KD, counts_K = class_sums(
            context, context.as_trained_on(table).select(rows), len(module.weight), normalize=normalize
        )
        new_k = torch.tensor(new, device=sums_KD.device)
        new_k = new_k[counts_K[new_k] > 0]
        mean_kD = sums_KD[new_k] / counts_K[new_k, None]
        with torch.no_grad():
            module.weight[new_k] = (F.normalize(mean_kD, dim=1) if normalize else mean_kD).to(module.weight)
            if module.bias is not None:
                bias_k = torch.zeros_like(mean_kD[:, 0]) if normalize else -0.5 * mean_kD.square().sum(1)
                module.bias[new_k] = bias_k.to(module.bias)


def _drawn(shape: tuple[int, ...], bound: float, generator: torch.Generator) -> Tensor:
    return torch.empty(shape).uniform_(-bound, bound, generator=generator) if bound else torch.zeros(shape)


def _some_of_each(labels_N: Tensor, classes: list[int], rows: int, context: Context) -> Tensor:
    """Places, int64, of up to ``rows`` rows of each of ``classes``, drawn from the generator ``head``."""
    order_N = torch.randperm(len(labels_N), generator=context.randomness.generator("head"))
    order_N = order_N[torch.isin(labels_N[order_N], torch.tensor(classes))]
    order_N = order_N[labels_N[order_N].argsort(stable=True)]
    sorted_N = labels_N[order_N]
    rank_N = torch.arange(len(sorted_N)) - torch.searchsorted(sorted_N, sorted_N)
    return order_N[rank_N < rows].sort().values
