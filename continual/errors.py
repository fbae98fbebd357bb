"""The user's mistakes, each said in one sentence: what was found, what is allowed, what to do next."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
MOST = 40
"""Names that a sentence lists."""


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
    """Training that cannot go on, such as a loss that is not finite.

    Args:
        lasting: the sentence without what it quotes of rows, for files from which nothing can be erased; None where it quotes none.
    """

    def __init__(self, sentence: str, lasting: str | None = None) -> None:
        super().__init__(sentence)
        self.lasting = lasting or sentence


def quoted(names: Iterable[object]) -> str:
    """``'a', 'b', 'c'``, in the order given."""
    return ", ".join(f"'{name}'" for name in names)


def one_line(text: object) -> str:
    """A sentence without line breaks and other signs that a terminal obeys, which names in it may have."""
    return _CONTROL.sub(" ", str(text)).strip()


def shown(value: object, length: int = 60) -> str:
    """A value as sentences show it: cut to ``length``, and ``empty`` where there is none."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 3, length, length
    text = "empty" if value is None else " ".join(short.repr(value).split())
    return text if len(text) <= length else f"{text[: length - 1]}…"


def unknown(what: str, found: object, allowed: Iterable[object], inside: str = "") -> str:
    """One sentence for a name that is not among ``allowed`` (``inside`` what), with the nearest name when there is one.

    Of more than :data:`MOST` names the dozen nearest are listed.
    """
    names = [str(name) for name in allowed]
    where = f" in '{inside}'" if inside else ""
    listed = names if len(names) <= MOST else difflib.get_close_matches(str(found), names, n=12, cutoff=0.0)
    more = f" and {len(names) - len(listed)} more" if len(listed) < len(names) else ""
    return (
        f"unknown {what} '{found}'{where}: allowed are {quoted(sorted(listed)) or 'none'}{more}.{nearest(found, names)}"
    )


def nearest(found: object, names: Iterable[object]) -> str:
    """``" Did you mean 'x'?"``, or nothing where no name is near."""
    near = difflib.get_close_matches(str(found), [str(name) for name in names], n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""
