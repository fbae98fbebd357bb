"""LoRA over many tasks: the base stays frozen, low-rank factors learn.

Source: Hu et al. 2021 (arXiv 2106.09685). ``stack`` (one adapter a task, the earlier ones frozen and summed) is the IncLoRA
of Wang et al. 2023 (arXiv 2310.14152), and with penalty ``orthogonal`` their O-LoRA. The layers are PEFT's.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator
from torch import Tensor

from continual.parts.adapter.common import Adapters
from continual.parts.adapter.routing import APART, PROTOTYPES, Router, Routing, check_routing
from continual.parts.adapter.targets import Target
from continual.parts.part import Context, Part, Slot
from continual.spec import Spec
from continual.state import tensor_bytes
from continual.streams.experience import Experience


class LoRASettings(Spec):
    """Settings of :class:`LoRA`.

    Attributes:
        rank: r of every adapter.
        alpha: the change of a weight is scaled by alpha / r, or by alpha / √r with ``use_rslora`` (arXiv 2312.03732).
        dropout: of the adapter's input, while it trains.
        target: ``all-linear``, or names of linear layers (whole, or the end of a name as ``q_proj``).
        across_tasks: what a later task does. ``continue`` trains the same adapter on. ``stack`` freezes it, keeps it
            active and adds another. ``merge`` adds it to the base weights for good and starts a fresh one. ``first``
            trains in the first experience only and leaves the features as they are from then on (first-session
            adaptation, Panos et al. 2023, arXiv 2303.13199), as heads without gradients need it. ``separate`` freezes it
            and starts another, and every row goes through the adapter of one experience only.
        routing: of ``separate``, which one: that of the row's ``task``, which must be given; or, by ``features`` of the
            frozen base, where it is not (:mod:`~continual.parts.adapter.routing`).
        prototypes: of each experience, for ``features``.
        init: how A and B begin. All of these leave the base weights alone and the model's output as it was; those that
            alter the base (pissa, olora, corda, loftq) are not offered.
    """

    kind: Literal["lora"] = "lora"
    rank: int = Field(8, ge=1)
    alpha: float = Field(16, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target: Target = "all-linear"
    across_tasks: Literal["continue", "stack", "merge", "first", "separate"] = "continue"
    routing: Routing = "features"
    prototypes: int = Field(PROTOTYPES, ge=1)
    init: Literal["default", "gaussian", "orthogonal"] = "default"
    use_rslora: bool = False

    @field_validator("target")
    @classmethod
    def _some_target(cls, target: Target) -> Target:
        return some_target(target)

    @model_validator(mode="after")
    def _even_rank(self) -> Self:
        if self.init == "orthogonal" and self.rank % 2:
            raise ValueError(f"init 'orthogonal' needs an even rank, and rank is {self.rank}: use {self.rank + 1}")
        return self

    @model_validator(mode="after")
    def _routing_is_read(self) -> Self:
        check_routing(self.across_tasks == "separate", self.routing, self.prototypes)
        return self


class LoRA(Part):
    """One low-rank adapter for all tasks, or one for each (see :class:`LoRASettings`).

    At the first experience the base is frozen and its linear layers are wrapped in place; only the adapter, and a head
    where there is one, train. ``context.model.adapter_replaced`` says whether the adapter lives for one task only.
    """

    slot: ClassVar[Slot] = "adapter"
    Settings: ClassVar[type[Spec]] = LoRASettings
    settings: LoRASettings

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        apart = self.settings.across_tasks == "separate"
        self.adapters = Adapters("lora", apart=apart)
        self.router = Router(self.adapters, self.settings.routing, self.settings.prototypes) if apart else None
        self._settled = False

    @property
    def settles(self) -> bool:
        return self.settings.across_tasks == "first"

    @property
    def replaces(self) -> bool:
        return self.settings.across_tasks in ("stack", "merge", "separate")

    @property
    def stacks(self) -> bool:
        return self.settings.across_tasks == "stack"

    @property
    def refuses(self) -> dict[str, str]:
        return APART if self.router is not None else {}

    def attach(self, context: Context) -> None:
        """Let the model send every row through its own adapter, where they are kept apart."""
        super().attach(context)
        if self.router is not None and self.adapters.names:
            model: Any = context.model
            model.router = self.router

    def begin(self, context: Context, experience: Experience) -> None:
        """Make, keep, add or replace the adapter.

        Raises:
            ModelError: the model carries PEFT adapters already.
            CompositionError: no layer matches ``target``, the base cannot be merged into, or rows cannot be routed.
        """
        model: Any = context.model
        across = self.settings.across_tasks
        model.adapter_replaced = self.replaces
        if self.router is not None:
            self.router.check(context)
        if not self.adapters.names or across in ("stack", "separate"):
            self.adapters.add(model, self._config(), self.settings.target)
        elif across == "merge":
            self.adapters.replace(model, self._config(), self.settings.target)
        if across == "merge":
            self.adapters.check_mergeable()
        if self.router is not None:
            model.router = self.router
            self.router.begin(context, experience)

    def end(self, context: Context, experience: Experience) -> None:
        """Freeze the adapter for good where it trains in the first experience only."""
        if self.router is not None:
            self.router.end()
        if self.settles and not self._settled:
            self.adapters.settle()
            self._settled = True

    def rows(self) -> Tensor:
        return super().rows() if self.router is None else self.router.rows()

    def erase(self, rows: Tensor) -> int:
        return 0 if self.router is None else self.router.erase(rows)

    def state_dict(self) -> dict[str, Any]:
        """Names of the adapters in the model, the folds of those that were merged into it, and whether it settled."""
        router = None if self.router is None else self.router.state_dict()
        return {**self.adapters.state_dict(), "settled": self._settled, "router": router}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Rebuild the structure in a pristine model; the adapters' values are loaded with the model."""
        model: Any = self.context.model
        model.adapter_replaced = self.replaces
        self.adapters.rebuild(model, state, self._config, self.settings.target)
        self._settled = bool(state["settled"])
        if self._settled:
            self.adapters.settle()
        if self.router is not None:
            self.router.load_state_dict(state["router"])
            model.router = self.router if self.adapters.names else None

    def nbytes(self) -> int:
        """Bytes of all adapters: those in the model, and the folds of those merged into it; and of the prototypes."""
        return self.adapters.nbytes() + (0 if self.router is None else tensor_bytes(self.router.state_dict()))

    def _config(self) -> Any:
        from peft import LoraConfig

        settings = self.settings
        return LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            use_rslora=settings.use_rslora,
            init_lora_weights=True if settings.init == "default" else settings.init,
            bias="none",
        )


def some_target(target: Target) -> Target:
    """``target`` unless it is an empty list, which a :class:`ValueError` refuses."""
    if not target:
        raise ValueError("the list is empty: name linear layers, or write all-linear")
    return target
