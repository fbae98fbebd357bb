"""Proof of a store's chain and bytes, in sentences about what is wrong."""

from __future__ import annotations

import hashlib

from continual.errors import ContinualError, StateError
from continual.refresh.folder import Folder, read_file
from continual.refresh.journal import Entry, live_entry, manifests_of
from continual.refresh.records import Manifest, Piece, read_record


def verify(folder: Folder) -> list[str]:
    """Everything that is wrong; empty where nothing is.

    Every line of the journal follows from the one before, and none is gone at its end; every version that it made is there
    with the manifest and the report that were written, or is staged to be; every piece has the bytes that its SHA-256
    says, once for all versions; every parent is the one that it was; the live version is the one that the journal names,
    or the one before where a process was killed between the two.
    """
    wrong: list[str] = []
    try:
        entries = folder.journal.read()
        settings, rules, erased = folder.settings, folder.rules, folder.erased()
    except ContinualError as error:
        return [str(error)]
    del settings, rules, erased
    if not folder.journal.mark.is_file():
        wrong.append(
            f"'{folder.journal.mark}' is missing, without which nobody would notice that the end of the journal was cut off: if "
            "nothing else is wrong, the next command that writes makes it anew."
        )
    manifests: dict[int, Manifest] = {}
    wanted = manifests_of(entries)
    for version, digest in wanted.items():
        try:
            manifests[version] = _manifest(folder, version, digest)
        except ContinualError as error:
            wrong.append(str(error))
    for number in folder.numbers():
        if number not in wanted:
            wrong.append(
                f"'{folder.versions / f'{number:04d}'}' is no version that the journal knows: do not trust it, remove it."
            )
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


def _manifest(folder: Folder, version: int, digest: str) -> Manifest:
    """The manifest that the journal wants, whose report is the one that was written."""
    for path in folder.places(version, "manifest.json"):
        content = read_file(path)
        if hashlib.sha256(content).hexdigest() == digest:
            manifest = read_record(Manifest, content, f"'{path}'")
            folder.report(version)
            return manifest
    path = folder.place(version) / "manifest.json"
    what = "is not what was written (its SHA-256 is not the journal's)" if path.is_file() else "is missing"
    raise StateError(f"'{path}' {what}: restore the store from a backup.")


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
