"""Where data and caches lie."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Place:
    """Where a source may look.

    Attributes:
        data: the folder that the user named (``--data``): the data itself or the folder that holds it.
        folder: the folder of the YAML file, against which relative paths are read.
    """

    data: Path | None = None
    folder: Path | None = None

    def find(self, relative: Path, fits: Callable[[Path], bool]) -> Path | None:
        """The first place where ``relative`` is and ``fits``; None where there is none.

        A folder that the user named is the only one looked at. Without one: beside the YAML file, the working folder,
        the folder in ``CONTINUAL_DATA``, the cache.
        """
        return next((path for path in self.candidates(relative) if fits(path)), None)

    def candidates(self, relative: Path) -> list[Path]:
        """The places where ``relative`` is looked for, in order."""
        if relative.is_absolute():
            return [relative]
        if self.data is not None:
            return [self.data / relative, self.data]
        roots = [root for root in (self.folder, Path(), data_folder(), cache_folder()) if root is not None]
        return [root / relative for root in roots]


def data_folder() -> Path | None:
    """The folder named by the environment variable ``CONTINUAL_DATA``."""
    named = os.environ.get("CONTINUAL_DATA")
    return Path(named) if named else None


_own: ContextVar[Path | None] = ContextVar("cache", default=None)


@contextmanager
def own_cache(folder: Path) -> Iterator[None]:
    """Inside, what is cached lies in ``folder`` and nowhere else, so that whoever made it can remove it."""
    mark = _own.set(folder)
    try:
        yield
    finally:
        _own.reset(mark)


def cache_folder() -> Path:
    """The folder of :func:`own_cache`, that named by ``CONTINUAL_CACHE``, or ``~/.cache/continual``."""
    own = _own.get()
    if own is not None:
        return own
    named = os.environ.get("CONTINUAL_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "continual"
