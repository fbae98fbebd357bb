"""What ``continual check`` finds in a file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from continual.errors import SpecError, unknown
from continual.library import find_spec, library_names
from continual.spec import read_yaml


@dataclass
class Findings:
    """Sentences: what is wrong, and what is there."""

    wrong: list[str] = field(default_factory=list)
    right: list[str] = field(default_factory=list)


def check_file(name: str, *, data: Path | None = None, seed: int = 0) -> Findings:
    """Check a stream, a strategy, a study or the rules of a store, whichever ``name`` is.

    Raises:
        SpecError: it is none of them, or has a wrong key.
    """
    if not name.endswith((".yaml", ".yml")):
        names = [*library_names("streams"), *library_names("strategies")]
        if name not in names:
            raise SpecError(unknown("stream or strategy", name, names))
        path = find_spec("streams" if name in library_names("streams") else "strategies", name)
    else:
        path = find_spec("streams", name)
    content = read_yaml(path)
    if content.keys() & {"streams", "strategies", "groups"}:
        return _study(path)
    if content.keys() & {"gate", "ladder", "holdout", "drift", "alerts"}:
        from continual.refresh.rules import Rules

        Rules.load(path)
        return Findings(right=["rules of a store: every key is known"])
    return _stream(path, data, seed) if _is_stream(content) else _strategy(path)


def schema_of(kind: str) -> str:
    """The JSON schema of a kind of file, for editors.

    Raises:
        SpecError: another kind.
    """
    from continual.refresh.rules import Rules
    from continual.strategy import StrategySpec
    from continual.streams.spec import StreamSpec
    from continual.study import StudySpec

    models: dict[str, type[BaseModel]] = {
        "stream": StreamSpec,
        "strategy": StrategySpec,
        "study": StudySpec,
        "rules": Rules,
    }
    if kind not in models:
        raise SpecError(unknown("kind of file", kind, models))
    return json.dumps(models[kind].model_json_schema(), indent=1)


def _is_stream(content: dict[str, Any]) -> bool:
    """Whether a file is a stream: the ``source`` of a strategy is words, and it uses no other file."""
    if content.keys() & {"split", "scenario"} or isinstance(content.get("source"), dict):
        return True
    return "use" in content and content["use"] not in library_names("strategies")


def _stream(path: Path, data: Path | None, seed: int) -> Findings:
    from continual.streams.check import check_stream
    from continual.streams.stream import Stream

    stream = Stream.load(path, data=data, seed=seed)
    findings = Findings(wrong=check_stream(stream))
    findings.right.append(
        f"stream '{stream.name}': {len(stream)} experiences, scenario {stream.scenario}, {stream.objective}"
    )
    findings.right.extend(f"  {note}" for note in stream.notes)
    for experience in stream:
        sizes = [
            f"{what} {len(table)}"
            for what, table in (("train", experience.train), ("valid", experience.valid), ("test", experience.test))
            if table is not None
        ]
        classes = f", {len(experience.classes)} classes" if experience.classes else ""
        findings.right.append(f"  {experience.index} {experience.name}: {', '.join(sizes)}{classes}")
    return findings


def _strategy(path: Path) -> Findings:
    from continual.strategy import Strategy

    strategy = Strategy.load(path)
    parts = ", ".join(part.name for part in strategy.prototypes) or "no parts"
    if strategy.engine is not None:
        strategy.check(objective="classification", gives_features=True)
        parts = strategy.engine.name
    return Findings(
        right=[f"strategy '{strategy.name}': {parts}; {strategy.training.optimizer}, lr {strategy.training.lr:g}"]
    )


def _study(path: Path) -> Findings:
    from continual.study import Study

    study = Study.load(path)
    return Findings(right=[f"study: {len(study.cells())} cells"])
