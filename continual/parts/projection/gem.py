"""Gradient episodic memory: a step must not, to first order, raise the loss of any earlier experience.

Among the gradients that point against no g_k, the gradient of the mean loss over the memory of experience k, the one
nearest to g: ``g + G^T v`` with v from the dual

    min_v 1/2 v^T (G G^T + epsilon I) v + (G g)^T v    subject to v >= margin           (t, P) G, the g_k

(Lopez-Paz & Ranzato 2017, arXiv 1706.08840, eq. 11; the margin, which leans towards the memory, and epsilon are those of the
authors' program). It is solved as non-negative least squares by ``scipy.optimize.nnls``. Where no g_k.g is negative, g is left
alone. Without epsilon a memory that is learnt by heart, whose gradients are next to nothing and mostly noise, must not lose at
any price: with 200 rows for 20 tasks of permuted MNIST the weights blow up.

Departure: each g_k is the gradient of the model in eval mode (:mod:`~continual.parts.projection.memory_gradient`). The gradient
that is projected is that of the whole loss with the pull of penalties, before clipping.

Letters: t experiences in memory, P parameters, N rows.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from continual.errors import TrainingError
from continual.parts.part import Context, Part, Slot
from continual.parts.projection.memory_gradient import memory_gradient
from continual.parts.replay.store import Store
from continual.spec import Spec
from continual.streams.experience import Experience

Vector = NDArray[np.float64]


class GEMSettings(Spec):
    """Settings of :class:`GEM`.

    Attributes:
        capacity: rows of the memory, shared equally by the experiences.
        margin: least v, the paper's gamma, ≥ 0.
        epsilon: added to the diagonal of G G^T, > 0: a g_k whose square is below it binds little.
    """

    kind: Literal["gem"] = "gem"
    capacity: PositiveInt = 200
    margin: NonNegativeFloat = 0.5
    epsilon: PositiveFloat = 1e-3


class GEM(Part):
    """Projects the gradient so that it works against no earlier experience.

    In its first experience it does nothing. A step costs one more forward and backward pass for each earlier experience,
    over all its rows in memory, and one sync of the device.
    """

    slot: ClassVar[Slot] = "projection"
    Settings: ClassVar[type[Spec]] = GEMSettings
    excludes: ClassVar[dict[str, str]] = {"projection": "the second projection would undo the first, so keep one."}
    settings: GEMSettings

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.store = Store(self.name, "leave it out", capacity=self.settings.capacity, select="experience-balanced")

    def attach(self, context: Context) -> None:
        super().attach(context)
        self.store.attach(context)

    def edit_gradients(self) -> None:
        """Project the gradients.

        Raises:
            TrainingError: a gradient that is not finite.
        """
        if not len(self.store):
            return
        context, groups_N = self.context, self.store.selection.groups_N
        parameters = list(context.parameters().values())
        rows = []
        for group in torch.unique(groups_N).tolist():
            found = memory_gradient(context, self.store.memory, (groups_N == group).nonzero().flatten(), parameters)
            rows.append(
                _flat([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)])
            )
        G_tP = torch.stack(rows)
        g_P = _flat([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
        products = (G_tP @ torch.cat([G_tP, g_P[None]]).T).double().cpu().numpy()
        if not np.isfinite(products).all():
            raise TrainingError(
                f"a gradient is not finite at step {context.step}, on the memory of {self.name} or on the new rows: the "
                "weights of the last good step are kept; lower training.lr, set training.clip, or look at these rows."
            )
        gram_tt, dot_t = products[:, :-1], products[:, -1]
        if (dot_t >= 0).all():
            return
        v_t = torch.from_numpy(dual(gram_tt, dot_t, self.settings.margin, self.settings.epsilon)).to(g_P)
        projected = torch.split(g_P + v_t @ G_tP, [p.numel() for p in parameters])
        for parameter, part in zip(parameters, projected, strict=True):
            new = part.view_as(parameter).to(parameter.dtype)
            if parameter.grad is None:
                parameter.grad = new.clone()
            else:
                parameter.grad.copy_(new)

    def end(self, context: Context, experience: Experience) -> None:
        """Offer all training rows of the experience to the memory."""
        self.store.offer_table(context, experience)

    def rows(self) -> Tensor:
        return self.store.rows()

    def erase(self, rows: Tensor) -> int:
        return self.store.erase(rows)

    def nbytes(self) -> int:
        return self.store.nbytes()

    def state_dict(self) -> dict[str, Any]:
        return self.store.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.store.load_state_dict(state)


def dual(gram_tt: Vector, dot_t: Vector, margin: float, epsilon: float) -> Vector:
    """The v (t,) ≥ margin with the least ``1/2 v^T K v + dot.v``, for K = G G^T + epsilon I and dot = G g.

    With ``u = v - margin`` and ``K = R^T R`` it is the u ≥ 0 nearest to ``R u = -R^-T (dot + margin K 1)``.
    """
    from scipy.optimize import nnls

    values, vectors = np.linalg.eigh(gram_tt)
    root = np.sqrt(np.maximum(values, 0.0) + epsilon)
    wanted = dot_t + margin * (gram_tt.sum(1) + epsilon)
    u, _ = nnls(root[:, None] * vectors.T, -(vectors.T @ wanted) / root, maxiter=100 * len(dot_t))
    return np.asarray(u, dtype=np.float64) + margin


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten().float() for tensor in tensors])
