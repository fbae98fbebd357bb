"""The exact diagonal of the Fisher information, from the gradient of every single row.

``F_p = 1/N sum_n (d log p(y_n | x_n) / d theta_p)^2`` (Kirkpatrick et al. 2017, arXiv 1612.00796; Martens 2014, arXiv
1412.1193), for language models and regression with the row's loss as the context defines it. The square is taken of
each row's own gradient, never of a batch's mean, so that the result does not depend on the batch size.

Each parameter goes one of three ways, all exact: a closed form from the inputs and output gradients of its module
(:mod:`~continual.parts.penalty.fisher_forms`; one batched forward and backward pass for all of them together),
``torch.func``, or, where that cannot follow the model, a loop over single rows
(:mod:`~continual.parts.penalty.fisher_rows`).

Rows are added up in the order given, in float32. The model is in eval mode meanwhile; its flags, its ``.grad`` and its
hooks are afterwards as they were, also after an exception.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from continual.errors import CompositionError, TrainingError, quoted
from continual.models.lowrank import adapted_layers, adapter_parameters, effective_weight
from continual.parts.part import Context
from continual.parts.penalty.fisher_check import Layer, mistaken
from continual.parts.penalty.fisher_forms import LINEAR, Form, closed_forms
from continual.parts.penalty.fisher_hooks import Recorder, Site
from continual.parts.penalty.fisher_labels import Labels, check_labels, targets
from continual.parts.penalty.fisher_rows import RowGradients
from continual.table import Batch

Space = Literal["parameters", "weights"]
Way = Literal["auto", "vmap", "loop"]


def diagonal_fisher(
    context: Context,
    batches: Iterable[Batch],
    *,
    labels: Labels = "sampled",
    space: Space = "parameters",
    way: Way = "auto",
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """The diagonal Fisher of what trains now, as a mean over all rows of ``batches``.

    Args:
        batches: on the context's device; how rows are divided into batches makes no difference.
        labels: which labels the likelihood is taken at (:mod:`~continual.parts.penalty.fisher_labels`).
        space: ``parameters``: of every trainable parameter. ``weights``: of the effective weight of every adapted layer
            whose adapter trains, and of the trainable parameters that belong to no adapter.
        way: ``auto`` takes closed forms where there are any; ``vmap`` and ``loop`` take only that one for parameters
            (an effective weight, which is no parameter, always has its closed form).
        generator: CPU generator for ``labels="sampled"``.

    Returns:
        Name → float32 tensor ≥ 0 of the shape of the parameter, or of the effective weight (out, in) under the name of
        its layer. A row without a counted label has gradient zero and counts as a row.

    Raises:
        CompositionError: ``labels`` means nothing for the objective; an adapted layer that is more than a linear layer
            with a low-rank term (DoRA); ``way="vmap"`` where ``torch.func`` cannot follow.
        TrainingError: no rows.
    """
    check_labels(labels, context.objective)
    parameters, layers = tracked(context, space)
    estimate = _Estimate(context, parameters, layers, labels, way, generator)
    with _evaluating(context.model):
        try:
            for batch in batches:
                estimate.add(batch)
        finally:
            estimate.close()
    return estimate.mean()


def tracked(context: Context, space: Space) -> tuple[dict[str, nn.Parameter], dict[str, Layer]]:
    """What a penalty in ``space`` holds on to: plain parameters by name, and adapted layers by module name."""
    parameters = context.parameters()
    if space == "parameters":
        return dict(parameters), {}
    names = {id(parameter): name for name, parameter in parameters.items()}
    layers: dict[str, Layer] = {}
    for layer_name, module in adapted_layers(context.model).items():
        own = [p for adapter in module.lora_A for p in adapter_parameters(module, str(adapter)).values()]  # type: ignore[union-attr]
        trained = {names[id(parameter)]: parameter for parameter in own if id(parameter) in names}
        if trained:
            layers[layer_name] = Layer(module, trained)
    inside = {name for layer in layers.values() for name in layer.parameters}
    return {name: parameter for name, parameter in parameters.items() if name not in inside}, layers


class _Estimate:
    """Squared gradients added up over batches."""

    def __init__(
        self,
        context: Context,
        parameters: dict[str, nn.Parameter],
        layers: dict[str, Layer],
        labels: Labels,
        way: Way,
        generator: torch.Generator | None,
    ) -> None:
        self.context, self.parameters, self.layers = context, parameters, layers
        self.labels, self.way, self.generator = labels, way, generator
        self.rows = 0
        self.totals = {name: torch.zeros(p.shape, device=p.device) for name, p in parameters.items()}
        with torch.no_grad():
            for name, layer in layers.items():
                weight = effective_weight(layer.module)
                self.totals[name] = torch.zeros(weight.shape, device=weight.device)
        self._recorder = Recorder(self._sites(parameters if way == "auto" else {}))
        self._rowwise: RowGradients | None = None

    def close(self) -> None:
        self._recorder.close()

    def mean(self) -> dict[str, Tensor]:
        if not self.rows:
            raise TrainingError(
                "there is no row to compute the Fisher from: give an experience that has training rows."
            )
        return {name: total.div_(self.rows) for name, total in self.totals.items()}

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
        found = list(targets(self.context, batch, output.logits.detach(), self.labels, self.generator))
        for place, target in enumerate(found, 1):
            if edges:
                with torch.enable_grad():
                    loss = target.losses(self.context, output).sum()
                deltas = torch.autograd.grad(loss, edges, retain_graph=place < len(found), allow_unused=True)
                recorder.add(deltas, self.totals)
            if rowwise is not None:
                rowwise.add(target, self.totals)

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


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, each module's flag put back; recurrent layers outside cuDNN, which has no backward in eval mode."""
    flags = {module: module.training for module in model.modules()}
    cudnn = torch.backends.cudnn.enabled
    model.eval()
    try:
        torch.backends.cudnn.enabled = cudnn and not any(isinstance(module, nn.RNNBase) for module in flags)
        yield
    finally:
        torch.backends.cudnn.enabled = cudnn
        for module, flag in flags.items():
            module.training = flag
