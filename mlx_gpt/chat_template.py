"""Turns conversations into text and ids, with the chat template of a model's tokenizer."""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from mlx_gpt.errors import UserError, shown
from mlx_gpt.tokenizer import Tokenizer

# ChatML (OpenAI 2023): mlx-gpt trains on conversations with this template, unless the model has one already.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
VARIABLES = ("bos_token", "eos_token", "unk_token", "pad_token")
UNUSABLE = "The model's chat template can't be used"
REFUSED = "The model's chat template refuses these messages"


class ChatTemplate:
    """A Jinja template that turns messages into text, as in transformers.

    Args:
        source: the template.
        variables: further variables for the template, such as `eos_token`.
        now: the time for templates that write today's date.

    Raises:
        UserError: the template has a syntax error.
    """

    def __init__(self, source: str, variables: Mapping[str, str], now: Callable[[], datetime] = datetime.now) -> None:
        from jinja2.ext import Extension, loopcontrols
        from jinja2.nodes import Node
        from jinja2.parser import Parser
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Generation(Extension):
            """Ignores the tags around the assistant's words, which only transformers uses."""

            tags = {"generation"}  # noqa: RUF012 - the base class declares it in this way

            def parse(self, parser: Parser) -> list[Node]:
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
        )
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda pattern: now().strftime(pattern)
        environment.filters["tojson"] = _to_json
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # a syntax error, or brackets nested too deeply
            raise UserError(f"{UNUSABLE}: {shown(error, 200).rstrip('.')}.") from None
        # Templates ask whether these two are none, and transformers always passes them.
        self._variables = {"tools": None, "documents": None, **variables}

    @classmethod
    def of(cls, tokenizer: Tokenizer, now: Callable[[], datetime] = datetime.now) -> "ChatTemplate | None":
        """Return the template that a tokenizer brings along; None if it has none. `now` is as in `ChatTemplate`.

        Raises:
            UserError: the template cannot be used.
        """
        chat = tokenizer.chat
        if not chat:
            return None
        return cls(chat["chat_template"], {name: chat[name] for name in VARIABLES if name in chat}, now)

    def text(self, messages: Sequence[Mapping[str, Any]], answering: bool = True) -> str:
        """Return the text of a conversation, up to the place where the assistant answers.

        Args:
            answering: end with the beginning of an answer.

        Raises:
            UserError: the template refuses the messages.
        """
        try:
            return self._template.render(messages=messages, add_generation_prompt=answering, **self._variables)
        except UserError:
            raise
        except Exception as error:  # a template is somebody else's program and may fail in any way
            raise UserError(f"{REFUSED}: {shown(error, 200).rstrip('.')}.") from None

    def ids(self, messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, begun: str = "") -> list[int]:
        """Return the ids of the text that `text` returns, with its special tokens, and of an answer that has begun.

        They are those that the same answer has in training (see `tokenize_conversations`), except for today's date.

        Raises:
            UserError: the template refuses the messages, or the tokenizer can't encode them or the answer.
        """
        prompt = self.text(messages)
        ids = tokenizer.encode(prompt, special=True)
        if not begun:
            return ids
        whole = tokenizer.encode(prompt + begun, special=True)
        try:
            return whole if whole[: len(ids)] == ids else ids + tokenizer.continuation(ids, begun, whole)
        except UserError as error:
            raise UserError(f"The answer can't be continued, because {error}") from None


def chatml(tokenizer: Tokenizer) -> str:
    """Return ChatML, after the token that begins each text if the model expects one, as Llama and Gemma do."""
    return "{{ bos_token }}" + CHATML if tokenizer.start else CHATML


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Return a value as JSON; templates call this as `tojson`, as in transformers."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    """Refuse a conversation; templates call this as `raise_exception`."""
    raise UserError(shown(message, 200))
