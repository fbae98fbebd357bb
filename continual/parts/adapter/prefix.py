"""Prefix tuning: keys and values of virtual tokens learn, in every layer, and the whole transformer stays frozen.

Source: Li & Liang 2021 (arXiv 2101.00190, sec. 4.2). Departure: keys and values themselves are the parameters, without the
network that the paper makes them with while it trains and drops afterwards; ``vocabulary`` begins with the activations of
drawn tokens, which the paper found to do as much for stability (sec. 7.3).

Letters: B rows, T tokens, V virtual tokens, L layers, H heads of keys and values, D width of a head.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from continual.errors import CompositionError
from continual.kinds import Objective
from continual.parts.adapter.routing import APART, PROTOTYPES, Routing, check_routing
from continual.parts.adapter.virtual import CACHE, VirtualTokens, longer_mask, taken
from continual.parts.part import Context, Part, Slot
from continual.parts.passes import as_at_test
from continual.spec import Spec
from continual.streams.experience import Experience


class PrefixSettings(Spec):
    """Settings of :class:`Prefix`.

    Attributes:
        tokens: V, virtual tokens before every row; they take places of the model's longest row.
        init: keys and values of drawn tokens of the ``vocabulary``, or ``normal`` with deviation 0.02.
        across_tasks: what a later task does. ``continue`` trains the same prefix on; ``separate`` freezes it and starts
            another, and every row goes behind the prefix of one experience only.
        routing, prototypes: of ``separate``, as for LoRA.
    """

    kind: Literal["prefix"] = "prefix"
    tokens: int = Field(20, ge=1)
    init: Literal["vocabulary", "normal"] = "vocabulary"
    across_tasks: Literal["continue", "separate"] = "continue"
    routing: Routing = "features"
    prototypes: int = Field(PROTOTYPES, ge=1)

    @model_validator(mode="after")
    def _routing_is_read(self) -> Self:
        check_routing(self.across_tasks == "separate", self.routing, self.prototypes)
        return self


class Prefix(Part):
    """Trains keys and values (see :class:`PrefixSettings`), and a head where there is one."""

    slot: ClassVar[Slot] = "adapter"
    Settings: ClassVar[type[Spec]] = PrefixSettings
    needs_tokens: ClassVar[bool] = True
    objectives: ClassVar[tuple[Objective, ...]] = ("classification", "regression", "causal-lm")
    settings: PrefixSettings

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        own = self.settings
        apart = own.across_tasks == "separate"
        self.adapters = VirtualTokens(feed, CACHE, apart=apart, routing=own.routing, prototypes=own.prototypes)

    @property
    def refuses(self) -> dict[str, str]:
        return APART if self.adapters.apart else {}

    def begin(self, context: Context, experience: Experience) -> None:
        """Make, keep or add a prefix; :class:`~continual.parts.adapter.virtual.VirtualTokens` says what is refused."""
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
        """Bytes of all prefixes, and of the prototypes."""
        return self.adapters.nbytes()

    def _first(self, transformer: nn.Module) -> Tensor:
        """Float32 (L, 2, H, V, D)."""
        from transformers import DynamicCache

        generator, count = self.context.randomness.generator("prefix"), self.settings.tokens
        embeddings: Any = transformer.get_input_embeddings()  # type: ignore[operator]
        drawn_V = torch.randint(len(embeddings.weight), (count,), generator=generator)
        ids_BT, cache = drawn_V[None].to(embeddings.weight.device), DynamicCache()
        with torch.no_grad(), as_at_test(transformer), self.adapters.only(None):
            name = str(taken(transformer, CACHE))
            transformer(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), **{name: cache})
        layers: list[Any] = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
        shapes = {getattr(part, "shape", None) for pair in layers for part in pair}
        if len(shapes) != 1 or None in shapes:
            raise CompositionError(
                f"{self.name} needs keys and values of one form in every layer, which {type(transformer).__name__} does not "
                "keep: take adapter kind 'prompt' or 'lora'."
            )
        found = torch.stack([torch.cat(pair) for pair in layers]).float()
        if self.settings.init == "normal":
            return torch.empty(found.shape).normal_(0.0, 0.02, generator=generator)
        return found


def feed(transformer: nn.Module, values_L2HVD: Tensor, kwargs: dict[str, Any]) -> int:
    """A cache that holds the prefix; nothing is to be cut off, since no position of its own is computed."""
    from transformers import DynamicCache

    ids_BT, cache = kwargs["input_ids"], DynamicCache()
    values_L2HVD = values_L2HVD.to(next(transformer.parameters()).dtype)
    for layer, (keys_HVD, held_HVD) in enumerate(values_L2HVD):
        rows = (len(ids_BT), -1, -1, -1)
        cache.update(keys_HVD.expand(rows), held_HVD.expand(rows), layer)
    kwargs[str(taken(transformer, CACHE))] = cache
    kwargs["attention_mask"] = longer_mask(kwargs, values_L2HVD.shape[3], ids_BT)
    return 0
