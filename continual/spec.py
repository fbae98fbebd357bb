"""YAML files and settings, checked: every mistake is one sentence with the file, the key and what is allowed."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from continual.errors import SpecError, nearest, quoted, shown, unknown

LARGEST = 100_000
"""Values that a YAML file may have, what its aliases stand for counted each time."""

_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping of keys to values",
    "model": "a mapping of keys to values",
}


class Spec(BaseModel):
    """Base of every settings model: unknown keys and wrong types are refused, values never change after checking."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_switch_as_number(cls, content: Any) -> Any:
        """YAML reads ``yes`` as true, which Python would take for 1."""
        for name, field in cls.model_fields.items() if isinstance(content, Mapping) else ():
            if isinstance(content.get(name), bool):
                kinds = _kinds(field.annotation)
                if (int in kinds or float in kinds) and bool not in kinds:
                    raise ValueError(f"'{name}' is {content[name]}, and should be a number")
        return content


SpecT = TypeVar("SpecT", bound=BaseModel)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping, read with the safe loader.

    Raises:
        SpecError: no such file, not YAML, or not a mapping.
    """
    try:
        content = _load(Path(path).read_text(encoding="utf-8"), path)
    except UnicodeDecodeError as error:
        raise SpecError(f"'{path}' is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8.") from error
    except OSError as error:
        raise SpecError(f"'{path}' could not be read ({error.strerror}): name a YAML file.") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise SpecError(f"'{path}' is not valid YAML ({_yaml_reason(error)}): mend it there.") from error
    if not isinstance(content, dict):
        found = "is empty" if content is None else "holds a list" if isinstance(content, list) else "holds one value"
        raise SpecError(f"'{path}' {found}: write lines of 'key: value'.")
    return content


def parse(model: type[SpecT], content: Any, where: str) -> SpecT:
    """``content`` as ``model``; the first mistake becomes a :class:`SpecError` that begins with ``where``."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise SpecError(f"{where}: {_sentence(model, content, error)}") from error


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


def _sentence(model: type[BaseModel], content: Any, error: ValidationError) -> str:
    first = error.errors()[0]
    steps = _steps(content, first["loc"])
    path = ".".join(steps) or "the whole"
    others = {tuple(_steps(content, other["loc"])) for other in error.errors()} - {tuple(steps)}
    more = f" ({len(others)} more after it)" if others else ""
    if first["type"] == "extra_forbidden":
        allowed = _fields(model, first["loc"][:-1])
        return unknown("key", first["loc"][-1], allowed, inside=".".join(steps[:-1])) + more
    if first["type"] == "missing":
        return f"the key '{path}' is missing: add it{more}."
    found = first.get("input")
    near = ""
    if first["type"] == "literal_error" and isinstance(found, str):
        names = [name.strip(" '") for name in first["ctx"]["expected"].replace(" or ", ", ").split(",")]
        near = nearest(found, names)
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ").rstrip(".")
    if first["type"] == "value_error" and (not steps or isinstance(found, Mapping)):
        return f"the key '{path}': {message}.{more}" if steps else f"{message}.{more}"
    kind, _, problem = first["type"].partition("_")
    if problem in ("type", "parsing", "from_float", "attributes_type") and kind in _EXPECTED:
        message = f"should be {_EXPECTED[kind]}"
    return f"the key '{path}' is {shown(found)}, which is not allowed: {message}.{near}{more}"


def _steps(content: Any, location: tuple[int | str, ...]) -> list[str]:
    """The keys on the way to a mistake, without the names that pydantic gives to the members of a union."""
    steps, current = [], content
    for step in location:
        if isinstance(current, Mapping) and step in current:
            current = current[step]
        elif isinstance(step, int) and isinstance(current, list | tuple):
            current = current[step] if step < len(current) else None
        elif not (isinstance(current, Mapping) and step == location[-1] and _plain(step)):
            continue
        steps.append(str(step))
    return steps


def _plain(step: int | str) -> bool:
    return isinstance(step, str) and step.isidentifier() and step not in ("str", "int", "float", "bool")


def _kinds(annotation: Any) -> list[Any]:
    """The plain types that an annotation is made of."""
    inside = get_args(annotation)
    return [kind for one in inside for kind in _kinds(one)] if inside else [annotation]


class _Loader(yaml.SafeLoader):
    """The safe loader, which takes the last of two keys of one name; this one refuses them."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        met = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in met:
                    problem = f"the key '{key.value}' is there twice"
                    raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
                met.add(key.value)
        return node


def _load(text: str, path: Path) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        size = _weight(node, {}, set())
        if size > LARGEST:
            raise SpecError(
                f"'{path}' stands for {size} values through its aliases, and {LARGEST} are allowed: write out what is "
                "meant."
            )
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _weight(node: yaml.Node, known: dict[int, int], above: set[int]) -> int:
    """How many values a node stands for."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in above:
        raise yaml.composer.ComposerError(None, None, "an alias stands for what it is a part of", node.start_mark)
    if id(node) not in known:
        above.add(id(node))
        pairs = isinstance(node, yaml.MappingNode)
        inside = [one for pair in node.value for one in pair] if pairs else node.value
        known[id(node)] = 1 + sum(_weight(one, known, above) for one in inside)
        above.remove(id(node))
    return known[id(node)]


def _yaml_reason(error: Exception) -> str:
    """What the parser says, on one line, with the place in the file."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem or error.context}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return " ".join(str(error).split()).replace(' in "<unicode string>"', "")


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


def overrides_of(given: Iterable[str] | None) -> dict[str, Any]:
    """``key=value`` as the command line takes it, such as ``training.lr=0.01``; the value is read as YAML.

    Raises:
        SpecError: another form.
    """
    found: dict[str, Any] = {}
    for entry in given or ():
        key, mark, value = entry.partition("=")
        if not mark or not key:
            raise SpecError(f"--set '{entry}' has no value: write it as key=value, such as training.lr=0.01.")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise SpecError(
                f"--set '{entry}' is not valid YAML after the '=': write it as training.lr=0.01."
            ) from error
    return found
