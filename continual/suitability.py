"""Whether a strategy is known to be of no use on a stream, said in one sentence that names one that is.

What is known is data: for each part in what scenarios it keeps earlier experiences by itself. In the class scenario no
penalty, distillation or adapter does, however strong: the classes of an earlier experience are never trained beside the new
ones again, so every row is given to a new class (van de Ven & Tolias 2019, arXiv 1904.07734, table 2; here
``reports/split-digits`` and ``reports/split-mnist``). Replay, heads without gradients, training on all rows so far, and a
competition that leaves earlier classes alone do. On an adapted pretrained base a penalty or distillation does help (``adalora-ewc``
in ``reports/demo``), so nothing is said of it there. Of a part that is not listed, such as one of the user's own, nothing bad is
known, and nothing is said.
"""

from __future__ import annotations

from collections.abc import Iterator

from continual.errors import quoted
from continual.kinds import Objective, Scenario
from continual.strategy import Strategy

EVERYWHERE: frozenset[Scenario] = frozenset({"task", "domain", "class"})
NOT_CLASS: frozenset[Scenario] = frozenset({"task", "domain"})
NOWHERE: frozenset[Scenario] = frozenset()

KEEPS: dict[str, frozenset[Scenario]] = {
    "adapter/lora": NOWHERE,
    "adapter/adalora": NOWHERE,
    "adapter/prompt": NOWHERE,
    "adapter/prefix": NOWHERE,
    "head/linear": NOWHERE,
    "penalty/ewc": NOT_CLASS,
    "penalty/l2": NOT_CLASS,
    "penalty/mas": NOT_CLASS,
    "penalty/orthogonal": NOT_CLASS,
    "penalty/rwalk": NOT_CLASS,
    "penalty/si": NOT_CLASS,
    "distillation/lwf": NOT_CLASS,
    "distillation/binary": NOT_CLASS,
    "distillation/feature-distillation": NOT_CLASS,
    "projection/agem": NOT_CLASS,
    "projection/ogd": NOT_CLASS,
    "projection/osf": NOT_CLASS,
    "engine/avalanche Naive": NOWHERE,
    "engine/avalanche EWC": NOT_CLASS,
    "engine/avalanche SynapticIntelligence": NOT_CLASS,
    "engine/avalanche LwF": NOT_CLASS,
    "engine/avalanche AGEM": NOT_CLASS,
}
"""Parts that do not keep earlier experiences everywhere → the scenarios in which they do; all others do everywhere."""


def unsuited(
    strategy: Strategy, scenario: Scenario, objective: Objective, experiences: int | None = None
) -> str | None:
    """One sentence where nothing in the strategy is known to keep earlier experiences in this scenario, else None.

    Args:
        experiences: of the stream, None where it is open; with one there is nothing to forget.
    """
    helping = list(_keeps(strategy))
    if experiences == 1 or any(scenario in where for _, where in helping):
        return None
    other, names = suited(strategy, objective), [name for name, where in helping if where]
    if not names:
        return (
            f"nothing in '{strategy.name}' works against forgetting, so it is a lower bound to compare with: to keep "
            f"earlier experiences take {other}."
        )
    return (
        f"'{strategy.name}' is known to be of no use in the {scenario} scenario, where {quoted(names)} alone cannot keep "
        f"earlier classes, which are never trained beside new ones: take {other}{'' if strategy.engine else ', or add replay to it'}."
    )


def suited(strategy: Strategy, objective: Objective) -> str:
    """A strategy of the library that is of use in every scenario, on models that ``strategy`` works on."""
    adapter = next((part.kind for part in strategy.prototypes if part.slot == "adapter"), None)
    if objective in ("causal-lm", "seq2seq") and adapter is not None:
        return "'lm-lora-rehearsal'"
    if objective != "classification":
        return "'rehearsal' with --set replay.select=reservoir"
    if adapter is not None:
        return "'adalora-rehearsal'" if adapter == "adalora" else "'lora-rehearsal'"
    return "'slda'" if strategy.backbone == "frozen" else "'rehearsal'"


def _keeps(strategy: Strategy) -> Iterator[tuple[str, frozenset[Scenario]]]:
    """What there is against forgetting, and in which scenarios it is of use."""
    if strategy.data != "experience":
        yield f"data: {strategy.data}", EVERYWHERE
    if strategy.training.active in ("experience", "asymmetric"):
        yield f"training.active: {strategy.training.active}", frozenset({"task", "class"})
    if strategy.backbone == "frozen":
        yield "backbone: frozen", NOT_CLASS
    if strategy.engine is not None:
        name = f"{strategy.engine.name} {getattr(strategy.engine.settings, 'strategy', '')}".rstrip()
        yield name, EVERYWHERE if getattr(strategy.engine.settings, "plugins", None) else KEEPS.get(name, EVERYWHERE)
    adapted = any(part.slot == "adapter" for part in strategy.prototypes)
    for part in strategy.prototypes:
        where = KEEPS.get(part.name, EVERYWHERE) if part.reference == part.kind else EVERYWHERE
        if getattr(part.settings, "across_tasks", None) == "separate" or (adapted and where == NOT_CLASS):
            where = EVERYWHERE
        yield part.name, NOT_CLASS if part.settles and where == NOWHERE else where
