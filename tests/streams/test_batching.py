from __future__ import annotations

import torch

from continual.streams.batching import evaluation_batches, training_batches


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_row_once_with_and_without_lengths() -> None:
    lengths = torch.randint(1, 60, (1003,), generator=drawn(0))
    for given in (None, lengths):
        batches = training_batches(given, 1003, 8, drawn(1))
        assert torch.equal(torch.cat(batches).sort().values, torch.arange(1003))
        assert sorted(map(len, batches)) == [3] + [8] * 125
        again = training_batches(given, 1003, 8, drawn(1))
        assert all(torch.equal(a, b) for a, b in zip(batches, again, strict=True))
        other = training_batches(given, 1003, 8, drawn(2))
        assert not torch.equal(torch.cat(batches), torch.cat(other))


def test_two_passes_differ() -> None:
    generator = drawn(0)
    first, second = (torch.cat(training_batches(None, 50, 8, generator)) for _ in range(2))
    assert not torch.equal(first, second)


def test_drop_last() -> None:
    for lengths in (None, torch.arange(20)):
        batches = training_batches(lengths, 20, 8, drawn(0), drop_last=True)
        assert [len(batch) for batch in batches] == [8, 8]
    kept = [torch.cat(training_batches(None, 20, 8, drawn(seed), drop_last=True)) for seed in range(5)]
    left_out = {frozenset(set(range(20)) - set(rows.tolist())) for rows in kept}
    assert len(left_out) > 1


def test_buckets_pad_little_and_stay_random() -> None:
    lengths = torch.randint(1, 200, (4000,), generator=drawn(3))
    plain, bucketed = (training_batches(given, 4000, 16, drawn(4)) for given in (None, lengths))
    padded = [sum(int(lengths[batch].max()) * len(batch) for batch in batches) for batches in (plain, bucketed)]
    assert padded[1] < 0.62 * padded[0]
    assert padded[1] < 1.06 * int(lengths.sum())
    longest = torch.tensor([int(lengths[batch].max()) for batch in bucketed]).double()
    assert abs(float(torch.corrcoef(torch.stack([longest, torch.arange(len(longest)).double()]))[0, 1])) < 0.2


def test_evaluation_order_is_fixed() -> None:
    lengths = torch.tensor([5, 1, 3, 1, 9])
    assert [batch.tolist() for batch in evaluation_batches(lengths, 5, 2)] == [[1, 3], [2, 0], [4]]
    assert [batch.tolist() for batch in evaluation_batches(None, 3, 2)] == [[0, 1], [2]]


def test_no_rows_no_batches() -> None:
    assert training_batches(None, 0, 4, drawn(0)) == [] and evaluation_batches(None, 0, 4) == []
    assert training_batches(torch.empty(0, dtype=torch.int64), 0, 4, drawn(0)) == []
    assert training_batches(None, 3, 4, drawn(0), drop_last=True) == []
