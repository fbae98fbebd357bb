"""A learner's state in pieces, so that what an update does not change is shared between versions.

``learner`` is all that changes with every update; ``clock`` what differs between two runs that compute the same (times);
``tests/0000``, ``ledger/0000``, ``past/0000`` … belong to one experience each and stay as they are.
"""

from __future__ import annotations

from typing import Any

State = dict[str, Any]


def split(state: State) -> dict[str, State]:
    """Name of each piece → its state."""
    rest = dict(state)
    pieces: dict[str, State] = {"clock": {"cost": rest.pop("cost"), "started": rest.pop("started")}}
    for index, test in rest.pop("tests").items():
        pieces[f"tests/{int(index):04d}"] = test
    for index, entry in enumerate(rest.pop("ledger")["entries"]):
        pieces[f"ledger/{index:04d}"] = entry
    for index, rows in enumerate(rest.pop("past")):
        pieces[f"past/{index:04d}"] = rows
    pieces["learner"] = rest
    return pieces


def join(pieces: dict[str, State]) -> State:
    """The state that :func:`split` took apart."""
    state = {**pieces["learner"], **pieces["clock"]}
    found = {kind: _of(pieces, kind) for kind in ("tests", "ledger", "past")}
    state["tests"] = {str(index): test for index, test in found["tests"]}
    state["ledger"] = {"entries": [entry for _, entry in found["ledger"]]}
    state["past"] = [rows for _, rows in found["past"]]
    return state


def _of(pieces: dict[str, State], kind: str) -> list[tuple[int, State]]:
    named = ((name.partition("/"), piece) for name, piece in pieces.items())
    return sorted(((int(place), piece) for (head, _, place), piece in named if head == kind), key=lambda one: one[0])
