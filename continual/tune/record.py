"""What a tuning's folder holds, read and written: only one process at a time, each file whole.

``tune.json`` says what was asked for, ``trials.json`` (and ``trials.csv``) what has been tried, ``tuned.yaml`` is the strategy with the
best settings so far. A process that dies between two of them leaves a trial unrecorded, which is then made again.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from continual.disk import read_object, write_text
from continual.errors import StateError, shown
from continual.strategy import Strategy

ASKED, TRIALS, TABLE, CHOSEN = "tune.json", "trials.json", "trials.csv", "tuned.yaml"
_ANEW = "delete the folder and tune again."


@dataclass(frozen=True)
class Trial:
    """One run over the tuning's rows.

    Attributes:
        settings: dotted key → value; of trial 0 the strategy's own.
        score: the final score on valid rows, mean over experiences, higher is better; None where it failed.
        message: why it failed, or which trial it repeats.
    """

    number: int
    settings: dict[str, Any]
    score: float | None
    message: str = ""
    seconds: float = 0.0


def best_of(found: Sequence[Trial]) -> Trial | None:
    """The first of the best; None where no trial has a score."""
    scored = [(trial.score, -trial.number, trial) for trial in found if trial.score is not None]
    return max(scored)[2] if scored else None


def begin(out: Path, request: dict[str, Any]) -> list[Trial]:
    """The trials that were made before, of the same tuning; ``request`` is written where there was none.

    Raises:
        StateError: the folder holds something else, or a file of it is damaged.
    """
    asked = out / ASKED
    if not asked.is_file():
        if (out / TRIALS).exists() or (out / "result.json").exists():
            raise StateError(f"'{out}' holds something else: name another out folder.")
        write_text(asked, json.dumps(request, indent=1) + "\n")
        return []
    known = read_object(asked, _ANEW)
    for key, value in json.loads(json.dumps(request)).items():
        if known.get(key) != value:
            found = f"{shown(known.get(key))} there, {shown(value)} asked for"
            raise StateError(f"'{out}' holds another tuning ({key}: {found}): name another out folder.")
    if not (out / TRIALS).is_file():
        return []
    try:
        return [Trial(**one) for one in read_object(out / TRIALS, _ANEW)["trials"]]
    except (KeyError, TypeError) as error:
        raise StateError(f"'{out / TRIALS}' is damaged ({error}): delete the folder and tune again.") from error


def write(out: Path, found: Sequence[Trial], keys: Sequence[str], chosen: Strategy | None) -> None:
    """Write the trials, and the strategy with the best settings where there is one."""
    if chosen is not None:
        text = yaml.safe_dump(chosen.to_dict(), sort_keys=False, allow_unicode=True, width=120)
        write_text(out / CHOSEN, text)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["trial", "score", *keys, "seconds", "message"])
    for trial in found:
        settings = [trial.settings[key] for key in keys]
        writer.writerow([trial.number, trial.score, *settings, trial.seconds, trial.message])
    write_text(out / TABLE, buffer.getvalue())
    content = {"format": 1, "trials": [asdict(trial) for trial in found]}
    write_text(out / TRIALS, json.dumps(content, indent=1) + "\n")
