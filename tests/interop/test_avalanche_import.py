"""What Avalanche does to a process when it is imported, and that none of it is left."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import warnings

import avalanche_bench
import pytest

from continual import Learner, Strategy
from continual.errors import SpecError
from continual.foreign import imported, quiet
from continual.interop.avalanche import benchmark_from
from continual.streams.sources.avalanche import classic

TRACES = """
import os, sys, warnings
import torch
from torch.distributed import distributed_c10d
from torch.utils.data import Dataset

def traces():
    return Dataset.__add__, distributed_c10d._unpickler, dict(os.environ)

before = traces()
"""
WORK = """
from continual.foreign import imported
imported("avalanche")
assert traces() == before, "the import left something"
from continual import Learner, Stream
from continual.interop.avalanche import as_plugin, benchmark_from, stream_from
stream = Stream.load("split-digits")[:2]
stream_from(benchmark_from(stream))
learner = Learner({"kind": "mlp", "hidden": [4]}, {"use": "avalanche-er-ace", "training": {"epochs": 1}}, device="cpu")
learner.run(stream)
assert "avalanche" in sys.modules
assert traces()[:2] == before[:2], "the work left something"
assert not any("avalanche" in str(entry) for entry in warnings.filters)
assert warnings.filters[-1][0] == "error" or any(entry[:3] == ("error", None, Warning) for entry in warnings.filters)
"""
PLAIN = """
warnings.simplefilter("ignore")
import avalanche
assert traces()[:2] != before[:2], "nothing was patched: this test looks at the wrong places"
"""


def run(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, timeout=120)


def test_a_run_leaves_no_trace_prints_nothing_and_warns_of_nothing() -> None:
    done = run(TRACES + WORK, "-W", "error")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr == ""


def test_who_imports_it_before_us_keeps_what_it_patched() -> None:
    code = TRACES + PLAIN + "patched = traces()\n" + WORK.replace("before", "patched").rsplit("assert", 2)[0]
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_the_package_does_not_import_it_by_itself() -> None:
    code = "import sys, continual.strategy as s, continual.interop.avalanche\n"
    code += "s.Strategy.load('avalanche-ewc')\nassert 'avalanche' not in sys.modules"
    assert run(code).returncode == 0


def test_without_it_one_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = avalanche_bench.digits()
    monkeypatch.delitem(sys.modules, "avalanche")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    sentence = r"needs avalanche, which is not installed here: pip install 'continual-memory\[avalanche\]'"
    for asked in (
        lambda: imported("avalanche"),
        lambda: benchmark_from(stream),
        lambda: classic("SplitMNIST"),
        lambda: Learner("mlp", "avalanche-ewc", device="cpu").run(stream),
        lambda: Strategy.load("avalanche-ewc").check(objective="classification", gives_features=True),
    ):
        with pytest.raises(SpecError, match=sentence):
            asked()


def test_warnings_of_others_come_out_of_a_quiet_block() -> None:
    avalanche = imported("avalanche")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with quiet("avalanche"):
            warnings.warn_explicit("its own", UserWarning, avalanche.__file__, 1)
            warnings.warn("ours", UserWarning, stacklevel=1)
    assert [str(entry.message) for entry in caught] == ["ours"]


def test_warnings_are_no_errors_inside_a_quiet_block_and_are_after_it() -> None:
    done = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="ours"), quiet("avalanche"):
            warnings.warn("ours", UserWarning, stacklevel=1)
            done.append("went on")
    assert done
