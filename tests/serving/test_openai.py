"""OpenAI's own client gets the answers that it expects."""

import math
import string
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import mlx.core as mx
import mlx_lm
import openai
import pytest
import tokenizers
import torch
import transformers

from mlx_gpt.api import load
from mlx_gpt.config import GenerationConfig
from mlx_gpt.generation.requests import Request
from mlx_gpt.generation.stop_strings import StreamedText
from mlx_gpt.generation.stream import stream
from mlx_gpt.models.directory import save_model
from mlx_gpt.serving.answers import ChatAnswer
from mlx_gpt.serving.models import ServedModel
from mlx_gpt.serving.parsing import ParsedRequest
from mlx_gpt.tokenizer import Tokenizer

from .conftest import served

PROMPT = "The duck swims"
GREEDY = {"temperature": 0}


def text_of(model, tokenizer, prompt=PROMPT, **settings):
    """The text that `mlx-gpt generate` continues a prompt with."""
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
    return "".join(piece.text for piece in stream(model, tokenizer, prompt, GenerationConfig(**neutral | settings)))


# ---- completions ----------------------------------------------------------------------------------------------------


def test_greedy_text_equals_that_of_mlx_lm_and_transformers(client, folders, bpe):
    got = client.completions.create(model="plain", prompt=PROMPT, max_tokens=12, **GREEDY)
    ids = bpe.encode(PROMPT)
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(folders / "plain/best")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders / "plain/best")
    made = theirs.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
    assert got.choices[0].text == tokenizer.decode(made)
    model, wrapped, *_ = mlx_lm.load(str(folders / "plain/best"))
    assert got.choices[0].text == mlx_lm.generate(model, wrapped, PROMPT, max_tokens=12)
    assert len({*got.choices[0].text}) > 3


def test_a_qwen3_is_served_as_a_gpt2_is(make_model, bpe, tmp_path):
    model = make_model(model_type="qwen3", n_head=4, n_kv_head=2)
    save_model(tmp_path / "grouped", model, bpe)
    with served(tmp_path / "grouped") as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        got = client.completions.create(model="grouped", prompt=PROMPT, max_tokens=12, n=2, temperature=0)
    assert [choice.text for choice in got.choices] == [text_of(model, bpe, max_tokens=12, **GREEDY)] * 2


def test_a_streams_chunks_add_up_to_the_whole_answer(client):
    asked = {"model": "plain", "prompt": PROMPT, "max_tokens": 15, "seed": 3, "n": 2}
    whole = client.completions.create(**asked)
    texts, reasons, usage = ["", ""], [None, None], None
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage
    assert chunks[-1].choices == []
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(chunks) > 10


def test_the_same_seed_and_settings_give_the_command_lines_text(client, model, bpe):
    for settings in ({"seed": 5}, {"seed": 5, "top_k": 3}, {"seed": 6, "temperature": 0.4, "repetition_penalty": 1.4}):
        extra = {name: value for name, value in settings.items() if name in ("top_k", "repetition_penalty")}
        plain = {name: value for name, value in settings.items() if name not in extra}
        got = client.completions.create(model="plain", prompt=PROMPT, max_tokens=20, extra_body=extra, **plain)
        assert got.choices[0].text == text_of(model, bpe, max_tokens=20, **settings)


def test_usage_counts_tokens(client, bpe):
    got = client.completions.create(model="plain", prompt=[PROMPT, "A goose"], max_tokens=6, n=2, logprobs=0)
    counted = sum(len(choice.logprobs.tokens) for choice in got.choices)
    lasting = client.completions.create(
        model="plain", prompt=PROMPT, max_tokens=6, n=3, logit_bias={"0": -100, "1": -100, "2": -100}
    )
    assert lasting.usage.completion_tokens == 18
    assert got.usage.prompt_tokens == len(bpe.encode(PROMPT)) + len(bpe.encode("A goose"))
    assert got.usage.completion_tokens == counted
    assert got.usage.total_tokens == got.usage.prompt_tokens + counted
    for choice in got.choices:
        assert (choice.finish_reason == "length") == (len(choice.logprobs.tokens) == 6)


def test_prompts_may_be_texts_or_ids_one_or_several(client, bpe):
    one = client.completions.create(model="plain", prompt=PROMPT, max_tokens=8, **GREEDY).choices[0].text
    ids = bpe.encode(PROMPT)
    for prompt, count in ((ids, 1), ([PROMPT, "Geese"], 2), ([bpe.encode("Geese"), ids], 2)):
        choices = client.completions.create(model="plain", prompt=prompt, max_tokens=8, **GREEDY).choices
        assert [choice.index for choice in choices] == list(range(count))
        assert one in [choice.text for choice in choices]


def test_an_empty_or_missing_prompt_starts_a_new_text(client, http):
    assert client.completions.create(model="plain", prompt="", max_tokens=3, seed=1).usage.prompt_tokens == 1
    assert http.post("/v1/completions", json={}).json()["usage"]["completion_tokens"] <= 16


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("logprobs", [None, 2])
def test_echo_puts_the_prompt_before_the_answer(client, streams, logprobs):
    asked = {"model": "plain", "prompt": PROMPT, "max_tokens": 5, "logprobs": logprobs, **GREEDY}
    alone = client.completions.create(**asked).choices[0].text
    got = client.completions.create(**asked, echo=True, stream=streams)
    texts = [chunk.choices[0].text for chunk in got] if streams else [got.choices[0].text]
    assert "".join(texts) == PROMPT + alone


@pytest.mark.parametrize("count", [1, 8, 9, 10])
def test_echoed_prompts_of_any_length_have_log_probabilities(client, bpe, monkeypatch, count):
    monkeypatch.setattr("mlx_gpt.device.CHUNK_CPU", 8)
    ids = (bpe.encode(PROMPT) * 10)[:count]
    got = client.completions.create(model="plain", prompt=ids, max_tokens=1, echo=True, logprobs=0).choices[0]
    assert got.logprobs.tokens[:count] == [bpe.name_of(token) for token in ids]
    assert [logprob is None for logprob in got.logprobs.token_logprobs] == [True] + [False] * count
    scored = client.completions.create(
        model="plain", prompt=ids, max_tokens=0, echo=True, logprobs=0, logit_bias={str(bpe.end_of_text): 100}
    )
    assert (scored.choices[0].finish_reason, len(scored.choices[0].logprobs.tokens)) == ("length", count)


def test_log_probabilities_equal_the_models(client, model, bpe):
    asked = {"model": "plain", "prompt": PROMPT, "max_tokens": 0, "echo": True, "logprobs": 3}
    choice = client.completions.create(**asked).choices[0]
    given, ids = choice.logprobs, bpe.encode(PROMPT)
    logits = model(mx.array([ids]))[0]
    expected = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    assert "".join(given.tokens) == choice.text == PROMPT
    assert given.token_logprobs[0] is None
    for i, (logprob, best) in enumerate(zip(given.token_logprobs[1:], given.top_logprobs[1:], strict=True)):
        assert logprob == pytest.approx(expected[i, ids[i + 1]].item(), abs=1e-4)
        assert max(best.values()) == pytest.approx(expected[i].max().item(), abs=1e-4)
        assert best[given.tokens[i + 1]] == logprob
        assert len(best) <= 4  # the token itself and three others
    assert [choice.text[at:].startswith(token) for at, token in zip(given.text_offset, given.tokens, strict=True)]


def test_a_text_ends_before_its_stop_string(client):
    whole = client.completions.create(model="plain", prompt=PROMPT, max_tokens=20, **GREEDY).choices[0].text
    stop = whole[8:11]
    got = client.completions.create(model="plain", prompt=PROMPT, max_tokens=20, stop=["☃", stop], **GREEDY).choices[0]
    assert (got.text, got.finish_reason) == (whole[: whole.index(stop)], "stop")
    long = client.completions.create(model="plain", prompt=PROMPT, max_tokens=3, stop="a stop of any length")
    assert long.choices[0].finish_reason


def test_bias_and_penalties_change_the_text(client, bpe):
    asked = {"model": "plain", "prompt": PROMPT, "max_tokens": 12, **GREEDY}
    plain = client.completions.create(**asked, logprobs=0).choices[0]
    got = client.completions.create(**asked, logit_bias={"65": 100}).choices[0].text
    assert got == bpe.decode([65]) * 12
    for name in ("frequency_penalty", "presence_penalty"):
        tokens = client.completions.create(**asked, logprobs=0, **{name: 2}).choices[0].logprobs.tokens
        assert tokens != plain.logprobs.tokens


def test_models_are_listed(client, http):
    models = client.models.list().data
    assert [model.id for model in models] == ["plain", "chatty"]
    assert client.models.retrieve("chatty").id == "chatty"
    assert http.get("/v1/models/plain").json()["context"] == 32
    with pytest.raises(openai.NotFoundError, match="no model of that name"):
        client.models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError, match="this server has plain, chatty"):
        client.completions.create(model="gpt-4", prompt="x")


# ---- conversations --------------------------------------------------------------------------------------------------


def test_a_conversation_becomes_the_prompt_that_transformers_makes(client, folders):
    messages: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The duck swims"}]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders / "chatty")
    ids: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    ids = ids["input_ids"]
    got = client.chat.completions.create(model="chatty", messages=messages, max_tokens=9, **GREEDY)
    same = client.completions.create(model="chatty", prompt=ids, max_tokens=9, **GREEDY)
    assert got.usage.prompt_tokens == len(ids)
    assert got.choices[0].message.content == same.choices[0].text
    assert got.choices[0].message.role == "assistant"
    parts = [{"type": "text", "text": text} for text in ("The duck ", "swims")]
    messages[1] = {"role": "user", "content": parts}
    again = client.chat.completions.create(model="chatty", messages=messages, max_completion_tokens=9, **GREEDY)
    assert again.choices[0].message.content == got.choices[0].message.content


def test_a_conversation_streams(client):
    asked = {"model": "chatty", "messages": [{"role": "user", "content": "Geese"}], "max_tokens": 8, "seed": 2}
    asked |= {"logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**asked).choices[0]
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason
    streamed = [one for chunk in chunks if chunk.choices[0].logprobs for one in chunk.choices[0].logprobs.content]
    assert streamed == whole.logprobs.content
    assert b"".join(bytes(one.bytes) for one in streamed).decode(errors="replace") == whole.message.content
    assert all(len(one.top_logprobs) == 2 and one.logprob <= 0 for one in streamed)


def test_an_answer_can_be_sent_back_with_the_next_question(client):
    messages: list[Any] = [{"role": "user", "content": "Geese"}]
    asked = {"model": "chatty", "max_tokens": 2, "seed": 2}
    messages.append(client.chat.completions.create(messages=messages, **asked).choices[0].message)
    messages.append({"role": "user", "content": "Ducks"})
    assert client.chat.completions.create(messages=messages, **asked).choices[0].message.role == "assistant"


def test_an_answer_can_be_continued(client):
    asked = {"model": "chatty", "max_tokens": 6, **GREEDY}
    for question in string.ascii_letters:  # until the untrained model begins with whole characters
        messages: list[Any] = [{"role": "user", "content": question}]
        whole = client.chat.completions.create(messages=messages, logprobs=True, **asked).choices[0]
        begun = b"".join(bytes(token.bytes) for token in whole.logprobs.content[:3]).decode(errors="replace")
        if begun.isascii():
            break
    assert begun.isascii()
    messages.append({"role": "assistant", "content": begun})
    rest = client.chat.completions.create(messages=messages, extra_body={"continue_final_message": True}, **asked)
    assert (begun + rest.choices[0].message.content).startswith(whole.message.content)
    with pytest.raises(openai.BadRequestError, match="needs a last message from the assistant"):
        client.chat.completions.create(messages=messages[:1], extra_body={"continue_final_message": True}, **asked)


def test_the_bytes_of_an_answers_tokens_add_up_without_byte_tokens():
    """The first word of a text loses its space, so a token's text depends on those before it."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"<unk>": 0, "\u2581a": 1}, []))
    backend.decoder = tokenizers.decoders.Metaspace()
    tokenizer = Tokenizer(backend)
    model = ServedModel("a", Path(), tokenizer, 32, 0, None, Mock())
    parsed = ParsedRequest(model, [Request([1], GenerationConfig(), {}, 1)], True, False)
    answer, text = ChatAnswer(parsed), StreamedText(0, tokenizer, [1], [])
    for reason in ("", "", "length"):
        for piece in text.add(1, reason, -1.0, ((0, -0.5),)):
            answer.add(0, piece)
    [choice] = answer.whole().choices
    assert choice.message.content == " a a a"
    assert choice.logprobs
    assert b"".join(bytes(token.bytes) for token in choice.logprobs.content).decode() == " a a a"


def test_without_a_limit_an_answer_may_fill_the_context(client, folders):
    messages = [{"role": "user", "content": "Geese"}]
    never = dict.fromkeys(map(str, load(folders / "chatty")[1].ends), -100)
    got = client.chat.completions.create(model="chatty", messages=messages, logit_bias=never)
    assert (got.usage.total_tokens, got.choices[0].finish_reason) == (32, "length")


def test_a_model_without_a_template_says_so(client):
    with pytest.raises(openai.BadRequestError, match=r"plain has no chat template.*use /v1/completions"):
        client.chat.completions.create(model="plain", messages=[{"role": "user", "content": "x"}])


def test_a_template_may_refuse_a_conversation(client):
    messages = [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]
    with pytest.raises(openai.BadRequestError, match="system comes first"):
        client.chat.completions.create(model="chatty", messages=messages)


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"tools": [{}]}, "tools", "not supported"),
        ({"logit_bias": {f"{i}": "x" for i in range(200)}}, None, "errors in many places"),
        ({"suffix": "x"}, "suffix", "not supported"),
        ({"best_of": 3}, "best_of", "not supported"),
        ({"nonsense": 1}, "nonsense", "not supported"),
        ({"store": True}, "store", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "should be 'text'"),
        ({"prompt": [*[1] * 200_000, "a"]}, "prompt", "wrong type"),
        ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"top_p": -0.1}, "top_p", "greater than"),
        ({"n": 0}, "n", "greater than"),
        ({"n": 5}, "n", "at most 4"),
        ({"n": True}, "n", "valid integer"),
        ({"prompt": ["x"] * 5}, "prompt", "at most 4"),
        ({"prompt": [[]]}, "prompt", "empty"),
        ({"prompt": [1, 300]}, "prompt", "vocabulary of 300"),
        ({"prompt": [-1]}, "prompt", "greater than"),
        ({"prompt": "duck " * 40}, "prompt", "more than the model's context of 32"),
        ({"prompt": {"x": 1}}, "prompt", "wrong type"),
        ({"max_tokens": 0}, "max_tokens", "only with `echo`"),
        ({"max_tokens": 10**6}, "max_tokens", "at most 4,096"),
        ({"max_tokens": 1.5}, "max_tokens", "integer"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "from 0 to 299"),
        ({"logit_bias": {"300": 1}}, "logit_bias", "from 0 to 299"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "less than or equal to 100"),
        ({"stop": ""}, "stop", "at least 1"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"stream": True, "stream_options": {"nonsense": 1}}, "stream_options", "Extra inputs"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_unsupported_fields_and_wrong_values_are_refused_by_name(http, body, param, words):
    answer = http.post("/v1/completions", json={"model": "plain", "prompt": "x"} | body)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["param"] == param
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]


def test_a_body_with_thousands_of_errors_gets_one_sentence(http):
    answer = http.post("/v1/completions", json={f"nonsense{i}": i for i in range(5_000)})
    assert answer.status_code == 400
    assert "errors in many places" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        {"user": "me"}, {"suffix": None}, {"tools": None}, {"best_of": None}, {"best_of": 1}, {"store": None},
        {"response_format": {"type": "text"}}, {"verbosity": None},
    ],
)  # fmt: skip
def test_fields_without_effect_are_accepted(http, body):
    assert http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1} | body).status_code == 200


@pytest.mark.parametrize("body", [{"top_logprobs": 2}, {"max_tokens": 3, "max_completion_tokens": 4}, {"messages": []}])
def test_a_conversation_is_checked_too(http, body):
    asked = {"model": "chatty", "messages": [{"role": "user", "content": "x"}]} | body
    assert http.post("/v1/chat/completions", json=asked).status_code == 400


def test_probabilities_add_up_to_at_most_one(client):
    got = (
        client.completions.create(model="plain", prompt=PROMPT, max_tokens=5, logprobs=20, **GREEDY).choices[0].logprobs
    )
    for best, logprob in zip(got.top_logprobs, got.token_logprobs, strict=True):
        assert sum(map(math.exp, best.values())) <= 1 + 1e-5
        assert logprob == max(best.values())
