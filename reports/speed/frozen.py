"""Seconds of a whole stream on a frozen all-MiniLM-L6-v2, measurements included, against the same with the encoder run anew.

`docstrings` in four experiences, a linear head for five epochs each, every test set so far scored after each (extra ``offline``).
`ours` passes each row through the encoder once; `anew` is ours with that switched off, as every epoch and measurement then
costs; `bare` is the least that can be done: one pass over all rows by hand, and a bare loop on the features.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from continual import Learner, Stream
from continual.parts.steady import SteadyFeatures
from continual.table import Table

sys.path.insert(0, __file__.rsplit("/", 1)[0])
from bench import alternate, ratio, timed, write

STRATEGY: dict[str, Any] = {
    "name": "linear",
    "head": {"kind": "linear"},
    "backbone": "frozen",
    "training": {"optimizer": "adam", "lr": 1.0e-2, "epochs": 5, "batch_size": 32},
}
MODEL = "sentence-transformers/all-MiniLM-L6-v2"
STREAM: dict[str, Any] = {
    "source": {"kind": "docstrings", "rows_per_class": {"train": 100, "test": 50}, "max_chars": 140},
    "split": {"by": "class", "size": 2, "classes": 8},
    "scenario": "class",
    "model": MODEL,
}
REPEATS = 2
TARGET = 1.25


def ours(stream: Stream) -> None:
    learner = Learner(MODEL, STRATEGY, device="cpu", progress=False)
    for experience in stream:
        learner.update(experience)


def anew(stream: Stream) -> None:
    of = SteadyFeatures.of

    def never(self: SteadyFeatures, tables: list[Table], rows: int, use: str) -> list[Table]:
        return tables

    try:
        SteadyFeatures.of = never  # type: ignore[assignment,method-assign]
        ours(stream)
    finally:
        SteadyFeatures.of = of  # type: ignore[method-assign]


def bare(stream: Stream) -> None:
    from transformers import AutoModel, AutoTokenizer

    from continual.models.hub import on_disk

    folder = on_disk(MODEL)
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.eval()

    @torch.no_grad()
    def features(texts: list[str]) -> Tensor:
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        found = torch.zeros(len(texts), model.config.hidden_size)
        for start in range(0, len(order), 256):
            places = order[start : start + 256]
            batch = tokenizer(
                [texts[place] for place in places],
                padding=True,
                truncation=True,
                max_length=128,
                return_tensors="pt",
            )
            hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][:, :, None]
            found[places] = (hidden * mask).sum(1) / mask.sum(1)
        return found

    tests: list[tuple[Tensor, Tensor]] = []
    head = nn.Linear(model.config.hidden_size, sum(len(each.classes) for each in stream))
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    for experience in stream:
        assert experience.test is not None
        rows, labels = features(list(experience.train.strings("text"))), experience.train.column("labels")
        tests.append((features(list(experience.test.strings("text"))), experience.test.column("labels")))
        for _ in range(5):
            for index in torch.split(torch.randperm(len(rows)), 32):
                optimizer.zero_grad()
                nn.functional.cross_entropy(head(rows[index]), labels[index]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        with torch.no_grad():
            [(head(inputs).argmax(1) == right).float().mean().item() for inputs, right in tests]


def main() -> None:
    torch.set_num_threads(1)
    stream = Stream.load(STREAM)
    figures = alternate(
        {
            "bare": timed(lambda: bare(stream)),
            "ours": timed(lambda: ours(stream)),
            "anew": timed(lambda: anew(stream)),
        },
        REPEATS,
    )
    write(
        {
            "seconds": figures,
            "ours_over_bare": ratio(figures, "ours", "bare"),
            "ours_over_anew": ratio(figures, "ours", "anew"),
            "target_ours_over_bare": TARGET,
        },
        str(__doc__),
    )


if __name__ == "__main__":
    main()
