"""Walking through the places of a memory in random order, every place equally often."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# B places drawn, N places there are


class Cycle:
    """A shuffled walk over N places; when it ends, a new shuffle begins.

    No draw holds a place twice, not even the one in which a walk ends and the next begins.
    """

    def __init__(self) -> None:
        self.order_N = torch.empty(0, dtype=torch.int64)
        self.position = 0

    def draw(self, count: int, size: int, generator: torch.Generator) -> Tensor:
        """``count`` different places below ``size`` (at least ``count``), int64 (B,); another size starts anew."""
        assert count <= size, f"{count} places of {size}"
        if self.order_N.numel() != size:
            self.order_N, self.position = torch.randperm(size, generator=generator), 0
        end = self.position + count
        if end <= size:
            index_B = self.order_N[self.position : end]
            self.position = end
            return index_B
        tail = self.order_N[self.position :]
        rest = end - size
        order_N = torch.randperm(size, generator=generator)
        in_tail_N = torch.zeros(size, dtype=torch.bool)
        in_tail_N[tail] = True
        free_N = ~in_tail_N[order_N]
        first_N = free_N & (free_N.cumsum(0) <= rest)
        self.order_N, self.position = torch.cat([order_N[first_N], order_N[~first_N]]), rest
        return torch.cat([tail, self.order_N[:rest]])

    def nbytes(self) -> int:
        """Bytes held."""
        return self.order_N.nbytes

    def state_dict(self) -> dict[str, Any]:
        """The walk under way."""
        return {"order": self.order_N.clone(), "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.order_N, self.position = state["order"].clone(), int(state["position"])
