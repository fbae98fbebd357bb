"""Avalanche, both ways (Carta et al. 2023, JMLR 24; extra ``avalanche``).

* :func:`stream_from`: an Avalanche benchmark as a stream of ours; in YAML ``source: {kind: avalanche, benchmark: SplitMNIST, …}``.
* :func:`benchmark_from`: a stream of ours as an Avalanche benchmark.
* :func:`as_plugin`: our replay and penalties in a user's Avalanche script.
* ``engine: {kind: avalanche, strategy: EWC, …}`` in a strategy file: an Avalanche strategy under our learner and monitor
  (:mod:`~continual.interop.avalanche.engine`).

Avalanche is imported at the first call, without its warnings and without what it patches (:mod:`continual.foreign`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from continual.foreign import imported, quiet
from continual.kinds import Objective, Scenario
from continual.streams.stream import Stream

if TYPE_CHECKING:
    from continual.parts.part import Part

__all__ = ["as_plugin", "benchmark_from", "stream_from"]


def stream_from(
    benchmark: Any,
    *,
    name: str | None = None,
    scenario: Scenario | None = None,
    order: Literal["given", "random"] | list[str | int] = "given",
    overlap: Literal["refuse", "drop"] = "refuse",
    train: str | None = None,
    test: str | None = None,
    seed: int = 0,
) -> Stream:
    """An Avalanche benchmark as a stream, one experience for each of its own.

    Args:
        benchmark: any object with ``streams``: classic, made of data sets, online.
        name: of the stream; None: that of the benchmark's class.
        scenario: None takes the one that the experiences look like
            (:func:`~continual.streams.sources.experiences.benchmark_rows`).
        order: of the experiences; ``random`` draws it by ``seed``.
        overlap: ``drop`` leaves out training rows with the content of a test row.
        train, test: names of the benchmark's streams.

    Raises:
        StreamError: it lacks a stream, or its rows are no tensors of one shape.
    """
    settings = {
        "name": name or type(benchmark).__name__,
        "source": {"kind": "avalanche", "benchmark": benchmark, "overlap": overlap, "train": train, "test": test},
        "split": {"by": "experience", "order": order},
        "scenario": scenario,
    }
    return Stream.load(settings, seed=seed)


def benchmark_from(stream: Stream) -> Any:
    """A stream as an Avalanche benchmark with ``train_stream`` and ``test_stream`` (and ``valid_stream`` where there is one).

    Labels are our class ids, in order of arrival from 0. In the scenario ``task`` the task label of a row is the index of the
    experience that its class belongs to, elsewhere 0. Each data set has an attribute ``row`` with our row ids.

    Raises:
        StreamError: rows of text or tokens, or an objective without classes.
        SpecError: Avalanche is not installed.
    """
    imported("avalanche")
    with quiet("avalanche"):
        from continual.interop.avalanche.benchmark import make_benchmark

        return make_benchmark(stream)


def as_plugin(
    *parts: Part,
    seed: int = 0,
    scenario: Scenario = "class",
    objective: Objective = "classification",
) -> Any:
    """Our parts as one plugin of a user's Avalanche strategy: ``Naive(..., plugins=[as_plugin(EWC(strength=10.0))])``.

    Args:
        parts: of the slots ``replay``, ``penalty``, ``distillation`` and ``projection``.
        seed: root of what they draw; the process-wide generators are neither read nor changed.
        scenario, objective: what parts are told of the training.

    Raises:
        CompositionError: a part that cannot work as a plugin.
        SpecError: Avalanche is not installed.
    """
    imported("avalanche")
    with quiet("avalanche"):
        from continual.interop.avalanche.plugin import make_plugin

        return make_plugin(parts, seed=seed, scenario=scenario, objective=objective)
