"""Models that are refreshed again and again: versions, a gate before each, lineage, erasure."""

from continual.refresh.records import Outcome
from continual.refresh.rules import Rules
from continual.refresh.store import Store

__all__ = ["Outcome", "Rules", "Store"]
