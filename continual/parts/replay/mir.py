"""Maximally interfered retrieval: of some stored rows, those are replayed that the coming step would hurt most.

Source: Aljundi et al. 2019, "Online Continual Learning with Maximally Interfered Retrieval" (arXiv 1908.04742), ER-MIR
with the criterion s(x) = ℓ(f_θv, x) − ℓ(f_θ, x) where θv = θ − η ∇ℓ(current batch): C candidates are drawn, and those of
largest s join the batch. Departures: the virtual step and both losses see the model in eval mode, so that no running
statistics and no random draws are touched; rows are kept by random keys (``select.py``), each once, offered in the
first epoch of their experience; candidates are drawn by a shuffled walk.

It costs one more forward and backward pass of the current rows and two forward passes of the candidates for every
batch, and a copy of the trainable parameters while it looks. The loss is one mean over current and replayed rows, where the paper
adds the mean of either: half of that at share .5 beside a full batch.

Letters: B rows of a batch, C candidates, R rows replayed.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from continual.errors import CompositionError
from continual.models.output import Output
from continual.parts.part import Context, Part, Slot
from continual.parts.passes import as_at_test
from continual.parts.replay.cycle import Cycle
from continual.parts.replay.mix import join, replay_count
from continual.parts.replay.store import Store, StoreSettings
from continual.spec import Spec
from continual.streams.experience import Experience
from continual.table import Batch, to_device


class MIRSettings(StoreSettings):
    """Settings of :class:`MIR`.

    Attributes:
        candidates: rows among which the most interfered are looked for.
        share: part of the rows of a full batch that are replayed, in (0, 1).
        virtual_lr: η of the virtual step; None takes the learning rates of the next real one, which suits ``sgd``.
    """

    kind: Literal["mir"] = "mir"
    candidates: PositiveInt = 50
    share: float = Field(0.5, gt=0, lt=1)
    virtual_lr: PositiveFloat | None = None


class MIR(Part):
    """Replays the rows of a reservoir that the step to come interferes with most."""

    slot: ClassVar[Slot] = "replay"
    Settings: ClassVar[type[Spec]] = MIRSettings
    excludes: ClassVar[dict[str, str]] = {
        "replay": "both would choose the rows that join a batch: leave the other one out.",
    }
    settings: MIRSettings

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        own = self.settings
        self.store = Store(self.name, "", capacity=own.capacity, storage=own.storage, folder=own.folder)
        self.cycle = Cycle()

    def attach(self, context: Context) -> None:
        super().attach(context)
        self.store.attach(context)

    def begin(self, context: Context, experience: Experience) -> None:
        """Refuse what leaves no choice.

        Raises:
            CompositionError: no more candidates than rows to be replayed.
            SpecError: a capacity in bytes that holds no row.
        """
        wanted = replay_count(context.batch_size, self.settings.share)
        if wanted >= self.settings.candidates:
            raise CompositionError(
                f"{self.name} replays {wanted} rows beside a batch of {context.batch_size} and looks at no more than "
                f"{self.settings.candidates} candidates, so it has no choice: raise candidates above {wanted}."
            )
        self.store.check(experience)

    def extend(self, batch: Batch) -> Batch:
        """The batch with the most interfered of the candidates after its own rows."""
        context, held = self.context, len(self.store)
        count = min(replay_count(context.full_rows, self.settings.share), held)
        if not count:
            return batch
        index_C = self.cycle.draw(min(self.settings.candidates, held), held, context.randomness.generator("replay"))
        candidates = to_device(self.store.memory.batch(index_C), batch["labels"].device)
        best_R = self._interference(batch, candidates).argsort(descending=True, stable=True)[:count]
        return join(batch, {name: column.index_select(0, best_R) for name, column in candidates.items()})

    def after_step(self, batch: Batch, output: Output) -> None:
        """Offer the batch's own rows, in the first epoch."""
        context = self.context
        if context.epoch == 0:
            self.store.offer_batch(context, {name: column[: context.current_rows] for name, column in batch.items()})

    def rows(self) -> Tensor:
        return self.store.rows()

    def erase(self, rows: Tensor) -> int:
        return self.store.erase(rows)

    def nbytes(self) -> int:
        return self.store.nbytes() + self.cycle.nbytes()

    def state_dict(self) -> dict[str, Any]:
        return {**self.store.state_dict(), "cycle": self.cycle.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``.

        Raises:
            StateError: it holds more rows than fit here.
        """
        self.store.load_state_dict(state)
        self.cycle.load_state_dict(state["cycle"])

    def _interference(self, batch: Batch, candidates: Batch) -> Tensor:
        """How much the loss of each candidate would rise by a step on ``batch`` alone, float (C,)."""
        context = self.context
        parameters = context.parameters()
        rates = (
            context.rates() if self.settings.virtual_lr is None else dict.fromkeys(parameters, self.settings.virtual_lr)
        )
        if parameters.keys() - rates.keys():
            raise CompositionError(
                f"{self.name} knows no learning rate of this loop: set virtual_lr, or tell the context "
                "of the optimizer."
            )
        with as_at_test(context.model):
            loss_B = context.loss_rows(context.forward(batch), batch)
            weight_B = batch.get("weight")
            loss = loss_B.mean() if weight_B is None else (weight_B * loss_B).sum() / weight_B.sum()
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            with torch.no_grad():
                before_C = context.loss_rows(context.forward(candidates), candidates)
                kept = [parameter.detach().clone() for parameter in parameters.values()]
                try:
                    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                        if gradient is not None:
                            parameter.sub_(gradient, alpha=rates[name])
                    after_C = context.loss_rows(context.forward(candidates), candidates)
                finally:
                    for parameter, value in zip(parameters.values(), kept, strict=True):
                        parameter.copy_(value)
        return after_C - before_C
