"""Which labels the log-likelihood is taken at, and the loss of each row there.

``true``: the rows' own labels (the empirical Fisher, Kunstner et al. 2019, arXiv 1905.12558). ``sampled``: a draw from
the model's own distribution, an unbiased estimate of the Fisher. ``predicted``: the most likely label. ``all``: the
exact expectation over the classes. Options as in van de Ven 2025 (arXiv 2502.11756).

Letters: B rows, K classes, T tokens, V vocabulary, N places that a label is drawn for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from continual import objective as objectives
from continual.errors import CompositionError
from continual.kinds import Objective
from continual.models.output import Output
from continual.objective import mask_logits
from continual.parts.part import Context
from continual.parts.penalty.fisher_forms import LIMIT
from continual.table import IGNORED, Batch

Labels = Literal["true", "sampled", "predicted", "all"]


Measure = Callable[[Context, Output, Batch, Tensor | None], Tensor]
"""(context, output, batch, active) → what is differentiated, one number a row, (B,)."""


def surprise(context: Context, output: Output, batch: Batch, active: Tensor | None) -> Tensor:
    """The negative log-likelihood of each row, (B,), as its objective defines it."""
    if context.objective == "classification":
        return objectives.loss_rows("classification", output.logits.float(), batch, active)
    return context.loss_rows(output, batch)


@dataclass(frozen=True)
class Target:
    """Rows with the labels that something is measured at.

    Attributes:
        batch: with those labels.
        active: the classes that compete, bool (K,) or (B, K), or None for all.
        root: what each row's gradient is multiplied with, float (B,), or None for 1; for a Fisher the square root of
            the weight of its square.
        measure: what is differentiated.
    """

    batch: Batch
    active: Tensor | None = None
    root: Tensor | None = None
    measure: Measure = surprise

    def losses(self, context: Context, output: Output) -> Tensor:
        """The measure of each row times ``root``, (B,)."""
        losses_B = self.measure(context, output, self.batch, self.active)
        return losses_B if self.root is None else losses_B * self.root


def check_labels(labels: Labels, objective: Objective) -> None:
    """Raise :class:`CompositionError` where the choice of labels means nothing for the objective."""
    if labels == "all" and objective != "classification":
        raise CompositionError(
            f"the Fisher over all labels needs classes to sum over and the objective is '{objective}': "
            "set labels to 'sampled' or 'true'."
        )
    if labels == "predicted" and objective == "regression":
        raise CompositionError(
            "the Fisher at the predicted value of a regression is zero everywhere: set labels to 'sampled' or 'true'."
        )


def targets(
    context: Context, batch: Batch, logits: Tensor, labels: Labels, generator: torch.Generator | None
) -> Iterator[Target]:
    """The targets of one batch: one, or with ``all`` one for each class.

    Args:
        logits: (B, K), or (B, T, V) of a language model, without a graph.
        generator: CPU generator that ``sampled`` draws from.
    """
    if context.objective == "classification":
        active = context.active(batch)
        competing = mask_logits(logits.float(), active)
        if labels == "all":
            probability_BK = competing.softmax(-1)
            counted_B = batch["labels"] != IGNORED
            for label in range(logits.shape[-1]):
                target_B = torch.full_like(batch["labels"], label)
                yield Target({**batch, "labels": target_B}, active, probability_BK[:, label].sqrt() * counted_B)
            return
        chosen = _choose(competing, labels, generator, batch["labels"])
        yield Target({**batch, "labels": chosen}, active)
    elif labels == "true":
        yield Target(batch)
    elif context.objective == "regression":
        yield Target({**batch, "labels": _gaussian(logits, generator).reshape(batch["labels"].shape)})
    elif context.objective == "causal-lm":
        chosen = _choose(logits[:, :-1], labels, generator, batch["labels"][:, 1:])
        yield Target({**batch, "labels": torch.cat([batch["labels"][:, :1], chosen], 1)})
    else:
        chosen = _choose(logits, labels, generator, batch["labels"])
        yield Target({**batch, "labels": chosen})


def _choose(logits: Tensor, labels: Labels, generator: torch.Generator | None, true: Tensor) -> Tensor:
    """Labels from logits (..., K), drawn by inverting the distribution; a place that is not counted stays so."""
    if labels == "true":
        return true
    if labels == "predicted":
        return torch.where(true != IGNORED, logits.argmax(-1), true)
    uniform = torch.rand(true.shape, generator=generator).to(logits.device, torch.float64)
    logits_NK, uniform_N = logits.flatten(0, -2), uniform.flatten()
    step = max(1, LIMIT // logits.shape[-1])
    parts = [_invert(logits_NK[n : n + step], uniform_N[n : n + step]) for n in range(0, max(len(uniform_N), 1), step)]
    drawn = parts[0] if len(parts) == 1 else torch.cat(parts)
    kept: Tensor = torch.where(true != IGNORED, drawn.view(true.shape), true)
    return kept


def _invert(logits_NK: Tensor, uniform_N: Tensor) -> Tensor:
    """The class at which the cumulative distribution passes each of the uniform numbers, int64 (N,)."""
    sum_NK = (logits_NK.double() - logits_NK.amax(-1, keepdim=True)).exp_().cumsum_(-1)
    return torch.searchsorted(sum_NK, (uniform_N * sum_NK[:, -1])[:, None], right=True).squeeze(-1)


def _gaussian(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """A draw from the normal distribution whose negative log-likelihood is the mean of K squared errors."""
    noise = torch.randn(logits.shape, generator=generator).to(logits.device)
    outputs = logits[0].numel() if len(logits) else 1
    return logits.float() + noise * math.sqrt(outputs / 2)
