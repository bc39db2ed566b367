"""Turns conversations into text and ids, with the chat template of a model's tokenizer."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from mlx_gpt.errors import UserError, os_errors_explained, shown
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

    Raises:
        UserError: the template has a syntax error.
    """

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
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
        environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
        environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # a syntax error, or brackets nested too deeply
            raise UserError(f"{UNUSABLE}: {shown(error, 200).rstrip('.')}.") from None
        self._variables = dict(variables)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "ChatTemplate | None":
        """Return the template that a tokenizer brings along; None if it has none.

        Raises:
            UserError: the template cannot be used.
        """
        chat = tokenizer.chat
        if not chat:
            return None
        return cls(chat["chat_template"], {name: chat[name] for name in VARIABLES if name in chat})

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

    def ids(self, messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> list[int]:
        """Return the ids of the text that `text` returns, with its special tokens. Errors as in `text`."""
        return tokenizer.encode(self.text(messages), special=True)


def read_chat(folder: Path) -> dict[str, str]:
    """Return the chat template of a model directory, in the form of `Tokenizer.chat`; {} if there is none.

    The template is `chat_template.jinja`, or else `chat_template` in `tokenizer_config.json`.

    Raises:
        UserError: `chat_template.jinja` cannot be read, or is not UTF-8.
    """
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        config = {}
    config = config if isinstance(config, dict) else {}
    source = config.get("chat_template")
    if isinstance(source, list):  # several templates with names
        named = [one for one in source if isinstance(one, dict)]
        source = next((one.get("template") for one in named if one.get("name") == "default"), None)
    if (file := folder / "chat_template.jinja").is_file():
        try:
            with os_errors_explained(f"read {file}"):
                source = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{UNUSABLE}: {file} is not UTF-8 text: save it as UTF-8.") from None
    if not isinstance(source, str):
        return {}
    chat = {"chat_template": source}
    for name in VARIABLES:
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            chat[name] = token
    return chat


def _refuse(message: str) -> None:
    """Refuse a conversation; templates call this as `raise_exception`."""
    raise UserError(shown(message, 200))
