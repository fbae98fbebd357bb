"""What a study asks for: its file, checked down to every stream and strategy, and the cells that come of it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, NonNegativeInt, model_validator

from continual.errors import ContinualError, SpecError, unknown
from continual.learner.core import resolve_device, slow_precision
from continual.library import find_spec
from continual.models.build import gives_features
from continual.spec import Spec, parse, read_yaml
from continual.strategy import Strategy
from continual.streams.spec import read_stream_spec
from continual.suitability import unsuited

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*")


def _or_name(schema: dict[str, Any]) -> None:
    content = dict(schema)
    schema.clear()
    schema["anyOf"] = [{"type": "string"}, content]


class _Choice(Spec):
    use: str
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, content: Any) -> Any:
        return {"use": content} if isinstance(content, str) else content


class StreamChoice(_Choice):
    """A stream of the study: its name, or a mapping.

    Attributes:
        use: a name of the library, or a YAML file (from the study's folder or the working directory).
        name: what reports call it; its own name where it is not given.

    Any other key is one of the stream's file and is laid over it.
    """

    model_config = ConfigDict(extra="allow", json_schema_extra=_or_name)


class StrategyChoice(_Choice):
    """A strategy of the study: its name, or a mapping.

    Attributes:
        use: a name of the library, or a YAML file (from the study's folder or the working directory).
        name: what reports call it; the name of ``use`` where it is not given.
        set: dotted key of its file → value.
    """

    model_config = ConfigDict(json_schema_extra=_or_name)

    set: dict[str, Any] = Field(default_factory=dict)

    @property
    def label(self) -> str:
        return self.name or (Path(self.use).stem if self.use.endswith((".yaml", ".yml")) else self.use)


class Group(Spec):
    """Streams × strategies × seeds with settings of their own.

    Attributes:
        seeds: those of the study where they are not given.
        model: taken instead of each stream's own.
        training: keys of the strategies' ``training``, for all of them.
        set: dotted key of a strategy's file → value, for all of them; set after ``training`` and before a strategy's
            own ``set``.
    """

    streams: list[StreamChoice] = Field(min_length=1)
    strategies: list[StrategyChoice] = Field(min_length=1)
    seeds: list[NonNegativeInt] | None = None
    model: str | dict[str, Any] | None = None
    training: dict[str, Any] = Field(default_factory=dict)
    set: dict[str, Any] = Field(default_factory=dict)


class StudySpec(Spec):
    """The form of a study's YAML file: one block at the top, or ``groups`` of them, or both.

    Attributes:
        data: stream → folder of its data, from the study's folder.
        model, training, set: as in a group, and for all groups where they do not say otherwise.
    """

    summary: str = ""
    streams: list[StreamChoice] = Field(default_factory=list)
    strategies: list[StrategyChoice] = Field(default_factory=list)
    seeds: list[NonNegativeInt] = Field(default_factory=lambda: [0], min_length=1)
    model: str | dict[str, Any] | None = None
    training: dict[str, Any] = Field(default_factory=dict)
    set: dict[str, Any] = Field(default_factory=dict)
    data: dict[str, str] = Field(default_factory=dict)
    groups: list[Group] = Field(default_factory=list)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if bool(self.streams) != bool(self.strategies):
            raise ValueError("streams and strategies come together, give both or put them into groups")
        if not self.streams and not self.groups:
            raise ValueError("it names nothing to run, give streams and strategies, or groups")
        return self

    def blocks(self) -> list[Group]:
        """The block at the top and the groups, each complete."""
        top = [Group(streams=self.streams, strategies=self.strategies)] if self.streams else []
        return [
            group.model_copy(
                update={
                    "seeds": group.seeds if group.seeds is not None else self.seeds,
                    "model": group.model if group.model is not None else self.model,
                    "training": {**self.training, **group.training},
                    "set": {**self.set, **group.set},
                }
            )
            for group in [*top, *self.groups]
        ]


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        stream, strategy, seed: its names in reports and its folder.
        stream_source: what the runner loads: a name, a file, or the content of one.
        strategy_source: a name or a file; ``overrides`` are set in it.
        settings: all of it resolved, as far as it can change the result.
        resumable: whether a run that was cut off goes on; one of an engine begins again.
    """

    stream: str
    strategy: str
    seed: int
    stream_source: str | dict[str, Any]
    strategy_source: str
    overrides: dict[str, Any]
    model: str | dict[str, Any] | None
    settings: dict[str, Any]
    resumable: bool = True

    @property
    def label(self) -> str:
        """``stream/strategy/seed-n``, which is also the folder below the study's."""
        return f"{self.stream}/{self.strategy}/seed-{self.seed}"


class Study:
    """A checked study.

    Args:
        spec: its content.
        folder: relative paths start here.
        name: the title of its page.

    Raises:
        SpecError: an unknown stream, strategy, key or value, a strategy that cannot work on its stream or model, or two
            cells of the same name.
    """

    def __init__(self, spec: StudySpec, folder: Path = Path(), name: str = "study") -> None:
        self.spec, self.folder, self.name = spec, Path(folder), name

    @classmethod
    def load(cls, path: str | Path) -> Study:
        """Read and check a study's file, down to every stream and strategy that it names."""
        path = Path(path)
        name = path.resolve().parent.name if path.stem == "study" else path.stem
        study = cls(parse(StudySpec, read_yaml(path), str(path)), path.parent, name)
        study.cells()
        return study

    def cells(self) -> list[Cell]:
        """Every run of the study, in the order of its file, seeds innermost."""
        return list(self._cells)

    @cached_property
    def _cells(self) -> list[Cell]:
        found: dict[str, Cell] = {}
        streams: set[str] = set()
        for group in self.spec.blocks():
            for choice in group.streams:
                name, source, settings = self._stream(choice)
                streams |= {name, choice.use}
                for strategy in group.strategies:
                    first = self._cell(group, name, source, settings, strategy)
                    for cell in (replace(first, seed=seed) for seed in group.seeds or []):
                        if cell.label in found:
                            raise SpecError(
                                f"study '{self.name}' has two cells called '{cell.label}': give one of the strategies "
                                "or streams a name of its own ({use: …, name: …}), or name each seed once."
                            )
                        found[cell.label] = cell
        for name in self.spec.data:
            if name not in streams:
                raise SpecError(f"study '{self.name}', data: {unknown('stream', name, streams)}")
        return list(found.values())

    def notes(self, device: str = "auto") -> list[str]:
        """What should be known before it runs: of its precision on this device, and of each pair of stream and strategy."""
        place, slow = resolve_device(device), dict[str, None]()
        found: dict[tuple[str, str], str | None] = {}
        for cell in self._cells:
            if (cell.stream, cell.strategy) not in found:
                strategy = Strategy.load(cell.strategy_source, overrides=cell.overrides)
                strategy.name = cell.strategy
                slow |= dict.fromkeys(filter(None, [slow_precision(strategy.training, place)]))
                spec, _ = read_stream_spec(cell.stream_source)
                said = spec.scenario and unsuited(strategy, spec.scenario, spec.objective)
                found[cell.stream, cell.strategy] = said and f"{cell.stream}/{cell.strategy}: {said}"
        return [*slow, *(sentence for sentence in found.values() if sentence)]

    def data_folder(self, cell: Cell, data: Path | None) -> Path | None:
        """Where the data of a cell's stream lie: ``data/<stream>``, else what the file says, else ``data`` itself."""
        if data is not None and (Path(data) / cell.stream).is_dir():
            return Path(data) / cell.stream
        use = str(cell.settings["stream"]["use"])
        for name in (cell.stream, use):
            if name in self.spec.data:
                return self.folder / Path(self.spec.data[name]).expanduser()
        return Path(data) if data is not None else None

    def _stream(self, choice: StreamChoice) -> tuple[str, str | dict[str, Any], dict[str, Any]]:
        """Name in reports, what the runner loads, and the resolved settings."""
        source = self._find("streams", choice.use)
        over = dict(choice.model_extra or {})
        given: str | dict[str, Any] = source
        if over or choice.name is not None:
            given = {"use": source, **over} | ({"name": choice.name} if choice.name is not None else {})
        try:
            spec, _ = read_stream_spec(given)
        except ContinualError as error:
            raise SpecError(f"study '{self.name}', stream '{choice.name or choice.use}': {error}") from error
        settings = spec.model_dump(mode="json", exclude={"summary"})
        return self._safe(spec.name or choice.use, "stream"), given, {"use": choice.use, **settings}

    def _cell(
        self,
        group: Group,
        stream: str,
        stream_source: str | dict[str, Any],
        stream_settings: dict[str, Any],
        choice: StrategyChoice,
    ) -> Cell:
        source = self._find("strategies", choice.use)
        overrides = {**{f"training.{key}": value for key, value in group.training.items()}, **group.set, **choice.set}
        try:
            strategy = Strategy.load(source, overrides=overrides)
            model, objective = group.model or stream_settings["model"] or "mlp", stream_settings["objective"]
            strategy.check(objective=objective, gives_features=gives_features(model, objective))
        except ContinualError as error:
            where = f"study '{self.name}', strategy '{choice.label}' on stream '{stream}'"
            raise SpecError(f"{where}: {error}") from error
        settings = {"stream": stream_settings, "strategy": strategy.fingerprint(), "model": group.model}
        return Cell(
            stream=stream,
            strategy=self._safe(choice.label, "strategy"),
            seed=0,
            stream_source=stream_source,
            strategy_source=source,
            overrides=overrides,
            model=group.model,
            settings=settings,
            resumable=strategy.engine is None,
        )

    def _find(self, kind: Literal["streams", "strategies"], use: str) -> str:
        beside = self.folder / use
        source = str(beside) if use.endswith((".yaml", ".yml")) and beside.is_file() else use
        try:
            find_spec(kind, source)
        except SpecError as error:
            raise SpecError(f"study '{self.name}': {error}") from error
        return source

    def _safe(self, name: str, what: str) -> str:
        if not _NAME.fullmatch(name):
            raise SpecError(
                f"study '{self.name}': the {what} name '{name}' cannot be a folder: use letters, digits and . _ + - "
                "only, with 'name:' if need be."
            )
        return name
