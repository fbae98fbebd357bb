"""Generative replay: what is made, how both are trained, and when it is refused."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from replay_bench import epochs_of, experience, looped, recorded, resumed, small_model, step, train
from torch import Tensor
from torch.nn import functional as F

from continual import Strategy
from continual.errors import CompositionError, SpecError, TrainingError
from continual.parts.context import TrainingContext
from continual.parts.replay.generative import GenerativeReplay
from continual.state import tensor_bytes
from continual.streams.experience import Experience
from continual.table import TensorTable

SMALL: dict[str, Any] = {"hidden": (16,), "latent": 3, "lr": 1e-2, "threshold": 0.0, "check_rows": 20}


def table_of(**columns: Any) -> Experience:
    given = experience(0)
    own = {name: given.train.column(name) for name in ("inputs", "labels", "row")}
    return Experience(0, "e0", TensorTable({**own, **columns}), classes=(0, 1))


def test_rows_are_made_of_the_classes_met_before_evenly() -> None:
    part = GenerativeReplay(**SMALL, share=0.75)
    loop = looped(part)
    for index, classes in enumerate(((2, 3), (0, 1))):
        train(loop, experience(index, classes=classes))
    assert all(len(batch["labels"]) == 8 for batch in recorded(loop)[:3])
    loop.begin(experience(2))
    counts: Counter[int] = Counter()
    for _ in range(50):
        batch = loop.extend(experience(2).train[torch.arange(8)])
        assert len(batch["labels"]) == 32 and batch["inputs"].shape == (32, 6)
        assert (batch["row"][8:] == -1).all() and (batch["row"][:8] >= 2000).all()
        assert float(batch["inputs"].min()) >= 0 and float(batch["inputs"].max()) <= 1
        counts.update(batch["labels"][8:].tolist())
        torch.testing.assert_close(batch["weight"][:8].sum(), torch.tensor(1 / 3))
        torch.testing.assert_close(batch["weight"][8:].sum(), torch.tensor(2 / 3))
    assert set(counts) == {0, 1, 2, 3} and min(counts.values()) > 230
    assert part.known[:4] == [2, 3, 0, 1]


def test_both_are_trained_by_the_formula_written_out() -> None:
    part = GenerativeReplay(**SMALL)
    loop = looped(part)
    train(loop, experience(0))
    loop.begin(experience(1))
    assert part.generator is not None and part.learning is not None
    plain = copy.deepcopy(part.learning)
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-2)
    noise = torch.Generator()
    noise.set_state(loop.randomness.generator("generator noise").get_state())
    old = copy.deepcopy(part.generator.state_dict())
    recorded(loop)
    for batch in loop.shuffled(experience(1).train, 8):
        before = copy.deepcopy(loop.model)
        loss = step(loop, batch)
        joined = recorded(loop)[0]
        losses = F.cross_entropy(before(joined).logits, joined["labels"], reduction="none")
        torch.testing.assert_close(loss, (losses[:8].mean() / 2 + losses[8:].mean() / 2).detach())
        missing, kl = plain.terms(joined["inputs"], joined["labels"], torch.randn(16, 3, generator=noise))
        optimizer.zero_grad()
        (0.5 * (missing + kl)[:8].mean() + 0.5 * (missing + kl)[8:].mean()).backward()
        optimizer.step()
    for mine, theirs in zip(part.learning.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(tensor, old[name]) for name, tensor in part.generator.state_dict().items())
    loop.end()
    assert part.learning is None and part.optimizer is None
    torch.testing.assert_close(
        next(part.generator.parameters()), next(plain.parameters()).detach(), rtol=1e-4, atol=1e-5
    )


def test_the_check_counts_made_rows_that_the_classifier_recognises() -> None:
    part = GenerativeReplay(**SMALL)
    loop = looped(part)
    loop.begin(experience(0))
    epochs_of(loop, experience(0), 30)
    draws = torch.Generator()
    draws.set_state(loop.randomness.generator("generator check").get_state())
    loop.end()
    noise = torch.randn(40, 3, generator=draws)
    assert part.generator is not None
    for place, label in enumerate((0, 1)):
        right = 0
        for n in range(20):
            row = part.generator.sample(torch.tensor([label]), noise[20 * place + n][None])
            right += int(loop.forward({"inputs": row, "labels": torch.tensor([label])}).logits.argmax()) == label
        assert part.quality.shares[place] == right / 20
    assert min(part.quality.shares) > 0.9


def test_a_generator_that_is_not_good_enough_is_not_used() -> None:
    part = GenerativeReplay(**{**SMALL, "threshold": 0.8, "lr": 1e-6})
    loop = looped(part)
    train(loop, experience(0))
    assert min(part.quality.shares) < 0.8 and "next experience will be refused" in str(part.report())
    with pytest.raises(TrainingError, match=r"recognises \d+% of the rows made for class \d .*threshold is 80%"):
        loop.begin(experience(1))
    again = GenerativeReplay(**{**SMALL, "threshold": 0.8})
    again.load_state_dict(part.state_dict())
    with pytest.raises(TrainingError, match="take replay/rehearsal"):
        again.begin(loop, experience(1))
    good = GenerativeReplay(**{**SMALL, "threshold": 0.8})
    loop = looped(good)
    train(loop, experience(0), epochs=30)
    assert good.report() is None
    loop.begin(experience(1))


def test_rows_that_are_not_finite_are_not_recognised() -> None:
    part = GenerativeReplay(**SMALL)
    loop = looped(part)
    loop.begin(table_of(labels=torch.zeros(24, dtype=torch.int64)))
    assert part.learning is not None
    part.learning.out.bias.data.fill_(torch.nan)
    loop.end()
    assert part.quality.shares == [0.0]


def test_gaussian_rows_of_another_shape() -> None:
    part = GenerativeReplay(**SMALL, likelihood="gaussian")
    loop = looped(part)
    inputs = 5 * torch.randn(24, 2, 3)
    one = table_of(inputs=inputs)
    train(loop, one)
    with pytest.raises(CompositionError, match=r"shape \(2, 3\), and those of experience 'e1' have shape \(6,\)"):
        loop.begin(experience(1))
    loop.begin(Experience(1, "e1", one.train, classes=(0, 1)))
    loop.batch_size = 4
    assert loop.extend(one.train[torch.arange(4)])["inputs"].shape == (8, 2, 3)


def test_weights_that_rows_bring_are_kept() -> None:
    part = GenerativeReplay(**SMALL)
    loop = looped(part)
    weight = 1 + torch.arange(24.0)
    train(loop, experience(0, weight=weight))
    loop.begin(experience(1, weight=weight))
    loop.batch_size = 4
    batch = loop.extend(experience(1, weight=weight).train[torch.arange(4)])
    torch.testing.assert_close(batch["weight"], torch.tensor([0.05, 0.1, 0.15, 0.2, *[0.125] * 4]))


@pytest.mark.parametrize("scenario", ["class", "domain", "task"])
def test_the_old_classifier_labels_what_is_made(scenario: Any) -> None:
    part = GenerativeReplay(**{**SMALL, "lr": 1e-4}, labels="teacher")
    loop = looped(part, scenario=scenario, competition="experience" if scenario == "task" else "seen")
    for index in range(2):
        train(loop, experience(index, classes=(0, 1) if scenario == "domain" else None), epochs=3)
    assert not part.teacher, "no second copy of the model between experiences"
    given = experience(2, classes=(0, 1) if scenario == "domain" else None)
    loop.begin(given)
    old = copy.deepcopy(loop.model).eval()
    draws = torch.Generator()
    draws.set_state(loop.randomness.generator("generative replay").get_state())
    known = [0, 1] if scenario == "domain" else [0, 1, 2, 3]
    differ = 0
    for rows in torch.arange(24).split(8):
        step(loop, given.train[rows])
        batch = recorded(loop)[-1]
        asked = torch.tensor(known)[torch.randint(len(known), (8,), generator=draws)]
        torch.randn(8, SMALL["latent"], generator=draws)
        logits = old(batch).logits[8:]
        for n, label in enumerate(asked.tolist()):
            among = [2 * (label // 2), 2 * (label // 2) + 1] if scenario == "task" else known
            assert int(batch["labels"][8 + n]) == among[int(logits[n, among].argmax())]
        differ += int((asked != batch["labels"][8:]).sum())
    assert differ > 3, "a generator as bad as this one makes rows of other classes"


@pytest.mark.parametrize("labels", ["asked", "teacher"])
def test_cut_and_resumed_is_the_same(tmp_path: Path, labels: str) -> None:
    runs: list[tuple[list[Tensor], list[float]]] = []
    for cut in (False, True):
        part = GenerativeReplay(**SMALL, labels=labels)
        loop = looped(part, seed=2)
        train(loop, experience(0))
        loop.begin(experience(1))
        epochs_of(loop, experience(1), 1)
        if cut:
            again = GenerativeReplay(**SMALL, labels=labels)
            loop = resumed(loop, part, looped(again, seed=5), again, tmp_path / "s")
            part = again
        epochs_of(loop, experience(1), 1)
        loop.end()
        train(loop, experience(2), epochs=2)
        assert part.generator is not None
        tensors = [*loop.model.parameters(), *part.generator.parameters()]
        runs.append(([tensor.detach().clone() for tensor in tensors], part.quality.shares))
    assert runs[0][1] == runs[1][1]
    assert all(torch.equal(one, other) for one, other in zip(runs[0][0], runs[1][0], strict=True))


def test_bytes_are_those_of_generators_and_optimizer() -> None:
    part = GenerativeReplay(**SMALL)
    loop = looped(part)
    train(loop, experience(0))
    assert part.generator is not None
    one = sum(tensor.nbytes for tensor in part.generator.parameters())
    assert part.nbytes() == one and len(part.rows()) == 0
    loop.begin(experience(1))
    epochs_of(loop, experience(1), 1)
    assert part.learning is not None
    new = sum(tensor.nbytes for tensor in part.learning.parameters())
    steps = 4 * len(list(part.learning.parameters()))
    assert part.nbytes() == one + 3 * new + steps == tensor_bytes(part.state_dict())


def test_what_is_refused() -> None:
    context = TrainingContext(small_model(), [])
    part = GenerativeReplay(**SMALL)
    for given, said in (
        (table_of(inputs=torch.full((24, 6), 2.0)), r"lie in \[2, 2\]: take likelihood: gaussian"),
        (table_of(inputs=torch.zeros(24, 6, dtype=torch.uint8)), "floating-point 'inputs' alone"),
        (table_of(extra=torch.zeros(24)), "'extra'"),
        (table_of(labels=torch.full((24,), -100)), "a label below 0"),
    ):
        with pytest.raises(CompositionError, match=said):
            part.begin(context, given)
    with pytest.raises(CompositionError, match="leave the other one out"):
        Strategy.load({"replay": [{"kind": "generative"}, {"kind": "rehearsal"}]})
    for settings, said in (({"hidden": ()}, "at least 1"), ({"threshold": 2}, "less than or equal to 1")):
        with pytest.raises(SpecError, match=said):
            GenerativeReplay(**settings)
