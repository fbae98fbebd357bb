"""Rows of text and a tiny transformer for them."""

from __future__ import annotations

import json
from pathlib import Path

import transformers
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, GPT2Config

from continual import Stream
from continual.randomness import Randomness

WORDS = ["red", "green", "blue", "one", "two", "three", "warm", "cold", "wet", "dry", "up", "down"]


def tiny_bert(place: Path) -> Path:
    """A random BERT with dropout and a tokenizer of a dozen words, as save_pretrained writes them."""
    words = ["<unk>", "<pad>", *WORDS]
    config = BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=16, max_position_embeddings=40, pad_token_id=1)  # fmt: skip
    with Randomness(0).framework():
        BertModel(config).save_pretrained(place)
    word_tokenizer(words, pad_token="<pad>").save_pretrained(place)
    return place


def tiny_gpt2(place: Path) -> Path:
    """A random GPT-2 of 16 features with a tokenizer of a dozen words, as save_pretrained writes them."""
    words = ["<unk>", "<end>", *WORDS]
    config = GPT2Config(vocab_size=len(words), n_embd=16, n_layer=1, n_head=2, n_positions=24, eos_token_id=1)
    with Randomness(0).framework():
        transformers.GPT2LMHeadModel(config).save_pretrained(place)
    word_tokenizer(words, eos_token="<end>").save_pretrained(place)
    return place


def word_tokenizer(words: list[str], **special: str) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of whole words; the first one stands for all that it does not know."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=words[0], **special)


def text_stream(folder: Path, place: Path, scenario: str = "class") -> Stream:
    """Six topics, two at a time, in sentences of different lengths."""
    for part, offset in (("train", 0), ("test", 100)):
        lines = [
            json.dumps({"text": " ".join([WORDS[2 * topic + (row * step) % 2] for step in range(2 + row % 4)] + [str(row)]),
                        "topic": f"topic {topic}"})
            for topic in range(6)
            for row in range(offset, offset + 12)
        ]  # fmt: skip
        (place / f"{part}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    content = {
        "source": {"kind": "files", "train": "train.jsonl", "test": "test.jsonl", "text": "text", "label": "topic"},
        "split": {"by": "class", "size": 2},
        "scenario": scenario,
        "model": {"kind": "pretrained", "name": str(folder), "max_length": 16},
    }
    (place / "topics.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return Stream.load(place / "topics.yaml")
