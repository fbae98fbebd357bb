"""The strategies for language models on a tiny random one; those that need a head say so before any data is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from battery import STRATEGIES, figures, learner_for, run_with_cuts, same_weights
from safetensors.torch import load_file, save_file
from text_bench import WORDS, tiny_gpt2

from continual import Stream
from continual.errors import CompositionError, SpecError, StateError
from continual.models.build import build_model, gives_features
from continual.run import run_cell
from continual.strategy import Strategy
from continual.study import Study

LANGUAGE = [name for name in STRATEGIES if name.startswith("lm-")]

# peft 0.21 reads an attribute that transformers 5.23 has deprecated (seen November 2026).
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gpt2(tmp_path_factory.mktemp("gpt2"))


def texts(offset: int) -> list[dict[str, Any]]:
    """Sentences of three topics, which are the domains."""
    return [
        {
            "text": " ".join(WORDS[4 * topic + (row * step + offset) % 4] for step in range(1, 6)) + f" {row}",
            "topic": topic,
        }
        for topic in range(3)
        for row in range(offset, offset + 12)
    ]


@pytest.fixture
def stream(tmp_path: Path, folder: Path) -> Path:
    """A stream of three topics in files beside its YAML."""
    for part, offset in (("train", 0), ("test", 100)):
        lines = [json.dumps({**row, "topic": f"topic {row['topic']}"}) for row in texts(offset)]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    content = {
        "source": {"kind": "files", "train": "train.jsonl", "test": "test.jsonl", "text": "text", "domain": "topic"},
        "split": {"by": "domain"},
        "scenario": "domain",
        "objective": "causal-lm",
        "model": {"kind": "pretrained", "name": str(folder), "max_length": 16},
    }
    (tmp_path / "talk.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return tmp_path / "talk.yaml"


@pytest.mark.parametrize("name", LANGUAGE)
def test_same_seed_same_result_and_cut_and_resumed_equals_uncut(name: str, stream: Path, tmp_path: Path) -> None:
    loaded = Stream.load(stream)
    model = loaded.model
    whole, again = learner_for(name, model=model), learner_for(name, model=model)
    uncut = whole.run(loaded)
    assert figures(again.run(loaded).result) == figures(uncut.result)
    same_weights(whole, again)
    cut = run_with_cuts(name, loaded, tmp_path / "checkpoint", [2, 3], model=model)
    same_weights(whole, cut)
    assert figures(cut.run(loaded).result) == figures(uncut.result)
    held = [len(part.rows()) for part in whole.parts if part.slot == "replay"]
    assert held == ([20] if "rehearsal" in name else [])


def test_a_memory_of_text_forgets_less_than_none(stream: Path) -> None:
    loaded = Stream.load(stream)
    ended = {}
    for name in LANGUAGE:
        overrides = {"training.lr": 0.05, "training.epochs": 10, "training.batch_size": 8}
        learner = learner_for(Strategy.load(name, overrides=overrides), model=loaded.model)
        ended[name] = learner.run(loaded).result["metrics"]["bwt"]
    assert ended["lm-lora-rehearsal"] > ended["lm-lora"] + 0.02


@pytest.mark.parametrize("name", [name for name in LANGUAGE if "lora" in name])
def test_a_run_in_a_folder_exports_its_adapter(name: str, stream: Path, tmp_path: Path) -> None:
    result = run_cell(
        stream, name, out=tmp_path / "run", device="cpu", overrides={"training.epochs": 1}, progress=False
    )
    assert result["score"] == "log-likelihood per token" and len(result["matrix"]) == 3
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()


@pytest.mark.parametrize("across", ["continue", "separate"])
@pytest.mark.parametrize("kind", ["lora", "prompt", "prefix"])
def test_adapters_kept_apart_and_virtual_tokens_on_a_language_model(
    kind: str, across: str, stream: Path, tmp_path: Path
) -> None:
    loaded = Stream.load(stream)
    settings = {"kind": kind, "across_tasks": across, **({} if kind == "lora" else {"tokens": 5})}
    content = {**Strategy.load("lm-lora", overrides={"training.batch_size": 4}).to_dict(), "adapter": settings}
    strategy = Strategy.load({**content, "name": "apart"})
    whole = learner_for(strategy, model=loaded.model)
    uncut = whole.run(loaded)
    cut = run_with_cuts(strategy, loaded, tmp_path / "checkpoint", [2, 3], model=loaded.model)  # type: ignore[arg-type]
    same_weights(whole, cut)
    assert figures(cut.run(loaded).result) == figures(uncut.result)
    folder = whole.export(tmp_path / "adapter")
    folder = folder / "2" if across == "separate" else folder
    assert (folder / "adapter_config.json").is_file()


def test_a_finished_run_on_other_weights_is_not_given_back(stream: Path, folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "base"
    shutil.copytree(folder, model)
    given: dict[str, Any] = {"out": tmp_path / "run", "device": "cpu", "model": str(model), "progress": False}
    given["overrides"] = {"training.epochs": 1}
    result = run_cell(stream, "lm-lora", **given)
    assert run_cell(stream, "lm-lora", resume=True, **given) == result
    weights = load_file(model / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(StateError, match="holds a run on another base model"):
        run_cell(stream, "lm-lora", resume=True, **given)


REFUSED = [
    ("causal-lm", "lora", "head/linear does not work for causal-lm", "--set head=null"),
    ("causal-lm", "frozen", "head/nearest-mean does not work for causal-lm", "--set head=null"),
    ("causal-lm", "rehearsal", "with select: class-balanced needs one class a row", "take select: reservoir"),
    ("regression", "frozen", "head/nearest-mean does not work for regression", "--set head=null"),
    ("regression", "rehearsal", "with select: class-balanced needs one class a row", "take select: reservoir"),
    ("regression", "lora", "init 'mean' needs classes", "--set head.init=uniform"),
]


@pytest.mark.parametrize(("objective", "strategy", "said", "remedy"), REFUSED)
def test_what_cannot_work_is_refused_before_any_data_is_read(
    objective: str, strategy: str, said: str, remedy: str, tmp_path: Path
) -> None:
    content = {
        "source": {"kind": "files", "path": "nowhere"},
        "split": {"by": "domain"},
        "scenario": "domain",
        "objective": objective,
    }
    (tmp_path / "talk.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({"streams": ["talk.yaml"], "strategies": [strategy]}))
    with pytest.raises(SpecError, match=r"strategy '\w+' on stream 'talk'") as caught:
        Study.load(tmp_path / "study.yaml")
    assert said in str(caught.value) and remedy in str(caught.value)
    with pytest.raises(CompositionError) as refused:
        run_cell(tmp_path / "talk.yaml", strategy, out=tmp_path / "run")
    assert said in str(refused.value) and remedy in str(refused.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("strategy", "overrides"),
    [
        ("ewc", {"penalty.labels": "all"}),
        ("agem", {"projection.select": "class-balanced"}),
        ("rehearsal", {"replay.select": "ring", "replay.capacity": None, "replay.per_class": 2}),
    ],
)
def test_settings_that_need_classes_are_refused_without(strategy: str, overrides: dict[str, Any]) -> None:
    chosen = Strategy.load(strategy, overrides=overrides)
    chosen.check(objective="classification", gives_features=True)
    with pytest.raises(CompositionError):
        chosen.check(objective="regression", gives_features=True)


def test_the_remedies_help(stream: Path, tmp_path: Path) -> None:
    overrides = {"head": None, "replay.per_class": None, "replay.select": "reservoir", "training.epochs": 1}
    overrides["training.head_lr"] = None
    run_cell(stream, "lora-rehearsal", out=tmp_path / "a", device="cpu", overrides=overrides, progress=False)
    strategy = Strategy.load("lora", overrides={"head.init": "uniform"})
    strategy.check(objective="regression", gives_features=True)
    choices = {"streams": ["talk.yaml"], "strategies": LANGUAGE}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(choices))
    assert len(Study.load(tmp_path / "study.yaml").cells()) == len(LANGUAGE)


def test_a_model_that_gives_logits_itself_is_known_before_it_is_made(folder: Path, tmp_path: Path) -> None:
    example = {"inputs": torch.zeros(2, 4)}
    module = {"kind": "module", "class": "torch.nn:Linear", "arguments": {"in_features": 4, "out_features": 2}}
    known = [
        ("mlp", "classification"),
        (module, "classification"),
        (str(folder), "causal-lm"),
        (str(folder), "regression"),
    ]
    for spec, objective in known:
        made = build_model(spec, objective=objective, example=example)  # type: ignore[arg-type]
        assert gives_features(spec, objective) == made.gives_features  # type: ignore[arg-type]
        assert gives_features(made, objective) == made.gives_features  # type: ignore[arg-type]
    (tmp_path / "study.yaml").write_text(
        yaml.safe_dump({"streams": ["split-digits"], "strategies": ["frozen"], "model": module})
    )
    with pytest.raises(SpecError, match=r"needs a model that gives features.*--set head=null"):
        Study.load(tmp_path / "study.yaml")
