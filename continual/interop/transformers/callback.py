"""A strategy inside a ``transformers.Trainer`` or TRL's ``SFTTrainer``: one callback in a script that is there already.

Every call of ``trainer.train()`` is one experience. The trainer keeps its loop, its optimiser and schedule, accumulation,
precision, logging and checkpoints; what changes is in :class:`~continual.interop.transformers.ContinualMixin`. The loss is the
objective's of every row (the mean over rows of the mean over a row's tokens, where the trainer takes the mean over all tokens
of a step) and the parts' own terms.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from continual.errors import StateError
from continual.interop.transformers.hooks import Hooks
from continual.interop.transformers.state import read_state, session_state
from continual.learner.checkpoint import check_same
from continual.learner.update import Update
from continual.monitor.monitor import Monitor, Retention
from continual.parts.part import Part
from continual.state import save_state
from continual.strategy import Strategy


class Continual(Hooks):
    """Replay, penalties, distillation, adapters and the monitor for trainers: ``Trainer(..., callbacks=[Continual("ewc")])``.

    The strategy's adapter goes into the trainer's model in place; a ``PeftModel`` keeps its own, and the strategy's is left
    out. A classifier keeps its own head. Of ``training`` in the strategy only ``active`` is used. One warning names what is
    left out.

    Args:
        strategy: a name of the library, a YAML file, a mapping, or a :class:`~continual.strategy.Strategy`.
        name: of the next experience; None calls it ``update-1``, ``update-2`` … Set ``memory.name`` before each training.
        test: rows to measure it by, as the trainer would take them for evaluation; the name of one of the trainer's
            ``eval_dataset``; or None for its ``eval_dataset``, unless the trainer selects by that one. Set ``memory.test``
            likewise.
        seed: root of what the parts draw; the trainer's own draws are its own.
        scenario: ``class``, ``domain`` or ``task``; in ``class``, classes not met yet do not compete in training, unless the
            strategy says ``training.active: all``.
        objective: where it cannot be told from the model's class.
        monitor: what measures retention; None makes one, False measures nothing.

    Attributes:
        updates: of every experience that this object has seen, as :meth:`~continual.learner.Learner.update` gives them.

    Raises:
        SpecError, CompositionError: a strategy that cannot be.
    """

    @property
    def parts(self) -> list[Part]:
        """The parts of the strategy, with their state."""
        return self.session.parts

    @property
    def updates(self) -> list[Update]:
        """One for each training that this object has seen to its end."""
        return [] if self._session is None else self._session.updates

    @property
    def retention(self) -> Retention | None:
        """What the last training left of everything before it; printed, it is the retention tree."""
        return self.updates[-1].retention if self.updates else None

    def __str__(self) -> str:
        return (
            str(self.updates[-1])
            if self.updates
            else f"Continual with strategy '{self.strategy.name}': no training yet"
        )

    def state_bytes(self) -> dict[str, int]:
        """Bytes that each part holds."""
        return {part.name: part.nbytes() for part in self.parts}

    def save(self, folder: Path | str) -> Path:
        """Write memory, Fisher information, monitor and what was learnt, so that :meth:`load` goes on with them.

        The parameters that the base model came with and that never trained are not in it, but known by their SHA-256.

        Raises:
            StateError: nothing was trained, or a training broke off in its middle.
        """
        if self.session.under_way is not None:
            raise StateError(
                f"the training of '{self.session.under_way}' has not come to its end: save() after it, or go on from a "
                "checkpoint, trainer.train(resume_from_checkpoint=True)."
            )
        save_state(Path(folder), session_state(self.session, self.strategy, self.seed))
        return Path(folder)

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        strategy: str | Path | Mapping[str, Any] | Strategy | None = None,
        trust: Iterable[str] = (),
        name: str | None = None,
        test: Any = None,
        monitor: Monitor | bool | None = None,
    ) -> Self:
        """What :meth:`save` wrote, for a trainer with the same base model; its weights are put in when the training begins.

        Args:
            strategy: when given, it must be the one that was saved.
            trust: parts of your own and folders that the state may use.
            name, test, monitor: as for the constructor.

        Raises:
            StateError: damaged, of another strategy, or asking for what is not trusted.
        """
        given = None if strategy is None else Strategy.load(strategy)
        state = read_state(Path(folder), given, trust)
        saved = Strategy.load({**state["strategy"], "name": state["strategy_name"]})
        if given is not None:
            check_same("strategy", saved.fingerprint(), given.fingerprint())
        found = cls(
            saved,
            name=name,
            test=test,
            seed=state["seed"],
            scenario=state["scenario"],
            objective=state["objective"],
            monitor=monitor,
        )
        found._state = state
        return found
