"""Class ids: what a label of the source is called in the stream.

Ids are given in order of arrival. ``class``: one id for each class. ``task``: one for each class of each experience.
``domain``: the ids are fixed; where the split is by class, the id is the place in the experience's own list of classes.
(van de Ven & Tolias 2019, arXiv 1904.07734)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from continual.errors import StreamError
from continual.kinds import Scenario
from continual.streams.splits import Piece


@dataclass(frozen=True)
class Ids:
    """The class ids of one experience.

    Attributes:
        lookup_C: int64 (C,), id by class index of the source, -1 where the class is not in the experience.
        classes: its ids, rising.
        names: of every class met so far, by id.
    """

    lookup_C: Tensor  # noqa: N815
    classes: tuple[int, ...]
    names: tuple[str, ...]


def assign(pieces: Sequence[Piece], label_names: Sequence[str], scenario: Scenario) -> list[Ids]:
    """The class ids of each experience.

    Raises:
        StreamError: a split by class in the scenario ``domain`` whose experiences have different numbers of classes.
    """
    if scenario == "domain" and any(piece.positional for piece in pieces):
        sizes = sorted({len(piece.classes) for piece in pieces})
        if len(sizes) > 1:
            raise StreamError(
                f"the scenario 'domain' needs as many classes in each experience, and there are {sizes[0]} to "
                f"{sizes[-1]}: choose another 'split.size' or 'split.classes'."
            )
        if sizes == [1]:
            raise StreamError("the scenario 'domain' with one class in each experience has nothing to tell apart.")
        names = tuple(f"place {place + 1}" for place in range(sizes[0]))
        return [_ids(piece.classes, range(sizes[0]), names, label_names) for piece in pieces]
    if scenario == "domain":
        return [_ids(piece.classes, piece.classes, tuple(label_names), label_names) for piece in pieces]
    met: dict[int, int] = {}
    names_so_far: list[str] = []
    found = []
    for piece in pieces:
        if scenario == "task":
            met = {}
        for index in piece.classes:
            if index not in met:
                met[index] = len(names_so_far)
                names_so_far.append(unused(label_names[index], piece.name, names_so_far))
        ids = [met[index] for index in piece.classes]
        found.append(_ids(piece.classes, ids, tuple(names_so_far), label_names))
    return found


def unused(name: str, experience: str, taken: Sequence[str]) -> str:
    """``name``, or ``experience/name`` where it is taken."""
    return f"{experience}/{name}" if name in taken else name


def _ids(indices: Sequence[int], ids: Sequence[int], names: tuple[str, ...], label_names: Sequence[str]) -> Ids:
    lookup_C = torch.full((len(label_names),), -1, dtype=torch.int64)
    lookup_C[list(indices)] = torch.tensor(list(ids), dtype=torch.int64)
    return Ids(lookup_C, tuple(sorted(ids)), names)
