"""Turns a stream of token ids into text."""

import codecs
from collections.abc import Sequence

from tokenizers import decoders

from mlx_gpt.tokenizer import CANNOT_DECODE, Tokenizer, failing_as


class Detokenizer:
    """Turns a stream of ids into text, in whole characters and without losing any.

    Args:
        tokenizer: the tokenizer of the ids.
        before: the ids before the stream. Some tokenizers write a space or not depending on these.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stream = decoders.DecodeStream(ids=list(before), skip_special_tokens=True)
        self._ids: list[int] = []
        self._returned = 0  # characters

    def add(self, token: int) -> str:
        """Return the text that this token completes; "" while a character is unfinished."""
        pieces = self._tokenizer.token_bytes
        if pieces is None:
            self._ids.append(token)
            with failing_as(CANNOT_DECODE):
                text = self._stream.step(self._tokenizer.backend, token) or ""
            self._returned += len(text)
            return text
        return self._utf8.decode(pieces[token] if token < len(pieces) else b"")

    def finish(self) -> str:
        """Return the rest of the text: U+FFFD if the last character is unfinished, else usually nothing."""
        if self._tokenizer.token_bytes is None:
            return self._tokenizer.decode(self._ids)[self._returned :]
        return self._utf8.decode(b"", final=True)
