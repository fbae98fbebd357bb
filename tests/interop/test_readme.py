"""The README's code for a loop and for a trainer of one's own runs as it stands."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from battery import tiny_stream
from torch import nn
from trainer_bench import language_model, sentences, tokenizer

from continual import Stream

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def code(begins: str) -> str:
    """The one block of Python whose first line begins so."""
    (found,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if block.startswith(begins)]
    return str(found)


def test_the_readme_is_short() -> None:
    assert 110 <= len(README.splitlines()) <= 190


def test_the_loop_of_ones_own() -> None:
    """Its rows are remembered, and the second experience is trained beside them."""
    seen: list[int] = []
    stream: Stream = tiny_stream(experiences=2)
    module = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 6))
    module.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    names: dict[str, Any] = {
        "my_torch_model": module,
        "stream": stream,
        "optimizer": torch.optim.SGD(module.parameters(), lr=0.1),
    }
    lines = code("from continual import TrainingContext")
    assert 10 <= len(lines.splitlines()) <= 16
    exec(compile(lines, "README.md", "exec"), names)
    loop = names["loop"]
    assert [part.name for part in loop.parts] == ["replay/rehearsal", "penalty/ewc"]
    rows = {int(row) for experience in stream for row in experience.train.column("row")}
    assert len(loop.parts[0].rows()) == min(200, len(rows)) and set(loop.parts[0].rows().tolist()) <= rows
    assert 64 in seen, "a batch of 32 with as many replayed"


def test_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A month of two classes becomes a version, which answers."""
    draw = random.Random(0)
    rows = [
        {"id": n, "label": ["low", "high"][n % 2], "age": 20 + 30 * (n % 2) + draw.random(), "sum": n % 7}
        for n in range(120)
    ]
    (tmp_path / "2026-10.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code("from continual import Store"), "README.md", "exec"), names)
    assert names["outcome"].happened == "promoted" and names["store"].live == 1
    printed = capsys.readouterr().out
    assert "live: version 1" in printed and printed.rstrip().endswith(("['low']", "['high']"))


# peft 0.21 reads an attribute that transformers 5.23 has deprecated, and trl 1.16 sets one (seen November 2026).
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Two months: the second one begins with what the first saved."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    def made(*args: Any, **kwargs: Any) -> Any:
        options: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True}
        config = SFTConfig("out", num_train_epochs=1, max_length=16, save_strategy="no", **options)
        return SFTTrainer(*args, args=config, processing_class=tokenizer(), **kwargs)

    monkeypatch.chdir(tmp_path)
    lines = code("from continual.interop.transformers")
    assert len(lines.splitlines()) <= 8
    again = re.search(r"next month: (.*)", lines)
    assert again is not None
    second = re.sub(r"memory = .*", f"memory = {again[1]}", lines)
    for month, source in enumerate((lines, second)):
        names: dict[str, Any] = {
            "SFTTrainer": made,
            "model": language_model(),
            "rows": datasets.Dataset.from_list(sentences(month)),
            "test": datasets.Dataset.from_list(sentences(month, test=True)),
        }
        if month == 0:
            with pytest.warns(UserWarning, match="these settings are not used"):
                exec(compile(source, "README.md", "exec"), names)
        else:
            exec(compile(source, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "update 1 · january" in printed and "update 2 · february" in printed and "├── january" in printed
    assert len(names["memory"].parts[1].rows()) == 44
