"""What is written of a version: its manifest (which bytes it is made of) and its report (what is known of it).

Both are JSON files that are read back strictly: a key that is missing or of another type is damage.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Ge
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from continual.errors import StateError
from continual.monitor.gate import Answer
from continual.refresh.rules import Finding

FORMAT = 1

Count = Annotated[int, Ge(0)]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""Hexadecimal SHA-256."""
VersionName = Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]{0,8}$")]
PieceName = Annotated[str, StringConstraints(pattern=r"^[a-z]+(/[0-9]{4,})?$")]


class Record(BaseModel):
    """Base of what is written and read back."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Check(Record):
    """One rule of the gate, applied to one experience, probe, or the version as a whole.

    Attributes:
        rule: the key of :class:`~continual.refresh.rules.GateRules`.
        name: of the experience or probe; empty where the rule is about the whole.
        value: what was measured (a drop, a score, a share, a ratio, bytes).
        low, high: one-sided bounds of it, each at the confidence of the rules; None where it has none.
        limit: what the rule allows.
        p_value: of "it is broken", corrected for the number of experiences; None where nothing was tested.
        rows_needed: where the answer is ``cannot tell``, how many rows would tell; None where none would.
    """

    rule: str
    name: str
    answer: Answer
    value: float | None
    low: float | None = None
    high: float | None = None
    limit: float
    p_value: float | None = None
    rows: Count = 0
    rows_needed: int | None = None


class Judgement(Record):
    """What the gate says of a version: the answer, why in one sentence, and every check, the worst first."""

    answer: Answer
    sentence: str
    checks: tuple[Check, ...] = ()


class Found(Record):
    """One finding of the comparison of new rows with those at hand.

    Attributes:
        effect: how large it is: for a shift how far the two sides can be told apart, in [0, 1]; else a share of the new rows.
        p_value: None where nothing was tested.
        rows: how many new rows were looked at, or are concerned.
        names: classes, columns or row ids that it is about, the most telling first, at most twenty.
    """

    kind: Finding
    sentence: str
    effect: float
    p_value: float | None = None
    rows: Count = 0
    names: tuple[str, ...] = ()

    def without_rows(self) -> Found:
        """Without what it quotes of single rows."""
        return self.model_copy(update={"names": ()}) if self.kind in ("near-duplicates", "leakage") else self


class Drift(Record):
    """The comparison of new rows with those at hand.

    Attributes:
        new, reference: rows that were looked at on each side.
        found: what was found, the most serious first; empty where nothing was.
        known: what should be known and is nothing wrong, such as new classes where classes come month by month.
        tested: every kind that could be tested here, found or not.
        accepted: kinds found that the rules would have stopped the update for, had a person not accepted them.
    """

    new: Count = 0
    reference: Count = 0
    found: tuple[Found, ...] = ()
    known: tuple[Found, ...] = ()
    tested: tuple[Finding, ...] = ()
    accepted: tuple[Finding, ...] = ()


class Measured(Record):
    """The mean score of one experience (or probe) in a version.

    Attributes:
        learnt: mean score in the version that learnt it, on the same rows.
        before: in the version that was live when this one was made; None where it did not know the experience.
        low, high: two-sided 95 % interval of ``score``.
    """

    name: str
    rows: Count
    score: float | None
    low: float | None = None
    high: float | None = None
    learnt: float | None = None
    before: float | None = None
    probe: bool = False


class Data(Record):
    """The rows that an update was given.

    Attributes:
        path: the file's name as it was given, or what the rows were called.
        sha256: of the file; None where rows were given from Python.
        fingerprint: of the rows, whatever their order and their file.
        offered: rows in it; trained, holdout, valid: what became of them (those left out are in the notes).
        classes: names of the classes among them that were new.
    """

    path: str
    sha256: Digest | None
    fingerprint: Digest
    offered: Count
    trained: Count
    holdout: Count
    valid: Count = 0
    classes: tuple[str, ...] = ()


class Report(Record):
    """What is known of a version.

    Attributes:
        attempt: 0 for the strategy as it is, then the place in the ladder, from 1; ``settings`` is what that changed.
        cost: seconds of ``train``, ``evaluate``, ``drift`` and ``rest`` (everything else up to the writing of the
            version), and ``rows_trained``.
        bytes: of each part's state, of the weights, and of what else a version is made of.
        score: name of the score (``accuracy`` …), higher is better.
    """

    version: Annotated[int, Ge(1)]
    experience: str
    attempt: Count
    settings: dict[str, Any]
    data: Data
    judgement: Judgement
    drift: Drift
    measured: tuple[Measured, ...]
    score: str
    notes: tuple[str, ...]
    cost: dict[str, float]
    bytes: dict[str, Count]


class Piece(Record):
    """A file that a version is made of: it lies once in the store, under its SHA-256, however many versions share it."""

    sha256: Digest
    bytes: Count


class Manifest(Record):
    """Everything that a version is made of and comes from; its own SHA-256 is in the journal.

    Attributes:
        parent: the version that it was trained on from, and the SHA-256 of that one's manifest; None for the first.
        update: place of its experience in its own line of versions, from 0.
        pieces: name → file: ``learner``, ``clock``, ``form``, ``report``, and ``tests/0000``, ``ledger/0000`` …
            (:mod:`continual.refresh.pieces`).
        answer: of the gate, and the sentence why.
        code: version of this package, commit, and versions of the packages that figures depend on.
        erased: how many times rows were erased from it.
    """

    format: Literal[1] = 1
    version: Annotated[int, Ge(1)]
    parent: Annotated[int, Ge(1)] | None
    parent_manifest: Digest | None
    created: str
    experience: str
    update: Count
    attempt: Count
    data: Data
    model: dict[str, Any]
    base_model_sha256: Digest | None
    strategy: str
    strategy_fingerprint: str
    seed: int
    code: dict[str, Any]
    answer: Answer
    sentence: str
    pieces: dict[PieceName, Piece]
    erased: Count = 0


class Outcome(Record):
    """What became of an update, as it is printed, handed to alerts and returned in Python.

    Attributes:
        happened: ``promoted``; ``failed`` or ``cannot tell`` (the version, if training came to its end, is there and not live);
            ``stopped`` by drift (no version was made); ``known`` (these rows were learnt before: nothing was done);
            ``rolled back`` (the same, and the version that learnt them was taken back).
        version: made now, or the one that is meant; None where there is none.
        live: the version that is live now; None where none is.
        score: mean over all experiences in that version.
    """

    store: str
    happened: Literal["promoted", "failed", "cannot tell", "stopped", "known", "rolled back"]
    version: int | None
    live: int | None
    experience: str
    sentence: str
    score: float | None = None
    worst: Check | None = None
    found: tuple[Found, ...] = ()
    attempts: Count = 1
    seconds: float = 0.0
    notes: tuple[str, ...] = Field(default=())


RecordT = TypeVar("RecordT", bound=Record)


def read_record(kind: type[RecordT], text: bytes | str, where: str) -> RecordT:
    """A record from its JSON text.

    Raises:
        StateError: it is no such record.
    """
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise StateError(f"{where} is damaged ({place}: {first['msg']}): restore the store from a backup.") from error


def record_text(record: Record) -> str:
    """A record as JSON text, the same for the same content."""
    return record.model_dump_json(indent=1) + "\n"
