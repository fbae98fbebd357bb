"""What the learner trains: a backbone, and the head of a part that turns its features into logits.

It also keeps book of which parameters still are, to the byte, those of the pretrained base: they need not be saved,
since the base is known by its SHA-256.

Letters: B rows, D features, K classes or outputs, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from continual.errors import ModelError, StateError, quoted
from continual.kinds import Objective
from continual.models.output import Output
from continual.table import Batch

FEATURES = "features of a steady backbone"
"""A column that a batch may have in the place of inputs; with its spaces it is nobody's own."""


class Model(nn.Module):
    """A backbone and, where it gives features, a head.

    Args:
        backbone: called with a batch; gives features float (B, D) where ``gives_features``, else logits, (B, K) or
            (B, T, V).
        gives_features: whether a head must turn what it gives into logits.
        objectives: what it can be trained for.
        spec: plain values from which :func:`~continual.models.build.build_model` makes it again;
            ``{"kind": "object", "class": name}`` for a module that must be handed in again.
        feature_size: D, or None without features.
        tokenizer: of Hugging Face, or None.
        max_length: tokens that are kept of a row of text, or None.
        base_sha256: of the weights of the pretrained base, or None.

    Attributes:
        head: set by the head's part; gives logits (B, K) from features (B, D). One that ``reads_inputs`` gets the rows'
            own inputs, flattened, in the place of features.
        adapter_replaced: set by an adapter's part: whether its parameters live for one experience only, so that nothing
            can be anchored to them.
        router: set by an adapter's part that keeps several apart: calls the backbone, each row with its own adapter.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        gives_features: bool,
        objectives: tuple[Objective, ...],
        spec: dict[str, Any],
        feature_size: int | None = None,
        tokenizer: Any = None,
        max_length: int | None = None,
        base_sha256: str | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head: nn.Module | None = None
        self.gives_features, self.feature_size = gives_features, feature_size
        self.objectives, self.spec = objectives, spec
        self.tokenizer, self.max_length = tokenizer, max_length
        self.base_sha256 = base_sha256
        self.adapter_replaced = False
        self.router: Callable[[nn.Module, Batch], Tensor] | None = None
        self._pristine: list[nn.Parameter] = []

    def forward(self, batch: Batch) -> Output:
        """Logits of a batch, and the features that they come from; features that a batch brings (:data:`FEATURES`) are taken.

        Raises:
            ModelError: no head has been attached to a backbone that gives features.
        """
        if not self.gives_features:
            return Output(self._run(batch))
        if self.head is None:
            raise ModelError(
                "the model gives features and has no head: name one in the strategy, such as head: {kind: linear}."
            )
        past = getattr(self.head, "reads_inputs", False)
        features_BD: Tensor = batch["inputs"].flatten(1).float() if past else self._run(batch)
        return Output(self.head(features_BD), features_BD)

    def _run(self, batch: Batch) -> Tensor:
        if FEATURES in batch:
            return batch[FEATURES]
        given: Tensor = self.backbone(batch) if self.router is None else self.router(self.backbone, batch)
        return given

    @property
    def backbone_trains(self) -> bool:
        """Whether some parameter of the backbone trains now."""
        return any(parameter.requires_grad for parameter in self.backbone.parameters())

    @property
    def transformer(self) -> nn.Module:
        """What adapters wrap: the Hugging Face model or the user's module inside the backbone, else the backbone."""
        holds = getattr(self.backbone, "holds", None)
        return self.backbone if holds is None else self.backbone.get_submodule(holds)

    @transformer.setter
    def transformer(self, module: nn.Module) -> None:
        self._set_transformer(module)

    def __setattr__(self, name: str, value: Any) -> None:
        # torch registers a module under the very name that it is assigned to, past the setter of a property.
        if name == "transformer":
            self._set_transformer(value)
        else:
            super().__setattr__(name, value)

    def _set_transformer(self, module: nn.Module) -> None:
        holds = getattr(self.backbone, "holds", None)
        if holds is None:
            self.backbone = module
        else:
            setattr(self.backbone, holds, module)

    def mark_pristine(self, parameters: Iterable[nn.Parameter]) -> None:
        """These parameters are as the pretrained base has them.

        Buffers never count as pristine, since a forward pass may write them.
        """
        self._pristine = _unique([*self._pristine, *parameters])

    def mark_altered(self, parameters: Iterable[nn.Parameter]) -> None:
        """These parameters are, or are about to be, no longer those of the pretrained base."""
        altered = {id(parameter) for parameter in parameters}
        self._pristine = [parameter for parameter in self._pristine if id(parameter) not in altered]

    def saved_tensors(self) -> dict[str, Tensor]:
        """Every tensor that must be saved, by its name in ``state_dict``; the live tensors, not copies.

        Left out are parameters that are pristine and frozen. A parameter is known by its object, so one that an adapter
        has put under another name is still known.
        """
        pristine = {id(parameter) for parameter in self._pristine if not parameter.requires_grad}
        state = self.state_dict(keep_vars=True)
        return {
            name: tensor.detach()
            for name, tensor in state.items()
            if isinstance(tensor, Tensor) and id(tensor) not in pristine
        }

    def load_saved(self, tensors: dict[str, Tensor]) -> None:
        """Copy ``tensors`` into the tensors of the same names; those of the pretrained base may be left out.

        Raises:
            StateError: a name too many, one too few, or another shape; nothing has been changed then.
        """
        state = self.state_dict(keep_vars=True)
        own = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
        pristine = {id(parameter) for parameter in self._pristine}
        missing = [name for name, tensor in own.items() if name not in tensors and id(tensor) not in pristine]
        unexpected = [name for name in tensors if name not in own]
        advice = "load it into the model and strategy it was saved from."
        if missing or unexpected:
            what = (
                f"lacks {_some(missing)}" if missing else f"holds {_some(unexpected)}, which this model does not have"
            )
            raise StateError(f"the saved model {what}: {advice}")
        for name, tensor in tensors.items():
            if tensor.shape != own[name].shape:
                raise StateError(
                    f"'{name}' was saved with shape {tuple(tensor.shape)} and has shape {tuple(own[name].shape)} here: "
                    f"{advice}"
                )
        with torch.no_grad():
            for name, tensor in tensors.items():
                own[name].copy_(tensor)
        self.mark_altered(
            tensor for name, tensor in own.items() if name in tensors and isinstance(tensor, nn.Parameter)
        )


def _unique(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return list({id(parameter): parameter for parameter in parameters}.values())


def _some(names: list[str]) -> str:
    return quoted(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
