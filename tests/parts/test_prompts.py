"""Prompts and prefixes on tiny transformers, against plain calls of the frozen base; and the battery on rows of text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from adapter_bench import Bench, assert_same, base_of, batch_of, model_of, tensors_of
from battery import TOKENS, figures, learner_for, run_with_cuts, same_weights, small, tiny_stream, weights
from peft import PeftModel
from text_bench import text_stream, tiny_bert
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    T5Config,
    T5ForConditionalGeneration,
)

from continual import Learner, Strategy
from continual.errors import CompositionError, ModelError, SpecError
from continual.models.model import Model
from continual.models.module import UserModule
from continual.models.transformer import LanguageModel, PooledTransformer, pool
from continual.parts.adapter.prefix import Prefix
from continual.parts.adapter.prompt import Prompt
from continual.parts.adapter.virtual import CACHE, taken
from continual.parts.adapter.virtual_export import export_virtual
from continual.parts.part import Part
from continual.parts.registry import part_class
from continual.randomness import Randomness
from continual.state import tensor_bytes
from continual.table import Batch

KINDS: dict[str, Any] = {"prompt": Prompt, "prefix": Prefix}
FAMILIES = ("llama", "bert", "gpt2")
COUNT = 3
both = pytest.mark.parametrize("kind", KINDS)
peft_warns = pytest.mark.filterwarnings(  # PEFT 0.21 passes what transformers 5.23 and 5.24 renamed
    "ignore:.*(is_gradient_checkpointing|past_key_values):FutureWarning"
)


def bench(family: str, kind: str, tasks: int = 1, **settings: Any) -> Bench:
    found = Bench(family, KINDS[kind](tokens=COUNT, **settings), lr=3e-2)
    for task in range(tasks):
        found.task(task, 3)
    return found


def padded(family: str) -> Batch:
    batch = batch_of(family, 5)
    batch["attention_mask"] = batch["attention_mask"].clone()
    batch["attention_mask"][::2, 4:] = 0
    return batch


@torch.no_grad()
def slow(family: str, kind: str, values: Tensor, batch: Batch) -> list[Tensor]:
    """Each row by itself, without its padding: hidden states or logits of its own tokens."""
    base, found = base_of(family), []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        own = ids[mask.bool()][None]
        ones = torch.ones(1, COUNT + own.shape[1], dtype=torch.int64)
        if kind == "prompt":
            embeds = torch.cat([values[None], base.get_input_embeddings()(own)], 1)  # type: ignore[operator]
            output = base(inputs_embeds=embeds, attention_mask=ones)
        else:
            cache = transformers.DynamicCache()
            for layer, (keys, held) in enumerate(values):
                cache.update(keys[None], held[None], layer)
            output = base(input_ids=own, attention_mask=ones, **{str(taken(base, CACHE)): cache})
        given = output.logits if family == "llama" else output.last_hidden_state
        found.append(given[0, -own.shape[1] :])
    return found


@both
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_answer_as_one_by_one_without_padding(family: str, kind: str) -> None:
    found = bench(family, kind)
    values = found.part.adapters.values("t0001").detach()
    batch = padded(family)
    rows = slow(family, kind, values, batch)
    found.model.eval()
    with torch.no_grad():
        if family == "llama":
            logits = found.model(batch).logits
            assert logits.shape[:2] == batch["input_ids"].shape
            for row, wanted in zip(logits, rows, strict=True):
                torch.testing.assert_close(row[: len(wanted)], wanted, rtol=1e-4, atol=1e-5)
            return
        means = torch.stack([row.mean(0) for row in rows])
        torch.testing.assert_close(found.model(batch).features, means, rtol=1e-4, atol=1e-5)
        wider = {**batch, "input_ids": F.pad(batch["input_ids"], (0, 7), value=9)}
        wider["attention_mask"] = F.pad(batch["attention_mask"], (0, 7))
        torch.testing.assert_close(found.model(wider).features, means, rtol=1e-4, atol=1e-5)


@both
@pytest.mark.parametrize("pooling", ["cls", "last"])
def test_the_first_and_the_last_token_are_the_rows_own(kind: str, pooling: Any) -> None:
    found = bench("bert", kind)
    found.model.backbone.pooling = pooling
    batch = padded("bert")
    rows = slow("bert", kind, found.part.adapters.values("t0001").detach(), batch)
    found.model.eval()
    with torch.no_grad():
        features = found.model(batch).features
    wanted = torch.stack([row[0 if pooling == "cls" else -1] for row in rows])
    torch.testing.assert_close(features, wanted, rtol=1e-4, atol=1e-5)


@both
@pytest.mark.parametrize("family", FAMILIES)
def test_virtual_tokens_and_head_train_and_nothing_else(family: str, kind: str) -> None:
    found = Bench(family, KINDS[kind](tokens=COUNT))
    before, transformer = tensors_of(found), found.model.transformer
    found.begin(0, 2)
    assert found.model.transformer is transformer
    own = [name for name in found.loop.parameters() if not name.startswith("head.")]
    assert own == ["backbone.transformer.virtual_tokens.t0001"]
    first = tensors_of(found)
    found.step(0, 2)
    after = tensors_of(found)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items() if not name.startswith("head."))
    assert not torch.equal(first[own[0]], after[own[0]])
    assert set(found.model.saved_tensors()) <= {*own, "head.weight", "head.bias"}
    assert found.part.nbytes() == tensor_bytes(after[own[0]])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tokens_of_the_vocabulary_are_where_training_begins(family: str) -> None:
    """In a decoder a fresh prompt, and a fresh prefix, is the same as those tokens before the row."""
    base, batch = base_of(family), batch_of(family, 2)
    for kind in KINDS:
        found = Bench(family, KINDS[kind](tokens=COUNT))
        found.begin(0, 1)
        generator = Randomness(3).generator(kind)
        drawn = torch.randint(64, (COUNT,), generator=generator)
        ids = torch.cat([drawn.expand(16, -1), batch["input_ids"]], 1)
        found.model.eval()
        with torch.no_grad():
            output = base(input_ids=ids)
            if family == "llama":
                torch.testing.assert_close(found.model(batch).logits, output.logits[:, COUNT:], rtol=1e-4, atol=1e-5)
            else:
                wanted = output.last_hidden_state[:, COUNT:].mean(1)
                torch.testing.assert_close(found.model(batch).features, wanted, rtol=1e-4, atol=1e-5)


@both
def test_separate_sets_stay_and_answer_for_their_own_rows(kind: str) -> None:
    found = bench("bert", kind, tasks=2, across_tasks="separate", prototypes=1)
    old = {name: tensor for name, tensor in tensors_of(found).items() if "virtual" in name}
    found.task(2, 3)
    now = tensors_of(found)
    assert len(old) == 2 and all(torch.equal(tensor, now[name]) for name, tensor in old.items())
    given = {**padded("bert"), "experience": torch.arange(16) % 3}
    found.model.eval()
    with torch.no_grad():
        together = found.model(given).features
    for place in range(3):
        rows = slow("bert", kind, found.part.adapters.values(f"t000{place + 1}").detach(), padded("bert"))
        wanted = torch.stack([row.mean(0) for row in rows])[place::3]
        torch.testing.assert_close(together[place::3], wanted, rtol=1e-4, atol=1e-5)
    plain = pool(base_of("bert")(**{n: given[n] for n in ("input_ids", "attention_mask")}).last_hidden_state,
                 given["attention_mask"], "mean")  # fmt: skip
    router = found.part.adapters.router
    torch.testing.assert_close(router.features(found.model.backbone, given), plain.detach(), rtol=1e-4, atol=1e-5)
    kept = bench("bert", kind, tasks=3)
    assert kept.part.adapters.names == ["t0001"] and not kept.model.adapter_replaced


@both
@pytest.mark.parametrize("across", ["continue", "separate"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_cut_in_mid_task_goes_on_bit_for_bit(family: str, across: str, kind: str) -> None:
    def make() -> Part:
        part: Part = KINDS[kind](tokens=COUNT, across_tasks=across)
        return part

    whole = Bench(family, make()).task(0, 3)
    whole.begin(1, 6)
    whole.step(1, 2)
    again = Bench.load(family, make(), whole.save(), task=1)
    for one in (whole, again):
        one.step(1, 4)
        one.loop.end()
    assert_same(tensors_of(whole), tensors_of(again))
    assert torch.equal(whole.answer(), again.answer())
    assert whole.part.nbytes() == again.part.nbytes()
    assert list(whole.loop.parameters()) == list(again.loop.parameters())


@peft_warns
@both
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_peft_gives_the_same_answers(family: str, kind: str, tmp_path: Path) -> None:
    found = bench(family, kind)
    folder = export_virtual(found.model, found.part, tmp_path / "adapter")
    record = json.loads((folder / "continual.json").read_text())
    assert record["base_model_sha256"] == "a" * 64 and record["part"] == f"adapter/{kind}"
    stock = PeftModel.from_pretrained(base_of(family), folder).eval()
    batch = padded(family)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    found.model.eval()
    with torch.no_grad():
        output = stock(**inputs)
        if family == "llama":
            logits = output.logits[:, -batch["input_ids"].shape[1] :]
            own = batch["attention_mask"].bool()
            torch.testing.assert_close(found.model(batch).logits[own], logits[own], rtol=1e-4, atol=1e-5)
        else:
            hidden = output.last_hidden_state[:, -batch["input_ids"].shape[1] :]
            wanted = pool(hidden, batch["attention_mask"], "mean")
            torch.testing.assert_close(found.model(batch).features, wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(CompositionError, match="count from 0"):
        export_virtual(found.model, found.part, tmp_path / "adapter", only=1)
    with pytest.raises(CompositionError, match="nothing that could be exported"):
        export_virtual(model_of(family), KINDS[kind](), tmp_path / "none")


def encoder(base: Any, *, max_length: int | None = None) -> Model:
    return Model(
        PooledTransformer(base, "mean"),
        gives_features=True,
        objectives=("classification",),
        spec={},
        feature_size=32,
        max_length=max_length,
    )


def test_a_prompt_goes_before_the_encoder_of_a_pair() -> None:
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    with Randomness(0).framework():
        base = T5ForConditionalGeneration(config).eval()
    model = Model(LanguageModel(base, seq2seq=True), gives_features=False, objectives=("seq2seq",), spec={})
    part = Prompt(tokens=COUNT)
    found = Bench("llama", part, model)
    found.begin(0, 1)
    batch = {**batch_of("llama", 0), "labels": batch_of("llama", 1)["labels"][:, :4].contiguous()}
    with torch.no_grad():
        embeds = torch.cat([part.adapters.values("t0001").expand(16, -1, -1), base.shared(batch["input_ids"])], 1)
        given = model.eval()(batch).logits
        with part.adapters.only(None):
            wanted = base(inputs_embeds=embeds, labels=batch["labels"]).logits
    assert given.shape == (16, 4, 64)
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-5)


@both
def test_what_cannot_be_is_refused(kind: str) -> None:
    with pytest.raises(CompositionError, match="reads none"):
        Bench("mlp", KINDS[kind]()).begin(0, 1)
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=64,
                        max_position_embeddings=24)  # fmt: skip
    tight = encoder(BertModel(config), max_length=20)
    with pytest.raises(CompositionError, match="adds 5 tokens to rows of up to 20, and the model has places for 24"):
        Bench("bert", KINDS[kind](tokens=5), tight).begin(0, 1)
    Bench("bert", KINDS[kind](tokens=4), tight).begin(0, 1)
    found = bench("llama", kind)
    with pytest.raises(ModelError, match="load the folder with PEFT"):
        found.model.transformer(
            input_ids=batch_of("llama", 0)["input_ids"], past_key_values=transformers.DynamicCache()
        )
    with pytest.raises(CompositionError, match="nothing to hold"):
        Strategy.load({"adapter": {"kind": kind, "across_tasks": "separate"}, "penalty": {"kind": "ewc"}})
    with pytest.raises(CompositionError, match="no row says what task"):
        bench("bert", kind, across_tasks="separate", routing="task")
    for settings, words in (
        ({"tokens": 0}, "tokens"),
        ({"prototypes": 2}, "separate"),
        ({"across_tasks": "separate", "routing": "task", "prototypes": 2}, "leave them out"),
        ({"across_tasks": "stack"}, "across_tasks"),
        ({"init": "zeros"}, "init"),
    ):
        with pytest.raises(SpecError, match=words):
            KINDS[kind](**settings)


@both
def test_a_classifier_that_pools_one_place_is_refused(kind: str) -> None:
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=64)
    inner = UserModule(BertForSequenceClassification(config), "classification")
    model = Model(inner, gives_features=False, objectives=("classification",), spec={})
    with pytest.raises(CompositionError, match=r"BertForSequenceClassification takes its answer from .* one token"):
        Bench("bert", KINDS[kind](), model).begin(0, 1)


def test_a_prefix_needs_a_cache() -> None:
    config = DistilBertConfig(dim=32, n_layers=1, n_heads=2, hidden_dim=32, vocab_size=64)
    with pytest.raises(
        CompositionError, match=r"'cache' or 'past_key_values', which DistilBertModel does not take.*'prompt'"
    ):
        Bench("bert", Prefix(), encoder(DistilBertModel(config))).begin(0, 1)
    Bench("bert", Prompt(), encoder(DistilBertModel(config))).begin(0, 1)
    with pytest.raises(CompositionError, match="does not work for seq2seq"):
        Strategy.load({"adapter": {"kind": "prefix"}}).check(objective="seq2seq", gives_features=False)


@both
@pytest.mark.parametrize(
    "changed",
    [{"tokens": 4}, {"init": "other"}, {"across_tasks": "separate"}, {"prototypes": 1}, {"routing": "task"}],
    ids=str,
)
def test_every_setting_changes_something(changed: dict[str, Any], kind: str) -> None:
    if "init" in changed:
        changed = {"init": "uniform" if kind == "prompt" else "normal"}
    basis = {"across_tasks": "separate"} if changed.keys() & {"prototypes", "routing"} else {}

    def state(settings: dict[str, Any]) -> dict[str, Tensor]:
        found = Bench("bert", KINDS[kind](**{"tokens": COUNT, **settings}), lr=3e-2)
        found.loop.scenario = "task"
        found.task(0, 2).task(1, 2)
        router = found.part.adapters.router
        return {**tensors_of(found), **({"prototypes": router.prototypes_PD} if router else {})}

    plain, other = state(basis), state({**basis, **changed})
    assert plain.keys() != other.keys() or any(
        plain[name].shape != other[name].shape or not torch.equal(plain[name], other[name]) for name in plain
    )
    assert set(KINDS[kind].Settings.model_fields) == {
        "kind", "tokens", "init", "across_tasks", "routing", "prototypes"
    }  # fmt: skip


@both
def test_registered(kind: str) -> None:
    assert part_class("adapter", kind, "s.yaml") is KINDS[kind]


# The battery, on text and a tiny BERT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("bert"))


tokens = pytest.mark.parametrize("name", TOKENS)


@tokens
def test_battery_same_seed_cut_and_monitor(name: str, folder: Path, tmp_path: Path) -> None:
    stream = text_stream(folder, tmp_path)
    model = stream.model
    whole, again, other = (learner_for(name, model=model, seed=seed) for seed in (3, 3, 4))
    uncut = whole.run(stream)
    assert figures(again.run(stream).result) == figures(uncut.result)
    other.run(stream)
    assert any(not torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(other).values(), strict=True))
    unseen = learner_for(name, model=model, monitor=False)
    unseen.run(stream)
    same_weights(whole, unseen)
    for place, cuts in enumerate(([1], [4, 2, 5])):
        cut = run_with_cuts(name, stream, tmp_path / f"checkpoint{place}", cuts, model=model)
        same_weights(whole, cut)
        assert figures(cut.run(stream).result) == figures(uncut.result)
    reported = whole.state_bytes()
    for part in whole.parts:
        assert 8_000_000 > reported[part.name] >= tensor_bytes(part.state_dict()) * 0.9


@tokens
@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
def test_battery_every_scenario_and_an_experience_of_one_class(
    name: str, scenario: str, folder: Path, tmp_path: Path
) -> None:
    stream = text_stream(folder, tmp_path, scenario)
    learner = learner_for(name, model=stream.model)
    run = learner.run(stream)
    assert len(run.result["matrix"]) == 3 and run.result["metrics"]["accuracy"] > 0.1
    if scenario == "class":
        single = learner_for(name, model=stream.model)
        single.update(stream[0])
        second = stream[1]
        label = second.classes[0]
        only = (second.train.column("labels") == label).nonzero().flatten()
        assert single.update(replace(second, train=second.train.select(only), test=None, classes=(label,))).steps > 0
        assert all(torch.isfinite(tensor).all() for tensor in weights(single).values() if tensor.is_floating_point())


@tokens
def test_battery_state_round_trip_and_export(name: str, folder: Path, tmp_path: Path) -> None:
    stream = text_stream(folder, tmp_path)
    whole, halves = (learner_for(name, model=stream.model) for _ in range(2))
    for experience in stream:
        whole.update(experience)
    halves.update(stream[0])
    halves.update(stream[1])
    halves.save(tmp_path / "state")
    loaded = Learner.load(tmp_path / "state", device="cpu", progress=False)
    same_weights(halves, loaded)
    loaded.update(stream[2])
    same_weights(whole, loaded)
    assert len(whole.predict(["red green", "up down up 7"])["names"]) == 2
    out = whole.export(tmp_path / "adapter")
    assert sorted(path.name for path in out.iterdir())[0] == ("0" if name == "s-prompts" else "adapter_config.json")
    with pytest.raises(CompositionError, match="has no ranks"):
        whole.export(tmp_path / "other", max_rank=4)


@tokens
def test_battery_a_strategy_is_what_its_dict_says(name: str) -> None:
    strategy = small(name)
    assert Strategy.load(strategy.to_dict()).fingerprint() == strategy.fingerprint()
    assert strategy.summary and strategy.source
    with pytest.raises(CompositionError, match="reads none"):
        learner_for(name).update(tiny_stream()[0])


@both
@pytest.mark.parametrize("beside", ["ewc", "rehearsal", "lwf"])
def test_with_penalty_replay_and_distillation(kind: str, beside: str, folder: Path, tmp_path: Path) -> None:
    stream = text_stream(folder, tmp_path)
    slot = {"ewc": "penalty", "rehearsal": "replay", "lwf": "distillation"}[beside]
    strategy = Strategy.load({**small(kind).to_dict(), slot: {"kind": beside}, "name": "both"})
    learner = learner_for(strategy, model=stream.model)
    learner.run(stream)
    assert all(torch.isfinite(tensor).all() for tensor in weights(learner).values() if tensor.is_floating_point())


@both
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_features_of_several_layers_leave_out_virtual_tokens(kind: str, pooling: Any) -> None:
    found = Bench("bert", KINDS[kind](tokens=COUNT), lr=3e-2)
    found.task(0, 3)
    batch = padded("bert")
    backbone = PooledTransformer(found.model.transformer, pooling, layers=2)
    together = backbone(batch)
    for place in range(len(batch["input_ids"])):
        width = int(batch["attention_mask"][place].sum())
        alone = {name: batch[name][place : place + 1, :width] for name in ("input_ids", "attention_mask")}
        torch.testing.assert_close(together[place : place + 1], backbone(alone), rtol=1e-4, atol=1e-5)
    if pooling == "cls":
        states = found.model.transformer(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
        ).hidden_states
        torch.testing.assert_close(together[:, -states[-2].shape[2] :], F.normalize(states[-2][:, 0], dim=1))
        assert states[-2].shape[1] == batch["input_ids"].shape[1]
