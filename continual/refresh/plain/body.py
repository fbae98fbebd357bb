"""What is told of a body, whatever it is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from continual.models.hub import MINILM, on_disk

Form = Literal["features", "language", "transformer", "mlp", "module"]


@dataclass
class Body:
    """What was written of a body.

    Attributes:
        form: ``features`` of a transformer, a ``language`` model, a ``transformer`` of another class that gives logits, an
            ``mlp``, or a ``module`` of the user's.
        told: what ``inference.json`` says of it.
        head: tensors of a classifier's own head, for ``head.safetensors``.
    """

    form: Form
    told: dict[str, Any] = field(default_factory=dict)
    head: dict[str, Tensor] = field(default_factory=dict)


def base_told(name: str, sha256: str | None) -> dict[str, Any]:
    """How the base of an adapter is found again, and known: ``base_file`` is the file whose SHA-256 it is, None of several."""
    found = on_disk(name)
    single = sha256 is not None and found is not None and (found / "model.safetensors").is_file()
    return {
        "base_model": _address(name),
        "base_model_sha256": sha256,
        "base_file": "model.safetensors" if single else None,
    }


def dtype_name(module: nn.Module) -> str:
    """``float32`` …, of its first parameter."""
    return str(next(module.parameters()).dtype).removeprefix("torch.")


def _address(name: str) -> str:
    """A base's name on the hub, or the whole path of its folder."""
    local = Path(name).expanduser()
    if local.is_dir():
        return str(local.resolve())
    return MINILM if name == MINILM.partition("/")[2] else name
