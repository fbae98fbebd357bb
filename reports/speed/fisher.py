"""Seconds of the exact Fisher against one plain forward and backward pass over the same rows, in one run.

An MLP 784-100-100-10 that has been trained, 10 000 rows at batch 128; the LoRA parameters of a Llama of 4 layers x 256,
32 rows x 64 tokens with padding. The seconds are those of the whole call: the check of the closed forms is in them.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from continual.kinds import Objective
from continual.models.output import Output
from continual.parts.context import TrainingContext
from continual.parts.penalty.fisher import diagonal_fisher
from continual.table import Batch

sys.path.insert(0, __file__.rsplit("/", 1)[0])
from bench import alternate, ratio, timed, write

ROWS, BATCH, LM_ROWS, TOKENS, VOCABULARY = 10_000, 128, 32, 64, 1000
REPEATS, THREADS, SEED = 11, 2, 0


class Dense(nn.Module):
    """784-100-100-10."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)]
        self.layers = nn.Sequential(*layers)

    def forward(self, batch: Batch) -> Output:
        return Output(self.layers(batch["inputs"]))


class Language(nn.Module):
    """A Llama with LoRA on its attention and MLP."""

    def __init__(self) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
        )
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        base: Any = LlamaForCausalLM(config)
        self.inner = get_peft_model(base, LoraConfig(r=8, target_modules=targets))
        for name, parameter in self.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, batch: Batch) -> Output:
        return Output(self.inner(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits)


def dense() -> tuple[TrainingContext, list[Batch]]:
    inputs, labels = torch.rand(ROWS, 784), torch.randint(0, 10, (ROWS,))
    model = Dense()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    context = TrainingContext(model, [], competition="all", batch_size=BATCH)
    batches = [{"inputs": inputs[place], "labels": labels[place]} for place in torch.split(torch.arange(ROWS), BATCH)]
    for batch in batches:
        optimizer.zero_grad()
        context.loss_rows(context.forward(batch), batch).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return context, batches


def language() -> tuple[TrainingContext, list[Batch]]:
    objective: Objective = "causal-lm"
    context = TrainingContext(Language(), [], objective=objective, batch_size=LM_ROWS)
    length_B = torch.randint(TOKENS // 2, TOKENS + 1, (LM_ROWS,))
    length_B[0] = TOKENS
    mask = torch.arange(TOKENS) < length_B[:, None]
    ids = torch.randint(1, VOCABULARY, mask.shape) * mask
    return context, [{"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}]


def plain(context: TrainingContext, batches: list[Batch]) -> Callable[[], None]:
    """One forward and backward pass of the mean loss."""

    def run() -> None:
        context.model.eval()
        for batch in batches:
            context.model.zero_grad(set_to_none=True)
            context.loss_rows(context.forward(batch), batch).mean().backward()  # type: ignore[no-untyped-call]

    return run


def exact(context: TrainingContext, batches: list[Batch], labels: Any) -> Callable[[], dict[str, Tensor]]:
    return lambda: diagonal_fisher(context, batches, labels=labels, generator=torch.Generator().manual_seed(SEED))


def cases() -> Iterator[tuple[str, tuple[TrainingContext, list[Batch]]]]:
    yield "mlp", dense()
    yield "lora", language()


def main() -> None:
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    seconds: dict[str, float] = {}
    ratios: dict[str, float] = {}
    for case, (context, batches) in cases():
        work = {
            "plain": timed(plain(context, batches)),
            "true": timed(exact(context, batches, "true")),
            "sampled": timed(exact(context, batches, "sampled")),
        }
        figures = alternate(work, REPEATS)
        for name in work:
            seconds[f"{case}_{name}"] = round(statistics.median(figures[name]), 4)
        for name in ("true", "sampled"):
            ratios[f"{case}_{name}"] = round(ratio(figures, name, "plain"), 3)
    write(
        {
            "what": "seconds of the exact Fisher and of a plain forward and backward pass; ratio = median of rounds",
            "seconds": seconds,
            "ratio": ratios,
            "target": {"mlp": 1.3, "lora": 1.5},
            "repeats": REPEATS,
            "threads": THREADS,
            "seed": SEED,
        },
        __doc__ or "",
    )


if __name__ == "__main__":
    main()
