"""Hyper-parameters chosen on valid rows of the first experiences, never on test rows."""

from continual.tune.record import Trial
from continual.tune.rows import tuning_stream
from continual.tune.search import Tuned, tune
from continual.tune.space import Dimension, default_space, read_space

__all__ = ["Dimension", "Trial", "Tuned", "default_space", "read_space", "tune", "tuning_stream"]
