"""The settings of the next trial, by the tree-structured Parzen estimator of optuna.

Source: Bergstra et al. 2011 (NeurIPS), as optuna has it (Akiba et al. 2019, arXiv 1907.10902): the first ten trials at random,
then where good ones are dense and bad ones are not. What it draws depends on the seed, the number of the trial and the trials before
it, and on nothing that a process would have to remember.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from continual.errors import SpecError
from continual.randomness import derive_seed
from continual.tune.record import Trial
from continual.tune.space import Dimension

Propose = Callable[[Sequence[Dimension], Sequence[Trial], int], dict[str, Any]]


def sampler() -> Propose:
    """Proposes the settings of the next trial from the dimensions, the trials before it and a seed.

    Raises:
        SpecError: optuna is not there.
    """
    try:
        import optuna
    except ImportError as error:
        raise SpecError(
            "tuning needs optuna, which is not installed: install the extra 'continual-memory[tune]'."
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kinds = optuna.distributions

    def distribution(one: Dimension) -> Any:
        if one.kind == "choice":
            return kinds.CategoricalDistribution(one.choices)
        if one.kind == "int":
            return kinds.IntDistribution(int(one.low), int(one.high))
        return kinds.FloatDistribution(one.low, one.high, log=one.kind == "log")

    def propose(space: Sequence[Dimension], before: Sequence[Trial], seed: int) -> dict[str, Any]:
        axes = {one.key: distribution(one) for one in space}
        draws = derive_seed(seed, f"tune trial {len(before)}") % 2**32
        study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=draws))
        for trial in before:
            if trial.score is not None and all(one.holds(trial.settings[one.key]) for one in space):
                study.add_trial(optuna.trial.create_trial(params=trial.settings, distributions=axes, value=trial.score))
        proposed = study.ask(axes).params
        return {one.key: one.rounded(proposed[one.key]) for one in space}

    return propose
