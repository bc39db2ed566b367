"""Tokens to text as they come: whole characters, and nothing of a stop string."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from mlx_gpt.tokenizer import Detokenizer, Tokenizer

Reason = Literal["", "end", "stop", "length"]


@dataclass(frozen=True)
class Token:
    """A token of a text.

    Attributes:
        id: in the vocabulary.
        text: what it adds: nothing, while a character is unfinished.
        logprob: natural logarithm of the probability that the model gave it, if that was asked for. The first token of
            a prompt has none.
        alternatives: the likeliest tokens in its place and their log-probabilities, from the likeliest down.
    """

    id: int
    text: str
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """Some of one text as it is made.

    Attributes:
        sample: 0, 1, ... of `num_samples`.
        text: what has become certain.
        reason: why the text ends with this piece: it ended itself, a stop string, or `max_tokens`; else empty.
        tokens: those whose text is certain now.
    """

    sample: int
    text: str
    reason: Reason = ""
    tokens: tuple[Token, ...] = ()


class Text:
    """One text while it is made: what is certain of it, and what a stop string still holds back.

    Attributes:
        reason: why it has ended; empty as long as it goes on.
    """

    def __init__(self, sample: int, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self.reason: Reason = ""
        self._sample, self._stop = sample, tuple(stop)
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._held = ""
        self._waiting: list[Token] = []  # the first of which may be certain in part
        self._told = 0  # characters of that one

    def add(
        self,
        token: int,
        reason: Reason,
        logprob: float | None = None,
        alternatives: tuple[tuple[int, float], ...] = (),
    ) -> Iterator[Piece]:
        """The piece that this token makes certain, if any.

        Args:
            reason: why it is the last one; the end of a text is no part of it.
        """
        added = self._detokenizer.add(token) if reason != "end" else ""
        if reason:
            added += self._detokenizer.finish()
        if reason != "end":
            self._waiting.append(Token(token, added, logprob, alternatives))
        self._held += added
        self.reason = reason
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.reason, certain = "stop", min(found)
        elif reason:
            certain = len(self._held)
        else:
            certain = len(self._held) - held_back(self._held, self._stop)
        text, self._held = self._held[:certain], self._held[certain:]
        tokens = self._certain(len(text))
        if text or self.reason or tokens:
            yield Piece(self._sample, text, self.reason, tokens)

    def _certain(self, characters: int) -> tuple[Token, ...]:
        """The tokens that so many more characters complete; before a stop string, the one that it cuts as well."""
        certain = self._told + characters
        count = begin = end = 0
        for i, token in enumerate(self._waiting, 1):
            start, end = end, end + len(token.text)
            if (start >= certain) if self.reason == "stop" else (end > certain):
                break
            if token.text or self.reason:  # one that only begins a character waits for those that complete it
                count, begin = i, end
        tokens, self._waiting = tuple(self._waiting[:count]), self._waiting[count:]
        self._told = certain - begin
        return tokens


def held_back(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop string."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
