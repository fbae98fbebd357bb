"""A learner's state in pieces, so that what an update does not change is shared between versions.

``learner`` is all that changes with every update; ``clock`` what differs between two runs that compute the same (times);
``tests/0000``, ``ledger/0000``, ``past/0000`` … hold what belongs to one experience each and stays as it is; as soon as there are
:data:`BLOCK` of them they become one piece, so that a store of a thousand experiences is not made of thousands of files.
"""

from __future__ import annotations

from typing import Any

from continual.errors import StateError

State = dict[str, Any]

BLOCK = 32
"""Experiences whose pieces become one."""


def split(state: State) -> dict[str, State]:
    """Name of each piece → its state."""
    rest = dict(state)
    pieces: dict[str, State] = {"clock": {"cost": rest.pop("cost"), "started": rest.pop("started")}}
    tests = {int(index): test for index, test in rest.pop("tests").items()}
    for kind, each in (
        ("tests", tests),
        ("ledger", dict(enumerate(rest.pop("ledger")["entries"]))),
        ("past", dict(enumerate(rest.pop("past")))),
    ):
        whole = (max(each, default=-1) + 1) // BLOCK * BLOCK
        for index in sorted(each):
            first = index // BLOCK * BLOCK if index < whole else index
            pieces.setdefault(f"{kind}/{first:04d}", {})[str(index)] = each[index]
    pieces["learner"] = rest
    return pieces


def join(pieces: dict[str, State]) -> State:
    """The state that :func:`split` took apart.

    Raises:
        StateError: pieces of some experience are not there.
    """
    state = {**pieces["learner"], **pieces["clock"]}
    found = {kind: entries_of(pieces, kind) for kind in ("tests", "ledger", "past")}
    measured = (state.get("monitor") or {}).get("tests", {})
    wanted = {"tests": sorted(map(int, measured)), "ledger": list(range(state.get("updates", 0)))}
    if found["past"]:
        wanted["past"] = wanted["ledger"]
    for kind, experiences in wanted.items():
        if list(found[kind]) != experiences:
            raise StateError(
                f"the pieces '{kind}' of a state are of {len(found[kind])} experiences and should be of {len(experiences)}: "
                "restore the store from a backup."
            )
    state["tests"] = {str(index): test for index, test in found["tests"].items()}
    state["ledger"] = {"entries": list(found["ledger"].values())}
    state["past"] = list(found["past"].values())
    return state


def entries_of(pieces: dict[str, State], kind: str) -> dict[int, State]:
    """What pieces of one kind hold, by experience."""
    own = [piece for name, piece in pieces.items() if name.startswith(f"{kind}/")]
    return dict(sorted((int(index), entry) for piece in own for index, entry in piece.items()))
