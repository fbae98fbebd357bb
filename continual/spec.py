"""YAML files and settings, checked: every mistake is one sentence with the file, the key and what is allowed."""

from __future__ import annotations

import difflib
import importlib
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from continual.errors import SpecError, quoted, unknown


class Spec(BaseModel):
    """Base of every settings model: unknown keys and wrong types are refused, values never change after checking."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)


SpecT = TypeVar("SpecT", bound=BaseModel)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping, read with the safe loader.

    Raises:
        SpecError: no such file, not YAML, or not a mapping.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"'{path}' could not be read ({error}): name a YAML file.") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise SpecError(f"'{path}' is not valid YAML ({' '.join(str(error).split())}): mend it there.") from error
    if not isinstance(content, dict):
        raise SpecError(
            f"'{path}' holds {type(content).__name__}, not a mapping of keys to values: see `continual list`."
        )
    return content


def parse(model: type[SpecT], content: Any, where: str) -> SpecT:
    """``content`` as ``model``; the first mistake becomes a :class:`SpecError` that begins with ``where``."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise SpecError(f"{where}: {_sentence(model, error)}") from error


def load_object(reference: str, where: str) -> Any:
    """The object that ``package.module:Name`` names.

    Raises:
        SpecError: the reference has another form, or names nothing.
    """
    module_name, _, attribute = reference.partition(":")
    if not module_name or not attribute:
        raise SpecError(f"{where}: '{reference}' names no class: write it as 'package.module:Class'.")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise SpecError(
            f"{where}: '{reference}' cannot be imported ({error}): check the name and the Python path."
        ) from error


def _sentence(model: type[BaseModel], error: ValidationError) -> str:
    first = error.errors()[0]
    path = ".".join(str(step) for step in first["loc"]) or "the whole"
    more = f" ({error.error_count() - 1} more after it)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        allowed = _fields(model, first["loc"][:-1])
        parent = ".".join(str(step) for step in first["loc"][:-1])
        return unknown(f"key in '{parent}'" if parent else "key", first["loc"][-1], allowed) + more
    if first["type"] == "missing":
        return f"the key '{path}' is missing: add it{more}."
    found = first.get("input")
    near = ""
    if first["type"] == "literal_error" and isinstance(found, str):
        names = [name.strip(" '") for name in first["ctx"]["expected"].replace(" or ", ", ").split(",")]
        close = difflib.get_close_matches(found, names, n=1, cutoff=0.5)
        near = f" Did you mean '{close[0]}'?" if close else ""
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ").rstrip(".")
    if not first["loc"] and first["type"] == "value_error":
        return f"{message}.{more}"
    return f"the key '{path}' is {found!r}, which is not allowed: {message}.{near}{more}"


def _fields(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    current: Any = model
    for step in location:
        field = current.model_fields.get(step) if isinstance(step, str) and hasattr(current, "model_fields") else None
        if field is None:
            continue
        options = [field.annotation, *getattr(field.annotation, "__args__", ())]
        current = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), current)
    return [field.alias or name for name, field in current.model_fields.items()]


__all__ = ["Spec", "load_object", "parse", "quoted", "read_yaml"]
