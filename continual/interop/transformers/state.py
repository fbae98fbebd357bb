"""What a session remembers, as tensors and plain values, and back into a model as it came.

It is what :class:`~continual.learner.Learner` saves, less what is the trainer's (optimiser, schedule, place in the data) and less
the parameters that stay as they came, which are known by their SHA-256.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from continual.errors import ModelError, StateError, quoted
from continual.interop.transformers.session import Session
from continual.learner.checkpoint import table_from_state, table_state
from continual.monitor.monitor import Monitor
from continual.state import load_state
from continual.strategy import Strategy
from continual.trust import check_trusted, wishes

FORMAT = 2
NEEDED = {"format", "in", "strategy", "strategy_name", "seed", "objective", "scenario", "names", "parts", "weights"}


def session_state(session: Session, strategy: Strategy, seed: int) -> dict[str, Any]:
    """The whole state between two experiences or in the middle of one.

    Args:
        strategy: as the user named it.
    """
    loop, monitor = session.loop, session.monitor
    learnt = len(session.names)
    tests = {} if monitor is None else {i: table for i, table in monitor.tables().items() if i < learnt}
    return {
        "format": FORMAT,
        "in": "transformers",
        "strategy": strategy.to_dict(),
        "strategy_name": strategy.name,
        "seed": seed,
        "objective": loop.objective,
        "scenario": loop.scenario,
        "names": list(session.names),
        "base_names": list(session.base_names),
        "base_sha256": session.base_sha256,
        "ledger": session.ledger.state_dict(),
        "owner": list(loop.owner),
        "position": {
            "name": session.under_way,
            "index": loop.experience_index,
            "step": loop.step,
            "steps": loop.steps,
            "epoch": loop.epoch,
            "rows": session.rows,
        },
        "parts": {f"{i}:{part.name}": part.state_dict() for i, part in enumerate(session.parts)},
        "weights": session.model.saved_tensors(),
        "randomness": loop.randomness.state_dict(),
        "monitor": None if monitor is None else monitor.state_dict(),
        "tests": {str(i): table_state(table) for i, table in tests.items()},
        "probes": {} if monitor is None else {name: table_state(table) for name, table in monitor.probes.items()},
    }


def read_state(folder: Path, strategy: Strategy | None, trust: Iterable[str]) -> dict[str, Any]:
    """What :func:`session_state` gave, from disk, and nothing in it that was not named is used.

    Args:
        strategy: what the user named, where he did.
        trust: references and folders that the state may use.

    Raises:
        StateError: damaged, of something else, or asking for what is not trusted.
    """
    state = load_state(folder)
    missing = sorted(NEEDED - state.keys())
    if missing or state["in"] != "transformers":
        raise StateError(
            f"'{folder}' holds no state of a trainer (it lacks {quoted(missing) or 'its mark'}): use another."
        )
    if state["format"] != FORMAT:
        raise StateError(
            f"'{folder}' has format {state['format']!r}, this version reads {FORMAT}: train anew, or use the release that wrote it."
        )
    trusted = set(trust) | (set() if strategy is None else wishes(strategy.to_dict()))
    check_trusted(folder, wishes(state["strategy"]) - trusted)
    return state


def restore(session: Session, state: dict[str, Any], monitor_settings: bool) -> None:
    """Bring a session on a fresh model to ``state``.

    Args:
        monitor_settings: take the saved monitor's settings too.

    Raises:
        ModelError: the model is not the one that the state was made on.
        StateError: the state is not whole.
    """
    try:
        _restore(session, state, monitor_settings)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise StateError(
            f"this is no whole state of a trainer ({type(error).__name__}: {error}): use another one."
        ) from error


def _restore(session: Session, state: dict[str, Any], monitor_settings: bool) -> None:
    loop, monitor = session.loop, session.monitor
    if state["objective"] != loop.objective:
        raise ModelError(f"the state is of a model for {state['objective']}, and this one is for {loop.objective}.")
    if state["base_sha256"] is not None and session.digest(state["base_names"]) != state["base_sha256"]:
        raise ModelError(
            "the parameters of the base model are not those that the state was made on (another SHA-256): give the trainer the "
            "same base model, not one that was saved after training; what was learnt since is in the state."
        )
    with loop.randomness.framework():
        for index, part in enumerate(session.parts):
            part.load_state_dict(state["parts"][f"{index}:{part.name}"])
        session.model.load_saved(state["weights"])
        session.place()
        loop.set_owner(state["owner"])
        position = state["position"]
        loop.experience_index, loop.step, loop.steps = position["index"], position["step"], position["steps"]
        loop.epoch, session.rows, session.under_way = position["epoch"], position["rows"], position["name"]
        loop._parameters = None
        session.names = list(state["names"])
        session.base_names, session.base_sha256 = list(state["base_names"]), state["base_sha256"]
        session.ledger.load_state_dict(state["ledger"])
        if monitor is not None and state["monitor"] is not None:
            _restore_monitor(monitor, state, monitor_settings)
        loop.randomness.load_state_dict(state["randomness"])


def _restore_monitor(monitor: Monitor, state: dict[str, Any], settings: bool) -> None:
    monitor.load_state_dict(state["monitor"], settings=settings)
    for name, table in state["probes"].items():
        monitor.keep_probe(name, table_from_state(table))
    for index, table in state["tests"].items():
        monitor.register(int(index), state["names"][int(index)], table_from_state(table))
