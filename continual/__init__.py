"""Keeps a model learning from a stream of tasks and proves, after every update, what it still remembers.

The names in ``__all__`` are here; importing the package loads none of the heavy libraries until one of them is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from continual.errors import ContinualError as ContinualError
    from continual.learner import Learner as Learner
    from continual.learner import Run as Run
    from continual.learner import Update as Update
    from continual.models.build import build_model as build_model
    from continual.monitor.monitor import Monitor as Monitor
    from continual.parts.context import TrainingContext as TrainingContext
    from continual.refresh.store import Store as Store
    from continual.strategy import Strategy as Strategy
    from continual.streams.check import check_stream as check_stream
    from continual.streams.experience import Experience as Experience
    from continual.streams.stream import Stream as Stream
    from continual.training import Training as Training

_WHERE = {
    "ContinualError": "continual.errors",
    "Experience": "continual.streams.experience",
    "Learner": "continual.learner",
    "Monitor": "continual.monitor.monitor",
    "Run": "continual.learner",
    "Store": "continual.refresh.store",
    "Strategy": "continual.strategy",
    "Stream": "continual.streams.stream",
    "Training": "continual.training",
    "TrainingContext": "continual.parts.context",
    "Update": "continual.learner",
    "build_model": "continual.models.build",
    "check_stream": "continual.streams.check",
}

__all__ = [
    "ContinualError",
    "Experience",
    "Learner",
    "Monitor",
    "Run",
    "Store",
    "Strategy",
    "Stream",
    "Training",
    "TrainingContext",
    "Update",
    "build_model",
    "check_stream",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'continual' has no attribute '{name}'")
