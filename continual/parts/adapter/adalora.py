"""AdaLoRA over many tasks: adapters begin at a high rank and are pruned to a budget, in every task anew.

Source: Zhang et al. 2023 (arXiv 2303.10512): W + B diag(E) A, the importance of a direction from |weight × gradient|,
smoothed, and its uncertainty, a budget that falls with the cube of the steps left, A and B held near orthogonal. Layers
and allocator are PEFT's.

Departures from stock PEFT, which keeps one schedule for the life of an adapter and so freezes, reopens or empties it in
the second task: a schedule and an allocator for each task, from the task's own steps; the allocator always follows the
adapter that trains; the orthogonality term is added here and never taken from the model's loss; a task that stops early
is pruned to its budget at its end.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from continual.errors import TrainingError
from continual.models.lowrank import adapter_parameters, ranks
from continual.models.output import Output
from continual.parts.adapter.common import Adapters
from continual.parts.adapter.lora import some_target
from continual.parts.adapter.schedule import Schedule, make_schedule
from continual.parts.adapter.targets import Target
from continual.parts.part import Context, Part, Slot
from continual.spec import Spec
from continual.state import tensor_bytes
from continual.streams.experience import Experience
from continual.table import Batch

Pattern = dict[str, list[bool]]
"""Name of an E in the transformer → which of its directions are kept."""


class AdaLoRASettings(Spec):
    """Settings of :class:`AdaLoRA`.

    Attributes:
        init_rank: rank of every layer at the start of a task.
        target_rank: mean rank of a layer at its end, below ``init_rank``.
        alpha: the change of a weight is scaled by alpha / init_rank.
        warmup, final: shares of the task's steps at full rank before pruning, and at the final ranks after it.
        interval: steps between two allocations.
        beta1, beta2: smoothing of importance and of its uncertainty, in (0, 1).
        orthogonal: weight of the orthogonality term in the loss; 0 leaves it out.
        target, dropout: as for LoRA.
        across_tasks: ``merge`` adds the adapter to the base weights for good and starts a fresh one; ``stack`` freezes
            it, keeps it active and adds another.
    """

    kind: Literal["adalora"] = "adalora"
    init_rank: int = Field(12, ge=2)
    target_rank: int = Field(8, ge=1, validate_default=True)
    alpha: float = Field(16, gt=0)
    warmup: float = Field(0.1, ge=0, lt=1)
    final: float = Field(0.3, ge=0, lt=1, validate_default=True)
    interval: int = Field(1, ge=1)
    beta1: float = Field(0.85, gt=0, lt=1)
    beta2: float = Field(0.85, gt=0, lt=1)
    orthogonal: float = Field(0.5, ge=0)
    target: Target = "all-linear"
    dropout: float = Field(0.0, ge=0, lt=1)
    across_tasks: Literal["merge", "stack"] = "merge"

    @field_validator("target_rank")
    @classmethod
    def _something_to_prune(cls, target_rank: int, info: ValidationInfo) -> int:
        if target_rank >= info.data.get("init_rank", target_rank + 1):
            raise ValueError(
                f"it must be below init_rank ({info.data['init_rank']}), or nothing is left to prune: raise init_rank, "
                "lower target_rank, or use adapter kind 'lora'"
            )
        return target_rank

    @field_validator("final")
    @classmethod
    def _room_to_prune(cls, final: float, info: ValidationInfo) -> float:
        if final + info.data.get("warmup", 0.0) >= 1:
            raise ValueError(
                f"with warmup {info.data['warmup']} no step is left to prune in: their sum must be below 1"
            )
        return final

    @field_validator("across_tasks", mode="before")
    @classmethod
    def _not_on_and_on(cls, across_tasks: object) -> object:
        if across_tasks == "continue":
            raise ValueError(
                "AdaLoRA cannot train one adapter on, since directions pruned for one task would stay shut in the next "
                "or reopen over what it learned: use 'merge' or 'stack', or adapter kind 'lora'"
            )
        return across_tasks

    @field_validator("target")
    @classmethod
    def _some_target(cls, target: Target) -> Target:
        return some_target(target)


class AdaLoRA(Part):
    """One adaptive low-rank adapter for each task (see :class:`AdaLoRASettings`).

    Attributes:
        history: of every task that ended: ``{"adapter": name, "ranks": {layer: rank}}``; a rank may be 0.
    """

    slot: ClassVar[Slot] = "adapter"
    Settings: ClassVar[type[Spec]] = AdaLoRASettings
    settings: AdaLoRASettings

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.adapters = Adapters("adalora")
        self.history: list[dict[str, Any]] = []
        self._schedule = Schedule(1, 0, 0)
        self._done = 0
        self._handled: int | None = None
        self._pattern: Pattern = {}
        self._pruned: list[tuple[nn.Parameter, Tensor]] = []

    @property
    def replaces(self) -> bool:
        return True

    @property
    def stacks(self) -> bool:
        return self.settings.across_tasks == "stack"

    def begin(self, context: Context, experience: Experience) -> None:
        """A fresh adapter, a fresh schedule from ``context.steps``, a fresh allocator.

        Raises:
            ModelError: the model carries PEFT adapters already.
            CompositionError: no layer matches ``target``, the number of steps is unknown, or the base is not float32.
        """
        self._schedule = make_schedule(context.steps, self.settings.warmup, self.settings.final)
        model: Any = context.model
        model.adapter_replaced = self.replaces
        config = self._config()
        if self.adapters.names and self.settings.across_tasks == "merge":
            self.adapters.replace(model, config, self.settings.target)
        else:
            self.adapters.add(model, config, self.settings.target)
        if self.settings.across_tasks == "merge":
            self.adapters.check_mergeable()
        self._follow()
        self._done, self._handled = 0, None
        self._pattern, self._pruned = {}, []

    def loss(self, batch: Batch, output: Output) -> Tensor | None:
        """The orthogonality term of the adapter that trains, a scalar, as PEFT's model adds it to its own loss."""
        if self.settings.orthogonal == 0:
            return None
        return self.settings.orthogonal * orthogonality(list(self.adapters.layers.values()), self.adapters.current)

    def after_step(self, batch: Batch, output: Output) -> None:
        """Once for each optimiser step: importance from its gradients, then the allocation of the step."""
        if self._handled == self.context.step:
            return
        self._handled = self.context.step
        self._done += 1
        if self._done > self._schedule.last_allocation:
            self._prune()
            return
        tuner, allocator = self.adapters.tuner, self._allocator()
        with _Gradients(self.adapters.layers.values(), self.adapters.current):
            if self._done == self._schedule.last_allocation and not allocator.exp_avg_ipt:
                allocator.update_ipt(tuner.model)
            tuner.update_and_allocate(self._done)
        if self._done == self._schedule.last_allocation:
            self._pattern = tuner.peft_config[self.adapters.current].rank_pattern

    def end(self, context: Context, experience: Experience) -> None:
        """Bring a task that stopped early to its budget, then look at what is left.

        Raises:
            TrainingError: every layer has lost all its ranks.
        """
        allocator = self._allocator()
        if not self._pattern and allocator.exp_avg_ipt:
            self._pattern = allocator.mask_to_budget(self.adapters.tuner.model, allocator.target_bgt)
            allocator.reset_ipt()
        self._prune()
        left = ranks(self.adapters.layers, self.adapters.current)
        self.history.append({"adapter": self.adapters.current, "ranks": left})
        if not any(left.values()):
            raise TrainingError(
                f"AdaLoRA lost every rank of all {len(left)} layers in experience '{experience.name}' after "
                f"{self._done} steps, so the adapter does nothing: raise training.lr or the number of epochs, or use "
                "adapter kind 'lora'."
            )

    def state_dict(self) -> dict[str, Any]:
        """Structure, merged folds, schedule, and the allocator in mid-task: smoothed importance and uncertainty."""
        allocator = self.adapters.tuner.rankallocator if self.adapters.names else None
        return {
            **self.adapters.state_dict(),
            "schedule": [self._schedule.steps, self._schedule.warmup, self._schedule.final],
            "done": self._done,
            "handled": self._handled,
            "pattern": {name: list(kept) for name, kept in self._pattern.items()},
            "importance": dict(allocator.exp_avg_ipt) if allocator else {},
            "uncertainty": dict(allocator.exp_avg_unc) if allocator else {},
            "history": [dict(entry) for entry in self.history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Rebuild structure and allocator in a pristine model; the adapters' values are loaded with the model."""
        model: Any = self.context.model
        model.adapter_replaced = self.replaces
        self._schedule = Schedule(*state["schedule"])
        self._done, self._handled = int(state["done"]), state["handled"]
        self._pattern, self._pruned = dict(state["pattern"]), []
        self.history = list(state["history"])
        self.adapters.rebuild(model, state, self._config, self.settings.target)
        if self.adapters.names:
            self._follow()
            allocator = self.adapters.tuner.rankallocator
            allocator.exp_avg_ipt, allocator.exp_avg_unc = dict(state["importance"]), dict(state["uncertainty"])
            allocator.ipt = dict(allocator.exp_avg_ipt)

    def nbytes(self) -> int:
        """Bytes of all adapters, those in the model and the folds of merged ones, and of the allocator's averages."""
        state = self.state_dict()
        return self.adapters.nbytes() + tensor_bytes([state["importance"], state["uncertainty"]])

    def _config(self) -> Any:
        from peft import AdaLoraConfig

        settings, schedule = self.settings, self._schedule
        return AdaLoraConfig(
            init_r=settings.init_rank,
            target_r=settings.target_rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            tinit=schedule.warmup,
            tfinal=schedule.final,
            deltaT=settings.interval,
            beta1=settings.beta1,
            beta2=settings.beta2,
            orth_reg_weight=settings.orthogonal,
            total_step=schedule.steps,
        )

    def _follow(self) -> None:
        """Point PEFT's tuner and a new allocator at the adapter that trains."""
        from peft.tuners.adalora import RankAllocator

        tuner, name = self.adapters.tuner, self.adapters.current
        tuner.trainable_adapter_name = name
        tuner.rankallocator = RankAllocator(tuner.model, tuner.peft_config[name], name)

    def _allocator(self) -> Any:
        """PEFT's allocator, its tensors where the parameters are (a loaded state may have been moved)."""
        allocator = self.adapters.tuner.rankallocator
        device = self.adapters.parameters(self.adapters.current)[0].device
        for store in (allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc):
            store.update({name: value.to(device) for name, value in store.items()})
        return allocator

    @torch.no_grad()
    def _prune(self) -> None:
        """Keep pruned directions at zero, where the optimiser's momentum would move them."""
        if self._pattern and not self._pruned:
            values = dict(self.adapters.tuner.model.named_parameters())
            self._pruned = [
                (values[name], ~torch.tensor(kept, device=values[name].device)[:, None])
                for name, kept in self._pattern.items()
            ]
        for value, shut in self._pruned:
            value.masked_fill_(shut, 0.0)


def orthogonality(layers: list[nn.Module], adapter: str) -> Tensor:
    """Mean over all A and B of ‖A Aᵀ - I‖ and ‖Bᵀ B - I‖ (Frobenius), a scalar; equal shapes go in one product."""
    rows: dict[tuple[int, ...], list[Tensor]] = {}
    for layer in layers:
        factors = adapter_parameters(layer, adapter)
        for factor in (factors["lora_A"], factors["lora_B"].T):
            rows.setdefault(tuple(factor.shape), []).append(factor)
    norms = []
    for group in rows.values():
        stacked = torch.stack(group)
        gram = stacked @ stacked.mT
        norms.append(torch.linalg.matrix_norm(gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)))
    return torch.cat(norms).mean()


class _Gradients:
    """For a moment, zero gradients in every layer that took no part in the model's output (E has none).

    The allocator reads the gradient of every parameter; that of A and B may come from the orthogonality term alone, and
    such a layer would take ranks from those that are used.
    """

    def __init__(self, layers: Iterable[nn.Module], adapter: str) -> None:
        self.kept: list[tuple[nn.Parameter, Tensor | None]] = []
        for layer in layers:
            parameters = adapter_parameters(layer, adapter)
            if parameters["lora_E"].grad is None:
                self.kept += [(parameter, parameter.grad) for parameter in parameters.values()]

    def __enter__(self) -> None:
        for parameter, _ in self.kept:
            parameter.grad = torch.zeros_like(parameter)

    def __exit__(self, *_: object) -> None:
        for parameter, gradient in self.kept:
            parameter.grad = gradient
