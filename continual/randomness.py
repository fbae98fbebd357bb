"""Named random generators derived from one root seed.

Every consumer draws from its own stream of numbers, so that adding a consumer never shifts another's draws. The draws
that frameworks make for themselves (dropout, initialisation) happen inside :meth:`Randomness.framework`, which swaps the
process-wide generators for ours and puts the user's back afterwards.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def derive_seed(root: int, name: str) -> int:
    """A seed in [0, 2**63) that depends on both ``root`` and ``name`` (SHA-256 of the two)."""
    digest = hashlib.sha256(f"{root}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class Randomness:
    """All generators of one learner.

    Args:
        seed: the root seed, any integer.
        device: a CUDA device whose generator frameworks draw from as well; those of other devices are left alone.
    """

    def __init__(self, seed: int, device: torch.device | None = None) -> None:
        self.seed = int(seed)
        self._device = device if device is not None and device.type == "cuda" else None
        self._generators: dict[str, torch.Generator] = {}
        self._framework: dict[str, Any] | None = None
        self._inside = False

    def generator(self, name: str) -> torch.Generator:
        """The CPU generator called ``name``; the same object at every call."""
        if name not in self._generators:
            self._generators[name] = torch.Generator().manual_seed(derive_seed(self.seed, name))
        return self._generators[name]

    @contextmanager
    def framework(self) -> Iterator[None]:
        """Run a block under our own global generators (torch CPU and our CUDA device, numpy, random); the user's are put
        back.
        """
        if self._inside:
            yield
            return
        users = _read_globals(self._device)
        self._inside = True
        try:
            if self._framework is None:
                _seed_globals(derive_seed(self.seed, "framework"), self._device)
            else:
                _write_globals(self._framework, self._device)
            yield
        finally:
            self._framework = _read_globals(self._device)
            self._inside = False
            _write_globals(users, self._device)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values; correct also when called inside :meth:`framework`."""
        framework = _read_globals(self._device) if self._inside else self._framework
        return {
            "seed": self.seed,
            "generators": {name: generator.get_state() for name, generator in sorted(self._generators.items())},
            "framework": framework,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``; inside :meth:`framework` the process-wide generators are set as well."""
        self.seed = int(state["seed"])
        self._generators = {}
        for name, value in state["generators"].items():
            self._generators[name] = torch.Generator()
            self._generators[name].set_state(value)
        self._framework = state["framework"]
        if self._inside and self._framework is not None:
            _write_globals(self._framework, self._device)


def _seed_globals(seed: int, device: torch.device | None) -> None:
    torch.default_generator.manual_seed(seed)
    if device is not None:
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the legacy generator is the one that libraries draw from
    random.seed(seed)


def _read_globals(device: torch.device | None) -> dict[str, Any]:
    python = random.getstate()
    legacy: Any = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(),
        "cuda": [] if device is None else [torch.cuda.get_rng_state(device)],
        "python": {"version": python[0], "words": torch.tensor(python[1], dtype=torch.int64), "gauss": python[2]},
        "numpy": {
            "keys": torch.from_numpy(np.asarray(legacy[1]).astype(np.int64)),
            "position": int(legacy[2]),
            "has_gauss": int(legacy[3]),
            "gauss": float(legacy[4]),
        },
    }


def _write_globals(state: dict[str, Any], device: torch.device | None) -> None:
    torch.set_rng_state(state["torch"])
    cuda: list[Tensor] = list(state["cuda"])
    if cuda and device is not None:
        torch.cuda.set_rng_state(cuda[0], device)
    python = state["python"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    legacy = state["numpy"]
    keys = legacy["keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, legacy["position"], legacy["has_gauss"], legacy["gauss"]))  # noqa: NPY002
