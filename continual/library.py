"""The named strategies and streams: one YAML file each, beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from continual.errors import SpecError, unknown

Kind = Literal["strategies", "streams"]

_PACKAGE = Path(__file__).resolve().parent


def library_folder(kind: Kind) -> Path:
    """Where the YAML files of ``kind`` lie."""
    inside = _PACKAGE / "_library" / kind
    return inside if inside.is_dir() else _PACKAGE.parent / kind


def library_names(kind: Kind) -> list[str]:
    """Names that can be given without a path, sorted."""
    return sorted(path.stem for path in library_folder(kind).glob("*.yaml"))


def find_spec(kind: Kind, name: str | Path) -> Path:
    """The file behind a name of the library or a path of the user's.

    Raises:
        SpecError: neither a name nor a file; the nearest name is offered.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise SpecError(f"there is no file '{path}': name one that exists, or one of `continual list`.")
    found = library_folder(kind) / f"{name}.yaml"
    if str(name) in library_names(kind):
        return found
    wanted, other = ("strategy", "stream") if kind == "strategies" else ("stream", "strategy")
    if str(name) in library_names("streams" if kind == "strategies" else "strategies"):
        raise SpecError(
            f"'{name}' is a {other} and a {wanted} is wanted here: the stream comes first, then the strategy."
        )
    raise SpecError(unknown(wanted, name, library_names(kind)))
