"""Proof of a store's chain and bytes, in sentences about what is wrong."""

from __future__ import annotations

import hashlib
from pathlib import Path

from continual.errors import ContinualError
from continual.refresh.folder import Folder
from continual.refresh.journal import Entry, live_entry, manifests_of
from continual.refresh.records import Manifest, Piece, read_record


def verify(folder: Folder) -> list[str]:
    """Everything that is wrong; empty where nothing is.

    Every line of the journal follows from the one before; every version that it made is there with the manifest and the
    report that were written, or is staged to be; every piece has the bytes that its SHA-256 says, once for all versions;
    every parent is the one that it was; the live version is the one that the journal names, or the one before where a
    process was killed between the two.
    """
    wrong: list[str] = []
    try:
        entries = folder.journal.read()
        settings, rules, erased = folder.settings, folder.rules, folder.erased()
    except ContinualError as error:
        return [str(error)]
    del settings, rules, erased
    manifests: dict[int, Manifest] = {}
    wanted = manifests_of(entries)
    for version, digest in wanted.items():
        found, sentence = _manifest(folder, version, digest)
        if found is None:
            wrong.append(sentence)
        else:
            manifests[version] = found
    for number in folder.numbers():
        if number not in wanted:
            wrong.append(f"'{folder.place(number)}' is no version that the journal knows: do not trust it, remove it.")
    for version, manifest in manifests.items():
        if manifest.parent is not None and manifest.parent_manifest != wanted.get(manifest.parent):
            wrong.append(
                f"version {version} was trained on from another version {manifest.parent} than the one that is there."
            )
    checked: dict[str, tuple[Piece, str]] = {}
    for version, manifest in manifests.items():
        for name, piece in manifest.pieces.items():
            if name != "report":
                checked.setdefault(piece.sha256, (piece, f"{name} of version {version}"))
    for piece, what in checked.values():
        try:
            folder.objects.check(piece, what)
        except ContinualError as error:
            wrong.append(str(error))
    return wrong + _current(folder, entries)


def _manifest(folder: Folder, version: int, digest: str) -> tuple[Manifest | None, str]:
    places = [folder.place(version), folder.staged / f"{version:04d}"]
    for place in places:
        path = place / "manifest.json"
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() == digest:
                try:
                    manifest = read_record(Manifest, content, f"'{path}'")
                except ContinualError as error:
                    return None, str(error)
                return _report(places, manifest)
    there = places[0] / "manifest.json"
    what = "is not what was written (its SHA-256 is not the journal's)" if there.is_file() else "is missing"
    return None, f"'{there}' {what}: restore the store from a backup."


def _report(places: list[Path], manifest: Manifest) -> tuple[Manifest | None, str]:
    for place in places:
        path = place / "report.json"
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == manifest.pieces["report"].sha256:
            return manifest, ""
    return None, f"'{places[0] / 'report.json'}' is missing or not what was written: restore the store from a backup."


def _current(folder: Folder, entries: list[Entry]) -> list[str]:
    live = live_entry(entries)
    try:
        current = folder.current()
    except ContinualError as error:
        return [str(error)]
    wanted = None if live is None else live.version
    if current == wanted:
        return []
    before = live_entry([entry for entry in entries if entry is not live])
    if live is not None and entries[-1] is live and current == (None if before is None else before.version):
        return []
    return [
        f"CURRENT names version {current}, and the journal version {wanted}: the next writing command puts it right."
    ]
