from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from continual.errors import StreamError
from continual.streams import text as text_room
from continual.streams.stream import Stream
from continual.streams.text import encode, tokenizer_key
from continual.table import IGNORED, ArrowTable, Concat, Mapped, Table, TensorTable, View

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "user", "assistant", ":", *"abcdefghij"]
PLAIN = (
    "{% for m in messages %}{{ m.role + ' : ' + m.content + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ m.role + ' : ' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{{ ' ' }}{% endfor %}"
)


def tokenizer(template: str | None = None, words: list[str] | None = None, pad: bool = True, ends: bool = False) -> Any:
    vocabulary = {word: place for place, word in enumerate(words or WORDS)}
    rules = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    single = "<s> $A </s>" if ends else "<s> $A"
    special = [("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])]
    rules.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    made = PreTrainedTokenizerFast(
        tokenizer_object=rules, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>" if pad else None
    )
    made.chat_template = template
    return made


def ids(words: str) -> list[int]:
    return [WORDS.index(word) for word in words.split()]


def texts(count: int = 5) -> TensorTable:
    rows = ["a", "a b c", "d e", "f g h i j", "a j"]
    return TensorTable({
        "text": [rows[n % 5] for n in range(count)], "labels": torch.arange(count) % 2, "row": torch.arange(count),
    })  # fmt: skip


def row(table: Table, place: int, name: str = "input_ids") -> list[int]:
    return [int(token) for token in table[torch.tensor([place])][name][0]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CONTINUAL_CACHE", str(tmp_path))
    return tmp_path / "tokens"


def test_classification_rows() -> None:
    found = encode(texts(), tokenizer(), "classification", 4)
    assert row(found, 1) == ids("<s> a b c") and row(found, 3) == ids("<s> f g h")
    batch = found[torch.tensor([0, 3])]
    assert batch["input_ids"].tolist() == [[*ids("<s> a"), 0, 0], ids("<s> f g h")]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]] and batch["labels"].tolist() == [0, 1]
    assert found.lengths is not None and found.lengths.tolist() == [2, 4, 3, 4, 3]
    assert found.strings("text")[1] == "a b c" and found.column("row").tolist() == [0, 1, 2, 3, 4]


def test_padding_never_changes_what_a_row_holds() -> None:
    found = encode(texts(), tokenizer(), "classification", 16)
    alone = [found[torch.tensor([place])] for place in range(5)]
    for group in ([0, 3], [3, 1, 0, 2, 4], [2, 2]):
        batch = found[torch.tensor(group)]
        for line, place in enumerate(group):
            mask = batch["attention_mask"][line].bool()
            assert batch["input_ids"][line][mask].tolist() == alone[place]["input_ids"][0].tolist()
            assert (batch["input_ids"][line][~mask] == 0).all() and mask.sum() == alone[place]["attention_mask"].sum()


def test_end_token_pads_where_there_is_no_padding_token() -> None:
    found = encode(texts(), tokenizer(pad=False), "classification", 16)
    assert found[torch.tensor([0, 2])]["input_ids"][0].tolist() == ids("<s> a </s>")


def test_a_stream_is_tokenised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"text": [f"{a} {b}" for a in "abcdefghij" for b in "abcdefghij"], "labels": [n % 10 for n in range(100)]}
    stream = Stream.from_tables(given, split={"by": "class", "size": 2}, scenario="class")
    calls: list[int] = []
    real = text_room.tokenise

    def counted(found: Any, *arguments: Any) -> Any:
        calls.append(len(found["text"]))
        return real(found, *arguments)

    monkeypatch.setattr(text_room, "tokenise", counted)
    words = tokenizer()
    encoded = [encode(experience.train, words, "classification", 8) for experience in stream]
    assert calls == [100]
    assert (
        all(isinstance(table, View) for table in encoded)
        and len({id(t.base) for t in encoded if isinstance(t, View)}) == 1
    )
    assert encoded[4].column("labels").unique().tolist() == [8, 9]
    assert row(encoded[1], 0) == ids("<s> a c")
    encode(stream[0].train, words, "classification", 2)
    assert calls == [100, 100]


def test_views_maps_and_concatenations_keep_their_form() -> None:
    base, words = texts(), tokenizer()
    mapped = encode(Mapped(base, {"labels": lambda labels: labels + 5}), words, "classification", 8)
    both = encode(Concat([base, View(base, torch.tensor([3]))]), words, "classification", 8)
    assert isinstance(mapped, Mapped) and mapped[torch.tensor([1])]["labels"].tolist() == [6]
    assert isinstance(both, Concat) and row(both, 5) == ids("<s> f g h i j")
    assert encode(both, words, "classification", 8) is both


def copy(table: TensorTable) -> TensorTable:
    return TensorTable(dict(table.columns))


def test_cache_is_hit_by_content(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = encode(texts(), tokenizer(), "classification", 8)
    assert len(list(cache.iterdir())) == 1

    def forbidden(*arguments: Any) -> Any:
        raise AssertionError("tokenised again")

    real = text_room.tokenise
    monkeypatch.setattr(text_room, "tokenise", forbidden)
    relabelled = TensorTable({**texts().columns, "labels": torch.ones(5, dtype=torch.int64)})
    again = encode(relabelled, tokenizer(), "classification", 8)
    assert row(again, 3) == row(first, 3) and again.column("labels").tolist() == [1] * 5
    monkeypatch.setattr(text_room, "tokenise", real)
    other_text = TensorTable({**texts().columns, "text": ["a", "a b c", "d e", "f g h i j", "a i"]})
    for table, words, objective, length in (
        (other_text, tokenizer(), "classification", 8),
        (texts(), tokenizer(words=[*WORDS, "k"]), "classification", 8),
        (texts(), tokenizer(), "classification", 7),
        (texts(), tokenizer(), "causal-lm", 8),
        (texts(4), tokenizer(), "classification", 8),
    ):
        before = len(list(cache.iterdir()))
        encode(table, words, objective, length)  # type: ignore[arg-type]
        assert len(list(cache.iterdir())) == before + 1
    assert not [path for path in cache.iterdir() if path.suffix != ".safetensors"]


@pytest.mark.parametrize("damage", ["truncated", "bit", "empty", "foreign"])
def test_a_damaged_cache_file_is_made_anew(cache: Path, damage: str) -> None:
    first = encode(texts(), tokenizer(), "classification", 8)
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[-40] ^= 1
    path.write_bytes(
        {"truncated": whole[:-9], "bit": bytes(changed), "empty": b"", "foreign": b"not tensors" * 9}[damage]
    )
    again = encode(texts(), tokenizer(), "classification", 8)
    assert [row(again, place) for place in range(5)] == [row(first, place) for place in range(5)]
    assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    assert row(encode(texts(), tokenizer(), "classification", 8, cache=blocked), 0) == ids("<s> a")
    elsewhere = tmp_path / "elsewhere"
    encode(texts(), tokenizer(), "classification", 8, cache=elsewhere)
    assert len(list((elsewhere / "tokens").iterdir())) == 1


def test_tokenizer_key_ignores_truncation_and_sees_the_vocabulary() -> None:
    words = tokenizer()
    before = tokenizer_key(words)
    words(["a b c"], truncation=True, max_length=2, padding=True)
    fresh = tokenizer()
    fresh(["a"], truncation=True, max_length=3)
    assert tokenizer_key(words) == before == tokenizer_key(fresh)
    assert tokenizer_key(tokenizer(MARKED)) != before != tokenizer_key(tokenizer(words=[*WORDS, "k"]))
    words.add_tokens(["k"])
    assert tokenizer_key(words) != before


@pytest.mark.parametrize("ends", [False, True])
def test_causal_text_counts_every_token(ends: bool) -> None:
    found = encode(texts(), tokenizer(ends=ends), "causal-lm", 5)
    assert row(found, 1) == ids("<s> a b c </s>") == row(found, 1, "labels")
    assert row(found, 3) == ids("<s> f g h i") == row(found, 3, "labels")
    batch = found[torch.tensor([0, 1])]
    assert batch["labels"][0].tolist() == [*ids("<s> a </s>"), IGNORED, IGNORED]
    assert batch["input_ids"][0].tolist() == [*ids("<s> a </s>"), 0, 0]


@pytest.mark.parametrize("ends", [False, True])
def test_completion_counts_and_prompt_does_not(ends: bool) -> None:
    table = TensorTable({"prompt": ["a b", "c"], "completion": ["d", "e f g"], "row": torch.tensor([70, 71])})
    found = encode(table, tokenizer(ends=ends), "causal-lm", 16)
    assert row(found, 0) == ids("<s> a b d </s>") and row(found, 0, "labels") == [IGNORED] * 3 + ids("d </s>")
    assert row(found, 1) == ids("<s> c e f g </s>") and row(found, 1, "labels") == [IGNORED] * 2 + ids("e f g </s>")
    assert found[torch.tensor([0, 1])]["labels"][0].tolist() == [IGNORED] * 3 + ids("d </s>") + [IGNORED]
    cut = encode(table, tokenizer(), "causal-lm", 4)
    assert row(cut, 0) == ids("<s> a b d") and row(cut, 1, "labels") == [IGNORED] * 2 + ids("e f")
    with pytest.raises(StreamError, match="row 70: nothing of the answer is left within 3 tokens"):
        encode(table, tokenizer(), "causal-lm", 3)


CHAT = [
    {"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"},
    {"role": "user", "content": "d"}, {"role": "assistant", "content": "e f"},
]  # fmt: skip


def test_all_assistant_turns_count() -> None:
    table = TensorTable({"messages": [CHAT, CHAT[:2]], "row": torch.arange(2)})
    whole = ids("user : a b assistant : c user : d assistant : e f")
    marked = encode(table, tokenizer(MARKED), "causal-lm", 32)
    assert row(marked, 0) == whole
    counted = [token for token in row(marked, 0, "labels") if token != IGNORED]
    assert counted == ids("c e f") and row(marked, 0, "labels")[6] == ids("c")[0]
    plain = encode(table, tokenizer(PLAIN), "causal-lm", 32)
    assert row(plain, 0) == whole
    assert row(plain, 0, "labels") == [IGNORED] * 6 + ids("c") + [IGNORED] * 5 + ids("e f")
    assert row(plain, 1, "labels") == [IGNORED] * 6 + ids("c")


def test_assistant_turns_by_prefix_are_those_by_mask() -> None:
    generator = torch.Generator().manual_seed(0)

    def words() -> str:
        places = torch.randint(10, (int(torch.randint(1, 4, (1,), generator=generator)),), generator=generator)
        return " ".join("abcdefghij"[place] for place in places.tolist())

    chats = []
    for n in range(20):
        turns = [{"role": role, "content": words()} for _ in range(1 + n % 4) for role in ("user", "assistant")]
        chats.append(turns if n % 3 else [{"role": "user", "content": words()}, *turns])
    table = TensorTable({"messages": chats, "row": torch.arange(20)})
    plain, marked = (encode(table, tokenizer(form), "causal-lm", 64) for form in (PLAIN, MARKED))
    for place in range(20):
        for name in ("input_ids", "labels"):
            assert row(plain, place, name) == row(marked, place, name)


def test_a_prompt_for_an_answer_that_the_chat_lacks_is_no_part_of_it() -> None:
    table = TensorTable({"messages": [CHAT], "row": torch.arange(1)})
    thinking = PLAIN.replace("assistant : {% endif %}", "assistant : j {% endif %}")
    found = encode(table, tokenizer(thinking), "causal-lm", 32)
    assert row(found, 0, "labels") == [IGNORED] * 6 + ids("c") + [IGNORED] * 5 + ids("e f")


def test_chats_that_cannot_be_used() -> None:
    def table(*chats: Any) -> TensorTable:
        return TensorTable({"messages": list(chats), "row": torch.arange(len(chats)) + 30})

    with pytest.raises(StreamError, match="no chat template"):
        encode(table(CHAT), tokenizer(), "causal-lm", 32)
    with pytest.raises(StreamError, match="row 31: the chat does not end with the assistant's turn"):
        encode(table(CHAT, CHAT[:3]), tokenizer(PLAIN), "causal-lm", 32)
    with pytest.raises(StreamError, match="row 30: the chat begins with the assistant's turn"):
        encode(table(CHAT[1:2]), tokenizer(PLAIN), "causal-lm", 32)
    forgets = PLAIN.replace("m.content", "(m.content if loop.last or m.role == 'user' else 'j')")
    assert row(encode(table(CHAT[:2]), tokenizer(forgets), "causal-lm", 32), 0, "labels")[6:] == ids("c")
    with pytest.raises(StreamError, match="row 31: the chat template renders message 2 or those before it otherwise"):
        encode(table(CHAT[:2], CHAT), tokenizer(forgets), "causal-lm", 32)
    counts = PLAIN.replace("{% for", "{{ 'abcdefghij'[messages|length] + ' ' }}{% for", 1)
    with pytest.raises(StreamError, match=r"row 30: the chat template renders message 2 .* use a template that marks"):
        encode(table(CHAT[:2]), tokenizer(counts), "causal-lm", 32)
    with pytest.raises(StreamError, match="row 30: nothing of the answer is left within 6 tokens"):
        encode(table(CHAT), tokenizer(MARKED), "causal-lm", 6)


def test_seq2seq_rows() -> None:
    table = TensorTable({"prompt": ["a b", "c"], "completion": ["d", "e f g"], "row": torch.arange(2)})
    found = encode(table, tokenizer(ends=True), "seq2seq", 16)
    batch = found[torch.tensor([0, 1])]
    assert batch["input_ids"].tolist() == [ids("<s> a b </s>"), [*ids("<s> c </s>"), 0]]
    assert batch["labels"].tolist() == [[*ids("<s> d </s>"), IGNORED, IGNORED], ids("<s> e f g </s>")]


def test_missing_text_column() -> None:
    numbers = TensorTable({"inputs": torch.rand(2, 2), "row": torch.arange(2)})
    with pytest.raises(StreamError, match="'classification' reads 'text', and the table has inputs, row"):
        encode(numbers, tokenizer(), "classification", 8)
    with pytest.raises(StreamError, match="'seq2seq' reads 'prompt' \\+ 'completion'"):
        encode(texts(), tokenizer(), "seq2seq", 8)


@pytest.mark.parametrize("objective", ["classification", "causal-lm"])
def test_tables_on_disk_give_the_same_batches(cache: Path, objective: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = texts(23)
    rows = {
        "text": memory.strings("text"),
        "labels": memory.column("labels").numpy(),
        "row": memory.column("row").numpy(),
    }
    disk = ArrowTable(datasets.Dataset.from_dict(rows))
    monkeypatch.setattr(text_room, "_CHUNK", 4)
    one, two = encode(memory, tokenizer(), objective, 8), encode(disk, tokenizer(), objective, 8)
    assert isinstance(two, ArrowTable) and two.lengths is not None and one.lengths is not None
    assert torch.equal(one.lengths, two.lengths)
    index = torch.tensor([22, 0, 3])
    for name, column in one[index].items():
        assert torch.equal(column, two[index][name]), name
    arrow = next(cache.glob("*.arrow"))

    def forbidden(*arguments: Any) -> Any:
        raise AssertionError("tokenised again")

    real = text_room.tokenise
    monkeypatch.setattr(text_room, "tokenise", forbidden)
    other = ArrowTable(datasets.Dataset.from_dict({**rows, "row": memory.column("row").numpy() + 50}))
    again = encode(other, tokenizer(), objective, 8)
    assert again[index]["row"].tolist() == [72, 50, 53] and torch.equal(
        again[index]["input_ids"], two[index]["input_ids"]
    )
    monkeypatch.setattr(text_room, "tokenise", real)
    arrow.unlink()
    arrow.write_bytes(b"damaged")
    mended = encode(ArrowTable(datasets.Dataset.from_dict(rows)), tokenizer(), objective, 8)
    assert torch.equal(mended[index]["input_ids"], two[index]["input_ids"])
