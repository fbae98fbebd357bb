"""The Python that loads an export and predicts with stock libraries, put together for the export at hand.

It reads ``inference.json`` and ``labels.json`` beside it, and holds no step that the export does not need. Features are pooled
as :func:`continual.models.transformer.pool` pools them; logits and labels are those of ``Learner.predict``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_HEADER = (
    (r"hashlib\.", "import hashlib"),
    (r"importlib\.", "import importlib"),
    (r"json\.", "import json"),
    (r"Path\(", "from pathlib import Path"),
    ("", ""),
    (r"torch\.", "import torch"),
    (r"F\.", "import torch.nn.functional as F"),
    (r"transformers\b", "import transformers"),
    (r"PeftModel\.", "from peft import PeftModel"),
    (r"load_file\(", "from safetensors.torch import load_file"),
    (r"Auto\w+\.", "from transformers import {}"),
    (r"cached_file\(", "from transformers.utils import cached_file"),
)
"""What a piece of code uses → what it imports for that, in this order."""

_TOLD = """\
folder = Path(".")  # the folder that this file lies in
told = json.loads((folder / "inference.json").read_text(encoding="utf-8"))
"""
_NAMES = """\
names = json.loads((folder / "labels.json").read_text(encoding="utf-8"))["id2label"]
"""
_BASE = """\
base = told["base_model"]  # or the path of a folder that holds the same weights
"""
_CHECK = """\
with open(cached_file(base, told["base_file"]), "rb") as file:
    assert hashlib.file_digest(file, "sha256").hexdigest() == told["base_model_sha256"], "this is another base"
"""
_TEXT_TOKENS = """\
def tokens(texts):
    options = {"padding": True, "padding_side": "right", "truncation": True, "max_length": told["max_length"]}
    return tokenizer(texts, return_tensors="pt", return_token_type_ids=False, **options).to(model.device)
"""
_ID_TOKENS = """\
def tokens(input_ids, attention_mask=None):
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    return {"input_ids": input_ids, "attention_mask": mask}
"""
_POOL = """\
def pool(hidden, mask):
    if told["pooling"] == "cls":  # the first token
        return hidden[:, 0].float()
    if told["pooling"] == "last":  # the last token that is no padding
        return hidden[torch.arange(len(mask)), mask.cumsum(1).argmax(1)].float()
    summed = hidden.masked_fill(mask[:, :, None] == 0, 0.0).sum(1, dtype=torch.float32)
    return summed / mask.sum(1, keepdim=True).clamp(min=1)
"""
_FEATURES = """\
def features(rows):
    mask = rows["attention_mask"]
    output = model(**rows, output_hidden_states=told["layers"] > 1)
    below = (output.hidden_states or ())[-2 : -told["layers"] - 1 : -1]
    found = [pool(hidden, mask) for hidden in (output.last_hidden_state, *below)]
    return found[0] if told["layers"] == 1 else torch.cat([F.normalize(each, dim=1) for each in found], 1)
"""
_ROUTED = """\
def routed(rows):
    with model.disable_adapter():
        plain = features(rows).cpu()
    place = router["place"][torch.cdist(plain, router["prototypes"]).argmin(1)]
    found = torch.zeros(len(place), told["features"])
    for which in place.unique().tolist():
        model.set_adapter(told["adapters"][which])
        at = (place == which).nonzero().flatten()
        found[at] = features({name: column[at.to(column.device)] for name, column in rows.items()}).cpu()
    return found
"""
_TASK_FEATURES = """\
def task_features(rows, task):
    model.set_adapter(told["tasks"][task]["adapter"])
    return features(rows)
"""
_ANSWER = """\
@torch.no_grad()
def answer(prompt, **options):
    rows = asked(prompt)
    found = model.generate(**rows, **options)
    return tokenizer.decode(found[0, {}:], skip_special_tokens=True)
"""
_ASKED = """\
def asked(prompt):
    if not isinstance(prompt, str):  # messages
        options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
        return tokenizer.apply_chat_template(prompt, **options).to(model.device)
    ids = tokenizer(prompt)["input_ids"]
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None, tokenizer.bos_token_id}
    return {"input_ids": torch.tensor([ids[:-1] if ids[-1] in ends else ids], device=model.device)}
"""


def snippet(told: Mapping[str, Any], *, text: bool, tokens: bool, head: tuple[str, ...], own_head: bool) -> str:
    """The code.

    Args:
        told: the content of ``inference.json``.
        text: there is a tokenizer.
        tokens: without one, rows are token ids; else they are ``inputs``.
        head: lines from features ``x`` to ``logits``.
        own_head: a classifier's own head lies in ``head.safetensors``.
    """
    blocks = [_loading(told, text, bool(head), own_head)]
    if told["form"] in ("features", "language", "transformer") or tokens:
        blocks.append(_TEXT_TOKENS if text else _ID_TOKENS)
    if told["form"] == "features":
        blocks += [_POOL, _autocast(_virtual(_base_alone(_FEATURES, told), told), told)]
        if len(told["adapters"]) > 1:
            blocks += [_base_alone(_ROUTED, told)] if told["routing"] == "features" else []
            blocks += [_TASK_FEATURES] if told["tasks"] else []
    inputs = "texts" if text else "input_ids, attention_mask=None" if tokens else "inputs"
    if told["objective"] in ("classification", "regression"):
        blocks.append(_predict(told, inputs, head))
    else:
        blocks += _language(told, inputs, text)
    code = "\n\n".join(blocks)
    return f"{_imports(code)}\n{code}"


def _loading(told: Mapping[str, Any], text: bool, head: bool, own_head: bool) -> str:
    lines = [_TOLD, _NAMES if told["objective"] == "classification" else ""]
    if told["base_model"]:
        lines += [_BASE, _CHECK if told["base_file"] else ""]
    lines.append("\n")
    if text:
        lines.append("tokenizer = AutoTokenizer.from_pretrained(folder)\n")
    if told["form"] == "mlp":
        lines.append('layers = load_file(folder / "model.safetensors")\n')
    elif told["form"] == "module":
        lines.append(_own_module(told))
    else:
        lines.append(_stock_model(told, own_head))
    lines.append('head = load_file(folder / "head.safetensors")\n' if head else "")
    return "".join(lines)


def _own_module(told: Mapping[str, Any]) -> str:
    if told["arguments"] is None:
        made = f"model = your_model()  # a {told['module']}.{told['class']}, made as it was made for training\n"
    else:
        made = 'model = getattr(importlib.import_module(told["module"]), told["class"])(**told["arguments"])  # your own code\n'
    return f'{made}model.load_state_dict(load_file(folder / "model.safetensors"))\nmodel.eval()\n'


def _stock_model(told: Mapping[str, Any], own_head: bool) -> str:
    loaders = {"causal-lm": "AutoModelForCausalLM", "seq2seq": "AutoModelForSeq2SeqLM"}
    loader = loaders.get(told["objective"], "AutoModel")
    options, lines = ', **told["options"]' if told.get("options") else "", []
    if told["form"] == "transformer":
        loader = 'getattr(transformers, told["class"])'
        if told["base_model"]:
            lines, options = ["config = AutoConfig.from_pretrained(folder)"], ", config=config"
    whence = "base" if told["base_model"] else "folder"
    lines.append(f'model = {loader}.from_pretrained({whence}, dtype=getattr(torch, told["dtype"]){options})')
    if told.get("encoder"):
        lines.append("model = model.get_encoder()")
    if own_head:
        lines.append(
            'missing, unexpected = model.load_state_dict(load_file(folder / "head.safetensors"), strict=False)'
        )
        lines.append('assert not unexpected, f"the head has {unexpected}, which this model does not"')
    if len(told["adapters"]) > 1:
        lines.append('model = PeftModel.from_pretrained(model, folder / "0", adapter_name="0")')
        lines.append('for name in told["adapters"][1:]:')
        lines.append("    model.load_adapter(folder / name, name)")
    elif told["adapters"]:
        lines.append("model = PeftModel.from_pretrained(model, folder)")
    if told["routing"] == "features":
        lines.append('router = load_file(folder / "router.safetensors")')
    return "\n".join([*lines, "model.eval()"]) + "\n"


def _predict(told: Mapping[str, Any], inputs: str, head: tuple[str, ...]) -> str:
    passed, device = inputs.replace("=None", ""), '"cpu"'
    if told["form"] == "features":
        lines, device = _features_call(told, passed), "model.device.type"
    elif told["form"] == "mlp":
        act = {"tanh": "torch.tanh"}.get(told["activation"], f"F.{told['activation']}")
        lines = ["x = torch.as_tensor(inputs, dtype=torch.float32).flatten(1)"]
        if told["hidden"]:
            lines.append('for place in range(told["hidden"]):')
            lines.append(f'    x = {act}(F.linear(x, layers[f"{{place}}.weight"], layers[f"{{place}}.bias"]))')
        lines = [*_within(lines, told, device), *(["x = x.float()"] if told["autocast"] else [])]
    else:
        device = "model.device.type" if told["form"] == "transformer" else device
        lines = _within(_call(told, passed), told, device)
        lines.append("logits = logits.float().cpu()")
    lines += head
    if told["objective"] == "regression":
        lines.append('return {"labels": logits}')
    else:
        lines += _competing(told)
        lines.append("labels = scores.argmax(1)")
        lines.append("called = [names[str(label)] for label in labels.tolist()]")
        lines.append('return {"labels": labels, "names": called, "scores": scores, "logits": logits}')
    signature = f"{inputs}, task=None" if told["tasks"] else inputs
    return "\n".join(["@torch.no_grad()", f"def predict({signature}):", *(f"    {line}" for line in lines)]) + "\n"


def _features_call(told: Mapping[str, Any], passed: str) -> list[str]:
    if len(told["adapters"]) < 2:
        return [f"x = features(tokens({passed})).cpu()"]
    rows = f"rows = tokens({passed})"
    if not told["tasks"]:
        return [rows, "x = routed(rows)"]
    if told["routing"] == "features":
        return [rows, "x = routed(rows) if task is None else task_features(rows, task).cpu()"]
    return [rows, "x = task_features(rows, task).cpu()  # each task has an adapter of its own: name it"]


def _call(told: Mapping[str, Any], passed: str) -> list[str]:
    if passed == "inputs":
        lines = ["output = model(torch.as_tensor(inputs))"]
    elif told["objective"] == "seq2seq":
        lines = [
            f"rows = tokens({passed})",
            "starts = model.prepare_decoder_input_ids_from_labels(labels=labels)",
            "output = model(**rows, decoder_input_ids=starts)",
        ]
    else:
        lines = [f"rows = tokens({passed})", "output = model(**rows)"]
    if told["form"] == "module":
        return [*lines, 'logits = output["logits"] if isinstance(output, dict) else getattr(output, "logits", output)']
    return [*lines, "logits = output.logits"]


def _competing(told: Mapping[str, Any]) -> list[str]:
    """Scores over the classes that compete."""
    if not told["tasks"] and told["classes"] == list(range(told["outputs"])):
        return ["scores = logits.softmax(1)"]
    among = (
        'told["tasks"][task]["classes"] if task is not None else told["classes"]'
        if told["tasks"]
        else 'told["classes"]'
    )
    return [
        f"among = torch.tensor({among})",
        "scores = (logits + torch.full_like(logits, -torch.inf).index_fill(1, among, 0.0)).softmax(1)",
    ]


def _language(told: Mapping[str, Any], inputs: str, text: bool) -> list[str]:
    passed, signature = inputs.replace("=None", ""), inputs
    lines = []
    if told["objective"] == "seq2seq":
        signature = "texts, answers" if text else f"labels, {inputs}"
        if text:
            lines = [
                'options = {"padding": True, "truncation": True, "max_length": told["max_length"], "return_tensors": "pt"}',
                'labels = tokenizer(text_target=answers, **options)["input_ids"].to(model.device)',
            ]
    lines += _within(_call(told, passed), told, "model.device.type" if told["form"] != "module" else '"cpu"')
    cut = '[:, -rows["input_ids"].shape[1] :]' if told["virtual"] and told["objective"] == "causal-lm" else ""
    lines.append(f"return logits{cut}.float().cpu()")
    body = "\n".join(["@torch.no_grad()", f"def logits_of({signature}):", *(f"    {line}" for line in lines)]) + "\n"
    if not text:
        return [body]
    if told["objective"] == "seq2seq":
        asked = "def asked(prompt):\n    return tokens([prompt])\n"
        return [body, asked, _ANSWER.format(0)]
    return [body, _ASKED, _ANSWER.format('rows["input_ids"].shape[1] ')]


def _virtual(code: str, told: Mapping[str, Any]) -> str:
    """With what the model gives at the places of virtual tokens, in front of a row's own, left out."""
    if not told["virtual"]:
        return code
    return code.replace("pool(hidden, mask)", "pool(hidden[:, -mask.shape[1] :], mask)")


def _base_alone(code: str, told: Mapping[str, Any]) -> str:
    """With the base called by itself, where PEFT 0.21 cannot switch virtual tokens off (``disable_adapter`` fails)."""
    if not (told["virtual"] and told["routing"] == "features"):
        return code
    code = code.replace("def features(rows):", "def features(rows, by=model):").replace(
        "output = model(", "output = by("
    )
    off = "    with model.disable_adapter():\n        plain = features(rows).cpu()"
    return code.replace(off, "    plain = features(rows, model.get_base_model()).cpu()")


def _autocast(code: str, told: Mapping[str, Any]) -> str:
    """With the call of the model in the precision that it was trained and measured in."""
    if not told["autocast"]:
        return code
    line = next(line for line in code.splitlines() if "(**rows" in line)
    return code.replace(line, "\n".join(f"    {each}" for each in _within([line.strip()], told, "model.device.type")))


def _within(lines: list[str], told: Mapping[str, Any], device: str) -> list[str]:
    if not told["autocast"]:
        return lines
    return [
        f'with torch.autocast({device}, getattr(torch, told["autocast"])):',
        *(f"    {line}" for line in lines),
    ]


def _imports(code: str) -> str:
    lines = []
    for used, statement in _HEADER:
        if not statement:
            lines.append("")
        elif found := re.findall(rf"(?<![\w.\"]){used}", code):
            lines.append(statement.format(", ".join(sorted({name.rstrip(".") for name in found}))))
    return "\n".join(lines) + "\n"
