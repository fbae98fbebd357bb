"""Which rows of a stream a memory of fixed size keeps.

Every row has a random key that depends on its id and a seed alone, and a group keeps its rows of smallest key. The
rows of smallest key are a uniform sample without replacement of all rows ever offered ("bottom-k sketch", Cohen &
Kaplan 2007), whatever their order, their batches, the processes they came through, and however often the run was
saved and loaded in between: equal probability without the counter of Vitter's reservoir (1985).

``ceiling`` of a group is the smallest key that it has given up: what it holds is, at any time, all its rows below the
ceiling that were not erased. After an erasure it fills up again as fast as new rows come, none of them favoured. Keys and ids
can be computed from one another.

Whoever offers rows may bring keys of another meaning (age, rank) in place of random ones: the smallest are kept.

Letters: B rows offered, C candidates among them, A accepted, N rows held, M = N + C, G groups, K rows that stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_SMALLEST, _NO_CEILING = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def row_keys(rows_B: Tensor, seed: int) -> Tensor:
    """Random keys int64 (B,), uniform over all int64, different for different rows (int64).

    The ``row``-th output of SplitMix64 seeded with ``seed`` (Steele, Lea & Flood 2014), read as a signed number.
    """
    key_B = (rows_B + 1) * _GOLDEN
    key_B += seed
    key_B ^= (key_B >> 30) & (2**34 - 1)
    key_B *= _MIX_1
    key_B ^= (key_B >> 27) & (2**37 - 1)
    key_B *= _MIX_2
    key_B ^= (key_B >> 31) & (2**33 - 1)
    return key_B


def equal_quotas(counts_G: Tensor, capacity: int, priority_G: Tensor) -> Tensor:
    """Rows that each group may keep, int64 (G,): equal shares, what small groups leave over goes to the others.

    Args:
        counts_G: rows that each group has, at least 1.
        priority_G: groups of smallest priority get the remainder, one row each.
    """
    groups = len(counts_G)
    sorted_G = counts_G.sort().values
    before_G = sorted_G.cumsum(0) - sorted_G
    level_G = (capacity - before_G).clamp(min=0) // torch.arange(groups, 0, -1)
    over_G = sorted_G > level_G
    if not bool(over_G.any()):
        return counts_G.clone()
    first = int(over_G.to(torch.int8).argmax())
    level = int(level_G[first])
    quotas_G = counts_G.clamp(max=level)
    larger = (counts_G > level).nonzero().flatten()
    remainder = capacity - int(quotas_G.sum())
    quotas_G[larger[priority_G[larger].argsort()[:remainder]]] += 1
    return quotas_G


@dataclass(frozen=True)
class Plan:
    """What an offer would change.

    Attributes:
        index: the accepted ones among the candidates, int64 (A,), ascending.
        places: where they go, int64 (A,): the places of rows given up, then those after the last.
        keys, groups: theirs, int64 (A,).
        ceilings: of all groups afterwards, int64 (G,).
    """

    index: Tensor
    places: Tensor
    keys: Tensor
    groups: Tensor
    ceilings: Tensor


class Selection:
    """The keys and groups of the rows held, place by place, on the CPU.

    Args:
        seed: of the keys.
        grouped: whether groups (classes, experiences) share the capacity equally; if not, all rows are one group.
        quota: rows of each group at most, in place of a shared capacity; what is full is then the group alone.
    """

    def __init__(self, seed: int, *, grouped: bool = False, quota: int | None = None) -> None:
        self.seed, self.grouped, self.quota = seed, grouped or quota is not None, quota
        self._count = 0
        self._keys = torch.empty(0, dtype=torch.int64)
        self._groups = torch.empty(0, dtype=torch.int64)
        self._ceilings_G = torch.full((0 if self.grouped else 1,), _NO_CEILING)

    def __len__(self) -> int:
        return self._count

    @property
    def keys_N(self) -> Tensor:
        """int64 (N,), place by place."""
        return self._keys[: self._count]

    @property
    def groups_N(self) -> Tensor:
        """int64 (N,), place by place; zeros where there are no groups."""
        return self._groups[: self._count] if self.grouped else torch.zeros(self._count, dtype=torch.int64)

    def candidates(self, rows_B: Tensor, groups_B: Tensor | None = None, keys_B: Tensor | None = None) -> Tensor:
        """Which of these rows may be accepted, int64 (C,) ascending: below the ceiling, with a key not held, each once.

        Args:
            rows_B, groups_B: int64 CPU (B,); groups are non-negative, and None where there are none.
            keys_B: int64 CPU (B,), different for different rows, in place of the random ones; the largest int64 stands for
                a row that is not wanted.
        """
        keys_B = row_keys(rows_B, self.seed) if keys_B is None else keys_B
        if groups_B is None:
            below_B = keys_B < int(self._ceilings_G[0])
        else:
            self._meet(groups_B)
            below_B = keys_B < self._ceilings_G[groups_B]
        index_C = below_B.nonzero().flatten()
        if not len(index_C):
            return index_C
        keys_C, order_C = keys_B[index_C].sort(stable=True)
        fresh_C = ~torch.isin(keys_C, self.keys_N)
        fresh_C[1:] &= keys_C[1:] != keys_C[:-1]
        return index_C[order_C[fresh_C]].sort().values

    def plan(self, rows_C: Tensor, groups_C: Tensor | None, capacity: int, keys_C: Tensor | None = None) -> Plan:
        """What accepting the best of these candidates would change; nothing is changed yet."""
        if groups_C is None:
            groups_C = torch.zeros_like(rows_C)
        keys_C = row_keys(rows_C, self.seed) if keys_C is None else keys_C
        keys_M, groups_M = torch.cat([self.keys_N, keys_C]), torch.cat([self.groups_N, groups_C])
        stays_M, ceilings_G = self._choose(keys_M, groups_M, capacity)
        index_A = stays_M[self._count :].nonzero().flatten()
        places = (~stays_M[: self._count]).nonzero().flatten()
        more = len(index_A) - len(places)
        assert more >= 0, "rows are given up only for others"
        places_A = torch.cat([places, torch.arange(self._count, self._count + more)])
        return Plan(index_A, places_A, keys_C[index_A], groups_C[index_A], ceilings_G)

    def accept(self, plan: Plan, capacity: int) -> None:
        """Carry out a plan that was made since the last change; ``capacity`` is that of the memory."""
        total = max(self._count, int(plan.places.max()) + 1) if len(plan.places) else self._count
        self._keys = _grown(self._keys, total, capacity)
        self._keys[plan.places] = plan.keys
        if self.grouped:
            self._groups = _grown(self._groups, total, capacity)
            self._groups[plan.places] = plan.groups
        self._count, self._ceilings_G = total, plan.ceilings

    def trim(self, capacity: int) -> Tensor:
        """Give up rows until ``capacity`` are left; the places (K,) of those that stay, ascending."""
        stays_N, self._ceilings_G = self._choose(self.keys_N, self.groups_N, capacity)
        places_K = stays_N.nonzero().flatten()
        self.keep(places_K)
        return places_K

    def keep(self, places_K: Tensor) -> None:
        """Forget the rows at all other places, which close up."""
        self._keys = _kept(self._keys, places_K)
        if self.grouped:
            self._groups = _kept(self._groups, places_K)
        self._count = len(places_K)

    def forget(self, rows: Tensor) -> None:
        """Lower each ceiling that is the random key of one of these rows, so that no id can be computed back from it.

        It comes down to three significant bits above the smallest int64, though never below a row that is held: what is
        held is still every row below the ceiling, and a quarter of the room for new ones is lost at most.
        """
        named_G = torch.isin(self._ceilings_G, row_keys(rows, self.seed))
        for group in named_G.nonzero().flatten().tolist():
            above = int(self._ceilings_G[group]) - _SMALLEST
            spare = max(above.bit_length() - 3, 0)
            own_n = self.keys_N[self.groups_N == group]
            least = int(own_n.max()) + 1 if len(own_n) else _SMALLEST + 1
            self._ceilings_G[group] = max((above >> spare << spare) + _SMALLEST, least)

    def nbytes(self) -> int:
        """Bytes held."""
        return self._keys.nbytes + self._groups.nbytes + self._ceilings_G.nbytes

    def state_dict(self) -> dict[str, Any]:
        """The rows held, and the seed."""
        return {
            "seed": self.seed,
            "keys": self.keys_N.clone(),
            "groups": self._groups[: self._count].clone(),
            "ceilings": self._ceilings_G.clone(),
        }

    def load_state_dict(self, state: dict[str, Any], capacity: int) -> None:
        """Go on from :meth:`state_dict`, with its seed."""
        self.seed, self._count = int(state["seed"]), len(state["keys"])
        self._keys = _grown(state["keys"], self._count, capacity)
        self._groups = _grown(state["groups"], self._count, capacity) if self.grouped else state["groups"].clone()
        self._ceilings_G = state["ceilings"].clone()

    def _meet(self, groups_B: Tensor) -> None:
        more = int(groups_B.max()) + 1 - len(self._ceilings_G) if len(groups_B) else 0
        if more > 0:
            self._ceilings_G = torch.cat([self._ceilings_G, torch.full((more,), _NO_CEILING)])

    def _choose(self, keys_M: Tensor, groups_M: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
        """Which rows stay, bool (M,), and the ceilings after that."""
        stays_M = torch.ones(len(keys_M), dtype=torch.bool)
        excess = len(keys_M) - capacity
        ceilings_G = self._ceilings_G.clone()
        if excess <= 0 and self.quota is None:
            return stays_M, ceilings_G
        if not self.grouped:
            given_up = keys_M.topk(excess, sorted=False).indices
            stays_M[given_up] = False
            ceilings_G[0] = keys_M[given_up].min()
            return stays_M, ceilings_G
        ids_G, group_M, counts_G = torch.unique(groups_M, return_inverse=True, return_counts=True)
        if self.quota is None:
            quotas_G = equal_quotas(counts_G, capacity, row_keys(ids_G, self.seed))
        else:
            quotas_G = counts_G.clamp(max=self.quota)
        by_key_M = keys_M.argsort()
        order_M = by_key_M[group_M[by_key_M].argsort(stable=True)]
        start_G = counts_G.cumsum(0) - counts_G
        rank_M = torch.arange(len(keys_M)) - start_G[group_M[order_M]]
        stays_M[order_M] = rank_M < quotas_G[group_M[order_M]]
        cut = (quotas_G < counts_G).nonzero().flatten()
        first_given_up = keys_M[order_M[start_G[cut] + quotas_G[cut]]]
        ceilings_G[ids_G[cut]] = first_given_up
        return stays_M, ceilings_G


def _grown(values: Tensor, count: int, capacity: int) -> Tensor:
    """``values`` with room for ``count``: the same tensor where there is room, else a new one of ``capacity``."""
    if count <= len(values) == capacity:
        return values
    grown = torch.zeros(capacity, dtype=values.dtype)
    grown[: min(len(values), capacity)] = values[:capacity]
    return grown


def _kept(values: Tensor, places_K: Tensor) -> Tensor:
    kept = torch.zeros_like(values)
    kept[: len(places_K)] = values[places_K]
    return kept
