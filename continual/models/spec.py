"""Which models can be asked for: ``{kind: mlp | pretrained | module, ...}``, or a name that stands for one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from continual.errors import SpecError, unknown
from continual.spec import Spec, parse

Activation = Literal["relu", "gelu", "silu", "tanh"]
Pooling = Literal["auto", "mean", "cls", "last"]


class MLPSpec(Spec):
    """A multi-layer perceptron whose last hidden layer gives the features.

    Attributes:
        hidden: width of each hidden layer, first to last; empty for a linear model.
        activation: after every hidden layer.
        dropout: probability, after every activation.
        inputs: numbers in one row, counted over all its axes; taken from the rows when left out.
    """

    kind: Literal["mlp"] = "mlp"
    hidden: tuple[Annotated[int, Field(ge=1)], ...] = (256, 256)
    activation: Activation = "relu"
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    inputs: int | None = Field(default=None, ge=1)


class PretrainedSpec(Spec):
    """A transformer of the Hugging Face hub or of a local folder.

    Attributes:
        name: hub name, ``all-MiniLM-L6-v2``, or a folder with ``config.json`` and safetensors.
        pooling: how the tokens' features become the row's. ``auto``: what the folder's own ``1_Pooling`` says, else
            ``last`` for a decoder and ``mean`` for an encoder. Not for language models.
        layers: hidden states, counted back from the last, that are pooled and laid side by side, each L2-normalised where
            there is more than one: wider features, which heads without gradients put to good use. Not for language models.
        max_length: tokens kept of a row.
        dtype: of the weights.
    """

    kind: Literal["pretrained"] = "pretrained"
    name: str = Field(min_length=1)
    pooling: Pooling = "auto"
    layers: int = Field(default=1, ge=1)
    max_length: int = Field(default=128, ge=1)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class ModuleSpec(Spec):
    """A module of the user's that gives logits itself: ``class: package.module:Class``, made with ``arguments``."""

    kind: Literal["module"] = "module"
    class_: str = Field(alias="class", min_length=1)
    arguments: dict[str, Any] = Field(default_factory=dict)


ModelSpec = MLPSpec | PretrainedSpec | ModuleSpec
KINDS: dict[str, type[MLPSpec] | type[PretrainedSpec] | type[ModuleSpec]] = {
    "mlp": MLPSpec,
    "pretrained": PretrainedSpec,
    "module": ModuleSpec,
}


def parse_model_spec(spec: str | Mapping[str, Any], where: str = "the model") -> ModelSpec:
    """Settings from a mapping or a name: ``mlp``, ``package.module:Class``, else a pretrained model.

    Raises:
        SpecError: an unknown kind or key, or an impossible value; the sentence begins with ``where``.
    """
    if isinstance(spec, str):
        if spec in KINDS:
            spec = {"kind": spec}
        elif ":" in spec and "/" not in spec and "\\" not in spec:
            spec = {"kind": "module", "class": spec}
        else:
            spec = {"kind": "pretrained", "name": spec}
    if not isinstance(spec, Mapping):
        raise SpecError(f"{where}: {spec!r} names no model: give a name, a mapping with a 'kind', or a torch module.")
    kind = spec.get("kind")
    if kind is None:
        raise SpecError(f"{where}: the key 'kind' is missing: add one of {', '.join(sorted(KINDS))}.")
    if not isinstance(kind, str) or kind not in KINDS:
        raise SpecError(f"{where}: {unknown('model kind', kind, KINDS)}")
    return parse(KINDS[kind], dict(spec), where)
