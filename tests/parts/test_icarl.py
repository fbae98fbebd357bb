"""iCaRL: the loss of the paper written out row by row, nearest means of exemplars by a loop, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from replay_bench import WIDTH, epochs_of, experience, small_model, step
from torch import Tensor
from torch.nn import functional as F

from continual import Learner, Strategy
from continual.errors import CompositionError
from continual.objective import loss_rows
from continual.parts.context import TrainingContext
from continual.parts.distillation.binary import BinaryDistillation
from continual.parts.head.closed_form import UNKNOWN
from continual.parts.head.exemplar_means import ExemplarMeansHead
from continual.parts.head.linear import LinearHead
from continual.parts.replay.rehearsal import Rehearsal
from continual.state import tensor_bytes
from continual.streams.experience import Experience
from continual.table import Batch


def looped(memory: Any = None, temperature: float = 1.0, **options: Any) -> TrainingContext:
    memory = memory or Rehearsal(select="herding", per_class=3)
    model = small_model()
    parts = [ExemplarMeansHead(), memory, BinaryDistillation(temperature=temperature)]
    loop = TrainingContext(model, parts, seed=0, criterion="binary", **options)
    loop.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return loop


def train(loop: TrainingContext, given: Experience, epochs: int = 3) -> None:
    loop.begin(given)
    epochs_of(loop, given, epochs)
    loop.end()


def sigmoid_loss(logit: Tensor, target: float) -> Tensor:
    p = torch.sigmoid(logit.double())
    return -(target * p.log() + (1 - target) * (1 - p).log())


def test_binary_loss_is_the_sum_over_competing_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 5, generator=generator)
    batch = {"labels": torch.tensor([0, 4, 2, -100, 1, 3, 0])}
    per_row = torch.rand(7, 5, generator=generator) < 0.6
    for active in (None, torch.tensor([True, False, True, True, True]), per_row):
        found = loss_rows("classification", logits, batch, active, "binary")
        for row, label in enumerate(batch["labels"].tolist()):
            wanted = torch.zeros((), dtype=torch.float64)
            for k in range(5):
                competes = True if active is None else bool(active[k] if active.dim() == 1 else active[row, k])
                if competes and label != -100:
                    wanted += sigmoid_loss(logits[row, k], float(k == label))
            torch.testing.assert_close(found[row].double(), wanted, rtol=1e-5, atol=1e-6)


def written_out(batch: Batch, new: Tensor, old: Tensor, held: set[int], competes: Any) -> Tensor:
    """Algorithm 3 of the paper, a row and a class at a time; ``held`` are the classes of earlier experiences alone."""
    rows = []
    for row, label in enumerate(batch["labels"].tolist()):
        total = torch.zeros((), dtype=torch.float64)
        for k in range(new.shape[1]):
            if k in held:
                total += sigmoid_loss(new[row, k], float(torch.sigmoid(old[row, k].double())))
            elif competes(label, k):
                total += sigmoid_loss(new[row, k], float(k == label))
        rows.append(total)
    found = torch.stack(rows)
    weight = batch.get("weight")
    return found.mean() if weight is None else (weight * found).sum() / weight.sum()


@pytest.mark.parametrize(("scenario", "temperature"), [("class", 1.0), ("class", 2.0), ("domain", 1.0), ("task", 1.0)])
def test_loss_is_the_papers(scenario: Any, temperature: float) -> None:
    competition: Any = "experience" if scenario == "task" else "seen"
    memory = Rehearsal(select="herding", per_class=3, weighting="experiences")
    loop = looped(memory, temperature, scenario=scenario, competition=competition)
    given = [experience(i, classes=(0, 1) if scenario == "domain" else None) for i in range(3)]
    held: set[int] = set()
    for index, each in enumerate(given):
        loop.begin(each)
        before = copy.deepcopy(loop.model.state_dict())
        old_model = copy.deepcopy(loop.model)
        for batch in loop.shuffled(each.train, 8):
            joined = loop.extend(dict(batch))
            output = loop.forward(joined)
            terms = dict(loop.terms(joined, output))
            old = old_model(joined).logits.detach() / temperature
            wanted = written_out(
                joined, output.logits, old, held, lambda label, k: scenario != "task" or label // 2 == k // 2
            )
            torch.testing.assert_close(sum(terms.values()).double(), wanted, rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]
            assert ("distillation/binary" in terms) == (index > 0 and scenario != "domain")
            assert (len(joined["labels"]) > 8) == (index > 0)
            step(loop, batch)
        assert any(not torch.equal(before[name], tensor) for name, tensor in loop.model.state_dict().items())
        loop.end()
        if scenario != "domain":
            held |= set(each.classes)


def nearest(loop: TrainingContext, rows: Tensor) -> list[int]:
    """The class with the nearest mean of exemplars, a row and a class at a time."""
    memory = loop.parts[1].store.memory  # type: ignore[attr-defined]
    kept = memory.batch(torch.arange(len(memory)))

    def feature(row: Tensor) -> Tensor:
        found = loop.model.backbone({"inputs": row[None]})[0].double()
        return found / found.norm()

    means = {}
    for label in sorted(set(kept["labels"].tolist())):
        features = [feature(row) for row in kept["inputs"][kept["labels"] == label]]
        mean = torch.stack(features).mean(0)
        means[label] = mean / mean.norm()
    return [min(means, key=lambda label: float((feature(row) - means[label]).norm())) for row in rows]


@torch.no_grad()
def test_rows_get_the_class_of_the_nearest_mean_of_exemplars() -> None:
    loop = looped()
    queries = torch.rand(60, WIDTH, generator=torch.Generator().manual_seed(5))
    batch = {"inputs": queries, "labels": torch.zeros(60, dtype=torch.int64)}
    found: list[int] = []
    for index in range(3):
        with torch.enable_grad():
            train(loop, experience(index))
        found = loop.forward(batch).logits.argmax(1).tolist()
        assert found == nearest(loop, queries)
        assert loop.forward(batch).logits.shape == (60, 2 * index + 2)
    assert len(set(found)) >= 4
    linear = loop.model.head.linear(loop.model.backbone(batch)).argmax(1).tolist()  # type: ignore[union-attr, operator]
    assert linear != found


def test_the_linear_head_answers_inside_an_experience() -> None:
    loop = looped()
    train(loop, experience(0))
    batch = experience(0).train[torch.arange(8)]
    by_means = loop.forward(batch).logits
    assert (by_means <= 0).all()
    loop.begin(experience(1))
    with torch.no_grad():
        own = loop.model.head.linear(loop.model.backbone(batch))  # type: ignore[union-attr, operator]
        assert torch.equal(loop.forward(batch).logits, own) and own.shape[1] == 4
        loop.model.eval()
        assert torch.equal(loop.forward(batch).logits, own)


def test_erased_exemplars_leave_the_means() -> None:
    loop = looped()
    head, memory = loop.parts[0], loop.parts[1]
    assert isinstance(head, ExemplarMeansHead)
    train(loop, experience(0))
    train(loop, experience(1))
    before = head.module.means.clone()
    assert head.nbytes() == tensor_bytes(head.state_dict()) == before.nbytes
    store = memory.store  # type: ignore[attr-defined]
    kept = store.memory.batch(torch.arange(len(store.memory)))
    one, whole = kept["row"][kept["labels"] == 0][:1], kept["row"][kept["labels"] == 3]
    for rows in (one, whole):
        for part in loop.parts:
            part.erase(rows)
    assert torch.equal(head.module.means[1:3], before[1:3])
    assert not torch.equal(head.module.means[0], before[0])
    logits = loop.forward(experience(0).train[torch.arange(4)]).logits
    assert (logits[:, 3] == UNKNOWN).all() and (logits[:, :3] > UNKNOWN).all()
    for part in loop.parts:
        part.erase(store.rows())
    assert not len(head.module.means)
    assert torch.isfinite(loop.forward(experience(0).train[torch.arange(4)]).logits).all()


def test_the_means_come_from_what_is_kept_after_the_selection() -> None:
    """The head's end comes last: with the memory as it was before, the newest classes would have no mean."""
    loop = looped()
    train(loop, experience(0))
    head = loop.parts[0]
    assert isinstance(head, ExemplarMeansHead)
    assert head.module.means.any(1).tolist() == [True, True]
    torch.testing.assert_close(head.module.means.norm(dim=1), torch.ones(2))


def test_what_is_refused() -> None:
    own = {"head": {"kind": "exemplar-means"}}
    with pytest.raises(
        CompositionError, match=r"head/exemplar-means reads the rows that a memory keeps, and there is none"
    ):
        Strategy.load(own)
    with pytest.raises(CompositionError, match="there is none"):
        Strategy.load({**own, "replay": {"kind": "generative"}})
    Strategy.load({**own, "projection": {"kind": "agem"}})
    with pytest.raises(
        CompositionError, match=r"distillation/binary belongs to the loss 'binary' .*set training.loss: binary"
    ):
        Strategy.load({"distillation": {"kind": "binary"}})
    for slot, kind in (("penalty", "ewc"), ("penalty", "rwalk"), ("distillation", "lwf")):
        with pytest.raises(CompositionError, match=f"{slot}/{kind} belongs to the loss 'cross-entropy'"):
            Strategy.load({slot: {"kind": kind}, "training": {"loss": "binary"}})
    with pytest.raises(
        CompositionError, match=r"training.loss: binary is a sigmoid for each class and the objective is"
    ):
        Strategy.load({"training": {"loss": "binary"}}).check(objective="regression", gives_features=True)
    with pytest.raises(CompositionError, match="belongs to the loss 'binary'"):
        TrainingContext(small_model(), [LinearHead(), BinaryDistillation()])


def test_the_loss_of_the_strategy_is_the_one_that_trains() -> None:
    found = []
    for loss in ("cross-entropy", "binary"):
        strategy = Strategy.load({"training": {"loss": loss, "lr": 0.1, "optimizer": "sgd"}})
        learner = Learner({"kind": "mlp", "hidden": [4]}, strategy, seed=0, device="cpu", progress=False, monitor=False)
        given = experience(0)
        learner.update((given.train.column("inputs"), given.train.column("labels")))
        found.append(learner.model.head.weight.detach().clone())  # type: ignore[union-attr]
    assert not torch.allclose(found[0], found[1])  # type: ignore[arg-type]


def test_features_of_length_one_are_averaged_and_the_mean_brought_to_length_one() -> None:
    loop = looped()
    train(loop, experience(0))
    memory = loop.parts[1].store.memory  # type: ignore[attr-defined]
    kept = memory.batch(torch.arange(len(memory)))
    with torch.no_grad():
        features = F.normalize(loop.model.backbone(kept).double(), dim=1)
    wanted = F.normalize(torch.stack([features[kept["labels"] == k].mean(0) for k in (0, 1)]), dim=1)
    head = loop.parts[0]
    assert isinstance(head, ExemplarMeansHead)
    torch.testing.assert_close(head.module.means.double(), wanted, rtol=1e-6, atol=1e-6)
