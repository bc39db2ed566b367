"""Turns the engine's pieces of text into whole answers, or into chunks of a stream."""

import itertools
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from mlx_gpt.generation.stop_strings import Piece, Token
from mlx_gpt.serving.parsing import ParsedRequest
from mlx_gpt.serving.responses import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatToken,
    Choice,
    Completion,
    Delta,
    FinishReason,
    Logprobs,
    TokenLogprob,
    Usage,
)


@dataclass
class _Text:
    """One of the texts so far.

    Attributes:
        offset: characters of its tokens. A stop string may hold back some of them, which `text` then lacks.
    """

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    offset: int = 0
    finish_reason: FinishReason = None


class Answer(ABC):
    """Collects the pieces of a request's texts, and turns them into chunks or a whole answer.

    Attributes:
        prompt_tokens, completion_tokens: as in `Usage`.
    """

    def __init__(self, parsed: ParsedRequest) -> None:
        self._parsed, self._tokenizer = parsed, parsed.model.tokenizer
        self._id, self._created, self._model = uuid.uuid4().hex, int(time.time()), parsed.model.name
        self._per_prompt = parsed.requests[0].config.num_samples
        self._with_logprobs = parsed.requests[0].alternatives is not None
        self._texts = [_Text() for _ in range(len(parsed.requests) * self._per_prompt)]
        self.prompt_tokens = sum(len(request.prompt) for request in parsed.requests)
        self.completion_tokens = 0

    @abstractmethod
    def opening(self) -> Iterator[BaseModel]:
        """Yield the chunks before the first token."""

    def add(self, number: int, piece: Piece) -> BaseModel | None:
        """Add a piece of a text that continues prompt `number`; returns the chunk for it, if it needs one."""
        index = number * self._per_prompt + piece.sample
        text, tokens, finish_reason = piece.text, piece.tokens, self._finish_reason(piece)
        if self._parsed.requests[number].prompt_too and tokens and tokens[0].logprob is None:  # the prompt's own tokens
            text = self._echo(index)
        elif self._parsed.prompt_only:
            text, tokens = "", ()
        else:
            self.completion_tokens += len(tokens)
        so_far = self._texts[index]
        chunk = self._chunk(index, text, tokens, finish_reason) if text or tokens or finish_reason else None
        so_far.text += text
        so_far.tokens += tokens
        so_far.offset += sum(len(token.text) for token in tokens)
        so_far.finish_reason = finish_reason
        return chunk

    def closing(self) -> Iterator[BaseModel]:
        """Yield the chunk after the last token, if the client asked for usage."""
        if self._parsed.include_usage:
            yield self._wrap([], self.usage())

    @abstractmethod
    def whole(self) -> BaseModel:
        """The answer in one."""

    def usage(self) -> Usage:
        """Return the tokens so far."""
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            total_tokens=self.prompt_tokens + self.completion_tokens,
        )

    @abstractmethod
    def _chunk(self, index: int, text: str, tokens: Sequence[Token], finish_reason: FinishReason) -> BaseModel:
        """Return a chunk that adds to one of the texts."""

    @abstractmethod
    def _wrap(self, choices: list[Any], usage: Usage | None = None) -> BaseModel:
        """Return a chunk with these choices. If usage was requested, it is null in all chunks except the last."""

    def _finish_reason(self, piece: Piece) -> FinishReason:
        """Return OpenAI's word for why a text ends with this piece; it has no word for a text that ends by itself."""
        if not piece.reason:
            return None
        return "length" if piece.reason == "length" or self._parsed.prompt_only else "stop"

    def _usage_field(self, usage: Usage | None) -> dict[str, Usage | None]:
        return {"usage": usage} if self._parsed.include_usage else {}

    def _echo(self, index: int) -> str:
        return self._parsed.echoes[index // self._per_prompt] if self._parsed.echoes else ""


class CompletionAnswer(Answer):
    """The answer of /v1/completions."""

    def opening(self) -> Iterator[BaseModel]:
        """The prompts, if they are echoed. With log-probabilities the engine gives them token by token instead."""
        if self._parsed.echoes and not self._with_logprobs:
            for index in range(len(self._texts)):
                yield self._chunk(index, self._echo(index), (), None)

    def whole(self) -> Completion:
        """The answer in one."""
        choices = []
        for index, text in enumerate(self._texts):
            echo = "" if self._with_logprobs else self._echo(index)
            logprobs = self._logprobs(text.tokens, 0)
            choice = Choice(index=index, text=echo + text.text, logprobs=logprobs, finish_reason=text.finish_reason)
            choices.append(choice)
        return self._completion(choices, usage=self.usage())

    def _chunk(self, index: int, text: str, tokens: Sequence[Token], finish_reason: FinishReason) -> Completion:
        logprobs = self._logprobs(tokens, self._texts[index].offset)
        return self._wrap([Choice(index=index, text=text, logprobs=logprobs, finish_reason=finish_reason)])

    def _wrap(self, choices: list[Choice], usage: Usage | None = None) -> Completion:
        return self._completion(choices, **self._usage_field(usage))

    def _completion(self, choices: list[Choice], **usage: Usage | None) -> Completion:
        return Completion(
            id=f"cmpl-{self._id}",
            object="text_completion",
            created=self._created,
            model=self._model,
            choices=choices,
            **usage,
        )

    def _logprobs(self, tokens: Sequence[Token], offset: int) -> Logprobs | None:
        if not self._with_logprobs:
            return None
        name = self._tokenizer.name_of
        ends = itertools.accumulate((len(token.text) for token in tokens), initial=offset)
        return Logprobs(
            tokens=[name(token.id) for token in tokens],
            token_logprobs=[token.logprob for token in tokens],
            top_logprobs=[
                None
                if token.logprob is None
                # The token itself is always among them.
                else {name(id): logprob for id, logprob in (*token.alternatives, (token.id, token.logprob))}
                for token in tokens
            ],
            text_offset=list(ends)[:-1],
        )


class ChatAnswer(Answer):
    """The answer of /v1/chat/completions."""

    def opening(self) -> Iterator[BaseModel]:
        """Yield the role of each message."""
        for index in range(len(self._texts)):
            delta = Delta(role="assistant", content="")
            yield self._wrap([ChatChunkChoice(index=index, delta=delta, finish_reason=None)])

    def whole(self) -> ChatCompletion:
        """The answer in one."""
        choices = [
            ChatChoice(
                index=index,
                message=AnswerMessage(role="assistant", content=text.text, refusal=None),
                logprobs=self._logprobs(text.tokens),
                finish_reason=text.finish_reason,
            )
            for index, text in enumerate(self._texts)
        ]
        return ChatCompletion(
            id=f"chatcmpl-{self._id}",
            object="chat.completion",
            created=self._created,
            model=self._model,
            choices=choices,
            usage=self.usage(),
        )

    def _chunk(self, index: int, text: str, tokens: Sequence[Token], finish_reason: FinishReason) -> ChatChunk:
        delta = Delta(content=text) if text else Delta()
        logprobs = self._logprobs(tokens)
        choice = ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish_reason)
        return self._wrap([choice])

    def _wrap(self, choices: list[ChatChunkChoice], usage: Usage | None = None) -> ChatChunk:
        return ChatChunk(
            id=f"chatcmpl-{self._id}",
            object="chat.completion.chunk",
            created=self._created,
            model=self._model,
            choices=choices,
            **self._usage_field(usage),
        )

    def _logprobs(self, tokens: Sequence[Token]) -> ChatLogprobs | None:
        if not self._with_logprobs:
            return None
        content = [
            ChatToken(
                **self._token(token.id, token.logprob, token.text),
                top_logprobs=[TokenLogprob(**self._token(*alternative)) for alternative in token.alternatives],
            )
            for token in tokens
        ]
        return ChatLogprobs(content=content, refusal=None)

    def _token(self, id: int, logprob: float | None, text: str | None = None) -> dict[str, Any]:
        """Describe a token of the answer, to which it adds `text`, or another token in its place."""
        # The bytes of an answer's tokens add up to its text. Tokens without bytes of their own add what depends on
        # those before, such as a space.
        known = text is None or self._tokenizer.token_bytes is not None
        written = self._tokenizer.bytes_of(id) if known else list((text or "").encode())
        return {"token": self._tokenizer.name_of(id), "logprob": logprob, "bytes": written}
