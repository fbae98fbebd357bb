"""A learner's whole state, to disk and back, and its adapter for others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from torch import nn

from continual.errors import CompositionError, ModelError, StateError, quoted
from continual.learner.checkpoint import FORMAT, check_same, table_from_state, table_state
from continual.learner.core import Core
from continual.learner.optimizer import load_optimizer_state, make_optimizer, optimizer_state
from continual.learner.trainer import Progress
from continual.parts.adapter.adalora import AdaLoRA
from continual.parts.adapter.export import export_adapter
from continual.parts.adapter.lora import LoRA
from continual.parts.adapter.merging import Method
from continual.parts.adapter.prefix import Prefix
from continual.parts.adapter.prompt import Prompt
from continual.parts.adapter.virtual_export import export_virtual
from continual.randomness import Randomness
from continual.state import load_state, save_state
from continual.strategy import Strategy
from continual.table import Table
from continual.trust import check_trusted, wishes

NEEDED = {"format", "strategy", "strategy_name", "model_spec", "seed", "objective", "scenario"}
"""What a state must hold for a learner to be made from it; the rest is read by what it belongs to."""


class Saving(Core):
    """Adds :meth:`save`, :meth:`load` and :meth:`export`."""

    def save(self, folder: Path | str) -> Path:
        """Write the whole state, so that :meth:`load` goes on bit for bit: test sets and probes are in it, and under
        ``data: cumulative`` the rows of all experiences.

        Where several processes train, all of them call it and the main one writes; so it is with :meth:`export`.

        Raises:
            StateError: the folder cannot be written, or an update broke off in the middle; what was there is untouched.
        """
        self._check_savable()
        self.processes.from_main(lambda: save_state(Path(folder), self._state(with_tests=True)))
        return Path(folder)

    def export(
        self,
        folder: Path | str,
        *,
        max_rank: int | None = None,
        merge: Method = "cat",
        density: float | None = None,
        experience: int | None = None,
    ) -> Path:
        """Write what the adapters learnt as one plain LoRA folder that stock PEFT loads on the original base.

        A prompt or a prefix becomes PEFT's own. Adapters that are kept apart go into one folder each: ``folder/0``,
        ``folder/1`` and so on.

        Args:
            max_rank: refuse a rank above it, such as a server's limit.
            merge: how the adapters of several experiences become one. ``cat`` is their exact sum; ``svd``, ``ties`` and
                ``dare`` come down to ``max_rank``, and write the error that this makes into ``continual.json``.
            density: share of entries that ``ties`` and ``dare`` keep.
            experience: export the adapter of this one alone, from 0, where each has its own.

        Raises:
            CompositionError: the strategy trains no adapter, or there is no such one.
            SpecError: a way to merge that is not there, or lacks what it needs.
        """
        adapter = next((part for part in self.parts if isinstance(part, LoRA | AdaLoRA | Prompt | Prefix)), None)
        if adapter is None:
            raise CompositionError(f"strategy '{self.strategy.name}' trains no adapter: export() is for those that do.")
        if isinstance(adapter, Prompt | Prefix) and (max_rank, merge, density) != (None, "cat", None):
            raise CompositionError(
                f"{adapter.name} has no ranks and is not merged: leave max_rank, merge and density out."
            )

        def write(target: Path, only: int | None) -> None:
            if isinstance(adapter, Prompt | Prefix):
                export_virtual(self.model, adapter, target, only=only)
                return
            export_adapter(
                self.model,
                adapter,
                target,
                max_rank=max_rank,
                method=merge,
                density=density,
                generator=Randomness(self.seed).generator("merge"),
                only=only,
            )

        def write_all() -> None:
            if adapter.adapters.apart and experience is None:
                for place in range(len(adapter.adapters.names)):
                    write(Path(folder) / str(place), place)
            else:
                write(Path(folder), experience)

        self.processes.from_main(write_all)
        return Path(folder)

    @classmethod
    def load(
        cls,
        source: Path | str,
        /,
        *,
        model: str | Mapping[str, Any] | nn.Module | None = None,
        strategy: str | Path | Mapping[str, Any] | Strategy | None = None,
        trust: Iterable[str] = (),
        **options: Any,
    ) -> Self:
        """A learner as :meth:`save` or a checkpoint left it.

        A folder never decides which code is run: parts and models of your own (``package.module:Class``) and folders
        outside it are used only where ``strategy``, ``model`` or ``trust`` name them too.

        Args:
            model: the module, where the learner was made with an ``nn.Module`` object; or what the constructor took.
            strategy: when given, it must be the one that was saved.
            trust: references and folders that the state may use.
            options: as for the constructor (``device``, ``monitor``, ``folder`` …). A monitor that is given measures with
                its own settings, else those of the saved one come back.

        Raises:
            StateError: damaged, of another strategy, or asking for something that is not trusted.
            ModelError: the base model is not the one that was recorded.
        """
        return cls.restore(load_state(Path(source)), source, model=model, strategy=strategy, trust=trust, **options)

    @classmethod
    def restore(
        cls,
        state: Mapping[str, Any],
        source: Path | str,
        *,
        model: str | Mapping[str, Any] | nn.Module | None = None,
        strategy: str | Path | Mapping[str, Any] | Strategy | None = None,
        resettle: bool = False,
        trust: Iterable[str] = (),
        **options: Any,
    ) -> Self:
        """As :meth:`load`, from what :meth:`state` gave.

        Args:
            source: what error sentences call it.
            resettle: ``strategy`` may have other settings than the one that was saved, as long as its parts are of the same
                kinds; the optimiser begins anew where it is another one.
        """
        if state.get("format") != FORMAT:
            raise StateError(
                f"'{source}' has format {state.get('format')!r}, this version reads {FORMAT}: move it away and run anew, or use "
                "the release that wrote it."
            )
        missing = sorted(NEEDED - state.keys())
        if missing:
            raise StateError(
                f"'{source}' is no whole state of a learner (it lacks {quoted(missing)}): use another one."
            )
        trusted = set(trust)
        if strategy is not None:
            trusted |= wishes(Strategy.load(strategy).to_dict())
        if model is not None and not isinstance(model, nn.Module):
            trusted |= wishes(model)
        check_trusted(source, wishes([state["strategy"], state["model_spec"]]) - trusted)
        saved = Strategy.load({**state["strategy"], "name": state["strategy_name"]})
        if strategy is not None and resettle:
            saved = _resettled(source, saved, Strategy.load(strategy))
        elif strategy is not None:
            check_same("strategy", saved.fingerprint(), Strategy.load(strategy).fingerprint())
        spec = state["model_spec"]
        if not isinstance(model, nn.Module) and isinstance(spec, dict) and spec.get("kind") == "object":
            raise StateError(
                f"'{source}' was made with a model object ({spec.get('class')}): hand the same model in, "
                "Learner.load(folder, model=...)."
            )
        learner = cls(
            model if isinstance(model, nn.Module) else spec,
            saved,
            seed=state["seed"],
            objective=state["objective"],
            scenario=state["scenario"],
            **options,
        )
        try:
            learner._restore(dict(state))
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise StateError(
                f"'{source}' is no whole state of a learner ({type(error).__name__}: {error}): use another one."
            ) from error
        return learner

    def state(self) -> dict[str, Any]:
        """What :meth:`save` writes: tensors and plain values; :meth:`restore` goes on from it.

        Raises:
            StateError: the strategy's engine cannot be saved, or an update broke off in the middle.
        """
        self._check_savable()
        return self._state(with_tests=True)

    def _check_savable(self) -> None:
        if self._engine is not None:
            raise StateError(
                f"what {self._engine.name} remembers cannot be saved: learn the stream anew where it is wanted."
            )
        if self._failed is not None:
            raise StateError(
                f"the update on '{self._failed}' broke off in the middle, and a save would keep a half-trained state: go "
                "on from the last save with Learner.load(folder)."
            )

    def _state(self, *, with_tests: bool, progress: Progress | None = None) -> dict[str, Any]:
        context = self.context
        optimizer = context.optimizer
        return {
            "format": FORMAT,
            "seed": self.seed,
            "strategy": self.strategy.to_dict(),
            "strategy_name": self.strategy.name,
            "model_spec": dict(self.model.spec),
            "base_model_sha256": self.model.base_sha256,
            "objective": self.objective,
            "scenario": self.scenario,
            "class_names": list(self.class_names),
            "known_names": list(self.known_names),
            "ledger": self.ledger.state_dict(),
            "stream": {
                "name": self.stream_name,
                "fingerprint": self.stream_fingerprint,
                "learnt": self.learnt_fingerprint,
            },
            "updates": self.updates,
            "steps": self.steps,
            "experience_names": list(self.experience_names),
            "cost": dict(self.cost),
            "notes": list(self.notes),
            "started": self.started,
            "owner": list(context.owner),
            "position": {
                "index": context.experience_index,
                "step": context.step,
                "steps": context.steps,
                "epoch": context.epoch,
                "name": context.experience.name if context.experience else self._pending_name,
            },
            "progress": progress.state_dict() if progress else None,
            "parts": {f"{i}:{part.name}": part.state_dict() for i, part in enumerate(context.parts)},
            "weights": self.model.saved_tensors(),
            "optimizer": optimizer_state(optimizer, context.parameters()) if optimizer else None,
            "randomness": self.randomness.state_dict(),
            "monitor": self.monitor.state_dict() if self.monitor else None,
            "tests": {str(i): table_state(table) for i, table in self._tests().items()} if with_tests else {},
            "probes": {name: table_state(table) for name, table in self.monitor.probes.items()} if self.monitor else {},
            "past": [_rows_state(*tables) for tables in self._past] if with_tests else [],
        }

    def _restore(self, state: dict[str, Any]) -> None:
        with self.randomness.framework():
            self._build(None, state)
            model, context = self.model, self.context
            if state["base_model_sha256"] != model.base_sha256:
                raise ModelError(
                    f"the base model has SHA-256 {str(model.base_sha256)[:12]}…, the state was made on "
                    f"{str(state['base_model_sha256'])[:12]}…: give the same base model."
                )
            for index, part in enumerate(context.parts):
                part.load_state_dict(state["parts"][f"{index}:{part.name}"])
            model.load_saved(state["weights"])
            model.to(self.device)
            context.set_owner(state["owner"])
            position = state["position"]
            context.experience_index, context.step = position["index"], position["step"]
            context.steps, context.epoch = position["steps"], position["epoch"]
            context._parameters = None
            if (
                state["optimizer"] is not None
                and state["strategy"]["training"]["optimizer"] == self.strategy.training.optimizer
            ):
                context.optimizer = make_optimizer(self.strategy.training, context.parameters())
                load_optimizer_state(context.optimizer, context.parameters(), state["optimizer"])
            self.class_names = tuple(state["class_names"])
            self.known_names = tuple(state["known_names"])
            self.ledger.load_state_dict(state["ledger"])
            self.stream_name, self.stream_fingerprint = state["stream"]["name"], state["stream"]["fingerprint"]
            self.learnt_fingerprint = state["stream"]["learnt"]
            self.updates, self.experience_names = state["updates"], list(state["experience_names"])
            self.steps = state["steps"]
            self.cost, self.notes, self.started = dict(state["cost"]), list(state["notes"]), state["started"]
            if self.monitor is not None and state["monitor"] is not None:
                self.monitor.load_state_dict(state["monitor"], settings=self._own_monitor)
                for name, table in state["probes"].items():
                    self.monitor.keep_probe(name, table_from_state(table))
            for index, table in state["tests"].items():
                self._keep_test(int(index), self.experience_names[int(index)], table_from_state(table))
            self._past = [_rows_from_state(tables) for tables in state["past"]]
            if state["progress"] is not None:
                self._pending = Progress(**state["progress"])
            self.randomness.load_state_dict(state["randomness"])

    def _checkpoint(self, progress: Progress | None) -> None:
        assert self.folder is not None
        folder = self.folder
        self.processes.from_main(
            lambda: save_state(folder, self._state(with_tests=self.stream_name is None, progress=progress))
        )


def _rows_state(train: Table, valid: Table | None) -> dict[str, Any]:
    return {"train": table_state(train), "valid": None if valid is None else table_state(valid)}


def _rows_from_state(state: dict[str, Any]) -> tuple[Table, Table | None]:
    valid = state["valid"]
    return table_from_state(state["train"]), None if valid is None else table_from_state(valid)


def _resettled(source: Path | str, saved: Strategy, given: Strategy) -> Strategy:
    """``given``, whose parts must be of the kinds of ``saved``."""
    kinds = [sorted(part.name for part in one.make_parts()) for one in (saved, given)]
    if kinds[0] != kinds[1] or (saved.data, saved.backbone) != (given.data, given.backbone):
        raise StateError(
            f"the state in '{source}' is of the parts {quoted(kinds[0])}, and the settings given have {quoted(kinds[1])}: "
            "other settings may change what a part does, and not which parts there are."
        )
    return given
