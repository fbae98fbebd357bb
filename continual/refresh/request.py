"""``work/update.json``: the update under way, for the next process to go on with."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from continual.errors import shown
from continual.refresh.records import Count, Digest, Drift, Record
from continual.refresh.rules import Rules
from continual.spec import parse


class Diverged(Record):
    """A try whose training broke off: its place in the ladder, the sentence why, and the seconds that it took."""

    attempt: Count
    sentence: str
    seconds: float


class Request(Record):
    """``work/update.json``: what the update under way was asked for, and the tries that came to nothing.

    Attributes:
        live: the version that it is trained on from.
        first: the number of the first version that it makes.
        rules: as they were when it began.
    """

    fingerprint: Digest
    path: str
    experience: str
    live: Count | None
    first: Count
    rules: dict[str, Any]
    begun: str
    drift: Drift = Field(default_factory=Drift)
    drift_seconds: float = 0.0
    diverged: tuple[Diverged, ...] = ()


def rules_of(request: Request) -> Rules:
    """The rules as they were when the update began.

    Raises:
        SpecError: the file holds something that is not allowed.
    """
    return parse(Rules, request.rules, f"the rules of the update with '{request.path}' that broke off")


def why_given_up(one: Diverged, request: Request) -> str:
    """A try that came to nothing, in one sentence."""
    settings = [{}, *rules_of(request).ladder.settings][one.attempt]
    return f"the try {shown(settings, 200) if settings else 'of the strategy as it is'} came to nothing: {one.sentence}"
