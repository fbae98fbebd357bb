"""Inputs and output gradients of modules, kept by hooks, and what is known of them.

One batched forward pass keeps the input of every module with a closed form and the place of its output in the autograd
graph; one backward pass to those places (weight gradients are never formed) gives the output gradients of all rows at
once, since the gradient of the *sum* over rows of the rows' losses falls apart by rows wherever rows do not see each
other. That this holds, and that each form is the right one for its module, is not assumed:
:mod:`continual.parts.penalty.fisher_check` compares with autograd.

Letters: B rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from continual.errors import ModelError
from continual.parts.penalty.fisher_forms import Form


@dataclass(frozen=True)
class Site:
    """A module, and the closed forms of some of its parameters by their key in the result."""

    name: str
    module: nn.Module
    forms: dict[str, Form]


@dataclass(frozen=True)
class Call:
    """One forward pass through a site: its input, the rows of its output, and the output's place in the graph."""

    site: Site
    a: Tensor
    rows: int
    edge: GradientEdge


class Recorder:
    """Hooks on ``sites`` that keep every call while :attr:`recording`; :meth:`close` takes them off again."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites = list(sites)
        self.calls: list[Call] = []
        self.recording = False
        self.rows = 0
        self._handles: list[RemovableHandle] = []
        for site in self.sites:
            if isinstance(site.module, nn.Embedding):
                self._handles.append(site.module.register_forward_pre_hook(self._widen))
            self._handles.append(site.module.register_forward_hook(self._keep(site), with_kwargs=True))

    def close(self) -> None:
        """Take every hook off and let the kept tensors go."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.calls = [], []

    def record(self, rows: int) -> Recorder:
        """Use as ``with recorder.record(rows):`` around one forward pass of so many rows."""
        self.rows = rows
        return self

    def __enter__(self) -> None:
        self.calls, self.recording = [], True

    def __exit__(self, *_: object) -> None:
        self.recording = False

    def _widen(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Positions (1, T) that all rows share become (B, T), so that each row has its own gradient."""
        if self.recording and args and args[0].dim() == 2 and args[0].shape[0] == 1 < self.rows:
            return (args[0].expand(self.rows, -1), *args[1:])
        return None

    def _keep(self, site: Site) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self.recording and isinstance(output, Tensor) and output.requires_grad:
                a = args[0] if args else next(iter(kwargs.values()))
                self.calls.append(Call(site, a.detach(), len(output), get_gradient_edge(output)))

        return hook

    def uses(self, deltas: Sequence[Tensor | None]) -> dict[str, list[tuple[Form, Tensor, Tensor]]]:
        """Every use of every key, with input and output gradient in float32.

        Args:
            deltas: the gradient at each call's edge, None where the loss does not depend on it.

        Raises:
            ModelError: a call did not have one row of the batch at each place of its first axis.
        """
        found: dict[str, list[tuple[Form, Tensor, Tensor]]] = {}
        for call, delta in zip(self.calls, deltas, strict=True):
            if delta is None:
                continue
            if len(call.a) != self.rows or call.rows != self.rows:
                raise ModelError(
                    f"the layer '{call.site.name}' was given {len(call.a)} rows in a batch of {self.rows}: keep the "
                    "rows of a batch on the first axis in every forward pass, or compute the Fisher by way='vmap'."
                )
            a = call.a.float() if call.a.is_floating_point() else call.a
            for key, form in call.site.forms.items():
                found.setdefault(key, []).append((form, a, delta.float()))
        return found
