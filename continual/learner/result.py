"""The content of ``result.json``."""

from __future__ import annotations

import math
from typing import Any

from continual.learner.core import Core
from continual.objective import PRIMARY
from continual.provenance import commit, hardware, peak_memory_bytes, versions


def result_of(learner: Core, stream_summary: str, scenario: str) -> dict[str, Any]:
    """All figures of a run; numbers that do not exist are null, never NaN."""
    monitor, strategy = learner.monitor, learner.strategy
    measured = monitor is not None and monitor.measured
    seconds, rows = learner.cost["train_seconds"], int(learner.cost["rows_trained"])
    trainable = sum(parameter.numel() for parameter in learner.context.parameters().values())
    device = str(learner.device)
    return {
        "format": 1,
        "stream": learner.stream_name,
        "stream_summary": stream_summary,
        "strategy": strategy.name,
        "strategy_summary": strategy.summary,
        "source": strategy.source,
        "seed": learner.seed,
        "scenario": scenario,
        "objective": learner.objective,
        "score": PRIMARY[learner.objective],
        "experiences": list(learner.experience_names),
        "class_names": list(learner.class_names),
        "matrix": plain(monitor.matrix().tolist()) if monitor and measured else [],
        "initial": plain(monitor.initial()) if monitor and measured else [],
        "metrics": plain(monitor.metrics()) if monitor and measured else {},
        "intervals": plain(monitor.intervals()) if monitor and measured else {},
        "probes": plain(monitor.probe_history()) if monitor and measured else {},
        "cost": {
            "train_seconds": seconds,
            "monitor_seconds": learner.cost["monitor_seconds"],
            "rows_trained": rows,
            "rows_per_second": rows / seconds if seconds else 0.0,
            "peak_memory_bytes": peak_memory_bytes(device),
            "state_bytes": learner.state_bytes(),
            "trainable_parameters": trainable,
        },
        "notes": list(learner.notes),
        "provenance": {
            "commit": commit(),
            "versions": {**versions(), **({} if learner._engine is None else learner._engine.versions())},
            "hardware": hardware(device),
            "processes": learner.processes.count,
            "seed": learner.seed,
            "started": learner.started,
            "stream_fingerprint": learner.stream_fingerprint,
            "strategy_fingerprint": strategy.fingerprint(),
            "base_model_sha256": learner.model.base_sha256,
            "model": dict(learner.model.spec),
            "settings": strategy.to_dict(),
        },
    }


def plain(value: Any) -> Any:
    """The same nesting with None for every number that is not finite."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
