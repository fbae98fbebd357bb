"""Adapters in PEFT's own folders: one that lies with everything else, or one for each experience."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from continual.errors import CompositionError
from continual.learner import Learner
from continual.models.model import Model
from continual.parts.adapter.adalora import AdaLoRA
from continual.parts.adapter.export import export_adapter
from continual.parts.adapter.lora import LoRA
from continual.parts.adapter.prefix import Prefix
from continual.parts.adapter.prompt import Prompt
from continual.parts.adapter.routing import Router
from continual.parts.adapter.virtual_export import export_virtual

Adapter = LoRA | AdaLoRA | Prompt | Prefix


def adapter_of(learner: Learner, max_rank: int | None, only: int | None) -> Adapter | None:
    """The adapter of a learner, where it has one.

    Raises:
        CompositionError: an adapter of the user's own, or a ``max_rank`` or ``only`` that means nothing for it.
    """
    found = next((part for part in learner.parts if part.slot == "adapter"), None)
    if found is not None and not isinstance(found, Adapter):
        raise CompositionError(
            f"{found.name} is an adapter of your own, which stock PEFT does not know: take 'lora', 'adalora', 'prompt' or "
            "'prefix', or write its files yourself."
        )
    if max_rank is not None and not isinstance(found, LoRA | AdaLoRA):
        raise CompositionError(
            f"max_rank is a limit for LoRA and AdaLoRA, and strategy '{learner.strategy.name}' trains "
            f"{'no adapter' if found is None else found.name}: leave max_rank out."
        )
    if only is not None and (found is None or not found.adapters.apart):
        raise CompositionError(
            f"only names the adapter of one experience, and strategy '{learner.strategy.name}' keeps none apart: leave it out."
        )
    if found is not None and only is not None and not 0 <= only < len(found.adapters.names):
        raise CompositionError(
            f"{found.name} has {len(found.adapters.names)} adapters and number {only} was asked for: count from 0."
        )
    return found


def check_single(adapter: Adapter, only: int | None, why: str) -> None:
    """Raise :class:`CompositionError` where several adapters are kept apart and none of them was chosen."""
    names = adapter.adapters.names
    if adapter.adapters.apart and only is None and len(names) > 1:
        raise CompositionError(
            f"{adapter.name} has an adapter for each of {len(names)} experiences, and {why}: export one of them with only, "
            "from 0."
        )


def write_adapters(
    model: Model, adapter: Adapter, folder: Path, max_rank: int | None, only: int | None, *, with_head: bool = True
) -> dict[str, Any]:
    """Write PEFT's folders, and ``router.safetensors`` where rows are routed by features; returns what is told of them.

    Several adapters lie in ``0``, ``1`` and so on, a single one in ``folder`` itself (``.``), where PEFT, vLLM and the hub
    look for it.
    """
    count = len(adapter.adapters.names)
    apart = adapter.adapters.apart and only is None and count > 1
    places: dict[str, int | None] = {str(place): place for place in range(count)} if apart else {".": only}
    for name, place in places.items():
        target = folder / ("adapter" if name == "." else name)
        if isinstance(adapter, Prompt | Prefix):
            export_virtual(model, adapter, target, only=place)
        else:
            export_adapter(model, adapter, target, max_rank=max_rank, only=place, with_head=with_head)
        (target / "seal.json").unlink()
        if name == ".":
            for file in target.iterdir():
                file.rename(folder / file.name)
            target.rmdir()
    told = {"adapters": list(places), "virtual": isinstance(adapter, Prompt | Prefix), "routing": None}
    router = router_of(adapter)
    if apart and router is not None:
        told["routing"] = router.wanted
        if router.wanted == "features":
            tensors = {
                "prototypes": router.prototypes_PD.cpu().contiguous(),
                "place": router.place_P.cpu().contiguous(),
            }
            save_file(tensors, folder / "router.safetensors", metadata={"format": "pt"})
    return told


def router_of(adapter: Adapter) -> Router | None:
    """What sends rows to adapters that are kept apart."""
    if isinstance(adapter, AdaLoRA):
        return None
    return adapter.router if isinstance(adapter, LoRA) else adapter.adapters.router
