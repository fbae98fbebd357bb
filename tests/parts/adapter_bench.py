"""Tiny transformers and a bare training loop for the tests of adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, LlamaConfig, LlamaForCausalLM

from continual.models.mlp import MLP
from continual.models.model import Model
from continual.models.pretrained import LanguageModel, PooledTransformer
from continual.parts.context import TrainingContext
from continual.parts.part import Part
from continual.streams.experience import Experience
from continual.table import Batch, TensorTable

ROWS, TOKENS, VOCABULARY, CLASSES = 16, 6, 64, 4
FAMILIES = ("llama", "bert", "gpt2", "mlp")


def base_of(family: str) -> nn.Module:
    """The same pristine base at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(11)
        if family == "llama":
            sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
            return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes)).eval()
        if family == "bert":
            sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
            config = BertConfig(
                vocab_size=VOCABULARY, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes
            )
            return BertModel(config).eval()
        if family == "gpt2":
            config = GPT2Config(
                vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
            )
            return GPT2Model(config).eval()
        return MLP(VOCABULARY, (32, 32)).eval()


def model_of(family: str) -> Model:
    base = base_of(family)
    if family == "llama":
        backbone: nn.Module = LanguageModel(base, seq2seq=False)
    else:
        backbone = base if family == "mlp" else PooledTransformer(base, "mean")
    model = Model(
        backbone,
        gives_features=family != "llama",
        objectives=("causal-lm",) if family == "llama" else ("classification",),
        spec={"name": f"tiny-{family}"},
        feature_size=32,
        base_sha256="a" * 64,
    )
    if family != "llama":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(5)
            model.head = nn.Linear(32, CLASSES)
    if family != "mlp":
        model.mark_pristine(base.parameters())
    return model


def batch_of(family: str, task: int) -> Batch:
    generator = torch.Generator().manual_seed(100 + task)
    rows = torch.arange(ROWS)
    if family == "mlp":
        inputs = torch.randn(ROWS, VOCABULARY, generator=generator)
        return {"inputs": inputs, "labels": rows % CLASSES, "row": rows}
    ids = torch.randint(1, VOCABULARY, (ROWS, TOKENS), generator=generator)
    labels = ids if family == "llama" else rows % CLASSES
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "row": rows}


def experience_of(family: str, task: int) -> Experience:
    batch = {name: column for name, column in batch_of(family, task).items() if name != "attention_mask"}
    objective: Any = "causal-lm" if family == "llama" else "classification"
    classes = () if family == "llama" else tuple(range(CLASSES))
    return Experience(task, f"task {task}", TensorTable(dict(batch)), classes=classes, objective=objective)


class Bench:
    """One model, one adapter part, AdamW, and a loop that can be cut anywhere."""

    def __init__(self, family: str, part: Part, model: Model | None = None, lr: float = 1e-2) -> None:
        self.family, self.part = family, part
        self.model = model or model_of(family)
        self.model.train()
        self.optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=lr)
        objective: Any = "causal-lm" if family == "llama" else "classification"
        self.loop = TrainingContext(self.model, [part], self.optimizer, seed=3, objective=objective)

    def begin(self, task: int, steps: int) -> None:
        with self.loop.randomness.framework():
            self.loop.begin(experience_of(self.family, task), steps=steps)

    def step(self, task: int, times: int = 1) -> None:
        with self.loop.randomness.framework():
            self.model.train()
            for _ in range(times):
                self.optimizer.zero_grad()
                self.loop.backward(batch_of(self.family, task))
                self.optimizer.step()
                self.loop.after_step()

    def task(self, task: int, steps: int, planned: int | None = None) -> Bench:
        self.begin(task, planned or steps)
        self.step(task, steps)
        self.loop.end()
        return self

    def save(self) -> dict[str, Any]:
        """All that a learner saves, copied."""
        names = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        by_id = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return _copied(
            {
                "tensors": self.model.saved_tensors(),
                "part": self.part.state_dict(),
                "optimizer": {by_id[id(p)]: dict(state) for p, state in self.optimizer.state.items()},
                "order": [by_id[id(p)] for p in self.optimizer.param_groups[0]["params"]],
                "trainable": names,
                "randomness": self.loop.randomness.state_dict(),
                "step": self.loop.step,
                "steps": self.loop.steps,
            }
        )

    @classmethod
    def load(cls, family: str, part: Part, state: dict[str, Any], task: int) -> Bench:
        bench = cls(family, part)
        bench.loop.randomness.load_state_dict(state["randomness"])
        with bench.loop.randomness.framework():
            part.load_state_dict(state["part"])
        bench.model.load_saved(state["tensors"])
        bench.loop.experience = experience_of(family, task)
        bench.loop.experience_index, bench.loop.step, bench.loop.steps = task, state["step"], state["steps"]
        parameters = dict(bench.model.named_parameters())
        bench.optimizer.param_groups[0]["params"] = [parameters[name] for name in state["order"]]
        for name, entry in state["optimizer"].items():
            bench.optimizer.state[parameters[name]] = entry
        if family != "llama":
            bench.loop.set_owner([task] * CLASSES)
        return bench

    @torch.no_grad()
    def answer(self, task: int = 0) -> Tensor:
        """Logits of a fixed batch, in eval mode."""
        self.model.eval()
        logits: Tensor = self.model(batch_of(self.family, task)).logits
        self.model.train()
        return logits


def tensors_of(bench: Bench) -> dict[str, Tensor]:
    """Every tensor of the model, copied."""
    return {name: tensor.detach().clone() for name, tensor in bench.model.state_dict().items()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Same names, same bits."""
    assert list(left) == list(right)
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, different


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value
