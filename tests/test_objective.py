"""Loss, scores and competition of single rows, each against a plain loop over rows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from continual.errors import ModelError
from continual.objective import Competition, active_classes, loss_rows, mask_logits, score_rows
from continual.table import IGNORED

OWNER = torch.tensor([0, 0, 1, 1, -1])
LABELS = torch.tensor([0, 2, 1, 3, IGNORED])


def competing(competition: Competition, label: int, current: int) -> list[int]:
    """Which classes compete with ``label``, said plainly."""
    owner = OWNER.tolist()
    own = owner[max(label, 0)]
    seen = [k for k, index in enumerate(owner) if index >= 0]
    if competition == "all":
        return list(range(len(owner)))
    if competition == "seen":
        return seen
    if competition == "experience" or own == current:
        return [k for k, index in enumerate(owner) if index == own]
    return seen


@pytest.mark.parametrize("competition", ["seen", "experience", "all", "asymmetric"])
@pytest.mark.parametrize("current", [0, 1])
def test_which_classes_compete(competition: Competition, current: int) -> None:
    active = active_classes(competition, OWNER, LABELS, all_seen=False, current=current)
    mask_BK = torch.ones(len(LABELS), len(OWNER), dtype=torch.bool) if active is None else active
    mask_BK = mask_BK.expand(len(LABELS), -1)
    for row, label in enumerate(LABELS.tolist()):
        assert mask_BK[row].nonzero().flatten().tolist() == competing(competition, label, current)


def test_a_row_of_the_current_experience_does_not_push_old_classes_down() -> None:
    logits = torch.zeros(2, 4, requires_grad=True)
    labels = torch.tensor([2, 0])
    owner = torch.tensor([0, 0, 1, 1])
    active = active_classes("asymmetric", owner, labels, all_seen=True, current=1)
    loss_rows("classification", logits, {"labels": labels}, active).sum().backward()
    assert logits.grad is not None
    assert logits.grad[0, :2].eq(0).all() and logits.grad[0, 2:].ne(0).all()
    assert logits.grad[1].ne(0).all()


def test_classification_loss_and_score() -> None:
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    active = OWNER >= 0
    losses = loss_rows("classification", logits, {"labels": LABELS}, active)
    scores = score_rows("classification", logits, {"labels": LABELS}, active)["accuracy"]
    for row, label in enumerate(LABELS.tolist()):
        if label == IGNORED:
            assert losses[row] == 0 and scores[row] == 0
            continue
        total = sum(math.exp(float(logits[row, k])) for k in range(4))
        assert float(losses[row]) == pytest.approx(math.log(total) - float(logits[row, label]), abs=1e-5)
        assert bool(scores[row]) == (int(logits[row, :4].argmax()) == label)
    assert torch.isinf(mask_logits(logits, active)[:, 4]).all()


@pytest.mark.parametrize("shape", [(3,), (3, 2)], ids=str)
def test_regression_is_the_mean_square_over_outputs(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    losses = loss_rows("regression", logits, {"labels": labels})
    for row in range(3):
        wanted = float((logits[row] - labels[row]).square().mean())
        assert float(losses[row]) == pytest.approx(wanted, abs=1e-6)
    scores = score_rows("regression", logits, {"labels": labels})
    torch.testing.assert_close(scores["negative squared error"], -losses)
    with pytest.raises(ModelError, match="as many outputs as there are targets"):
        loss_rows("regression", torch.zeros(3, 4), {"labels": torch.zeros(3, 2)})


def token_reference(logits: Tensor, labels: Tensor, shift: int) -> tuple[float, bool]:
    """Mean loss over the counted tokens of one row and whether each was the most likely one."""
    losses, right = [], True
    for place in range(shift, len(labels)):
        target = int(labels[place])
        if target == IGNORED:
            continue
        at = logits[place - shift]
        losses.append(float(at.logsumexp(0) - at[target]))
        right &= int(at.argmax()) == target
    return (sum(losses) / len(losses), right) if losses else (0.0, False)


def test_a_replayed_row_of_the_current_experience_competes_among_all() -> None:
    owner, labels = torch.tensor([0, 0, 1, 1]), torch.tensor([2, 3, 2, 0])
    active = active_classes("asymmetric", owner, labels, all_seen=True, current=1, new_rows=2)
    assert active is not None
    assert active.tolist() == [[False, False, True, True]] * 2 + [[True] * 4] * 2


@pytest.mark.parametrize(("objective", "shift"), [("causal-lm", 1), ("seq2seq", 0)])
def test_language_models_count_the_tokens_that_have_a_label(objective: str, shift: int) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(4, 6, 7, generator=generator)
    labels = torch.randint(0, 7, (4, 6), generator=generator)
    labels[0, :3], labels[1], labels[2, 4:] = IGNORED, IGNORED, IGNORED
    likely = logits[3].argmax(-1)
    labels[3] = torch.cat([labels[3, :shift], likely[: 6 - shift]])
    losses = loss_rows(objective, logits, {"labels": labels})  # type: ignore[arg-type]
    scores = score_rows(objective, logits, {"labels": labels})  # type: ignore[arg-type]
    for row in range(4):
        loss, right = token_reference(logits[row], labels[row], shift)
        assert float(losses[row]) == pytest.approx(loss, abs=1e-5)
        assert float(scores["log-likelihood per token"][row]) == pytest.approx(-loss, abs=1e-5)
        assert bool(scores["exact match"][row]) == right


def test_a_class_that_does_not_compete_may_have_any_logit_in_the_binary_loss() -> None:
    logits = torch.tensor([[1.0, torch.inf]], requires_grad=True)
    found = loss_rows("classification", logits, {"labels": torch.tensor([0])}, torch.tensor([True, False]), "binary")
    found.sum().backward()
    torch.testing.assert_close(found, torch.nn.functional.softplus(torch.tensor([-1.0])))
    assert logits.grad is not None and bool(torch.isfinite(logits.grad).all())
