"""Task streams in YAML: source + split + scenario, every mistake one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, model_validator

from continual.errors import SpecError, unknown
from continual.kinds import Objective, Scenario
from continual.library import find_spec
from continual.spec import Spec, parse, read_yaml
from continual.streams.sources.arrays import ArraysSource
from continual.streams.sources.avalanche import AvalancheSource
from continual.streams.sources.digits import DigitsSource
from continual.streams.sources.docstrings import DocstringsSource
from continual.streams.sources.files import FilesSource
from continual.streams.sources.hub import HubSource
from continual.streams.sources.mnist import MnistSource
from continual.streams.splits import ClassSplit, DomainSplit, ExperienceSplit, JointSplit, TimeSplit
from continual.streams.transforms import PermutationSplit, RotationSplit

SourceSpec = Annotated[
    DigitsSource | DocstringsSource | MnistSource | FilesSource | HubSource | ArraysSource | AvalancheSource,
    Field(discriminator="kind"),
]
SplitSpec = Annotated[
    ClassSplit | DomainSplit | ExperienceSplit | TimeSplit | PermutationSplit | RotationSplit | JointSplit,
    Field(discriminator="by"),
]

SOURCES: dict[str, type[Spec]] = {
    "digits": DigitsSource,
    "docstrings": DocstringsSource,
    "mnist": MnistSource,
    "files": FilesSource,
    "hub": HubSource,
    "arrays": ArraysSource,
    "avalanche": AvalancheSource,
}
SPLITS: dict[str, type[Spec]] = {
    "class": ClassSplit,
    "domain": DomainSplit,
    "experience": ExperienceSplit,
    "time": TimeSplit,
    "permutation": PermutationSplit,
    "rotation": RotationSplit,
    "joint": JointSplit,
}


class StreamSpec(Spec):
    """One stream.

    Attributes:
        name: in reports; None: that of the file.
        summary: one sentence for ``continual list``.
        source: where the rows come from, by ``kind``.
        split: how they become experiences, by ``by``; ``experience`` where the source comes in experiences and none is
            given.
        scenario: ``task``, ``domain`` or ``class``; a source that comes in experiences can do without: None takes the one
            that they look like.
        objective: what the labels are for.
        model: the model for this stream where the user names none: a name on the Hub or settings of a model.
    """

    name: str | None = None
    summary: str = ""
    source: SourceSpec
    split: SplitSpec
    scenario: Scenario | None = None
    objective: Objective = "classification"
    model: str | dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_the_source(cls, content: Any) -> Any:
        """A source that comes in experiences is split into them where nothing else is said."""
        if isinstance(content, Mapping) and "split" not in content and _brings_experiences(content.get("source")):
            return {**content, "split": {"by": "experience"}}
        return content

    @model_validator(mode="after")
    def _has_a_scenario(self) -> StreamSpec:
        if self.scenario is None and not _brings_experiences(self.source):
            raise ValueError("the key 'scenario' is missing: add it")
        return self


def read_stream_spec(stream: str | Path | Mapping[str, Any] | StreamSpec) -> tuple[StreamSpec, Path | None]:
    """A stream of the library by name, a YAML file, or settings, checked; and the folder of the file (of the file in
    ``use``, where settings name one).

    ``use: NAME`` takes another stream's settings and lays the keys beside it over them; a mapping with another ``kind``
    or ``by`` replaces the whole mapping.

    Raises:
        SpecError: an unknown name or key, a wrong type, an impossible value.
    """
    if isinstance(stream, StreamSpec):
        return stream, None
    if isinstance(stream, Mapping):
        use = stream.get("use")
        beside = Path(use).parent if isinstance(use, str) and use.endswith((".yaml", ".yml")) else None
        return _parse(_resolved(dict(stream), "this stream", ()), "this stream"), beside
    path = find_spec("streams", stream)
    where = f"'{path}'"
    own = read_yaml(path)
    content = _resolved(own, where, (path.resolve(),))
    return _parse({**content, "name": own.get("name") or path.stem}, where), path.parent


def _brings_experiences(source: Any) -> bool:
    kind = source.get("kind") if isinstance(source, Mapping) else getattr(source, "kind", None)
    return bool(getattr(SOURCES.get(str(kind)), "brings_experiences", False))


def _resolved(content: dict[str, Any], where: str, seen: tuple[Path, ...]) -> dict[str, Any]:
    if "use" not in content:
        return content
    if not isinstance(content["use"], str):
        raise SpecError(f"{where}: the key 'use' is {content['use']!r}: name a stream of `continual list`.")
    path = find_spec("streams", content["use"])
    if path.resolve() in seen:
        raise SpecError(f"{where}: 'use: {content['use']}' leads back to itself: name another stream.")
    base = _resolved(read_yaml(path), f"'{path}'", (*seen, path.resolve()))
    over = {key: value for key, value in content.items() if key != "use"}
    return merged({"name": path.stem, **base}, over)


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` laid over ``base``, mapping by mapping; another ``kind`` or ``by`` replaces a mapping whole."""
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            other = any(tag in value and value[tag] != below.get(tag) for tag in ("kind", "by"))
            result[key] = value if other else merged(below, value)
        else:
            result[key] = value
    return result


def _parse(content: dict[str, Any], where: str) -> StreamSpec:
    checked = dict(content)
    for key, tag, models in (("source", "kind", SOURCES), ("split", "by", SPLITS)):
        part = checked.get(key)
        if isinstance(part, BaseModel) or key not in checked:
            continue
        if not isinstance(part, dict) or tag not in part:
            found = sorted(map(str, part)) if isinstance(part, dict) else repr(part)
            raise SpecError(f"{where}: '{key}' says no '{tag}' (found {found}): write '{key}: {{{tag}: NAME, ...}}'.")
        if not isinstance(part[tag], str) or part[tag] not in models:
            raise SpecError(f"{where}: {unknown(f'{key} {tag}', part[tag], models)}")
        checked[key] = parse(models[part[tag]], part, f"{where}, {key}")
    return parse(StreamSpec, checked, where)
