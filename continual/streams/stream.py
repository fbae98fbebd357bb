"""A stream: experiences one after another, built when they are asked for.

A stream made from YAML shares its tables among all experiences: an experience is a view (or a mapped view) of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch

from continual.errors import StreamError
from continual.kinds import Objective, Scenario
from continual.spec import parse
from continual.streams.columns import Lookup, Shift, replace_columns
from continual.streams.content import labels_key, row_keys
from continual.streams.convert import as_experience
from continual.streams.experience import Experience
from continual.streams.folders import Place
from continual.streams.labels import Ids, assign
from continual.streams.sources.rows import PARTS, Part, Rows
from continual.streams.spec import StreamSpec, read_stream_spec
from continual.streams.splits import Piece
from continual.table import Mapped, Table, View, concat


class Stream(Sequence[Experience]):
    """Experiences one after another; ``stream[1]`` is an experience, ``stream[:2]`` a stream of two.

    Experiences keep their index, name and class ids in a slice. Made by :meth:`load`, :meth:`from_tables` or
    :meth:`from_experiences`.

    Attributes:
        name, summary: for people.
        scenario: ``task``, ``domain`` or ``class``.
        objective: what the labels are for.
        class_names: name of every class met so far (of the whole stream where it is closed), by id.
        total_classes: how many classes the whole stream has; None where it is open or has no
            classes.
        model: what to train where the user names no model: a name, settings, or None.
        open: whether experiences may be appended.
        notes: what the user should know of the rows, such as how many were dropped.
    """

    def __init__(
        self,
        experiences: Sequence[Experience | Callable[[], Experience]],
        *,
        name: str = "stream",
        summary: str = "",
        scenario: Scenario = "class",
        objective: Objective = "classification",
        class_names: tuple[str, ...] = (),
        model: str | dict[str, Any] | None = None,
        open: bool = False,
        notes: Sequence[str] = (),
        identity: dict[str, Any] | None = None,
    ) -> None:
        self._slots = [experience if isinstance(experience, _Slot) else _Slot(experience) for experience in experiences]
        self.name, self.summary, self.scenario, self.objective = name, summary, scenario, objective
        self.class_names, self.model, self.open = class_names, model, open
        self.notes = tuple(notes)
        self._identity = identity or {}
        self._digests = [hashlib.sha256(json.dumps(self._identity, sort_keys=True).encode())]

    @classmethod
    def load(
        cls,
        stream: str | Path | Mapping[str, Any] | StreamSpec,
        *,
        data: Path | str | None = None,
        seed: int = 0,
        scenario: Scenario | None = None,
    ) -> Stream:
        """A stream of the library by name, a YAML file, or settings.

        Args:
            stream: name, path or settings.
            data: folder of the rows, where the source reads files.
            seed: of everything random in the split whose own seed is not set.
            scenario: instead of that of the settings.

        Raises:
            SpecError: an unknown name, key or value.
            StreamError: rows that cannot be used.
        """
        spec, folder = read_stream_spec(stream)
        if scenario is not None:
            settings = {**{name: getattr(spec, name) for name in type(spec).model_fields}, "scenario": scenario}
            spec = parse(StreamSpec, settings, "this stream")
        rows = spec.source.load(Place(None if data is None else Path(data), folder), spec.objective)
        found = spec.scenario or rows.scenario
        assert found is not None, "a stream without a scenario has a source that tells one"
        pieces = spec.split.pieces(rows, seed)
        experiences, class_names = _build(rows, pieces, found, spec.objective)
        identity = {
            "split": spec.split.model_dump(mode="json"),
            "seed": seed if spec.split.random else None,
        }
        return cls(
            experiences,
            name=spec.name or spec.source.kind,
            summary=spec.summary,
            scenario=found,
            objective=spec.objective,
            class_names=class_names,
            model=spec.model,
            notes=rows.notes,
            identity=identity,
        )

    @classmethod
    def from_tables(
        cls,
        train: Any,
        test: Any = None,
        valid: Any = None,
        *,
        split: dict[str, Any],
        scenario: Scenario,
        objective: Objective = "classification",
        name: str = "arrays",
        seed: int = 0,
        domain: dict[Part, Any] | None = None,
        time: dict[Part, Any] | None = None,
    ) -> Stream:
        """A stream of rows in memory, in any form that :func:`~continual.streams.convert.as_table` takes.

        Args:
            train, test, valid: the rows.
            split: as in YAML, such as ``{"by": "class", "size": 2}``.
            scenario, objective, name, seed: as in YAML and :meth:`load`.
            domain, time: one value for each row, by part, for a split by domain or time.
        """
        source = {"kind": "arrays", "train": train, "test": test, "valid": valid}
        source |= {"domain": domain or {}, "time": time or {}}
        settings = {"source": source, "split": split, "scenario": scenario, "objective": objective, "name": name}
        return cls.load(settings, seed=seed)

    @classmethod
    def from_experiences(
        cls,
        experiences: Iterable[Experience],
        *,
        name: str = "stream",
        scenario: Scenario = "class",
        objective: Objective = "classification",
        model: str | dict[str, Any] | None = None,
        open: bool = False,
    ) -> Stream:
        """A stream of experiences as they are; with ``open`` more may be appended (and there may be none yet)."""
        found = list(experiences)
        for experience in found:
            if (experience.scenario, experience.objective) != (scenario, objective):
                raise StreamError(
                    f"experience '{experience.name}' is of scenario '{experience.scenario}' and objective "
                    f"'{experience.objective}', and the stream of '{scenario}' and '{objective}': make them alike."
                )
        names = max((experience.class_names for experience in found), key=len, default=())
        return cls(found, name=name, scenario=scenario, objective=objective, class_names=names, model=model, open=open)

    @property
    def total_classes(self) -> int | None:
        return None if self.open or self.objective != "classification" else len(self.class_names)

    def __len__(self) -> int:
        return len(self._slots)

    @overload
    def __getitem__(self, index: int) -> Experience: ...
    @overload
    def __getitem__(self, index: slice) -> Stream: ...
    def __getitem__(self, index: int | slice) -> Experience | Stream:
        if not isinstance(index, slice):
            return self._slots[index].get()
        return self._like(self._slots[index], open=False)

    def __iter__(self) -> Iterator[Experience]:
        place = 0
        while place < len(self._slots):
            yield self._slots[place].get()
            place += 1

    def __repr__(self) -> str:
        state = "open" if self.open else "closed"
        return f"Stream({self.name!r}, {len(self)} experiences, {self.scenario}, {self.objective}, {state})"

    def append(self, train: Any, test: Any = None, valid: Any = None, name: str | None = None) -> Experience:
        """Add an experience to an open stream; new classes get the next ids.

        Args:
            train, test, valid: rows in any form that :func:`~continual.streams.convert.as_table` takes, or ``train`` an
                experience that is whole.
            name: of the experience; None: ``experience N``.

        Raises:
            StreamError: the stream is closed, the name is taken, or the rows cannot be used.
        """
        if not self.open:
            raise StreamError(f"the stream '{self.name}' is closed: make it with from_experiences(..., open=True).")
        index = len(self)
        taken = {experience.name for experience in self}
        if isinstance(train, Experience):
            experience = train
            if experience.class_names[: len(self.class_names)] != self.class_names:
                raise StreamError(
                    f"experience '{experience.name}' has other class names than the stream so far: "
                    "append its rows instead."
                )
        else:
            experience = as_experience(
                train,
                index=index,
                name=name or f"experience {index + 1}",
                test=test,
                valid=valid,
                known_names=self.class_names,
                scenario=self.scenario,
                objective=self.objective,
            )
        if experience.name in taken:
            raise StreamError(f"the stream has an experience '{experience.name}' already: give this one another name.")
        self._slots.append(_Slot(experience))
        self.class_names = experience.class_names
        return experience

    def joint(self) -> Stream:
        """One experience of all rows: train, valid and test each one after another, the class ids of all.

        Raises:
            StreamError: the stream is empty.
        """
        if not self._slots:
            raise StreamError(f"the stream '{self.name}' has no experiences yet: append one.")
        slot = _Slot(self._joint)
        return self._like([slot], open=False, name=f"{self.name} (joint)")

    def fingerprint(self, experiences: int | None = None) -> str:
        """SHA-256 over how the stream was made and what every row holds; the same wherever the files lie.

        Args:
            experiences: of the first so many only, which what is appended later does not change; None for all.
        """
        wanted = len(self) if experiences is None else experiences
        for index in range(len(self._digests) - 1, wanted):
            digest = self._digests[-1].copy()
            experience = self[index]
            head = (experience.name, experience.scenario, experience.objective, experience.classes)
            digest.update(json.dumps([*head, experience.class_names]).encode())
            for part in PARTS:
                table: Table | None = getattr(experience, part)
                if table is not None and len(table):
                    digest.update(part.encode() + row_keys(table).tobytes() + labels_key(table))
            self._digests.append(digest)
        return self._digests[wanted].hexdigest()

    def _joint(self) -> Experience:
        experiences = list(self)
        tables: dict[str, Table | None] = {}
        for part in PARTS:
            found = [getattr(experience, part) for experience in experiences]
            present = [table for table in found if table is not None]
            tables[part] = concat(present) if present else None
        train = tables["train"]
        assert train is not None
        owner = {label: experience.index for experience in experiences for label in experience.classes}
        classes = tuple(sorted(owner))
        return Experience(
            index=0,
            name="joint",
            train=train,
            valid=tables["valid"],
            test=tables["test"],
            classes=classes,
            class_names=self.class_names,
            scenario=self.scenario,
            objective=self.objective,
            total_classes=self.total_classes,
            owners=tuple(owner[label] for label in classes) if self.scenario == "task" else None,
        )

    def _like(self, slots: list[_Slot], *, open: bool, name: str | None = None) -> Stream:
        return Stream(
            slots,
            name=name or self.name,
            summary=self.summary,
            scenario=self.scenario,
            objective=self.objective,
            class_names=self.class_names,
            model=self.model,
            open=open,
            notes=self.notes,
            identity=self._identity,
        )


class _Slot:
    """An experience that is built when it is first asked for."""

    def __init__(self, source: Experience | Callable[[], Experience]) -> None:
        self._source = source

    def __call__(self) -> Experience:
        return self.get()

    def get(self) -> Experience:
        if not isinstance(self._source, Experience):
            self._source = self._source()
        return self._source


def _build(
    rows: Rows, pieces: Sequence[Piece], scenario: Scenario, objective: Objective
) -> tuple[list[_Slot], tuple[str, ...]]:
    classified = bool(rows.label_names)
    ids = assign(pieces, rows.label_names, scenario) if classified else [Ids(torch.empty(0), (), ()) for _ in pieces]
    class_names = ids[-1].names if ids else ()
    if classified and len({c for one in ids for c in one.classes}) < 2:
        raise StreamError("the split leaves one class in the whole stream: classification needs two at least.")
    shared = all(torch.equal(one.lookup_C, ids[0].lookup_C) for one in ids)
    tables = _relabelled(rows, pieces, ids, shared) if classified else rows.tables
    span = rows.span

    def experience(index: int) -> Experience:
        piece, own = pieces[index], ids[index]
        functions = dict(piece.functions)
        if functions or (index and not piece.places):
            functions["row"] = Shift(index * span)
        if classified and not shared and not piece.places:
            functions["labels"] = Lookup(own.lookup_C)
        found: dict[Part, Table] = {}
        for part, table in tables.items():
            chosen: Table = View(table, piece.places[part]) if part in piece.places else table
            if len(chosen) or part == "train":
                found[part] = Mapped(chosen, functions) if functions else chosen
        return Experience(
            index=index,
            name=piece.name,
            train=found["train"],
            valid=found.get("valid"),
            test=found.get("test"),
            classes=own.classes,
            class_names=own.names,
            scenario=scenario,
            objective=objective,
            total_classes=len(class_names) if classified else None,
        )

    return [_Slot(partial(experience, index)) for index in range(len(pieces))], class_names


def _relabelled(rows: Rows, pieces: Sequence[Piece], ids: Sequence[Ids], shared: bool) -> dict[Part, Table]:
    """The tables with class ids as labels; where each experience has all rows and ids of its own, unchanged."""
    if not shared and not all(piece.places for piece in pieces):
        return rows.tables
    tables: dict[Part, Table] = {}
    for part, table in rows.tables.items():
        old_N = table.column("labels")
        new_N = ids[0].lookup_C[old_N]
        for piece, own in zip(pieces, ids, strict=True):
            if part in piece.places:
                places = piece.places[part]
                new_N[places] = own.lookup_C[old_N[places]]
        tables[part] = replace_columns(table, {"labels": new_N})
    return tables
