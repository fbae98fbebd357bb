"""Dark experience replay: stored rows are held to the logits that they had when they were stored.

Source: Buzzega et al. 2020, "Dark Experience for General Continual Learning" (arXiv 2004.07211): DER (eq. 5) and, with
``beta`` above 0, DER++ (eq. 6):

    loss = CE(current) + α · MSE(h(x′), z′) + β · CE(h(x″), y″)

(x′, z′) and (x″, y″) are two draws from one reservoir of single rows, independent of one another. z is stored from the
very forward pass that a row was trained in, before the step. As in the authors' code the squares are averaged over rows
and outputs (the paper writes a sum over outputs), and the memory is replayed from the second batch on, in the first
experience too. Current rows and both draws share one forward pass.

An output that did not exist when a row was stored is not compared: each row keeps as many logits as there were, and the
average is over the logits compared. Nothing then keeps the outputs of later classes low on old rows in DER, which
forgets as plain training does; so take ``training.active: all``, as the authors do: every output is there from the
start. DER++ has its labels for that and works with a growing head as well.

Departures: rows are kept by random keys (``select.py``), each once, offered in the first epoch of their experience; what
later epochs do is ``logits``. Rows are drawn by a shuffled walk. Weights that rows bring count for current rows alone.

Letters: B rows of a batch, M rows replayed, W widest logits stored.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from continual.kinds import Objective
from continual.models.output import Output
from continual.parts.part import Context, Part, Slot
from continual.parts.replay.cycle import Cycle
from continual.parts.replay.mix import join
from continual.parts.replay.store import BESIDE, Store, StoreSettings
from continual.spec import Spec
from continual.streams.experience import Experience
from continual.table import Batch

LOGITS, WIDTH, LABELLED = "stored_logits", "stored_width", "replayed_labels"
"""Columns of a batch: logits (B, W), how many of them are compared int64 (B,), whether the labels count bool (B,)."""


class DarkSettings(StoreSettings):
    """Settings of :class:`Dark`.

    Attributes:
        alpha: weight of the squared distance to the stored logits.
        beta: weight of the cross-entropy (or squared error) of a second draw from the memory; 0 draws none.
        memory_batch: rows of each draw; None takes as many as a full batch has.
        logits: in later epochs, ``latest`` stores the logits of held rows anew; ``first`` keeps those of the first epoch.
    """

    kind: Literal["dark"] = "dark"
    alpha: PositiveFloat = 0.5
    beta: float = Field(0.0, ge=0)
    memory_batch: PositiveInt | None = None
    logits: Literal["latest", "first"] = "latest"


class Dark(Part):
    """DER, or DER++ with ``beta``; for its settings see :class:`DarkSettings`."""

    slot: ClassVar[Slot] = "replay"
    Settings: ClassVar[type[Spec]] = DarkSettings
    objectives: ClassVar[tuple[Objective, ...]] = ("classification", "regression")
    excludes: ClassVar[dict[str, str]] = {
        "replay": "it has a memory of its own, whose rows count in a loss of their own: leave the other one out.",
    }
    settings: DarkSettings

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        own = self.settings
        self.store = Store(
            self.name,
            "",
            capacity=own.capacity,
            storage=own.storage,
            folder=own.folder,
            growing=(LOGITS,),
            beside=BESIDE + 8,
        )
        self.cycles = [Cycle(), Cycle()]

    def attach(self, context: Context) -> None:
        super().attach(context)
        self.store.attach(context)

    def begin(self, context: Context, experience: Experience) -> None:
        """Refuse a capacity in bytes that holds no row (:class:`SpecError`)."""
        self.store.check(experience, {LOGITS: torch.zeros(1, max(experience.classes, default=0) + 1)})

    def extend(self, batch: Batch) -> Batch:
        """The batch, one draw with its stored logits, and with ``beta`` another one."""
        context, held, current = self.context, len(self.store), len(batch["labels"])
        if not held:
            return batch
        count = min(self.settings.memory_batch or context.full_rows, held)
        index_M = self.cycles[0].draw(count, held, context.randomness.generator("replay"))
        if self.settings.beta:
            other = self.cycles[1].draw(count, held, context.randomness.generator("replay labels"))
            index_M = torch.cat([index_M, other])
        width_M = self.store.memory.widths(LOGITS, index_M).to(torch.int64)
        width_M[count:] = 0
        replayed = self.store.memory.batch(index_M)
        stored_MW = replayed.pop(LOGITS)
        joined = join(batch, replayed)
        device, total = batch["labels"].device, len(joined["labels"])
        weight_B = joined["weight"].clone() if "weight" in joined else torch.ones(total, device=device)
        weight_B[current:] = 0
        joined["weight"] = weight_B
        joined[LOGITS] = F.pad(stored_MW.to(device), (0, 0, current, 0))
        joined[WIDTH] = F.pad(width_M, (current, 0)).to(device, non_blocking=True)
        joined[LABELLED] = torch.arange(total, device=device) >= current + count
        return joined

    def loss(self, batch: Batch, output: Output) -> Tensor | None:
        """α times the mean square over all logits compared, and β times the mean loss of the second draw."""
        stored_BW = batch.get(LOGITS)
        if stored_BW is None:
            return None
        width_B, outputs = batch[WIDTH], output.logits.flatten(1)
        compared_BW = torch.arange(stored_BW.shape[1], device=width_B.device) < width_B[:, None]
        gap_BW = (outputs[:, : stored_BW.shape[1]].float() - stored_BW).masked_fill(~compared_BW, 0.0)
        term = self.settings.alpha * gap_BW.square().sum() / width_B.sum().clamp(min=1)
        if self.settings.beta:
            labelled_B = batch[LABELLED]
            losses_B = self.context.loss_rows(output, batch).masked_fill(~labelled_B, 0.0)
            term = term + self.settings.beta * losses_B.sum() / labelled_B.sum().clamp(min=1)
        return term

    def after_step(self, batch: Batch, output: Output) -> None:
        """Offer the batch's own rows with their logits in the first epoch; later, renew the logits of those held."""
        context = self.context
        if context.epoch > 0 and self.settings.logits == "first":
            return
        current, ours = context.current_rows, ("weight", LOGITS, WIDTH, LABELLED)
        own = {name: column[:current] for name, column in batch.items() if name not in ours}
        own[LOGITS] = output.logits[:current].flatten(1).float()
        if context.epoch > 0:
            self.store.rewrite(own)
        else:
            self.store.offer_batch(context, own)

    def rows(self) -> Tensor:
        return self.store.rows()

    def erase(self, rows: Tensor) -> int:
        return self.store.erase(rows)

    def nbytes(self) -> int:
        return self.store.nbytes() + sum(cycle.nbytes() for cycle in self.cycles)

    def state_dict(self) -> dict[str, Any]:
        return {**self.store.state_dict(), "cycles": [cycle.state_dict() for cycle in self.cycles]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``.

        Raises:
            StateError: it holds more rows than fit here.
        """
        self.store.load_state_dict(state)
        for cycle, saved in zip(self.cycles, state["cycles"], strict=True):
            cycle.load_state_dict(saved)
