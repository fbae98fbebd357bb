"""The exact diagonal of the Fisher information, from the gradient of every single row.

``F_p = 1/N sum_n (d log p(y_n | x_n) / d theta_p)^2`` (Kirkpatrick et al. 2017, arXiv 1612.00796; Martens 2014, arXiv
1412.1193), for language models and regression with the row's loss as the context defines it. The square is taken of
each row's own gradient, never of a batch's mean, so that the result does not depend on the batch size.

Rows are added up in the order given, in float32; the gradients come from :mod:`~continual.parts.penalty.rowwise`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from continual.models.lowrank import adapted_layers, adapter_parameters
from continual.parts.part import Context
from continual.parts.penalty.fisher_check import Layer
from continual.parts.penalty.fisher_labels import Labels, Target, check_labels, targets
from continual.parts.penalty.rowwise import Sums, Way, per_row
from continual.table import Batch

Space = Literal["parameters", "weights"]


def diagonal_fisher(
    context: Context,
    batches: Iterable[Batch],
    *,
    labels: Labels = "sampled",
    space: Space = "parameters",
    way: Way = "auto",
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """The diagonal Fisher of what trains now, as a mean over all rows of ``batches``.

    Args:
        batches: on the context's device; how rows are divided into batches makes no difference.
        labels: which labels the likelihood is taken at (:mod:`~continual.parts.penalty.fisher_labels`).
        space: ``parameters``: of every trainable parameter. ``weights``: of the effective weight of every adapted layer
            whose adapter trains, and of the trainable parameters that belong to no adapter.
        way: ``auto`` takes closed forms where there are any; ``vmap`` and ``loop`` take only that one for parameters
            (an effective weight, which is no parameter, always has its closed form).
        generator: CPU generator for ``labels="sampled"``.

    Returns:
        Name → float32 tensor ≥ 0 of the shape of the parameter, or of the effective weight (out, in) under the name of
        its layer. A row without a counted label has gradient zero and counts as a row.

    Raises:
        CompositionError: ``labels`` means nothing for the objective; an adapted layer that is more than a linear layer
            with a low-rank term (DoRA); ``way="vmap"`` where ``torch.func`` cannot follow.
        TrainingError: no rows.
    """
    check_labels(labels, context.objective)
    parameters, layers = tracked(context, space)
    sums = Sums(2, parameters, layers)

    def wanted(batch: Batch, logits: Tensor) -> Iterator[Target]:
        return targets(context, batch, logits, labels, generator)

    return sums.mean(per_row(context, batches, wanted, sums, parameters, layers, way=way))


def tracked(context: Context, space: Space) -> tuple[dict[str, nn.Parameter], dict[str, Layer]]:
    """What a penalty in ``space`` holds on to: plain parameters by name, and adapted layers by module name."""
    parameters = context.parameters()
    if space == "parameters":
        return dict(parameters), {}
    names = {id(parameter): name for name, parameter in parameters.items()}
    layers: dict[str, Layer] = {}
    for layer_name, module in adapted_layers(context.model).items():
        own = [p for adapter in module.lora_A for p in adapter_parameters(module, str(adapter)).values()]  # type: ignore[union-attr]
        trained = {names[id(parameter)]: parameter for parameter in own if id(parameter) in names}
        if trained:
            layers[layer_name] = Layer(module, trained)
    inside = {name for layer in layers.values() for name in layer.parameters}
    return {name: parameter for name, parameter in parameters.items() if name not in inside}, layers
