"""Virtual tokens before every row of a frozen transformer: what prompts and prefixes share.

Their values are parameters in the transformer (``virtual_tokens.t0001`` and so on), and a pair of hooks puts them in front
as it is called: the attention mask grows by as many ones, and what the transformer says at their places is cut off again,
so that pooling, labels and padding meet the tokens of the row and nothing else. PEFT reads what is exported; its own
wrapper is not used, since it takes the place of the transformer, whose outputs then begin with the virtual tokens.

Letters: B rows, T tokens, V virtual tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from continual.errors import CompositionError, ModelError
from continual.parts.adapter.common import check_bare, freeze, transformer_of
from continual.parts.adapter.routing import Router, Routing
from continual.parts.part import Context
from continual.state import tensor_bytes
from continual.streams.experience import Experience

CACHE = ("cache", "past_key_values")
"""What the argument for keys and values is called: by transformers from 5.24 on, and before."""

Feed = Callable[[nn.Module, Tensor, dict[str, Any]], int]
"""(transformer, values, the arguments of its call, which it changes) → places to cut off in front of its output."""


class VirtualTokens:
    """The virtual tokens that one part has given to one model: one set for all experiences, or one for each.

    Args:
        feed: puts values into a call of the transformer.
        arguments: one of these the transformer's ``forward`` must take for that.
        apart: one set for each experience.
        routing, prototypes: which of them answers for a row (:class:`~continual.parts.adapter.routing.Router`).

    Attributes:
        names: sets in the model, oldest first; the last one trains and the others are frozen.
    """

    def __init__(
        self, feed: Feed, arguments: tuple[str, ...], *, apart: bool, routing: Routing, prototypes: int
    ) -> None:
        self.feed, self.arguments, self.apart = feed, arguments, apart
        self.names: list[str] = []
        self.router = Router(self, routing, prototypes) if apart else None
        self._values = nn.ParameterDict()
        self._active: str | None = None
        self._model: Any = None

    def begin(
        self, context: Context, experience: Experience, name: str, make: Callable[[nn.Module], Tensor], count: int
    ) -> None:
        """Make a first set, or with ``apart`` another one.

        Args:
            name: of the part, for sentences.
            make: the first values, given the transformer.
            count: V.

        Raises:
            ModelError: the model carries PEFT adapters already.
            CompositionError: the model is no transformer that takes virtual tokens, there is no room for them, or rows
                cannot be routed.
        """
        model: Any = context.model
        model.adapter_replaced = self.apart
        if self.router is not None:
            self.router.check(context)
        if not self.names:
            transformer = transformer_of(model)
            check_bare(transformer)
            check_transformer(transformer, name, self.arguments)
            _check_room(model, transformer, name, count)
        if not self.names or self.apart:
            self._add(model, make(transformer_of(model)))
        if self.router is not None:
            self.router.begin(context, experience)

    def end(self) -> None:
        """No experience is under way."""
        if self.router is not None:
            self.router.end()

    @contextmanager
    def only(self, name: str | None) -> Iterator[None]:
        """The model with one set, or with none; afterwards, also after an exception, as it was."""
        before = self._active
        self._active = name
        try:
            yield
        finally:
            self._active = before

    def values(self, name: str) -> Tensor:
        """The parameter of one set, or what stands in its place for the moment (``torch.func``)."""
        found: Tensor = self._values[name]
        return found

    def rows(self) -> Tensor:
        """Ids of the rows that a prototype of the router consists of, int64 CPU."""
        return torch.empty(0, dtype=torch.int64) if self.router is None else self.router.rows()

    def erase(self, rows: Tensor) -> int:
        """Give up such prototypes; returns how many there were."""
        return 0 if self.router is None else self.router.erase(rows)

    def state_dict(self) -> dict[str, Any]:
        """Names and shape; the values are saved with the model."""
        return {
            "names": list(self.names),
            "shape": list(self.values(self.names[0]).shape) if self.names else [],
            "router": None if self.router is None else self.router.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], context: Context) -> None:
        """Rebuild the structure in a pristine model."""
        model: Any = context.model
        model.adapter_replaced = self.apart
        for _ in state["names"]:
            self._add(model, torch.zeros([int(size) for size in state["shape"]]))
        if self.router is not None:
            self.router.load_state_dict(state["router"])

    def nbytes(self) -> int:
        """Bytes of all sets and of the prototypes."""
        router = 0 if self.router is None else tensor_bytes(self.router.state_dict())
        return router + sum(tensor_bytes(value.detach()) for value in self._values.values())

    def _add(self, model: Any, values: Tensor) -> None:
        transformer = transformer_of(model)
        if not self.names:
            freeze(model)
            transformer.add_module("virtual_tokens", self._values)
            transformer.register_forward_pre_hook(self._before, with_kwargs=True)
            transformer.register_forward_hook(self._after, with_kwargs=True)
        for old in self.names:
            self.values(old).requires_grad_(False)
        name = f"t{len(self.names) + 1:04d}"
        device = next(transformer.parameters()).device
        self._values[name] = nn.Parameter(values.to(device, torch.float32))
        self.names.append(name)
        self._active = name
        if self.router is not None:
            model.router = self.router

    def _before(self, transformer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if self._active is None:
            return None
        if args or any(kwargs.get(name) is not None for name in CACHE):
            raise ModelError(
                "virtual tokens go before rows that are given whole and by keyword: to generate text, export() them and load "
                "the folder with PEFT."
            )
        kwargs = dict(kwargs)
        self._cut = self.feed(transformer, self.values(self._active), kwargs)
        return args, kwargs

    def _after(self, transformer: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if self._active is not None and self._cut:
            for name in ("last_hidden_state", "logits"):
                found = getattr(output, name, None)
                if isinstance(found, Tensor):
                    setattr(output, name, found[:, self._cut :])
            states = getattr(output, "hidden_states", None)
            if states is not None:
                output.hidden_states = tuple(state[:, self._cut :] for state in states)
        return output


def taken(transformer: nn.Module, arguments: tuple[str, ...]) -> str | None:
    """Which of ``arguments`` the transformer's ``forward`` names, the first first."""
    parameters = inspect.signature(transformer.forward).parameters
    return next((argument for argument in arguments if argument in parameters), None)


def check_transformer(transformer: nn.Module, name: str, arguments: tuple[str, ...]) -> None:
    """Raise :class:`CompositionError` unless it reads tokens, gives something for each, and names one of ``arguments``.

    A classifier of transformers' answers from the place of the first token, or of the last that is no padding: places that virtual
    tokens move.
    """
    parameters = inspect.signature(transformer.forward).parameters
    if not hasattr(transformer, "get_input_embeddings") or not {"input_ids", "attention_mask"} <= parameters.keys():
        raise CompositionError(
            f"{name} puts virtual tokens before those of a row, and {type(transformer).__name__} reads none: take a "
            "transformer of Hugging Face, or adapter kind 'lora'."
        )
    whole: Any = transformer
    if getattr(whole, "base_model", whole) is not whole and whole.get_output_embeddings() is None:
        raise CompositionError(
            f"{name} puts virtual tokens before those of a row, and {type(transformer).__name__} takes its answer from the place of "
            "one token: give the name of its base instead, which a head of ours goes on, or take adapter kind 'lora'."
        )
    if taken(transformer, arguments) is None:
        raise CompositionError(
            f"{name} works through the argument {' or '.join(map(repr, arguments))}, which {type(transformer).__name__} "
            "does not take: take adapter kind 'lora'" + (", or 'prompt'." if arguments == CACHE else ".")
        )


def longer_mask(kwargs: dict[str, Any], count: int, ids_BT: Tensor) -> Tensor:
    """The attention mask with ``count`` ones in front, (B, V + T)."""
    mask_BT = kwargs.get("attention_mask")
    mask_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
    return torch.cat([mask_BT.new_ones(len(mask_BT), count), mask_BT], 1)


def _check_room(model: Any, transformer: nn.Module, name: str, count: int) -> None:
    config: Any = getattr(transformer, "config", None)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) if config is not None else None
    longest = getattr(model, "max_length", None)
    if limit and longest and count + longest > limit:
        raise CompositionError(
            f"{name} adds {count} tokens to rows of up to {longest}, and the model has places for {limit}: set adapter.tokens "
            f"or the model's max_length lower."
        )
