"""All that the adapters of a model have learned, as one plain LoRA folder, which stock PEFT and vLLM read.

Every adapter of every task (trained on, stacked or merged, LoRA or AdaLoRA) is folded to A and B with nothing beside
them; the folds of one layer are put side by side along the rank, which sums them exactly, or merged in another way
(:mod:`~continual.parts.adapter.merging`). alpha equals the rank in every layer, so that the scaling is 1 also for a reader
that knows one global rank only. A layer of rank 0 is no target.
The head of a Hugging Face classifier, which trains in full, lies beside them as PEFT's ``modules_to_save``, or is left out.

The folder is written beside its place, flushed and renamed. ``continual.json`` in it names the base model and its
SHA-256, since PEFT loads an adapter on any base of the same shapes without a word.
"""

from __future__ import annotations

import json
import re
import shutil
import uuid
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from continual.disk import replace_folder, seal_folder
from continual.errors import CompositionError, ModelError, SpecError, StateError
from continual.models.lowrank import Fold, fold, is_transposed, stack_folds
from continual.parts.adapter.common import Adapters, transformer_of
from continual.parts.adapter.merging import METHODS, Method, check_merge, merge
from continual.parts.adapter.targets import shortest, task_heads

RECORD = "continual.json"


class Adapting(Protocol):
    """A part that owns adapters: LoRA or AdaLoRA."""

    adapters: Adapters

    @property
    def name(self) -> str: ...


def export_adapter(
    model: nn.Module,
    part: Adapting,
    folder: Path,
    *,
    max_rank: int | None = None,
    method: Method = "cat",
    density: float | None = None,
    generator: torch.Generator | None = None,
    only: int | None = None,
    with_head: bool = True,
) -> Path:
    """Write the sum of all adapters as a LoRA folder; returns ``folder``.

    Args:
        model: what the part was trained in; unchanged.
        part: its adapter part.
        folder: replaced where it is an earlier export; any other folder that holds files is left alone.
        max_rank: the highest rank that the reader can serve; ranks of stacked and merged tasks add up.
        method: how the tasks are merged. ``cat`` is their exact sum; the others bring it to ``max_rank``, which they need,
            and write their relative error against the sum into ``continual.json``.
        density, generator: of the method (:func:`~continual.parts.adapter.merging.merge`).
        only: the one adapter to export, from 0 in order of birth; None for all of them.
        with_head: write the head of a Hugging Face classifier as ``modules_to_save``, which vLLM refuses.

    Raises:
        CompositionError: there is nothing to export, no such adapter, or the exact sum's rank is above ``max_rank``.
        SpecError: an unknown method, or one that lacks its ``max_rank``.
        StateError: the folder cannot be written, or is not ours to replace.
    """
    tasks, error = task_folds(part.adapters), 0.0
    if only is not None:
        if not 0 <= only < len(tasks):
            raise CompositionError(
                f"{part.name} has {len(tasks)} adapters and number {only} was asked for: count from 0."
            )
        tasks = tasks[only : only + 1]
    folds = _summed(tasks)
    highest = max((A.shape[0] for A, _ in folds.values()), default=0)
    if highest == 0:
        raise CompositionError(
            f"{part.name} has learned nothing that could be exported: train at least one experience first."
        )
    if method in METHODS and method != "cat" and max_rank is None:
        raise SpecError(f"'{method}' leaves changes of full rank: give max_rank, or take 'cat'.")
    check_merge(tasks, method, rank=max_rank, density=density, generator=generator)
    if method != "cat":
        merged = merge(tasks, method, rank=max_rank, density=density, generator=generator)
        folds, error = merged.folds, merged.error
    elif max_rank is not None and highest > max_rank:
        raise CompositionError(
            f"the folded adapter has rank {highest} and max_rank is {max_rank}: raise max_rank, train with a lower "
            "rank or on fewer tasks, use kind 'lora' with across_tasks 'continue', under which ranks do not add up, or "
            "merge by 'svd', which approximates."
        )
    tensors = {}
    for layer, (A, B) in folds.items():
        tensors[f"base_model.model.{layer}.lora_A.weight"] = A
        tensors[f"base_model.model.{layer}.lora_B.weight"] = B
    for head, module in task_heads(transformer_of(model)).items() if with_head else ():
        for name, tensor in module.state_dict().items():
            tensors[f"base_model.model.{head}.{name}"] = tensor.detach().cpu().clone()
    record = {
        "format": 1,
        "part": part.name,
        "base_model": base_name(model),
        "base_model_sha256": getattr(model, "base_sha256", None),
        "adapters": len(tasks),
        "ranks": {layer: A.shape[0] for layer, (A, _) in folds.items()},
        "merge": method,
        "relative_error": error,
    }
    return write_folder(Path(folder).resolve(), tensors, lora_config(model, part.adapters, folds, with_head), record)


def task_folds(adapters: Adapters) -> list[dict[str, Fold]]:
    """Of every adapter, merged ones first: layer name → its fold, on the CPU."""
    now = [{name: _cpu(fold(layer, adapter)) for name, layer in adapters.layers.items()} for adapter in adapters.names]
    return [*adapters.merged, *now]


def total_folds(adapters: Adapters) -> dict[str, Fold]:
    """Layer name → the sum of all its adapters, merged ones first, on the CPU; layers of rank 0 are left out."""
    return _summed(task_folds(adapters))


def lora_config(model: nn.Module, adapters: Adapters, folds: dict[str, Fold], with_head: bool = True) -> dict[str, Any]:
    """The content of ``adapter_config.json``: type LORA, each layer's rank and an alpha that equals it."""
    from peft import LoraConfig

    transformer = transformer_of(model)
    ranks = {name: A.shape[0] for name, (A, _) in folds.items()}
    highest = max(ranks.values())
    pattern = {f"^{re.escape(name)}": rank for name, rank in sorted(ranks.items()) if rank != highest}
    heads = list(task_heads(transformer)) if with_head else []
    modules = [name for name, _ in transformer.named_modules() if not _inside(name, adapters)]
    if getattr(transformer, "pooler", transformer) is None:
        modules.append("pooler.dense")  # left out of ours (models/pretrained.py), there in the base that a reader loads
    bases: list[Any] = [adapters.layers[name] for name in folds]
    config = LoraConfig(
        r=highest,
        lora_alpha=highest,
        target_modules=shortest(modules, list(folds)),
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        fan_in_fan_out=all(is_transposed(layer.get_base_layer()) for layer in bases),
        bias="none",
        task_type="SEQ_CLS" if heads else task_type(transformer),
        modules_to_save=heads or None,
        base_model_name_or_path=base_name(model),
        inference_mode=True,
    )
    content: dict[str, Any] = config.to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in content.items()}


def check_base(folder: Path, base_sha256: str) -> None:
    """Raise :class:`ModelError` unless the adapter in ``folder`` was trained on the base with this SHA-256."""
    path = Path(folder) / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        recorded, name = record["base_model_sha256"], record["base_model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"'{folder}' does not say what base its adapter belongs to ({error}): export it again."
        ) from error
    if recorded is None:
        raise ModelError(
            f"'{folder}' was exported from a model whose base has no SHA-256, so nothing can be compared: export it "
            "again from a pretrained model."
        )
    if recorded != base_sha256:
        raise ModelError(
            f"the adapter in '{folder}' belongs to the base '{name}' with SHA-256 {recorded[:12]}…, and this one has "
            f"{base_sha256[:12]}…: load the base that it was trained on."
        )


def write_folder(folder: Path, tensors: dict[str, Any], config: dict[str, Any], record: dict[str, Any]) -> Path:
    """Write an adapter beside its place, flush it and rename it; returns ``folder``.

    Raises:
        StateError: the folder cannot be written, or is not ours to replace.
    """
    if folder.exists() and not (folder / RECORD).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise StateError(f"'{folder}' holds something that is not an exported adapter: name a new or an empty folder.")
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        temporary.mkdir(parents=True)
        save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        for file, content in (("adapter_config.json", config), (RECORD, record)):
            (temporary / file).write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")
        seal_folder(temporary)
        replace_folder(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise StateError(
            f"the adapter could not be written to '{folder}' ({error}): free some space or name another folder."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _summed(tasks: list[dict[str, Fold]]) -> dict[str, Fold]:
    names = dict.fromkeys(name for folds in tasks for name in folds)
    totals = {name: stack_folds([folds[name] for folds in tasks]) for name in names}
    return {name: total for name, total in totals.items() if total[0].shape[0]}


def _cpu(folded: Fold) -> Fold:
    return folded[0].cpu(), folded[1].cpu()


def _inside(name: str, adapters: Adapters) -> bool:
    """Whether a module is part of an adapted layer, and so not in the pristine base."""
    return any(name.startswith(f"{layer}.") for layer in adapters.layers)


def base_name(model: nn.Module) -> str:
    """What the base model is called, or an empty string."""
    spec = getattr(model, "spec", None)
    named = spec.get("name") if isinstance(spec, dict) else None
    return str(named or getattr(getattr(transformer_of(model), "config", None), "_name_or_path", "") or "")


def task_type(transformer: nn.Module) -> str | None:
    """PEFT's word for what a language model does; None for any other."""
    name = type(transformer).__name__
    if name.endswith("ForCausalLM") or name.endswith("LMHeadModel"):
        return "CAUSAL_LM"
    return "SEQ_2_SEQ_LM" if name.endswith("ForConditionalGeneration") else None
