"""Conversations in `mlx-gpt generate --interactive`, for models that have a chat template."""

import contextlib
import json
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import click

from mlx_gpt.chat_template import ChatTemplate
from mlx_gpt.cli.session import Session
from mlx_gpt.config import GenerationConfig
from mlx_gpt.errors import UserError, os_errors_explained, shown
from mlx_gpt.files import append_line, expanded
from mlx_gpt.generation.dialogue import Dialogue
from mlx_gpt.generation.stop_strings import Piece
from mlx_gpt.tokenizer import Tokenizer


class ConversingSession(Session):
    """A session in which each text is a message, and the model answers it."""

    greeting = 'Write a message. Put """ around one of several lines. /help shows the commands, Ctrl-D quits.'
    help = """\
Write a message and press Enter: the model answers it, and remembers what was said before.
/again        asks for another answer to the newest message
/undo         takes back the newest message and its answer
/clear, /new  begins a new conversation; the system message stays
/system TEXT  says how to answer; /system alone shows it, and /system "" removes it
/save FILE    adds the conversation to a .jsonl file, as a row for `mlx-gpt prepare`, or updates its row there"""
    fixed = ("num_samples",)

    def __init__(self, model: Any, tokenizer: Tokenizer, template: ChatTemplate, config: GenerationConfig) -> None:
        if config.num_samples != 1:
            raise UserError("A message in a conversation gets one answer: leave --num-samples out.")
        super().__init__(model, tokenizer, config)
        self._dialogue = Dialogue(model, tokenizer, template)
        self._saved: dict[Path, list[dict[str, str]]] = {}  # the messages of this conversation in each file
        self.commands |= {
            "again": self._again, "clear": self._clear, "new": self._clear, "save": self._save, "system": self._system,
            "undo": self._undo,
        }  # fmt: skip

    def say(self, text: str) -> None:
        """Print the answer to a message.

        Raises:
            KeyboardInterrupt: Ctrl-C stopped the answer; a line has said so.
            UserError: the message does not fit into the context, or the template refuses it.
        """
        self._print(lambda: self._dialogue.ask(text, self.config), "the message was taken back")

    def _again(self, rest: str) -> None:
        self._print(lambda: self._dialogue.again(self.config), "the earlier answer stays")

    def _print(self, begin: Callable[[], Generator[Piece, None, None]], otherwise: str) -> None:
        """Print an answer while the model makes it, then any remarks about it.

        Args:
            begin: starts the answer.
            otherwise: says what happens if there is no answer.
        """
        dialogue, unseen = self._dialogue, self._dialogue.unseen
        pieces = begin()
        if dialogue.unseen > unseen:
            oldest = "oldest exchange" if dialogue.unseen == 1 else f"{dialogue.unseen:,} oldest exchanges"
            _note(f"The context of {dialogue.context:,} tokens is full: the model no longer sees the {oldest}.")
        text, reason, stopped = "", "", False
        try:
            with contextlib.closing(pieces):
                for piece in pieces:
                    text, reason = text + piece.text, piece.reason
                    click.echo(piece.text, nl=False)
        except KeyboardInterrupt:
            stopped = True
        click.echo()
        if not text.strip():
            _note(f"{'Stopped before the answer' if stopped else 'The model answered nothing'}: {otherwise}.")
        elif stopped:
            _note("Stopped. What is above stays in the conversation; /undo takes it back.")
        elif reason == "length" and dialogue.limit < self.config.max_tokens:
            _note(f"The answer ends here because the context of {dialogue.context:,} tokens is full.")
        elif reason == "length":
            _note(f"The answer ends here after {dialogue.limit:,} tokens: /max_tokens allows more.")
        if stopped:
            raise KeyboardInterrupt

    def _undo(self, rest: str) -> None:
        _note(f"Took back: {shown(' '.join(self._dialogue.undo().question.split()))}")

    def _clear(self, rest: str) -> None:
        self._dialogue.clear()
        self._saved.clear()
        _note(f"A new conversation.{' The system message stays.' if self._dialogue.system else ''}")

    def _system(self, rest: str) -> None:
        if rest:
            quoted = rest[0] in "\"'" and rest.find(rest[0], 1) == len(rest) - 1
            self._dialogue.system = rest[1:-1] if quoted else rest
        system = self._dialogue.system
        click.echo(f"The system message is: {system}" if system else "There is no system message.", err=True)

    def _save(self, rest: str) -> None:
        path = expanded(rest)
        if path.suffix != ".jsonl" or "\0" in rest:
            raise UserError("/save needs the name of a .jsonl file, as in /save talks.jsonl.")
        if not self._dialogue.exchanges:
            raise UserError("There is nothing to save yet: write a message first.")
        messages, before = self._dialogue.messages, self._saved.get(path, [])
        continues = messages[: len(before)] == before  # not if a message was taken back or answered anew
        with os_errors_explained(f"write {path}"):
            replaced = append_line(path, _row(messages), instead_of=_row(before) if before and continues else "")
        self._saved[path] = messages
        if replaced:
            _note(f"Replaced this conversation's row, the last one in {path}.")
        else:
            _note(f"Added the conversation to {path} as its last row.")


def _row(messages: list[dict[str, str]]) -> str:
    """Return a conversation as a row that `mlx-gpt prepare` reads."""
    return json.dumps({"messages": messages}, ensure_ascii=False)


def _note(text: str) -> None:
    """Print a remark, apart from the model's words."""
    click.echo(f"({text})", err=True)
