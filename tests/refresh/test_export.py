"""Exports of every kind, used by somebody who has no `continual`: the code of each README, run as it stands there.

One long file, since every test reads the exports that are made, and run by a process of their own, once.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
import yaml
from battery import CutOff, _cut_after, learner_for, small, tiny_stream
from safetensors import safe_open
from safetensors.torch import load_file
from text_bench import text_stream, tiny_bert, tiny_gpt2
from torch import Tensor, nn
from torch.nn import functional as F

from continual import Learner, Strategy, Stream
from continual.disk import check_seal
from continual.errors import CompositionError, ModelError, StateError, TrainingError
from continual.models.transformer import pool
from continual.monitor.evaluation import evaluating
from continual.parts.adapter.export import total_folds
from continual.parts.head.class_sums import ClassSums
from continual.parts.head.closed_form import UNKNOWN, ClassScores
from continual.parts.head.lift import Lift
from continual.parts.head.linear import LinearHead
from continual.parts.head.nearest_mean import NearestMeans
from continual.parts.part import Part
from continual.randomness import Randomness
from continual.refresh import export
from continual.refresh.card import Card, render_card
from continual.refresh.export import export_model
from continual.refresh.plain.head import plain_head
from continual.refresh.records import Check, Data, Judgement, Measured
from continual.state import save_state
from continual.table import Batch, TensorTable

pytestmark = pytest.mark.filterwarnings(  # PEFT 0.21 passes what transformers 5.23 and 5.24 renamed (November 2026)
    "ignore:.*(is_gradient_checkpointing|past_key_values):FutureWarning"
)
TEXTS = ["red green", "blue one one two", "three", "warm cold wet dry " * 6, "up 7 down"]
"""Of different lengths; one is longer than the 16 tokens that the models keep."""
PLAIN = Card("a model")
SGD = {"optimizer": "sgd", "lr": 0.1, "epochs": 2, "batch_size": 8}


@dataclass
class Case:
    """A learner, what is called in the code of its export, and what must come back."""

    learner: Learner
    calls: list[Any]
    wanted: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    make: str = ""


@dataclass
class Places:
    """Folders of tiny models and a stream of text."""

    bert: Path
    gpt2: Path
    t5: Path
    stream: Stream
    tasks: Stream


def answers(learner: Learner, rows: Any, experience: int | None = None) -> dict[str, Any]:
    """What ``predict`` says, and the logits that it comes from."""
    found = learner.predict(rows, experience=experience)
    table = TensorTable({"text": rows}) if isinstance(rows, list) else rows
    table = TensorTable({"inputs": rows}) if isinstance(rows, Tensor) else table
    table = learner._encoded(table)
    batch = table[torch.arange(len(table))]
    if experience is not None:
        batch["experience"] = torch.full((len(table),), experience)
    return {**found, "logits": output(learner, batch)}


@torch.no_grad()
def output(learner: Learner, batch: Batch) -> Tensor:
    with learner.randomness.framework(), evaluating(learner.model):
        return learner.answer(batch).logits.float()


def strategy(name: str, **changes: Any) -> Strategy:
    overrides = {key.replace("__", "."): value for key, value in changes.items()}
    return Strategy.load({**small(name).to_dict(), "name": name}, overrides=overrides)


def on_text(name: str, spec: dict[str, Any] | None = None, **changes: Any) -> Callable[[Places], Case]:
    """A strategy of the library on six topics, two at a time."""

    def made(places: Places) -> Case:
        model = {**places.stream.model, **(spec or {})}  # type: ignore[dict-item]
        model = (
            {key: getattr(places, value) if key == "name" else value for key, value in model.items()} if spec else model
        )
        model["name"] = str(model["name"])
        learner = learner_for(strategy(name, **changes), model=model)
        learner.run(places.stream)
        return Case(learner, [["predict", [TEXTS], {}]], {"0": answers(learner, TEXTS)})

    return made


def on_tasks(name: str, **changes: Any) -> Callable[[Places], Case]:
    """Each task by its name, in the scenario ``task``."""

    def made(places: Places) -> Case:
        learner = learner_for(strategy(name, **changes), model=places.tasks.model)
        learner.run(places.tasks)
        calls = [["predict", [TEXTS], {"task": task}] for task in learner.experience_names]
        wanted = {str(place): answers(learner, TEXTS, place) for place in range(len(calls))}
        return Case(learner, calls, wanted)

    return made


def alone(places: Places) -> Case:
    """One of several adapters that are kept apart."""
    found = on_text("routed-lora")(places)
    return Case(found.learner, found.calls, {"0": answers(found.learner, TEXTS, 1)}, {"only": 1})


def language(name: str, model: str = "gpt2", **changes: Any) -> Callable[[Places], Case]:
    """A language model; the logits of whole texts, padded, are compared where there is a token."""

    def made(places: Places) -> Case:
        pairs = model == "t5"
        objective: Any = "seq2seq" if pairs else "causal-lm"
        spec = {"kind": "pretrained", "name": str(getattr(places, model)), "max_length": 16}
        learner = learner_for(strategy(name, **changes), model=spec, objective=objective, scenario="domain")
        rows: Any = {"text": [f"{text} wet dry" for text in TEXTS]}
        if pairs:
            rows = {"prompt": TEXTS, "completion": ["up", "down down", "wet", "dry", "one"]}
        learner.update(rows, name="talk")
        tokens = learner.model.tokenizer(TEXTS, padding=True, truncation=True, max_length=16, return_tensors="pt")
        batch = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
        if pairs:
            labels = learner.model.tokenizer(rows["completion"], padding=True, return_tensors="pt")["input_ids"]
            batch["labels"] = labels
        calls = [["logits_of", [TEXTS, rows["completion"]] if pairs else [TEXTS], {}]]
        calls.append(["answer", ["red green"], {"max_new_tokens": 3, "do_sample": False}])
        return Case(learner, calls, {"0": {"answer": output(learner, batch)}})

    return made


def on_digits(name: str, model: Any = None, **changes: Any) -> Callable[[Places], Case]:
    def made(places: Places) -> Case:
        stream = tiny_stream(experiences=2)
        chosen = (
            model()
            if callable(model)
            else model or {"kind": "mlp", "hidden": [16, 12], "activation": "silu", "dropout": 0.1}
        )
        learner = learner_for(strategy(name, **changes), model=chosen)
        learner.run(stream)
        inputs = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
        make = "import torch\ndef your_model():\n    return torch.nn.Linear(64, 4)" if callable(model) else ""
        return Case(
            learner, [["predict", [{"tensor": inputs.tolist()}], {}]], {"0": answers(learner, inputs)}, make=make
        )

    return made


def numbers(places: Places) -> Case:
    learner = learner_for(strategy("lora", head__init="uniform"), model=places.stream.model, objective="regression")
    learner.update({"text": [*TEXTS, *TEXTS], "label": [float(row) for row in range(10)]}, name="numbers")
    return Case(learner, [["predict", [TEXTS], {}]], {"0": {"labels": learner.predict(TEXTS)["labels"]}})


def classifier(name: str, kind: str = "BertForSequenceClassification", **changes: Any) -> Callable[[Places], Case]:
    """A classifier of transformers, handed in as an object, whose own head trains from random weights."""

    def made(places: Places) -> Case:
        with Randomness(5).framework():
            loaded: Any = getattr(transformers, kind).from_pretrained(places.bert, num_labels=3)
        learner = learner_for(strategy(name, head=None, training__head_lr=None, **changes), model=loaded)
        ids = torch.randint(2, 14, (12, 6), generator=torch.Generator().manual_seed(2))
        for number in range(2):
            rows = TensorTable({"input_ids": ids[number * 6 :], "labels": torch.arange(12 - number * 6) % 3})
            learner.update(rows, name=f"update {number}")
        mask = torch.ones_like(ids)
        mask[::2, 4:] = 0
        given = [{"tensor": ids.tolist()}, {"tensor": mask.tolist()}]
        table = TensorTable({"input_ids": ids, "attention_mask": mask})
        logits = output(learner, table[torch.arange(12)])
        return Case(learner, [["predict", given, {}]], {"0": {"logits": logits, "labels": logits.argmax(1)}})

    return made


CASES: dict[str, Callable[[Places], Case]] = {
    "lora-rehearsal": on_text("lora-rehearsal"),
    "naive": on_text("naive"),
    "frozen": on_text("frozen"),
    "frozen-cosine": on_text("frozen", head__distance="cosine", head__scale=7.0, head__normalize=False),
    "frozen-bf16": on_text("frozen", head__scale=3.0, training__precision="bf16"),
    "slda": on_text("slda"),
    "ranpac": on_text("ranpac", {"name": "bert", "layers": 2, "pooling": "cls"}, head__center=True),
    "ranpac-orthogonal": on_text("ranpac", head__projection="orthogonal", head__strength=1.0),
    "klda": on_text("klda", {"name": "bert", "layers": 3}),
    "lora-first-ranpac": on_text("lora-first-ranpac"),
    "adalora": on_text("adalora"),
    "inc-lora": on_text("inc-lora", head__normalize=False, head__scale=None),
    "lora-gpt2-last": on_text("lora-rehearsal", {"name": "gpt2", "layers": 2}),
    "lora-t5-encoder": on_text("lora-rehearsal", {"name": "t5"}),
    "icarl": on_text("icarl"),
    "prompt": on_text("prompt", adapter__tokens=3),
    "prefix": on_text("prefix", adapter__tokens=3),
    "routed-lora": on_text("routed-lora"),
    "s-prompts": on_text("s-prompts", adapter__tokens=3),
    "only": alone,
    "tasks": on_tasks("lora"),
    "tasks-routed": on_tasks("routed-lora"),
    "tasks-given": on_tasks("routed-lora", adapter__routing="task"),
    "regression": numbers,
    "lm-lora": language("lm-lora"),
    "lm-osf": language("lm-osf"),
    "lm-prompt": language("lm-lora", adapter={"kind": "prompt", "tokens": 3}),
    "t5-lora": language("lm-lora", "t5"),
    "t5-prompt": language("lm-lora", "t5", adapter={"kind": "prompt", "tokens": 3}),
    "mlp": on_digits("naive"),
    "mlp-lora": on_digits("lora"),
    "mlp-adalora": on_digits("adalora"),
    "module": on_digits("naive", {"kind": "module", "class": "torch.nn:Linear", "arguments": {"in_features": 64, "out_features": 4}}),
    "object": on_digits("naive", lambda: nn.Linear(64, 4)),
    "classifier": classifier("naive"),
    "classifier-lora": classifier("lora"),
    "classifier-adalora": classifier("adalora"),
}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    place = tmp_path_factory.mktemp("bases")
    config = transformers.T5Config(vocab_size=14, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=1,
                                   decoder_start_token_id=1, eos_token_id=0)  # fmt: skip
    with Randomness(0).framework():
        transformers.T5ForConditionalGeneration(config).save_pretrained(place / "t5")
    bert = tiny_bert(place / "bert")
    transformers.AutoTokenizer.from_pretrained(bert).save_pretrained(place / "t5")
    for name in ("stream", "tasks"):
        (place / name).mkdir()
    stream = text_stream(bert, place / "stream")
    return Places(bert, tiny_gpt2(place / "gpt2"), place / "t5", stream, text_stream(bert, place / "tasks", "task"))


@dataclass
class Read:
    """What the reader made of all folders."""

    folders: dict[str, Path]
    cases: dict[str, Case]
    tensors: dict[str, Tensor]
    texts: dict[str, Any]


@pytest.fixture(scope="module")
def read(places: Places, tmp_path_factory: pytest.TempPathFactory) -> Read:
    """Every case, exported, and read in one process that cannot import the package."""
    place = tmp_path_factory.mktemp("exports")
    cases = {name: make(places) for name, make in CASES.items()}
    folders = {
        name: export_model(case.learner, place / name, card=PLAIN, **case.options) for name, case in cases.items()
    }
    jobs = {n: {"folder": str(folders[n]), "calls": case.calls, "make": case.make} for n, case in cases.items()}
    (place / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    reader = Path(__file__).with_name("export_reader.py")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(reader), str(place / "jobs.json"), str(place / "out.safetensors")],
        env={**environment, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False, cwd=place,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    with safe_open(place / "out.safetensors", "pt") as file:
        texts = json.loads(file.metadata()["texts"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return Read(folders, cases, tensors, texts)


@pytest.mark.parametrize("name", CASES)
def test_the_code_in_the_readme_answers_as_the_learner_does(name: str, read: Read) -> None:
    case = read.cases[name]
    for number, wanted in case.wanted.items():
        found = {
            key.rpartition(".")[2]: value for key, value in read.tensors.items() if key.startswith(f"{name}/{number}.")
        }
        for key in ("logits", "scores", "answer", "labels"):
            if key in wanted:
                own = _known(wanted[key], key)
                torch.testing.assert_close(_known(found[key], key, wanted[key]), own, rtol=1e-5, atol=1e-5)
        if "names" in wanted:
            assert read.texts[f"{name}/{number}.names"] == wanted["names"]
    if "scores" in case.wanted["0"]:
        assert len(set(case.wanted["0"]["labels"].tolist())) > 1 or name.startswith("tasks"), "rows are told apart"


def _known(values: Tensor, key: str, by: Tensor | None = None) -> Tensor:
    """Logits without those of classes that the head knows nothing of."""
    by = values if by is None else by
    return values[by > UNKNOWN] if key == "logits" else values


def run_code(folder: Path, monkeypatch: pytest.MonkeyPatch, upto: str = "") -> dict[str, Any]:
    """The names that the code of a README defines; of its first part where ``upto`` says where that ends."""
    monkeypatch.chdir(folder)
    code = re.findall(r"^```python\n(.*?)^```$", (folder / "README.md").read_text(), re.DOTALL | re.MULTILINE)[0]
    scope: dict[str, Any] = {}
    exec(code.partition(upto)[0] if upto else code, scope)
    return scope


# What lies in the folders


@pytest.mark.parametrize("name", [name for name in CASES if "lora" in name or name.endswith(("prompt", "prefix"))])
def test_adapters_have_learnt_something(name: str, read: Read) -> None:
    """Else one that is not loaded would go unnoticed above."""
    learner = read.cases[name].learner
    adapter: Any = next(part for part in learner.parts if part.slot == "adapter")
    if adapter.kind in ("lora", "adalora"):
        assert max(float((B @ A).abs().max()) for A, B in total_folds(adapter.adapters).values()) > 1e-3
        return
    ids = torch.randint(2, 14, (4, 6), generator=torch.Generator().manual_seed(3))
    batch: Batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with torch.no_grad(), learner.randomness.framework(), evaluating(learner.model):
        whole = learner.model.backbone(batch)
        with adapter.adapters.only(None):
            bare = learner.model.backbone(batch)
    assert (whole - bare).abs().max() > 1e-3


def test_files_are_plain_and_sealed(read: Read) -> None:
    for name, folder in read.folders.items():
        check_seal(folder, {"README.md", "inference.json"})
        found = {path.suffix for path in folder.rglob("*") if path.is_file()}
        assert found <= {".md", ".json", ".safetensors", ".jinja", ".txt"}, name
        assert (
            max(map(len, (folder / "README.md").read_text().partition("```python")[2].partition("```")[0].splitlines()))
            <= 120
        )


@pytest.mark.parametrize("name", [name for name in CASES if "lora" in name and not name.startswith("mlp")])
def test_servers_take_the_adapter(name: str, read: Read) -> None:
    """vLLM takes LoRA without `modules_to_save`, whose alpha and rank it reads from one global number or a pattern."""
    folder = read.folders[name]
    for place in json.loads((folder / "inference.json").read_text())["adapters"]:
        config = json.loads((folder / place / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA" and not config["modules_to_save"] and not config["use_dora"]
        assert config["task_type"] in (None, "CAUSAL_LM", "SEQ_2_SEQ_LM")
        assert config["lora_alpha"] == config["r"] and config["rank_pattern"] == config["alpha_pattern"]
        keys = load_file(folder / place / "adapter_model.safetensors").keys()
        assert keys and all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in keys)


def test_the_head_of_a_classifier_lies_beside_its_adapter(read: Read) -> None:
    folder = read.folders["classifier-lora"]
    assert load_file(folder / "head.safetensors").keys() == {"classifier.weight", "classifier.bias"}
    assert not (read.folders["classifier"] / "head.safetensors").exists()


def test_classes_have_their_names(read: Read) -> None:
    for name in ("naive", "classifier", "classifier-lora"):
        labels = json.loads((read.folders[name] / "labels.json").read_text())
        config = json.loads((read.folders[name] / "config.json").read_text())
        wanted = read.cases[name].learner.class_names
        assert labels["id2label"] == {str(label): one for label, one in enumerate(wanted)} == config["id2label"]
        assert labels["label2id"] == {one: label for label, one in enumerate(wanted)} == config["label2id"]
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(read.folders["classifier"])
    assert loaded.config.num_labels == 3
    assert not (read.folders["lm-lora"] / "labels.json").exists()


def test_a_linear_head_has_the_weights_of_the_learner(read: Read) -> None:
    head: Any = read.cases["naive"].learner.model.head
    tensors = load_file(read.folders["naive"] / "head.safetensors")
    assert torch.equal(tensors["weight"], head.weight) and torch.equal(tensors["bias"], head.bias)
    assert tensors["weight"].shape == (6, 16) and tensors["bias"].shape == (6,)


def test_frozen_bases_are_named_and_not_copied(read: Read, places: Places) -> None:
    told = json.loads((read.folders["slda"] / "inference.json").read_text())
    assert (
        told["base_model"] == str(places.bert)
        and told["base_model_sha256"] == read.cases["slda"].learner.model.base_sha256
    )
    assert not (read.folders["slda"] / "model.safetensors").exists()


def test_language_models_keep_their_chat_template_and_the_side_of_padding(places: Places, tmp_path: Path) -> None:
    chatty = tmp_path / "chatty"
    tokenizer = transformers.AutoTokenizer.from_pretrained(places.gpt2)
    tokenizer.chat_template = "{% for turn in messages %}{{ turn['content'] }} {% endfor %}"
    transformers.AutoModelForCausalLM.from_pretrained(places.gpt2).save_pretrained(chatty)
    tokenizer.save_pretrained(chatty)
    learner = learner_for(small("lm-lora"), model=str(chatty), objective="causal-lm", scenario="domain")
    learner.update({"text": TEXTS}, name="talk")
    folder = export_model(learner, tmp_path / "out", card=PLAIN)
    before, after = (transformers.AutoTokenizer.from_pretrained(place) for place in (chatty, folder))
    assert after.chat_template == before.chat_template and after.padding_side == before.padding_side
    assert json.loads(after.backend_tokenizer.to_str())["truncation"] is None
    assert "local_files_only" not in json.loads((folder / "tokenizer_config.json").read_text())


def test_a_chat_is_answered(places: Places, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    scope = run_code(read.folders["lm-lora"], monkeypatch)
    scope["tokenizer"].chat_template = "{% for turn in messages %}{{ turn['content'] }} {% endfor %}"
    plain = scope["answer"]("red green", max_new_tokens=3, do_sample=False)
    assert plain == read.texts["lm-lora/1.answer"]
    assert scope["answer"]([{"role": "user", "content": "red green"}], max_new_tokens=3, do_sample=False) == plain
    assert scope["asked"]("red <end>")["input_ids"].tolist() == scope["asked"]("red")["input_ids"].tolist()


@pytest.mark.parametrize("name", ["lora-rehearsal", "klda"])
def test_another_base_is_noticed(
    name: str, places: Places, read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = export_model(read.cases[name].learner, tmp_path / "out", card=PLAIN)
    told = json.loads((folder / "inference.json").read_text())
    (folder / "inference.json").write_text(json.dumps({**told, "base_model": str(places.gpt2)}))
    with pytest.raises(AssertionError, match="this is another base"):
        run_code(folder, monkeypatch)


@pytest.mark.parametrize("name", ["lora-rehearsal", "klda"])
def test_without_a_network_the_base_comes_from_a_folder_as_the_card_says(
    name: str, places: Places, read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = export_model(read.cases[name].learner, tmp_path / "out", card=PLAIN)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "a copy of the one that it was trained on" in text and "hf download" not in text
    told = json.loads((folder / "inference.json").read_text())
    (folder / "inference.json").write_text(json.dumps({**told, "base_model": "nobody/has-this"}))
    with pytest.raises(OSError):
        run_code(folder, monkeypatch)
    said = re.findall(r"^Without a network, write `(.*?)` for `(.*?)`:", text, re.MULTILINE)
    assert len(said) == 1 and text.count(said[0][1]) == 2
    (folder / "README.md").write_text(text.replace(said[0][1], said[0][0]))
    shutil.copytree(places.bert, folder / "base")
    found = run_code(folder, monkeypatch)["predict"](TEXTS)
    assert found["names"] == read.cases[name].wanted["0"]["names"]


def test_the_card_says_how_a_base_of_the_hub_is_fetched(read: Read) -> None:
    learner = read.cases["lora-rehearsal"].learner
    told = {**json.loads((read.folders["lora-rehearsal"] / "inference.json").read_text()), "base_model": "someone/bert"}
    text = render_card(PLAIN, told, "code\n", {}, list(learner.class_names))
    assert "which `hf download someone/bert --local-dir base` fills on a machine that has one." in text
    assert "Without a network" not in (read.folders["mlp"] / "README.md").read_text()


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_pooling_is_that_of_the_model(pooling: Any, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    scope = run_code(read.folders["frozen"], monkeypatch, upto="def features")
    scope["told"]["pooling"] = pooling
    generator = torch.Generator().manual_seed(4)
    for dtype in (torch.float32, torch.bfloat16):
        hidden = torch.randn(40, 7, 5, generator=generator).to(dtype)
        hidden[3, 6] = torch.inf
        mask = torch.randint(0, 2, (40, 7), generator=generator)
        mask[0], mask[1], mask[3, 6] = 0, 1, 0
        torch.testing.assert_close(scope["pool"](hidden, mask), pool(hidden, mask, pooling), rtol=0, atol=0)


def test_orthogonal_fourier_features_are_those_of_the_lift() -> None:
    lift = Lift(normalize=True, dimension=21, activation="fourier", bandwidth=0.7, projection="orthogonal", center=True)
    lift.draw(6, torch.Generator().manual_seed(0))
    lift.mean = torch.full((6,), 0.1)
    scores = ClassScores(NearestMeans("euclidean", 2.0), lift)
    sums = ClassSums()
    sums.grow(3, 21)
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
    sums.add(lift(x.double()), torch.arange(9) % 3)
    scores.solve(sums)
    scores.outputs = 3
    found = plain_head(scores, "head/nearest-mean", 6)
    scope: dict[str, Any] = {"x": x, "F": F, "head": found.tensors, "told": {"head": found.settings}}
    exec("\n".join(found.lines), scope)
    torch.testing.assert_close(scope["logits"], scores(x), rtol=1e-5, atol=1e-5)
    assert len(found.lines) <= 10


@pytest.mark.parametrize("name", CASES)
def test_heads_are_ten_lines_at_most(name: str, read: Read) -> None:
    learner = read.cases[name].learner
    if learner.model.head is not None:
        assert len(plain_head(learner.model.head, "head", learner.model.feature_size or 0).lines) <= 10


# Classes that do not compete


@pytest.mark.parametrize("name", ["naive", "ranpac"])
def test_classes_that_are_not_met_yet_get_no_probability(
    name: str, places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = learner_for(strategy(name, training__active="all"), model=places.stream.model)
    learner.update(places.stream[0])
    folder = export_model(learner, tmp_path / "out", card=PLAIN)
    found, wanted = run_code(folder, monkeypatch)["predict"](TEXTS), answers(learner, TEXTS)
    assert found["scores"].shape == (5, 6) and not found["scores"][:, 2:].any()
    torch.testing.assert_close(found["scores"], wanted["scores"], rtol=1e-5, atol=1e-5)
    assert found["names"] == wanted["names"]


# The same again


def test_the_same_learner_gives_the_same_bytes_also_after_a_load(read: Read, tmp_path: Path) -> None:
    for name in ("adalora", "naive", "ranpac-orthogonal"):
        learner = read.cases[name].learner
        learner.save(tmp_path / "state")
        learner.predict(TEXTS)
        again = Learner.load(tmp_path / "state", device="cpu", progress=False, trust={learner.model.spec["name"]})
        for one in (learner, again):
            folder = export_model(one, tmp_path / "out", card=PLAIN)
            assert (folder / "seal.json").read_bytes() == (read.folders[name] / "seal.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "state"]


@pytest.mark.parametrize("name", ["adalora", "routed-lora", "lora-gpt2-last", "mlp-adalora"])
def test_the_learner_is_left_as_it_was(name: str, read: Read, tmp_path: Path) -> None:
    learner = read.cases[name].learner
    learner.save(tmp_path / "before")
    export_model(learner, tmp_path / "out", card=PLAIN)
    learner.save(tmp_path / "after")
    assert (tmp_path / "before" / "seal.json").read_bytes() == (tmp_path / "after" / "seal.json").read_bytes()


# What is refused


def test_ranks_are_held_to(read: Read, tmp_path: Path) -> None:
    stacked = read.cases["inc-lora"].learner
    with pytest.raises(CompositionError, match="rank 24 and max_rank is 23"):
        export_model(stacked, tmp_path / "out", card=PLAIN, max_rank=23)
    with pytest.raises(CompositionError, match="rank 8 and max_rank is 7"):
        export_model(read.cases["routed-lora"].learner, tmp_path / "out", card=PLAIN, max_rank=7)
    assert not list(tmp_path.iterdir())
    export_model(stacked, tmp_path / "out", card=PLAIN, max_rank=24)
    for name in ("naive", "frozen", "prompt", "mlp"):
        with pytest.raises(CompositionError, match="max_rank is a limit for LoRA and AdaLoRA"):
            export_model(read.cases[name].learner, tmp_path / "none", card=PLAIN, max_rank=8)


def test_only_is_for_adapters_that_are_kept_apart(read: Read, tmp_path: Path) -> None:
    for name in ("lora-rehearsal", "inc-lora", "frozen"):
        with pytest.raises(CompositionError, match="keeps none apart: leave it out"):
            export_model(read.cases[name].learner, tmp_path / "out", card=PLAIN, only=0)
    for number in (3, -1):
        with pytest.raises(CompositionError, match=f"has 3 adapters and number {number} was asked for"):
            export_model(read.cases["routed-lora"].learner, tmp_path / "out", card=PLAIN, only=number)
    assert not list(tmp_path.iterdir())


def test_adapters_that_no_library_routes_are_exported_one_by_one(places: Places, tmp_path: Path) -> None:
    spec = {"kind": "pretrained", "name": str(places.gpt2), "max_length": 16}
    talk = learner_for(
        strategy("lm-lora", adapter__across_tasks="separate"), model=spec, objective="causal-lm", scenario="domain"
    )
    digits = learner_for("routed-lora")
    for number in range(2):
        talk.update({"text": [f"{text} {number}" for text in TEXTS]}, name=str(number))
        digits.update(tiny_stream(experiences=2)[number])
    for learner in (talk, digits):
        with pytest.raises(CompositionError, match="has an adapter for each of 2 experiences"):
            export_model(learner, tmp_path / "out", card=PLAIN)
        assert not (tmp_path / "out").exists()
        export_model(learner, tmp_path / "one", card=PLAIN, only=1)
    assert load_file(tmp_path / "one" / "model.safetensors").keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}


class OwnHead(Part):
    """A head of the user's."""

    slot = "head"
    Settings = LinearHead.Settings

    def attach(self, context: Any) -> None:
        super().attach(context)
        context.model.head = nn.Linear(context.model.feature_size, 2)


def test_parts_that_no_library_knows_are_refused(places: Places, tmp_path: Path) -> None:
    learner = learner_for(small("generative-classifier"))
    learner.update(tiny_stream()[0])
    with pytest.raises(CompositionError, match="head/vae-classifier has no form that a few lines of torch compute"):
        export_model(learner, tmp_path / "out", card=PLAIN)
    learner = learner_for(Strategy(OwnHead(), training=SGD))
    learner.update(tiny_stream()[0])
    with pytest.raises(CompositionError, match="no form that a few lines of torch compute"):
        export_model(learner, tmp_path / "out", card=PLAIN)
    learner = learner_for(small("naive"), model={"kind": "pretrained", "name": str(places.t5), "max_length": 16})
    learner.update(places.stream[0])
    with pytest.raises(CompositionError, match=r"the encoder of an encoder-decoder \(t5\) was trained in full"):
        export_model(learner, tmp_path / "out", card=PLAIN)
    assert not list(tmp_path.iterdir())


def test_engines_and_parts_that_look_rows_up_are_refused(
    read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = read.cases["mlp"].learner
    with monkeypatch.context() as patch:
        patch.setattr(learner.strategy, "engine", SimpleNamespace(name="engine/avalanche"))
        with pytest.raises(CompositionError, match="engine/avalanche answers in place of our model"):
            export_model(learner, tmp_path / "out", card=PLAIN)
    learner.context.parts.append(SimpleNamespace(slot="recall", name="recall/knn"))  # type: ignore[arg-type]
    try:
        with pytest.raises(CompositionError, match="recall/knn looks rows up"):
            export_model(learner, tmp_path / "out", card=PLAIN)
    finally:
        learner.context.parts.pop()


def test_half_an_update_is_refused(tmp_path: Path) -> None:
    learner = learner_for("naive")
    with pytest.raises(StateError, match="in the middle of an update"):
        export_model(learner, tmp_path / "out", card=PLAIN)
    learner = learner_for(Strategy(training=SGD | {"lr": 1e30}))
    with pytest.raises(TrainingError):
        learner.update(tiny_stream()[0])
    with pytest.raises(StateError, match="in the middle of an update"):
        export_model(learner, tmp_path / "out", card=PLAIN)
    learner = learner_for("naive", folder=tmp_path / "state", save_every=2)
    _cut_after(learner, 1)
    with pytest.raises(CutOff):
        learner.update(tiny_stream()[0])
    loaded = Learner.load(tmp_path / "state", device="cpu", progress=False)
    with pytest.raises(StateError, match="in the middle of an update"):
        export_model(loaded, tmp_path / "out", card=PLAIN)
    assert not (tmp_path / "out").exists()


def test_an_adapter_on_an_unknown_base_is_refused(places: Places, tmp_path: Path) -> None:
    ids = torch.randint(2, 14, (6, 6), generator=torch.Generator().manual_seed(2))
    rows = TensorTable({"input_ids": ids, "labels": torch.arange(6) % 3})

    def learnt(model: Any, name: str) -> Learner:
        learner = learner_for(strategy(name, head=None, training__head_lr=None), model=model)
        learner.update(rows, name="first")
        return learner

    config = transformers.BertConfig.from_pretrained(places.bert, num_labels=3)
    with Randomness(5).framework():
        fresh = transformers.BertForSequenceClassification(
            transformers.BertConfig(**config.to_diff_dict() | {"num_labels": 3})
        )
        other = transformers.BertForSequenceClassification.from_pretrained(places.bert, num_labels=3)
    fresh.config._name_or_path = ""
    with pytest.raises(ModelError, match="names the base '', which is not on this machine"):
        export_model(learnt(fresh, "lora"), tmp_path / "out", card=PLAIN)
    with torch.no_grad():
        other.bert.embeddings.word_embeddings.weight[3, 3] += 1
    with pytest.raises(ModelError, match=r"'bert.embeddings.word_embeddings.weight' .* is not that of"):
        export_model(learnt(other, "lora"), tmp_path / "out", card=PLAIN)
    assert not list(tmp_path.iterdir())
    export_model(learnt(other, "naive"), tmp_path / "out", card=PLAIN)


# The folder's place


def test_what_is_no_export_is_left_alone(read: Read, tmp_path: Path) -> None:
    learner = read.cases["frozen"].learner
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("years of work")
    save_state(tmp_path / "state", {"weeks": "of training"})
    learner.save(tmp_path / "learner")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("a file")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name in ("thesis", "state", "learner", "link", "file"):
        with pytest.raises(StateError, match="holds something that"):
            export_model(learner, tmp_path / name, card=PLAIN)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (tmp_path / "empty").mkdir()
    export_model(learner, tmp_path / "empty", card=PLAIN)


def test_an_export_is_replaced_as_a_whole_or_not_at_all(
    read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = export_model(read.cases["lora-rehearsal"].learner, tmp_path / "out", card=PLAIN)
    before = (folder / "seal.json").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(export, "save_file", full)
        with pytest.raises(StateError, match=r"No space left.*what was there before is untouched"):
            export_model(read.cases["naive"].learner, folder, card=PLAIN)
    check_seal(folder)
    assert (folder / "seal.json").read_bytes() == before
    export_model(read.cases["naive"].learner, folder, card=PLAIN)
    assert not (folder / "adapter_config.json").exists() and (folder / "config.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# The card

MEASURED = (
    Measured(name="topics | 1", rows=24, score=0.875, low=0.75, high=0.95, learnt=0.9166, before=0.9),
    Measured(name="topics 2", rows=30, score=None, learnt=None),
    Measured(name="safety", rows=9, score=1.0, low=0.9, high=1.0, learnt=1.0, probe=True),
)
CHECK = Check(
    rule="max_drop", name="topics | 1", answer="cannot tell", value=0.0123456, low=-0.01, high=0.05, limit=0.02
)


def card(**changes: Any) -> Card:
    given: dict[str, Any] = {
        "title": "Topics <b>of</b>\nrows", "measured": MEASURED, "version": 8, "created": "2026-11-24T10:00:00+00:00",
        "judgement": Judgement(answer="cannot tell", sentence="'topics' may have dropped.", checks=(CHECK,)),
        "data": (Data(path="/home/someone/secret/march.jsonl", sha256="b" * 64, fingerprint="c" * 64, offered=80, trained=60,
                      holdout=16, classes=("topic 7",)),),
        "base_model": "sentence-transformers/all-MiniLM-L6-v2", "base_sha256": "a" * 64, "strategy": "lora-rehearsal",
        "summary": "LoRA and a memory.", "source": "Hu et al. 2021", "code": {"torch": "2.14", "nested": {}},
    }  # fmt: skip
    return Card(**{**given, **changes})


def test_the_card_says_what_is_known(read: Read, tmp_path: Path) -> None:
    folder = export_model(read.cases["lora-rehearsal"].learner, tmp_path / "out", card=card())
    text = (folder / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    found = yaml.safe_load(front)
    assert found["base_model"] == "sentence-transformers/all-MiniLM-L6-v2" and found["base_model_relation"] == "adapter"
    assert found["library_name"] == "peft" and found["pipeline_tag"] == "text-classification"
    assert found["tags"] == ["continual-learning", "lora-rehearsal", "lora"]
    assert r"# Topics \<b\>of\</b\> rows" in body and "A classifier of 6 classes (topic 0, topic 1" in body
    assert r"| topics \| 1 | 24 | 87.5 | 75.0 to 95.0 | 91.7 | −4.2 |" in body
    assert "| topics 2 | 30 | – | – | – | – |" in body
    assert "| safety (probe) | 9 | 100.0 | 90.0 to 100.0 | 100.0 | +0.0 |" in body
    assert "**Gate: cannot tell.** 'topics' may have dropped." in body
    assert r"| max\_drop | topics \| 1 | 0.01235 | −0.01 to 0.05 | 0.02 | cannot tell |" in body
    assert f"| march.jsonl | 80 | 60 | 16 | {'c' * 64} |" in body
    assert "secret" not in text and "someone" not in text
    assert "a" * 64 in body and "Version 8, 2026-11-24T10:00:00+00:00." in body and "Made with torch 2.14." in body
    assert "strategy `lora-rehearsal`: LoRA and a memory. Source: Hu et al. 2021." in body


def test_no_row_of_the_data_is_in_an_export(read: Read) -> None:
    memory = read.cases["lora-rehearsal"].learner
    assert sum(len(part.rows()) for part in memory.parts) > 0
    for path in read.folders["lora-rehearsal"].iterdir():
        assert b"red green" not in path.read_bytes()
    names = {name for path in read.folders["lora-rehearsal"].glob("*.safetensors") for name in load_file(path)}
    assert all("lora_" in name or name == "weight" for name in names)


def test_the_card_of_other_models(read: Read, tmp_path: Path, places: Places) -> None:
    local = card(
        base_model=str(places.gpt2), score="log-likelihood per token", judgement=None, version=None, data=(), code={}
    )
    folder = export_model(read.cases["lm-osf"].learner, tmp_path / "out", card=local)
    text = (folder / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(text.split("---\n", 2)[1])
    assert (
        "base_model" not in front
        and front["pipeline_tag"] == "text-generation"
        and front["library_name"] == "transformers"
    )
    assert "| topics \\| 1 | 24 | 0.875 | 0.750 to 0.950 | 0.917 | −0.042 |" in text
    assert "a local folder called `gpt2`" in text and str(places.gpt2) not in text
    assert "Gate" not in text and "Version" not in text and "Learnt from" not in text and "Made with" not in text
    assert "Made 2026-11-24" in text
    folder = export_model(read.cases["mlp"].learner, folder, card=Card("numbers"))
    text = (folder / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(text.split("---\n", 2)[1])
    assert front == {"library_name": "pytorch", "tags": ["continual-learning"]} and "What it still knows" not in text
    assert "Base:" not in text
    folder = export_model(read.cases["frozen-bf16"].learner, folder, card=Card("half"))
    assert "mixed precision (bfloat16)" in (folder / "README.md").read_text(encoding="utf-8")
