"""What the tests of several processes run: each job in every process, and once more alone, to be compared.

:func:`main` is one of the processes. It does every job of :data:`JOBS` and saves what each gave as
``FOLDER/results/<job>/<rank>``; files that a job shares with the other processes lie under ``FOLDER/work/<job>``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from battery import MODEL, CutOff, _cut_after, learner_for, small, tiny_stream
from filelock import FileLock
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import continual.learner.saving as saving
import continual.run as run
from continual import Learner, Strategy
from continual.errors import ContinualError
from continual.learner.core import trackers
from continual.models.model import Model
from continual.models.output import Output
from continual.models.transformer import LanguageModel, PooledTransformer
from continual.parts.part import Context, Part, Slot
from continual.spec import Spec
from continual.state import save_state
from continual.streams.experience import Experience
from continual.table import Batch, Ragged, TensorTable

RANK = int(os.environ.get("RANK", "0"))
State = dict[str, Any]
TRAINING = {"optimizer": "sgd", "lr": 0.05, "batch_size": 8, "epochs": 2}


def state_of(learner: Learner) -> State:
    """Everything that a checkpoint holds, but times."""
    state = learner._state(with_tests=True)
    assert set(state) > {"cost", "started", "weights", "optimizer", "randomness", "parts", "monitor"}
    return {key: value for key, value in state.items() if key not in ("cost", "started")} | {
        "rows_trained": learner.cost["rows_trained"]
    }


def one_epoch(name: str) -> Strategy:
    return Strategy.load(small(name), overrides={"training.epochs": 1})


def named(name: str) -> Callable[[Path], State]:
    def job(folder: Path) -> State:
        learner = learner_for(one_epoch(name))
        learner.run(tiny_stream(experiences=2))
        return state_of(learner)

    return job


def accumulate(folder: Path) -> State:
    """Uneven shares, several passes a step, clipping, Adam, rows kept step by step and weighed, classes by place in the batch."""
    strategy = Strategy.load(
        {
            "replay": {"kind": "rehearsal", "capacity": 20, "insert": "step", "weighting": "experiences"},
            "training": {
                "optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.1, "batch_size": 7, "epochs": 1, "accumulate": 3,
                "clip": 0.5, "schedule": "cosine", "warmup": 0.1, "active": "asymmetric",
            },
        }
    )  # fmt: skip
    learner = learner_for(strategy)
    learner.run(tiny_stream(experiences=2))
    return state_of(learner)


def last_batch_of_one(folder: Path) -> State:
    """The last batch of each epoch has one row, so that one process has none."""
    learner = learner_for(Strategy.load({"training": TRAINING}))
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        learner.update((torch.randn(17, 5, generator=generator), torch.arange(17) % 3))
    return state_of(learner)


class Coupled(Part):
    """Terms that no sum over the rows of a batch gives, and a hook that remembers what it saw."""

    class Settings(Spec):
        kind: Literal["coupled"] = "coupled"

    slot: ClassVar[Slot] = "distillation"

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.seen = torch.zeros(0)
        self.rows_seen = 0

    def begin(self, context: Context, experience: Experience) -> None:
        self.fixed = experience.train[torch.arange(5)]

    def loss(self, batch: Batch, output: Output) -> Tensor:
        assert output.features is not None and len(output.features) == len(batch["labels"])
        spread = torch.cdist(output.features, output.features).mean() - output.logits.var(0, correction=0).mean()
        size = sum(parameter.square().sum() for parameter in self.context.parameters().values())
        return 0.1 * spread + 0.01 * size + 0.1 * self.context.forward(self.fixed).logits.square().mean()

    def after_step(self, batch: Batch, output: Output) -> None:
        assert len(output.logits) == len(batch["labels"]) and not output.logits.requires_grad
        self.seen = output.logits.mean(0)
        self.rows_seen += self.context.current_rows

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "rows": self.rows_seen}


def coupled(folder: Path) -> State:
    strategy = Strategy.load(
        {
            "distillation": {"kind": "distributed_jobs:Coupled"},
            "replay": {"kind": "rehearsal", "capacity": 20},
            "training": {**TRAINING, "lr": 0.01, "epochs": 1},
        }
    )
    learner = learner_for(strategy)
    learner.run(tiny_stream(experiences=2))
    return state_of(learner)


class Forked(nn.Module):
    """Each row goes one of two ways, so that a process may have a gradient that another one lacks.

    One layer is never used, and one does not train.
    """

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.never = nn.Linear(5, 3), nn.Linear(5, 3), nn.Linear(5, 3)
        self.fixed = nn.Linear(5, 5).requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        goes_left = inputs[:, 0] > 0.7
        inputs, logits = self.fixed(inputs), inputs.new_zeros(len(inputs), 3)
        for side, rows in ((self.left, goes_left), (self.right, ~goes_left)):
            if bool(rows.any()):
                logits = logits.index_put((rows.nonzero().flatten(),), side(inputs[rows]))
        return logits


def own_module(folder: Path) -> State:
    """Made with other weights in each process; those of the main one hold."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANK)
        model = Forked()
    training = {**TRAINING, "optimizer": "adamw", "weight_decay": 0.5, "batch_size": 3}
    learner = learner_for(Strategy.load({"training": training}))
    learner._model_spec = model
    generator = torch.Generator().manual_seed(0)
    learner.update((torch.randn(30, 5, generator=generator), torch.arange(30) % 3))
    return state_of(learner)


def batch_norm(folder: Path) -> State:
    """Running means are each process's own while it trains, and one alone is kept."""
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    learner = learner_for(Strategy.load({"training": TRAINING}), monitor=True)
    learner._model_spec = model
    generator = torch.Generator().manual_seed(0)
    learner.update((torch.randn(32, 5, generator=generator), torch.arange(32) % 3))
    return state_of(learner)


def early_stopping(folder: Path) -> State:
    strategy = Strategy.load({"training": {**TRAINING, "lr": 0.5, "epochs": 30, "early_stopping": {"patience": 2}}})
    learner = learner_for(strategy)
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(64, 5, generator=generator), torch.arange(64) % 3
    update = learner.update((inputs[:40], labels[:40]), valid=(inputs[40:], labels[40:]))
    return {**state_of(learner), "stopped": update.stopped_early, "steps": update.steps}


def transformer(family: Literal["bert", "llama"]) -> Model:
    """A tiny one, the same at every call."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        if family == "bert":
            base: nn.Module = PooledTransformer(BertModel(BertConfig(vocab_size=64, **quiet, **sizes)), "mean")
        else:
            base = LanguageModel(LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)), seq2seq=False)
    return Model(
        base,
        gives_features=family == "bert",
        objectives=("classification",) if family == "bert" else ("causal-lm",),
        spec={"kind": "object", "class": family},
        feature_size=16 if family == "bert" else None,
    )


def tokens(index: int, objective: Any) -> Experience:
    """Rows of 2 to 6 tokens."""
    generator = torch.Generator().manual_seed(index)
    rows = [torch.randint(1, 64, (2 + n % 5,), generator=generator).tolist() for n in range(21)]
    labels = Ragged.from_lists(rows, -100) if objective == "causal-lm" else torch.arange(21) % 4
    table = TensorTable(
        {"input_ids": Ragged.from_lists(rows, 0), "labels": labels, "row": torch.arange(21) + 100 * index}
    )
    classes = () if objective == "causal-lm" else (0, 1, 2, 3)
    names = ("a", "b", "c", "d") if classes else ()
    return Experience(
        index, f"task {index}", table, classes=classes, class_names=names, objective=objective, scenario="domain"
    )


def adapted(family: Literal["bert", "llama"], **parts: Any) -> Callable[[Path], State]:
    objective: Any = "causal-lm" if family == "llama" else "classification"

    def job(folder: Path) -> State:
        strategy = Strategy.load({**parts, "training": TRAINING})
        learner = learner_for(strategy, objective=objective, scenario="domain")
        learner._model_spec = transformer(family)
        for index in range(3):
            learner.update(tokens(index, objective))
        return state_of(learner)

    return job


def divided(folder: Path) -> State:
    """How many rows went through the model in this process, and what dropout made of rows that are all the same."""
    seen: list[Tensor] = []
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(40, 2, bias=False))
    model.register_forward_hook(
        lambda module, inputs, output: seen.append(output.detach()) if module.training else None
    )
    learner = learner_for(Strategy.load({"training": TRAINING}))
    learner._model_spec = model
    update = learner.update((torch.ones(25, 40), torch.arange(25) % 2))
    return {"rows": [len(output) for output in seen], "all": update.rows, "first": seen[0], "second": seen[1]}


def uncut(folder: Path) -> State:
    """With dropout, which each process draws for itself."""
    learner = learner_for(one_epoch("rehearsal"), folder=folder / "checkpoint", save_every=5)
    learner._model_spec = {**MODEL, "dropout": 0.3}
    learner.run(tiny_stream(experiences=2))
    return state_of(learner)


def cut(folder: Path) -> State:
    """The same as :func:`uncut`, thrown away three times and gone on with from what lies on the disk."""
    place = folder / "checkpoint"
    learner = learner_for(one_epoch("rehearsal"), folder=place, save_every=5)
    learner._model_spec = {**MODEL, "dropout": 0.3}
    for checkpoints in (3, 5, 3):
        _cut_after(learner, checkpoints)
        try:
            learner.run(tiny_stream(experiences=2))
        except CutOff:
            learner = Learner.load(place, folder=place, save_every=5, device="cpu", progress=False)
            continue
        raise AssertionError("it was to be cut off")
    learner.run(tiny_stream(experiences=2))
    return state_of(learner)


def cells(folder: Path) -> State:
    """Runs in a folder; whoever writes there and is not the main process fails."""

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("only the main process writes")

    kept = {(module, name): getattr(module, name) for module, name in WRITERS}
    if RANK:
        for module, name in WRITERS:
            setattr(module, name, forbidden)
    told: list[str] = []
    out = folder / "cell"
    options: dict[str, Any] = {"seed": 2, "out": out, "device": "cpu", "save_every": 5, "progress": False}
    options["track"] = "tensorboard" if "tensorboard" in trackers() else None
    options["on_update"] = lambda update: told.append(update.name)
    mlp = {"kind": "mlp", "hidden": [8]}
    strategy = {"adapter": {"kind": "lora", "rank": 2}, "training": {**TRAINING, "batch_size": 32, "epochs": 1}}
    try:
        first = run.run_cell("split-digits", strategy, model=mlp, **options)
        there = sorted(
            path.relative_to(out).as_posix()
            for path in out.rglob("*")
            if path.name != ".lock" and "tracking" not in path.parts
        )
        again = run.run_cell("split-digits", strategy, model=mlp, resume=True, **options)
        refused = said(lambda: run.run_cell("split-digits", strategy, model=mlp, **options))
        lock = FileLock(folder / "cell" / ".lock")
        if not RANK:
            lock.acquire()
        locked = said(lambda: run.run_cell("split-digits", strategy, model=mlp, resume=True, **options))
        lock.release()
    finally:
        for (module, name), writer in kept.items():
            setattr(module, name, writer)
    return {
        "told": told,
        "tracked": len(list((out / "tracking").rglob("events.*"))) if options["track"] else None,
        "files": there,
        "processes": first["provenance"]["processes"],
        "matrix": first["matrix"],
        "same": again["matrix"] == first["matrix"],
        "refused": refused,
        "locked": locked,
    }


WRITERS = [(run, "write_text"), (run, "_write_scores"), (saving, "save_state"), (saving, "export_adapter")]


def mistakes(folder: Path) -> State:
    """What must be said in every process alike, and keep none of them waiting."""
    plain = Strategy.load({"training": TRAINING})
    inputs, labels = torch.randn(16, 5, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3
    spoilt = inputs.clone()
    spoilt[3] = 3e38
    (folder / "file").touch()
    found = {
        "not finite": said(lambda: learner_for(plain).update((spoilt, labels))),
        "checkpoint": said(lambda: learner_for(plain, folder=folder / "file" / "x").update((inputs, labels))),
        "save": said(lambda: _trained(plain, inputs, labels).save(folder / "file" / "y")),
    }
    if "RANK" in os.environ:
        found |= {
            "rows": said(lambda: learner_for(plain).update((inputs[RANK::2], labels[RANK::2]))),
            "seed": said(lambda: learner_for(plain, seed=RANK).update((inputs, labels))),
        }
    return found


def _trained(strategy: Strategy, inputs: Tensor, labels: Tensor) -> Learner:
    learner = learner_for(strategy)
    learner.update((inputs, labels))
    return learner


def said(work: Callable[[], Any]) -> str:
    try:
        work()
    except ContinualError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


NAMED = (
    "naive",
    "rehearsal",
    "ewc-rehearsal",
    "der-plus-plus",
    "mir",
    "agem",
    "si",
    "lwf",
    "generative-replay",
    "gaussian-replay",
)
LORA = {"kind": "lora", "rank": 2}
ADALORA = {"kind": "adalora", "init_rank": 4, "target_rank": 2}
AS_ONE: dict[str, Callable[[Path], State]] = {
    **{name: named(name) for name in NAMED},
    "accumulate": accumulate,
    "last batch of one": last_batch_of_one,
    "coupled": coupled,
    "own module": own_module,
    "early stopping": early_stopping,
    "lora merged": adapted("bert", adapter={**LORA, "across_tasks": "merge"}, replay={"kind": "rehearsal", "capacity": 9}),
    "lora stacked": adapted("llama", adapter={**LORA, "across_tasks": "stack"}, replay={"kind": "rehearsal", "capacity": 9}),
    "adalora": adapted("bert", adapter=ADALORA, penalty={"kind": "ewc", "strength": 10.0}),
}  # fmt: skip
"""Jobs that give in several processes what they give in one."""
JOBS = {
    **AS_ONE,
    "batch norm": batch_norm,
    "divided": divided,
    "uncut": uncut,
    "cut": cut,
    "cells": cells,
    "mistakes": mistakes,
}


def do(job: str, folder: Path) -> State:
    place = folder / "work" / job
    place.mkdir(parents=True, exist_ok=True)
    return JOBS[job](place)


def main(folder: Path) -> None:
    for job in JOBS:
        save_state(folder / "results" / job / str(RANK), do(job, folder))
