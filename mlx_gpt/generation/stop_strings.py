"""Turns a stream of tokens into text, in whole characters and up to a stop string."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from mlx_gpt.detokenizer import Detokenizer
from mlx_gpt.tokenizer import Tokenizer

Reason = Literal["", "end", "stop", "length"]


@dataclass(frozen=True)
class Token:
    """A token of a text.

    Attributes:
        id: its id in the vocabulary.
        text: the text that it adds; "" while a character is unfinished.
        logprob: natural logarithm of the probability that the model gave it, if requested. The first token of a prompt
            has none.
        alternatives: the likeliest tokens in its place, with their log-probabilities, the likeliest first.
    """

    id: int
    text: str
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """The next piece of a text that is being generated.

    Attributes:
        sample: the number of the text, from 0 to `num_samples` - 1.
        text: the characters that are now certain.
        reason: why the text ends with this piece: "end" for the end-of-text token, "stop" for a stop string, "length"
            for `max_tokens`. It is "" if the text does not end here.
        tokens: the tokens whose text is now certain.
    """

    sample: int
    text: str
    reason: Reason = ""
    tokens: tuple[Token, ...] = ()


class StreamedText:
    """One text that is being generated.

    It holds back characters at its end that may begin a stop string until that is decided.

    Attributes:
        reason: why the text has ended, as in `Piece`; "" until then.
    """

    def __init__(self, sample: int, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self.reason: Reason = ""
        self._sample, self._stop = sample, tuple(stop)
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._held = ""
        self._waiting: list[Token] = []  # tokens with characters that are held back
        self._yielded = 0  # characters of the first waiting token that are in earlier pieces

    def add(
        self,
        token: int,
        reason: Reason,
        logprob: float | None = None,
        alternatives: tuple[tuple[int, float], ...] = (),
    ) -> Iterator[Piece]:
        """Add a token and yield the piece that it makes certain, if there is one.

        Args:
            token: its id.
            reason: why this is the last token. With "end" it is the end-of-text token, which has no text.
            logprob: as in `Token`.
            alternatives: as in `Token`.
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
        """Return the tokens that are complete once this many more characters are certain.

        Before a stop string, the token that the string cuts counts as complete, too.
        """
        certain = self._yielded + characters
        count = begin = end = 0
        for i, token in enumerate(self._waiting, 1):
            start, end = end, end + len(token.text)
            if (start >= certain) if self.reason == "stop" else (end > certain):
                break
            if token.text or self.reason:  # a token with half a character waits for the one that completes it
                count, begin = i, end
        tokens, self._waiting = tuple(self._waiting[:count]), self._waiting[count:]
        self._yielded = certain - begin
        return tokens


def held_back(text: str, stops: Sequence[str]) -> int:
    """Return how many characters at the end of `text` may be the beginning of a stop string."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
