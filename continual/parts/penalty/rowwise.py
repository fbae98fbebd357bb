"""The gradient of every single row, by the shortest exact way, handed to whoever sums or keeps them.

Each parameter goes one of three ways, all exact: a closed form from the inputs and output gradients of its module
(:mod:`~continual.parts.penalty.fisher_forms`; one batched forward and backward pass for all of them together),
``torch.func``, or, where that cannot follow the model, a loop over single rows
(:mod:`~continual.parts.penalty.fisher_rows`).

The model is in eval mode meanwhile; its flags, its ``.grad`` and its hooks are afterwards as they were, also after an
exception.

Letters: B rows, N rows of all batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from continual.errors import CompositionError, TrainingError, quoted
from continual.models.lowrank import effective_weight
from continual.parts.part import Context
from continual.parts.passes import as_at_test
from continual.parts.penalty.fisher_check import Layer, mistaken
from continual.parts.penalty.fisher_forms import (
    LINEAR,
    Form,
    Power,
    Uses,
    add_powers,
    closed_forms,
    powered,
    summed_rows,
)
from continual.parts.penalty.fisher_hooks import Recorder, Site
from continual.parts.penalty.fisher_labels import Target
from continual.parts.penalty.fisher_rows import RowGradients
from continual.table import Batch

Way = Literal["auto", "vmap", "loop"]
Targets = Callable[[Batch, Tensor], Iterable[Target]]
"""(batch, logits without a graph) → what is differentiated for each of its rows: one target, or several passes."""


class Sink(Protocol):
    """What becomes of the gradients of one backward pass."""

    def uses(self, key: str, uses: Uses) -> None:
        """The closed form of all rows at once."""

    def rows(self, key: str, gradient: Tensor) -> None:
        """The gradients of some rows, (B, *shape), in their order."""

    def done(self, rows: int) -> None:
        """All of the ``rows`` of this pass were handed over; a key that was not named has gradient zero."""


class Sums:
    """Adds up |gradient|^power over rows, float32.

    Attributes:
        totals: by name of the parameter, or of the adapted layer for its effective weight.
    """

    def __init__(self, power: Power, parameters: Mapping[str, nn.Parameter], layers: Mapping[str, Layer]) -> None:
        self.power = power
        self.totals = {name: torch.zeros(p.shape, device=p.device) for name, p in parameters.items()}
        with torch.no_grad():
            for name, layer in layers.items():
                weight = effective_weight(layer.module)
                self.totals[name] = torch.zeros(weight.shape, device=weight.device)

    def uses(self, key: str, uses: Uses) -> None:
        add_powers(self.totals[key], uses, self.power)

    def rows(self, key: str, gradient: Tensor) -> None:
        self.totals[key].add_(powered(gradient, self.power).sum(0))

    def done(self, rows: int) -> None:
        pass

    def mean(self, rows: int) -> dict[str, Tensor]:
        """The sums over the number of rows; the sums are used up.

        Raises:
            TrainingError: no rows.
        """
        if not rows:
            raise TrainingError(
                "there is no row to compute a penalty's curvature from: give an experience that has training rows."
            )
        return {name: total.div_(rows) for name, total in self.totals.items()}


class Stacks:
    """Keeps every row's gradient, float32 (N, *shape) by name."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parts: dict[str, list[Tensor]] = {name: [] for name in parameters}
        self._empty = {name: parameter.detach()[None][:0].float() for name, parameter in parameters.items()}
        self._rows = 0

    def uses(self, key: str, uses: Uses) -> None:
        self._parts[key].append(summed_rows(uses, slice(None)))

    def rows(self, key: str, gradient: Tensor) -> None:
        self._parts[key].append(gradient)

    def done(self, rows: int) -> None:
        self._rows += rows
        for name, parts in self._parts.items():
            lacking = self._rows - sum(map(len, parts))
            if lacking:
                empty = self._empty[name]
                parts.append(empty.new_zeros(lacking, *empty.shape[1:]))

    def stacked(self) -> dict[str, Tensor]:
        """(N, *shape) by name, pass after pass."""
        return {name: torch.cat([self._empty[name], *parts]) for name, parts in self._parts.items()}


def per_row(
    context: Context,
    batches: Iterable[Batch],
    targets: Targets,
    sink: Sink,
    parameters: dict[str, nn.Parameter],
    layers: dict[str, Layer] | None = None,
    *,
    way: Way = "auto",
) -> int:
    """Hand the gradient of every row of ``batches`` to ``sink``; returns how many rows there were.

    Args:
        batches: on the context's device; how rows are divided into batches makes no difference.
        targets: what is differentiated.
        parameters: whose gradients are asked for.
        layers: adapted layers whose effective weight's gradient is asked for.
        way: ``auto`` takes closed forms where there are any; ``vmap`` and ``loop`` take only that one for parameters
            (an effective weight, which is no parameter, always has its closed form).

    Raises:
        CompositionError: an adapted layer that is more than a linear layer with a low-rank term (DoRA); ``way="vmap"``
            where ``torch.func`` cannot follow.
    """
    passes = _Passes(context, parameters, layers or {}, targets, sink, way)
    with as_at_test(context.model):
        try:
            for batch in batches:
                passes.add(batch)
        finally:
            passes.close()
    return passes.rows


class _Passes:
    """Forward and backward passes, batch after batch."""

    def __init__(
        self,
        context: Context,
        parameters: dict[str, nn.Parameter],
        layers: dict[str, Layer],
        targets: Targets,
        sink: Sink,
        way: Way,
    ) -> None:
        self.context, self.parameters, self.layers = context, parameters, layers
        self.targets, self.sink, self.way = targets, sink, way
        self.rows = 0
        self._recorder = Recorder(self._sites(parameters if way == "auto" else {}))
        self._rowwise: RowGradients | None = None

    def close(self) -> None:
        self._recorder.close()

    def add(self, batch: Batch) -> None:
        rows = len(batch["labels"])
        if not rows:
            return
        if not self.rows:
            self._divide(batch)
        self.rows += rows
        recorder, rowwise = self._recorder, self._rowwise
        with torch.set_grad_enabled(bool(recorder.sites)), recorder.record(rows):
            output = self.context.forward(batch)
        edges = [call.edge for call in recorder.calls]
        found = list(self.targets(batch, output.logits.detach()))
        for place, target in enumerate(found, 1):
            if edges:
                with torch.enable_grad():
                    loss = target.losses(self.context, output).sum()
                deltas = torch.autograd.grad(loss, edges, retain_graph=place < len(found), allow_unused=True)
                for key, uses in recorder.uses(deltas).items():
                    self.sink.uses(key, uses)
            if rowwise is not None:
                rowwise.add(target, self.sink.rows)
            self.sink.done(rows)

    def _sites(self, parameters: dict[str, nn.Parameter]) -> list[Site]:
        names = {id(parameter): name for name, parameter in parameters.items()}
        sites = []
        for module_name, module in self.context.model.named_modules():
            forms: dict[str, Form] = {}
            if module_name in self.layers:
                forms[module_name] = LINEAR
            for parameter, form in closed_forms(module):
                if id(parameter) in names:
                    forms[names[id(parameter)]] = form
            if forms:
                sites.append(Site(module_name, module, forms))
        return sites

    def _divide(self, batch: Batch) -> None:
        """Decide which way each parameter goes, from the first batch."""
        closed = {key for site in self._recorder.sites for key in site.forms}
        by_form = {name: parameter for name, parameter in self.parameters.items() if name in closed}
        wrong = mistaken(self.context, self._recorder, batch, by_form, self.layers) if closed else set()
        bad_layers = [name for name in self.layers if name in wrong]
        if bad_layers:
            raise CompositionError(
                f"the adapted layer {quoted(bad_layers[:1])} does more than multiply by its base weight and a low-rank "
                "term (as DoRA does): use plain LoRA or AdaLoRA, or set space to 'parameters'."
            )
        if wrong:
            self._recorder.close()
            self._recorder = Recorder(self._sites({n: p for n, p in by_form.items() if n not in wrong}))
        others = {name: p for name, p in self.parameters.items() if name not in by_form or name in wrong}
        if others:
            self._rowwise = RowGradients(self.context, others, loop=self.way == "loop", strict=self.way == "vmap")
