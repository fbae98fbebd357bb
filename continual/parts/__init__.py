"""Everything a strategy is made of; each part is one file in the folder of its slot."""

from continual.parts.part import Context, Part

__all__ = ["Context", "Part"]
