"""One plain LoRA folder from every kind of adapter, read back by stock PEFT on a pristine base."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from adapter_bench import FAMILIES, Bench, assert_same, base_of, batch_of, tensors_of
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from continual.errors import CompositionError, ModelError, StateError
from continual.models.build import build_model
from continual.parts.adapter import export
from continual.parts.adapter.adalora import AdaLoRA
from continual.parts.adapter.export import check_base, export_adapter, total_folds
from continual.parts.adapter.lora import LoRA
from continual.parts.adapter.targets import shortest
from continual.parts.context import TrainingContext
from continual.streams.experience import Experience
from continual.table import TensorTable

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT 0.21's, 2026

PARTS: dict[str, Any] = {
    "lora-continue": lambda: LoRA(rank=3, use_rslora=True),
    "lora-stack": lambda: LoRA(rank=3, across_tasks="stack"),
    "lora-merge": lambda: LoRA(rank=3, across_tasks="merge"),
    "adalora-stack": lambda: AdaLoRA(init_rank=3, target_rank=1, across_tasks="stack"),
    "adalora-merge": lambda: AdaLoRA(init_rank=3, target_rank=1),
}


def trained(family: str, kind: str, tasks: int = 3) -> Bench:
    bench = Bench(family, PARTS[kind](), lr=3e-2)
    for task in range(tasks):
        bench.task(task, 5)
    return bench


@torch.no_grad()
def hidden(transformer: nn.Module, family: str) -> Tensor:
    batch = batch_of(family, 7)
    transformer.eval()
    if family == "mlp":
        found: Tensor = transformer.float()(batch)
        return found
    output = transformer(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return output.logits if family == "llama" else output.last_hidden_state


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", PARTS)
def test_stock_peft_gives_the_same_answers(family: str, kind: str, tmp_path: Path) -> None:
    bench = trained(family, kind)
    folder = export_adapter(bench.model, bench.part, tmp_path / "adapter")
    assert folder == tmp_path / "adapter"
    wanted = hidden(
        bench.model.transformer.double(), family
    )  # so that what remains is of the folding, not of the passes
    pristine = base_of(family).double()
    plain = hidden(pristine, family)
    stock = PeftModel.from_pretrained(pristine, folder)
    torch.testing.assert_close(hidden(stock, family), wanted, rtol=0, atol=1e-5)
    assert (plain - wanted).abs().max() > 1e-2, "the tasks have changed something"
    configuration = json.loads((folder / "adapter_config.json").read_text())
    assert configuration["peft_type"] == "LORA" and configuration["modules_to_save"] is None
    assert configuration["base_model_name_or_path"] == f"tiny-{family}"
    assert configuration["task_type"] == ("CAUSAL_LM" if family == "llama" else None)
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        layer = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
        rank = tensor.shape[0] if ".lora_A." in name else tensor.shape[1]
        assert rank == json.loads((folder / "continual.json").read_text())["ranks"][layer] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_a_pooler_that_the_reader_has_and_we_have_not_gets_no_adapter(tmp_path: Path) -> None:
    bench = Bench("bert", LoRA(rank=3), lr=3e-2)
    bench.model.transformer.pooler = None  # as a pretrained model of ours is loaded
    bench.task(0, 5)
    folder = export_adapter(bench.model, bench.part, tmp_path / "adapter")
    whole = base_of("bert")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        stock = PeftModel.from_pretrained(whole, folder)
    assert not any("pooler" in name and "lora" in name for name, _ in stock.named_parameters())
    torch.testing.assert_close(hidden(stock, "bert"), hidden(bench.model.transformer, "bert"), rtol=0, atol=1e-5)


def test_ranks_add_up_and_continue_keeps_its_own() -> None:
    for kind, rank in (("lora-continue", 3), ("lora-stack", 9), ("lora-merge", 9)):
        folds = total_folds(trained("mlp", kind).part.adapters)
        assert {A.shape[0] for A, _ in folds.values()} == {rank}


def test_layers_without_rank_are_no_targets(tmp_path: Path) -> None:
    bench = trained("bert", "adalora-merge", tasks=1)
    folder = export_adapter(bench.model, bench.part, tmp_path / "adapter")
    configuration = json.loads((folder / "adapter_config.json").read_text())
    record = json.loads((folder / "continual.json").read_text())
    left = bench.part.history[0]["ranks"]
    assert left["pooler.dense"] == 0 and record["ranks"] == {name: rank for name, rank in left.items() if rank}
    stock = PeftModel.from_pretrained(base_of("bert"), folder)
    loaded = {name for name, module in stock.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert loaded == set(record["ranks"])
    assert configuration["rank_pattern"] == configuration["alpha_pattern"]


def test_export_leaves_the_model_alone_and_can_be_repeated(tmp_path: Path) -> None:
    bench = trained("bert", "lora-stack", tasks=2)
    before = tensors_of(bench)
    first = export_adapter(bench.model, bench.part, tmp_path / "adapter")
    content = (first / "adapter_model.safetensors").read_bytes()
    export_adapter(bench.model, bench.part, tmp_path / "adapter")
    assert (first / "adapter_model.safetensors").read_bytes() == content
    assert_same(before, tensors_of(bench))


@pytest.mark.parametrize("kind", ["lora-merge", "adalora-merge"])
def test_a_rebuilt_model_exports_the_same_bytes(kind: str, tmp_path: Path) -> None:
    bench = trained("llama", kind)
    again = Bench.load("llama", PARTS[kind](), bench.save(), task=2)
    assert_same(tensors_of(bench), tensors_of(again))
    first = export_adapter(bench.model, bench.part, tmp_path / "a")
    second = export_adapter(again.model, again.part, tmp_path / "b")
    for name in ("adapter_model.safetensors", "adapter_config.json", "continual.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_max_rank_is_kept(tmp_path: Path) -> None:
    bench = trained("bert", "lora-stack", tasks=2)
    with pytest.raises(CompositionError, match="rank 6 and max_rank is 5"):
        export_adapter(bench.model, bench.part, tmp_path / "adapter", max_rank=5)
    assert not list(tmp_path.iterdir())
    export_adapter(bench.model, bench.part, tmp_path / "adapter", max_rank=6)


def test_nothing_learned_is_refused(tmp_path: Path) -> None:
    fresh = Bench("bert", LoRA())
    with pytest.raises(CompositionError, match="nothing that could be exported"):
        export_adapter(fresh.model, fresh.part, tmp_path / "adapter")
    begun = Bench("bert", AdaLoRA())
    begun.begin(0, 5)
    with pytest.raises(CompositionError, match="nothing that could be exported"):
        export_adapter(begun.model, begun.part, tmp_path / "adapter")


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    bench = trained("bert", "lora-continue", tasks=1)
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(StateError, match="not an exported adapter"):
        export_adapter(bench.model, bench.part, tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    with pytest.raises(StateError, match="not an exported adapter"):
        export_adapter(bench.model, bench.part, tmp_path / "thesis.txt")


def test_a_write_that_fails_leaves_the_earlier_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = trained("bert", "lora-continue", tasks=1)
    folder = export_adapter(bench.model, bench.part, tmp_path / "adapter")
    content = (folder / "adapter_model.safetensors").read_bytes()
    bench.task(1, 3)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(StateError, match="No space left"):
        export_adapter(bench.model, bench.part, folder)
    assert (folder / "adapter_model.safetensors").read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_a_wrong_base_is_named(tmp_path: Path) -> None:
    bench = trained("bert", "lora-continue", tasks=1)
    folder = export_adapter(bench.model, bench.part, tmp_path / "adapter")
    check_base(folder, "a" * 64)
    with pytest.raises(ModelError, match="belongs to the base 'tiny-bert'"):
        check_base(folder, "b" * 64)
    with pytest.raises(ModelError, match="does not say what base"):
        check_base(tmp_path, "a" * 64)
    bench.model.base_sha256 = None
    export_adapter(bench.model, bench.part, folder)
    with pytest.raises(ModelError, match="no SHA-256"):
        check_base(folder, "a" * 64)


@pytest.mark.parametrize(
    ("modules", "wanted", "written"),
    [
        (["h.0.q", "h.1.q", "h.0.v"], ["h.0.q", "h.1.q"], ["q"]),
        (["h.0.q", "h.1.q"], ["h.1.q"], ["h.1.q"]),
        (["0", "1", "2.0"], ["0"], r"0"),
        (["net.0", "deep.net.0"], ["net.0"], r"net\.0"),
    ],
)
def test_target_names_match_exactly(modules: list[str], wanted: list[str], written: object) -> None:
    assert shortest(modules, wanted) == written


@pytest.mark.parametrize("kind", ["lora-stack", "adalora-merge"])
@pytest.mark.parametrize("family", ["llama", "roberta", "distilbert"])
def test_the_head_of_a_classifier_trains_in_full_and_goes_with_the_adapter(
    family: str, kind: str, tmp_path: Path
) -> None:
    """It begins at random, so a base that is loaded anew has another one; layers of a head carry no adapter."""

    def made(seed: int) -> Any:
        plain = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        plain |= {"vocab_size": 20, "num_labels": 3, "pad_token_id": 0, "hidden_dropout_prob": 0.0}
        sizes = plain if family != "distilbert" else {"dim": 16, "hidden_dim": 16, "n_layers": 1, "n_heads": 2, **plain}
        kinds = {
            "llama": (transformers.LlamaForSequenceClassification, transformers.LlamaConfig),
            "roberta": (transformers.RobertaForSequenceClassification, transformers.RobertaConfig),
            "distilbert": (transformers.DistilBertForSequenceClassification, transformers.DistilBertConfig),
        }
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return kinds[family][0](kinds[family][1](**sizes)).eval()

    heads = {"llama": ["score"], "roberta": ["classifier"], "distilbert": ["pre_classifier", "classifier"]}[family]
    module, part = made(1), PARTS[kind]()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    model = build_model(module, objective="classification")
    ids = torch.randint(1, 20, (6, 5), generator=torch.Generator().manual_seed(2))
    table = TensorTable({"input_ids": ids, "labels": torch.arange(6) % 3, "row": torch.arange(6)})
    loop = TrainingContext(model, [part], torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3))
    for task in range(2):
        loop.begin(Experience(task, f"task {task}", table, classes=(0, 1, 2)), steps=4)
        names = {
            name.removeprefix("backbone.module.").partition(".")[0] for name in loop.parameters() if "lora" not in name
        }
        assert names == set(heads)
        for _ in range(4):
            loop.optimizer.zero_grad()  # type: ignore[union-attr]
            loop.backward(table[torch.arange(6)])
            loop.optimizer.step()  # type: ignore[union-attr]
            loop.after_step()
        loop.end()
    assert not any(layer.startswith(tuple(heads)) for layer in part.adapters.layers)
    folder = export_adapter(model, part, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == heads
    other = made(3)
    body = {name: tensor for name, tensor in before.items() if name.partition(".")[0] not in heads}
    other.load_state_dict(body, strict=False)
    loaded = PeftModel.from_pretrained(other, str(folder)).eval()
    module.eval()
    with torch.no_grad():
        wanted = module(input_ids=ids).logits
        torch.testing.assert_close(loaded(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-5)
