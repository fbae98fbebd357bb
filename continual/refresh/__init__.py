"""Models that are refreshed again and again: versions, a gate before each, lineage, erasure."""
