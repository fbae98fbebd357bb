"""The learner: one update after another, each measured, at any moment saved and gone on with."""

from continual.learner.learner import Learner
from continual.learner.update import Run, Update

__all__ = ["Learner", "Run", "Update"]
