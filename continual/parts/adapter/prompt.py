"""Prompt tuning: embeddings of virtual tokens learn, before every row, and the whole transformer stays frozen.

Source: Lester et al. 2021 (arXiv 2104.08691, sec. 2). ``separate``, one prompt for each experience, chosen by the frozen
base's features, is S-Prompts (Wang et al. 2022, arXiv 2207.12819) without its classifier for each domain. Departure:
``vocabulary`` begins with the embeddings of tokens drawn from the whole vocabulary, where the paper takes the 5000 most
common ones, which a tokenizer does not tell.

Letters: B rows, T tokens, V virtual tokens, D width of an embedding.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from continual.parts.adapter.routing import APART, PROTOTYPES, Routing, check_routing
from continual.parts.adapter.virtual import VirtualTokens, longer_mask
from continual.parts.part import Context, Part, Slot
from continual.spec import Spec
from continual.streams.experience import Experience


class PromptSettings(Spec):
    """Settings of :class:`Prompt`.

    Attributes:
        tokens: V, virtual tokens before every row; they take places of the model's longest row.
        init: embeddings of drawn tokens of the ``vocabulary``, or ``uniform`` in (−0.5, 0.5).
        across_tasks: what a later task does. ``continue`` trains the same prompt on; ``separate`` freezes it and starts
            another, and every row goes behind the prompt of one experience only.
        routing, prototypes: of ``separate``, as for LoRA.
    """

    kind: Literal["prompt"] = "prompt"
    tokens: int = Field(20, ge=1)
    init: Literal["vocabulary", "uniform"] = "vocabulary"
    across_tasks: Literal["continue", "separate"] = "continue"
    routing: Routing = "features"
    prototypes: int = Field(PROTOTYPES, ge=1)

    @model_validator(mode="after")
    def _routing_is_read(self) -> Self:
        check_routing(self.across_tasks == "separate", self.routing, self.prototypes)
        return self


class Prompt(Part):
    """Trains virtual tokens (see :class:`PromptSettings`), and a head where there is one."""

    slot: ClassVar[Slot] = "adapter"
    Settings: ClassVar[type[Spec]] = PromptSettings
    needs_tokens: ClassVar[bool] = True
    settings: PromptSettings

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        own = self.settings
        apart = own.across_tasks == "separate"
        self.adapters = VirtualTokens(
            feed, ("inputs_embeds",), apart=apart, routing=own.routing, prototypes=own.prototypes
        )

    @property
    def refuses(self) -> dict[str, str]:
        return APART if self.adapters.apart else {}

    def begin(self, context: Context, experience: Experience) -> None:
        """Make, keep or add a prompt; :class:`~continual.parts.adapter.virtual.VirtualTokens` says what is refused."""
        self.adapters.begin(context, experience, self.name, self._first, self.settings.tokens)

    def end(self, context: Context, experience: Experience) -> None:
        """No experience is under way."""
        self.adapters.end()

    def rows(self) -> Tensor:
        return self.adapters.rows()

    def erase(self, rows: Tensor) -> int:
        return self.adapters.erase(rows)

    def state_dict(self) -> dict[str, Any]:
        return self.adapters.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Rebuild the structure in a pristine model; the values are loaded with the model."""
        self.adapters.load_state_dict(state, self.context)

    def nbytes(self) -> int:
        """Bytes of all prompts, and of the prototypes."""
        return self.adapters.nbytes()

    def _first(self, transformer: nn.Module) -> Tensor:
        embeddings: Any = transformer.get_input_embeddings()  # type: ignore[operator]
        generator, count = self.context.randomness.generator("prompt"), self.settings.tokens
        vocabulary, width = embeddings.weight.shape
        if self.settings.init == "uniform":
            return torch.empty(count, width).uniform_(-0.5, 0.5, generator=generator)
        drawn_V = torch.randint(vocabulary, (count,), generator=generator)
        values_VD: Tensor = embeddings.weight.detach()[drawn_V.to(embeddings.weight.device)].float()
        return values_VD


def feed(transformer: nn.Module, values_VD: Tensor, kwargs: dict[str, Any]) -> int:
    """Embeddings in the place of ids, the virtual ones first; an encoder-decoder's own output has no place for them."""
    ids_BT = kwargs.pop("input_ids")
    embeddings: Any = transformer.get_input_embeddings()  # type: ignore[operator]
    own_BTD = embeddings(ids_BT)
    virtual_BVD = values_VD.to(own_BTD.dtype).expand(len(ids_BT), -1, -1)
    kwargs["inputs_embeds"] = torch.cat([virtual_BVD, own_BTD], 1)
    kwargs["attention_mask"] = longer_mask(kwargs, len(values_VD), ids_BT)
    config: Any = transformer.config
    return 0 if config.is_encoder_decoder else len(values_VD)
