"""All versions of a store brought together: what each knows, what became of it, what it weighs.

Letters: V versions, S experiences.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from continual.refresh.records import Manifest, Measured, Report

Standing = Literal["live", "was live", "rolled back", "failed", "cannot tell", "not live"]
"""What became of a version; the last three never went live."""


@dataclass(frozen=True)
class Version:
    """One version.

    Attributes:
        standing: what became of it.
        scores: mean score by experience (probes are in ``report``), None where it was not measured.
        bytes: of all files that it is made of.
        added: bytes of those among them that no earlier version is made of.
    """

    manifest: Manifest
    report: Report
    standing: Standing
    scores: dict[str, float | None]
    bytes: int
    added: int

    @property
    def number(self) -> int:
        return self.manifest.version

    @property
    def mean(self) -> float | None:
        """Mean score over the experiences that were measured."""
        return mean(self.scores.values())


@dataclass(frozen=True)
class History:
    """All versions, the oldest first.

    Attributes:
        experiences: names of all S of them, in the order in which they were met.
        line: the live version (or the last one where none is live) and those that it was trained on from, oldest first.
        live: the live version; None where none is, or nothing is written of it.
    """

    versions: tuple[Version, ...]
    experiences: tuple[str, ...]
    line: tuple[Version, ...]
    live: Version | None

    @property
    def score(self) -> str:
        """Name of the score."""
        return self.versions[-1].report.score if self.versions else ""

    @property
    def matrix(self) -> list[list[float | None]]:
        """Mean scores, V × S, None where an experience was not measured."""
        return [[version.scores.get(name) for name in self.experiences] for version in self.versions]

    @property
    def disk(self) -> list[int]:
        """Bytes on disk after each version, V of them; a file that versions share counts once."""
        sums: list[int] = []
        for version in self.versions:
            sums.append((sums[-1] if sums else 0) + version.added)
        return sums


def history_of(
    reports: Sequence[tuple[Manifest, Report]], live: int | None, promoted: Collection[int | None]
) -> History:
    """Everything brought together.

    Args:
        reports: of the versions, in any order.
        live: number of the live version.
        promoted: numbers of the versions that were ever live, as far as the journal says.
    """
    ordered = sorted(reports, key=lambda one: one[0].version)
    parents = {manifest.version: manifest.parent for manifest, _ in ordered}
    head = live if live is not None else max(parents, default=None)
    line: list[int] = []
    while head is not None and head not in line:
        line.append(head)
        head = parents.get(head)
    seen: set[str] = set()
    experiences: dict[str, None] = {}
    versions = []
    for manifest, report in ordered:
        scores = {one.name: one.score for one in report.measured if not one.probe}
        experiences |= dict.fromkeys(scores)
        own = {piece.sha256: piece.bytes for piece in manifest.pieces.values()}
        added = sum(size for sha256, size in own.items() if sha256 not in seen)
        seen |= set(own)
        standing = _standing(manifest, live, line, promoted)
        versions.append(Version(manifest, report, standing, scores, sum(own.values()), added))
    by_number = {version.number: version for version in versions}
    return History(
        tuple(versions),
        tuple(experiences),
        tuple(by_number[number] for number in reversed(line) if number in by_number),
        by_number.get(live) if live is not None else None,
    )


def changes(measured: Measured) -> tuple[float | None, float | None]:
    """Change of the score since it was learnt, and since the version that was live before."""
    score = measured.score
    since = None if score is None or measured.learnt is None else score - measured.learnt
    last = None if score is None or measured.before is None else score - measured.before
    return since, last


def mean(values: Collection[float | None]) -> float | None:
    """Of the values that there are; None where there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _standing(manifest: Manifest, live: int | None, line: Sequence[int], promoted: Collection[int | None]) -> Standing:
    if manifest.version == live:
        return "live"
    if live is not None and manifest.version in line:
        return "was live"
    if manifest.version in promoted:
        return "rolled back"
    unlike: dict[str, Standing] = {"fail": "failed", "cannot tell": "cannot tell", "pass": "not live"}
    return unlike[manifest.answer]
