"""Sums of the features of each class over a table, in float64, in one pass without gradients.

Letters: B rows, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from continual.errors import CompositionError
from continual.models.model import Model
from continual.parts.part import Context
from continual.table import Table


def features_model(context: Context, name: str) -> Model:
    """The model of ``context``, which must give features.

    Raises:
        CompositionError: it gives logits itself, so no head of ours fits on it.
    """
    model = context.model
    if not isinstance(model, Model) or not model.gives_features or model.feature_size is None:
        raise CompositionError(
            f"{name} needs a model that gives features, and this one gives logits itself: leave the head out, "
            "or use an mlp or a pretrained encoder."
        )
    return model


def class_sums(context: Context, table: Table, classes: int, *, normalize: bool) -> tuple[Tensor, Tensor]:
    """Sums float64 (K, D) of the features of each class, and rows int64 (K,), on the device.

    The model is in eval mode meanwhile. Rows labelled -100 or beyond ``classes`` count for nothing.

    Args:
        classes: K.
        normalize: L2-normalise the features of each row before they are added up.
    """
    model = features_model(context, "the mean of features")
    assert model.feature_size is not None
    sums_KD = torch.zeros(classes, model.feature_size, dtype=torch.float64, device=context.device)
    counts_K = torch.zeros(classes, dtype=torch.int64, device=context.device)
    class_K = torch.arange(classes, device=context.device)
    with torch.no_grad(), eval_mode(model):
        for batch in context.batches(table):
            features_BD = context.forward(batch).features
            assert features_BD is not None
            if normalize:
                features_BD = F.normalize(features_BD.double(), dim=1)
            member_KB = class_K[:, None] == batch["labels"][None, :]
            sums_KD += member_KB.double() @ features_BD.double()
            counts_K += member_KB.sum(1)
    return sums_KD, counts_K


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode; each is put back into its own mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
