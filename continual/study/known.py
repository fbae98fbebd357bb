"""Whether a cell's folder holds the run that is asked for: the same settings, on the same rows and base model.

Where the data lie and which device is used is no part of that. Rows are known by the stream's fingerprint and a base
model by the SHA-256 of its weights; both are worked out once for all cells that share them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from continual.errors import ContinualError, StateError
from continual.models.build import base_on_disk
from continual.report.load import CELL, RESULT, load_result
from continual.strategy import Strategy
from continual.streams.spec import read_stream_spec
from continual.streams.stream import Stream
from continual.study.spec import Cell
from continual.trust import wishes

BEGUN = "run.json"
_PLACES = ("data", "device")
"""Settings in a ``cell.json`` that say where a run took place and not what it was."""


def digest(settings: Mapping[str, Any]) -> str:
    """SHA-256 of what decides the result of a cell."""
    what = {key: value for key, value in settings.items() if key not in _PLACES}
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


def recorded_settings(folder: Path) -> dict[str, Any] | None:
    """The settings in the ``cell.json`` of a cell's folder; None where there is none.

    Raises:
        StateError: it is damaged.
    """
    path = folder / CELL
    if not path.is_file():
        return None
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))["settings"]
        if not isinstance(settings, dict):
            raise TypeError("its settings are no mapping")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StateError(f"'{path}' is damaged ({error}): move that folder away and call the study again.") from error
    return settings


def same_settings(before: Mapping[str, Any], asked: Mapping[str, Any], folder: Path) -> bool:
    """Whether a cell was run with the settings asked for; those that its version did not have are at their defaults."""
    return digest(before) == digest(asked) or digest(_completed(before, folder)) == digest(asked)


class Sources:
    """The rows and base models of a study's cells as they are now."""

    def __init__(self) -> None:
        self._known: dict[str, str | ContinualError | None] = {}

    def changed(self, cell: Cell, data: Path | None, folder: Path) -> str:
        """``its data have`` or ``its base model has`` where they are not what the run in ``folder`` was made on, else "".

        Raises:
            ContinualError: they cannot be read here.
        """
        rows, base = _made_on(folder)
        if rows is not None and rows != self._fingerprint(cell, data):
            return "its data have"
        if base is not None and self._base(cell) not in (None, base):
            return "its base model has"
        return ""

    def _fingerprint(self, cell: Cell, data: Path | None) -> str | None:
        random = read_stream_spec(cell.stream_source)[0].split.random
        key = json.dumps([cell.settings["stream"], str(data), cell.seed if random else None], sort_keys=True)
        return self._once(key, lambda: Stream.load(cell.stream_source, data=data, seed=cell.seed).fingerprint())

    def _base(self, cell: Cell) -> str | None:
        model = cell.model or cell.settings["stream"]["model"] or "mlp"
        return self._once(f"model {json.dumps(model, sort_keys=True)}", lambda: base_on_disk(model))

    def _once(self, key: str, work: Callable[[], str | None]) -> str | None:
        if key not in self._known:
            try:
                self._known[key] = work()
            except ContinualError as error:
                self._known[key] = error
        found = self._known[key]
        if isinstance(found, ContinualError):
            raise found
        return found


def _made_on(folder: Path) -> tuple[str | None, str | None]:
    """Stream fingerprint and SHA-256 of the base of the run in ``folder``, finished or begun, as far as it says."""
    if (folder / RESULT).is_file():
        origin = load_result(folder).provenance
        return origin.stream_fingerprint, origin.base_model_sha256
    try:
        begun = json.loads((folder / BEGUN).read_text(encoding="utf-8"))
        return begun.get("stream_fingerprint"), None
    except (OSError, ValueError, AttributeError):
        return None, None


def _completed(before: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """``before`` with the defaults of settings that were added since, as far as they can be worked out."""
    found = dict(before)
    try:
        stream = dict(found["stream"])
        spec, _ = read_stream_spec({key: value for key, value in stream.items() if key != "use"})
        found["stream"] = {**spec.model_dump(mode="json", exclude={"summary"}), "use": stream["use"]}
        origin = load_result(folder).provenance
        known = origin.settings is not None and not wishes(origin.settings)
        if known and origin.strategy_fingerprint == found["strategy"]:
            found["strategy"] = Strategy.load(origin.settings or {}).fingerprint()
    except (ContinualError, KeyError, TypeError, ValueError):
        pass
    return found
