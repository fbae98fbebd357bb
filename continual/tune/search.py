"""The search: one trial after another, each a whole run over the tuning's rows; cut off anywhere and gone on with.

Trial 0 is the strategy as it is, those that follow are proposed from the trials before (``propose.py``). A search that was cut off
proposes what the uncut one would have; a trial that was cut off is made again. Settings that were tried before are not
run twice: the same seed gives the same score.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from continual import provenance
from continual.disk import alone
from continual.errors import CompositionError, SpecError, StateError, TrainingError
from continual.kinds import Scenario
from continual.learner import Learner
from continual.models.build import gives_features
from continual.objective import PRIMARY
from continual.strategy import Strategy
from continual.streams.spec import read_stream_spec
from continual.streams.stream import Stream
from continual.tune.propose import sampler
from continual.tune.record import CHOSEN, Trial, begin, best_of, write
from continual.tune.rows import tuning_stream
from continual.tune.space import check_space, default_space, own_settings, read_space

EXPERIENCES, SHARE, TRIALS = 3, 0.2, 20
Model = str | Mapping[str, Any] | nn.Module


@dataclass(frozen=True)
class Tuned:
    """What a tuning found.

    Attributes:
        path: of ``tuned.yaml``.
        statement: which rows were looked at, in one sentence.
        finished: whether all trials that were asked for have been made; if not, the time was up.
    """

    best: Trial
    trials: tuple[Trial, ...]
    path: Path
    statement: str
    finished: bool


def tune(
    stream: str | Path | Mapping[str, Any] | Stream,
    strategy: str | Path | Mapping[str, Any] | Strategy,
    *,
    out: Path,
    search: Sequence[str] = (),
    trials: int = TRIALS,
    timeout: float | None = None,
    experiences: int = EXPERIENCES,
    share: float = SHARE,
    seed: int = 0,
    data: Path | None = None,
    model: Model | None = None,
    scenario: Scenario | None = None,
    device: str = "auto",
    overrides: Mapping[str, Any] | None = None,
    on_trial: Callable[[Trial], None] | None = None,
) -> Tuned:
    """Choose settings of a strategy on valid rows of the first experiences of a stream.

    Args:
        out: folder of the tuning; one that is there already is gone on with.
        search: what :func:`~continual.tune.space.read_space` takes; empty for the default space.
        trials: how many in all, those made before included.
        timeout: seconds after which no further trial begins; None for no limit.
        experiences: how many of the stream's, from the first on.
        share: of the training rows that is split off where there are no valid rows.
        seed: of the stream, of every trial, and of the search.
        overrides: dotted key → value, the same in all trials and in what comes out.
        on_trial: called after each trial, those made before included.

    Raises:
        SpecError: the extra ``tune`` is missing, or a setting or value of the search cannot be.
        StateError: ``out`` holds something else, or is in use.
        TrainingError: no trial gave a score.
    """
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise StateError(
            "a tuning is one process, and this is one of several that were started together: call it alone."
        )
    propose = sampler()
    fixed = dict(overrides or {})
    base = Strategy.load(strategy, overrides=fixed)
    space = read_space(search) or default_space(base)
    check_space(strategy, fixed, space)
    full = stream if isinstance(stream, Stream) else _loaded(stream, base, model, data, seed, scenario)
    rows = tuning_stream(full, experiences, share, seed, stops_early=base.training.early_stopping is not None)
    given = model if model is not None else (full.model or "mlp")
    request = {
        "format": 1,
        "stream": full.name,
        "rows": rows.fingerprint(),
        "strategy_fingerprint": base.fingerprint(),
        "search": {dimension.key: str(dimension) for dimension in space},
        "experiences": len(rows),
        "seed": seed,
        "model": given if isinstance(given, str | Mapping) else type(given).__qualname__,
    }
    statement = _statement(full, rows, share)
    keys = [dimension.key for dimension in space]
    with alone(Path(out), "tuning"):
        found = begin(Path(out), request)
        for trial in found:
            if on_trial is not None:
                on_trial(trial)
        until = math.inf if timeout is None else time.monotonic() + timeout
        while len(found) < trials and time.monotonic() < until:
            settings = propose(space, found, seed) if found else own_settings(base, space)
            run = partial(_score, given, strategy, {**fixed, **settings} if found else fixed, rows, seed, device)
            found.append(_tried(settings, found, run))
            best = best_of(found)
            about = {**request, "statement": statement}
            chosen = None if best is None else _chosen(strategy, base, fixed, found, best, about)
            write(Path(out), found, keys, chosen)
            if on_trial is not None:
                on_trial(found[-1])
    best = best_of(found)
    if best is None:
        raise TrainingError(
            f"none of {len(found)} trials gave a score ({found[-1].message if found else 'the time was up before the first'}): "
            "search lower rates, or see trials.csv."
        )
    return Tuned(best, tuple(found), Path(out) / CHOSEN, statement, len(found) >= trials)


def _loaded(
    stream: str | Path | Mapping[str, Any],
    strategy: Strategy,
    model: Model | None,
    data: Path | None,
    seed: int,
    scenario: Scenario | None,
) -> Stream:
    spec, _ = read_stream_spec(stream)
    base = model if model is not None else (spec.model or "mlp")
    strategy.check(objective=spec.objective, gives_features=gives_features(base, spec.objective))
    return Stream.load(stream, data=data, seed=seed, scenario=scenario)


def _score(model: Model, source: Any, overrides: dict[str, Any], rows: Stream, seed: int, device: str) -> float:
    strategy = Strategy.load(source, overrides=overrides)
    learner = Learner(model, strategy, seed=seed, device=device, progress=False)
    value = learner.run(rows).result["metrics"]["accuracy"]
    if value is None:
        raise TrainingError("it gave no score.")
    return float(value)


def _tried(settings: dict[str, Any], before: Sequence[Trial], run: Callable[[], float]) -> Trial:
    number = len(before)
    same = next((one for one in before if one.settings == settings), None)
    if same is not None:
        return Trial(number, settings, same.score, same.message or f"as trial {same.number}")
    started, message = time.monotonic(), ""
    score: float | None = None
    try:
        score = run()
    except (TrainingError, CompositionError, SpecError) as error:
        message = " ".join(str(error).split())
    return Trial(number, settings, score, message, round(time.monotonic() - started, 3))


def _statement(full: Stream, rows: Stream, share: float) -> str:
    split = any(one.valid is None or not len(one.valid) for one in full[: len(rows)])
    count = sum(len(experience.test) for experience in rows if experience.test is not None)
    which = f"{share:.0%} of the training rows, split off by their ids" if split else "the stream's own"
    of = f"the first {len(rows)} of" if len(rows) < len(full) else "all"
    return (
        f"Chosen by the {PRIMARY[full.objective]} on {count} valid rows ({which}) of {of} {len(full)} experiences of "
        f"'{full.name}'; no test row was looked at, and no later experience."
    )


def _chosen(
    source: Any, base: Strategy, fixed: dict[str, Any], found: Sequence[Trial], best: Trial, about: dict[str, Any]
) -> Strategy:
    """The strategy with the best settings, and where they come from."""
    chosen = Strategy.load(source, overrides={**fixed, **best.settings} if best.number else fixed)
    chosen.tuned = {
        "strategy": base.name,
        **{key: value for key, value in about.items() if key not in ("format", "model")},
        "trials": len(found),
        "failed": sum(trial.score is None for trial in found),
        "best_trial": best.number,
        "score": best.score,
        "score_of_trial_0": found[0].score,
        "commit": provenance.commit(),
        "optuna": importlib.metadata.version("optuna"),
    }
    return chosen
