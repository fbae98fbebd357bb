from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from continual.errors import StreamError
from continual.spec import read_yaml
from continual.streams.splits import _even_cuts
from continual.streams.stream import Stream
from continual.streams.transforms import Permute, Rotate

# B rows, D pixels, S side


def points(count: int = 60, classes: int = 6, width: int = 16) -> tuple[Tensor, np.ndarray[Any, Any]]:
    inputs = torch.rand(count, width, generator=torch.Generator().manual_seed(count))
    return inputs, np.array([f"c{n % classes}" for n in range(count)])


def stream(split: dict[str, Any], scenario: Any = "class", seed: int = 0, **options: Any) -> Stream:
    return Stream.from_tables(points(), points(30), points(12), split=split, scenario=scenario, seed=seed, **options)


def names(found: Stream) -> list[str]:
    return [experience.name for experience in found]


def test_class_split_sizes_order_and_limit() -> None:
    assert names(stream({"by": "class", "size": 2})) == ["c0, c1", "c2, c3", "c4, c5"]
    assert names(stream({"by": "class", "size": 4})) == ["classes 1", "c4, c5"]
    assert names(stream({"by": "class", "size": 2, "classes": 4})) == ["c0, c1", "c2, c3"]
    assert names(stream({"by": "class", "size": 2, "order": ["c5", "c0", "c2"]})) == ["c5, c0", "c2"]
    assert names(stream({"by": "class", "groups": [["c1"], ["c0", "c4"]]})) == ["c1", "c0, c4"]


def test_random_order_follows_the_seed() -> None:
    split = {"by": "class", "size": 2, "order": "random"}
    assert names(stream(split, seed=1)) == names(stream(split, seed=1))
    assert len({tuple(names(stream(split, seed=seed))) for seed in range(8)}) > 4
    fixed = {**split, "seed": 3}
    assert names(stream(fixed, seed=1)) == names(stream(fixed, seed=2)) == names(stream(split, seed=3))


def test_class_split_gives_the_rows_of_its_classes() -> None:
    inputs, labels = points()
    second = stream({"by": "class", "size": 2})[1]
    wanted = inputs[torch.from_numpy(np.isin(labels, ["c2", "c3"]))]
    assert torch.equal(second.train.column("inputs"), wanted)
    assert second.valid is not None and second.test is not None and len(second.test) == 10 and len(second.valid) == 4


@pytest.mark.parametrize(
    ("split", "sentence"),
    [
        ({"by": "class", "size": 2, "order": ["c0", "c9"]}, "unknown class in the split 'c9'"),
        ({"by": "class", "size": 1, "order": ["c0", "c1", "c0"]}, "names class 'c0' twice"),
        ({"by": "class", "groups": [["c0", "c1"], ["c1"]]}, "names class 'c1' twice"),
        ({"by": "class", "groups": [["c0", "c1"], []]}, "a group of the split by class is empty"),
        ({"by": "class", "size": 2, "classes": 7}, "takes 7 classes and there are 6"),
        ({"by": "class", "size": 1, "classes": 1}, "leaves one class in the whole stream"),
        ({"by": "domain"}, "needs a domain column"),
        ({"by": "time", "periods": 2}, "needs a time column"),
    ],
)
def test_impossible_splits(split: dict[str, Any], sentence: str) -> None:
    with pytest.raises(StreamError, match=sentence):
        stream(split)


def test_domain_split() -> None:
    domain = {"train": ["x", "y", "z"] * 20, "test": ["z", "x"] * 15, "valid": ["x"] * 12}
    found = stream({"by": "domain"}, "domain", domain=domain)
    assert names(found) == ["x", "y", "z"]
    assert [len(e.train) for e in found] == [20, 20, 20]
    assert found[1].test is None and found[1].valid is None and found[0].valid is not None
    assert torch.equal(found[1].train.column("inputs"), points()[0][1::3])
    assert names(stream({"by": "domain", "order": ["z", "x"]}, "domain", domain=domain)) == ["z", "x"]
    orders = {tuple(names(stream({"by": "domain", "order": "random"}, "domain", s, domain=domain))) for s in range(9)}
    assert len(orders) > 2
    with pytest.raises(StreamError, match="domain 'w' is in test but has no training rows"):
        stream({"by": "domain"}, "domain", domain={**domain, "test": ["w"] * 30})


def test_time_split_by_count_cuts_and_calendar() -> None:
    numbers = {"train": np.arange(60)[::-1].copy(), "test": np.arange(30) * 2, "valid": np.full(12, 7)}
    found = stream({"by": "time", "periods": 3}, "domain", time=numbers)
    assert names(found) == ["period 1", "period 2", "period 3"] and [len(e.train) for e in found] == [20, 20, 20]
    assert torch.equal(found[0].train.column("inputs"), points()[0][40:])
    assert [0 if e.valid is None else len(e.valid) for e in found] == [12, 0, 0]
    assert [len(e.train) for e in stream({"by": "time", "periods": [10, 15.5]}, "domain", time=numbers)] == [10, 6, 44]
    dates = {part: np.datetime64("2023-11-30") + values.astype("timedelta64[D]") for part, values in numbers.items()}
    assert names(stream({"by": "time", "periods": "month"}, "domain", time=dates)) == ["2023-11", "2023-12", "2024-01"]
    assert names(stream({"by": "time", "periods": "year"}, "domain", time=dates)) == ["2023", "2024"]
    words = {part: [str(value) for value in values] for part, values in dates.items()}
    assert [len(e.train) for e in stream({"by": "time", "periods": ["2024-01-01"]}, "domain", time=words)] == [32, 28]


def by_rows(times: list[float], periods: int) -> list[float] | None:
    """Cuts at the quantiles of the rows, one after another; None where they tie."""
    rows, cuts = sorted(times), []
    for number in range(1, periods):
        cut = rows[len(rows) * number // periods]
        if cut <= (cuts[-1] if cuts else rows[0]):
            return None
        cuts.append(cut)
    return cuts


def test_every_period_has_a_time_of_its_own_where_there_are_enough() -> None:
    generator = np.random.default_rng(0)
    tied = 0
    for _ in range(200):
        times = generator.integers(0, generator.integers(1, 12), generator.integers(3, 40)).astype(np.float64)
        distinct = len(set(times.tolist()))
        for periods in range(1, distinct + 1):
            cuts = _even_cuts(times, periods)
            assert len(cuts) == periods - 1 and (np.diff(cuts) > 0).all()
            assert len(set(np.searchsorted(cuts, times, side="right").tolist())) == periods
            wanted = by_rows(times.tolist(), periods)
            tied += wanted is None
            assert wanted is None or cuts.tolist() == wanted
        with pytest.raises(StreamError, match="too few different times"):
            _even_cuts(times, distinct + 1)
    assert tied > 50


def test_months_as_numbers_as_words_and_as_dates_of_yaml(tmp_path: Path) -> None:
    months = np.repeat(np.arange(202401, 202413), [30, 1, 2, 1, 5, 1, 1, 1, 1, 1, 1, 15])
    numbers = {"train": months, "test": np.full(30, 202401), "valid": np.full(12, 202412)}
    found = stream({"by": "time", "periods": 12}, "domain", time=numbers)
    assert [len(e.train) for e in found] == [30, 1, 2, 1, 5, 1, 1, 1, 1, 1, 1, 15]
    words = {part: [f"{value // 100}-{value % 100:02d}" for value in values] for part, values in numbers.items()}
    assert names(stream({"by": "time", "periods": "month"}, "domain", time=words))[::11] == ["2024-01", "2024-12"]
    path = tmp_path / "cuts.yaml"
    for cuts in ("[2024-02-01, 2024-05-01]", "['2024-02-01', '2024-05-01']", "[2024-02, 2024-05]"):
        path.write_text(f"by: time\nperiods: {cuts}\n")
        split = read_yaml(path)
        assert [len(e.train) for e in stream(split, "domain", time=words)] == [30, 4, 26], cuts
    dated = stream({"by": "time", "periods": [datetime.date(2024, 2, 1)]}, "domain", time=words)
    assert dated.fingerprint() == stream({"by": "time", "periods": ["2024-02-01"]}, "domain", time=words).fingerprint()
    path.write_text("by: time\nperiods: [2024-01-31 23:00:00-02:00]\n")
    late = {**words, "train": ["2024-02-01T00:59:59.5"] * 20 + ["2024-02-01T01:00:00"] * 40}
    assert [len(e.train) for e in stream(read_yaml(path), "domain", time=late)] == [20, 40]


def test_dates_of_numpy_and_missing_ones() -> None:
    days = {part: np.full(count, "2024-01-31", dtype="datetime64[ns]") for part, count in (("test", 30), ("valid", 12))}
    train = np.datetime64("2024-01-31", "ns") + np.arange(60).astype("timedelta64[D]")
    found = stream({"by": "time", "periods": "month"}, "domain", time={**days, "train": train})
    assert [len(e.train) for e in found] == [1, 29, 30]
    train[7] = np.datetime64("NaT")
    with pytest.raises(StreamError, match="a time is missing"):
        stream({"by": "time", "periods": "month"}, "domain", time={**days, "train": train})


def test_times_that_cannot_be_cut() -> None:
    numbers = {"train": np.arange(60) // 30, "test": np.arange(30), "valid": np.arange(12)}
    for periods, sentence in ((3, "too few different times"), ("month", "needs dates"), ([5, 2], "do not rise")):
        with pytest.raises(StreamError, match=sentence):
            stream({"by": "time", "periods": periods}, "domain", time=numbers)
    with pytest.raises(StreamError, match="'periods' cannot be read"):
        stream({"by": "time", "periods": ["soon"]}, "domain", time=numbers)
    with pytest.raises(StreamError, match="some parts have numbers as times and others dates"):
        stream({"by": "time", "periods": 2}, "domain", time={**numbers, "test": ["2024-01-01"] * 30})


def test_joint_split() -> None:
    found = stream({"by": "joint"})
    assert len(found) == 1 and len(found[0].train) == 60 and found[0].classes == (0, 1, 2, 3, 4, 5)


def test_permutation_reorders_pixels_alike_in_every_row() -> None:
    found = stream({"by": "permutation", "count": 3, "first": "identity"}, "domain")
    plain, inputs = points()[0], [e.train.column("inputs") for e in found]
    assert names(found) == ["identity", "permutation 2", "permutation 3"]
    assert torch.equal(inputs[0], plain) and not torch.equal(inputs[1], plain) and not torch.equal(inputs[1], inputs[2])
    assert torch.equal(inputs[1].sort(1).values, plain.sort(1).values)
    index = torch.tensor([5, 17])
    test = found[1].test
    assert test is not None and torch.equal(found[1].train[index]["inputs"], inputs[1][index])
    order_D = torch.stack([(plain[:, d, None] == inputs[1]).all(0).nonzero()[0, 0] for d in range(16)])
    assert torch.equal(test.column("inputs")[:, order_D], points(30)[0])
    permuted = stream({"by": "permutation", "count": 1}, "domain")
    assert not torch.equal(permuted[0].train.column("inputs"), plain)
    other = stream({"by": "permutation", "count": 1}, "domain", seed=1)
    assert not torch.equal(permuted[0].train.column("inputs"), other[0].train.column("inputs"))
    again = stream({"by": "permutation", "count": 1, "seed": 0}, "domain", seed=1)
    assert torch.equal(permuted[0].train.column("inputs"), again[0].train.column("inputs"))


def test_permute_keeps_the_shape_of_images() -> None:
    images = torch.rand(2, 1, 3, 3)
    assert torch.equal(Permute(torch.arange(9).flip(0))(images), images.flatten(1).flip(1).view_as(images))


def test_rotation_by_right_angles_is_exact_and_in_between_matches_a_slow_reference() -> None:
    images = torch.rand(3, 5, 5, generator=torch.Generator().manual_seed(0))
    turned = Rotate(90, (5, 5))(images.flatten(1)).view(3, 5, 5)
    assert torch.allclose(turned, torch.rot90(images, 1, (1, 2)), atol=1e-5)
    assert torch.allclose(Rotate(0, (5, 5))(images.flatten(1)).view(3, 5, 5), images, atol=1e-6)
    turned = Rotate(30, (5, 5))(images.flatten(1)).view(3, 5, 5)
    assert torch.allclose(turned, slow_rotation(images, 30.0), atol=1e-5)


def slow_rotation(images_BSS: Tensor, degrees: float) -> Tensor:
    """One pixel after another: the value at the place that is turned onto it."""
    size = images_BSS.shape[-1]
    cos, sin, centre = float(np.cos(np.radians(degrees))), float(np.sin(np.radians(degrees))), (size - 1) / 2
    result = torch.zeros_like(images_BSS)
    for row in range(size):
        for column in range(size):
            x, y = column - centre, row - centre
            left, top = cos * x - sin * y + centre, sin * x + cos * y + centre
            for r in (int(np.floor(top)), int(np.floor(top)) + 1):
                for c in (int(np.floor(left)), int(np.floor(left)) + 1):
                    if 0 <= r < size and 0 <= c < size:
                        weight = (1 - abs(top - r)) * (1 - abs(left - c))
                        result[:, row, column] += weight * images_BSS[:, r, c]
    return result


def test_rotation_split() -> None:
    found = stream({"by": "rotation", "count": 4, "angles": "even"}, "domain")
    assert names(found) == ["1: 0.0°", "2: 45.0°", "3: 90.0°", "4: 135.0°"]
    third = found[2].train
    assert torch.allclose(
        third.column("inputs").view(-1, 4, 4), torch.rot90(points()[0].view(-1, 4, 4), 1, (1, 2)), atol=1e-5
    )
    second = found[1].train
    whole, some = second.column("inputs"), second[torch.tensor([4, 9])]["inputs"]
    assert torch.equal(whole[[4, 9]], some)
    random = [stream({"by": "rotation", "count": 3}, "domain", seed=s) for s in (0, 0, 1)]
    assert names(random[0]) == names(random[1]) != names(random[2])
    angles = [float(name.split()[1][:-1]) for name in names(stream({"by": "rotation", "count": 30}, "domain"))]
    assert all(0 <= angle <= 180 for angle in angles) and max(angles) > 120 and min(angles) < 60


def test_transformations_need_pixels() -> None:
    text = ({"text": ["a b", "c d"] * 3, "labels": [0, 1] * 3}, {"text": ["e", "f"], "labels": [0, 1]})
    with pytest.raises(StreamError, match="needs numbers in a column 'inputs'"):
        Stream.from_tables(*text, split={"by": "permutation", "count": 2}, scenario="domain")
    with pytest.raises(StreamError, match="needs square images"):
        Stream.from_tables(points(width=15), split={"by": "rotation", "count": 2}, scenario="domain")


def test_row_ids_stay_unique_when_rows_come_again() -> None:
    for split in ({"by": "permutation", "count": 3}, {"by": "rotation", "count": 3}, {"by": "class", "size": 2}):
        found = stream(split, "domain")
        rows = [t.column("row") for e in found for t in (e.train, e.valid, e.test) if t is not None]
        everything = torch.cat(rows)
        assert len(torch.unique(everything)) == len(everything)
        assert everything.dtype == torch.int64
