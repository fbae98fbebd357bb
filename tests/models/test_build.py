"""Building a model from what the user names, and the sentences for what cannot be built."""

from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor, nn

from continual.errors import ModelError, SpecError
from continual.models.build import build_model
from continual.models.model import Model
from continual.models.spec import MLPSpec

ROWS = {"inputs": torch.arange(96, dtype=torch.uint8).reshape(6, 4, 4), "labels": torch.zeros(6, dtype=torch.int64)}


class Plain(nn.Module):
    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.layer = nn.Linear(16, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1).float())


class Wrapped(Plain):
    def forward(self, pixels: Tensor, how: str = "object") -> Any:
        logits = super().forward(pixels)
        return SimpleNamespace(logits=logits) if how == "object" else {"logits": logits}


class Mapped(Wrapped):
    def forward(self, pixels: Tensor) -> Any:
        return OrderedDict(logits=Plain.forward(self, pixels))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return (self.table(input_ids) * attention_mask[..., None]).sum(1)


class TokensOnly(Tokens):
    def forward(self, input_ids: Tensor) -> Tensor:
        return self.table(input_ids).sum(1)


class Anything(Tokens):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.table(args[0].flatten(1).long() % 10).sum(1) if args else super().forward(**kwargs)


class Bad(Plain):
    def __init__(self, returned: Any) -> None:
        super().__init__()
        self.returned = returned

    def forward(self, x: Tensor) -> Any:
        return self.returned


def sentence(error: type[Exception], spec: Any, **options: Any) -> str:
    with pytest.raises(error) as caught:
        build_model(spec, objective="classification", **options)
    assert type(caught.value) is error
    return str(caught.value)


def test_mlp_takes_its_inputs_from_the_rows_and_can_be_built_again_without_them() -> None:
    model = build_model("mlp", objective="classification", example=ROWS)
    assert (model.feature_size, model.gives_features, model.backbone.inputs) == (256, True, 16)
    again = build_model(model.spec, objective="classification")
    again.load_state_dict(model.state_dict())
    assert again.spec == model.spec
    torch.testing.assert_close(again.backbone(ROWS), model.backbone(ROWS), rtol=0, atol=0)


@pytest.mark.parametrize(
    "change",
    [{"hidden": [8]}, {"activation": "tanh"}, {"dropout": 0.5}, {"inputs": 9}],
    ids=lambda change: next(iter(change)),
)
def test_every_setting_of_an_mlp_changes_it(change: dict[str, Any]) -> None:
    base = {"kind": "mlp", "hidden": [8, 8], "inputs": 16}
    assert str(build_model(base, objective="regression")) != str(
        build_model({**base, **change}, objective="regression")
    )


def test_mlp_without_hidden_layers_gives_the_flat_inputs() -> None:
    model = build_model({"kind": "mlp", "hidden": []}, objective="classification", example=ROWS)
    torch.testing.assert_close(model.backbone(ROWS), ROWS["inputs"].flatten(1).float())
    assert model.feature_size == 16


def test_mlp_features_equal_a_hand_written_pass() -> None:
    model = build_model({"kind": "mlp", "hidden": [5, 4]}, objective="classification", example=ROWS)
    first, second = model.backbone.layers[0], model.backbone.layers[2]
    by_hand = torch.relu(second(torch.relu(first(ROWS["inputs"].reshape(6, 16).float()))))
    torch.testing.assert_close(model.backbone(ROWS), by_hand)


def test_mlp_says_what_is_wrong_with_its_rows() -> None:
    model = build_model("mlp", objective="classification", example=ROWS)
    with pytest.raises(ModelError, match="the rows have 9 inputs and the mlp takes 16"):
        model.backbone({"inputs": torch.zeros(2, 9)})
    with pytest.raises(ModelError, match="use a pretrained model for text"):
        model.backbone({"input_ids": torch.zeros(2, 9)})
    assert "use a pretrained model for text" in sentence(ModelError, "mlp", example={"input_ids": torch.zeros(1, 1)})
    assert "how many inputs" in sentence(ModelError, "mlp")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"kind": "mpl"}, "Did you mean 'mlp'?"),
        ({"hidden": [3]}, "the key 'kind' is missing"),
        ({"kind": "mlp", "hiden": [3]}, "Did you mean 'hidden'?"),
        ({"kind": "mlp", "hidden": [0]}, "greater than or equal to 1"),
        ({"kind": "mlp", "dropout": 1.0}, "dropout"),
        ({"kind": "mlp", "activation": "rely"}, "relu"),
        ({"kind": "pretrained"}, "'name' is missing"),
        ("no.such.module:Net", "cannot be imported"),
        ("collections:OrderedDict", "not a torch module"),
        (7, "names no model"),
    ],
)
def test_impossible_specs_are_refused_in_a_sentence(spec: Any, said: str) -> None:
    assert said in sentence(SpecError, spec)


def test_the_kinds_are_listed() -> None:
    assert "'mlp', 'module', 'pretrained'" in sentence(SpecError, {"kind": "banana"})


def test_a_model_that_cannot_be_reached_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("no connection\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    said = sentence(ModelError, "someone/some-model")
    assert "(no connection)" in said and "continual-memory[offline]" in said
    assert "there is no folder" in sentence(ModelError, "./nothing/here")


def test_an_object_must_be_handed_in_again() -> None:
    module = Plain()
    model = build_model(module, objective="classification")
    assert model.transformer is module and model.spec["kind"] == "object"
    assert model.spec["class"].endswith(":Plain") and model.spec["class"] in sentence(ModelError, model.spec)
    assert build_model(model, objective="classification") is model


def test_an_objective_that_a_model_is_not_for_is_refused() -> None:
    mlp = MLPSpec(inputs=4).model_dump()
    with pytest.raises(ModelError, match="cannot be trained for causal-lm, only for 'classification', 'regression'"):
        build_model(mlp, objective="causal-lm")
    with pytest.raises(ModelError, match="seq2seq"):
        build_model(Plain(), objective="seq2seq")


@pytest.mark.parametrize("module", [Plain(), Wrapped(), Mapped()], ids=lambda module: type(module).__name__)
def test_forms_of_a_users_output(module: Plain) -> None:
    model = build_model(module, objective="classification")
    output = model(ROWS)
    torch.testing.assert_close(output.logits, Plain.forward(module, ROWS["inputs"]))
    assert output.features is None and not model.gives_features


def test_a_module_is_called_with_the_columns_it_names() -> None:
    ids, mask = torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    batch = {"labels": torch.zeros(2, dtype=torch.int64), "input_ids": ids, "attention_mask": mask}
    for kind, masked in ((Tokens, True), (TokensOnly, False), (Anything, True)):
        module = kind()
        by_hand = torch.stack([module.table(row[:2] if masked and i else row).sum(0) for i, row in enumerate(ids)])
        torch.testing.assert_close(build_model(module, objective="classification")(batch).logits, by_hand)
    anything = Anything()
    assert build_model(anything, objective="classification")(ROWS).logits.shape == (6, 3)
    with pytest.raises(ModelError, match="reads the column 'input_ids'"):
        build_model(Tokens(), objective="classification")(ROWS)
    with pytest.raises(ModelError, match="reads the column 'inputs'"):
        build_model(Plain(), objective="classification")(batch)


@pytest.mark.parametrize(
    ("returned", "objective"),
    [
        ("text", "classification"),
        (SimpleNamespace(hidden=torch.zeros(6, 3)), "classification"),
        ({"scores": torch.zeros(6, 3)}, "classification"),
        (torch.zeros(6), "classification"),
        (torch.zeros(5, 3), "classification"),
        (torch.zeros(6, 3, 2), "regression"),
        (torch.zeros(6, 3), "causal-lm"),
    ],
)
def test_outputs_of_the_wrong_form_are_refused(returned: Any, objective: Any) -> None:
    with pytest.raises(ModelError, match=r"Bad returns"):
        build_model(Bad(returned), objective=objective)(ROWS)


def test_a_class_by_its_name_with_arguments() -> None:
    spec = {"kind": "module", "class": "torch.nn:Linear", "arguments": {"in_features": 4, "out_features": 2}}
    model = build_model(spec, objective="regression")
    assert model.spec == spec
    assert model({"inputs": torch.ones(3, 4)}).logits.shape == (3, 2)
    assert "could not be made" in sentence(ModelError, "torch.nn:Linear")
    assert isinstance(build_model("torch.nn:Flatten", objective="classification"), Model)


def test_a_module_in_half_precision_is_told_where_that_belongs() -> None:
    model = build_model(nn.Linear(3, 2).half())
    with pytest.raises(ModelError, match=r"Linear cannot take inputs of torch.float32 .*call .float\(\) on it"):
        model({"inputs": torch.zeros(4, 3)})
