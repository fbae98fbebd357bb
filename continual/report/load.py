"""Run folders read back and checked: the report knows nothing of a run but its files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from annotated_types import Ge, Len
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from continual.errors import StateError

RESULT = "result.json"
SCORES = "scores.safetensors"
ERROR = "error.txt"
CELL = "cell.json"
SHARES = ("accuracy", "exact match")
"""Scores that are shares of rows."""

Cell = float | None
Interval = Annotated[list[Cell], Len(2, 2)]


class _Read(BaseModel):
    """Strict in the keys that are fixed, open to keys that were added."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)


class Metrics(_Read):
    """Figures of one run, in the units of its score; None where a run cannot have them (joint, nothing measured)."""

    accuracy: float | None = None
    learning_accuracy: float | None = None
    bwt: float | None = None
    forgetting: float | None = None
    fwt: float | None = None
    retention: float | None = None
    negative_flips: float | None = None
    intransigence: float | None = None


class Cost(_Read):
    """What a run took: seconds, rows, bytes and trainable parameters."""

    train_seconds: Annotated[float, Ge(0)]
    monitor_seconds: Annotated[float, Ge(0)]
    rows_trained: Annotated[int, Ge(0)]
    rows_per_second: Annotated[float, Ge(0)] | None
    peak_memory_bytes: Annotated[int, Ge(0)] | None
    state_bytes: dict[str, Annotated[int, Ge(0)]]
    trainable_parameters: Annotated[int, Ge(0)] | None


class Provenance(_Read):
    """Where a run comes from; ``stream_per_seed`` says whether the seed changes the stream, None where that is not known."""

    commit: str | None
    versions: dict[str, str]
    hardware: Any
    seed: int
    started: str
    stream_fingerprint: str | None
    strategy_fingerprint: str | None
    base_model_sha256: str | None
    command: str | list[str] | None = None
    model: dict[str, Any] | None = None
    settings: dict[str, Any] | None = None
    stream_per_seed: bool | None = None


class Probe(_Read):
    """Scores of one probe: ``updates`` at which it was measured (-1 before any) and its mean ``scores``."""

    updates: list[int]
    scores: list[Cell]


class Result(_Read):
    """One ``result.json``.

    ``matrix`` has a row for each update (a joint run: one) and a column for each experience; it is empty where nothing
    was measured.
    """

    format: Literal[1]
    stream: str
    strategy: str
    seed: int
    experiences: Annotated[list[str], Len(1)]
    matrix: list[list[Cell]]
    initial: list[Cell]
    metrics: Metrics
    intervals: dict[str, Interval | None]
    cost: Cost
    provenance: Provenance
    stream_summary: str = ""
    strategy_summary: str = ""
    source: str | None = None
    scenario: str = ""
    objective: str = "classification"
    score: str = "accuracy"
    notes: list[str] = Field(default_factory=list)
    class_names: list[str] | None = None
    probes: dict[str, Probe] = Field(default_factory=dict)
    _folder: Path | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _rectangular(self) -> Self:
        columns = len(self.experiences)
        for place, row in enumerate(self.matrix):
            if len(row) != columns:
                raise ValueError(f"row {place} of the matrix has {len(row)} cells for {columns} experiences")
        return self

    @property
    def folder(self) -> Path | None:
        """Where it was read from; None for one that was not."""
        return self._folder

    @property
    def joint(self) -> bool:
        """Trained once on everything: one row for several experiences."""
        return len(self.matrix) == 1 and len(self.experiences) > 1

    @property
    def share(self) -> bool:
        """Whether its score is a share of rows, from 0 to 1."""
        return self.score in SHARES

    @property
    def key(self) -> tuple[str, str, int]:
        """``(stream, strategy, seed)``."""
        return self.stream, self.strategy, self.seed


@dataclass(frozen=True)
class Failure:
    """A run of a study that ended in an error, with the sentence that it left."""

    stream: str
    strategy: str
    seed: int
    sentence: str


def load_result(folder: Path) -> Result:
    """The ``result.json`` of a run folder.

    Raises:
        StateError: it is absent, damaged, of another format, or says something impossible.
    """
    path = Path(folder) / RESULT
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StateError(
            f"'{folder}' holds no {RESULT}: name the folder of a finished run, or finish it with "
            "`continual run … --resume`."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise StateError(f"'{path}' is damaged ({error}): run it again.") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != 1 or isinstance(found, bool):
        raise StateError(f"'{path}' has the format {found!r}, and this version reads format 1: run it again.")
    try:
        result = Result.model_validate(content)
        result._folder = Path(folder)
        return result
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(step) for step in first["loc"]) or "the whole"
        message = first["msg"].removeprefix("Value error, ")
        raise StateError(f"'{path}' is damaged ('{place}': {message}): run it again.") from error


def load_results(folders: Iterable[Path]) -> list[Result]:
    """Every run in ``folders``, each a run folder or one that has run folders somewhere below it; sorted by their key.

    Folders whose name begins with a dot are passed over.

    Raises:
        StateError: a folder without any run, a damaged result, or two runs of the same stream, strategy and seed.
    """
    seen: dict[tuple[str, str, int], tuple[Path, Result]] = {}
    for folder in folders:
        found = list(_below(Path(folder), RESULT))
        if not found:
            begun = (Path(folder) / "run.json").is_file()
            instead = (
                "go on with it (continual run … --resume), or leave it out"
                if begun
                else f"name a folder that holds a {RESULT}"
            )
            raise StateError(f"there is no finished run in '{folder}': {instead}.")
        for run in found:
            result = load_result(run)
            other, _ = seen.setdefault(result.key, (run, result))
            if other.resolve() != run.resolve():
                raise StateError(
                    f"'{other}' and '{run}' are both '{result.stream}' with '{result.strategy}' and seed "
                    f"{result.seed}: leave one of them out, or run it under another strategy name."
                )
    return [seen[key][1] for key in sorted(seen)]


def load_failures(folders: Iterable[Path]) -> list[Failure]:
    """Cells of studies in ``folders`` that failed: those with an ``error.txt`` beside their ``cell.json``."""
    failures = set()
    for folder in folders:
        for cell in _below(Path(folder), CELL):
            try:
                sentence = (cell / ERROR).read_text(encoding="utf-8").strip()
                content = json.loads((cell / CELL).read_text(encoding="utf-8"))
                failures.add(Failure(str(content["stream"]), str(content["strategy"]), int(content["seed"]), sentence))
            except (OSError, ValueError, KeyError, TypeError):
                continue
    return sorted(failures, key=lambda failure: (failure.stream, failure.strategy, failure.seed))


def _below(folder: Path, name: str) -> Iterable[Path]:
    for place, folders, files in os.walk(folder):
        folders[:] = [] if name in files else sorted(inner for inner in folders if not inner.startswith("."))
        if name in files:
            yield Path(place)
