"""Tiny random models, rows of tokens, and the same strategy under a trainer and under our learner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import BertConfig, LlamaConfig, Trainer, TrainingArguments

from continual import Experience, Learner
from continual.interop.transformers import Continual
from continual.table import Ragged, TensorTable

ROWS, TEST_ROWS, BATCH, LABELS = 22, 10, 4, 6
PARTS: dict[str, dict[str, Any]] = {
    "rehearsal": {"replay": {"kind": "rehearsal", "select": "class-balanced", "capacity": 12}},
    "ewc": {"penalty": {"kind": "ewc", "strength": 10.0}},
    "lora-rehearsal": {
        "adapter": {"kind": "lora", "rank": 2, "alpha": 4},
        "replay": {"kind": "rehearsal", "select": "class-balanced", "per_class": 4},
    },
    "adalora": {"adapter": {"kind": "adalora", "init_rank": 4, "target_rank": 2, "alpha": 4}},
    "lora-stack-ewc": {
        "adapter": {"kind": "lora", "rank": 2, "alpha": 4, "across_tasks": "stack"},
        "penalty": {"kind": "ewc", "strength": 10.0, "space": "weights"},
    },
    "der-si": {"replay": {"kind": "dark", "capacity": 12}, "penalty": {"kind": "si"}},
    "lwf-step": {"distillation": {"kind": "lwf"}, "replay": {"kind": "rehearsal", "capacity": 12, "insert": "step"}},
}
WORDS = ["red", "green", "blue", "one", "two", "three", "warm", "cold", "wet", "dry", "up", "down"]


def classifier(dropout: float = 0.0, seed: int = 0) -> Any:
    """A random BERT of 16 features that tells six classes apart; the same at every call."""
    config = BertConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=40,
        num_labels=LABELS,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return _made(transformers.BertForSequenceClassification, config, seed)


def language_model(seed: int = 0) -> Any:
    """A random Llama of 16 features over a dozen words; the same at every call."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(WORDS) + 2, pad_token_id=0, bos_token_id=1, eos_token_id=1, **sizes)
    return _made(transformers.LlamaForCausalLM, config, seed)


def _made(kind: Any, config: Any, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return kind(config)


def tokenizer() -> Any:
    """Whole words, ``<pad>`` is 0 and ``<end>`` 1."""
    words = {word: index for index, word in enumerate(["<pad>", "<end>", *WORDS])}
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<pad>", pad_token="<pad>", eos_token="<end>", padding_side="right"
    )


def sentences(index: int, test: bool = False) -> list[dict[str, str]]:
    """Sentences of one topic (four words each); those of the test are longer."""
    words, length = WORDS[4 * index : 4 * index + 4], 7 if test else 2
    return [
        {"text": " ".join(words[(row * step + row // 4) % 4] for step in range(1, 1 + length + row % 5))}
        for row in range(TEST_ROWS if test else ROWS)
    ]


def rows(index: int, test: bool = False, **columns: Any) -> list[dict[str, Any]]:
    """Rows of two new classes, told apart by their tokens."""
    generator = torch.Generator().manual_seed(10 * index + test)
    found = []
    for place in range(TEST_ROWS if test else ROWS):
        label, length = 2 * index + place % 2, int(torch.randint(4, 9, (1,), generator=generator))
        ids = (torch.randint(0, 6, (length,), generator=generator) + 1 + 6 * label).tolist()
        found.append({"input_ids": ids, "attention_mask": [1] * length, "labels": label, **columns})
    return found


def collate(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Padded on the right with 0, as transformers' DataCollatorWithPadding does."""
    width = max(len(row["input_ids"]) for row in features)
    padded = {
        name: torch.tensor([row[name] + [0] * (width - len(row[name])) for row in features])
        for name in features[0]
        if name in ("input_ids", "attention_mask", "token_type_ids")
    }
    return {**padded, "labels": torch.tensor([row["labels"] for row in features])}


def experience(index: int) -> Experience:
    """The rows of :func:`rows` as our learner takes them, with the ids that a trainer's rows get."""

    def table(part: int) -> TensorTable:
        found = rows(index, test=part == 2)
        start = (3 * index + part) * 2**38
        return TensorTable(
            {
                "input_ids": Ragged.from_lists([row["input_ids"] for row in found], 0),
                "labels": torch.tensor([row["labels"] for row in found]),
                "row": torch.arange(start, start + len(found)),
            }
        )

    names = tuple(f"LABEL_{label}" for label in range(2 * index + 2))
    return Experience(index, f"e{index}", table(0), None, table(2), (2 * index, 2 * index + 1), names)


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    """Two quick epochs, rows in their order, AdamW without decay, as ``learnt`` trains."""
    return TrainingArguments(str(folder), **{**PLAIN, **options})


PLAIN: dict[str, Any] = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": BATCH,
    "learning_rate": 0.01,
    "weight_decay": 0.0,
    "lr_scheduler_type": "constant",
    "train_sampling_strategy": "sequential",
    "max_grad_norm": 1.0,
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1000,
    "seed": 5,
}


def trained(
    memory: Continual,
    model: nn.Module,
    index: int,
    folder: Path,
    kind: type = Trainer,
    resume: Any = None,
    **options: Any,
) -> Any:
    """One experience in a trainer of its own; returns the trainer."""
    memory.name = f"e{index}"
    given = {"data_collator": collate, "train_dataset": rows(index), "eval_dataset": rows(index, test=True)}
    given |= {name: options.pop(name) for name in list(options) if name in (*given, "callbacks", "optimizers")}
    callbacks = [memory, *given.pop("callbacks", [])]
    trainer = kind(model, arguments(folder, **options), callbacks=callbacks, **given)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def learnt(strategy: dict[str, Any], model: nn.Module, experiences: list[Experience], **training: Any) -> Learner:
    """The same under our learner, in the order of the rows."""
    own = {"optimizer": "adamw", "lr": 0.01, "epochs": 2, "batch_size": BATCH, "clip": 1.0, "fresh_optimizer": True}
    learner = Learner(model, {**strategy, "training": {**own, **training}}, device="cpu", progress=False, seed=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("continual.learner.trainer.training_batches", _in_order)
        for one in experiences:
            learner.update(one)
    return learner


def _in_order(lengths: Any, count: int, size: int, generator: torch.Generator) -> list[torch.Tensor]:
    return list(torch.arange(count).split(size))


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), f"{name} differs by {float((tensor - other[name]).abs().max()):.2g}"
