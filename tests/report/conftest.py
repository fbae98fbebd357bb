"""Run folders written by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from report_runs import content

Make = Callable[..., Path]


@pytest.fixture(scope="session")
def make_in() -> Make:
    """Writes a run folder below ``base`` and returns it."""

    def write(base: Path, *given: Any, folder: str | None = None, **changes: Any) -> Path:
        found = content(*given, **changes)
        place = base / (folder or f"{found['stream']}/{found['strategy']}/seed-{found['seed']}")
        place.mkdir(parents=True)
        (place / "result.json").write_text(json.dumps(found), encoding="utf-8")
        return place

    return write


@pytest.fixture
def make(make_in: Make, tmp_path: Path) -> Make:
    """Writes a run folder below the test's own and returns it; ``folder`` names it."""
    return partial(make_in, tmp_path)
