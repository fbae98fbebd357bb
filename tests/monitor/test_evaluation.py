"""The pass over all test sets: right scores in the right order, whatever the batches, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from continual.models.output import Output
from continual.monitor.evaluation import evaluating, score_tables
from continual.objective import score_rows
from continual.table import Batch, Mapped, Ragged, Table, TensorTable

CPU = torch.device("cpu")


def everything(batch: Batch) -> Tensor | None:
    return None


def dense(rows: int, seed: int) -> TensorTable:
    generator = torch.Generator().manual_seed(seed)
    return TensorTable(
        {
            "inputs": torch.randn(rows, 5, generator=generator),
            "labels": torch.randint(0, 4, (rows,), generator=generator),
            "note": [str(row) for row in range(rows)],
            "row": torch.arange(rows),
        }
    )


def ragged(rows: int, seed: int) -> TensorTable:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (rows,), generator=generator).tolist()
    ids = [torch.randint(1, 30, (length,), generator=generator).tolist() for length in lengths]
    labels = torch.randint(0, 4, (rows,), generator=generator)
    return TensorTable({"input_ids": Ragged.from_lists(ids, 0), "labels": labels, "row": torch.arange(rows)})


class Bag(nn.Module):
    """Mean of token vectors under the mask, then a layer: padding has no say."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.vectors = nn.Parameter(torch.randn(30, 8, generator=generator))
        self.weight = nn.Parameter(torch.randn(8, 4, generator=generator))

    def forward(self, batch: Batch) -> Output:
        mask = batch["attention_mask"].unsqueeze(-1)
        mean = (self.vectors[batch["input_ids"]] * mask).sum(1) / mask.sum(1)
        return Output(mean @ self.weight)


def row_by_row(table: Table, forward: object, objective: str = "classification") -> dict[str, Tensor]:
    parts = []
    for row in range(len(table)):
        batch = table[torch.tensor([row])]
        parts.append(score_rows(objective, forward(batch).logits, batch))  # type: ignore[operator, arg-type]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
@pytest.mark.parametrize("kind", ["dense", "views", "mapped", "ragged", "ragged views"])
def test_scores_are_those_of_single_rows_in_their_order(kind: str, batch_size: int) -> None:
    weight = torch.randn(5, 4, generator=torch.Generator().manual_seed(9))

    def linear(batch: Batch) -> Output:
        return Output(batch["inputs"] @ weight)

    tables: list[Table]
    if kind.startswith("ragged"):
        forward, tables = Bag(), [ragged(33, 1), ragged(20, 2), ragged(1, 3)]
    else:
        forward, tables = linear, [dense(33, 1), dense(20, 2), dense(1, 3)]  # type: ignore[assignment]
    if kind.endswith("views"):
        base = tables[0]
        tables = [base.select(torch.tensor([5, 3, 30, 8, 1])), base.select(torch.tensor([2, 0])), tables[1]]
    if kind == "mapped":
        tables[1] = Mapped(tables[1], {"inputs": lambda inputs: inputs.flip(1)})
    found = score_tables(tables, forward, everything, "classification", CPU, batch_size)
    for table, scores in zip(tables, found, strict=True):
        expected = row_by_row(table, forward)
        assert scores.keys() == expected.keys()
        for name, score in scores.items():
            assert score.dtype == torch.float32 and score.device == CPU
            torch.testing.assert_close(score, expected[name])
    assert 0 < torch.cat([scores["accuracy"] for scores in found]).mean() < 1


def test_batches_of_ragged_rows_are_padded_to_their_own_longest() -> None:
    table, widths = ragged(40, 4), []
    model = Bag()

    def forward(batch: Batch) -> Output:
        assert int(batch["attention_mask"].sum(1).max()) == batch["input_ids"].shape[1]
        widths.append(batch["input_ids"].shape[1])
        found: Output = model(batch)
        return found

    score_tables(
        [table.select(torch.arange(20)), table.select(torch.arange(20, 40))],
        forward,
        everything,
        "classification",
        CPU,
        8,
    )
    assert widths == sorted(widths, reverse=True) and widths[0] > widths[-1] and len(widths) == 5


def test_language_model_scores_keep_their_order_and_ignore_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = [
        torch.randint(1, 9, (int(n),), generator=generator).tolist()
        for n in torch.randint(2, 9, (17,), generator=generator)
    ]
    table = TensorTable({"input_ids": Ragged.from_lists(ids, 0), "labels": Ragged.from_lists(ids, -100)})
    vectors = torch.randn(9, 9, generator=generator)

    def forward(batch: Batch) -> Output:
        return Output(vectors[batch["input_ids"]])

    (found,) = score_tables([table], forward, everything, "causal-lm", CPU, 4)
    assert list(found) == ["log-likelihood per token", "exact match"]
    expected = row_by_row(table, forward, "causal-lm")
    torch.testing.assert_close(found["log-likelihood per token"], expected["log-likelihood per token"])
    torch.testing.assert_close(found["exact match"], expected["exact match"])


def test_only_active_classes_compete() -> None:
    table = dense(50, 0)
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0])

    def forward(batch: Batch) -> Output:
        return Output(logits.expand(len(batch["labels"]), 4))

    (scores,) = score_tables(
        [table], forward, lambda batch: torch.tensor([False, False, True, True]), "classification", CPU, 16
    )
    torch.testing.assert_close(scores["accuracy"], (table.column("labels") == 2).float())


def test_empty_tables_have_empty_scores() -> None:
    full, empty = dense(6, 0), dense(0, 0)

    def forward(batch: Batch) -> Output:
        return Output(batch["inputs"][:, :4])

    found = score_tables([empty, full, empty], forward, everything, "classification", CPU, 4)
    assert [len(scores["accuracy"]) for scores in found] == [0, 6, 0]
    assert [len(s["accuracy"]) for s in score_tables([empty], forward, everything, "classification", CPU, 4)] == [0]
    assert score_tables([], forward, everything, "classification", CPU, 4) == []


def test_evaluating_gives_every_module_its_own_flag_back() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2))
    model.train()
    model[2].eval()
    with pytest.raises(RuntimeError, match="stop"), evaluating(model):
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
        raise RuntimeError("stop")
    assert [module.training for module in model] == [True, True, False] and model.training and torch.is_grad_enabled()


def test_evaluation_never_changes_training() -> None:
    def train(evaluate: bool) -> tuple[dict[str, Tensor], Tensor]:
        model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        table = dense(64, 5)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(3)
            for _ in range(4):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(table.column("inputs")), table.column("labels"))
                loss.backward()  # type: ignore[no-untyped-call]
                if evaluate:
                    with evaluating(model):
                        score_tables(
                            [table], lambda b: Output(model(b["inputs"])), everything, "classification", CPU, 9
                        )
                optimizer.step()
            return model.state_dict(), torch.get_rng_state()

    (one, state), (other, other_state) = train(False), train(True)
    assert all(torch.equal(one[name], other[name]) for name in one) and torch.equal(state, other_state)
