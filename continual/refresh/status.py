"""Where a store stands, and how two versions differ, in words."""

from __future__ import annotations

from continual.refresh.folder import Folder
from continual.refresh.records import Count, Manifest, Measured, Record, Report
from continual.refresh.untold import waiting

SHOWN = 12
"""Experiences that are listed, the worst first."""


class Status(Record):
    """Where a store stands; printed, it is what ``continual store status`` shows.

    Attributes:
        live: the live version, None before the first.
        last: the version made last, and what the gate said of it.
        measured: every experience in the live version.
        bytes: of the live version's files.
        stopped: why drift stopped an update since the last version was made; None where it did not.
        under_way: the rows of an update that broke off, None where there is none.
        untold: how many updates there are of which those whom the rules name are still to be told.
    """

    store: str
    model: str
    strategy: str
    live: int | None
    created: str | None
    versions: Count
    last: int | None
    last_answer: str | None
    last_sentence: str | None
    score: str | None
    mean: float | None
    measured: tuple[Measured, ...]
    drift: tuple[str, ...]
    bytes: Count
    erased: Count
    stopped: str | None
    under_way: str | None
    untold: Count

    def __str__(self) -> str:
        lines = [f"{self.store}: {self.model} with '{self.strategy}', {self.versions} versions"]
        if self.live is None:
            lines.append("no version is live yet: give it rows with `continual store update`")
        else:
            mean = (
                ""
                if self.mean is None
                else f", mean {self.score} {self.mean:.3f} (in brackets: two-sided 95 % intervals)"
            )
            lines.append(f"live: version {self.live} of {self.created}, {_size(self.bytes)}{mean}")
            lines += _tree(self.measured)
        if self.last is not None and self.last != self.live:
            lines.append(f"last made: version {self.last} ({self.last_answer}): {self.last_sentence}")
        elif self.last_sentence is not None:
            lines.append(self.last_sentence)
        lines += [f"drift: {sentence}" for sentence in self.drift]
        if self.erased:
            lines.append(f"{self.erased} rows were erased and are kept out")
        if self.stopped is not None:
            lines.append(f"the last update was stopped: {self.stopped}")
        if self.under_way is not None:
            lines.append(f"an update with '{self.under_way}' broke off: give its command again to go on with it")
        if self.untold:
            lines.append(f"what became of {self.untold} updates is still to be told: the next update tells it")
        return "\n".join(lines)


def status_of(folder: Folder) -> Status:
    """Where a store stands."""
    settings, live, numbers = folder.settings, folder.current(), folder.numbers()
    last = numbers[-1] if numbers else None
    now: tuple[Manifest, Report] | None = None if live is None else (folder.manifest(live), folder.report(live))
    newest = None if last is None else (folder.manifest(last), folder.report(last))
    scores = [one.score for one in now[1].measured if not one.probe and one.score is not None] if now else []
    entries = folder.journal.read()
    latest = next((one for one in reversed(entries) if one.event in ("made", "stopped")), None)
    return Status(
        store=str(folder.path),
        model=str(settings.model.get("name", settings.model.get("class", settings.model["kind"]))),
        strategy=settings.strategy_name,
        live=live,
        created=now[0].created if now else None,
        versions=len(numbers),
        last=last,
        last_answer=newest[0].answer if newest else None,
        last_sentence=newest[0].sentence if newest else None,
        score=now[1].score if now else None,
        mean=sum(scores) / len(scores) if scores else None,
        measured=now[1].measured if now else (),
        drift=tuple(found.sentence for found in newest[1].drift.found) if newest else (),
        bytes=sum(piece.bytes for piece in now[0].pieces.values()) if now else 0,
        erased=len(folder.erased()),
        stopped=latest.sentence if latest is not None and latest.event == "stopped" else None,
        under_way=folder.under_way(),
        untold=len(waiting(folder.path, len(entries))),
    )


def compare(folder: Folder, one: int, other: int) -> str:
    """Two versions side by side: where they come from, and every experience that both know."""
    manifests, reports = [folder.manifest(n) for n in (one, other)], [folder.report(n) for n in (one, other)]
    rows = [("", f"version {one}", f"version {other}")]
    for title, values in (
        ("made", [m.created for m in manifests]),
        ("experience", [m.experience for m in manifests]),
        ("trained on from", [str(m.parent or "nothing") for m in manifests]),
        ("gate", [m.answer for m in manifests]),
        ("try", [str(m.attempt) for m in manifests]),
        ("rows trained", [str(m.data.trained) for m in manifests]),
        ("size", [_size(sum(p.bytes for p in m.pieces.values())) for m in manifests]),
        ("training", [f"{r.cost.get('train', 0.0):.1f} s" for r in reports]),
        ("commit", [str(m.code.get("commit")) for m in manifests]),
    ):
        rows.append((title, values[0], values[1]))
    scores = [{m.name: m.score for m in report.measured} for report in reports]
    for name in dict.fromkeys(name for found in scores for name in found):
        rows.append((name, _score(scores[0].get(name)), _score(scores[1].get(name))))
    widths = [max(len(row[place]) for row in rows) for place in range(3)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _tree(measured: tuple[Measured, ...]) -> list[str]:
    def change(one: Measured) -> float:
        return (one.score or 0.0) - (one.learnt or 0.0)

    worst = sorted(measured, key=change)
    lines = []
    for one in worst[:SHOWN]:
        interval = "" if one.low is None or one.high is None else f" [{one.low:.3f}, {one.high:.3f}]"
        lines.append(f"  {one.name}  {_score(one.score)}{interval}  {change(one):+.3f} since learnt  ({one.rows} rows)")
    if len(worst) > SHOWN:
        lines.append(f"  … and {len(worst) - SHOWN} more, which lost less")
    return lines


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _size(count: int) -> str:
    amount, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB"):
        if amount < 1000:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.0f} {unit}" if unit == "bytes" else f"{amount:.1f} {unit}"
