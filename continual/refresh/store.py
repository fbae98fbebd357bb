"""The store: a model that is refreshed again and again, and never loses what it knew without saying so.

What trains or reads weights is imported where it is needed: to ask where a store stands takes no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from continual.disk import write_text
from continual.errors import CompositionError, ContinualError, SpecError, StateError, StreamError, quoted
from continual.kinds import Objective, Scenario
from continual.models.spec import parse_model_spec
from continual.provenance import now
from continual.refresh.asked import Asked, check_columns, check_model, check_rows, rule_text
from continual.refresh.folder import Columns, Folder, Settings, make_folder
from continual.refresh.journal import GOES_LIVE, Entry
from continual.refresh.plainly import plainly
from continual.refresh.records import Manifest, Outcome, Report
from continual.refresh.rules import Rules
from continual.refresh.status import Status, compare, status_of
from continual.refresh.untold import waiting
from continual.refresh.verify import verify
from continual.spec import parse
from continual.trust import check_trusted, wishes

if TYPE_CHECKING:
    from torch import Tensor

    from continual.learner import Learner
    from continual.refresh.erasure import Erasure
    from continual.strategy import Strategy

LISTED = 10
"""Names that a sentence lists."""


class Store:
    """A folder of versions of one model, one of which is live.

    Args:
        path: of a store that :meth:`create` or ``continual store init`` made.
        trust: references ``package.module:Class`` and folders that the store may use, and the program, the web hook and the file
            outside it that its rules may tell; a folder never decides by itself what is run. What needs one (:meth:`update`,
            :meth:`learner`, :meth:`predict`, :meth:`erase`, :meth:`export`) raises :class:`StateError` without.

    Raises:
        StateError: there is no store, or it is damaged.
    """

    def __init__(self, path: Path | str, *, trust: Iterable[str] = ()) -> None:
        self.folder = Folder(Path(path))
        self.path = self.folder.path
        self.trust = tuple(trust)
        self.folder.settings  # noqa: B018 — read now, so that a damaged store is found at once

    @classmethod
    def create(
        cls,
        path: Path | str,
        *,
        model: str | Mapping[str, Any] = "mlp",
        strategy: str | Path | Mapping[str, Any] | Strategy = "rehearsal",
        rules: Path | str | Mapping[str, Any] | Rules | None = None,
        scenario: Scenario = "class",
        objective: Objective = "classification",
        columns: Mapping[str, Any] | None = None,
        seed: int = 0,
        overrides: Mapping[str, Any] | None = None,
    ) -> Store:
        """Make a store; its first version comes with the first :meth:`update`.

        Args:
            model: as for :class:`~continual.learner.Learner`, but no module object, which a folder cannot name.
            strategy: a name of the library, a YAML file, or a mapping.
            rules: a rule file, or what would stand in it; None takes the defaults.
            columns: which column is what: ``text``, ``label``, ``id``, ``features`` … as for the source ``files``.
            overrides: dotted key of the strategy → value.

        Raises:
            SpecError, CompositionError, ModelError: what was asked for cannot be.
            StateError: the folder is not empty or cannot be written.
        """
        from continual.models.build import base_on_disk, gives_features
        from continual.refresh.allowed import asked_by, check_ladder
        from continual.refresh.intake import salt_of
        from continual.strategy import Strategy

        asked = parse(Asked, {"seed": seed, "scenario": scenario, "objective": objective}, "the store")
        chosen = Strategy.load(strategy, overrides=overrides)
        if chosen.engine is not None:
            raise SpecError(
                f"{chosen.engine.name} cannot be saved, so it cannot be kept in a store: take a strategy of parts."
            )
        if chosen.data == "joint":
            raise SpecError(
                "data: joint trains once on a whole stream, and a store learns update by update: take 'cumulative'."
            )
        spec = parse_model_spec(model)
        chosen.check(objective=objective, gives_features=gives_features(model, objective), open_stream=True)
        named = parse(Columns, dict(columns or {}), "the columns")
        check_columns(named)
        given = Rules.load(Path(rules)) if isinstance(rules, str | Path) else rules
        checked = given if isinstance(given, Rules) else parse(Rules, dict(given or {}), "the rules")
        check_ladder(chosen, checked)
        base = base_on_disk(model)
        check_model(spec, base)
        check_rows(spec, chosen, named, asked.objective)
        settings = Settings(
            created=now(),
            model=spec.model_dump(mode="json", by_alias=True, exclude_unset=True),
            base_model_sha256=base,
            strategy=chosen.to_dict(),
            strategy_name=chosen.name,
            seed=asked.seed,
            scenario=asked.scenario,
            objective=asked.objective,
            columns=named,
            salt=salt_of(seed),
        )
        make_folder(Path(path), settings, rule_text(rules, checked))
        return cls(path, trust=wishes([settings.strategy, settings.model]) | asked_by(checked, Path(path)))

    # What there is

    @property
    def live(self) -> int | None:
        """The live version, None before the first."""
        return self.folder.current()

    def versions(self) -> list[int]:
        """Every version, rising."""
        return self.folder.numbers()

    def manifest(self, version: int | None = None) -> Manifest:
        """What a version (the live one) is made of and comes from."""
        return self.folder.manifest(self._version(version))

    def report(self, version: int | None = None) -> Report:
        """What is known of a version (the live one): scores, the gate's checks, drift, cost."""
        return self.folder.report(self._version(version))

    def history(self) -> list[Entry]:
        """What happened, the oldest first."""
        return self.folder.journal.read()

    def status(self) -> Status:
        """Where it stands; printed, it says so in words."""
        return status_of(self.folder)

    def compare(self, one: int, other: int | None = None) -> str:
        """Two versions (the second is the live one where none is named) side by side, in words."""
        return compare(self.folder, one, self._version(other))

    def page(self, path: Path | str) -> Path:
        """Write the retention page: every experience over all versions, verdicts, drift, sizes, cost."""
        from continual.refresh.page import Event, render_page

        numbers = self.folder.numbers()
        reports = [(self.folder.manifest(number), self.folder.report(number)) for number in numbers]
        events = [Event(one.time, one.event, one.version, one.sentence) for one in self.history()]
        write_text(Path(path), render_page(self.path.name, events, reports, self.folder.current()))
        return Path(path)

    def export(self, to: Path | str, *, version: int | None = None, max_rank: int | None = None) -> Path:
        """Write a version (the live one) as a plain Hugging Face folder, which stock transformers and peft load.

        Args:
            max_rank: refuse an adapter of a higher rank, such as a server's limit.

        Raises:
            CompositionError: the strategy's model is of a kind that stock libraries cannot be told of.
            StateError: the folder cannot be written, or holds something else.
        """
        from continual.refresh.card import Card
        from continual.refresh.export import export_model

        number = self._version(version)
        manifest, report = self.folder.manifest(number), self.folder.report(number)
        line = [self.folder.manifest(one).data for one in self.folder.line(number)]
        settings = self.folder.settings
        card = Card(
            title=self.path.name,
            measured=report.measured,
            score=report.score,
            judgement=report.judgement,
            version=number,
            created=manifest.created,
            data=line,
            base_model=settings.model.get("name"),
            base_sha256=manifest.base_model_sha256,
            strategy=settings.strategy_name,
            summary=str(settings.strategy.get("summary", "")),
            source=str(settings.strategy.get("source", "")),
            code=dict(manifest.code.get("versions", {})),
        )
        return export_model(self.learner(number, device="cpu"), Path(to), card=card, max_rank=max_rank)

    def verify(self) -> list[str]:
        """What is wrong with the bytes or the chain of the store, in sentences; empty where nothing is."""
        return verify(self.folder)

    # What is done

    def update(
        self,
        data: Any,
        *,
        name: str | None = None,
        device: str = "auto",
        again: bool = False,
        abandon: bool = False,
        new_labels: Sequence[str] = (),
        accept_drift: bool = False,
        progress: bool | None = None,
        on_note: Callable[[str], None] | None = None,
    ) -> Outcome:
        """Learn new rows, measure every earlier experience, and go live where the gate says so.

        Killed anywhere, the same call goes on where it was.

        Args:
            data: a JSONL, CSV or Parquet file, a folder of ``datasets``; from Python also a ``datasets.Dataset``, a data frame,
                a mapping of columns or ``(inputs, labels)``.
            name: of the experience; None takes the file's.
            again: train anew on rows that were refused before.
            abandon: give up an update with other rows that broke off.
            new_labels: labels that are classes of their own although they look like others.
            accept_drift: learn the rows although the rules would stop the update for how they differ from those at hand; that it
                was accepted is kept in the journal and in the version's report.
            on_note: told what should be known on the way.

        Raises:
            TrainingError: the training of every try broke off, by a loss that is not finite or for want of memory; the journal says
                so, and alerts are told (``failed``).
            ContinualError: rows, rules or a store that cannot be; the store is as it was.
        """
        from continual.refresh.allowed import check_rules
        from continual.refresh.update import Options, Update

        self._check_trust()
        options = Options(name, device, again, abandon, tuple(new_labels), self.trust, progress, accept_drift)
        note = on_note or (lambda sentence: None)
        deaf = self._tell()
        advice = (
            "give the same command again, or add --abandon to give it up; `continual store verify` looks for damage."
        )
        try:
            with self.folder.writing("update"), plainly(f"the update of '{self.path}'", advice):
                check_rules(self.folder.rules, self.path, set(self.trust))
                outcome = Update(self.folder, data, options, note)()
        except ContinualError:
            for sentence in (*deaf, *self._tell(done=True)):
                note(sentence)
            raise
        return outcome.model_copy(update={"notes": (*outcome.notes, *deaf, *self._tell(done=True))})

    def abandon(self) -> str:
        """Give up an update that broke off, with what it had reached; returns a sentence. Versions that it made stay."""
        deaf = self._tell()
        with self.folder.writing("abandon"):
            sentence = self.folder.abandon()
            done = "no update is under way: nothing was done." if sentence is None else f"{sentence}."
        return " ".join([done, *deaf])

    def promote(self, version: int) -> str:
        """Make a version live that the gate held back, or an earlier one; returns a sentence."""
        deaf = self._tell()
        return " ".join([self._promote(version), *deaf, *self._tell(done=True)])

    def _promote(self, version: int) -> str:
        with self.folder.writing("promote"):
            manifest = self.folder.manifest(version)
            if version == self.folder.current():
                return f"version {version} is live already: nothing was done."
            self._check_loadable(version)
            sentence = f"version {version} ('{manifest.experience}', {manifest.answer}) was made live by hand"
            sentence += self._lacks(version, self.folder.current())
            self.folder.go_live(version, "promoted", sentence)
            return f"{sentence}."

    def rollback(self, version: int | None = None) -> str:
        """Make a version live that was live before; returns a sentence.

        Args:
            version: None takes the one that the live version was trained on from; where that broke off, the same call finishes it
                and goes no further back.

        Raises:
            StateError: there is no such version, it was never live, or its bytes are not what was written.
        """
        deaf = self._tell()
        return " ".join([self._rollback(version), *deaf, *self._tell(done=True)])

    def _rollback(self, version: int | None) -> str:
        with self.folder.writing("rollback") as finished:
            if version is None and finished is not None and finished.event == "rolled back":
                return f"{finished.sentence}, which had broken off; the next update goes on from there."
            live = self.folder.current()
            if live is None:
                raise StateError(f"'{self.path}' has no live version yet: there is nothing to roll back.")
            target = self.folder.manifest(live).parent if version is None else version
            if target is None:
                raise StateError(f"version {live} is the first: there is none before it to roll back to.")
            if target == live:
                return f"version {live} is live already: nothing was done."
            self.folder.manifest(target)
            if all(entry.version != target for entry in self.history() if entry.event in GOES_LIVE):
                raise StateError(
                    f"version {target} was never live, so nothing can be rolled back to it: `continual store promote {self.path} "
                    f"{target}` makes it live."
                )
            self._check_loadable(target)
            sentence = f"rolled back from version {live} to {target}{self._lacks(target, live)}"
            self.folder.go_live(target, "rolled back", sentence)
            return f"{sentence}; the next update goes on from there."

    def erase(self, ids: Iterable[str | int]) -> Erasure:
        """Erase rows from every version: memory, hold-outs, scores, ledger, and the bytes on the disk.

        Later updates leave such rows out. What the weights of a model took from them stays; the result says which versions were
        trained on them, and how to train anew without them.

        Args:
            ids: values of the rows' ``id`` column.

        Raises:
            StreamError: no id is given.
            StateError: rows of this store have no ids, or an update is under way; the store is as it was.
        """
        from continual.refresh.intake import row_ids

        settings = self.folder.settings
        if settings.columns.id is None:
            raise StateError(
                f"the rows of '{self.path}' have no id column, so no id names one: hand the rows themselves to erase_rows(), or "
                "give --rows a file of them."
            )
        named = list(dict.fromkeys(str(one) for one in ids))
        if not named:
            raise StreamError("no row to erase is named: give ids, one at least.")
        found = row_ids(named, settings.salt)
        return self._erase(lambda: (found, named))

    def erase_rows(self, rows: Any) -> Erasure:
        """As :meth:`erase`, of rows that are given themselves, in any form that :meth:`update` takes."""
        from continual.refresh.intake import read_rows

        settings = self.folder.settings

        def given() -> tuple[Tensor, list[str]]:
            found = read_rows(rows, settings.columns, settings.objective, settings.salt)
            if found.raw.ids is None:  # places count from 0 among rows that differ
                return found.ids, [f"row {place}" for place in range(len(found.ids))]
            return found.ids, [str(name) for name in found.raw.ids]

        return self._erase(given)

    def _erase(self, rows: Callable[[], tuple[Tensor, list[str]]]) -> Erasure:
        from continual.refresh.erasure import erase

        self._check_trust()
        deaf = self._tell()
        with self.folder.writing("erase"), self.folder.cached():
            found = erase(self.folder, *rows(), self.trust)
        return replace(found, sentence=" ".join([found.sentence, *deaf, *self._tell(done=True)]))

    def _tell(self, *, done: bool = False) -> list[str]:
        """Tell what updates have left to be told, where the rules may name whom; a sentence for each who could not be told.

        Args:
            done: a command has done its work, and another version may be live.
        """
        with suppress(ContinualError):
            rules = self.folder.rules
            if (done and rules.alerts.prometheus is not None) or waiting(self.path, len(self.history())):
                from continual.refresh.alerts import show_live, tell_waiting
                from continual.refresh.allowed import check_rules

                check_rules(rules, self.path, set(self.trust))
                deaf = tell_waiting(self.folder, rules.alerts)
                return [*deaf, *(show_live(self.folder, rules.alerts) if done else [])]
        return []

    def learner(self, version: int | None = None, *, device: str = "auto") -> Learner:
        """The learner of a version (the live one)."""
        from continual.refresh.restored import restored

        self._check_trust()
        number = self._version(version)
        return restored(self.folder, number, self.trust, device=device, progress=False)

    def predict(
        self,
        rows: Any,
        *,
        version: int | None = None,
        device: str = "auto",
        experience: str | None = None,
        out_of_scope: float | None = None,
    ) -> dict[str, Any]:
        """Predictions of a version (the live one), as :meth:`Learner.predict` gives them.

        Args:
            experience: whose classes compete; the scenario ``task`` needs it, and no other takes it.
            out_of_scope: rows that are less ``familiar`` than this have True in ``out_of_scope``, bool (N,). The scale is the head's
                own: choose it on rows that are known.

        Raises:
            StreamError: no experience where one is needed, or none of that name; a threshold that is no number.
            CompositionError: the head does not say how familiar a row is.
        """
        if out_of_scope is not None and not math.isfinite(out_of_scope):
            raise StreamError(f"{out_of_scope} is no threshold to be out of scope by: give a finite number.")
        learner, place = self.learner(version, device=device), None
        if self.folder.settings.scenario == "task":
            names = learner.experience_names
            if experience not in names:
                said = "is not named" if experience is None else f"'{experience}' is none of them"
                raise StreamError(
                    f"the scenario is 'task', where the classes of one experience compete, and it {said}: name it (--experience), "
                    f"one of {quoted(names[-LISTED:])}."
                )
            place = names.index(experience)
        elif experience is not None:
            raise StreamError(
                f"the scenario is '{self.folder.settings.scenario}', where all classes compete: leave the experience "
                f"'{experience}' out."
            )
        found = learner.predict(rows, experience=place)
        if out_of_scope is not None:
            if "familiar" not in found:
                head = next((part.name for part in learner.parts if part.slot == "head"), "a head of its own")
                raise CompositionError(
                    f"the model answers by {head}, which does not say how familiar a row is, so that none can be told to be out of "
                    "scope: leave the threshold out, or keep a store with a head that does (nearest-mean, neighbours, slda, klda, "
                    "ridge, vae-classifier)."
                )
            found["out_of_scope"] = ~(found["familiar"] >= out_of_scope)
        return found

    def _lacks(self, version: int, live: int | None) -> str:
        """What a version about to go live has not learnt and the live one has, as the end of a sentence."""
        names = self.folder.lacking(version, live)
        more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
        listed = f"{quoted(names[:LISTED])}{more}"
        return f"; version {version} has not learnt {listed}, which version {live} has" if names else ""

    def _version(self, version: int | None) -> int:
        if version is not None:
            return version
        live = self.folder.current()
        if live is None:
            raise StateError(f"'{self.path}' has no live version yet: give it rows with `continual store update`.")
        return live

    def _check_trust(self) -> None:
        settings = self.folder.settings
        asked = wishes([settings.strategy, settings.model]) - set(self.trust)
        check_trusted(self.path, asked, "--trust NAME, or Store(folder, trust={names})")

    def _check_loadable(self, version: int) -> None:
        for name, piece in self.folder.manifest(version).pieces.items():
            if name != "report":
                self.folder.objects.check(piece, f"{name} of version {version}")
