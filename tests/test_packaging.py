"""The wheel holds the package, the strategies and the streams, and names are found from anywhere."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from continual.library import library_names

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return next(out.glob("continual_memory-*.whl"))


def test_the_wheel_holds_package_strategies_streams_and_licence(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for kind in ("strategies", "streams"):
        for path in (ROOT / kind).glob("*.yaml"):
            assert f"continual/_library/{kind}/{path.name}" in names
    assert {"continual/py.typed", "continual/cli.py"} <= names
    templates = ("report/page.html.j2", "report/style.css.j2", "refresh/store.html.j2")
    assert {f"continual/{template}" for template in templates} <= names
    assert any(name.endswith("LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "reports/", "strategies/", "streams/")) for name in names)


def test_the_same_names_from_a_wheel_in_another_folder(wheel: Path, tmp_path: Path) -> None:
    place = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(place)
    (tmp_path / "strategies").mkdir()
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import continual; assert continual.__file__.startswith(sys.argv[1]), continual.__file__\n"
        "from continual.library import library_names\n"
        "print(','.join(library_names('strategies')), ','.join(library_names('streams')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(place)], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [",".join(library_names("strategies")), ",".join(library_names("streams"))]


def test_extras_and_console_script() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {"avalanche", "offline", "ray", "faiss", "tune", "all", "dev"} <= set(project["optional-dependencies"])
    assert project["scripts"] == {"continual": "continual.cli:main"}
