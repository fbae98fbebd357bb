"""Who is told of what became of an update: a command, a web hook, Prometheus. None of them can make the update fail."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from http.client import HTTPMessage, InvalidURL
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from continual.disk import write_text
from continual.errors import ContinualError, StateError
from continual.refresh.prometheus import exposition, with_live
from continual.refresh.records import Manifest, Outcome, Report, record_text
from continual.refresh.rules import AlertRules
from continual.refresh.untold import outcome_in, waiting

if TYPE_CHECKING:
    from continual.refresh.folder import Folder

SILENT = ("known", "rolled back")
"""What of nobody is told: nothing was done."""

_TAIL = 200
"""Characters of a command's output that a sentence shows."""


def tell(outcome: Outcome, rules: AlertRules, store: Path, live: tuple[Manifest, Report] | None = None) -> list[str]:
    """Tell everyone whom the rules name; returns one sentence for each who could not be told.

    Args:
        outcome: handed on as JSON. Of rows that were known already (``known``, ``rolled back``) nobody is told.
        store: the folder of the store; the command runs in it, and a relative path of the Prometheus file begins there.
        live: what is written of the version that is live, for the Prometheus file.
    """
    if outcome.happened in SILENT:
        return []
    told: list[tuple[str, Callable[[], str | None]]] = []
    command, webhook, prometheus = rules.command, rules.webhook, rules.prometheus
    if outcome.happened in rules.outcomes:
        if command is not None:
            told.append((f"the command '{command[0]}'", partial(_run, command, outcome, store, rules.timeout)))
        if webhook is not None:
            told.append((f"the web hook at {_place(webhook)}", partial(_post, webhook, outcome, rules.timeout)))
    if prometheus is not None:
        told.append((f"the Prometheus file '{prometheus}'", partial(_write, store / prometheus, outcome, live)))
    found = [(who, _failure(attempt)) for who, attempt in told]
    return [f"{who} was not told: {why}." for who, why in found if why is not None]


def tell_waiting(folder: Folder, rules: AlertRules) -> list[str]:
    """Tell what updates of a store have left to be told, each at least once, whether it is heard or not.

    Not inside :meth:`~continual.refresh.folder.Folder.writing`, so that a command that is told may write to the store itself.
    Where another process tells already, it is left to that one, which looks again when it is done.

    Returns:
        One sentence for each who could not be told.
    """
    deaf: list[str] = []
    while waiting(folder.path, len(folder.journal.read())):
        lock = FileLock(folder.path / ".telling")
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError):
            break
        try:
            for path in waiting(folder.path, len(folder.journal.read())):
                deaf += _tell_file(folder, path, rules)
                path.unlink(missing_ok=True)
        except OSError:
            break  # it is told again by the next command
        finally:
            lock.release()
    return deaf


def show_live(folder: Folder, rules: AlertRules) -> list[str]:
    """Put the version that is live now into the Prometheus file, where there is one that an update has written.

    Returns:
        One sentence where that failed.
    """
    path = None if rules.prometheus is None else folder.path / rules.prometheus
    if path is None or not path.is_file():
        return []

    def write() -> None:
        before = path.read_text(encoding="utf-8")
        after = with_live(before, str(folder.path), _live(folder, folder.current()))
        if after != before:
            write_text(path, after)

    why = _failure(write)
    return [] if why is None else [f"the Prometheus file '{rules.prometheus}' was not told: {why}."]


def _live(folder: Folder, version: int | None) -> tuple[Manifest, Report] | None:
    return None if version is None else (folder.manifest(version), folder.report(version))


def _tell_file(folder: Folder, path: Path, rules: AlertRules) -> list[str]:
    try:
        outcome = outcome_in(path)
    except StateError as error:
        return [f"nobody was told of an update, since {str(error).rstrip('.')}: see `continual store history`."]
    live = None
    with suppress(ContinualError):  # a damaged version must not keep anybody from hearing of it
        live = _live(folder, outcome.live)
    return tell(outcome, rules, folder.path, live)


def _failure(attempt: Callable[[], str | None]) -> str | None:
    """Why it failed, whatever happened; None where it did not."""
    try:
        return attempt()
    except Exception as error:
        return _one_line(str(error)).rstrip(".") or type(error).__name__


def _write(path: Path, outcome: Outcome, live: tuple[Manifest, Report] | None) -> None:
    write_text(path, exposition(outcome, live, time.time()))


def _run(command: list[str], outcome: Outcome, store: Path, timeout: float) -> str | None:
    """Start the program without a shell, in a session of its own, and end it with all it started when its time is over.

    Its input and output are files, so that neither a program that reads nothing nor one that leaves something running in the
    background can hold up the update.
    """
    with TemporaryFile() as given, TemporaryFile() as printed:
        given.write(record_text(outcome).encode())
        given.seek(0)
        with subprocess.Popen(
            command, stdin=given, stdout=printed, stderr=subprocess.STDOUT, cwd=store, start_new_session=True
        ) as process:
            try:
                status = process.wait(timeout)
            except subprocess.TimeoutExpired:
                _end(process)
                return f"it did not end within {timeout:g} s"
        if status == 0:
            return None
        printed.seek(max(printed.seek(0, os.SEEK_END) - 4 * _TAIL, 0))
        tail = _one_line(printed.read().decode(errors="replace"))
    return f"it ended with status {status}" + (f" and said '{tail}'" if tail else "")


def _end(process: subprocess.Popen[bytes]) -> None:
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def _post(address: str, outcome: Outcome, timeout: float) -> str | None:
    """Post the outcome, in a thread of its own: looking up a name and an answer that drips know no time limit of theirs."""
    found: list[str | None] = []
    body = record_text(outcome).encode()
    thread = threading.Thread(
        target=lambda: found.append(_failure(lambda: _send(address, body, timeout))), name="webhook", daemon=True
    )
    thread.start()
    thread.join(timeout)
    return found[0] if found else f"there was no answer within {timeout:g} s"


def _send(address: str, body: bytes, timeout: float) -> str | None:
    handlers: list[Any] = [_NoRedirect]
    if urlsplit(address).scheme == "http":  # this machine itself, never by way of a proxy
        handlers.append(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(
        address, data=body, method="POST", headers={"Content-Type": "application/json", "User-Agent": "continual"}
    )
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=timeout):
            return None
    except urllib.error.HTTPError as error:
        with error:
            if 300 <= error.code < 400:
                return f"it redirects (status {error.code}), which would lose the message: give the address it leads to"
            return f"it answered with status {error.code}"
    except urllib.error.URLError as error:
        return _one_line(str(error.reason))
    except InvalidURL:
        return "its address is not valid: give one such as 'https://example.org/hook'"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: it could lead to another scheme or machine, and most turn a post into a get without its body."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:
        return None


def _place(address: str) -> str:
    """Scheme, machine and port: the rest of a hook's address is often a secret."""
    try:
        parts = urlsplit(address)
    except ValueError:
        return "an address that is not valid"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _TAIL else f"…{line[-_TAIL:]}"
