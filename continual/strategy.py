"""A strategy: parts and a way of training, checked as a whole before anything runs."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any, Literal

from continual.engine import ENGINES, Engine, engine_class
from continual.errors import CompositionError, SpecError, quoted, unknown
from continual.kinds import Objective
from continual.library import find_spec
from continual.parts.part import SLOTS, Part, Slot, check_criterion
from continual.parts.registry import PARTS, part_class
from continual.parts.replay.store import KeepsRows
from continual.spec import Spec, parse, read_yaml
from continual.training import Training

Data = Literal["experience", "cumulative", "joint"]
SINGLE: tuple[Slot, ...] = ("adapter", "head")
"""Slots that hold one part at most."""


SlotSettings = dict[str, Any] | list[dict[str, Any]]


class StrategySpec(Spec):
    """The form of a strategy's YAML file."""

    summary: str = ""
    source: str = ""
    adapter: dict[str, Any] | None = None
    head: dict[str, Any] | None = None
    replay: SlotSettings | None = None
    penalty: SlotSettings | None = None
    distillation: SlotSettings | None = None
    projection: SlotSettings | None = None
    recall: SlotSettings | None = None
    engine: dict[str, Any] | None = None
    backbone: Literal["train", "frozen"] = "train"
    data: Data = "experience"
    training: Training = Training()
    tuned: dict[str, Any] | None = None


class Strategy:
    """A composition of parts.

    Args:
        parts: prototypes; each learner makes its own from their settings.
        training: a :class:`Training` or its keys.
        backbone: ``frozen`` trains nothing but the head.
        data: ``experience`` trains on the rows that arrive; ``cumulative`` on all rows so far; ``joint`` once on the
            whole stream. The last two are bounds to compare with.
        tuned: how its settings were chosen, as ``continual tune`` writes it down; it changes nothing.
        engine: a prototype of what trains in place of our loop; there are no parts then.

    Raises:
        SpecError: a setting that is not allowed.
        CompositionError: parts that exclude one another.
    """

    def __init__(
        self,
        *parts: Part,
        name: str = "custom",
        training: Training | Mapping[str, Any] | None = None,
        backbone: Literal["train", "frozen"] = "train",
        data: Data = "experience",
        summary: str = "",
        source: str = "",
        tuned: Mapping[str, Any] | None = None,
        engine: Engine | None = None,
    ) -> None:
        self.name, self.summary, self.source = name, summary, source
        self.tuned = None if tuned is None else dict(tuned)
        self.backbone, self.data = backbone, data
        given = training if isinstance(training, Training) else dict(training or {})
        self.training = parse(Training, given, f"strategy '{name}', training")
        self.prototypes = sorted(parts, key=lambda part: SLOTS.index(part.slot))
        self.engine = engine
        self._check_parts()
        if engine is not None:
            self._check_engine(engine)

    @classmethod
    def load(
        cls, what: str | Path | Mapping[str, Any] | Strategy, *, overrides: Mapping[str, Any] | None = None
    ) -> Strategy:
        """A strategy from its name, a YAML file, or a mapping of the same form.

        Args:
            overrides: dotted key → value, such as ``{"training.lr": 0.01}``, set before the check.
        """
        if isinstance(what, Strategy):
            what = {**what.to_dict(), "name": what.name}
        if isinstance(what, Mapping):
            content, name = copy.deepcopy(dict(what)), str(what.get("name", "custom"))
            content.pop("name", None)
            if "use" in content:
                base = read_yaml(find_spec("strategies", content.pop("use")))
                content = {**base, **content}
            where = f"strategy '{name}'"
        else:
            path = find_spec("strategies", what)
            content, name = read_yaml(path), path.stem
            where = str(path) if Path(what).suffix else f"strategy '{name}'"
        for key, value in (overrides or {}).items():
            _set(content, key, value, where)
        if overrides:
            content["summary"] = f"{content.get('summary', '')} Set: {', '.join(written(overrides))}.".lstrip()
        return cls._from_content(content, name, where)

    @classmethod
    def _from_content(cls, content: dict[str, Any], name: str, where: str) -> Strategy:
        spec = parse(StrategySpec, content, where)
        parts = []
        for slot in SLOTS:
            given = getattr(spec, slot)
            for settings in given if isinstance(given, list) else [given] if given is not None else []:
                if "kind" not in settings:
                    raise SpecError(f"{where}: '{slot}' names no kind: allowed are {quoted(sorted(PARTS[slot]))}.")
                found = part_class(slot, str(settings["kind"]), where)
                own = {key: value for key, value in settings.items() if key != "kind" or ":" not in str(value)}
                parse(found.Settings, own, f"{where}, {slot}")
                parts.append(found(**own))
        return cls(
            *parts,
            name=name,
            training=spec.training,
            backbone=spec.backbone,
            data=spec.data,
            summary=spec.summary,
            source=spec.source,
            tuned=spec.tuned,
            engine=None if spec.engine is None else _engine(spec.engine, where),
        )

    def make_parts(self) -> list[Part]:
        """New parts with the settings of the prototypes, in the order in which their hooks are called."""
        return [type(part)(**part.settings.model_dump()) for part in self.prototypes]

    def make_engine(self) -> Engine | None:
        """A new engine with the settings of the prototype, where the strategy has one."""
        return None if self.engine is None else type(self.engine)(**self.engine.settings.model_dump())

    def check(self, *, objective: Objective, gives_features: bool, open_stream: bool = False) -> None:
        """Raise :class:`CompositionError` when the parts or the engine cannot work on this model or objective."""
        if self.engine is not None:
            self.engine.check(objective=objective, gives_features=gives_features, open_stream=open_stream)
        slots = [part.slot for part in self.prototypes]
        for part in self.prototypes:
            by_hand = f" (--set {part.slot}=null)" if slots.count(part.slot) == 1 else ""
            if objective not in part.objectives:
                raise CompositionError(
                    f"{part.name} does not work for {objective}: it is made for {quoted(part.objectives)}; leave it "
                    f"out{by_hand}."
                )
            part.check_objective(objective)
            if (part.needs_head or part.slot == "head") and not gives_features:
                raise CompositionError(
                    f"{part.name} needs a model that gives features, and this one gives logits itself: take 'mlp' or a "
                    f"pretrained model, or leave {part.slot} out{by_hand}."
                )
        if self.training.loss == "binary" and objective != "classification":
            raise CompositionError(
                f"training.loss: binary is a sigmoid for each class and the objective is {objective}: leave it out (--set "
                "training.loss=cross-entropy)."
            )
        if self.training.head_lr is not None and not gives_features:
            raise CompositionError(
                "training.head_lr is the rate of a head of ours, and this model gives logits itself: leave it out (--set "
                "training.head_lr=null)."
            )
        if self.backbone == "frozen" and not gives_features:
            raise CompositionError(
                "backbone: frozen leaves nothing to train in a model that gives logits itself: take a model with a head."
            )
        if open_stream and self.data == "joint":
            raise CompositionError(
                "data: joint needs the whole stream at once, and this one is open: take 'cumulative' as the bound."
            )

    def to_dict(self) -> dict[str, Any]:
        """The same form as the YAML file; what :meth:`load` takes."""
        content: dict[str, Any] = {"summary": self.summary, "source": self.source}
        for slot in SLOTS:
            settings = [part.settings.model_dump(mode="json") for part in self.prototypes if part.slot == slot]
            for part, dumped in zip((p for p in self.prototypes if p.slot == slot), settings, strict=True):
                dumped["kind"] = part.reference
            if settings:
                content[slot] = settings[0] if len(settings) == 1 else settings
        if self.engine is not None:
            content["engine"] = {**self.engine.settings.model_dump(mode="json"), "kind": self.engine.reference}
        content.update(backbone=self.backbone, data=self.data, training=self.training.model_dump(mode="json"))
        return content if self.tuned is None else {**content, "tuned": dict(self.tuned)}

    def fingerprint(self) -> str:
        """SHA-256 of all settings; the name, the summary and how they were chosen do not count."""
        content = {key: value for key, value in self.to_dict().items() if key not in ("summary", "source", "tuned")}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _check_engine(self, engine: Engine) -> None:
        if self.prototypes:
            raise CompositionError(
                f"strategy '{self.name}': {engine.name} trains by itself and takes no parts of ours: leave "
                f"{quoted(part.slot for part in self.prototypes)} out."
            )
        if self.data != "experience":
            raise CompositionError(
                f"strategy '{self.name}': {engine.name} trains on each experience as it comes: leave data: {self.data} out."
            )
        engine.check_training(self.training, self.backbone)

    def _check_parts(self) -> None:
        for slot in SINGLE:
            if sum(part.slot == slot for part in self.prototypes) > 1:
                raise CompositionError(f"strategy '{self.name}' has two parts under '{slot}': there can be one.")
        for part in self.prototypes:
            check_criterion(part, self.training.loss)
            if part.needs_stored_rows and not any(isinstance(other, KeepsRows) for other in self.prototypes):
                raise CompositionError(
                    f"strategy '{self.name}': {part.name} reads the rows that a memory keeps, and there is none: take "
                    "replay: {kind: rehearsal, select: herding}."
                )
        for part in self.prototypes:
            excluded = {**part.excludes, **part.refuses}
            for other in self.prototypes:
                for key in (other.slot, f"{other.slot}/{other.kind}"):
                    if other is not part and key in excluded:
                        raise CompositionError(
                            f"strategy '{self.name}': {part.name} cannot be combined with {other.name}: {excluded[key]}"
                        )
        if self.backbone == "frozen" and any(part.slot == "adapter" for part in self.prototypes):
            raise CompositionError(
                f"strategy '{self.name}': backbone: frozen forbids an adapter, which freezes the base by itself: "
                "leave one of the two out."
            )
        for part, other in product(self.prototypes, self.prototypes):
            if part.needs_lasting_parameters and other.replaces:
                raise CompositionError(
                    f"strategy '{self.name}': {part.name} remembers something of each parameter, and those of {other.name} "
                    "live for one experience only: take adapter/lora with across_tasks: continue, or a penalty that can "
                    "hold effective weights (ewc, mas, l2), or projection/agem."
                )
        steady = self.backbone == "frozen" or any(part.settles for part in self.prototypes)
        stacking = any(part.stacks for part in self.prototypes)
        for part in self.prototypes:
            if part.needs_stacking and not stacking:
                raise CompositionError(
                    f"strategy '{self.name}': {part.name} reads the adapters of earlier experiences, and no part keeps "
                    "them in the model: set adapter to kind 'lora' with across_tasks 'stack'."
                )
            if part.needs_steady_features and not steady:
                raise CompositionError(
                    f"strategy '{self.name}': {part.name} adds up features, which must not change once they are: set "
                    "backbone: frozen, or take adapter/lora with across_tasks: first."
                )
            if part.needs_steady_features and self.data == "cumulative":
                raise CompositionError(
                    f"strategy '{self.name}': {part.name} adds up the rows of each experience once, and data: cumulative "
                    "brings them again and again: take data: experience."
                )


def _engine(settings: dict[str, Any], where: str) -> Engine:
    if "kind" not in settings:
        raise SpecError(f"{where}: 'engine' names no kind: allowed are {quoted(sorted(ENGINES))}.")
    found = engine_class(str(settings["kind"]), where)
    own = {key: value for key, value in settings.items() if key != "kind" or ":" not in str(value)}
    parse(found.Settings, own, f"{where}, engine")
    return found(**own)


def written(overrides: Mapping[str, Any]) -> list[str]:
    """Each as ``training.epochs=3``."""
    return [
        f"{key}={value if isinstance(value, str) else json.dumps(value, default=str)}"
        for key, value in overrides.items()
    ]


def _set(content: dict[str, Any], key: str, value: Any, where: str) -> None:
    steps = key.split(".")
    if steps[0] not in StrategySpec.model_fields:
        raise SpecError(f"{where}, set: {unknown('key', steps[0], StrategySpec.model_fields)}")
    current: Any = content
    for step in steps[:-1]:
        if isinstance(current, list) and step.isdigit() and int(step) < len(current):
            current = current[int(step)]
            continue
        if isinstance(current, list):
            raise SpecError(f"{where}, set: '{key}' passes through a list: name one of its {len(current)} by number.")
        if current.get(step) is None:
            current[step] = {}
        current = current[step]
        if not isinstance(current, dict | list):
            raise SpecError(f"{where}, set: '{key}' goes below '{step}', which holds a plain value.")
    if isinstance(current, list):
        raise SpecError(f"{where}, set: '{key}' ends in a list: name one of its {len(current)} by number.")
    current[steps[-1]] = value
