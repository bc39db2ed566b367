"""A conversation gets the same ids as when the model is used, and the right ids count in the loss."""

import json
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from mlx_gpt.chat_template import CHATML, ChatTemplate
from mlx_gpt.data.chat_tokens import BEGINS, COUNTS, NEW, tokenize_conversations, transcripts
from mlx_gpt.data.corpus import open_corpus
from mlx_gpt.data.tokens import ID
from mlx_gpt.errors import UserError
from mlx_gpt.tokenizer import Tokenizer


def turns(*contents, system=""):
    roles = ["user", "assistant"] * len(contents)
    first = [{"role": "system", "content": system}] if system else []
    return first + [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]


TALKS = [
    turns("Does the duck swim?", "In a pond."),
    turns("the geese?", "They look on 🦆", "naïve 鳥?", "don't they\n", system="Be brief."),
    turns("Say a space.", "  space"),
]
# As in Qwen3: the reasoning of earlier answers is removed.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('No system message, please.') }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content != 'secret' %}"
    "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# As Mistral's: the last message has the system message in it if it is the user's, and the end is a token.
MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set system, turns = messages[0].content + '\n\n', messages[1:] %}"
    "{% else %}{% set system, turns = '', messages %}{% endif %}{% for m in turns %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + (system if loop.last else '') + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
)
WITHOUT_AN_END = (
    "{% for m in messages %}{{ m.role + ':\n' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
BYTE_OF_PIECE = {piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


@pytest.fixture
def talking(tokenizer):
    """Each kind of tokenizer in turn, with ChatML."""
    copy = Tokenizer(type(tokenizer.backend).from_str(tokenizer.to_json()))
    copy.converse(CHATML)
    return copy


@pytest.fixture
def encode(tmp_path):
    """Encode conversations, and return the rows of the training split."""

    def encode(tokenizer, train, loss_on="assistant", echo=lambda line: None):
        for split, talks in (("train", train), ("val", TALKS[:1])):
            rows = [json.dumps({"messages": talk}) + "\n" for talk in talks]
            (tmp_path / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")
        tokens = tokenize_conversations(open_corpus(tmp_path), tokenizer, loss_on, echo=echo).train
        begins = np.flatnonzero(tokens & BEGINS)
        return np.split(np.array(tokens), begins[1:])

    return encode


def test_the_ids_are_each_prompt_and_the_answer_that_follows_it(talking, encode):
    template: Any = ChatTemplate.of(talking)
    rows = encode(talking, TALKS)
    assert len(rows) == len(TALKS)
    for talk, row in zip(TALKS, rows, strict=True):
        ids = (row & ID).tolist()
        for i, message in enumerate(talk):
            if message["role"] == "assistant":
                prompt = template.ids(talk[:i], talking)
                assert ids[: len(prompt)] == prompt
                answer = ids[len(prompt) : ids.index(talking.backend.token_to_id("<|im_end|>"), len(prompt))]
                assert talking.decode(answer) == message["content"]
        assert ids[-1] == talking.end_of_text


def test_no_space_is_put_before_an_answer_that_the_text_does_not_have(encode):
    """SentencePiece puts a space before any text that it encodes."""
    characters = sorted(set("".join(message["content"] for message in TALKS[0]) + "▁\nuserasistant"))
    backend = HFTokenizer(models.BPE({character: i for i, character in enumerate(characters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer = Tokenizer(backend)
    tokenizer.converse(CHATML)
    template: Any = ChatTemplate.of(tokenizer)
    (row,) = encode(tokenizer, TALKS[:1])
    assert (row & ID).tolist()[:-1] == tokenizer.encode(template.text(TALKS[0], answering=False), special=True)


def sentencepiece(scheme, merges=()):
    """A tokenizer that puts a space before each text, or each part of it, as Llama's tokenizers do."""
    characters = sorted(set("".join(message["content"] for talk in TALKS for message in talk) + "▁\n<|>userasitn"))
    pieces = [*characters, *("".join(merge) for merge in merges)]
    backend = HFTokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, list(merges)))
    if scheme == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    backend.add_special_tokens(["</s>"])
    tokenizer = Tokenizer(backend, backend.token_to_id("</s>"))
    tokenizer.converse(ZEPHYR)
    return tokenizer


@pytest.mark.parametrize("scheme", ["always", "first", "normalizer"])
def test_later_turns_have_the_ids_of_the_conversation_where_parts_get_a_space_before_them(encode, scheme):
    tokenizer = sentencepiece(scheme)
    template: Any = ChatTemplate.of(tokenizer)
    (row,) = encode(tokenizer, TALKS[1:2])
    ids = (row & ID).tolist()
    assert ids[:-1] == template.ids(TALKS[1], tokenizer)[: len(ids) - 1]
    prompt = template.ids(TALKS[1][:4], tokenizer)
    assert ids[: len(prompt)] == prompt
    end = ids.index(tokenizer.backend.token_to_id("</s>"), len(prompt)) + 1
    assert np.flatnonzero(row & COUNTS)[-(end - len(prompt)) :].tolist() == list(range(len(prompt), end))
    assert not (row & COUNTS)[end:].any()


@pytest.mark.parametrize("scheme", ["always", "first", "normalizer"])
def test_an_answer_that_has_begun_has_the_ids_of_training(encode, scheme):
    tokenizer, talk = sentencepiece(scheme), TALKS[1]
    template: Any = ChatTemplate.of(tokenizer)
    (row,) = encode(tokenizer, [talk])
    begun = talk[-1]["content"][:5]
    found = template.ids(talk[:-1], tokenizer, begun)
    assert found == (row & ID).tolist()[: len(found)]
    assert tokenizer.decode(found[len(template.ids(talk[:-1], tokenizer)) :]) == begun


@pytest.mark.parametrize("scheme", ["always", "first", "normalizer"])
def test_an_answer_that_has_begun_has_the_ids_of_training_where_a_token_would_span_both(encode, scheme):
    tokenizer = sentencepiece(scheme, [("▁", "I"), ("▁I", "n")])
    tokenizer.converse(ZEPHYR.replace("\n", " "))
    template: Any = ChatTemplate.of(tokenizer)
    talk = turns("Does the duck swim?", "In a pond.", "the geese?", "look on")
    rows = encode(tokenizer, [talk])
    found = template.ids(talk[:1], tokenizer, "In a")
    assert found == (rows[1] & ID).tolist()[: len(found)]
    assert found[: len(template.ids(talk[:1], tokenizer))] == template.ids(talk[:1], tokenizer)


def test_a_template_with_todays_date_writes_the_same_on_any_day(encode):
    tokenizer = Tokenizer.of_bytes()
    tokenizer.converse("{{ strftime_now('%Y-%m-%d') }}" + CHATML)
    (row,) = encode(tokenizer, TALKS[:1])
    assert tokenizer.decode((row & ID).tolist()).startswith("2026-01-01")


@pytest.mark.parametrize("scheme", ["always", "first", "normalizer", "bytes"])
def test_an_answer_continues_the_ids_of_its_prompt_where_a_token_would_span_both(encode, scheme):
    if scheme == "bytes":
        backend = HFTokenizer(models.BPE(BYTE_OF_PIECE | {"ĠI": 256, "ĠIn": 257}, [("Ġ", "I"), ("ĠI", "n")]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
        backend.add_special_tokens(["</s>"])
        tokenizer = Tokenizer(backend, backend.token_to_id("</s>"))
    else:
        tokenizer = sentencepiece(scheme, [("▁", "I"), ("▁I", "n")])
    tokenizer.converse(ZEPHYR.replace("\n", " "))  # it asks for an answer with a space at the end
    template: Any = ChatTemplate.of(tokenizer)
    talk = turns("Does the duck swim?", "In a pond.", "the geese?", "look on")
    rows = encode(tokenizer, [talk])
    assert len(rows) == 2
    assert [bool(row[0] & NEW) for row in rows] == [True, False]
    everything = [tokenizer.decode((row & ID)[(row & COUNTS) > 0]) for row in encode(tokenizer, [talk], "all")]
    assert ["pond" in text for text in everything] == [False, True]
    for row, messages, answer in [(rows[0], talk[:3], "look on"), (rows[1], talk[:1], "In a pond.")]:
        prompt, ids = template.ids(messages, tokenizer), (row & ID).tolist()
        assert ids[: len(prompt)] == prompt
        counting = (row & COUNTS) > 0
        assert not counting[: len(prompt)].any()
        assert tokenizer.decode(ids[: int(np.flatnonzero(counting)[-1])]) == tokenizer.decode(prompt) + answer


def test_the_answers_and_their_ends_count_and_nothing_else(byte_tokenizer, encode):
    tokenizer = Tokenizer.of_bytes()
    tokenizer.converse(CHATML)
    row = encode(tokenizer, TALKS[1:2])[0]
    counting = "".join("#" if i == 258 else chr(i) if i < 128 else "_" for i in (row & ID)[(row & COUNTS) > 0].tolist())
    assert counting == "They look on ____#don't they\n#"
    everything = encode(tokenizer, TALKS[1:2], "all")[0]
    assert (everything & COUNTS > 0).tolist() == [False] + [True] * (len(row) - 1)


def test_a_template_that_changes_earlier_turns_gives_a_row_for_each_answer(bpe, encode):
    tokenizer = Tokenizer(type(bpe.backend).from_str(bpe.to_json()))
    tokenizer.converse(FORGETFUL)
    talk = turns("one?", "hm</think>two", "three?", "so</think>four")
    rows = encode(tokenizer, [talk])
    texts = [tokenizer.backend.decode((row & ID).tolist(), skip_special_tokens=False) for row in rows]
    assert ["hm</think>" in text for text in texts] == [True, False]
    assert [bool(row[0] & NEW) for row in rows] == [True, False]
    assert [tokenizer.decode((row & ID)[(row & COUNTS) > 0]) for row in rows] == ["hm</think>two", "so</think>four"]


def test_a_system_message_may_stand_in_the_last_question_only(bpe, encode):
    tokenizer = Tokenizer(type(bpe.backend).from_str(bpe.to_json()))
    tokenizer.converse(MISTRAL)
    template: Any = ChatTemplate.of(tokenizer)
    rows = encode(tokenizer, TALKS[1:2])
    for row, place in zip(rows, (2, 4), strict=True):
        prompt, ids = template.ids(TALKS[1][:place], tokenizer), (row & ID).tolist()
        assert "Be brief." in tokenizer.decode(prompt)
        assert ids[: len(prompt)] == prompt
        assert tokenizer.decode((row & ID)[(row & COUNTS) > 0]) == " " + TALKS[1][place]["content"]


def test_the_end_of_text_ends_an_answer_that_the_template_does_not_end(bpe, encode):
    """Without it, a model would never learn to stop."""
    tokenizer = Tokenizer(type(bpe.backend).from_str(bpe.to_json()))
    tokenizer.converse(WITHOUT_AN_END)
    (row,) = encode(tokenizer, TALKS[1:2])
    counting = (row & ID)[(row & COUNTS) > 0]
    assert tokenizer.decode(counting) == "They look on 🦆\ndon't they\n\n"
    assert counting[-1] == tokenizer.end_of_text
    tokenizer.converse(CHATML)
    (row,) = encode(tokenizer, TALKS[1:2])
    assert not row[-1] & COUNTS


def test_with_the_loss_on_all_no_message_counts_twice(bpe, encode):
    """A row for each answer repeats the messages before it."""
    tokenizer = Tokenizer(type(bpe.backend).from_str(bpe.to_json()))
    tokenizer.converse(FORGETFUL)
    rows = encode(tokenizer, [turns("one?", "hm</think>two", "three?", "so</think>four")], "all")
    counted = "".join(tokenizer.decode((row & ID)[(row & COUNTS) > 0]) for row in rows)
    assert [counted.count(word) for word in ("one?", "two", "three?", "four")] == [1, 1, 1, 1]
    again = encode(tokenizer, [turns("one?", "hm</think>two", "a", "so</think>four")], "all")[1]
    assert tokenizer.decode((again & ID)[(again & COUNTS) > 0]).split("\n")[0] == "a"
    tokenizer.converse(CHATML)
    whole = encode(tokenizer, TALKS[:1], "all")[0]
    assert ((whole & COUNTS) > 0)[1:].all()


def test_conversations_that_the_template_refuses_or_writes_without_an_answer_are_counted(bpe, encode):
    tokenizer = Tokenizer(type(bpe.backend).from_str(bpe.to_json()))
    tokenizer.converse(NO_SYSTEM)
    lines: list[str] = []
    assert len(encode(tokenizer, [*TALKS, turns("Hello?", "secret")], echo=lines.append)) == 2
    assert lines == [
        "WARNING: left out 1 conversations: No system message, please.",
        "WARNING: left out 1 conversations: the template writes no answer.",
    ]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ raise_exception('Never.') }}", "Never"),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}A:{% endif %}",
            "generation prompt",
        ),
    ],
)
def test_a_template_that_refuses_all_is_one_sentence(bpe, encode, template, words):
    tokenizer = Tokenizer(type(bpe.backend).from_str(bpe.to_json()))
    tokenizer.converse(template)
    with pytest.raises(UserError, match=rf"^No conversation of .*train.jsonl can be used: .*{words}.*\.$"):
        encode(tokenizer, TALKS)


def test_a_transcript_is_the_whole_text_with_the_places_of_its_answers():
    template = ChatTemplate(CHATML, {})
    ((text, answers, _),) = transcripts(TALKS[1], template)
    assert text == template.text(TALKS[1], answering=False)
    assert [text[begin:end] for begin, end in answers] == ["They look on 🦆<|im_end|>\n", "don't they\n<|im_end|>\n"]


def test_the_files_are_made_once_for_each_template_and_loss(bpe, encode, tmp_path):
    tokenizer = Tokenizer(type(bpe.backend).from_str(bpe.to_json()))
    for template, loss_on in [(CHATML, "assistant"), (CHATML, "assistant"), (CHATML, "all"), (FORGETFUL, "all")]:
        tokenizer.converse(template)
        encode(tokenizer, TALKS, loss_on)
    assert len(list(tmp_path.glob("*.train.npy"))) == 3
