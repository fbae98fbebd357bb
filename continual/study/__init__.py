"""Studies: strategies × streams × seeds in one command."""

from continual.study.run import CellOutcome, run_study
from continual.study.spec import Cell, Group, StrategyChoice, StreamChoice, Study, StudySpec

__all__ = [
    "Cell",
    "CellOutcome",
    "Group",
    "StrategyChoice",
    "StreamChoice",
    "Study",
    "StudySpec",
    "run_study",
]
