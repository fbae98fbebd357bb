"""May the tries of a ladder be made: the settings that a rule file changes, checked before anything is trained."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from continual.errors import SpecError, StateError, quoted, shown
from continual.learner.trust import wishes
from continual.refresh.rules import LadderRules
from continual.strategy import Strategy


def check_ladder(strategy: Strategy, ladder: LadderRules, *, path: Path, trust: Iterable[str] | None) -> None:
    """Raise where a try cannot be made from the live version's state.

    Args:
        strategy: of the store.
        path: of the store, for the sentences.
        trust: references and folders that the rule file may name beside those of the strategy; None where whoever wrote it
            makes the store, and it may name any.

    Raises:
        SpecError: settings that cannot be, or other parts than the strategy's.
        StateError: they name code or a folder that nobody trusts.
    """
    trusted = wishes(strategy.to_dict()) | set(trust or ())
    for place, changed in enumerate(ladder.settings):
        asked = wishes([{key.rpartition(".")[2]: value} for key, value in changed.items()]) - trusted
        if asked and trust is not None:
            raise StateError(
                f"the ladder in the rules of '{path}' asks to use {quoted(sorted(asked))}, and a folder must not decide which code "
                "is run: if you know it, name it with --trust."
            )
        tried = Strategy.load(strategy, overrides=changed)
        kinds = [sorted(part.name for part in one.make_parts()) for one in (strategy, tried)]
        if kinds[0] != kinds[1] or (strategy.data, strategy.backbone) != (tried.data, tried.backbone):
            raise SpecError(
                f"the rules of '{path}', ladder.settings.{place} ({shown(changed, 100)}): the strategy has the parts "
                f"{quoted(kinds[0])}, which a try keeps, with 'data' and 'backbone': change other settings, such as 'training.lr'."
            )
