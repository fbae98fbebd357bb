"""Samples per second of the learner against bare loops over the same tensors, in one run.

MLP 784-100-100-10, SGD, batch 128, without and with replay (128 + 128); all-MiniLM-L6-v2 with LoRA, batch 32.
"""

from __future__ import annotations

import statistics
import sys

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from continual import Experience, Learner, Strategy
from continual.models.build import build_model
from continual.parts.adapter.lora import LoRA
from continual.parts.head.linear import LinearHead
from continual.parts.replay.rehearsal import Rehearsal
from continual.table import Ragged, TensorTable

sys.path.insert(0, __file__.rsplit("/", 1)[0])
from bench import alternate, ratio, write

ROWS, EPOCHS, BATCH, MEMORY = 12_800, 4, 128, 200
TEXT_ROWS, TOKENS, TEXT_BATCH = 512, 16, 32
REPEATS = 7


def dense(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(ROWS, 784, generator=generator), torch.randint(0, 10, (ROWS,), generator=generator)


def bare_mlp(inputs: Tensor, labels: Tensor, memory: tuple[Tensor, Tensor] | None) -> float:
    model = nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    from time import perf_counter

    start = perf_counter()
    for _ in range(EPOCHS):
        order = torch.randperm(ROWS)
        for index in order.split(BATCH):
            x, y = inputs[index], labels[index]
            if memory is not None:
                drawn = torch.randint(0, MEMORY, (BATCH,))
                x, y = torch.cat([x, memory[0][drawn]]), torch.cat([y, memory[1][drawn]])
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return EPOCHS * ROWS / (perf_counter() - start)


def our_mlp(inputs: Tensor, labels: Tensor, replay: bool) -> float:
    parts = [Rehearsal(capacity=MEMORY, share=0.5)] if replay else []
    strategy = Strategy(*parts, training={"optimizer": "sgd", "lr": 0.1, "epochs": EPOCHS, "batch_size": BATCH})
    learner = Learner({"kind": "mlp", "hidden": [100, 100]}, strategy, monitor=False, progress=False, device="cpu")
    columns = {"inputs": inputs, "labels": labels, "row": torch.arange(ROWS)}
    classes = tuple(range(10))
    names = tuple(str(label) for label in classes)
    first = Experience(0, "first", TensorTable(columns), classes=classes, class_names=names)
    if not replay:
        update = learner.update(first)
        return EPOCHS * ROWS / update.train_seconds
    warm = TensorTable({name: column[:1280] for name, column in columns.items()})
    learner.update(Experience(0, "warm", warm, classes=classes, class_names=names))
    later = TensorTable({**columns, "row": torch.arange(ROWS) + ROWS})
    update = learner.update(Experience(1, "second", later, classes=classes, class_names=names))
    return EPOCHS * ROWS / update.train_seconds


def text(seed: int) -> TensorTable:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1000, 20_000, (TEXT_ROWS, TOKENS), generator=generator)
    return TensorTable(
        {
            "input_ids": Ragged.from_lists(ids.tolist(), 0),
            "labels": torch.randint(0, 10, (TEXT_ROWS,), generator=generator),
            "row": torch.arange(TEXT_ROWS),
        }
    )


class Pooled(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(384, 10)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * weight).sum(1) / weight.sum(1))


def bare_lora(table: TensorTable) -> float:
    from time import perf_counter

    encoder = build_model(
        "sentence-transformers/all-MiniLM-L6-v2", objective="classification", example=None
    ).transformer
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "key", "value", "dense"])
    model = Pooled(get_peft_model(encoder, config)).train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=5e-4, weight_decay=0.0)
    start = perf_counter()
    for index in torch.randperm(TEXT_ROWS).split(TEXT_BATCH):
        batch = table[index]
        loss = F.cross_entropy(model(batch["input_ids"], batch["attention_mask"]), batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return TEXT_ROWS / (perf_counter() - start)


def our_lora(table: TensorTable) -> float:
    strategy = Strategy(
        LoRA(rank=8, alpha=16, target=["query", "key", "value", "dense"]),
        LinearHead(),
        training={"optimizer": "adamw", "lr": 5e-4, "epochs": 1, "batch_size": TEXT_BATCH},
    )
    learner = Learner("sentence-transformers/all-MiniLM-L6-v2", strategy, monitor=False, progress=False, device="cpu")
    names = tuple(str(label) for label in range(10))
    experience = Experience(0, "first", table, classes=tuple(range(10)), class_names=names)
    return TEXT_ROWS / learner.update(experience).train_seconds


def main() -> None:
    inputs, labels = dense(0)
    memory = (inputs[:MEMORY].clone(), labels[:MEMORY].clone())
    figures = alternate(
        {
            "bare_naive": lambda: bare_mlp(inputs, labels, None),
            "our_naive": lambda: our_mlp(inputs, labels, False),
            "bare_replay": lambda: bare_mlp(inputs, labels, memory),
            "our_replay": lambda: our_mlp(inputs, labels, True),
        },
        REPEATS,
    )
    rows = text(0)
    figures |= alternate({"bare_lora": lambda: bare_lora(rows), "our_lora": lambda: our_lora(rows)}, REPEATS)
    write(
        {
            "what": "rows of the experience per second, training only; ratio = ours / bare, median of rounds",
            "rows_per_second": {name: round(statistics.median(values), 1) for name, values in figures.items()},
            "ratio": {
                "naive": round(ratio(figures, "our_naive", "bare_naive"), 3),
                "replay": round(ratio(figures, "our_replay", "bare_replay"), 3),
                "lora": round(ratio(figures, "our_lora", "bare_lora"), 3),
            },
            "target": {"naive": 0.9, "replay": 0.9, "lora": 0.97},
            "repeats": REPEATS,
            "seed": 0,
        },
        __doc__ or "",
    )


if __name__ == "__main__":
    main()
