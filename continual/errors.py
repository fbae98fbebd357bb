"""The user's mistakes, each said in one sentence: what was found, what is allowed, what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ContinualError(ValueError):
    """Something the user can mend. The command line prints it as one sentence and exits with status 1."""


class SpecError(ContinualError):
    """A YAML file, a name or a setting that says something impossible."""


class StreamError(ContinualError):
    """Data that cannot be a stream: a missing column, an empty experience, a test row among the training rows."""


class CompositionError(ContinualError):
    """Parts that cannot work together, or with this model or stream."""


class ModelError(ContinualError):
    """A model that cannot be found, is not the one that was recorded, or gives an output of the wrong form."""


class StateError(ContinualError):
    """A saved state that is absent, damaged, or belongs to another run."""


class TrainingError(ContinualError):
    """Training that cannot go on, such as a loss that is not finite."""


def quoted(names: Iterable[object]) -> str:
    """``'a', 'b', 'c'``, in the order given."""
    return ", ".join(f"'{name}'" for name in names)


def unknown(what: str, found: object, allowed: Iterable[object]) -> str:
    """One sentence for a name that is not among ``allowed``, with the nearest name when there is one."""
    names = [str(name) for name in allowed]
    near = difflib.get_close_matches(str(found), names, n=1, cutoff=0.5)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return f"unknown {what} '{found}': allowed are {quoted(sorted(names)) or 'none'}.{hint}"
