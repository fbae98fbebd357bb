"""Sentences about names that are not there."""

from __future__ import annotations

from continual.errors import MOST, unknown


def test_few_names_are_all_listed_and_of_many_the_nearest() -> None:
    few = [f"name-{number}" for number in range(MOST)]
    assert all(f"'{name}'" in unknown("thing", "x", few) for name in few)
    sentence = unknown("thing", "name-7x", [*few, "other"])
    assert "'name-7'" in sentence and f"and {MOST + 1 - 12} more. Did you mean 'name-7'?" in sentence
    assert "'other'" not in sentence and sentence.count("'name-") == 14
    assert unknown("thing", "x", []) == "unknown thing 'x': allowed are none."
