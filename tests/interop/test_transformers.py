"""A strategy inside a trainer: the same weights as under our learner, memory over months, checkpoints, both kinds of model."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from trainer_bench import (
    PARTS,
    arguments,
    classifier,
    collate,
    experience,
    language_model,
    learnt,
    rows,
    same,
    sentences,
    tokenizer,
    trained,
    weights,
)
from transformers import Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from continual import Experience, Monitor
from continual.interop.transformers import Continual, ContinualMixin
from continual.interop.transformers.rows import owned

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


@pytest.mark.parametrize("place, name", list(enumerate(PARTS)))
def test_the_same_weights_and_figures_as_under_our_learner(place: int, name: str, tmp_path: Path) -> None:
    """Every second one with accumulation, whose last step of an epoch has fewer batches and the last batch fewer rows."""
    accumulate = (1, 4)[place % 2]
    learner = learnt(PARTS[name], classifier(), [experience(index) for index in range(2)], accumulate=accumulate)
    memory, model = Continual(PARTS[name], seed=3), classifier()
    for index in range(2):
        trained(memory, model, index, tmp_path, gradient_accumulation_steps=accumulate)
    same(weights(learner.model), weights(memory.session.model))
    assert memory.monitor is not None and learner.monitor is not None
    assert memory.monitor.metrics() == learner.monitor.metrics()
    for one, other in zip(memory.parts, learner.parts, strict=True):
        assert torch.equal(one.rows().sort().values, other.rows().sort().values)
    assert sum(update.rows for update in memory.updates) == learner.cost["rows_trained"]


def test_without_parts_a_trainer_does_what_it_did(tmp_path: Path) -> None:
    """Dropout and shuffling included: nothing of ours draws from the trainer's generators."""
    for data in (rows(0), datasets.Dataset.from_list(rows(0, text="not read by the model"))):
        for sampling in ("random", "group_by_length"):
            options = {"train_sampling_strategy": sampling}
            plain, ours = classifier(dropout=0.2), classifier(dropout=0.2)
            Trainer(plain, arguments(tmp_path, **options), data_collator=collate, train_dataset=data).train()
            memory = Continual({"training": {"active": "all"}})
            trained(memory, ours, 0, tmp_path, train_dataset=data, **options)
            for name, tensor in weights(plain).items():
                torch.testing.assert_close(weights(ours)[name], tensor, rtol=1e-4, atol=1e-6)


def test_classes_not_met_yet_do_not_compete_unless_the_strategy_says_so(tmp_path: Path) -> None:
    seen, everything = classifier(), classifier()
    trained(Continual({}), seen, 0, tmp_path)
    trained(Continual({"training": {"active": "all"}}), everything, 0, tmp_path)
    begun = classifier().classifier.bias
    assert torch.equal(seen.classifier.bias[2:], begun[2:]) and not torch.equal(seen.classifier.bias[:2], begun[:2])
    assert not torch.equal(everything.classifier.bias[2:], begun[2:])


def test_rehearsal_remembers_ewc_drifts_less_and_the_memory_is_bounded(tmp_path: Path) -> None:
    found = {}
    strategies: dict[str, dict[str, Any]] = {
        "nothing": {},
        "rehearsal": PARTS["rehearsal"],
        "ewc": {"penalty": {"kind": "ewc", "strength": 1e5}},
    }
    for name, strategy in strategies.items():
        memory, model = Continual(strategy, seed=3), classifier()
        trained(memory, model, 0, tmp_path)
        first = weights(model)
        trained(memory, model, 1, tmp_path)
        drift = sum(float((weights(model)[key] - tensor).square().sum()) for key, tensor in first.items()) ** 0.5
        found[name] = (memory, drift)
    assert found["ewc"][1] < 0.8 * found["nothing"][1]
    old = {name: memory.retention.lines[0].after for name, (memory, _) in found.items()}
    assert min(old["ewc"], old["rehearsal"]) > old["nothing"] + 0.3
    memory = found["rehearsal"][0]
    held, size = memory.parts[0].rows(), memory.state_bytes()["replay/rehearsal"]
    trained(memory, memory.session.module, 2, tmp_path)
    assert len(held) == len(memory.parts[0].rows()) == 12
    assert memory.state_bytes()["replay/rehearsal"] <= 1.2 * size
    assert memory.session.loop.experience is None and not memory._tables, "no data set is kept alive"


class CutOff(TrainerCallback):  # type: ignore[misc]
    """Stands for a kill after some steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("place, name", list(enumerate(PARTS)))
def test_cut_and_resumed_from_a_checkpoint_is_uncut_bit_for_bit(place: int, name: str, tmp_path: Path) -> None:
    """Dropout and shuffled rows included; the checkpoints lie within an epoch, at its end, and after the last step."""
    cut = (5, 7)[place % 2]
    options: dict[str, Any] = {"train_sampling_strategy": "random", "save_strategy": "steps", "save_steps": 2}
    whole, model = Continual(PARTS[name]), classifier(dropout=0.1)
    trained(whole, model, 0, tmp_path / "first", **options)
    whole.save(tmp_path / "month")
    trained(whole, model, 1, tmp_path / "uncut", **options)

    memory = Continual.load(tmp_path / "month")
    with pytest.raises(KeyboardInterrupt):
        trained(memory, classifier(dropout=0.1), 1, tmp_path / "cut", callbacks=[CutOff(cut)], **options)
    again = Continual(PARTS[name])
    trained(again, classifier(dropout=0.1), 1, tmp_path / "cut", resume=True, **options)
    same(weights(whole.session.model), weights(again.session.model))
    assert again.monitor is not None and whole.monitor is not None
    assert again.monitor.metrics() == whole.monitor.metrics()
    for one, other in zip(again.parts, whole.parts, strict=True):
        assert torch.equal(one.rows(), other.rows())

    last = Continual(PARTS[name])
    end = str(max((tmp_path / "uncut").glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2])))
    trained(last, classifier(dropout=0.1), 1, tmp_path / "end", resume=end, **options)
    same(weights(whole.session.model), weights(last.session.model))


@pytest.mark.parametrize("name", ["rehearsal", "ewc", "adalora", "lora-stack-ewc"])
def test_months_in_objects_of_their_own_are_one_going_on(name: str, tmp_path: Path) -> None:
    whole, model = Continual(PARTS[name]), classifier()
    for index in range(2):
        trained(whole, model, index, tmp_path)
    memory = Continual(PARTS[name])
    for index in range(2):
        trained(memory, classifier(), index, tmp_path)
        memory.save(tmp_path / "month")
        memory = Continual.load(tmp_path / "month", strategy=PARTS[name])
    assert str(memory) == "Continual with strategy 'custom': no training yet"
    Trainer(classifier(), arguments(tmp_path), data_collator=collate, train_dataset=rows(2), callbacks=[memory])
    memory.prepare(None)
    same(weights(whole.session.model), weights(memory.session.model))
    assert memory.monitor is not None and whole.monitor is not None
    assert memory.monitor.metrics() == whole.monitor.metrics()
    for one, other in zip(memory.parts, whole.parts, strict=True):
        assert torch.equal(one.rows(), other.rows())


def test_one_trainer_that_trains_again_keeps_what_its_optimiser_knows(tmp_path: Path) -> None:
    """A stacked adapter is new to the optimiser, the classifier's head is not."""
    memory, model = Continual(PARTS["lora-stack-ewc"]), classifier()
    trainer = trained(memory, model, 0, tmp_path)
    optimizer = trainer.optimizer
    before = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    steps = {name: float(optimizer.state[parameter]["step"]) for name, parameter in before.items()}
    trainer.train_dataset, trainer.eval_dataset = rows(1), None
    trainer.train()
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    now = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert held == {id(parameter) for parameter in now.values()}
    assert {name.split(".")[-2] for name in now if "lora" in name} == {"t0002"}
    assert float(optimizer.state[now["classifier.bias"]]["step"]) == 2 * steps["classifier.bias"]
    assert [update.name for update in memory.updates] == ["e0", "update-2"]


def test_token_types_are_replayed_and_saved_with_their_tokens(tmp_path: Path) -> None:
    def paired(index: int, test: bool = False) -> list[dict[str, Any]]:
        return [{**row, "token_type_ids": [0, 0] + [1] * (len(row["input_ids"]) - 2)} for row in rows(index, test)]

    def right(batch: Any) -> None:
        wanted = (batch["input_ids"] > 0).long()
        wanted[:, :2] = 0
        assert torch.equal(batch["token_type_ids"], wanted)

    memory, model, seen = Continual(PARTS["rehearsal"]), classifier(), []
    trained(memory, model, 0, tmp_path, train_dataset=paired(0), eval_dataset=paired(0, test=True))
    memory.save(tmp_path / "memory")
    memory, model = Continual.load(tmp_path / "memory"), classifier()
    model.bert.embeddings.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    trained(memory, model, 1, tmp_path, train_dataset=paired(1), eval_dataset=paired(1, test=True))
    replayed = [one for one in seen if len(one["input_ids"]) == 8]
    assert replayed
    for one in replayed:
        right(one)
    assert memory.monitor is not None
    right(memory.monitor.tables()[0][torch.arange(10)])


def test_a_trainer_of_ones_own_takes_the_mixin(tmp_path: Path) -> None:
    class Own(ContinualMixin, Trainer):  # type: ignore[misc]
        pass

    memory, other = Continual(PARTS["ewc"], seed=3), Continual(PARTS["ewc"], seed=3)
    one, two = classifier(), classifier()
    trainer = trained(memory, one, 0, tmp_path, kind=Own)
    plain = trained(other, two, 0, tmp_path)
    assert type(trainer) is Own and isinstance(plain, ContinualMixin) and type(plain).__name__ == "Trainer"
    same(weights(one), weights(two))
    late = Trainer(two, arguments(tmp_path), data_collator=collate, train_dataset=rows(1))
    other.attach(late)
    late.train()
    assert [update.name for update in other.updates] == ["e0", "update-2"]
    untouched = Own(classifier(), arguments(tmp_path), data_collator=collate, train_dataset=rows(0))
    untouched.train()
    assert untouched.continual is None


def test_evaluation_and_logs_stay_the_trainers_and_get_our_figures(tmp_path: Path) -> None:
    memory, model = Continual(PARTS["rehearsal"]), classifier()
    trained(memory, model, 0, tmp_path)
    trainer = trained(memory, model, 1, tmp_path, eval_strategy="epoch")
    plain = Trainer(model, arguments(tmp_path), data_collator=collate, eval_dataset=rows(1, test=True))
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    logged = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    assert logged["continual/accuracy"] == memory.monitor.metrics()["accuracy"]  # type: ignore[union-attr]
    assert logged["continual/score/e0"] == memory.retention.lines[0].after  # type: ignore[union-attr]
    assert "eval_loss" in logged
    tree = str(memory)
    assert "update 2 · e1" in tree and "├── e0" in tree and "└── e1" in tree


def test_half_precision_of_the_trainer(tmp_path: Path) -> None:
    """bfloat16 on the CPU: near the same under full precision, and not the same."""
    one, two = classifier(), classifier()
    trained(Continual(PARTS["lora-rehearsal"]), one, 0, tmp_path)
    transformers.trainer.AcceleratorState._reset_state(True)
    trained(Continual(PARTS["lora-rehearsal"]), two, 0, tmp_path, bf16=True)
    transformers.trainer.AcceleratorState._reset_state(True)
    assert not torch.equal(one.classifier.weight, two.classifier.weight)
    torch.testing.assert_close(one.classifier.weight, two.classifier.weight, rtol=0.2, atol=0.05)


@pytest.mark.parametrize("strategy", [PARTS["ewc"], {"projection": {"kind": "agem", "capacity": 8}}])
def test_scaled_gradients_are_edited_as_they_are(strategy: dict[str, Any], tmp_path: Path) -> None:
    """What a scaler of float16 does to gradients is undone for the parts; a step that it will leave out is left alone."""
    memory, model = Continual(strategy), classifier()
    trained(memory, model, 0, tmp_path)
    trained(memory, model, 1, tmp_path)
    session, part = memory.session, memory.parts[0]
    loop = session.loop
    with torch.no_grad():
        for parameter in loop.parameters().values():
            parameter.add_(0.1)
    drawn, state, found = loop.randomness.state_dict(), part.state_dict(), []
    for scale in (1.0, 1024.0):
        loop.randomness.load_state_dict(drawn)
        part.load_state_dict(state)
        generator = torch.Generator().manual_seed(4)
        start = [-torch.randn(parameter.shape, generator=generator) for parameter in loop.parameters().values()]
        for parameter, grad in zip(loop.parameters().values(), start, strict=True):
            parameter.grad = grad * scale
        session.edit_gradients(scale)
        found.append([parameter.grad / scale for parameter in loop.parameters().values()])  # type: ignore[operator]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert any(not torch.equal(one, grad) for one, grad in zip(found[0], start, strict=True))
    for parameter in loop.parameters().values():
        parameter.grad = torch.full_like(parameter, torch.inf)
    session.edit_gradients(1024.0)
    assert all(bool(parameter.grad.isinf().all()) for parameter in loop.parameters().values())  # type: ignore[union-attr]
    step = loop.step
    session.after_step(skipped=True)
    assert loop.step == step + 1 and not loop._last


# Language models, and TRL's trainer


def sft(memory: Continual, model: nn.Module, index: int, folder: Path, **options: Any) -> Any:
    """Two epochs over the sentences of one topic."""
    memory.name = f"topic {index}"
    config = SFTConfig(
        str(folder),
        **{
            "num_train_epochs": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.01,
            "lr_scheduler_type": "constant",
            "train_sampling_strategy": "sequential",
            "max_grad_norm": 1.0,
            "max_length": 16,
            "use_cpu": True,
            "bf16": False,
            "report_to": [],
            "disable_tqdm": True,
            "save_strategy": "no",
            **options,
        },
    )
    trainer = SFTTrainer(
        model,
        config,
        train_dataset=datasets.Dataset.from_list(sentences(index)),
        eval_dataset=datasets.Dataset.from_list(sentences(index, test=True)),
        processing_class=tokenizer(),
        callbacks=[memory],
    )
    trainer.train()
    return trainer


LM_REHEARSAL = {
    "adapter": {"kind": "lora", "rank": 2, "alpha": 4},
    "replay": {"kind": "rehearsal", "select": "reservoir", "capacity": 14},
}


def test_sft_learns_what_our_learner_learns_and_its_folder_is_plain_peft(tmp_path: Path) -> None:
    memory, model, found = Continual(LM_REHEARSAL, seed=3), language_model(), []
    for index in range(2):
        trainer = sft(memory, model, index, tmp_path)
        memory.training = True
        tables = [memory.table(trainer.train_dataset, 0), memory.table(trainer.eval_dataset, 2)]
        memory.training, memory._tables = False, {}
        for table in tables:
            table.rows_N = table.rows_N - 3 * 2**38  # the ids that the trainer's rows had
        found.append(
            Experience(index, f"topic {index}", owned(tables[0]), None, owned(tables[1]), objective="causal-lm")
        )
    again = learnt(LM_REHEARSAL, language_model(), found)
    same(weights(again.model), weights(memory.session.model))
    assert memory.monitor is not None and again.monitor is not None
    assert memory.monitor.metrics() == again.monitor.metrics()
    assert len(memory.parts[1].rows()) == 14
    assert "topic 0" in str(memory) and memory.retention is not None

    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(language_model(), str(tmp_path / "adapter")).eval()
    ids = torch.tensor([[2, 3, 4, 5, 1]])
    model.eval()
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_sft_over_two_months_and_a_checkpoint(tmp_path: Path) -> None:
    whole, model = Continual("lm-lora-rehearsal"), language_model()
    with pytest.warns(UserWarning, match="optimiser"):
        sft(whole, model, 0, tmp_path)
    whole.save(tmp_path / "memory")
    assert not any("embed_tokens" in name for name in whole.session.model.saved_tensors()), "the base is not saved"
    sft(whole, model, 1, tmp_path)
    memory, other = Continual.load(tmp_path / "memory"), language_model()
    sft(memory, other, 1, tmp_path, save_strategy="steps", save_steps=5)
    same(weights(whole.session.model), weights(memory.session.model))
    assert (tmp_path / "checkpoint-5" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "checkpoint-5" / "model.safetensors").exists()


def test_a_peft_model_keeps_its_own_adapter(tmp_path: Path) -> None:
    def made() -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(1)
            return get_peft_model(language_model(), LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"]))

    memory, model = Continual(LM_REHEARSAL), made()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora" not in name}
    with pytest.warns(UserWarning, match=r"adapter \(the model came with one of PEFT's\)"):
        trainer = sft(memory, model, 0, tmp_path)
    assert not memory.adapts and [part.name for part in memory.parts] == ["replay/rehearsal"]
    memory.save(tmp_path / "memory")
    sft(memory, model, 1, tmp_path)
    same(base, {name: tensor for name, tensor in model.state_dict().items() if "lora" not in name})
    assert any(bool(tensor.any()) for name, tensor in model.state_dict().items() if "lora_B" in name)
    trainer.save_model(str(tmp_path / "peft"))
    assert (tmp_path / "peft" / "adapter_model.safetensors").is_file()
    again, other = Continual.load(tmp_path / "memory"), made()
    sft(again, other, 1, tmp_path)
    same(weights(model), weights(other))


def test_probes_and_scores_before_any_update(tmp_path: Path) -> None:
    probe = {"input_ids": torch.tensor([[2, 3, 4, 1]]), "labels": torch.tensor([[2, 3, 4, 1]])}
    memory, model = Continual(LM_REHEARSAL, monitor=Monitor(probes={"general": probe})), language_model()
    sft(memory, model, 0, tmp_path)
    assert memory.monitor is not None
    assert memory.monitor.probe_history()["general"]["updates"] == [-1, 0]
    assert memory.monitor.initial()[0] is not None
    silent = Continual(LM_REHEARSAL, monitor=False)
    sft(silent, language_model(), 0, tmp_path)
    same(weights(silent.session.model), weights(memory.session.model))
    assert silent.retention is None and "not measured" in str(silent)
