"""What parts see of the training, as one object that our learner and a loop of your own both use.

In a loop of your own::

    loop = TrainingContext(model, parts, optimizer, seed=0)
    for experience in stream:
        loop.begin(experience)
        for batch in loop.shuffled(experience.train, batch_size=32):
            optimizer.zero_grad()
            loop.backward(batch)
            optimizer.step()
            loop.after_step()
        loop.end()

``model(batch)`` takes a dict of tensors and gives an :class:`~continual.models.output.Output`;
:func:`~continual.models.build.build_model` makes such a model of any module that gives logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from continual.errors import ModelError, TrainingError
from continual.kinds import Objective, Scenario
from continual.models.model import Model
from continual.models.output import Output
from continual.objective import Competition, Criterion, active_classes, loss_rows
from continual.parts.part import Part, check_criterion, overriding
from continual.parts.passes import as_at_test
from continual.parts.steady import SteadyFeatures
from continual.randomness import Randomness
from continual.streams.batching import evaluation_batches, training_batches
from continual.streams.experience import Experience
from continual.table import Batch, Table, to_device

# B rows, K classes


class TrainingContext:
    """Drives the parts of one training and shows them what they may see (:class:`~continual.parts.part.Context`).

    Args:
        model: ``model(batch)`` gives an ``Output``; :func:`~continual.models.build.build_model` wraps one that gives logits.
        parts: in the order in which their hooks are called.
        optimizer: told of parameters that come, go and grow; None while there is none.
        competition: which classes compete in training.
        criterion: the loss of a classification (:func:`~continual.objective.loss_rows`).
        autocast: makes the context manager around each forward pass.
        batch_size: rows of the experience in a full batch; :meth:`shuffled` sets it. Left out, it is what the largest batch of the
            experience so far had.

    Raises:
        CompositionError: a part that cannot work with this model, objective or criterion.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Sequence[Part],
        optimizer: torch.optim.Optimizer | None = None,
        *,
        seed: int = 0,
        objective: Objective = "classification",
        scenario: Scenario = "class",
        competition: Competition = "seen",
        criterion: Criterion = "cross-entropy",
        device: torch.device | None = None,
        randomness: Randomness | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        batch_size: int | None = None,
    ) -> None:
        self.model, self.parts, self.optimizer = model, list(parts), optimizer
        self.objective, self.scenario = objective, scenario
        self.competition, self.criterion = competition, criterion
        first = next(model.parameters(), None)
        self.device = device or (first.device if first is not None else torch.device("cpu"))
        self.randomness = randomness or Randomness(seed)
        self.autocast, self._batch_size, self._most_rows = autocast, batch_size, 0
        self.features = SteadyFeatures(model, self.forward, self.device)
        self.experience: Experience | None = None
        self.experience_index, self.step, self.steps, self.epoch, self.current_rows = -1, 0, 0, 0, 0
        self.owner: list[int] = []
        self.reserve_classes: int | None = None
        self._owner_K = torch.empty(0, dtype=torch.int64, device=self.device)
        self._all_seen = self._in_step = False
        self._parameters: dict[str, nn.Parameter] | None = None
        self._last: list[tuple[Batch, Output, int]] = []
        self._extend = overriding(self.parts, "extend")
        self._loss = [(part, part.loss) for part in self.parts if overriding([part], "loss")]
        self._edit = overriding(self.parts, "edit_gradients")
        self._after = overriding(self.parts, "after_step")
        for part in self.parts:
            check_criterion(part, criterion)
        for part in self.parts:
            part.attach(self)

    # What parts see

    @property
    def batch_size(self) -> int:
        """Rows of the experience in one forward pass; 32 while that is not known."""
        return self._batch_size or self._most_rows or 32

    @batch_size.setter
    def batch_size(self, rows: int) -> None:
        self._batch_size = rows

    @property
    def full_rows(self) -> int:
        """Rows of the experience in a full batch: all of them where they are fewer than :attr:`batch_size`."""
        if self._batch_size is None or self.experience is None:
            return self._batch_size or max(self._most_rows, self.current_rows)
        return max(min(self._batch_size, len(self.experience.train)), self.current_rows)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that train now, by name."""
        if self._parameters is None:
            self._parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        return self._parameters

    def forward(self, batch: Batch) -> Output:
        """``model(batch)`` in the precision of the run.

        Raises:
            ModelError: it takes no batch, or gives something without logits.
        """
        try:
            with self.autocast():
                output: Output = self.model(batch)
        except (TypeError, AttributeError) as error:
            if isinstance(self.model, Model) or "dict" not in str(error):
                raise
            raise _takes_no_batch(self.model, f"fails with '{error}'") from error
        if not hasattr(output, "logits"):
            raise _takes_no_batch(self.model, f"gives {type(output).__name__}")
        return output

    def active(self, batch: Batch) -> Tensor | None:
        """Which classes compete in training for these rows: bool (K,) or (B, K), None for all."""
        if self.objective != "classification":
            return None
        return active_classes(
            self.competition,
            self._owner_K,
            batch["labels"],
            all_seen=self._all_seen,
            current=self.experience_index,
            new_rows=self.current_rows if self._in_step else None,
        )

    def active_at_test(self, batch: Batch) -> Tensor | None:
        """Which classes compete when rows are measured: those of the row's experience in the task scenario, else all seen."""
        if self.objective != "classification":
            return None
        competition: Competition = "experience" if self.scenario == "task" else "seen"
        return active_classes(competition, self._owner_K, batch["labels"], all_seen=self._all_seen)

    def loss_rows(self, output: Output, batch: Batch) -> Tensor:
        """The objective's loss of each row, (B,)."""
        return loss_rows(self.objective, output.logits, batch, self.active(batch), self.criterion)

    def batches(
        self,
        table: Table,
        *,
        limit: int | None = None,
        generator: torch.Generator | None = None,
        gradients: bool = False,
    ) -> Iterator[Batch]:
        """The rows of a table on the device, once each, similar lengths together; ``limit`` draws so many of them.

        Passes with ``gradients`` have as many rows as those of the training, others eight times as many, 256 at most; and they
        read what the training reads (:meth:`as_trained_on`).
        """
        table = self.as_trained_on(table) if gradients else table
        if limit is not None and limit < len(table):
            table = table.select(torch.randperm(len(table), generator=generator)[:limit].sort().values)
        size = self.batch_size if gradients else max(self.batch_size, min(8 * self.batch_size, 256))
        for index_B in evaluation_batches(table.lengths, len(table), size):
            yield to_device(table[index_B], self.device)

    def steady(self, table: Table) -> Table:
        """The table with features in the place of inputs, where the backbone does not train; else the table itself."""
        rows = max(self.batch_size, min(8 * self.batch_size, 256))
        return self.features.of([table], rows, "training")[0]

    def as_trained_on(self, table: Table) -> Table:
        """The same for a table that is trained on, where no part may look at more than features: one that adds rows to a batch,
        or one of the user's own."""
        looks = bool(self._extend) or any(part.reference != part.kind for part in self.parts)
        return table if looks else self.steady(table)

    def replace_parameter(self, old: nn.Parameter, new: nn.Parameter) -> None:
        """``new`` takes the place of ``old``; the optimiser's state of its first rows is kept, that of new rows is zero."""
        self._parameters = None
        if self.optimizer is None:
            return
        for group in self.optimizer.param_groups:
            group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
        state = self.optimizer.state.pop(old, None)
        if state is not None:
            self.optimizer.state[new] = {key: _grown(value, old, new) for key, value in state.items()}

    def forget(self, parameters: Iterable[nn.Parameter]) -> None:
        """The optimiser forgets what it knew of these parameters."""
        if self.optimizer is not None:
            for parameter in parameters:
                self.optimizer.state.pop(parameter, None)

    def rates(self) -> dict[str, float]:
        """Learning rate of the next step, by name of the parameter."""
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        rates = {id(parameter): float(group["lr"]) for group in groups for parameter in group["params"]}
        return {name: rates[id(p)] for name, p in self.parameters().items() if id(p) in rates}

    # What a loop calls

    def begin(self, experience: Experience, *, steps: int = 0) -> None:
        """Call every part's ``begin``; tell the optimiser of parameters that came or went."""
        self.experience, self.experience_index = experience, experience.index
        self.step, self.epoch, self.steps, self._most_rows = 0, 0, steps, 0
        for part in self.parts:
            self._parameters = None
            part.begin(self, experience)
            if self.reserve_classes is not None and part.slot == "head" and hasattr(part, "grow_to"):
                part.grow_to(self.reserve_classes, self)
        self._parameters = None
        self._meet(experience)
        self.sync_optimizer()

    def extend(self, batch: Batch) -> Batch:
        """The batch with what the parts add to it."""
        self.current_rows = len(batch["labels"])
        self._most_rows = max(self._most_rows, self.current_rows)
        for extend in self._extend:
            batch = extend(batch)
        return batch

    def terms(
        self, batch: Batch, output: Output, losses: Callable[[], Tensor] | None = None
    ) -> list[tuple[str, Tensor]]:
        """The objective and each part's own term, by name; their sum is the loss.

        Args:
            losses: gives the objective's loss of each row, (B,), in another way than from ``output``.
        """
        self._in_step = True
        try:
            loss_B = self.loss_rows(output, batch) if losses is None else losses()
            weight_B = batch.get("weight")
            mean = loss_B.mean() if weight_B is None else (weight_B * loss_B).sum() / weight_B.sum()
            terms = [("objective", mean)]
            for part, loss in self._loss:
                term = loss(batch, output)
                if term is not None:
                    terms.append((part.name, term))
            return terms
        finally:
            self._in_step = False

    def backward(self, batch: Batch) -> Tensor:
        """Extend, forward, loss, backward and ``edit_gradients`` of one batch; returns the loss.

        Raises:
            TrainingError: the loss is not finite.
        """
        batch = self.extend(batch)
        output = self.forward(batch)
        terms = self.terms(batch, output)
        loss = torch.stack([term for _, term in terms]).sum()
        if not torch.isfinite(loss):
            raise not_finite(self.step, terms, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        self.keep(batch, output)
        self.edit_gradients()
        return loss.detach()

    def edit_gradients(self) -> None:
        """Let the parts change the gradients."""
        for edit in self._edit:
            edit()

    def keep(self, batch: Batch, output: Output) -> None:
        """Remember a forward pass of this step for ``after_step``, where some part wants it."""
        if self._after:
            self._last.append((batch, output.detach(), self.current_rows))

    def after_step(self) -> None:
        """Tell the parts that the optimiser has stepped."""
        for batch, output, rows in self._last:
            self.current_rows = rows
            for after in self._after:
                after(batch, output)
        self._last.clear()
        self.step += 1

    def skip_step(self) -> None:
        """In place of :meth:`after_step`, where the optimiser left a step out (gradients of half precision overflowed)."""
        self._last.clear()
        self.step += 1

    def end(self) -> None:
        """Call every part's ``end``, the head's last; tell the optimiser of parameters that no longer train."""
        assert self.experience is not None, "end() follows begin()"
        for part in overriding(sorted(self.parts, key=lambda part: part.slot == "head"), "end"):
            self._parameters = None
            part(self, self.experience)
        self._parameters = None
        self.sync_optimizer()
        self.features.release("training")
        self.features.release("valid")

    def shuffled(self, table: Table, batch_size: int) -> Iterator[Batch]:
        """One epoch of a table in random order, on the device."""
        self.batch_size = batch_size
        generator = self.randomness.generator("order")
        for index_B in training_batches(table.lengths, len(table), batch_size, generator):
            yield to_device(table[index_B], self.device)
        self.epoch += 1

    def sync_optimizer(self) -> None:
        """Take out parameters that no longer train, put in those that now do; what stays keeps its state."""
        if self.optimizer is None:
            return
        wanted = self.parameters()
        ids = {id(parameter) for parameter in wanted.values()}
        known: set[int] = set()
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in ids:
                    self.optimizer.state.pop(parameter, None)
            group["params"] = [parameter for parameter in group["params"] if id(parameter) in ids]
            known.update(id(parameter) for parameter in group["params"])
        groups = self.optimizer.param_groups
        for name, parameter in wanted.items():
            if id(parameter) not in known:
                groups[-1 if name.startswith("head.") else 0]["params"].append(parameter)

    def set_owner(self, owner: Sequence[int]) -> None:
        """Which experience each output belongs to, -1 for a class not met yet."""
        self.owner = list(owner)
        self._owner_K = torch.tensor(self.owner, dtype=torch.int64, device=self.device)
        self._all_seen = all(index >= 0 for index in self.owner)

    def check_outputs(self, experience: Experience) -> int | None:
        """How many classes the model tells apart now; None where it has no classes or no head yet.

        Raises:
            ModelError: fewer than the experience needs.
        """
        outputs = self._outputs(experience) if self.objective == "classification" else None
        largest = max(experience.classes, default=-1)
        if outputs is not None and largest >= outputs:
            raise ModelError(
                f"the model has {outputs} outputs and experience '{experience.name}' brings class number {largest}: give "
                "the model at least as many outputs as the stream has classes, or take one with a head that grows."
            )
        return outputs

    def _meet(self, experience: Experience) -> None:
        outputs = self.check_outputs(experience)
        if outputs is None:
            return
        owner = [*self.owner, *[-1] * (outputs - len(self.owner))]
        owners = experience.owners or (experience.index,) * len(experience.classes)
        for label, index in zip(experience.classes, owners, strict=True):
            owner[label] = index
        self.set_owner(owner)

    def _outputs(self, experience: Experience) -> int | None:
        """How many classes the model tells apart now, asked of it with one row; None where no head is there yet."""
        if getattr(self.model, "gives_features", False) and getattr(self.model, "head", None) is None:
            return None
        with torch.no_grad(), as_at_test(self.model):
            row = to_device(experience.train[torch.zeros(1, dtype=torch.int64)], self.device)
            return int(self.forward(row).logits.shape[-1])


def not_finite(step: int, terms: Sequence[tuple[str, Tensor]], batch: Batch) -> TrainingError:
    """The sentence for a loss that is not finite: the step, the term that did it, the rows."""
    culprits = [name for name, term in terms if not bool(torch.isfinite(term))] or ["the sum of all terms"]
    rows = batch["row"].tolist() if "row" in batch else []
    shown = ", ".join(str(row) for row in rows[:16]) + (f" and {len(rows) - 16} more" if len(rows) > 16 else "")
    what, advice = (
        f"the loss is not finite at step {step} (from {', '.join(culprits)}",
        "lower training.lr, set training.clip",
    )
    kept = "the weights of the last good step are kept"
    return TrainingError(
        f"{what}; rows {shown or 'without ids'}): {kept}; {advice}, or look at these rows.",
        f"{what}): {kept}; {advice}.",
    )


def _takes_no_batch(model: nn.Module, what: str) -> ModelError:
    return ModelError(
        f"{type(model).__name__} {what} where a batch, a dict of tensors, should give an Output: hand in "
        "build_model(model), which makes that of a module that takes inputs and gives logits."
    )


def _grown(value: Any, old: nn.Parameter, new: nn.Parameter) -> Any:
    if not isinstance(value, Tensor) or value.shape != old.shape:
        return value
    grown = torch.zeros_like(new, dtype=value.dtype)
    grown[tuple(slice(size) for size in value.shape)] = value
    return grown
