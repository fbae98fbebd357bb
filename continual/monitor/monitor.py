"""Keeps the test sets of a stream and the score of every row at every update, and says what they mean.

Updates count from 0; update i is the one that learns experience i, and -1 stands for "before any update". A model that
learns everything at once (the joint bound) registers all its test sets and records one update, 0. For forward transfer
a test set may be registered as ``ahead`` and measured before it is learnt; until it is registered as learnt, no figure
counts it.

It is one object to whoever measures, reads figures, saves or erases, and all of that is short; hence the length of this file.

Letters: U updates, S experiences, N rows of a test set, M measurements of a test set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from continual.errors import StateError, StreamError
from continual.kinds import Objective
from continual.models.output import Output
from continual.monitor.bootstrap import INITIAL, Measured, Resampled, bootstrap, point_matrix
from continual.monitor.evaluation import score_tables
from continual.monitor.metrics import METRICS, Floats, defined, flips, metric_table, negative_flips
from continual.monitor.retention import TOLERANCE, Retention, judge, retention_of
from continual.monitor.sets import (
    MeasuredSet,
    Scores,
    finite,
    named_scores,
    probe_table,
    scores_from,
    set_from_state,
    set_state,
)
from continual.objective import PRIMARY
from continual.parts.replay.select import row_keys
from continual.state import tensor_bytes
from continual.table import Batch, Table

__all__ = ["Monitor", "Retention"]

THINNING = 0
"""Seed of the hash by which test sets are thinned; another one would keep other rows."""

SETTINGS = ("resamples", "confidence", "batch_size", "tolerance", "seed")


class Monitor:
    """Measures every test set seen so far after every update.

    Args:
        probes: name → a fixed set that belongs to no experience (general ability, safety prompts), measured at every
            update and compared with its first score, which is the one before any update where the model has one then.
            In any form that :func:`~continual.streams.convert.as_table` takes; ``labels`` are class ids or numbers.
            Its rows are no rows of the stream: erasure does not touch them.
        resamples: draws of the bootstrap.
        confidence: of the intervals, in (0, 1).
        batch_size: rows of one forward pass of the evaluation; None leaves it to the learner, which knows the model.
        tolerance: how much a test set may lose before it is called forgotten, in the unit of the scores (for
            regression, as a share of its squared error); None takes :data:`~continual.monitor.retention.TOLERANCE`.
        seed: of the bootstrap.

    Raises:
        StreamError: a setting out of its range.
    """

    def __init__(
        self,
        probes: Mapping[str, Any] | None = None,
        resamples: int = 1000,
        confidence: float = 0.95,
        batch_size: int | None = None,
        tolerance: float | None = None,
        seed: int = 0,
    ) -> None:
        if (
            resamples < 1
            or (batch_size is not None and batch_size < 1)
            or not 0 < confidence < 1
            or (tolerance is not None and tolerance < 0)
        ):
            raise StreamError(
                f"a monitor with {resamples} resamples, confidence {confidence}, batches of {batch_size} and tolerance "
                f"{tolerance} cannot be: give at least 1, a number between 0 and 1, at least 1, and at least 0."
            )
        self.resamples, self.confidence, self.batch_size = resamples, confidence, batch_size
        self.tolerance, self.seed = tolerance, seed
        self._tests: dict[int, MeasuredSet] = {}
        self._probes: dict[str, MeasuredSet] = {}
        for name, given in (probes or {}).items():
            self.keep_probe(name, probe_table(name, given))
        self._waiting: dict[int, Scores] = {}
        self._resampled: Resampled | None = None

    # What is measured.

    def register(self, index: int, name: str, table: Table, ahead: bool = False) -> None:
        """Keep ``table``, which has a column ``row``, as the test set of experience ``index``.

        Registered again, as after loading, it must hold the rows that were scored; rows that were erased stay out.

        Args:
            ahead: the experience is not learnt yet: its scores wait until it is registered without. What was once
                registered as learnt stays so.

        Raises:
            StreamError: a row that was scored is not in it.
        """
        rows_N = table.column("row").to("cpu", torch.int64)
        known = self._tests.get(index)
        if known is None:
            self._tests[index] = MeasuredSet(name, rows_N, table, ahead)
            if index in self._waiting:
                self._keep(INITIAL, [(self._tests[index], f"experience {index}", self._waiting.pop(index))])
            self._resampled = None
            return
        if not torch.equal(known.rows, rows_N):
            order_N = rows_N.argsort(stable=True)
            place_n = torch.searchsorted(rows_N[order_N], known.rows).clamp_(max=max(len(rows_N) - 1, 0))
            missing = len(known.rows) if not len(rows_N) else int((rows_N[order_N][place_n] != known.rows).sum())
            if missing:
                raise StreamError(
                    f"the test set of '{name}' lacks {missing} of the {len(known.rows)} rows that were measured "
                    "before: give the same test set, or a new experience a new index."
                )
            table = table.select(order_N[place_n])
        known.name, known.table, known.ahead = name, table, known.ahead and ahead
        self._resampled = None

    def tables(self) -> dict[int, Table]:
        """The test sets at hand by experience."""
        return {index: test.table for index, test in sorted(self._tests.items()) if test.table is not None}

    def absent(self) -> dict[int, str]:
        """Names of the experiences whose scores are kept and whose test sets are not at hand."""
        return {index: test.name for index, test in sorted(self._tests.items()) if test.table is None}

    def keep_probe(self, name: str, table: Table) -> None:
        """Take ``table`` as the rows of a probe; one whose rows are at hand already is left as it is."""
        probe = self._probes.setdefault(name, MeasuredSet(name, torch.arange(len(table))))
        if probe.table is None:
            probe.table = table

    def prepare_probes(self, encode: Callable[[Table], Table]) -> None:
        """Put what ``encode`` makes of it (text as tokens) in the place of each probe's table."""
        for probe in self._probes.values():
            if probe.table is not None:
                probe.table = encode(probe.table)

    @property
    def probes(self) -> dict[str, Table]:
        """The probes at hand by name."""
        return {name: probe.table for name, probe in self._probes.items() if probe.table is not None}

    def measure(
        self,
        update: int,
        forward: Callable[[Batch], Output],
        active: Callable[[Batch], Tensor | None],
        objective: Objective,
        device: torch.device,
        experiences: Iterable[int] | None = None,
        batch_size: int | None = None,
        prepare: Callable[[list[Table]], list[Table]] | None = None,
    ) -> None:
        """Score the test sets and probes in one pass and record them; the model is in eval mode
        (:func:`~continual.monitor.evaluation.evaluating`).

        Args:
            update: as in :meth:`record`.
            forward, active, objective, device: as in :func:`~continual.monitor.evaluation.score_tables`.
            experiences: measure these test sets only, beside the probes; None for all.
            batch_size: rows of one forward pass; None for the monitor's own, or 256.
            prepare: gives the tables that are scored in the place of these, row for row.
        """
        tests = self.tables()
        chosen = sorted(tests) if experiences is None else sorted(set(experiences) & set(tests))
        probes = self.probes
        tables = [tests[index] for index in chosen] + list(probes.values())
        if not tables:
            return
        tables = tables if prepare is None else prepare(tables)
        found = score_tables(tables, forward, active, objective, device, batch_size or self.batch_size or 256)
        own = len(chosen)
        self.record(update, dict(zip(chosen, found, strict=False)), dict(zip(probes, found[own:], strict=True)))

    def record(
        self, update: int, scores: Mapping[int, Scores], probe_scores: Mapping[str, Scores] | None = None
    ) -> None:
        """Keep the scores of rows.

        Args:
            update: from 0. Recorded twice, the later scores of a test set replace the earlier.
            scores: experience → name of the score → float32 (N,) in the order of the test set, primary score first.
            probe_scores: the same by name of the probe.

        Raises:
            StreamError: an experience or probe that is not registered, or another number of rows.
        """
        if update < 0:
            raise StreamError(f"update {update} cannot be: updates count from 0 (`record_initial` is for before any).")
        found = [(self._tests.get(index), f"experience {index}", given) for index, given in scores.items()]
        found += [(self._probes.get(name), f"probe '{name}'", given) for name, given in (probe_scores or {}).items()]
        self._keep(update, found)

    def record_initial(self, scores: Mapping[int, Scores], probe_scores: Mapping[str, Scores] | None = None) -> None:
        """Keep the scores before any update, as :meth:`record` does; test sets may be registered later."""
        self._waiting.update({index: given for index, given in scores.items() if index not in self._tests})
        found = [(self._tests[i], f"experience {i}", given) for i, given in scores.items() if i in self._tests]
        later: list[tuple[MeasuredSet | None, str, Scores]] = [*found]
        later += [(self._probes.get(name), f"probe '{name}'", given) for name, given in (probe_scores or {}).items()]
        self._keep(INITIAL, later)

    # What it means.

    @property
    def objective(self) -> Objective:
        """What the primary score is for; ``classification`` before anything is recorded."""
        names = {score: objective for objective, score in reversed(PRIMARY.items())}
        return names.get(self._primary(), "classification")  # type: ignore[return-value]

    @property
    def right_or_wrong(self) -> str:
        """Name of the score that is 1 for a row that is right and 0 for one that is wrong; a regression records none."""
        return self._primary() if self.objective == "classification" else "exact match"

    @property
    def measured(self) -> bool:
        """Whether an update was recorded."""
        return self.updates() > 0

    def updates(self) -> int:
        """Rows of the matrix: the last update recorded, plus 1."""
        return max((update + 1 for one in self._sets() for update in one.scores), default=0)

    def names(self) -> list[str]:
        """Name of each column of the matrix; an experience without a test set goes by its number."""
        return [self._tests[i].name if i in self._tests else f"experience {i}" for i in range(self._width())]

    def matrix(self, score: str | None = None) -> Floats:
        """R, float64 (U, S), NaN where not measured; of the primary score, or of the one named."""
        return point_matrix(self._columns(score), self.updates())[0]

    def initial(self, score: str | None = None) -> list[float | None]:
        """The scores before any update, S of them, None where not measured."""
        return [defined(value) for value in point_matrix(self._columns(score), self.updates())[1]]

    def probe_history(self) -> dict[str, dict[str, list[Any]]]:
        """Name of each probe → ``updates`` at which it was measured (-1 before any) and its mean ``scores``."""
        found: dict[str, dict[str, list[Any]]] = {}
        for name, probe in self._probes.items():
            scores = [defined(score) for score in probe.measured(self._primary()).scores.mean(1, dtype=np.float64)]
            found[name] = {"updates": list(probe.updates()), "scores": scores}
        return found

    def metrics(self) -> dict[str, float | None]:
        """``accuracy``, ``learning_accuracy``, ``bwt``, ``forgetting``, ``fwt``, ``retention``, ``negative_flips``."""
        if not self.measured:
            return dict.fromkeys((*METRICS, "negative_flips"))
        table = metric_table(self.matrix(), self.initial(), self.objective)
        return table | {"negative_flips": self.negative_flips()}

    def negative_flips(self) -> float | None:
        """Share of rows right just after they were learnt and wrong now; None where scores are not right or wrong."""
        score, pairs = self.right_or_wrong, []
        for index in self._learnt():
            before, after = self._pair(index, score)
            if before is not None and after is not None:
                pairs.append((before, after))
        return negative_flips([before for before, _ in pairs], [after for _, after in pairs])

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Interval of each defined metric, from a paired bootstrap over rows; computed once for each record."""
        return dict(self._bootstrap().metrics)

    def last_intervals(self) -> Floats:
        """Interval of the last row of the matrix, float64 (2, S), NaN where not measured."""
        return self._bootstrap().last

    def forgetting_bias(self) -> float | None:
        """What max-based forgetting would read on these test sets with nothing forgotten."""
        return self._bootstrap().forgetting_bias

    def scores(self, update: int | None = None) -> dict[str, NDArray[np.float32] | None]:
        """Primary score of every row of each test set that is learnt, by name; None where it was not measured then.

        Args:
            update: or None for the last.
        """
        last = self.updates() - 1 if update is None else update
        return {test.name: test.at(last, self._primary()) for test in self._learnt().values()}

    def pairs(
        self, before: int | None = None, after: int | None = None, score: str | None = None
    ) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Paired scores for :func:`continual.monitor.gate.gate`, by name; probes as ``probe NAME``.

        Args:
            before: an update, or None for the one that learnt each experience (the first score of a probe).
            after: an update, or None for the last.
            score: or None for the primary one.
        """
        score = self._primary() if score is None else score
        found = {}
        sets = [(test.name, test, test.first(index)) for index, test in self._learnt().items()]
        sets += [(f"probe {name}", probe, probe.first(INITIAL)) for name, probe in self._probes.items()]
        last = self.updates() - 1 if after is None else after
        for name, one, learnt in sets:
            start = learnt if before is None else before
            then, now = one.at(start, score), one.at(last, score)
            if then is not None and now is not None and start != last:
                found[name] = (then, now)
        return found

    def latest(self, hint: Sequence[str] | None = None, name: str | None = None) -> Retention:
        """What the last update left of everything before it; printed, it is the retention tree.

        Args:
            hint: slots of the parts that the strategy uses (``replay``, ``penalty``, ...), so that the advice fits.
            name: of the update, where it brought no test set of its own.

        Raises:
            StreamError: nothing was recorded yet.
        """
        update = self.updates() - 1
        if update < 0:
            raise StreamError("nothing was measured yet: record an update first.")
        score, objective = self._primary(), self.objective
        compared = [(test.name, *self._pair(index, score), False) for index, test in self._learnt().items()]
        for name, probe in self._probes.items():
            first = probe.first(INITIAL)
            compared.append((name, None if first == update else probe.at(first, score), probe.at(update, score), True))
        family = sum(before is not None and after is not None for _, before, after, _ in compared)
        lines = [
            judge(name, before, after, self._tolerance(before), self.confidence, probe=probe, family=family)
            for name, before, after, probe in compared
        ]
        found = self._bootstrap()
        name = self._tests[update].name if update in self._tests else name or f"update {update + 1}"
        if update == 0 and len(self._learnt()) > 1:
            name = "all at once"
        slots = None if hint is None else tuple(hint)
        return retention_of(
            update, name, objective, tuple(lines), self.metrics(), dict(found.metrics), found.forgetting_bias, slots
        )

    # What it holds.

    def state_dict(self) -> dict[str, Any]:
        """Names, row ids and scores; the tables are registered again by whoever has the stream."""
        return {
            "tests": {str(index): set_state(test) for index, test in sorted(self._tests.items())},
            "probes": {name: set_state(probe) for name, probe in self._probes.items()},
            "waiting": {str(index): named_scores(scores) for index, scores in sorted(self._waiting.items())},
            "settings": {name: getattr(self, name) for name in SETTINGS},
        }

    def tensors(self) -> dict[str, Tensor]:
        """The score of every row: ``EXPERIENCE/rows`` int64 (N,) and ``EXPERIENCE/UPDATE/SCORE`` float32 (N,)."""
        found: dict[str, Tensor] = {}
        for index, test in sorted(self._tests.items()):
            found[f"{index}/rows"] = test.rows
            for update in test.updates():
                found |= {f"{index}/{update}/{name}": scores for name, scores in test.scores[update].items()}
        return found

    def load_state_dict(self, state: dict[str, Any], *, settings: bool = True) -> None:
        """Go on from :meth:`state_dict`; tables that are registered already are kept.

        Args:
            settings: take those of the state as well.

        Raises:
            StateError: a probe that has another number of rows than the one that was measured.
        """
        tests = {int(index): set_from_state(one) for index, one in state["tests"].items()}
        probes = {name: set_from_state(one) for name, one in state["probes"].items()}
        for name, probe in self._probes.items():
            if name in probes and len(probes[name].rows) != len(probe.rows):
                raise StateError(
                    f"the probe '{name}' has {len(probe.rows)} rows and was measured with "
                    f"{len(probes[name].rows)}: give the same probe, or another name."
                )
            probes.setdefault(name, MeasuredSet(name, probe.rows)).table = probe.table
        present = {index: test.table for index, test in self._tests.items() if test.table is not None}
        self._tests, self._probes, self._resampled = tests, probes, None
        self._waiting = {int(index): scores_from(kept) for index, kept in state["waiting"].items()}
        if settings:
            for name in SETTINGS:
                setattr(self, name, state["settings"][name])
        for index, table in present.items():
            if index in tests:
                self.register(index, tests[index].name, table, tests[index].ahead)

    def nbytes(self) -> int:
        """Bytes of the scores and row ids held."""
        return tensor_bytes([[one.rows, *one.scores.values()] for one in self._sets()] + [*self._waiting.values()])

    def rows(self) -> Tensor:
        """Ids of the rows of the stream that it holds scores or data of, int64."""
        return torch.cat([torch.empty(0, dtype=torch.int64), *(test.rows for test in self._tests.values())])

    def erase(self, rows: Tensor) -> int:
        """Give up these rows of the test sets, with all their scores; returns how many it held.

        All test sets and probes are copied into memory of their own, since they may be views of one table, which still held
        the rows. Initial scores of test sets that were never registered carry no row ids and are given up whole.
        """
        erased = 0
        self._waiting.clear()
        for test in self._tests.values():
            stays_N = ~torch.isin(test.rows, rows.to("cpu", torch.int64))
            erased += int((~stays_N).sum())
            test.keep(stays_N.nonzero().flatten())
        for probe in self._probes.values():
            probe.keep(torch.arange(len(probe.rows)))
        self._resampled = None
        return erased

    def trim(self) -> None:
        """Keep two scores of each row, so that what is held does not grow with the updates.

        Of a test set those at the update that learnt it and the last ones stay, of a probe the first and the last; the scores
        before any update go, but for a probe's. The tree, the gate's pairs and all metrics that compare these two are as
        before; ``fwt`` is no longer defined, and ``forgetting`` takes the update that learnt an experience for its best. In
        the matrix, NaN stands for what was given up.
        """
        self._waiting.clear()
        for index, test in self._tests.items():
            test.trim(index)
        for probe in self._probes.values():
            probe.trim(INITIAL)
        self._resampled = None

    def thin(self, limit: int, least: int = 0) -> int:
        """Keep ``limit`` rows of every test set that has more, those of smallest hash of their ids; returns how many went.

        It is always the same rows that stay: thinned to 100 and then to 50 is thinned to 50. Their scores stay too.

        Args:
            limit: rows of a test set, at least 1.
            least: where ``limit`` is below it, so many stay in its place.

        Raises:
            StreamError: a number out of its range.
        """
        if limit < 1 or least < 0:
            raise StreamError(f"test sets cannot be thinned to {limit} rows, {least} at least: give at least 1, and 0.")
        gone = 0
        for test in self._tests.values():
            excess = len(test.rows) - max(limit, least)
            if excess > 0:
                test.keep(row_keys(test.rows, THINNING).argsort(stable=True)[:-excess].sort().values)
                gone += excess
        self._resampled = None
        return gone

    def _keep(self, update: int, found: Sequence[tuple[MeasuredSet | None, str, Scores]]) -> None:
        for target, what, given in found:
            if target is None:
                raise StreamError(f"{what} has scores but no test set: register it first.")
            wrong = {name: tuple(s.shape) for name, s in given.items() if s.shape != target.rows.shape}
            if wrong:
                raise StreamError(f"{what} has {len(target.rows)} rows and scores of {wrong}: give one for each row.")
        for target, _, given in found:
            assert target is not None
            target.scores[update] = {name: finite(s) for name, s in given.items()}
        self._resampled = None

    def _sets(self) -> list[MeasuredSet]:
        return [*self._tests.values(), *self._probes.values()]

    def _learnt(self) -> dict[int, MeasuredSet]:
        return {index: test for index, test in sorted(self._tests.items()) if not test.ahead}

    def _primary(self) -> str:
        recorded = (scores for one in self._sets() for scores in one.scores.values())
        return next((next(iter(scores)) for scores in recorded if scores), PRIMARY["classification"])

    def _width(self) -> int:
        return max(self._learnt(), default=-1) + 1

    def _columns(self, score: str | None = None) -> list[Measured]:
        name = self._primary() if score is None else score
        return [self._column(index, name) for index in range(self._width())]

    def _column(self, index: int, score: str) -> Measured:
        if index not in self._learnt():
            return Measured((), np.empty((0, 0), dtype=np.float32))
        before, after = self._pair(index, self.right_or_wrong)
        flips_N = None if before is None or after is None else flips(before, after)
        return self._tests[index].measured(score, flips_N)

    def _pair(self, index: int, score: str) -> tuple[NDArray[np.float32] | None, NDArray[np.float32] | None]:
        """Scores just after experience ``index`` was learnt (None where that is the last update) and now."""
        test, last = self._tests[index], self.updates() - 1
        learnt = test.first(index)
        return (None if learnt == last else test.at(learnt, score)), test.at(last, score)

    def _tolerance(self, before_N: NDArray[np.float32] | None) -> float:
        share = TOLERANCE[self.objective] if self.tolerance is None else self.tolerance
        if self.objective == "regression" and before_N is not None and len(before_N):
            return share * abs(float(before_N.mean(dtype=np.float64)))
        return share

    def _bootstrap(self) -> Resampled:
        if self._resampled is None:
            if not self.measured:
                return Resampled({}, np.full((2, self._width()), np.nan), None)
            self._resampled = bootstrap(
                self._columns(), self.updates(), self.objective, self.resamples, self.confidence, self.seed
            )
        return self._resampled
