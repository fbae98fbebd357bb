"""One refresh: rows in, a candidate out, the gate's answer, and live or not; killed anywhere, the same command goes on.

What is under way lies in ``work/``: ``update.json`` (the rows' fingerprint, the live version, the rules as they were) and
the learner's checkpoint. A version is added before the gate's answer is acted on, and tries of the ladder are versions too.

All steps of the transaction stand here in their order, with what each leaves for the next process to find; hence its length.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from continual.disk import recover_folder
from continual.errors import ContinualError, ModelError, StateError, StreamError, TrainingError, shown
from continual.learner import Learner
from continual.models.build import base_on_disk
from continual.objective import PRIMARY
from continual.parts.replay.store import KeepsRows
from continual.provenance import commit, now, versions
from continual.refresh.alerts import SILENT
from continual.refresh.allowed import check_ladder, check_rules
from continual.refresh.bounds import rows_to_pass
from continual.refresh.drift import compare, stopped_by
from continual.refresh.folder import Folder, no_link
from continual.refresh.intake import Divided, Offered, check_form, check_labels, divide, read_rows, without
from continual.refresh.journal import GOES_LIVE
from continual.refresh.judge import judge
from continual.refresh.live import Live
from continual.refresh.measuring import measured_in, no_better, seconds_in_turns
from continual.refresh.objects import write_bytes
from continual.refresh.pieces import split
from continual.refresh.plainly import plainly
from continual.refresh.records import (
    Data,
    Drift,
    Found,
    Manifest,
    Outcome,
    Piece,
    Report,
    read_record,
    record_text,
)
from continual.refresh.request import Diverged, Request, rules_of, why_given_up
from continual.refresh.restored import restored, whole
from continual.refresh.rules import Happened, Rules
from continual.refresh.untold import put
from continual.refresh.wording import word_pieces
from continual.strategy import Strategy
from continual.streams.check import require_experience
from continual.streams.convert import as_experience
from continual.streams.experience import Experience
from continual.table import Table, TensorTable, concat

COLUMNS = ("input_ids", "attention_mask", "inputs", "labels", "row")

Note = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """How an update is done, as :meth:`~continual.refresh.store.Store.update` says."""

    name: str | None = None
    device: str = "auto"
    again: bool = False
    abandon: bool = False
    new_labels: Sequence[str] = ()
    trust: Sequence[str] = ()
    progress: bool | None = None
    accept_drift: bool = False


class Update:
    """One update of the store in ``folder``; make it and call it as the only writer."""

    def __init__(self, folder: Folder, data: Any, options: Options, note: Note) -> None:
        self.folder, self.options, self.note = folder, options, note
        self.settings, self.live = folder.settings, folder.current()
        self._owes = folder.rules.alerts.any()
        self.begun = self._since = time.perf_counter()
        self._before = self._compared = self._resumed = 0.0
        self._notes = self._known_classes = 0
        self._parent: Learner | None = None
        with folder.cached():
            self.offered = read_rows(data, self.settings.columns, self.settings.objective, self.settings.salt)
        self.strategy = Strategy.load({**self.settings.strategy, "name": self.settings.strategy_name})

    def __call__(self) -> Outcome:
        """Go through with it, from the start or from where it was killed."""
        with self.folder.cached():
            return self._go()

    def _go(self) -> Outcome:
        request = self._under_way()
        if request is None:
            known = None if self.options.again else self._known()
            if known is not None:
                self._owe(known, -1)
                return known
        rules = self.folder.rules if request is None else rules_of(request)
        check_rules(rules, self.folder.path, {*self.options.trust})
        check_ladder(self.strategy, rules)
        parent = None if self.live is None else self._restored(self.live)
        offered = self._fresh_rows(parent)
        limit = holdout_rows(rules, 0 if parent is None else len(parent.experience_names))
        name = self._name(parent) if request is None else request.experience
        early = self.strategy.training.early_stopping is not None
        wanted = rows_to_pass(rules.gate, self.settings.objective, lost=1)
        divided = divide(offered, rules.holdout, least=wanted, most=limit, valid=early)
        if divided.holdout is None and (parent is None or parent.monitor is None or not parent.monitor.tables()):
            raise StreamError(
                f"no row of '{offered.path}' can be held out to measure on, since every class trains on one at least, and no "
                "earlier rows are there to measure on: begin with more of them, two rows of a class at least."
            )
        experience = self._experience(divided, name, parent)
        if request is None:
            started = time.perf_counter()
            drift = self._drift(experience, parent, rules)
            self._compared = time.perf_counter() - started
            stopped = stopped_by(drift, rules.drift)
            if stopped is not None and not self.options.accept_drift:
                return self._stopped(name, drift, stopped)
            if stopped is not None:
                kinds = tuple(found.kind for found in drift.found if found.kind in rules.drift.stop)
                drift = drift.model_copy(update={"accepted": kinds})
                sentence = f"a person accepted that the rows of '{name}' differ from those at hand: {stopped.sentence}"
                self.folder.journal.append("accepted", sentence=sentence)
            request = self._ask(offered, name, rules, drift, self._compared)
        else:
            self._before = self._used_before(request)
        accepted = f"a person accepted what would have stopped the update: {', '.join(request.drift.accepted)}."
        offered = replace(
            offered,
            notes=(
                *offered.notes,
                *divided.notes,
                *([accepted] if request.drift.accepted else []),
            ),
        )
        self._parent, parent = parent, None
        data = Data(
            path=offered.path,
            sha256=offered.sha256,
            fingerprint=self.offered.fingerprint,
            offered=self.offered.offered,
            trained=len(divided.train),
            holdout=_count(divided.holdout),
            valid=_count(divided.valid),
            classes=tuple(experience.class_names[self._known_classes :]),
        )
        attempts: list[dict[str, Any]] = [{}, *rules.ladder.settings]
        version, goes, failure = None, False, None
        for attempt, changed in enumerate(attempts):
            made, began = self._made(request, attempt), time.perf_counter()
            if made is None and all(one.attempt != attempt for one in request.diverged):
                try:
                    made = self._try(request, rules, experience, offered, data, attempt, changed)
                except TrainingError as error:
                    failure = error
                    request = self._given_up(request, attempt, error.lasting, time.perf_counter() - began)
                self._since, self._compared = time.perf_counter(), 0.0
            if made is not None:
                version, goes = made, _goes_live(self.folder.manifest(made), rules)
            if goes or attempt == len(attempts) - 1 or (self._late(rules) and not self._began(request, attempt + 1)):
                break
            why = (
                request.diverged[-1].sentence
                if made is None
                else f"version {made}: {self.folder.manifest(made).sentence}"
            )
            failure = None  # with which goes the memory that the failed try took
            self.note(f"{why} The next try: {shown(attempts[attempt + 1], 200)}.")
        outcome = self._ended(request, version, goes, attempt + 1)
        if version is None:
            raise failure or TrainingError(outcome.sentence)
        return outcome

    def _ended(self, request: Request, version: int | None, goes: bool, attempts: int) -> Outcome:
        """The end of an update: the last version that it made goes live or not, or its training never came to an end."""
        name, given_up = request.experience, [why_given_up(one, request) for one in request.diverged]
        if version is None:
            sentence = request.diverged[-1].sentence
            outcome = self._outcome(
                "failed", None, name, sentence, attempts=attempts, drift=request.drift, notes=given_up
            )
            self._owe(outcome, 0)
            self.folder.journal.append("stopped", sentence=f"'{name}' was not learnt: {sentence}")
            self._done()
            return outcome
        manifest = self.folder.manifest(version)
        happened: Happened = "promoted" if goes else "failed" if manifest.answer == "fail" else "cannot tell"
        outcome = self._outcome(happened, version, name, manifest.sentence, attempts=attempts, notes=given_up)
        if goes and self.folder.current() != version:
            outcome = outcome.model_copy(update={"live": version})
            self._owe(outcome, 0)
            self.folder.go_live(version, "promoted", manifest.sentence)
        else:
            self._owe(outcome, -1)
        self._done()
        return outcome

    def _stopped(self, name: str, drift: Drift, by: Found) -> Outcome:
        sentence = f"'{name}' was not learnt, since its rows differ from those at hand: {by.sentence}"
        more = f"{sentence} If they are as they should be, add --accept-drift."
        outcome = self._outcome("stopped", None, name, more, drift=drift)
        self._owe(outcome, 0)
        self.folder.journal.append("stopped", sentence=sentence)
        return outcome

    def _owe(self, outcome: Outcome, line: Literal[-1, 0]) -> None:
        """Keep what is to be told: the last line of the journal has made it true, or (0) the next one will."""
        if self._owes and outcome.happened not in SILENT:
            put(self.folder.path, outcome, len(self.folder.journal.read()) + line)

    # Before anything is trained

    def _under_way(self) -> Request | None:
        """The update that was killed, where there is one and it is this one; what was over is cleared away."""
        path = no_link(self.folder.work / "update.json")
        if not path.is_file():
            shutil.rmtree(self.folder.work, ignore_errors=True)
            return None
        if self.options.abandon:
            self.folder.abandon()
            return None
        try:
            request = read_record(Request, path.read_bytes(), f"'{path}'")
        except (OSError, StateError) as error:
            raise StateError(
                f"'{path}', which tells of an update that broke off, is damaged: add --abandon to give it up."
            ) from error
        tries = [number for number in self.folder.numbers() if number >= request.first]
        rules = rules_of(request)
        waits = bool(tries) and _goes_live(self.folder.manifest(tries[-1]), rules)
        over = len(tries) + len(request.diverged) > len(rules.ladder.settings) and not waits
        if self.live in tries:
            self._done()
            return None
        if over and request.fingerprint != self.offered.fingerprint:
            self._ended(request, tries[-1] if tries else None, False, len(tries) + len(request.diverged))
            return None
        if request.fingerprint != self.offered.fingerprint or request.live != self.live:
            what = "with other rows" if request.live == self.live else "and another version is live now"
            raise StateError(
                f"the update with '{request.path}' of {request.begun} broke off {what}: give its command again to go on with it, "
                "or add --abandon to give it up."
            )
        self.note(f"goes on with the update with '{request.path}' that broke off")
        return request

    def _known(self) -> Outcome | None:
        """What became of the same rows, where they were learnt or refused before."""
        line, entries = set(self.folder.line(self.live)), self.folder.journal.read()
        was_live = {entry.version for entry in entries if entry.event in GOES_LIVE}
        for entry in reversed(entries):
            if entry.event != "made" or entry.version is None or entry.fingerprint != self.offered.fingerprint:
                continue
            if entry.version in line:
                name = self.folder.manifest(entry.version).experience
                sentence = f"version {entry.version} learnt these rows already, as '{name}': nothing was done."
                return self._outcome("known", entry.version, name, sentence)
            if entry.parent == self.live and entry.version in was_live:
                name = self.folder.manifest(entry.version).experience
                sentence = (
                    f"version {entry.version} learnt these rows, went live and was taken back, so nothing was done: "
                    f"`continual store promote {self.folder.path} {entry.version}` makes it live again, --again trains anew."
                )
                return self._outcome("rolled back", entry.version, name, sentence)
            if entry.parent == self.live:
                name = self.folder.manifest(entry.version).experience
                sentence = (
                    f"these rows were offered before, and version {entry.version} is not live ({entry.sentence}): promote it, or "
                    "change rules.yaml and add --again to train anew."
                )
                return self._outcome(
                    "failed" if entry.answer == "fail" else "cannot tell", entry.version, name, sentence
                )
        return None

    def _fresh_rows(self, parent: Learner | None) -> Offered:
        """The rows without those that were erased or given before, of the form and with the labels that they should have."""
        offered = without(
            self.offered, torch.tensor(self.folder.erased(), dtype=torch.int64), "were erased from this store"
        )
        if parent is not None and self.live is not None:
            entries = parent.ledger.entries
            used = [ids for entry in entries for ids in (entry.trained_ids, entry.tested_ids)]
            offered = without(offered, torch.cat(used), "were given in earlier updates")
            form = self.folder.piece(self.live, "form")
            with whole(self.folder, self.live):
                check_form(offered, form["form"])
        known = () if parent is None else parent.class_names
        check_labels(offered, known, self.settings.scenario, self.options.new_labels)
        return offered

    def _name(self, parent: Learner | None) -> str:
        given = self.options.name or (Path(self.offered.path).stem if self.offered.path != "rows" else None)
        name = given or f"update-{1 if parent is None else parent.updates + 1}"
        if parent is not None and name in parent.experience_names:
            raise StateError(
                f"an update called '{name}' was learnt already: give this one a name of its own with --name."
            )
        return name

    def _experience(self, divided: Divided, name: str, parent: Learner | None) -> Experience:
        experience = as_experience(
            divided.train,
            index=0 if parent is None else parent.updates,
            name=name,
            test=divided.holdout,
            valid=divided.valid,
            known_names=() if parent is None else parent.class_names,
            scenario=self.settings.scenario,
            objective=self.settings.objective,
        )
        require_experience(experience)
        return experience

    def _drift(self, experience: Experience, parent: Learner | None, rules: Rules) -> Drift:
        if parent is None or parent.monitor is None:
            return Drift(new=len(experience.train))

        live = Live(parent)
        tokenizer: Any = parent.model.tokenizer
        return compare(
            parent._encoded(experience.train),
            _memory(parent),
            holdouts=list(parent.monitor.tables().values()),
            features=live.features if parent.model.gives_features else None,
            class_names=experience.class_names,
            known=len(parent.class_names),
            rules=rules.drift,
            seed=self.settings.seed,
            objective=self.settings.objective,
            scenario=self.settings.scenario,
            unknown_token=None if tokenizer is None else tokenizer.unk_token_id,
            pieces=None if tokenizer is None else word_pieces(tokenizer),
            answers=live.answers,
            right=live.right(),
            accepted=self.options.new_labels,
        )

    def _ask(self, offered: Offered, name: str, rules: Rules, drift: Drift, seconds: float) -> Request:
        request = Request(
            fingerprint=self.offered.fingerprint,
            path=offered.path,
            experience=name,
            live=self.live,
            first=max(self.folder.numbers(), default=0) + 1,
            rules=rules.model_dump(mode="json"),
            begun=now(),
            drift=drift,
            drift_seconds=seconds,
        )
        write_bytes(self.folder.work / "update.json", record_text(request).encode())
        return request

    # A try

    def _made(self, request: Request, attempt: int) -> int | None:
        """The version that a try made before the process was killed."""
        made = [number for number in self.folder.numbers() if number >= request.first]
        return next((number for number in made if self.folder.manifest(number).attempt == attempt), None)

    def _began(self, request: Request, attempt: int) -> bool:
        """Whether a try was begun by a process that was killed, as far as anything of it is left."""
        given_up = any(one.attempt == attempt for one in request.diverged)
        return given_up or self._made(request, attempt) is not None or (self.folder.work / f"try-{attempt}").exists()

    def _late(self, rules: Rules) -> bool:
        used = self._before + time.perf_counter() - self.begun
        return rules.ladder.minutes is not None and used > 60 * rules.ladder.minutes

    def _used_before(self, request: Request) -> float:
        """Seconds that earlier processes took for this update, but for the try that was under way."""
        seconds = request.drift_seconds + sum(one.seconds for one in request.diverged)
        for number in self.folder.numbers():
            if number >= request.first:
                cost = self.folder.report(number).cost
                seconds += sum(cost[key] for key in ("train", "evaluate", "rest"))
        return seconds

    def _given_up(self, request: Request, attempt: int, sentence: str, seconds: float) -> Request:
        """The request, kept with the try that came to nothing."""
        shutil.rmtree(self.folder.work / f"try-{attempt}", ignore_errors=True)
        one = Diverged(attempt=attempt, sentence=sentence, seconds=seconds + self._resumed)
        request = request.model_copy(update={"diverged": (*request.diverged, one)})
        write_bytes(self.folder.work / "update.json", record_text(request).encode())
        return request

    def _try(
        self,
        request: Request,
        rules: Rules,
        experience: Experience,
        offered: Offered,
        data: Data,
        attempt: int,
        changed: dict[str, Any],
    ) -> int:
        """Train, measure, judge, and add the version; returns its number."""
        strategy = Strategy.load(self.strategy, overrides=changed)
        try:
            learner = self._learner(strategy, attempt, rules)
        except ContinualError:
            if attempt == 0 and not any(self.folder.work.glob("try-*")):
                self._done()
            raise
        monitor = learner.monitor
        assert monitor is not None, "a store measures"
        if learner.updates == experience.index:
            monitor.thin(holdout_rows(rules, experience.index))
            try:
                advice = "see what is wrong there; the version that is live stays."
                with plainly(f"learning '{experience.name}'", advice, training=True):
                    learner.update(experience, tree=False)
            except (StateError, TrainingError):
                raise
            except ContinualError:
                self._done()
                raise
        sizes = learner.state_bytes()
        slower = None if rules.gate.slower is None or self.live is None else self._in_turns(learner)
        judgement = judge(monitor, rules.gate, new=experience.name, slower=slower, size=sum(sizes.values()))
        measured = measured_in(monitor)
        own = next((one for one in measured if one.name == experience.name and one.score is not None), None)
        if own is not None and f"'{own.name}' scores" not in judgement.sentence:
            itself = f" '{own.name}' itself: {PRIMARY[learner.objective]} {own.score:.3f} on {own.rows} held-out rows."
            judgement = judgement.model_copy(update={"sentence": judgement.sentence + itself})
        data = _as_learnt(data, experience, learner)
        own_notes = [self._few(experience.name, data.holdout, rules)]
        if own is not None and learner.objective == "classification":
            own_notes.append(no_better(own.name, own.score, experience.test, experience.class_names))
        monitor.trim()
        pieces = split(learner.state()) | {"form": {"form": offered.form}}
        written = {name: self.folder.objects.put(piece) for name, piece in pieces.items()}
        spent = self._spent(learner.cost)
        train, evaluate, drift = spent["train_seconds"], spent["monitor_seconds"], request.drift_seconds
        elapsed = time.perf_counter() - self._since + self._resumed
        number = max(self.folder.numbers(), default=0) + 1
        report = Report(
            version=number,
            experience=experience.name,
            attempt=attempt,
            settings=changed,
            data=data,
            judgement=judgement,
            drift=request.drift,
            measured=measured,
            score=PRIMARY[learner.objective],
            notes=(
                *(note for note in own_notes if note is not None),
                *offered.notes,
                *(one.sentence for one in request.drift.known),
                *(why_given_up(one, request) for one in request.diverged),
                *learner.notes[self._notes :],
            ),
            cost={
                "train": train,
                "evaluate": evaluate,
                "drift": drift,
                "rest": max(elapsed - train - evaluate - self._compared, 0.0),
                "rows_trained": spent["rows_trained"],
            },
            bytes={
                **sizes,
                "scores": monitor.nbytes(),
                "test sets and ledger": sum(piece.bytes for name, piece in written.items() if "/" in name),
            },
        )
        content = record_text(report).encode()
        manifest = Manifest(
            version=number,
            parent=self.live,
            parent_manifest=None if self.live is None else self.folder.digest(self.live),
            created=now(),
            experience=experience.name,
            update=experience.index,
            attempt=attempt,
            data=data,
            model=dict(self.settings.model),
            base_model_sha256=learner.model.base_sha256,
            strategy=strategy.name,
            strategy_fingerprint=strategy.fingerprint(),
            seed=self.settings.seed,
            code={"commit": commit(), "versions": versions()},
            answer=judgement.answer,
            sentence=judgement.sentence,
            pieces={**written, "report": Piece(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))},
        )
        self.folder.add(manifest, report)
        return number

    def _few(self, name: str, held: int, rules: Rules) -> str | None:
        """What is to be said of a hold-out with which the gate will not pass even where nothing changes."""
        least = rows_to_pass(rules.gate, self.settings.objective, lost=0)
        if rules.gate.unsure != "hold" or held >= least > 0:
            return None
        if least == 0 and (rules.gate.max_drop > 0 or self.settings.objective != "classification"):
            return None
        if least == 0:
            return (
                "gate.max_drop is 0, so only what became better beyond doubt will pass, and an update that changes nothing is 'cannot "
                "tell': allow a drop of a point or two, or set gate.unsure to promote, in rules.yaml."
            )
        return (
            f"the hold-out of '{name}' has {held} rows, and the gate needs {least} to let a later update pass even where nothing "
            "changes: give more rows at a time, or change holdout.share, gate.max_drop or gate.unsure in rules.yaml."
        )

    def _spent(self, cost: Mapping[str, float]) -> dict[str, float]:
        """What the learner has cost since the live version."""
        if self.live is None:
            return {key: float(value) for key, value in cost.items()}
        clock = self.folder.piece(self.live, "clock")
        with whole(self.folder, self.live):
            return {key: float(value - clock["cost"][key]) for key, value in cost.items()}

    def _learner(self, strategy: Strategy, attempt: int, rules: Rules) -> Learner:
        """The learner of a try: from its checkpoint, from the live version, or a new one."""
        place = no_link(self.folder.work / f"try-{attempt}")
        recover_folder(place)
        self._resumed = 0.0
        options: dict[str, Any] = {
            "device": self.options.device,
            "folder": place,
            "save_every": rules.save_every or None,
            "progress": self.options.progress,
        }
        if place.exists():
            learner = Learner.load(place, strategy=strategy, trust=self.options.trust, **options)
            spent, pending = self._spent(learner.cost), learner._pending
            self._resumed = spent["train_seconds"] + spent["monitor_seconds"] + (pending.seconds if pending else 0.0)
            self._before += self._resumed
            return learner
        settings = self.settings
        if self.live is None:
            found = base_on_disk(settings.model)
            if settings.base_model_sha256 not in (None, found):
                raise ModelError(
                    f"the base model has SHA-256 {str(found)[:12]}…, and the store was made for {settings.base_model_sha256[:12]}…: "
                    "put the same base model there, or make a new store."
                )
            return Learner(
                settings.model,
                strategy,
                seed=settings.seed,
                objective=settings.objective,
                scenario=settings.scenario,
                **options,
            )
        ready, self._parent = self._parent, None
        if ready is not None and ready.strategy.fingerprint() == strategy.fingerprint():
            ready.folder, ready.save_every = place, options["save_every"]
            ready.progress = self.options.progress
            return ready
        return self._restored(self.live, strategy=strategy, resettle=True, **options)

    def _restored(self, version: int, **options: Any) -> Learner:
        options = {"device": self.options.device, "progress": False, **options}
        learner = restored(self.folder, version, self.options.trust, **options)
        self._notes, self._known_classes = len(learner.notes), len(learner.class_names)
        return learner

    def _in_turns(self, learner: Learner) -> tuple[float, float]:
        assert self.live is not None and learner.monitor is not None
        tables = list(learner.monitor.tables().values())
        return seconds_in_turns(self._restored(self.live), learner, concat(tables))

    def _done(self) -> None:
        shutil.rmtree(self.folder.work, ignore_errors=True)

    def _outcome(
        self, happened: Happened | Literal["known", "rolled back"], version: int | None, name: str, sentence: str, *, attempts: int = 1,
        drift: Drift | None = None, notes: Sequence[str] = (),
    ) -> Outcome:  # fmt: skip
        report = None if version is None else self.folder.report(version)
        scores = (
            [] if report is None else [one.score for one in report.measured if one.score is not None and not one.probe]
        )
        return Outcome(
            store=str(self.folder.path),
            happened=happened,
            version=version,
            live=self.folder.current(),
            experience=name,
            sentence=sentence,
            score=sum(scores) / len(scores) if scores else None,
            worst=report.judgement.checks[0] if report is not None and report.judgement.checks else None,
            found=(report.drift if report is not None else drift or Drift()).found,
            attempts=attempts,
            seconds=time.perf_counter() - self.begun,
            notes=tuple(dict.fromkeys((*(() if report is None else report.notes), *notes))),
        )


def _goes_live(manifest: Manifest, rules: Rules) -> bool:
    """Whether the gate lets a version go live, or the rules let through what it could not tell."""
    return manifest.answer == "pass" or (manifest.answer == "cannot tell" and rules.gate.unsure == "promote")


def holdout_rows(rules: Rules, experiences: int) -> int:
    """Hold-out rows of one experience where there are so many before: halved until all of them fit."""
    rows = rules.holdout.rows
    while rows > 1 and rows * (experiences + 1) > rules.holdout.total:
        rows = -(-rows // 2)
    return rows


def _memory(learner: Learner) -> Table | None:
    """The rows that replay parts keep, without what they keep beside them; None where they keep none."""
    memories = [part.store.memory for part in learner.parts if isinstance(part, KeepsRows) and len(part.store.memory)]
    tables: list[Table] = []
    for memory in memories:
        rows = memory.batch(torch.arange(len(memory)))
        tables.append(TensorTable({name: rows[name].cpu() for name in rows if name in COLUMNS}))
    return concat(tables) if tables else None


def _as_learnt(data: Data, experience: Experience, learner: Learner) -> Data:
    """The counts of what the learner took: it leaves out rows whose content earlier hold-outs or trained rows have."""
    entry = learner.ledger.entries[experience.index]

    def kept(table: Table | None, ids: Tensor) -> int:
        return 0 if table is None else int(torch.isin(table.column("row").cpu(), ids).sum())

    counts = {
        "trained": kept(experience.train, entry.trained_ids),
        "valid": kept(experience.valid, entry.trained_ids),
        "holdout": kept(experience.test, entry.tested_ids),
    }
    return data.model_copy(update=counts)


def _count(table: Table | None) -> int:
    return 0 if table is None else len(table)
