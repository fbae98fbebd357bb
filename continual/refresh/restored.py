"""A version's learner; bytes that are what the chain says and no learner's state all the same are said in a sentence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from continual.errors import ContinualError, StateError
from continual.learner import Learner
from continual.refresh.folder import Folder

_SIGNS = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, AssertionError, RuntimeError)
"""How a state shows that it is none: a tensor of another shape, a key that is missing, a number that is a word."""


def restored(folder: Folder, version: int, trust: Iterable[str], /, **options: Any) -> Learner:
    """The learner of a version.

    Args:
        options: as for :meth:`Learner.restore`.

    Raises:
        ContinualError: damaged, of another base model, asking for something that is not trusted, or no state of a learner.
    """
    state = folder.state(version)
    with whole(folder, version):
        return Learner.restore(state, f"version {version}", trust=trust, **options)


@contextmanager
def whole(folder: Folder, version: int) -> Iterator[None]:
    """What goes wrong inside with the state of a version becomes a :class:`StateError`, but for want of memory."""
    try:
        yield
    except (ContinualError, torch.OutOfMemoryError):
        raise
    except _SIGNS as error:
        if "allocate memory" in str(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise StateError(
            f"version {version} of '{folder.path}' is no whole state of a learner ({reason[:200]}): restore the store from a backup, "
            "or roll back to another version."
        ) from error
