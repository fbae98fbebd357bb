"""What the battery's tests share: a tiny stream, tiny strategies, and a run that is cut off."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from continual import Learner, Strategy, Stream
from continual.library import library_names
from continual.state import load_state

MODEL = {"kind": "mlp", "hidden": [16, 16]}
TOKENS = ["prefix", "prompt", "s-prompts"]
"""These need a transformer: tests/parts/test_prompts.py."""
STRATEGIES = [name for name in library_names("strategies") if name not in TOKENS]
ENGINES = [name for name in STRATEGIES if Strategy.load(name).engine is not None]
"""They cannot be saved, nor gone on with."""
SMALL: dict[str, Any] = {"training.batch_size": 8, "training.lr": 0.05}

SMALL_ENGINE = {
    "mem_size": 20, "memory_size": 20, "patterns_per_exp": 8, "sample_size": 8, "batch_size_mem": 8, "subsample": 16,
}  # fmt: skip
SMALL_REPLAY: dict[str, Any] = {"capacity": 20, "per_class": None, "hidden": [16], "latent": 4, "threshold": 0.0}
SMALL_HEAD: dict[str, Any] = {"dimension": 60, "iterations": 40, "hidden": [16], "latent": 4, "samples": 5}


def small(name: str) -> Strategy:
    """The library's strategy with few epochs, small batches, a small memory or generator, and few random features."""
    strategy = Strategy.load(name)
    overrides = dict(SMALL)
    overrides["training.epochs"] = 2
    for part in strategy.prototypes:
        known = type(part.settings).model_fields
        sizes = {"replay": SMALL_REPLAY, "head": SMALL_HEAD}.get(part.slot, {})
        overrides |= {f"{part.slot}.{key}": value for key, value in sizes.items() if key in known}
    if strategy.engine is not None:
        given = strategy.engine.settings.arguments  # type: ignore[attr-defined]
        overrides |= {f"engine.arguments.{key}": value for key, value in SMALL_ENGINE.items() if key in given}
    if any(part.name == "adapter/adalora" for part in strategy.prototypes):
        overrides |= {"adapter.init_rank": 4, "adapter.target_rank": 2}
    return Strategy.load(name, overrides=overrides)


def tiny_stream(scenario: str = "class", experiences: int = 3, seed: int = 0) -> Stream:
    """The digits, two classes at a time, cut to ``experiences`` and to every third training row."""
    found = []
    stream = Stream.load("split-digits", seed=seed, scenario=scenario)[:experiences]
    for experience in stream:
        found.append(replace(experience, train=experience.train.select(torch.arange(0, len(experience.train), 3))))
    return Stream.from_experiences(found, name=stream.name, scenario=stream.scenario)


def learner_for(strategy: str | Strategy, *, model: Any = MODEL, **options: Any) -> Learner:
    chosen = small(strategy) if isinstance(strategy, str) else strategy
    return Learner(model, chosen, **{"seed": 3, "device": "cpu", "progress": False, **options})


def weights(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}


def same_weights(one: Learner, other: Learner) -> None:
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), f"{name} differs"


def figures(result: dict[str, Any]) -> dict[str, Any]:
    """A result without times and memory."""
    kept = {key: value for key, value in result.items() if key not in ("cost", "provenance")}
    cost = {key: result["cost"][key] for key in ("rows_trained", "state_bytes", "trainable_parameters")}
    return {**kept, "cost": cost}


class CutOff(Exception):  # noqa: N818
    """Stands for a kill."""


def run_with_cuts(
    strategy: str, stream: Stream, folder: Path, cuts: list[int], save_every: int = 3, model: Any = MODEL
) -> Learner:
    """Run to the end, thrown away at the given numbers of checkpoints and begun again from what lies on the disk."""
    learner = learner_for(strategy, model=model, folder=folder, save_every=save_every)
    pending = list(cuts)
    while True:
        if pending:
            _cut_after(learner, pending.pop(0))
        try:
            learner.run(stream)
            return learner
        except CutOff:
            if not folder.exists():
                learner = learner_for(strategy, model=model, folder=folder, save_every=save_every)
                continue
            load_state(folder)
            learner = Learner.load(folder, folder=folder, save_every=save_every, device="cpu", progress=False)


def _cut_after(learner: Learner, checkpoints: int) -> None:
    write = learner._checkpoint
    done = 0

    def counting(progress: Any) -> None:
        nonlocal done
        write(progress)
        done += 1
        if done >= checkpoints:
            raise CutOff

    learner._checkpoint = counting  # type: ignore[method-assign]
