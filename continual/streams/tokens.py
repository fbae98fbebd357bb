"""Rows of text as token ids: what a model reads and which tokens count.

Language models: the loss is on the completion only (``prompt`` / ``completion``), on all of the assistant's turns and
nothing else (``messages``), or on everything (``text``), as in TRL. Prompt and completion are tokenised each for itself, so that the
tokens of the prompt are those that the model will see when it answers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from continual.errors import StreamError
from continual.kinds import Objective
from continual.table import IGNORED

Texts = dict[str, Sequence[Any]]
Tokens = dict[str, list[list[int]]]
RowName = Callable[[int], str]

TEXT_GROUPS: dict[Objective, tuple[tuple[str, ...], ...]] = {
    "classification": (("text",),),
    "regression": (("text",),),
    "causal-lm": (("prompt", "completion"), ("messages",), ("text",)),
    "seq2seq": (("prompt", "completion"),),
}
"""The columns of text that an objective reads, the first group that is there."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def needed_columns(names: Sequence[str], objective: Objective) -> tuple[str, ...]:
    """The text columns that ``objective`` reads from a table with these columns.

    Raises:
        StreamError: there are none.
    """
    for group in TEXT_GROUPS[objective]:
        if set(group) <= set(names):
            return group
    wanted = " or ".join(" + ".join(f"'{name}'" for name in group) for group in TEXT_GROUPS[objective])
    raise StreamError(f"the objective '{objective}' reads {wanted}, and the table has {', '.join(names)}.")


def tokenise(texts: Texts, tokenizer: Any, objective: Objective, max_length: int, row_name: RowName) -> Tokens:
    """Token ids by column: ``input_ids``, and ``labels`` for language models (-100 where a token does not count).

    Args:
        texts: the columns of :func:`needed_columns`.
        tokenizer: of Hugging Face.
        objective: decides the form of the rows.
        max_length: longer rows are cut on the right.
        row_name: what error sentences call the row at a place.

    Raises:
        StreamError: no token of a row counts after the cut, or a chat cannot be rendered.
    """
    if objective in ("classification", "regression"):
        return {"input_ids": _plain(tokenizer, texts["text"], truncation=True, max_length=max_length)}
    if objective == "seq2seq":
        inputs = _plain(tokenizer, texts["prompt"], truncation=True, max_length=max_length)
        targets = tokenizer(text_target=list(texts["completion"]), truncation=True, max_length=max_length)["input_ids"]
        return {"input_ids": inputs, "labels": targets}
    if "messages" in texts:
        return _cut(*_chats(texts["messages"], tokenizer, row_name), max_length, row_name)
    if "text" in texts:
        ids = _closed(tokenizer, _plain(tokenizer, texts["text"]))
        counted: Sequence[int | list[int]] = [0] * len(ids)
    else:
        prompts = [_open(tokenizer, row) for row in _plain(tokenizer, texts["prompt"])]
        answers = _closed(tokenizer, _plain(tokenizer, texts["completion"], add_special_tokens=False))
        ids = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        counted = [len(prompt) for prompt in prompts]
    return _cut(ids, counted, max_length, row_name)


def pad_id(tokenizer: Any) -> int:
    """What fills a shorter row: the padding token, else the end token, else 0."""
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return int(found or 0)


def _plain(tokenizer: Any, texts: Sequence[str], **options: Any) -> list[list[int]]:
    kept = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    found: list[list[int]] = tokenizer(list(texts), **kept, **options)["input_ids"]
    return found


def _open(tokenizer: Any, row: list[int]) -> list[int]:
    """A row without the token that ends a sequence."""
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None, tokenizer.bos_token_id}
    return row[:-1] if row and row[-1] in ends else row


def _closed(tokenizer: Any, rows: list[list[int]]) -> list[list[int]]:
    if tokenizer.eos_token_id is None:
        return rows
    return [[*_open(tokenizer, row), tokenizer.eos_token_id] for row in rows]


def _cut(ids: list[list[int]], start: Sequence[int | list[int]], max_length: int, row_name: RowName) -> Tokens:
    """Rows cut to ``max_length``; ``start`` is where counting begins, or a mask of the tokens that count."""
    labels = []
    for place, (row, begin) in enumerate(zip(ids, start, strict=True)):
        if isinstance(begin, int):
            labels.append([IGNORED] * min(begin, max_length) + row[begin:max_length])
        else:
            pairs = zip(row[:max_length], begin[:max_length], strict=True)
            labels.append([token if counts else IGNORED for token, counts in pairs])
        if all(label == IGNORED for label in labels[-1]):
            raise StreamError(
                f"{row_name(place)}: nothing of the answer is left within {max_length} tokens (the row has "
                f"{len(row)}): raise the model's 'max_length' or shorten the prompt."
            )
    return {"input_ids": [row[:max_length] for row in ids], "labels": labels}


def _chats(
    chats: Sequence[Any], tokenizer: Any, row_name: RowName
) -> tuple[list[list[int]], Sequence[int | list[int]]]:
    template = tokenizer.chat_template
    if not template:
        raise StreamError(
            "the tokenizer has no chat template: use a chat model, or rows with 'prompt' and 'completion'."
        )
    for place, chat in enumerate(chats):
        if chat[-1].get("role") != "assistant":
            raise StreamError(
                f"{row_name(place)}: the chat does not end with the assistant's turn: add it or leave it out."
            )
    if isinstance(template, str) and _GENERATION.search(template):
        found = tokenizer.apply_chat_template(list(chats), return_dict=True, return_assistant_tokens_mask=True)
        return found["input_ids"], found["assistant_masks"]
    first = next((place for place, chat in enumerate(chats) if chat[0].get("role") == "assistant"), None)
    if first is not None:
        raise StreamError(f"{row_name(first)}: the chat begins with the assistant's turn: begin it with the user's.")
    return _turns(chats, tokenizer, row_name)


def _turns(chats: Sequence[Any], tokenizer: Any, row_name: RowName) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of whole chats, and 1 where a token is the assistant's.

    A turn begins where the chat before it, rendered with the prompt for an answer, ends, or parts from the whole chat;
    it ends where the chat up to and with it ends. What is rendered alone must be what the whole chat begins with.
    """

    def render(parts: Sequence[Any], **options: Any) -> list[list[int]]:
        found = tokenizer.apply_chat_template(parts, return_dict=True, **options)["input_ids"] if parts else []
        return list(found)

    whole = render(list(chats))
    turns = [(p, i) for p, chat in enumerate(chats) for i, turn in enumerate(chat) if turn.get("role") == "assistant"]
    asked = render([chats[p][:i] for p, i in turns], add_generation_prompt=True)
    starts = [_shared(whole[p], ids) for (p, _), ids in zip(turns, asked, strict=True)]
    parted = [n for n, ids in enumerate(asked) if starts[n] < len(ids)]
    inner = [n for n, (p, i) in enumerate(turns) if i + 1 < len(chats[p])]
    before = render([chats[turns[n][0]][: turns[n][1]] for n in parted])
    upto = render([chats[turns[n][0]][: turns[n][1] + 1] for n in inner])
    for n, ids in [*zip(parted, before, strict=True), *zip(inner, upto, strict=True)]:
        if whole[turns[n][0]][: len(ids)] != ids:
            raise StreamError(
                f"{row_name(turns[n][0])}: the chat template renders message {turns[n][1] + 1} or those before it otherwise "
                "when more follow, so that the assistant's turns cannot be told apart: use a template that marks them with "
                "{% generation %}, or rows with 'prompt' and 'completion'."
            )
    for n, ids in zip(parted, before, strict=True):
        starts[n] = max(starts[n], len(ids))
    ends = [len(whole[p]) for p, _ in turns]
    for n, ids in zip(inner, upto, strict=True):
        ends[n] = len(ids)
    masks = [[0] * len(row) for row in whole]
    for (p, _), start, end in zip(turns, starts, ends, strict=True):
        masks[p][start:end] = [1] * (end - start)
    return whole, masks


def _shared(row: list[int], prefix: list[int]) -> int:
    """How many tokens at the head of both are the same."""
    differ = (place for place, (a, b) in enumerate(zip(row, prefix, strict=False)) if a != b)
    return next(differ, min(len(row), len(prefix)))
