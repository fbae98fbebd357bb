"""Rows leave a store: every version's memory, hold-outs, scores and ledger, and the bytes that lay on the disk.

What a model's weights took from them stays: the result names the versions that were trained on them, and the commands that
train anew without them.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from continual.errors import StateError
from continual.monitor.monitor import Monitor
from continual.refresh.folder import Folder
from continual.refresh.measuring import measured_in
from continual.refresh.pieces import entries_of, split
from continual.refresh.records import Drift, Measured, Piece, Report, record_text
from continual.refresh.restored import restored, whole
from continual.refresh.untold import forget_rows
from continual.refresh.verify import verify


@dataclass(frozen=True)
class Erasure:
    """What an erasure did.

    Attributes:
        asked: rows that were named, each once; ``known`` of them were in the store.
        unknown: how those are called that no version was ever given, as far as the store can say: rows that were erased, or asked
            for, before are not among them.
        places: how many rows each place gave up, over all versions.
        written: versions whose files were written anew, since they held such rows.
        trained: versions whose weights were trained on such rows; where some were erased before, also on any that ever were.
        commands: what trains anew without them, from the last version before; empty where no live weights know them.
        sentence: all of that in words.
    """

    asked: int
    known: int
    unknown: tuple[str, ...]
    places: dict[str, int]
    written: tuple[int, ...]
    trained: tuple[int, ...]
    commands: tuple[str, ...]
    sentence: str


def erase(folder: Folder, rows: Tensor, names: Sequence[str], trust: Sequence[str]) -> Erasure:
    """Erase rows by their ids, int64 (N,), each once, that people call by these N names; call it as the only writer.

    Raises:
        StateError: an update is under way, the store is damaged, or the disk is full; the store is as it was, or the erasure was
            promised in the journal, and the next command that writes keeps the promise.
    """
    if (folder.work / "update.json").is_file():
        raise StateError(
            f"an update of '{folder.path}' broke off, and its files may hold such rows: give its command again, or add --abandon, "
            "before you erase."
        )
    wrong = verify(folder)
    if wrong:
        raise StateError(f"nothing was erased, since '{folder.path}' is damaged: {wrong[0]}")
    try:
        return _erase(folder, rows, names, trust)
    except Exception:
        folder.tidy()
        raise


def _erase(folder: Folder, rows: Tensor, names: Sequence[str], trust: Sequence[str]) -> Erasure:
    places: dict[str, int] = {}
    manifests: dict[int, str] = {}
    written, trained, known = [], [], torch.empty(0, dtype=torch.int64)
    for version in folder.numbers():
        manifest, report = folder.manifest(version), folder.report(version)
        held, taught = _touched(folder, version, rows)
        known = torch.unique(torch.cat([known, held]))
        if len(taught):
            trained.append(version)
        parent = manifests.get(manifest.parent or 0, manifest.parent_manifest)
        if not len(held):
            if parent != manifest.parent_manifest:
                manifests[version] = folder.stage(manifest.model_copy(update={"parent_manifest": parent}), report)
            continue
        learner = restored(folder, version, trust, device="cpu", progress=False)
        with whole(folder, version):
            for place, count in learner.erase(rows).items():
                places[place] = places.get(place, 0) + count
        pieces = {name: piece for name, piece in manifest.pieces.items() if name == "form"}
        pieces |= {name: folder.objects.put(piece) for name, piece in split(learner.state()).items()}
        report = _without_names(report)
        if learner.monitor is not None and learner.monitor.measured:
            report = report.model_copy(update={"measured": _again(report, learner.monitor)})
        content = record_text(report).encode()
        pieces["report"] = Piece(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
        changed: dict[str, Any] = {"pieces": pieces, "parent_manifest": parent, "erased": manifest.erased + 1}
        manifests[version] = folder.stage(manifest.model_copy(update=changed), report)
        written.append(version)
    forget_rows(folder.path)
    before = folder.erased()
    gone = sorted({*before, *rows.tolist()})
    strange_N = ~torch.isin(rows, torch.cat([known, torch.tensor(before, dtype=torch.int64)]))
    again = bool(torch.isin(rows, torch.tensor(before, dtype=torch.int64)).any())
    earlier = [version for entry in folder.journal.read() if entry.event == "erased" for version in entry.trained]
    taught_by = sorted({*trained, *(earlier if again else [])})
    unknown = tuple(names[place] for place in strange_N.nonzero().flatten().tolist())
    them = "them or on rows that were erased before" if again else "them"
    more = (
        f"; the weights of {_listed(taught_by)} were trained on {them}, which stays, as does what parts computed from several rows "
        "(sums, curvatures, directions of gradients)"
        if taught_by
        else ""
    )
    sentence = f"{len(known)} of {len(rows)} rows were erased from {len(written)} versions{more}"
    if manifests or len(gone) > len(before):
        folder.put_erased(manifests, gone, len(known), trained, sentence)
    folder.sweep()
    commands = _commands(folder, taught_by)
    return Erasure(len(rows), len(known), unknown, places, tuple(written), tuple(taught_by), commands, f"{sentence}.")


def _touched(folder: Folder, version: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Those of ``rows`` that a version was given, and those that its weights were trained on."""
    held, taught = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
    names = [name for name in folder.manifest(version).pieces if name.startswith("ledger/")]
    pieces = {name: folder.piece(version, name) for name in names}
    with whole(folder, version):
        for entry in entries_of(pieces, "ledger").values():
            taught.append(entry["trained_ids"])
            held += [entry["trained_ids"], entry["tested_ids"]]
        return rows[torch.isin(rows, torch.cat(held))], rows[torch.isin(rows, torch.cat(taught))]


def _commands(folder: Folder, trained: list[int]) -> tuple[str, ...]:
    """How the live line is trained anew from the last version before the rows came in."""
    line = folder.line(folder.current())
    hit = [version for version in line if version in trained]
    if not hit:
        return ()
    store, before = shlex.quote(str(folder.path)), folder.manifest(hit[0]).parent
    first = f"continual store rollback {store} {before}"
    if before is None:
        first = f"# version {hit[0]} is the first: make a new store, leave the rows out of its files, and give it the same updates"
        store = "NEW-STORE"
    commands = [first]
    for version in line[line.index(hit[0]) :]:
        manifest = folder.manifest(version)
        path, name = manifest.data.path, manifest.experience
        if manifest.data.sha256 is None and path == "rows":
            commands.append(
                f"# '{name}' came from Python: give the store its rows again, update(rows, name={name!r}, again=True)"
            )
            continue
        own = "" if name == Path(path).stem else f" --name {shlex.quote(name)}"
        commands.append(
            f"continual store update {store} {shlex.quote(path)}{own}{'' if before is None else ' --again'}"
        )
    return tuple(commands)


def _again(report: Report, monitor: Monitor) -> tuple[Measured, ...]:
    """What was measured, on the rows that are left; ``before`` stays, since the live version's scores of then are not kept."""
    before = {one.name: one.before for one in report.measured}
    return tuple(one.model_copy(update={"before": before.get(one.name)}) for one in measured_in(monitor))


def _without_names(report: Report) -> Report:
    """Without what its findings quote of single rows."""
    found = tuple(one.without_rows() for one in report.drift.found)
    drift: Drift = report.drift.model_copy(update={"found": found})
    return report.model_copy(update={"drift": drift})


def _listed(versions: Sequence[int]) -> str:
    head = ", ".join(str(version) for version in versions[:10])
    return f"version{'s' * (len(versions) > 1)} {head}{' …' * (len(versions) > 10)}"
