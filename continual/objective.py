"""Loss and score of each row, from logits. The loss is never taken from the model.

Letters: B rows, K classes (or outputs), T tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from continual.errors import ModelError
from continual.kinds import Objective
from continual.table import IGNORED, Batch

Competition = Literal["seen", "experience", "all", "asymmetric"]
Criterion = Literal["cross-entropy", "binary"]

PRIMARY = {
    "classification": "accuracy",
    "regression": "negative squared error",
    "causal-lm": "log-likelihood per token",
    "seq2seq": "log-likelihood per token",
}
"""What the first score of each objective is called."""


def loss_rows(
    objective: Objective,
    logits: Tensor,
    batch: Batch,
    active: Tensor | None = None,
    criterion: Criterion = "cross-entropy",
) -> Tensor:
    """Loss of each row, float (B,).

    Args:
        logits: (B, K) for classification and regression, (B, T, V) for language models.
        batch: its ``labels`` are int64 (B,), float (B,) or (B, K), or int64 (B, T); ``-100`` counts for nothing.
        active: bool (K,) or (B, K), the classes that compete; None when all do.
        criterion: of a classification.

    Classification: cross-entropy of a softmax, or with ``binary`` that of a sigmoid for each class that competes, summed
    over them (as in Rebuffi et al. 2017, arXiv 1611.07725, algorithm 3). Regression: mean squared error over the outputs.
    Language models: mean cross-entropy over the row's counted tokens (for ``causal-lm`` each token is predicted
    from those before it). Logits of half precision are taken to float32 first.
    """
    labels, logits = batch["labels"], _full(logits)
    if objective == "classification":
        if criterion == "binary":
            return _binary_losses(logits, labels, active)
        return F.cross_entropy(mask_logits(logits, active), labels, reduction="none", ignore_index=IGNORED)
    if objective == "regression":
        return (_outputs(logits) - _targets(labels, logits)).square().mean(1)
    losses_BT, counted_BT = _token_losses(objective, logits, labels)
    return losses_BT.sum(1) / counted_BT.sum(1).clamp(min=1)


def score_rows(objective: Objective, logits: Tensor, batch: Batch, active: Tensor | None = None) -> dict[str, Tensor]:
    """Scores of each row, higher is better, float32 (B,); the first is the primary one of the matrix R.

    Classification: ``accuracy`` (1 or 0). Regression: ``negative squared error`` (mean over outputs). Language models:
    ``log-likelihood per token`` and ``exact match`` (every counted token is the most likely one, which is the same as an
    exact match of greedy decoding).
    """
    labels, logits = batch["labels"], _full(logits)
    if objective == "classification":
        right_B = mask_logits(logits, active).argmax(-1) == labels
        return {PRIMARY[objective]: right_B.to(torch.float32)}
    if objective == "regression":
        return {PRIMARY[objective]: -(_outputs(logits) - _targets(labels, logits)).square().mean(1).float()}
    losses_BT, counted_BT = _token_losses(objective, logits, labels)
    shifted_logits, shifted_labels = _shift(objective, logits, labels)
    right_BT = (shifted_logits.argmax(-1) == shifted_labels) | ~counted_BT
    some_B = counted_BT.any(1)
    mean_B = losses_BT.sum(1) / counted_BT.sum(1).clamp(min=1)
    return {PRIMARY[objective]: -mean_B.float(), "exact match": (right_BT.all(1) & some_B).to(torch.float32)}


def mask_logits(logits: Tensor, active: Tensor | None) -> Tensor:
    """Logits with -inf where a class does not compete."""
    return logits if active is None else logits.masked_fill(~active, -torch.inf)


def active_classes(
    competition: Competition,
    owner_K: Tensor,
    labels_B: Tensor,
    *,
    all_seen: bool,
    current: int = -1,
    new_rows: int | None = None,
) -> Tensor | None:
    """Which classes compete for each row: bool (K,), (B, K), or None for all.

    Args:
        competition: ``seen`` every class met so far, ``experience`` those of the experience that the row's class
            belongs to, ``all`` every output there is, ``asymmetric`` those of the current experience for a new row and
            every class met so far for a replayed one (Caccia et al. 2022, arXiv 2104.05025, eq. 3, where the classes of
            the batch stand in place of those of the experience, and the mean losses of new and of replayed rows are added, which
            is twice the mean over a batch of as many of both: a full one, at share .5).
        owner_K: int64 (K,), the experience that a class belongs to (the latest one), -1 for one not yet met.
        labels_B: int64 (B,), -100 and classes without an output allowed.
        all_seen: whether no entry of ``owner_K`` is -1, known without asking the device.
        current: the experience under way.
        new_rows: how many rows at the head of the batch are new; None tells them by the experience of their class.
    """
    owner_B = (
        owner_K[labels_B.clamp(min=0, max=len(owner_K) - 1)] if competition in ("asymmetric", "experience") else owner_K
    )
    if competition == "asymmetric":
        new_B = owner_B == current
        if new_rows is not None:
            new_B = new_B & (torch.arange(len(labels_B), device=labels_B.device) < new_rows)
        return torch.where(new_B[:, None], owner_K == current, owner_K >= 0)
    if competition == "experience":
        return owner_K == owner_B[:, None]
    if competition == "seen" and not all_seen:
        return owner_K >= 0
    return None


def _binary_losses(logits_BK: Tensor, labels_B: Tensor, active: Tensor | None) -> Tensor:
    wanted_BK = (labels_B[:, None] == torch.arange(logits_BK.shape[1], device=logits_BK.device)).to(logits_BK.dtype)
    counted = (labels_B != IGNORED)[:, None] if active is None else (labels_B != IGNORED)[:, None] & active
    logits_BK = logits_BK.masked_fill(~counted, 0.0)
    losses_BK = F.binary_cross_entropy_with_logits(logits_BK, wanted_BK, reduction="none")
    return losses_BK.masked_fill(~counted, 0.0).sum(1)


def _full(logits: Tensor) -> Tensor:
    """Logits of half precision in float32: a bf16 cross-entropy rounds small losses to 0 and ties the best classes."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def _outputs(logits: Tensor) -> Tensor:
    return logits.reshape(logits.shape[0], -1)


def _targets(labels: Tensor, logits: Tensor) -> Tensor:
    targets = labels.reshape(labels.shape[0], -1).to(logits.dtype)
    if targets.shape != _outputs(logits).shape:
        raise ModelError(
            f"the model gives {tuple(_outputs(logits).shape[1:])} outputs a row and the labels have "
            f"{tuple(targets.shape[1:])}: give the model as many outputs as there are targets."
        )
    return targets


def _shift(objective: Objective, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return (logits[:, :-1], labels[:, 1:]) if objective == "causal-lm" else (logits, labels)


def _token_losses(objective: Objective, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits, labels = _shift(objective, logits, labels)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED)
    return losses.view(labels.shape), labels != IGNORED
