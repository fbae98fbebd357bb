"""A prompt or a prefix as a folder that stock PEFT reads (PROMPT_TUNING, PREFIX_TUNING).

As PEFT runs it, a model that gives hidden states gives those of the virtual tokens of a prompt as well, in front; they are
no part of the row and must be left out of pooling.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from continual.errors import CompositionError
from continual.parts.adapter.common import transformer_of
from continual.parts.adapter.export import base_name, task_type, write_folder
from continual.parts.adapter.virtual import VirtualTokens


class Prompting(Protocol):
    """A part that owns virtual tokens: a prompt or a prefix."""

    adapters: VirtualTokens

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...


def export_virtual(model: nn.Module, part: Prompting, folder: Path, *, only: int | None = None) -> Path:
    """Write one set of virtual tokens; returns ``folder``.

    Args:
        only: which one, from 0 in order of birth; None for the last.

    Raises:
        CompositionError: there is none, or no such one.
        StateError: the folder cannot be written, or is not ours to replace.
    """
    names = part.adapters.names
    if not names:
        raise CompositionError(
            f"{part.name} has learned nothing that could be exported: train at least one experience first."
        )
    place = len(names) - 1 if only is None else only
    if not 0 <= place < len(names):
        raise CompositionError(f"{part.name} has {len(names)} adapters and number {only} was asked for: count from 0.")
    values = part.adapters.values(names[place]).detach().cpu()
    transformer = transformer_of(model)
    record = {
        "format": 1,
        "part": part.name,
        "base_model": base_name(model),
        "base_model_sha256": getattr(model, "base_sha256", None),
        "adapters": 1,
    }
    table = values if part.kind == "prompt" else _flat(values)
    config = _config(part.kind, values, transformer, base_name(model))
    return write_folder(Path(folder).resolve(), {"prompt_embeddings": table.contiguous()}, config, record)


def _flat(values_L2HVD: Tensor) -> Tensor:
    """A prefix as PEFT keeps it: one row a token, (V, L · 2 · H · D)."""
    return values_L2HVD.permute(3, 0, 1, 2, 4).flatten(1)


def _config(kind: str, values: Tensor, transformer: Any, base: str) -> dict[str, Any]:
    from peft import PrefixTuningConfig, PromptTuningConfig

    plain = transformer.config.get_text_config()
    common: dict[str, Any] = {
        "task_type": task_type(transformer) or "FEATURE_EXTRACTION",
        "num_transformer_submodules": 1,
        "base_model_name_or_path": base,
        "inference_mode": True,
    }
    if kind == "prompt":
        config: Any = PromptTuningConfig(
            num_virtual_tokens=values.shape[0],
            token_dim=values.shape[1],
            num_attention_heads=plain.num_attention_heads,
            num_layers=plain.num_hidden_layers,
            **common,
        )
    else:
        layers, _, heads, tokens, width = values.shape
        config = PrefixTuningConfig(
            num_virtual_tokens=tokens,
            token_dim=heads * width,
            num_attention_heads=heads,
            num_layers=layers,
            encoder_hidden_size=heads * width,
            **common,
        )
    content: dict[str, Any] = config.to_dict()
    return content
