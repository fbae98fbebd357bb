"""What is saved of a model, what is not, and how it comes back."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

from continual.errors import ModelError, StateError
from continual.models.build import build_model
from continual.models.model import Model


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(4, 4), nn.Linear(4, 3), nn.BatchNorm1d(3)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.norm(self.second(self.first(batch["inputs"])))


def pretrained() -> Model:
    """A model with a base that counts as pretrained, frozen, under a head of two classes."""
    torch.manual_seed(0)
    model = Model(Base(), gives_features=True, objectives=("classification",), spec={}, feature_size=3)
    model.mark_pristine(model.backbone.parameters())
    model.backbone.requires_grad_(False)
    model.head = nn.Linear(3, 2)
    return model


HEAD = {"head.weight", "head.bias"}
BUFFERS = {f"backbone.norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}


@pytest.fixture(autouse=True)
def _keep_generator() -> object:
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


def test_a_frozen_base_is_not_saved_but_what_a_forward_pass_writes_is() -> None:
    model = pretrained()
    assert set(model.saved_tensors()) == HEAD | BUFFERS
    model.train()({"inputs": torch.randn(8, 4)})
    assert model.saved_tensors()["backbone.norm.num_batches_tracked"] == 1


def test_what_trains_or_was_altered_is_saved() -> None:
    model = pretrained()
    model.backbone.first.requires_grad_(True)
    first = {"backbone.first.weight", "backbone.first.bias"}
    assert set(model.saved_tensors()) == HEAD | BUFFERS | first
    model.mark_altered(model.backbone.first.parameters())
    model.backbone.first.requires_grad_(False)
    assert set(model.saved_tensors()) == HEAD | BUFFERS | first
    model.mark_pristine(model.backbone.first.parameters())
    assert set(model.saved_tensors()) == HEAD | BUFFERS


def test_pristine_parameters_are_known_inside_peft_and_after_a_copy() -> None:
    model = pretrained()
    config = peft.LoraConfig(r=2, target_modules=["first"])
    model.transformer = peft.get_peft_model(model.transformer, config)
    assert model.transformer is model.backbone
    for one in (model, copy.deepcopy(model)):
        names = set(one.saved_tensors())
        assert {
            name for name in names if "lora" not in name and "norm.running" not in name and "num_b" not in name
        } == HEAD
        assert len([name for name in names if "lora_" in name]) == 2


def test_round_trip_into_a_fresh_model() -> None:
    model, fresh = pretrained(), pretrained()
    with torch.no_grad():
        model.head.weight.add_(1)
        model.backbone.first.weight.add_(1)
    model.mark_altered([model.backbone.first.weight])
    saved = {name: tensor.clone() for name, tensor in model.saved_tensors().items()}
    held = fresh.head.weight
    fresh.load_saved(saved)
    assert fresh.head.weight is held
    inputs = {"inputs": torch.randn(5, 4)}
    torch.testing.assert_close(fresh.eval()(inputs).logits, model.eval()(inputs).logits, rtol=0, atol=0)
    assert set(fresh.saved_tensors()) == set(saved)


def test_a_state_of_another_model_is_refused_and_changes_nothing() -> None:
    model = pretrained()
    saved = {name: tensor.clone() + 1 for name, tensor in model.saved_tensors().items()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for change, said in (
        ({"head.bias": None}, "lacks 'head.bias'"),
        ({"head.more": torch.zeros(1)}, "'head.more', which this model does not have"),
        ({"head.weight": torch.zeros(3, 3)}, r"shape \(3, 3\) and has shape \(2, 3\)"),
    ):
        wrong = {name: tensor for name, tensor in {**saved, **change}.items() if tensor is not None}
        with pytest.raises(StateError, match=said):
            model.load_saved(wrong)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_users_module_is_what_adapters_wrap() -> None:
    module, other = nn.Linear(2, 2), nn.Linear(2, 2)
    model = build_model(module, objective="classification")
    assert model.transformer is module
    model.transformer = other
    assert model.backbone.module is other
    inputs = {"inputs": torch.ones(1, 2)}
    torch.testing.assert_close(model(inputs).logits, other(inputs["inputs"]))


def test_features_without_a_head_are_refused() -> None:
    model = build_model({"kind": "mlp", "inputs": 2}, objective="classification")
    with pytest.raises(ModelError, match="has no head"):
        model({"inputs": torch.zeros(1, 2)})


def test_logits_are_the_heads_and_features_the_backbones() -> None:
    model = pretrained().eval()
    inputs = {"inputs": torch.randn(3, 4)}
    output = model(inputs)
    torch.testing.assert_close(output.features, model.backbone(inputs))
    torch.testing.assert_close(output.logits, model.head(output.features))
