"""What a saved state asks to be imported or written to: nothing of it happens unless the user has named it too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from continual.errors import StateError, quoted


def wishes(content: Any) -> set[str]:
    """References ``package.module:Class`` and folders that settings name, anywhere in their nesting."""
    if isinstance(content, str):
        return {content} if ":" in content else set()
    if isinstance(content, Mapping):
        found = {str(content["folder"])} if content.get("folder") is not None else set()
        for key in ("kind", "class"):
            if isinstance(content.get(key), str) and ":" in content[key]:
                found.add(content[key])
        if content.get("kind") == "object":
            found.discard(str(content.get("class")))
        return found.union(*(wishes(value) for value in content.values() if isinstance(value, Mapping | list | tuple)))
    if isinstance(content, list | tuple):
        return set().union(*(wishes(item) for item in content))
    return set()


def check_trusted(source: Path | str, asked: set[str], how: str = "Learner.load(folder, trust={names})") -> None:
    """Raise :class:`StateError` where a state asks for anything that nobody has named.

    Args:
        how: it is named.
    """
    if asked:
        names = sorted(asked)
        raise StateError(
            f"the state in '{source}' asks to use {quoted(names)}, and a folder must not decide which code is run or which "
            f"folder is written: if you know it, name it, {how.format(names=names)}."
        )
