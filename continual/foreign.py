"""Packages that change the process when they are imported, and warn while they work, kept from doing so to our users.

Avalanche 0.6 replaces ``torch.utils.data.Dataset.__add__`` and the unpickler of ``torch.distributed``, puts a warning filter
of its own first, and brings qpsolvers, which warns where it finds no solver. Code that adds a torch data set to one of
Avalanche's needs the first of these: who imports Avalanche before us has all of them, and nothing is put back then.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from continual.errors import SpecError

EXTRAS = {"avalanche": "avalanche"}
"""Package → the extra of ours that brings it."""


def imported(name: str) -> ModuleType:
    """The module called ``name``, imported without a trace: what it patches elsewhere is put back, its warnings are dropped.

    A package that was imported before, by whomever, is left as it is.

    Raises:
        SpecError: it is not installed; the sentence names the extra that brings it.
    """
    package = name.partition(".")[0]
    if package in sys.modules:
        with quiet(package):
            return importlib.import_module(name)
    if importlib.util.find_spec(package) is None:
        raise SpecError(
            f"this needs {package}, which is not installed here: pip install 'continual-memory[{EXTRAS[package]}]'."
        )
    environment, patched = dict(os.environ), _patched()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            filters = list(warnings.filters)
            module = importlib.import_module(name)
            added = [entry for entry in warnings.filters if entry not in filters and not _is_of(entry[2], package)]
    finally:
        for holder, attribute, value in patched:
            setattr(holder, attribute, value)
        for key in os.environ.keys() - environment.keys():
            del os.environ[key]
        os.environ.update(environment)
    for action, message, category, where, line in reversed(added):
        texts = [getattr(pattern, "pattern", pattern) or "" for pattern in (message, where)]
        warnings.filterwarnings(action, texts[0], category, texts[1], line)  # type: ignore[arg-type]
    return module


@contextmanager
def quiet(package: str) -> Iterator[None]:
    """Drop the warnings that a package raises or causes inside; those of all others are given at the end.

    Inside, no warning is an error, whatever the filters say: an error in the middle of a step would be the package's end.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        try:
            yield
        except BaseException:
            _give(caught, package)
            raise
    _give(caught, package)


def _give(caught: list[warnings.WarningMessage], package: str) -> None:
    """Warn again of what others than the package have warned of."""
    folder = _folder(package)
    for entry in caught:
        if not (folder and Path(entry.filename).is_relative_to(folder)) and not _is_of(entry.category, package):
            warnings.warn_explicit(entry.message, entry.category, entry.filename, entry.lineno)


def _patched() -> list[tuple[Any, str, Any]]:
    """What the packages of :data:`EXTRAS` replace outside themselves: holder, attribute, value now."""
    from torch.distributed import distributed_c10d
    from torch.utils.data import Dataset

    places: list[tuple[Any, str]] = [(Dataset, "__add__"), (distributed_c10d, "_unpickler")]
    return [(holder, attribute, getattr(holder, attribute)) for holder, attribute in places]


def _folder(package: str) -> Path | None:
    file = getattr(sys.modules.get(package), "__file__", None)
    return None if file is None else Path(file).parent


def _is_of(category: Any, package: str) -> bool:
    return str(getattr(category, "__module__", "")).partition(".")[0] == package
