"""Strategies, memory and monitor inside ``transformers.Trainer`` and TRL's ``SFTTrainer``."""

from continual.interop.transformers.callback import Continual
from continual.interop.transformers.mixin import ContinualMixin

__all__ = ["Continual", "ContinualMixin"]
