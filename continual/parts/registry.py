"""Which parts there are: ``slot`` → ``kind`` → where its class lies. Nothing is imported until it is used."""

from __future__ import annotations

from continual.errors import SpecError, unknown
from continual.parts.part import SLOTS, Part, Slot
from continual.spec import load_object

PARTS: dict[Slot, dict[str, str]] = {
    "adapter": {
        "lora": "continual.parts.adapter.lora:LoRA",
        "adalora": "continual.parts.adapter.adalora:AdaLoRA",
        "prompt": "continual.parts.adapter.prompt:Prompt",
        "prefix": "continual.parts.adapter.prefix:Prefix",
    },
    "head": {
        "linear": "continual.parts.head.linear:LinearHead",
        "nearest-mean": "continual.parts.head.nearest_mean:NearestMeanHead",
        "neighbours": "continual.parts.head.neighbours:NeighboursHead",
        "slda": "continual.parts.head.slda:SLDAHead",
        "ridge": "continual.parts.head.ridge:RidgeHead",
        "klda": "continual.parts.head.klda:KLDAHead",
        "vae-classifier": "continual.parts.head.vae_classifier:VaeClassifierHead",
        "exemplar-means": "continual.parts.head.exemplar_means:ExemplarMeansHead",
    },
    "replay": {
        "rehearsal": "continual.parts.replay.rehearsal:Rehearsal",
        "dark": "continual.parts.replay.dark:Dark",
        "mir": "continual.parts.replay.mir:MIR",
        "generative": "continual.parts.replay.generative:GenerativeReplay",
        "feature-vae": "continual.parts.replay.feature_vae:FeatureVAE",
        "gdumb": "continual.parts.replay.gdumb:GDumb",
        "gaussian": "continual.parts.replay.gaussian:GaussianReplay",
    },
    "penalty": {
        "ewc": "continual.parts.penalty.ewc:EWC",
        "l2": "continual.parts.penalty.l2:L2",
        "mas": "continual.parts.penalty.mas:MAS",
        "orthogonal": "continual.parts.penalty.orthogonal:Orthogonal",
        "rwalk": "continual.parts.penalty.rwalk:RWalk",
        "si": "continual.parts.penalty.si:SI",
    },
    "distillation": {
        "binary": "continual.parts.distillation.binary:BinaryDistillation",
        "feature-distillation": "continual.parts.distillation.features:FeatureDistillation",
        "lwf": "continual.parts.distillation.lwf:LwF",
    },
    "projection": {
        "agem": "continual.parts.projection.agem:AGEM",
        "gem": "continual.parts.projection.gem:GEM",
        "ogd": "continual.parts.projection.ogd:OGD",
        "osf": "continual.parts.projection.osf:OSF",
    },
    "recall": {},
}


def part_class(slot: Slot, kind: str, where: str) -> type[Part]:
    """The class behind ``kind`` in ``slot``, or behind ``package.module:Class``.

    Raises:
        SpecError: there is no such part; the nearest name is offered.
    """
    if ":" in kind:
        found = load_object(kind, where)
        if not (isinstance(found, type) and issubclass(found, Part)):
            raise SpecError(f"{where}: '{kind}' is not a part: derive it from continual.parts.Part.")
        if found.slot != slot:
            raise SpecError(f"{where}: '{kind}' belongs under '{found.slot}', not under '{slot}'.")
        return found
    if kind not in PARTS[slot]:
        raise SpecError(f"{where}: {unknown(f'{slot} kind', kind, PARTS[slot])}")
    known: type[Part] = load_object(PARTS[slot][kind], where)
    return known


__all__ = ["PARTS", "SLOTS", "part_class"]
