"""What is searched: one dimension for each setting, named by hand or taken from what a strategy is made of.

A dimension is written ``log:1e-5:1e-2``, ``uniform:0.1:0.9``, ``int:1:10`` or ``choice:sgd,adam``. Without any, rates and
strengths are searched around the strategy's own values. What a strategy may spend (rows kept or replayed, epochs, batch size, rank)
is no matter of tuning and is searched only where it is named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from continual.errors import SpecError, quoted, unknown
from continual.spec import read_yaml
from continual.strategy import Strategy

Kind = Literal["log", "uniform", "int", "choice"]
FORMS = "log:1e-5:1e-2, uniform:0.1:0.9, int:1:10 or choice:sgd,adam"

AROUND: dict[tuple[str, str], float] = {
    ("training", "lr"): 10.0,
    ("training", "head_lr"): 10.0,
    ("penalty", "strength"): 100.0,
    ("distillation", "strength"): 10.0,
    ("distillation", "temperature"): 4.0,
    ("replay", "alpha"): 4.0,
    ("replay", "beta"): 4.0,
    ("replay", "lr"): 10.0,
    ("head", "lr"): 10.0,
    ("head", "shrinkage"): 30.0,
    ("head", "bandwidth"): 4.0,
}
"""Slot and setting → the factor up to which its own value is searched, upwards and downwards, on a logarithmic scale."""
AT_MOST: dict[tuple[str, str], float] = {("head", "shrinkage"): 1.0}


@dataclass(frozen=True)
class Dimension:
    """A setting and the values it may take.

    Attributes:
        key: dotted, as ``--set`` takes it.
        low, high: both may be taken; for ``choice`` zeros.
        choices: plain values; empty for the others.
    """

    key: str
    kind: Kind
    low: float = 0.0
    high: float = 0.0
    choices: tuple[Any, ...] = ()

    def __str__(self) -> str:
        if self.kind == "choice":
            return f"choice:{','.join(yaml.safe_dump(one).split(chr(10))[0] for one in self.choices)}"
        return f"{self.kind}:{self.low:g}:{self.high:g}"

    @property
    def ends(self) -> tuple[Any, ...]:
        """Values by which the whole dimension is checked."""
        if self.kind == "choice":
            return self.choices
        return (int(self.low), int(self.high)) if self.kind == "int" else (self.low, self.high)

    def holds(self, value: Any) -> bool:
        """Whether ``value`` is one that the search can take."""
        if self.kind == "choice":
            return any(value == one and type(value) is type(one) for one in self.choices)
        numeric = isinstance(value, int) if self.kind == "int" else isinstance(value, int | float)
        return numeric and not isinstance(value, bool) and self.low <= value <= self.high

    def rounded(self, value: Any) -> Any:
        """The value with three digits, within the ends."""
        if self.kind in ("choice", "int"):
            return value
        return min(max(float(f"{value:.3g}"), self.low), self.high)


def read_space(entries: Sequence[str]) -> list[Dimension]:
    """Dimensions from ``KEY=FORM``, or from YAML files that map keys to forms.

    Raises:
        SpecError: an entry that is neither, a form that cannot be read, or a key that is named twice.
    """
    found: dict[str, Dimension] = {}
    for entry in entries:
        key, mark, form = entry.partition("=")
        if entry.endswith((".yaml", ".yml")) and not mark:
            pairs: list[tuple[str, Any]] = list(read_yaml(Path(entry)).items())
        elif mark and key and form:
            pairs = [(key, form)]
        else:
            raise SpecError(
                f"--search '{entry}' names no values: write it as training.lr=log:1e-5:1e-2, or name a YAML file."
            )
        for name, text in pairs:
            if name in found:
                raise SpecError(f"--search names '{name}' twice: name each setting once.")
            found[name] = _dimension(str(name), str(text))
    return list(found.values())


def default_space(strategy: Strategy) -> list[Dimension]:
    """The rates and strengths of a strategy, around its own values.

    Raises:
        SpecError: it has none.
    """
    found = []
    for slot, key, settings in _settings(strategy):
        for name, value in settings.items():
            if (slot, name) in AROUND and isinstance(value, float) and value > 0:
                factor, most = AROUND[slot, name], AT_MOST.get((slot, name), float("inf"))
                low, high = float(f"{value / factor:.3g}"), min(float(f"{value * factor:.3g}"), most)
                found.append(Dimension(f"{key}.{name}", "log", low, high))
    if not found:
        raise SpecError(
            f"strategy '{strategy.name}' has no rate or strength to tune: name settings, such as --search "
            "head.shrinkage=log:1e-4:1."
        )
    return found


def check_space(source: Any, fixed: Mapping[str, Any], space: Sequence[Dimension]) -> None:
    """Raise :class:`SpecError` where the strategy cannot have a value of the search."""
    for dimension in space:
        for value in dimension.ends:
            try:
                Strategy.load(source, overrides={**fixed, dimension.key: value})
            except SpecError as error:
                raise SpecError(f"--search {dimension.key}={dimension}: {error}") from error


def own_settings(strategy: Strategy, space: Sequence[Dimension]) -> dict[str, Any]:
    """What the strategy has in the place of each dimension; None where it has nothing."""
    found = {}
    for dimension in space:
        value: Any = strategy.to_dict()
        for step in dimension.key.split("."):
            if isinstance(value, list):
                value = value[int(step)] if step.isdigit() and int(step) < len(value) else None
            else:
                value = value.get(step) if isinstance(value, Mapping) else None
        found[dimension.key] = value
    return found


def _settings(strategy: Strategy) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Slot, dotted key and settings of the training, where anything is trained by it, and of every part."""
    content = strategy.to_dict()
    solved = any(part.slot == "head" and part.needs_steady_features for part in strategy.prototypes)
    learns = strategy.backbone == "train" or not (solved or strategy.engine is not None)
    if learns:
        yield "training", "training", content["training"]
    for slot in dict.fromkeys(part.slot for part in strategy.prototypes):
        given = content[slot]
        for place, settings in enumerate(given if isinstance(given, list) else [given]):
            yield slot, f"{slot}.{place}" if isinstance(given, list) else slot, settings


def _dimension(key: str, form: str) -> Dimension:
    kind, _, rest = form.partition(":")
    kinds: dict[str, Kind] = {"log": "log", "uniform": "uniform", "int": "int", "choice": "choice"}
    where = f"--search {key}={form}"
    if kind not in kinds:
        raise SpecError(f"{where}: {unknown('form', kind, kinds)} Write {FORMS}.")
    if kind == "choice":
        try:
            choices = tuple(yaml.safe_load(one) for one in rest.split(","))
        except yaml.YAMLError as error:
            raise SpecError(f"{where}: a choice is not valid YAML: write {FORMS}.") from error
        if len(choices) < 2 or any(isinstance(one, dict | list) for one in choices):
            raise SpecError(f"{where}: give two plain values or more, such as choice:sgd,adam.")
        return Dimension(key, "choice", choices=choices)
    try:
        low, high = (float(end) for end in rest.split(":"))
    except ValueError as error:
        raise SpecError(f"{where}: it needs two numbers, the lowest and the highest value: write {FORMS}.") from error
    if not low < high or (kind == "log" and low <= 0):
        positive = ", above 0" if kind == "log" else ""
        raise SpecError(f"{where}: the first number must be below the second{positive}.")
    if kind == "int" and (low % 1 or high % 1):
        raise SpecError(f"{where}: {quoted([rest])} are no whole numbers.")
    return Dimension(key, kinds[kind], low, high)
