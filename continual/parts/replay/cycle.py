"""Walking through the places of a memory in random order, every place equally often."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# B places drawn, N places there are, R places left in the walk


class Cycle:
    """A shuffled walk over N places; when it ends, a new shuffle begins.

    No draw holds a place twice, not even the one in which a walk ends and the next begins. Where rows have lengths, a
    draw takes those of the places left whose lengths fit a width best, so that little is padded: every place still comes
    once a walk, as every row does in an epoch of batches of similar length (``streams/batching.py``).
    """

    def __init__(self) -> None:
        self.order_N = torch.empty(0, dtype=torch.int64)
        self.position = 0

    def draw(
        self, count: int, size: int, generator: torch.Generator, lengths_N: Tensor | None = None, width: int = 0
    ) -> Tensor:
        """``count`` different places below ``size`` (at least ``count``), int64 (B,); another size starts anew.

        Args:
            lengths_N: of the row in each place, int64 or int32 CPU (N,); None draws by the shuffle alone.
            width: the length that rows should have at most, where enough are left.
        """
        assert count <= size, f"{count} places of {size}"
        if self.order_N.numel() != size or self.position == size:
            self.order_N, self.position = torch.randperm(size, generator=generator), 0
        if lengths_N is not None and self.position + count < size:
            self._bring_forward(count, lengths_N, width)
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

    def _bring_forward(self, count: int, lengths_N: Tensor, width: int) -> None:
        """Put first, of the places left, the ``count`` longest that are no longer than ``width``, or else the shortest."""
        left_R = self.order_N[self.position :]
        left_R = left_R[lengths_N[left_R].argsort(stable=True)]
        fitting = int((lengths_N[left_R] <= width).sum())
        start = min(max(fitting - count, 0), len(left_R) - count)
        chosen_B = left_R[start : start + count]
        self.order_N[self.position :] = torch.cat([chosen_B, left_R[:start], left_R[start + count :]])

    def nbytes(self) -> int:
        """Bytes held."""
        return self.order_N.nbytes

    def state_dict(self) -> dict[str, Any]:
        """The walk under way."""
        return {"order": self.order_N.clone(), "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.order_N, self.position = state["order"].clone(), int(state["position"])
