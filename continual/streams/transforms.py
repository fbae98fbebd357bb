"""The same rows again and again, each time seen through another transformation of their pixels.

Permutation: Goodfellow et al. 2013 (arXiv 1312.6211). Rotation: Lopez-Paz & Ranzato 2017 (arXiv 1706.08840), angles as
in Buzzega et al. 2020 (arXiv 2004.07211). Nothing is copied: a batch is transformed when it is drawn, every row alike.

Letters: B rows, D pixels, S side of a square image, C channels.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from continual.errors import StreamError
from continual.randomness import derive_seed
from continual.spec import Spec
from continual.streams.sources.rows import Rows
from continual.streams.splits import Piece


class Permute:
    """Pixels of each row in another order; a function for :class:`~continual.table.Mapped`."""

    def __init__(self, order_D: Tensor) -> None:
        self._orders = {order_D.device: order_D}
        self._first = order_D

    def __call__(self, inputs: Tensor) -> Tensor:
        if inputs.device not in self._orders:
            self._orders[inputs.device] = self._first.to(inputs.device)
        return inputs.flatten(1).index_select(1, self._orders[inputs.device]).view_as(inputs)


class Rotate:
    """Square images turned counter-clockwise about their centre, bilinear, zeros outside; for ``Mapped``.

    Args:
        degrees: the angle.
        shape: (S, S) or (C, S, S) of one image; rows may be flattened.
    """

    def __init__(self, degrees: float, shape: tuple[int, ...]) -> None:
        self.shape = shape
        angle = math.radians(degrees)
        turn = torch.tensor([[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]])
        grid = F.affine_grid(turn[None], [1, 1, shape[-2], shape[-1]], align_corners=False)
        self._grids = {grid.device: grid}
        self._first = grid

    def __call__(self, inputs: Tensor) -> Tensor:
        if inputs.device not in self._grids:
            self._grids[inputs.device] = self._first.to(inputs.device)
        images = inputs.reshape(1, -1, *self.shape[-2:])
        turned = F.grid_sample(images, self._grids[inputs.device].to(inputs.dtype), align_corners=False)
        return turned.view_as(inputs)


class PermutationSplit(Spec):
    """All rows in every experience, the pixels in another random order each time.

    Attributes:
        count: experiences.
        first: whether the first one is ``permuted`` too or ``identity``.
        seed: of the orders; None: that of the run.
    """

    by: Literal["permutation"] = "permutation"
    count: Annotated[int, Field(ge=1)]
    first: Literal["identity", "permuted"] = "permuted"
    seed: int | None = None

    @property
    def random(self) -> bool:
        """Whether the seed of the run changes the split."""
        return self.seed is None

    def pieces(self, rows: Rows, seed: int) -> list[Piece]:
        """One piece for each permutation."""
        shape = _image_shape(rows, "permutation")
        root = seed if self.seed is None else self.seed
        pieces = []
        for number in range(self.count):
            generator = torch.Generator().manual_seed(derive_seed(root, f"stream/permutation {number}"))
            order_D = torch.randperm(math.prod(shape), generator=generator)
            plain = number == 0 and self.first == "identity"
            functions = {} if plain else {"inputs": Permute(order_D)}
            name = "identity" if plain else f"permutation {number + 1}"
            pieces.append(Piece(name, functions={**functions}, classes=tuple(range(len(rows.label_names)))))
        return pieces


class RotationSplit(Spec):
    """All rows in every experience, the images turned by another angle in [0°, 180°) each time.

    Attributes:
        count: experiences.
        angles: ``random``, or ``even``: 0°, 180°/count, 2 · 180°/count and so on.
        seed: of the random angles; None: that of the run.
    """

    by: Literal["rotation"] = "rotation"
    count: Annotated[int, Field(ge=1)]
    angles: Literal["random", "even"] = "random"
    seed: int | None = None

    @property
    def random(self) -> bool:
        """Whether the seed of the run changes the split."""
        return self.angles == "random" and self.seed is None

    def pieces(self, rows: Rows, seed: int) -> list[Piece]:
        """One piece for each angle.

        Raises:
            StreamError: the inputs are no square images.
        """
        shape = _image_shape(rows, "rotation")
        if len(shape) == 1:
            side = math.isqrt(shape[0])
            shape = (side, side) if side * side == shape[0] else shape
        if len(shape) not in (2, 3) or shape[-1] != shape[-2]:
            raise StreamError(f"a split by rotation needs square images and a row of inputs has the shape {shape}.")
        root = seed if self.seed is None else self.seed
        classes = tuple(range(len(rows.label_names)))
        pieces = []
        for number in range(self.count):
            generator = torch.Generator().manual_seed(derive_seed(root, f"stream/rotation {number}"))
            drawn = float(torch.rand((), generator=generator, dtype=torch.float64))
            degrees = 180 * (number / self.count if self.angles == "even" else drawn)
            name = f"{number + 1}: {degrees:.1f}°"
            pieces.append(Piece(name, functions={"inputs": Rotate(degrees, shape)}, classes=classes))
        return pieces


def _image_shape(rows: Rows, what: str) -> tuple[int, ...]:
    if "inputs" not in rows.tables["train"].names:
        raise StreamError(f"a split by {what} needs numbers in a column 'inputs', and these rows are text.")
    return tuple(rows.tables["train"][torch.tensor([0])]["inputs"].shape[1:])
