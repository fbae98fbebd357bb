"""Files by the SHA-256 of their content: each lies once in the store, however many versions are made of it.

Only what holds tensors needs torch, so that who asks a store where it stands does not wait for it.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from continual.disk import file_sha256, flush
from continual.errors import StateError
from continual.refresh.records import Piece


class Objects:
    """The folder ``objects/`` of a store.

    Args:
        folder: made at the first write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, digest: str) -> Path:
        """Where the object with this SHA-256 lies, or would."""
        assert len(digest) == 64 and set(digest) <= set("0123456789abcdef"), f"no SHA-256: {digest!r}"
        return self.folder / digest[:2] / digest[2:]

    def put(self, state: dict[str, Any]) -> Piece:
        """Write a state, unless the same bytes lie there already; it is on the disk when this returns.

        Raises:
            StateError: the disk is full or cannot be written; nothing half-written stays.
        """
        from continual.state import state_bytes

        content = state_bytes(state)
        digest = hashlib.sha256(content).hexdigest()
        path = self.path(digest)
        if path.parent.is_symlink():
            raise StateError(f"'{path.parent}' is a link: a store holds its own files; do not trust this folder.")
        if not (path.is_file() and path.stat().st_size == len(content)):
            write_bytes(path, content)
        return Piece(sha256=digest, bytes=len(content))

    def read(self, piece: Piece, what: str) -> dict[str, Any]:
        """The state of a piece, after its bytes were checked.

        Raises:
            StateError: it is missing, or not what was written.
        """
        from continual.state import read_state_file

        self.check(piece, what)
        return read_state_file(self.path(piece.sha256))

    def check(self, piece: Piece, what: str) -> None:
        """Raise :class:`StateError` unless the piece is there and its bytes are those that were written."""
        path = self.path(piece.sha256)
        try:
            linked = path.is_symlink() or path.parent.is_symlink()
            whole = not linked and path.stat().st_size == piece.bytes and file_sha256(path) == piece.sha256
        except FileNotFoundError:
            raise StateError(f"{what} is missing ('{path}'): restore the store from a backup.") from None
        except OSError as error:
            raise StateError(f"{what} cannot be read ('{path}': {error.strerror}): mend that and try again.") from error
        if not whole:
            raise StateError(
                f"{what} is not what was written ('{path}': its SHA-256 differs): restore the store from a backup, or roll "
                "back to a version that does not use it."
            )

    def sweep(self, used: set[str]) -> int:
        """Remove every object that is not ``used``, and what a killed process began to write; returns how many."""
        removed = 0
        folders = [path for path in self.folder.glob("*") if path.is_dir() and not path.is_symlink()]
        for folder in folders:
            for path in list(folder.iterdir()):
                if folder.name + path.name not in used:
                    path.unlink(missing_ok=True)
                    removed += 1
        for folder in folders:
            flush(folder)
        return removed


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees all of it or none, and that it is on the disk when this returns.

    Raises:
        StateError: the disk is full or cannot be written; what was there is untouched.
    """
    temporary = path.parent / f".{path.name[:16]}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise StateError(
            f"'{path}' could not be written ({error.strerror or error}); what was there before is untouched: free some space "
            "or mend the permissions, then give the same command again."
        ) from error
