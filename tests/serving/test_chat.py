"""Conversations through OpenAI's client: one model always answers the same, another depends on the whole prompt."""

from typing import Any

import openai
import pytest

from mlx_gpt import api
from mlx_gpt.chat_template import ChatTemplate
from mlx_gpt.config import GenerationConfig
from mlx_gpt.generation.dialogue import Dialogue

from .conftest import served

HI: list[Any] = [{"role": "user", "content": "Hi"}]
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must take turns: user, assistant, user, ...') }}{% endif %}{{ m.content }}{% endfor %}"
)


@pytest.fixture(scope="module")
def url(tmp_path_factory, with_template, make_model, quacking, rambling):
    strict = with_template(
        tmp_path_factory.mktemp("models") / "strict",
        lambda tokenizer: make_model(vocab_size=tokenizer.vocab_size),
        ALTERNATING,
    )
    with served(quacking, rambling, strict, max_batch=2, max_queue=4) as url:
        yield url


@pytest.fixture
def chat(client):
    """Ask a model for an answer."""

    def chat(model="quacking", messages=HI, **settings) -> Any:
        return client.chat.completions.create(model=model, messages=messages, **settings)

    return chat


def message(role, content):
    return {"role": role, "content": content}


def test_an_answer_ends_at_the_end_of_its_turn(chat):
    got = chat()
    assert got.choices[0].message.content == "Quack."
    assert got.choices[0].finish_reason == "stop"
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (21, 6)


def test_a_stream_ends_in_the_same_way(chat):
    *chunks, usage = chat(stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Quack."
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, "stop"]
    assert usage.usage.completion_tokens == 6


def test_max_tokens_and_stop_strings_end_an_answer(chat):
    short = chat(max_tokens=3).choices[0]
    assert (short.message.content, short.finish_reason) == ("Qua", "length")
    exact = chat(max_completion_tokens=6).choices[0]
    assert (exact.message.content, exact.finish_reason) == ("Quack.", "length")
    stopped = chat(stop=["ck"]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == ("Qua", "stop")


def test_answers_are_those_of_the_command_line(chat, rambling):
    model, tokenizer = api.load(rambling)
    template = ChatTemplate.of(tokenizer)
    assert template
    dialogue = Dialogue(model, tokenizer, template)
    dialogue.system = "Swim."
    messages = [message("system", "Swim.")]
    config = GenerationConfig(max_tokens=9, temperature=0, repetition_penalty=1)
    for question in ("The duck", "Geese"):
        messages.append(message("user", question))
        expected = "".join(piece.text for piece in dialogue.ask(question, config))
        got = chat("rambling", messages, max_tokens=9, temperature=0).choices[0].message
        assert got.content == expected
        messages.append(got)


def test_a_developers_message_is_a_system_message(chat):
    """It is OpenAI's newer name for the system, and templates do not know it."""
    asked = {"model": "rambling", "max_tokens": 9, "temperature": 0}
    system, developer = (
        chat(messages=[message(role, "Swim."), *HI], **asked).choices[0].message.content
        for role in ("system", "developer")
    )
    assert system == developer != chat(messages=HI, **asked).choices[0].message.content


@pytest.mark.parametrize("streams", [False, True])
def test_a_conversation_longer_than_the_context_is_refused(chat, streams):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(messages=[message("user", "x" * 200)], stream=streams)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "messages"
    assert caught.value.type == "invalid_request_error"
    assert "The conversation has 219 tokens, more than the model's context of 128" in caught.value.message


def test_an_answer_ends_where_the_context_does(chat):
    """Otherwise the engine would drop the older half of the context, and the system message with it."""
    for settings in ({}, {"max_tokens": 1000}):
        got = chat("rambling", [message("user", "x" * 200)], temperature=0, **settings)
        assert got.choices[0].finish_reason == "length"
        assert got.usage.total_tokens == 256


def test_roles_in_another_order_are_refused_in_the_templates_words(chat):
    for roles in (["assistant"], ["user", "user"], ["system", "user"]):
        with pytest.raises(openai.BadRequestError, match="Roles must take turns: user, assistant") as caught:
            chat("strict", [message(role, "x") for role in roles])
        assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "`messages`: List should have at least 1 item"),
        ([{"role": "user"}], "`messages.0.content` is missing."),
        ([*HI, {"role": "assistent", "content": "x"}], "`messages.1.role`: Input should be 'system'"),
        ([{"role": "tool", "content": "x", "tool_call_id": "1"}], "`messages.0.role`: Input should be 'system'"),
        ([{"role": "user", "content": None}], "`messages.0.content` has the wrong type"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "`messages.0.content` has"),
        ("Hi", "`messages`: Input should be a valid list."),
    ],
    ids=str,
)
def test_messages_of_other_kinds_are_refused_by_place(chat, messages, words):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(messages=messages)
    assert caught.value.param == "messages"
    assert words in caught.value.message
