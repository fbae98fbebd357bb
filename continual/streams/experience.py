"""One step of a stream: the rows that arrive together."""

from __future__ import annotations

from dataclasses import dataclass, field

from continual.kinds import Objective, Scenario
from continual.table import Table


@dataclass(frozen=True)
class Experience:
    """Rows that arrive together.

    Attributes:
        index: place in the stream, from 0.
        name: shown in reports, unique in the stream.
        train, valid, test: tables with the columns of a batch (``inputs`` or ``text``, ``labels``, ``row``). The model is
            trained on ``train``, selected on ``valid`` where there is one, and measured on ``test``.
        classes: class ids of this experience; empty where the objective is not classification. Ids are given in
            order of arrival: experience 0 has 0 … k-1.
        class_names: name of every class met up to this experience, by id.
        scenario: ``task``, ``domain`` or ``class`` (van de Ven & Tolias 2019, arXiv 1904.07734).
        objective: what the labels are for.
        total_classes: how many classes the whole stream has; None where it is open.
        owners: for each of ``classes`` the experience that it belongs to, where that is not this one (all experiences
            joined into one, in the scenario ``task``).
    """

    index: int
    name: str
    train: Table
    valid: Table | None = None
    test: Table | None = None
    classes: tuple[int, ...] = ()
    class_names: tuple[str, ...] = field(default=(), repr=False)
    scenario: Scenario = "class"
    objective: Objective = "classification"
    total_classes: int | None = None
    owners: tuple[int, ...] | None = None
