"""What tests share: a cache of their own, and the folder of real data where there is one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """``CONTINUAL_CACHE`` is a temporary folder, so that no test reads or writes the user's."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONTINUAL_CACHE", str(folder))
        yield folder


def find_data() -> Path | None:
    """The folder in ``CONTINUAL_DATA``, or ``shared/data`` beside one of the folders above this file."""
    named = os.environ.get("CONTINUAL_DATA")
    if named:
        return Path(named)
    beside = (parent / "shared" / "data" for parent in Path(__file__).resolve().parents)
    return next((folder for folder in beside if folder.is_dir()), None)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Real data: ``MNIST/raw`` and ``clinc150`` in it; the test is skipped where there are none."""
    folder = find_data()
    if folder is None or not folder.is_dir():
        pytest.skip("no real data here: set CONTINUAL_DATA to a folder with MNIST/raw and clinc150")
    return folder
