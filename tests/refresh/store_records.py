"""Records of a store, written by hand."""

from __future__ import annotations

import hashlib
from typing import Any

from continual.refresh.records import Check, Data, Drift, Found, Judgement, Manifest, Measured, Outcome, Piece, Report


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def outcome(**changes: Any) -> Outcome:
    """An update that went live."""
    worst = Check(rule="max_drop", name="jan", answer="pass", value=0.01, low=0.0, high=0.018, limit=0.02, rows=500)
    given = {
        "store": "intents",
        "happened": "promoted",
        "version": 3,
        "live": 3,
        "experience": "mar",
        "sentence": "2 of 2 earlier test sets passed.",
        "score": 0.9,
        "worst": worst,
        "attempts": 2,
        "seconds": 12.5,
    }
    return Outcome(**{**given, **changes})


def measured(name: str, score: float | None, learnt: float | None = None, **changes: Any) -> Measured:
    low, high = (None, None) if score is None else (max(score - 0.02, 0.0), min(score + 0.02, 1.0))
    given = {"name": name, "rows": 200, "score": score, "low": low, "high": high, "learnt": learnt, "before": learnt}
    return Measured(**{**given, **changes})


def version(
    number: int,
    experience: str,
    scores: tuple[Measured, ...],
    *,
    parent: int | None = None,
    answer: Any = "pass",
    sentence: str = "all earlier test sets passed.",
    checks: tuple[Check, ...] = (),
    found: tuple[Found, ...] = (),
    created: str | None = None,
    score: str = "accuracy",
    notes: tuple[str, ...] = (),
) -> tuple[Manifest, Report]:
    """One version: its manifest and its report."""
    data = Data(
        path=f"{experience}.csv", sha256=None, fingerprint=sha(experience), offered=1200, trained=1000, holdout=200
    )
    pieces = {
        "learner": Piece(sha256=sha(f"learner {number}"), bytes=40_000_000 + 100_000 * number),
        "report": Piece(sha256=sha(f"report {number}"), bytes=5000),
    }
    pieces |= {
        f"tests/{place:04d}": Piece(sha256=sha(one.name), bytes=80_000)
        for place, one in enumerate(scores)
        if not one.probe
    }
    manifest = Manifest(
        version=number,
        parent=parent,
        parent_manifest=None if parent is None else sha(str(parent)),
        created=created or f"2025-{1 + (number - 1) % 12:02d}-03T06:00:00+00:00",
        experience=experience,
        update=number - 1,
        attempt=0,
        data=data,
        model={"kind": "mlp"},
        base_model_sha256=None,
        strategy="rehearsal",
        strategy_fingerprint=sha("rehearsal"),
        seed=0,
        code={"version": "0.1.0"},
        answer=answer,
        sentence=sentence,
        pieces=pieces,
    )
    report = Report(
        version=number,
        experience=experience,
        attempt=0,
        settings={},
        data=data,
        judgement=Judgement(answer=answer, sentence=sentence, checks=checks),
        drift=Drift(new=1000, reference=1000, found=found, tested=("label-shift", "covariate-shift")),
        measured=scores,
        score=score,
        notes=notes,
        cost={"train": 40.0 + number, "evaluate": 4.0, "drift": 2.0, "rest": 1.0, "rows_trained": 1000.0},
        bytes={"weights": 30_000_000, "replay/rehearsal": 9_000_000 + 100_000 * number, "monitor": 80_000},
    )
    return manifest, report
