"""What cannot be inside a trainer is refused in one sentence, before anything has changed; what is ignored is named once."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import AdaLoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from trainer_bench import PARTS, arguments, classifier, collate, language_model, rows, tokenizer, trained
from transformers import EarlyStoppingCallback, Trainer
from trl import SFTConfig, SFTTrainer

from continual.errors import CompositionError, ContinualError, ModelError, StateError, StreamError
from continual.interop.transformers import Continual
from continual.interop.transformers.rows import DatasetTable, owned, row_ids
from continual.state import load_state, save_state

# peft 0.21 reads an attribute that transformers 5.23 has deprecated (seen November 2026).
# trl 1.16 sets one too.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def _quick_collection() -> Iterator[None]:
    """accelerate collects garbage before every training: not among what was there before."""
    gc.freeze()
    yield
    gc.unfreeze()


class OwnLoss(Trainer):  # type: ignore[misc]
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)


class OwnLoader(Trainer):  # type: ignore[misc]
    def get_train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(rows(0), batch_size=4, collate_fn=collate)


class Stream(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(rows(0))


@pytest.mark.parametrize(
    "strategy, sentence",
    [
        ("cumulative", "data: cumulative, and a trainer reads its own train_dataset"),
        ("joint", "data: joint"),
        ("slda", "head/slda needs a model that gives features"),
        ("herding-rehearsal", "features"),
        ("feature-distillation", "needs a model that gives features"),
    ],
)
def test_strategies_that_do_not_fit(strategy: str, sentence: str, tmp_path: Path) -> None:
    model = classifier()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with warnings.catch_warnings(), pytest.raises(ContinualError, match=sentence):
        warnings.simplefilter("ignore", UserWarning)
        trained(Continual(strategy), model, 0, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"torch_compile": True}, "torch_compile"),
        ({"optim": "lomo"}, "optim 'lomo' steps during the backward pass"),
        ({"kind": OwnLoss}, "OwnLoss has a loss of its own"),
        ({"train_dataset": Stream(), "max_steps": 3}, "Stream, whose rows cannot be counted"),
        ({"train_dataset": rows(0)[:0]}, "train_dataset has no rows"),
        ({"train_dataset": [{**row, "row": 7} for row in rows(0)]}, "column 'row' of train_dataset is no id"),
        ({"kind": OwnLoader}, "do not say which rows they hold"),
        ({"eval_dataset": rows(0)[:3]}, "3 test rows of 'e0' have the same content as its training rows"),
    ],
)
def test_trainers_that_do_not_fit(options: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ContinualError, match=sentence):
        trained(Continual(PARTS["rehearsal"]), classifier(), 0, tmp_path, **options)


def test_several_devices_model_init_and_a_missing_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {"data_collator": collate, "train_dataset": rows(0), "callbacks": [Continual({})]}
    with pytest.raises(CompositionError, match="model_init makes a new model"):
        Trainer(model_init=lambda: classifier(), args=arguments(tmp_path), **given)
    with monkeypatch.context() as patch, pytest.raises(CompositionError, match="several devices"):
        patch.setattr(transformers.TrainingArguments, "n_gpu", 2)
        Trainer(classifier(), arguments(tmp_path), **{**given, "callbacks": [Continual({})]})
    with monkeypatch.context() as patch, pytest.raises(CompositionError, match="has no '_load_from_checkpoint' in its"):
        patch.delattr(Trainer, "_load_from_checkpoint")
        Trainer(classifier(), arguments(tmp_path), **{**given, "callbacks": [Continual({})]})
    with pytest.raises(CompositionError, match="load_best_model_at_end would load a checkpoint over the adapter"):
        options = {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}
        trained(Continual(PARTS["adalora"]), classifier(), 0, tmp_path, **options)
    with pytest.raises(CompositionError, match="two callbacks of Continual"):
        trained(Continual({}), classifier(), 0, tmp_path, callbacks=[Continual({})])


def test_models_that_do_not_fit(tmp_path: Path) -> None:
    model = classifier()
    model.config.problem_type = "multi_label_classification"
    with pytest.raises(ModelError, match="multi_label_classification"):
        trained(Continual({}), model, 0, tmp_path)

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = classifier()

        def forward(self, input_ids: Any, attention_mask: Any = None, labels: Any = None) -> Any:
            return self.inner(input_ids=input_ids, attention_mask=attention_mask)

    with pytest.raises(ModelError, match="cannot be told from its class"):
        trained(Continual({}), Own(), 0, tmp_path)
    own, same = Own(), classifier()
    trained(Continual({}, objective="classification"), own, 0, tmp_path)
    trained(Continual({}), same, 0, tmp_path)
    assert torch.equal(own.inner.classifier.weight, same.classifier.weight)
    config = transformers.T5Config(d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2, vocab_size=20)
    with pytest.raises(ModelError, match="has an encoder and a decoder"):
        trained(Continual({}), transformers.T5ForConditionalGeneration(config), 0, tmp_path)


def test_peft_models_and_packed_rows_that_do_not_fit(tmp_path: Path) -> None:
    import datasets

    def sft(model: nn.Module, **options: Any) -> None:
        plain = {"use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "max_length": 16}
        data = datasets.Dataset.from_list([{"text": "red green blue"}] * 4)
        SFTTrainer(
            model,
            SFTConfig(str(tmp_path), **{**plain, **options}),
            train_dataset=data,
            processing_class=tokenizer(),
            callbacks=[Continual({})],
        ).train()

    adalora = AdaLoraConfig(init_r=4, target_r=2, total_step=10, task_type="CAUSAL_LM", target_modules=["q_proj"])
    with pytest.raises(CompositionError, match=r"PEFT's AdaLoRA.*adapter: \{kind: adalora\}"):
        sft(get_peft_model(language_model(), adalora))
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(CompositionError, match="virtual tokens"):
        sft(get_peft_model(language_model(), prompts))
    with pytest.raises(CompositionError, match="loss of its own"):
        sft(language_model(), loss_type="dft")
    with pytest.raises(CompositionError, match="packed into one"):
        sft(language_model(), padding_free=True, max_length=None)


def test_one_warning_names_every_setting_that_is_not_used(tmp_path: Path) -> None:
    memory = Continual("lora-rehearsal")
    with pytest.warns(UserWarning) as caught:
        trained(memory, classifier(), 0, tmp_path, label_smoothing_factor=0.1)
    (sentence,) = [str(one.message) for one in caught if "these settings are not used" in str(one.message)]
    for named in ("optimizer", "lr", "head_lr", "epochs", "batch_size"):
        assert f"'training.{named}'" in sentence
    assert "head (the model's own is trained)" in sentence and "label_smoothing_factor" in sentence
    trained(memory, memory.session.module, 1, tmp_path)


def test_rows_that_measure_are_no_rows_that_select(tmp_path: Path) -> None:
    memory = Continual({})
    options: dict[str, Any] = {
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
    }
    trained(memory, classifier(), 0, tmp_path, callbacks=[EarlyStoppingCallback(2)], **options)
    assert memory.retention is None and "selects by eval_dataset" in str(memory)
    sets = {"valid": rows(1, test=True)[:5], "test": rows(1, test=True)[5:]}
    several = Continual({})
    trained(several, classifier(), 1, tmp_path, eval_dataset=sets)
    assert "eval_dataset holds 'valid', 'test'" in str(several)
    named = Continual({}, test="test")
    trained(named, classifier(), 1, tmp_path, eval_dataset=sets)
    assert named.retention is not None and named.retention.lines[0].rows == 5
    with pytest.raises(
        StreamError, match="test='tset' names one of the trainer's eval_dataset, which has 'valid', 'test'"
    ):
        trained(Continual({}, test="tset"), classifier(), 1, tmp_path, eval_dataset=sets)
    given = Continual({}, test=rows(1, test=True)[:4])
    trained(given, classifier(), 1, tmp_path)
    assert given.retention is not None and given.retention.lines[0].rows == 4


def test_training_rows_of_an_earlier_test_set_and_names_used_twice(tmp_path: Path) -> None:
    memory, model = Continual(PARTS["rehearsal"]), classifier()
    trained(memory, model, 0, tmp_path)
    held = memory.parts[0].rows()
    with pytest.raises(StreamError, match="2 training rows of 'e1' have the same content as test rows of earlier"):
        trained(memory, model, 1, tmp_path, train_dataset=[*rows(1), *rows(0, test=True)[:2]])
    with pytest.raises(StateError, match="'e0' was learnt already"):
        trained(memory, model, 0, tmp_path)
    assert torch.equal(held, memory.parts[0].rows())
    trained(memory, model, 1, tmp_path, eval_dataset=[*rows(1, test=True), *rows(0)[:3]])
    assert "3 of the 13 test rows of 'e1' have the same content as rows that earlier updates trained on" in str(memory)


def test_a_loss_that_is_not_finite_stops_before_the_step(tmp_path: Path) -> None:
    model = classifier()
    with torch.no_grad():
        model.classifier.bias[0] = torch.nan
    weight = model.classifier.weight.clone()
    memory = Continual(PARTS["ewc"])
    with pytest.raises(ContinualError, match=r"the loss is not finite at step 0 \(from objective; rows 0, 1, 2, 3"):
        trained(memory, model, 0, tmp_path)
    assert torch.equal(weight, model.classifier.weight)
    with pytest.raises(StateError, match="has not come to its end"):
        memory.save(tmp_path / "state")
    with pytest.raises(StateError, match="broke off in its middle"):
        trained(memory, model, 0, tmp_path)


def test_states_that_are_not_this_ones(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="nothing has been trained yet"):
        Continual({}).save(tmp_path / "state")
    memory = Continual(PARTS["lora-rehearsal"])
    trained(memory, classifier(), 0, tmp_path, save_strategy="epoch")
    memory.save(tmp_path / "state")
    with pytest.raises(ModelError, match="another SHA-256"):
        trained(Continual.load(tmp_path / "state"), classifier(seed=1), 1, tmp_path)
    with pytest.raises(StateError, match="another strategy"):
        Continual.load(tmp_path / "state", strategy="ewc")
    with pytest.raises(CompositionError, match="another model object"):
        trained(memory, classifier(), 1, tmp_path)
    with pytest.raises(StateError, match="begins with a model as it came"):
        trained(memory, memory.session.module, 1, tmp_path, resume=str(next(tmp_path.glob("checkpoint-*"))))
    with pytest.raises(StateError, match="another strategy"):
        trained(Continual({}), classifier(), 0, tmp_path, resume=True)
    other = Continual(PARTS["lora-rehearsal"])
    with pytest.raises(StateError, match="stands in the middle of 'e0', and 'e1' was given"):
        trained(other, classifier(), 1, tmp_path, resume=True)
    bare = tmp_path / "bare"
    Trainer(classifier(), arguments(bare, save_strategy="epoch"), data_collator=collate, train_dataset=rows(0)).train()
    with pytest.raises(StateError, match="was written without Continual"):
        trained(Continual({}), classifier(), 0, bare, resume=True)
    state = load_state(tmp_path / "state")
    save_state(tmp_path / "strange", {**state, "strategy": {"replay": {"kind": "somewhere.else:Part"}}})
    with pytest.raises(StateError, match=r"asks to use 'somewhere\.else:Part'"):
        Continual.load(tmp_path / "strange")
    save_state(tmp_path / "old", {**state, "format": 0})
    with pytest.raises(StateError, match="has format 0, this version reads 2"):
        Continual.load(tmp_path / "old")
    save_state(tmp_path / "part", {key: value for key, value in state.items() if key != "parts"})
    with pytest.raises(StateError, match="it lacks 'parts'"):
        Continual.load(tmp_path / "part")
    save_state(tmp_path / "half", {**state, "owner": None})
    with pytest.raises(StateError, match="no whole state of a trainer"):
        trained(Continual.load(tmp_path / "half"), classifier(), 1, tmp_path)


def test_added_to_a_trainer_that_was_made_before(tmp_path: Path) -> None:
    memory = Continual(PARTS["ewc"])
    trainer = Trainer(classifier(), arguments(tmp_path), data_collator=collate, train_dataset=rows(0))
    trainer.add_callback(memory)
    with pytest.raises(CompositionError, match=r"call memory.attach\(trainer\)"):
        trainer.train()
    memory.attach(trainer)
    trainer.train()
    assert [update.name for update in memory.updates] == ["update-1"]


def test_rows_of_a_data_set_read_once_are_what_its_batches_hold() -> None:
    data = [{**row, "row": 100 + place} for place, row in enumerate(rows(0))]
    columns = ("input_ids", "attention_mask", "unheard_of")
    table = DatasetTable(data, collate, columns, row_ids(data, 0, 0, "data"))
    copy = owned(table)
    assert table.names == ("input_ids", "attention_mask", "labels", "row")
    assert table.column("row").tolist() == list(range(100, 122)) == copy.column("row").tolist()
    assert table.column("labels").tolist() == [row["labels"] for row in data]
    assert table.lengths is not None and table.lengths.tolist() == [len(row["input_ids"]) for row in data]
    index = torch.tensor([3, 1, 20])
    for name, column in table[index].items():
        assert torch.equal(column, copy[index][name]), name
    for name in ("input_ids", "nowhere"):
        with pytest.raises(StreamError, match=f"no column '{name}'"):
            table.column(name)
    with pytest.raises(StreamError, match="no 'labels'"):
        DatasetTable([{"input_ids": [1]}], lambda items: {"input_ids": torch.ones(1, 1)}, columns, torch.zeros(1))[
            torch.zeros(1, dtype=torch.int64)
        ]
