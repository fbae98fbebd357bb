"""A symmetric matrix in half its bytes: no entry is kept twice.

Source: the rectangular full packed format of Gustavson et al. 2010 (ACM TOMS 37, article 18), in a layout of our own: the
matrix is cut into quarters; the lower one off the diagonal is kept as it is, and the lower triangle of the first and the upper
triangle of the last lie in one rectangle.

Letters: D rows, H = ⌈D / 2⌉.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def pack(matrix_DD: Tensor) -> Tensor:
    """(2H + 1, H) from the lower triangle of (D, D)."""
    odd, half = len(matrix_DD) % 2, (len(matrix_DD) + 1) // 2
    whole = F.pad(matrix_DD, (0, odd, 0, odd)) if odd else matrix_DD
    packed = torch.empty(2 * half + 1, half, dtype=matrix_DD.dtype, device=matrix_DD.device)
    packed[:half] = whole[half:, half:].T.triu()
    packed[half] = 0
    packed[1 : half + 1] += whole[:half, :half].tril()
    packed[half + 1 :] = whole[half:, :half]
    return packed


def unpack(packed: Tensor, size: int) -> Tensor:
    """The matrix (D, D) again, D = ``size``."""
    half = packed.shape[1]
    whole = packed.new_empty(2 * half, 2 * half)
    first, last = packed[1 : half + 1].tril(), packed[:half].triu()
    whole[:half, :half] = first + first.tril(-1).T
    whole[half:, half:] = last + last.triu(1).T
    whole[half:, :half] = packed[half + 1 :]
    whole[:half, half:] = packed[half + 1 :].T
    return whole[:size, :size].contiguous() if size < 2 * half else whole
