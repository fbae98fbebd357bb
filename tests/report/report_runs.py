"""What a run leaves, written by hand."""

from __future__ import annotations

from typing import Any


def settings(strategy: str) -> dict[str, Any]:
    """What a run records of its strategy: three of them are what their names say, all others rehearse."""
    data = strategy if strategy in ("joint", "cumulative") else "experience"
    plain: dict[str, Any] = {"backbone": "train", "data": data, "training": {"lr": 0.1, "epochs": 8}}
    return plain if strategy in ("naive", "joint", "cumulative") else {**plain, "replay": {"kind": "rehearsal"}}


def content(
    strategy: str = "rehearsal", seed: int = 0, matrix: list[list[float | None]] | None = None, **changes: Any
) -> dict[str, Any]:
    """A ``result.json`` of two experiences; the metrics follow from the matrix."""
    matrix = [[0.9, None], [0.7, 0.8]] if matrix is None else matrix
    columns = len(matrix[0])
    last = [value for value in matrix[-1] if value is not None]
    metrics: dict[str, float | None] = dict.fromkeys(("learning_accuracy", "bwt", "forgetting", "fwt", "retention"))
    metrics["accuracy"] = sum(last) / len(last)
    if len(matrix) == columns:
        own = [matrix[place][place] or 0.0 for place in range(columns)]
        metrics["learning_accuracy"] = sum(own) / columns
        metrics["bwt"] = sum(a - b for a, b in zip(last[:-1], own[:-1], strict=True)) / max(columns - 1, 1)
        metrics["forgetting"] = -metrics["bwt"]
        metrics["retention"] = sum(a / b for a, b in zip(last, own, strict=True)) / columns
    found = {
        "format": 1,
        "stream": "digits",
        "strategy": strategy,
        "seed": seed,
        "experiences": [f"part {place}" for place in range(columns)],
        "matrix": matrix,
        "initial": [None] * columns,
        "metrics": metrics,
        "intervals": {"accuracy": [metrics["accuracy"] - 0.05, metrics["accuracy"] + 0.04]},
        "cost": {
            "train_seconds": 10.0 + seed,
            "monitor_seconds": 0.5,
            "rows_trained": 1000,
            "rows_per_second": 100.0,
            "peak_memory_bytes": 300_000_000,
            "state_bytes": {"replay/rehearsal": 12_000, "head/linear": 345},
            "trainable_parameters": 85_002,
        },
        "provenance": {
            "commit": "abc1234",
            "versions": {"python": "3.11.9", "torch": "2.14.1"},
            "hardware": {"processor": "A processor", "cores": 2, "memory_bytes": 16_000_000_000},
            "seed": seed,
            "started": f"2026-11-2{seed}T10:00:00+00:00",
            "stream_fingerprint": f"{seed}" * 64,
            "strategy_fingerprint": "5" * 64,
            "base_model_sha256": None,
            "model": {"kind": "mlp", "hidden": [16]},
            "settings": settings(strategy),
        },
        "strategy_summary": f"What {strategy} does.",
        "source": "Someone 2020",
        "scenario": "class",
        "objective": "classification",
        "score": "accuracy",
        "notes": [],
        "something_added": {"later": True},
    }
    return found | changes
