"""A head as tensors and as the few lines of torch that compute its logits from the features ``x``.

The lines are written for the head at hand: a step that its settings leave out has no line. Every head comes down to what
is done with a feature first (:mod:`~continual.parts.head.lift`), a rule, and a scale:

* linear: ``weight`` (K, D) and, where it has one, ``bias`` (K,);
* nearest mean, and means of exemplars: ``means`` (K, D);
* linear discriminants (slda, klda): ``centre`` (M,), ``weight`` (K, M), ``bias`` (K,);
* ridge (ranpac): ``weight`` (K, M);
* before any of them: ``mean`` (D,), ``projection`` (D, M) and, for Fourier features, ``phase`` (M,).

An orthogonal projection, which the head keeps as signs, is written out as the matrix that they stand for.

Letters: D features, M lifted features, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from continual.errors import CompositionError
from continual.parts.head.closed_form import ClassScores
from continual.parts.head.discriminant import Discriminants
from continual.parts.head.exemplar_means import ExemplarMeans
from continual.parts.head.lift import Lift, rotated
from continual.parts.head.linear import GrowingLinear
from continual.parts.head.nearest_mean import NearestMeans
from continual.parts.head.neighbours import Vote
from continual.parts.head.ridge import Ridge

EUCLIDEAN = 'logits = 2 * x @ head["means"].T - x.square().sum(1, keepdim=True) - head["means"].square().sum(1)'
NORMALIZE = "x = F.normalize(x, dim=1)"


@dataclass(frozen=True)
class Head:
    """A head as somebody else can use it.

    Attributes:
        tensors: what ``head.safetensors`` holds, on the CPU.
        settings: what ``inference.json`` says of it: its ``kind`` and its ``scale``.
        lines: from ``x``, the features float32 (B, D), to ``logits`` (B, K).
        known: bool (K,), the classes that it has learnt something of; None for all.
    """

    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    lines: tuple[str, ...]
    known: Tensor | None = None


def plain_head(module: nn.Module, kind: str, features: int) -> Head:
    """What ``module``, the head of a model, is made of.

    Args:
        features: D, that it is given.
        kind: of its part, as ``head/slda``.

    Raises:
        CompositionError: a head that torch alone cannot compute in a few lines, one that would hand out training rows, or one
            that knows no class yet.
    """
    if isinstance(module, ExemplarMeans):
        if not len(module.means):
            assert module.linear is not None, "attach comes first"
            return plain_head(module.linear, kind, features)
        lines = (NORMALIZE, EUCLIDEAN)
        return Head(_owned({"means": module.means}), {"kind": kind, "scale": 1.0}, lines, module.means.any(1).cpu())
    if isinstance(module, GrowingLinear):
        return _linear(module, kind)
    if isinstance(module, ClassScores) and isinstance(module.rule, Vote):
        raise CompositionError(
            f"{kind} answers by the features of training rows, which an export would hand out: take a head of kind 'slda', or "
            "serve the learner itself."
        )
    if not isinstance(module, ClassScores) or not isinstance(module.rule, NearestMeans | Discriminants | Ridge):
        raise CompositionError(
            f"{kind} has no form that a few lines of torch compute, so it cannot be exported: take a head of kind 'linear', "
            "'nearest-mean', 'slda', 'klda', 'ridge' or 'exemplar-means', or serve the learner itself."
        )
    if not module.solved:
        raise CompositionError(f"{kind} has seen no row of any class yet: update it on rows that have labels first.")
    tensors, lifting = _lifting(module.lift, features)
    rule, solution = module.rule, module.solution()
    if isinstance(rule, NearestMeans):
        tensors["means"] = solution["means"]
        cosine = 'logits = F.normalize(x, dim=1) @ F.normalize(head["means"], dim=1).T'
        scale, line = rule.scale, cosine if rule.distance == "cosine" else EUCLIDEAN
    elif isinstance(rule, Discriminants):
        tensors |= {name: solution[name] for name in ("centre", "weight", "bias")}
        scale, line = 1.0, 'logits = (x - head["centre"]) @ head["weight"].T + head["bias"]'
    else:
        tensors["weight"] = solution["weight"].T
        scale, line = 1.0, 'logits = x @ head["weight"].T'
    known = module.known.cpu()
    return Head(_owned(tensors), {"kind": kind, "scale": scale}, (*lifting, line, *_scaled(scale)), known)


def _linear(module: GrowingLinear, kind: str) -> Head:
    tensors = {"weight": module.weight.detach()}
    if module.bias is not None:
        tensors["bias"] = module.bias.detach()
    bias = ', head["bias"]' if module.bias is not None else ""
    line = f'logits = F.linear(x, head["weight"]{bias})'
    if module.normalize:
        line = f'logits = F.linear(F.normalize(x, dim=1), F.normalize(head["weight"], dim=1){bias})'
    return Head(_owned(tensors), {"kind": kind, "scale": module.scale}, (line, *_scaled(module.scale)))


def _scaled(scale: float) -> tuple[str, ...]:
    return () if scale == 1.0 else ('logits = told["head"]["scale"] * logits',)


def _lifting(lift: Lift, features: int) -> tuple[dict[str, Tensor], list[str]]:
    """What is done with a feature before the rule: its tensors and lines."""
    tensors: dict[str, Tensor] = {}
    lines = [NORMALIZE] if lift.normalize else []
    if lift.mean is not None:
        tensors["mean"] = lift.mean
        lines += ['x = x - head["mean"]', *lines]
    if lift.dimension is None:
        return tensors, lines
    tensors["projection"] = _projection(lift, features)
    if lift.activation == "relu":
        return tensors, [*lines, 'x = (x @ head["projection"]).relu()']
    tensors["phase"] = lift.phase
    return tensors, [*lines, 'x = (2 / len(head["phase"])) ** 0.5 * (x @ head["projection"] + head["phase"]).cos()']


def _projection(lift: Lift, features: int) -> Tensor:
    """The matrix (D, M) that features are multiplied with, float32."""
    if lift.projection == "gaussian":
        return lift.weight
    scale = 1.0 if lift.activation == "relu" else 1.0 / lift.bandwidth
    identity_DD = torch.eye(features, dtype=torch.float64, device=lift.weight.device)
    return scale * rotated(identity_DD, lift.weight)[:, : lift.dimension]


def _owned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().float().cpu().contiguous().clone() for name, tensor in tensors.items()}
