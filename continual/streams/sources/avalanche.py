"""Benchmarks of Avalanche (Carta et al. 2023, JMLR 24; extra ``avalanche``), whose experiences are the split.

Rows are read through the benchmark's transform for evaluation, once, so that a row is the same at every visit; the random
augmentation of a transform for training is left out. Images that no transform makes a tensor of are uint8 (N, C, H, W).
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
from collections.abc import Callable
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, field_serializer, model_validator

from continual.errors import SpecError, StreamError, unknown
from continual.foreign import imported, quiet
from continual.kinds import Objective
from continual.randomness import Randomness
from continual.spec import Spec
from continual.streams.folders import Place, cache_folder, data_folder
from continual.streams.sources.experiences import benchmark_rows
from continual.streams.sources.rows import Rows

_SEED = 20240229


class AvalancheSource(Spec):
    """Settings of the source ``avalanche``: the benchmark's name and, beside these keys, the arguments of its function.

    ``dataset_root`` is none of them: it is the folder named with ``--data``, else with ``CONTINUAL_DATA``, else our cache, and
    Avalanche puts data there that are missing. A ``seed`` that is not given is 0.

    Attributes:
        benchmark: a classic one by name, such as ``SplitMNIST``; from Python any benchmark object.
        overlap: ``drop`` leaves out training rows with the content of a test row.
        train, test: names of the benchmark's streams; None: ``train``, or ``train_online``, and ``test``.
    """

    model_config = ConfigDict(extra="allow")
    brings_experiences: ClassVar[bool] = True

    kind: Literal["avalanche"] = "avalanche"
    benchmark: Any = Field(repr=False)
    overlap: Literal["refuse", "drop"] = "refuse"
    train: str | None = None
    test: str | None = None

    @model_validator(mode="after")
    def _arguments_are_of_a_function(self) -> AvalancheSource:
        extra = self.model_extra or {}
        if not isinstance(self.benchmark, str) and extra:
            raise ValueError(
                f"'{next(iter(extra))}' is an argument, and a benchmark that is made already takes none: leave it out"
            )
        if "dataset_root" in extra:
            raise ValueError("'dataset_root' is the folder named with --data or CONTINUAL_DATA: leave the key out")
        return self

    @field_serializer("benchmark")
    def _name(self, benchmark: Any) -> str:
        return benchmark if isinstance(benchmark, str) else type(benchmark).__name__

    def load(self, place: Place, objective: Objective) -> Rows:
        """The rows, in the order of the benchmark.

        Raises:
            SpecError: Avalanche is not installed, there is no such benchmark or argument, or it is none of classes.
            StreamError: its data cannot be read.
        """
        if objective != "classification":
            raise SpecError(f"the source 'avalanche' has classes, and the objective is {objective}: leave it out.")
        with Randomness(_SEED).framework():
            benchmark = self.benchmark if not isinstance(self.benchmark, str) else self._made(place)
            with quiet("avalanche"):
                return benchmark_rows(benchmark, self.train, self.test, self.overlap)

    def _made(self, place: Place) -> Any:
        function = classic(self.benchmark)
        parameters = inspect.signature(function).parameters
        arguments = dict(self.model_extra or {})
        where = f"the source 'avalanche', {self.benchmark}"
        for name in arguments:
            if name not in parameters:
                raise SpecError(f"{where}: {unknown('argument', name, parameters.keys() - {'dataset_root'})}")
        lacking = [name for name, p in parameters.items() if p.default is p.empty and name not in arguments]
        if lacking:
            raise SpecError(f"{where}: the argument '{lacking[0]}' is missing: add it.")
        if "seed" in parameters and arguments.get("fixed_class_order") is None:
            arguments.setdefault("seed", 0)
        root = place.data or data_folder() or cache_folder()
        try:
            with quiet("avalanche"), contextlib.redirect_stdout(io.StringIO()):
                return function(**arguments, dataset_root=root)
        except (TypeError, ValueError, AssertionError, IndexError, KeyError) as error:
            raise SpecError(f"{where} refuses these arguments ({_line(error)}): change them.") from error
        except (OSError, RuntimeError, ImportError) as error:
            raise StreamError(
                f"{where}: its data could not be read or fetched in '{root}' ({_line(error)}): name the folder that holds "
                "them with --data or CONTINUAL_DATA."
            ) from error


def classic(name: str) -> Callable[..., Any]:
    """Avalanche's function for a classic benchmark.

    Raises:
        SpecError: there is none of that name, or Avalanche is not installed.
    """
    imported("avalanche")
    with quiet("avalanche"):
        found = vars(importlib.import_module("avalanche.benchmarks.classic"))
    known = {
        key: value
        for key, value in found.items()
        if not key.startswith("_")
        and inspect.isfunction(value)
        and "dataset_root" in inspect.signature(value).parameters
    }
    if name not in known:
        raise SpecError(f"the source 'avalanche': {unknown('benchmark', name, known)}")
    function: Callable[..., Any] = known[name]
    return function


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
