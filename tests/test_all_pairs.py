"""Every part with every part of another slot: two tasks, saved, loaded and gone on with; or one sentence that says why not."""

from __future__ import annotations

from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from battery import MODEL, same_weights, tiny_stream
from text_bench import text_stream, tiny_bert

from continual import Learner, Strategy, Stream
from continual.errors import CompositionError, ContinualError
from continual.monitor.monitor import Monitor
from continual.parts.registry import PARTS

SETTINGS: dict[str, dict[str, Any]] = {
    "adapter/lora": {"rank": 2},
    "adapter/adalora": {"init_rank": 4, "target_rank": 2},
    "head/ridge": {"dimension": 60},
    "head/klda": {"dimension": 60},
    "replay/rehearsal": {"capacity": 20},
    "replay/dark": {"capacity": 20},
    "replay/mir": {"capacity": 20},
    "replay/gdumb": {"capacity": 20},
    "replay/generative": {"hidden": [16], "latent": 4, "threshold": 0.0},
    "replay/feature-vae": {"hidden": [16], "latent": 4, "threshold": 0.0, "epochs": 3},
    "adapter/prompt": {"tokens": 3},
    "adapter/prefix": {"tokens": 3},
    "head/vae-classifier": {"hidden": [16], "latent": 4},
    "projection/gem": {"capacity": 20},
    "projection/agem": {"capacity": 20},
}
KINDS = [f"{slot}/{kind}" for slot, kinds in PARTS.items() for kind in kinds]
PAIRS = [(one, other) for one, other in combinations(KINDS, 2) if one.split("/")[0] != other.split("/")[0]]
CLOSED_FORM = {"head/nearest-mean", "head/neighbours", "head/slda", "head/klda", "head/ridge"}
DRAWN = {"replay/gaussian", "replay/feature-vae"}
STEADY = CLOSED_FORM | DRAWN
"""They need features that stay: a frozen backbone, or LoRA in the first experience alone."""

TOKENS = {"adapter/prompt", "adapter/prefix"}
"""They need rows of tokens."""

IMPOSSIBLE = {
    *product(["head/vae-classifier"], [kind for kind in KINDS if kind.split("/")[0] != "head"]),
    *product(["head/exemplar-means"], ["replay/generative", *DRAWN]),
    *product(["distillation/binary"], ["penalty/ewc", "penalty/rwalk"]),
    *product(
        CLOSED_FORM,
        [kind for kind in KINDS if kind.split("/")[0] in ("replay", "penalty", "distillation", "projection")],
    ),
    *product(["adapter/adalora", "adapter/prompt", "adapter/prefix"], STEADY),
    *product([kind for kind in KINDS if kind.split("/")[0] == "adapter"], ["projection/osf"]),
    *product(DRAWN, ["projection/osf"]),
    *product(["penalty/orthogonal"], TOKENS | STEADY | {"projection/osf", "projection/ogd"}),
    *product(["adapter/adalora"], ["penalty/si", "penalty/rwalk", "projection/ogd"]),
    *product(["replay/gdumb"], [kind for kind in KINDS if kind.split("/")[0] not in ("head", "replay")]),
}
IMPOSSIBLE |= {(other, one) for one, other in IMPOSSIBLE}
NOT_ON_TEXT = set(product(TOKENS, ["replay/generative"]))


def composed(*names: str) -> dict[str, Any]:
    content: dict[str, Any] = {"name": " × ".join(names), "training": {"epochs": 2, "batch_size": 8, "lr": 0.05}}
    for name in names:
        slot, kind = name.split("/")
        content[slot] = {"kind": kind, **SETTINGS.get(name, {})}
    if not STEADY.isdisjoint(names):
        if "adapter/lora" in names:
            content["adapter"]["across_tasks"] = "first"
        elif not any(name.startswith("adapter/") for name in names):
            content["backbone"] = "frozen"
    if "distillation/binary" in names:
        content["training"]["loss"] = "binary"
    if "head/exemplar-means" in names:
        content.setdefault("replay", {"kind": "rehearsal", "select": "herding", "capacity": 20})
    if "penalty/orthogonal" in names and TOKENS.isdisjoint(names):
        content["adapter"] = {**content.get("adapter", {"kind": "lora", "rank": 2}), "across_tasks": "stack"}
    return content


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> tuple[Stream, Stream]:
    """Digits, and rows of text with a tiny transformer for them."""
    place = tmp_path_factory.mktemp("text")
    return tiny_stream(experiences=2), text_stream(tiny_bert(place), place)[:2]


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair in IMPOSSIBLE], ids=" × ".join)
def test_what_is_impossible_is_refused_with_what_to_do(pair: tuple[str, str]) -> None:
    with pytest.raises(CompositionError, match=r"(leave|keep|take|set) "):
        Strategy.load(composed(*pair))


@pytest.mark.parametrize("kind", sorted(TOKENS))
def test_no_generator_makes_text(kind: str, streams: tuple[Stream, Stream]) -> None:
    text = streams[1]
    with pytest.raises(ContinualError, match="makes rows of floating-point 'inputs' alone"):
        Learner(text.model, composed(kind, "replay/generative"), device="cpu", progress=False).update(text[0])


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair not in IMPOSSIBLE | NOT_ON_TEXT], ids=" × ".join)
def test_two_tasks(pair: tuple[str, str], streams: tuple[Stream, Stream], tmp_path: Path) -> None:
    digits, text = streams
    stream, model = (digits, MODEL) if TOKENS.isdisjoint(pair) else (text, text.model)
    learner = Learner(model, composed(*pair), seed=3, device="cpu", progress=False, monitor=Monitor(resamples=10))
    first = learner.update(stream[0])
    assert first.retention is not None
    assert (first.retention.metrics["accuracy"] or 0.0) > 0.4, "two classes are learnt no worse than by chance"
    learner.save(tmp_path / "saved")
    learner.update(stream[1])
    assert all(bool(torch.isfinite(tensor).all()) for tensor in learner.model.state_dict().values())
    assert learner.predict(stream[1].test)["scores"].shape == (len(stream[1].test), 4)
    again = Learner.load(tmp_path / "saved", device="cpu", progress=False)
    again.update(stream[1])
    same_weights(learner, again)
