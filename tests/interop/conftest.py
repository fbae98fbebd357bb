"""Packages that warn when they are imported are imported here, quietly; tests of those that are not installed are left out."""

from __future__ import annotations

from importlib.util import find_spec

from continual.foreign import imported

collect_ignore_glob = [] if find_spec("avalanche") is not None else ["test_avalanche_*.py"]
if not collect_ignore_glob:
    imported("avalanche")
