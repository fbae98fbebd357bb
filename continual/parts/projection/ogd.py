"""Orthogonal gradient descent: steps leave the logits of rows of earlier experiences, to first order, where they are.

Of some rows of every experience that ended, the gradients of a logit are kept as an orthonormal basis V, and from every
new gradient its part in their span is taken out: ``g - V^T V g`` (Farajtabar et al. 2020, arXiv 1910.07104, algorithm 1;
``logits: true``, ``mean`` and ``all`` are its OGD-GTL, OGD-AVE and OGD-ALL). ``directions`` keeps the leading singular
vectors only (Doan et al. 2021, arXiv 2010.04003).

Departures: after the optimiser's step the movement of the parameters is projected as well, which changes nothing for
plain SGD, and without which momentum, Adam and weight decay would leak into the span (the gradient is projected before).
The basis comes from a singular value decomposition instead of Gram-Schmidt, so that rows which say nothing new add nothing.

The basis holds directions x parameters numbers, and grows with every experience. No row is kept. Directions that one row alone
gave (of an experience of one row, or ``rows: 1``) are given up with it; those that several rows gave stay.

Letters: n new rows, N directions, P parameters, K classes, B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from continual.errors import CompositionError, TrainingError
from continual.kinds import Objective
from continual.models.lowrank import adapted_layers
from continual.models.output import Output
from continual.parts.part import Context, Part, Slot
from continual.parts.penalty.fisher_labels import Target
from continual.parts.penalty.rowwise import Stacks, per_row
from continual.parts.penalty.springs import add_to_gradients
from continual.spec import Spec
from continual.streams.experience import Experience
from continual.table import IGNORED, Batch

_NEW = 1e-4
"""A direction is new where this share of the largest gradient of its experience lies outside the basis."""


class OGDSettings(Spec):
    """Settings of :class:`OGD`.

    Attributes:
        rows: rows of each experience whose gradients are kept, drawn at random.
        logits: of which logits: the ``true`` class's, the ``mean`` of those that compete, or each of them (``all``).
        directions: how many directions of each experience are kept at most, the leading ones; null for all.
    """

    kind: Literal["ogd"] = "ogd"
    rows: PositiveInt = 100
    logits: Literal["true", "mean", "all"] = "true"
    directions: PositiveInt | None = None


class OGD(Part):
    """Keeps every step orthogonal to what the logits of earlier rows depend on.

    In its first experience it does nothing. A step costs two products with the basis.
    """

    slot: ClassVar[Slot] = "projection"
    Settings: ClassVar[type[Spec]] = OGDSettings
    objectives: ClassVar[tuple[Objective, ...]] = ("classification",)
    needs_lasting_parameters: ClassVar[bool] = True
    excludes: ClassVar[dict[str, str]] = {"projection": "the second projection would undo the first, so keep one."}
    settings: OGDSettings

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.basis: dict[str, Tensor] = {}
        self.of_N = torch.empty(0, dtype=torch.int64)
        """The id of the row that alone gave a direction, -1 where several did."""
        self._aligned = False
        self._before: list[Tensor] | None = None

    def attach(self, context: Context) -> None:
        super().attach(context)
        self._aligned = False

    def begin(self, context: Context, experience: Experience) -> None:
        """Refuse what cannot work before anything is trained.

        Raises:
            CompositionError: the adapter is replaced at every experience.
        """
        self._aligned = False
        if adapted_layers(context.model) and getattr(context.model, "adapter_replaced", False) is True:
            raise CompositionError(
                f"{self.name} keeps directions in the space of the parameters, and this adapter is replaced at every "
                "experience: set the adapter to kind 'lora' with across_tasks 'continue', or take projection 'agem' or 'gem'."
            )

    @torch.no_grad()
    def edit_gradients(self) -> None:
        """Take the part in the basis out of the gradients; no sync of the device."""
        if not self.basis:
            return
        names, parameters = self._held()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        add_to_gradients(parameters, self._inside(names, gradients))
        self._before = [parameter.to(torch.float32, copy=True) for parameter in parameters]

    @torch.no_grad()
    def after_step(self, batch: Batch, output: Output) -> None:
        """Take the part in the basis out of what the optimiser made of them."""
        if self._before is None:
            return
        names, parameters = self._held()
        movement = [parameter.float() - before for parameter, before in zip(parameters, self._before, strict=True)]
        for parameter, inside in zip(parameters, self._inside(names, movement), strict=True):
            parameter.add_(inside.to(parameter.dtype))
        self._before = None

    def end(self, context: Context, experience: Experience) -> None:
        """Add what the logits of the experience's rows depend on.

        Raises:
            TrainingError: a gradient that is not finite.
        """
        parameters = context.parameters()
        if not parameters:
            return
        generator = context.randomness.generator("ogd")
        stacks = Stacks(parameters)
        ids: list[Tensor] = []

        def batches() -> Iterator[Batch]:
            for batch in context.batches(
                experience.train, limit=self.settings.rows, generator=generator, gradients=True
            ):
                ids.append(batch["row"].cpu() if "row" in batch else torch.full((len(batch["labels"]),), -1))
                yield batch

        per_row(context, batches(), self._targets, stacks, parameters)
        stacked = stacks.stacked()
        new_nP = torch.cat([stacked[name].flatten(1) for name in parameters], 1)
        if not bool(torch.isfinite(new_nP).all()):
            raise TrainingError(
                f"a gradient of the logits is not finite at the end of experience '{experience.name}': look at its inputs, "
                "lower training.lr, or train in fp32."
            )
        self._align(parameters)
        held = [self.basis[name].flatten(1) for name in parameters if name in self.basis]
        basis_NP = torch.cat(held, 1) if held else new_nP[:0]
        found_NP, rows = _directions(new_nP, basis_NP, self.settings.directions), torch.cat(ids)
        basis_NP = torch.cat([basis_NP, found_NP])
        self.of_N = torch.cat([self.of_N, torch.full((len(found_NP),), int(rows[0]) if len(rows) == 1 else -1)])
        for (name, parameter), part in zip(
            parameters.items(), torch.split(basis_NP, [p.numel() for p in parameters.values()], 1), strict=True
        ):
            self.basis[name] = part.reshape(-1, *parameter.shape).clone()

    def rows(self) -> Tensor:
        alone: Tensor = torch.unique(self.of_N[self.of_N >= 0])
        return alone

    def erase(self, rows: Tensor) -> int:
        """Give up the directions that one of these rows alone gave."""
        gone_N = torch.isin(self.of_N, rows.to("cpu", torch.int64)) & (self.of_N >= 0)
        if not bool(gone_N.any()):
            return 0
        count = len(torch.unique(self.of_N[gone_N]))
        self.of_N = self.of_N[~gone_N]
        self.basis = (
            {name: part[~gone_N.to(part.device)] for name, part in self.basis.items()} if len(self.of_N) else {}
        )
        self._before = None
        return count

    def state_dict(self) -> dict[str, Any]:
        return {"basis": dict(self.basis), "of": self.of_N.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.basis = {name: tensor.clone() for name, tensor in state["basis"].items()}
        self.of_N = state["of"].to("cpu", copy=True)
        self._aligned = False

    def _held(self) -> tuple[list[str], list[nn.Parameter]]:
        parameters = self.context.parameters()
        if not self._aligned:
            self._align(parameters)
        held = {name: parameter for name, parameter in parameters.items() if name in self.basis}
        return list(held), list(held.values())

    def _align(self, parameters: dict[str, nn.Parameter]) -> None:
        """The basis where the parameters are; rows that a head has grown are zero in every direction."""
        directions = len(next(iter(self.basis.values()))) if self.basis else 0
        for name, parameter in parameters.items():
            if directions and name not in self.basis:
                self.basis[name] = torch.zeros(directions, *parameter.shape, device=parameter.device)
                continue
            if name not in self.basis:
                continue
            held = self.basis[name].to(parameter.device)
            if held.shape[1:] != parameter.shape:
                short = (parameter.shape[0] if parameter.dim() else 0) - held.shape[1]
                if held.dim() != parameter.dim() + 1 or held.shape[2:] != parameter.shape[1:] or short < 0:
                    raise CompositionError(
                        f"'{name}' had shape {tuple(held.shape[1:])} when its directions were kept, now "
                        f"{tuple(parameter.shape)}: {self.name} follows parameters that grow along their first axis only."
                    )
                held = torch.cat([held, held.new_zeros(len(held), short, *held.shape[2:])], 1)
            self.basis[name] = held
        self._aligned = True

    def _inside(self, names: list[str], vectors: list[Tensor]) -> list[Tensor]:
        """Minus the part of a vector (in pieces, by name) that lies in the basis, float32."""
        pieces = [self.basis[name].flatten(1) for name in names]
        dots = [piece @ vector.flatten().float() for piece, vector in zip(pieces, vectors, strict=True)]
        share_N = -torch.stack([dot.to(dots[0].device) for dot in dots]).sum(0)
        return [
            (share_N.to(piece.device) @ piece).view_as(vector) for piece, vector in zip(pieces, vectors, strict=True)
        ]

    def _targets(self, batch: Batch, logits_BK: Tensor) -> Iterator[Target]:
        active = self.context.active(batch)
        if self.settings.logits == "mean":
            yield Target(batch, active, measure=mean_logit)
        elif self.settings.logits == "true":
            yield Target(batch, active, measure=true_logit)
        else:
            competes_K = torch.ones_like(logits_BK[0], dtype=torch.bool) if active is None else active
            competes_K = competes_K if competes_K.dim() == 1 else competes_K.any(0)
            for label in competes_K.nonzero().flatten().tolist():
                labels_B = torch.where(batch["labels"] == IGNORED, IGNORED, label)
                yield Target({**batch, "labels": labels_B}, active, measure=true_logit)


def true_logit(context: Context, output: Output, batch: Batch, active: Tensor | None) -> Tensor:
    """The logit of each row's label, (B,); 0 where it has none."""
    labels_B = batch["labels"]
    logit_B = output.logits.float().gather(1, labels_B.clamp(min=0)[:, None])[:, 0]
    return logit_B * (labels_B != IGNORED)


def mean_logit(context: Context, output: Output, batch: Batch, active: Tensor | None) -> Tensor:
    """The mean of the logits that compete in each row, (B,)."""
    logits_BK = output.logits.float()
    if active is None:
        return logits_BK.mean(1)
    return logits_BK.masked_fill(~active, 0.0).sum(1) / active.expand(logits_BK.shape).sum(1)


def _directions(new_nP: Tensor, basis_NP: Tensor, most: int | None) -> Tensor:
    """Orthonormal directions that span what ``new_nP`` has outside an orthonormal basis, the leading ones first."""
    largest = torch.linalg.vector_norm(new_nP, dim=1).max() if len(new_nP) else new_nP.new_zeros(())
    for _ in range(2):
        new_nP = new_nP - new_nP @ basis_NP.T @ basis_NP
    _, sizes, directions_NP = torch.linalg.svd(new_nP, full_matrices=False)
    directions_NP = directions_NP[(sizes > _NEW * largest) & (sizes > 0)][:most]
    directions_NP = directions_NP - directions_NP @ basis_NP.T @ basis_NP
    unit_NP: Tensor = directions_NP / torch.linalg.vector_norm(directions_NP, dim=1, keepdim=True)
    return unit_NP
