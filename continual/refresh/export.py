"""A learner's model as a plain folder that somebody uses without this package.

Everything in it is read by stock torch, transformers, peft and safetensors:

=============================  ============================================================================================
``README.md``                  a model card: what it still knows, the gate, where it comes from, and the code that predicts
``inference.json``             what that code reads: pooling, ``max_length``, layers, the base and its SHA-256, the head's scale
``labels.json``                ``id2label`` and ``label2id``
``adapter_config.json`` …      PEFT's adapter, without ``modules_to_save``, so that vLLM takes it; in ``0``, ``1`` … where each
                               experience has one of its own, with ``router.safetensors``
``config.json`` …              the whole transformer, where it was trained in full
``head.safetensors``           the head: tensors whose formula is in the code
``tokenizer.json`` …           the tokenizer, with its chat template
=============================  ============================================================================================

What cannot be given so is refused in a sentence, and nothing is left of the attempt. The folder is written beside its place,
flushed, sealed and renamed; what is there and is no export is left alone.
"""

from __future__ import annotations

import copy
import inspect
import json
import shutil
import uuid
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from continual.disk import check_replaceable, recover_folder, replace_folder, seal_folder
from continual.errors import CompositionError, StateError
from continual.learner import Learner
from continual.models.module import UserModule
from continual.refresh.card import Card, render_card
from continual.refresh.plain.head import Head, plain_head
from continual.refresh.plain.snippet import snippet
from continual.refresh.plain.write import write_body

RECORD = "inference.json"
FORMAT = 1
_FILES = {
    "inference.json": "what the code above reads",
    "labels.json": "names of the classes",
    "adapter_config.json": "the adapter, as PEFT and vLLM read it, with `adapter_model.safetensors`",
    "continual.json": "which base the adapter belongs to, and its ranks",
    "0": "the adapter of the first experience, and `1` and so on those of the others",
    "router.safetensors": "features of the base that tell which adapter a row goes to",
    "config.json": "of the transformer",
    "model.safetensors": "weights",
    "head.safetensors": "the head",
    "tokenizer.json": "the tokenizer, with its other files",
}


def export_model(
    learner: Learner, folder: Path, *, card: Card, max_rank: int | None = None, only: int | None = None
) -> Path:
    """Write the model of a learner for people who do not have this package; returns the folder.

    Where several processes train, all of them call it and the main one writes.

    Args:
        folder: a new one, an empty one, or an earlier export, which is replaced.
        card: what the model card says.
        max_rank: refuse a LoRA of a higher rank, such as a server's limit.
        only: where each experience has an adapter of its own, that of this one alone, from 0, and its classes.

    Raises:
        CompositionError: parts that have no form which stock libraries use, or a rank above ``max_rank``.
        ModelError: an adapter whose base is not known, or nothing was learnt yet.
        StateError: the folder holds something else or cannot be written, or the learner stands in the middle of an update.
    """
    folder = Path(folder)

    def write() -> None:
        _check_free(folder)
        _check_learner(learner)
        temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            temporary.mkdir(parents=True)
            _write(learner, temporary, card, max_rank, only)
            seal_folder(temporary)
            _check_free(folder)
            replace_folder(temporary, folder)
        except (OSError, SafetensorError) as error:
            raise StateError(
                f"the export could not be written to '{folder}' ({error}); what was there before is untouched: free some space "
                "or name another folder."
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    learner.processes.from_main(write)
    return folder


def _check_free(folder: Path) -> None:
    """Raise :class:`StateError` where ``folder`` holds anything but an earlier export."""
    recover_folder(folder)
    check_replaceable(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RECORD).is_file():
        raise StateError(
            f"'{folder}' holds something that is no export of a model: name a new folder, or an empty one."
        )


def _check_learner(learner: Learner) -> None:
    if learner.strategy.engine is not None:
        raise CompositionError(
            f"{learner.strategy.engine.name} answers in place of our model and head: save what it trained with its own library."
        )
    if not learner.updates or learner._failed is not None or learner._pending is not None:
        raise StateError(
            "the learner has learnt nothing yet, or stands in the middle of an update and would export a half-trained model: "
            "finish the update, or load its last save."
        )
    for part in learner.parts:
        if part.slot == "recall":
            raise CompositionError(
                f"{part.name} looks rows up while it answers, which no stock library does: serve the learner itself, or learn "
                "without it."
            )


def _write(learner: Learner, folder: Path, card: Card, max_rank: int | None, only: int | None) -> None:
    model = learner.model
    head = _head(learner) if model.gives_features else None
    body = write_body(learner, folder, max_rank=max_rank, only=only)
    text = model.tokenizer is not None
    tokens = text or body.form in ("features", "language", "transformer") or _reads_tokens(learner)
    told: dict[str, Any] = {
        "format": FORMAT,
        "form": body.form,
        "objective": learner.objective,
        "max_length": model.max_length,
        "base_model": None,
        "base_model_sha256": None,
        "base_file": None,
        "adapters": [],
        "virtual": False,
        "routing": None,
        **body.told,
        "head": None if head is None else head.settings,
        **_classes(learner, head, body.told.get("adapters", []), only),
    }
    names = list(learner.class_names[: told["outputs"]]) if learner.objective == "classification" else []
    if names:
        _write_json(folder / "labels.json", _labels(names))
        _name_classes(folder / "config.json", names, told["outputs"])
    tensors = body.head if head is None else head.tensors
    if tensors:
        save_file(tensors, folder / "head.safetensors", metadata={"format": "pt"})
    if text:
        _write_tokenizer(model.tokenizer, folder)
    _write_json(folder / RECORD, told)
    code = snippet(told, text=text, tokens=tokens, head=() if head is None else head.lines, own_head=bool(body.head))
    files = {name: what for name, what in _FILES.items() if (folder / name).exists()}
    readme = render_card(card, told, code, files, names)
    (folder / "README.md").write_text(readme, encoding="utf-8")


def _head(learner: Learner) -> Head:
    module, size = learner.model.head, learner.model.feature_size
    assert module is not None and size is not None, "a learner that has learnt has a head"
    name = next(part.name for part in learner.parts if part.slot == "head")
    return plain_head(module, name, size)


def _classes(learner: Learner, head: Head | None, adapters: list[str], only: int | None) -> dict[str, Any]:
    """Which classes compete, as in ``Learner.predict``; in the scenario ``task`` those of each task by its name."""
    if learner.objective != "classification":
        return {"outputs": None, "classes": [], "tasks": {}}
    owner = learner.context.owner
    known = [True] * len(owner) if head is None or head.known is None else head.known.tolist()
    classes = [label for label, index in enumerate(owner) if index >= 0 and known[label]]
    mine = [label for label in classes if only is not None and owner[label] == only]
    told: dict[str, Any] = {"outputs": len(owner), "classes": mine or classes, "tasks": {}}
    if learner.scenario == "task" and only is None:
        for index, name in enumerate(learner.experience_names):
            own = [label for label in classes if owner[label] == index]
            told["tasks"][name] = {"classes": own, "adapter": adapters[index] if len(adapters) > 1 else None}
    return told


def _reads_tokens(learner: Learner) -> bool:
    backbone = learner.model.backbone
    return isinstance(backbone, UserModule) and "input_ids" in inspect.signature(backbone.module.forward).parameters


def _name_classes(path: Path, names: list[str], outputs: int) -> None:
    """Write the classes into a transformer's own ``config.json``; it counts them, so outputs without a class have a name too."""
    if path.is_file():
        whole = [*names, *(f"LABEL_{label}" for label in range(len(names), outputs))]
        config = json.loads(path.read_text(encoding="utf-8"))
        _write_json(path, {**config, **_labels(whole)})


def _labels(names: list[str]) -> dict[str, Any]:
    return {
        "id2label": {str(label): name for label, name in enumerate(names)},
        "label2id": {name: label for label, name in enumerate(names)},
    }


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """As it was loaded: without what our own calls of it, and where it lay, have left in it."""
    tokenizer = copy.deepcopy(tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    for name in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(name, None)
    tokenizer.save_pretrained(folder)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
