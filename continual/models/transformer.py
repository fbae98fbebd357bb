"""Transformers inside a model: pooled into features for a head, or as language models that give logits themselves.

Mean pooling is that of sentence-transformers (Reimers & Gurevych 2019, arXiv 1908.10084): the mean of the last hidden
states over the tokens that are not padding. Features are not normalised: that is the head's to decide; those of several
layers are, each by itself, so that none outweighs the others.

Letters: B rows, T tokens, D features, V vocabulary.
"""

from __future__ import annotations

import inspect
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from continual.errors import ModelError, quoted
from continual.table import Batch


class PooledTransformer(nn.Module):
    """Features of a row from the last hidden states of its tokens.

    Args:
        transformer: called with ``input_ids`` and ``attention_mask``; its output has ``last_hidden_state`` (B, T, D).
        pooling: ``mean`` over the tokens, the first token (``cls``), or the ``last`` one that is not padding.
        layers: hidden states, counted back from the last, whose features are laid side by side, the last one first.
    """

    holds = "transformer"

    def __init__(self, transformer: nn.Module, pooling: Literal["mean", "cls", "last"], layers: int = 1) -> None:
        super().__init__()
        self.transformer, self.pooling, self.layers = transformer, pooling, layers
        self._options = {"output_hidden_states": True} if layers > 1 else {}
        self._options |= (
            {"use_cache": False} if "use_cache" in inspect.signature(transformer.forward).parameters else {}
        )

    def forward(self, batch: Batch) -> Tensor:
        """Features float32 (B, layers · D), which the padding to the right of a row does not change.

        Raises:
            ModelError: the batch has no ``input_ids``.
        """
        ids_BT, mask_BT = _tokens(batch)
        output = self.transformer(input_ids=ids_BT, attention_mask=mask_BT, **self._options)
        features_BD = pool(output.last_hidden_state, mask_BT, self.pooling)
        if self.layers == 1:
            return features_BD
        below = output.hidden_states[-2 : -self.layers - 1 : -1]
        found = [features_BD, *(pool(hidden_BTD, mask_BT, self.pooling) for hidden_BTD in below)]
        return torch.cat([F.normalize(each_BD, dim=1) for each_BD in found], dim=1)


class LanguageModel(nn.Module):
    """Logits (B, T, V) of a causal or sequence-to-sequence language model; its own loss is never computed.

    Args:
        transformer: called with ``input_ids`` and ``attention_mask``; its output has ``logits``.
        seq2seq: it has a decoder, which is fed with the labels shifted by its own function.
    """

    holds = "transformer"

    def __init__(self, transformer: nn.Module, *, seq2seq: bool) -> None:
        super().__init__()
        self.transformer, self.seq2seq = transformer, seq2seq

    def forward(self, batch: Batch) -> Tensor:
        """Logits, over the tokens of ``input_ids`` or, with a decoder, of ``labels``.

        Raises:
            ModelError: the batch has no ``input_ids``.
        """
        ids_BT, mask_BT = _tokens(batch)
        options: dict[str, Any] = {"use_cache": False}
        if self.seq2seq:
            shift = cast(Any, self.transformer).prepare_decoder_input_ids_from_labels
            options["decoder_input_ids"] = shift(labels=batch["labels"])
        logits_BTV: Tensor = self.transformer(input_ids=ids_BT, attention_mask=mask_BT, **options).logits
        return logits_BTV


def pool(hidden_BTD: Tensor, mask_BT: Tensor, pooling: Literal["mean", "cls", "last"]) -> Tensor:
    """One float32 vector (B, D) of each row; tokens under a mask of 0 count for nothing."""
    if pooling == "cls":
        return hidden_BTD[:, 0].float()
    if pooling == "last":
        place_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
        last_B = (mask_BT.bool() * place_T).amax(1)
        return hidden_BTD[torch.arange(len(last_B), device=last_B.device), last_B].float()
    sum_BD = hidden_BTD.masked_fill(mask_BT[:, :, None] == 0, 0.0).sum(1, dtype=torch.float32)
    return sum_BD / mask_BT.sum(1, keepdim=True).clamp(min=1)


def _tokens(batch: Batch) -> tuple[Tensor, Tensor]:
    if "input_ids" not in batch:
        raise ModelError(
            f"a pretrained transformer reads 'input_ids', and these rows have {quoted(sorted(batch))}: "
            "give it text, or use an mlp."
        )
    ids_BT = batch["input_ids"]
    mask_BT = batch.get("attention_mask")
    return ids_BT, torch.ones_like(ids_BT) if mask_BT is None else mask_BT
