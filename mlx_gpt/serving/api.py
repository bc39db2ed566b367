"""OpenAI's API: what requests may contain, what engines make of them, and the shape of answers.

https://platform.openai.com/docs/api-reference, completions and chat. What has a value and is not here is refused by
name. `top_k`, `min_p` and `repetition_penalty` are additions that other servers have as well.
"""

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from mlx_gpt.config import GenerationConfig
from mlx_gpt.errors import UserError, shown
from mlx_gpt.generation.engine import Request
from mlx_gpt.generation.stop_strings import Piece, Token
from mlx_gpt.serving.worker import Served

MOST_ALTERNATIVES = 20
MOST_ERRORS = 100  # that a refusal is made of: a large body can have a million
Stop = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Id = Annotated[int, Field(ge=0)]
Ids = Annotated[list[Id], Field(fail_fast=True)]


class APIError(Exception):
    """A refusal, in OpenAI's shape.

    Args:
        message: one sentence that says what to do.
        param: the parameter that it is about.
        code: that programs can compare.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers: dict[str, str] = {}

    def body(self) -> dict[str, Any]:
        """What is answered."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    """How a stream is told."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool = Field(False, description="Tell the usage in a last chunk.")


class PlainText(BaseModel):
    """The only format of an answer."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text"]


class Sampling(BaseModel):
    """What completions and chat have in common."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    model: str | None = Field(None, description="One of /v1/models; left out, the first.")
    n: int | None = Field(None, ge=1, description="Texts to make.")
    stream: bool | None = Field(None, description="Send the text as it is made, as server-sent events.")
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = Field(
        None, description="End the text before any of these."
    )
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="The same seed gives the same text.")
    temperature: float | None = Field(None, ge=0, le=2, description="0 always takes the likeliest; default 1.")
    top_p: float | None = Field(None, ge=0, le=1, description="Sample among tokens of this probability together.")
    top_k: int | None = Field(None, ge=0, lt=2**31, description="Sample among so many tokens; 0 is off.")
    min_p: float | None = Field(None, ge=0, le=1, description="Leave out tokens less likely than this share.")
    repetition_penalty: float | None = Field(None, gt=0, le=100, description="Above 1 makes repetition rarer.")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, description="Added to the logits of these ids.", max_length=1024
    )
    user: str | None = Field(None, description="Has no effect.")
    # What OpenAI's API has and these models can't do: clients send them as null, or as what is the case anyway.
    audio: None = None
    function_call: None = None
    functions: None = None
    metadata: None = None
    modalities: None = None
    parallel_tool_calls: None = None
    prediction: None = None
    reasoning_effort: None = None
    prompt_cache_key: None = None
    response_format: PlainText | None = None
    safety_identifier: None = None
    service_tier: None = None
    store: None = None
    tool_choice: None = None
    tools: None = None
    verbosity: None = None
    web_search_options: None = None

    def config(self, max_tokens: int, most_texts: int) -> GenerationConfig:
        """The settings of these texts."""
        if (self.n or 1) > most_texts:
            raise APIError(400, f"`n` is at most {most_texts} on this server.", "n")
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return GenerationConfig(
            max_tokens=max_tokens,
            temperature=_or(self.temperature, 1.0),
            top_p=max(_or(self.top_p, 1.0), 1e-9),  # 0 leaves the likeliest
            top_k=_or(self.top_k, 0),
            min_p=_or(self.min_p, 0.0),
            repetition_penalty=_or(self.repetition_penalty, 1.0),
            presence_penalty=_or(self.presence_penalty, 0.0),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
            seed=None if self.seed is None else self.seed % 2**62,
            num_samples=self.n or 1,
            stop=tuple(stop),
        )

    def bias(self, entries: int) -> dict[int, float]:
        """What is added to the logit of each id."""
        found = {}
        for key, value in (self.logit_bias or {}).items():
            if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < entries):
                raise APIError(400, f"`logit_bias` is about ids from 0 to {entries - 1}.", "logit_bias")
            found[int(key)] = value
        return found


class CompletionRequest(Sampling):
    """The body of POST /v1/completions."""

    prompt: (
        str | Annotated[list[str], Field(fail_fast=True)] | Ids | Annotated[list[Ids], Field(fail_fast=True)] | None
    ) = Field(None, description="A text, its ids, or several of either; nothing begins a new text.")
    max_tokens: int | None = Field(None, ge=0, lt=2**31, description="Most new tokens; default 16.")
    echo: bool | None = Field(None, description="Begin with the prompt.")
    logprobs: int | None = Field(
        None, ge=0, le=MOST_ALTERNATIVES, description="Tell each token's log-probability, and so many others."
    )
    best_of: Literal[1] | None = None
    suffix: None = None


class TextPart(BaseModel):
    """Part of a message."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a conversation."""

    model_config = ConfigDict(strict=True, extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    # Of an answer that is sent back: what no answer of these models has.
    audio: None = None
    function_call: None = None
    refusal: None = None
    tool_calls: None = None


class ChatRequest(Sampling):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, lt=2**31, description="Most new tokens.")
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31, description="The same.")
    logprobs: bool | None = Field(None, description="Tell each token's log-probability.")
    top_logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES, description="And of so many others.")


@dataclass
class Asked:
    """What a body asks for.

    Attributes:
        requests: for the engine, one per prompt.
        prompts: the text of each, if it is to be told.
        scored: only the prompt is wanted, and the token that the engine makes of it is not.
    """

    kind: Literal["text", "chat"]
    served: Served
    requests: list[Request]
    stream: bool
    include_usage: bool
    prompts: list[str] = field(default_factory=list)
    scored: bool = False


def parse(kind: type[Sampling], body: bytes) -> Any:
    """A body of the given kind.

    Raises:
        APIError: it is not one; 400.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(kind, error) from None


def _refusal(kind: type[Sampling], error: ValidationError) -> APIError:
    """What is wrong with a body, in a sentence."""
    if error.error_count() > MOST_ERRORS:
        return APIError(400, "The body is wrong in many places: /openapi.json tells what it may have.")
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    if errors[0]["type"] == "json_invalid":
        return APIError(400, f"The body is not valid JSON: {shown(errors[0]['msg'], 200)}.", code="invalid_json")
    if not errors[0]["loc"]:
        return APIError(400, "The body has to be a JSON object.")
    name = shown(errors[0]["loc"][0])
    if len(errors[0]["loc"]) == 1 and errors[0]["type"] in ("none_required", "extra_forbidden", "literal_error"):
        return APIError(400, f"`{name}` is not supported by this server: leave it out.", name)
    # Where several types will do, there is an error for each: that of the right type was meant.
    errors = [one for one in errors if one["loc"][0] == errors[0]["loc"][0]]
    meant = [one for one in errors if not one["type"].endswith("_type")] or errors
    if len(meant) > 1:
        return APIError(400, f"`{name}` is of a wrong type: /openapi.json tells which it may have.", name)
    if meant[0]["type"] == "missing":
        return APIError(400, f"`{'.'.join(map(str, meant[0]['loc']))}` is missing.", name)
    return APIError(400, f"`{name}`: {shown(meant[0]['msg'], 200)}.", name)


def completion(body: CompletionRequest, served: Served, most_texts: int, most_tokens: int) -> Asked:
    """What a completion asks for.

    Raises:
        APIError: something can't be done; 400.
    """
    tokenizer = served.tokenizer
    given: Any = body.prompt if body.prompt is not None else ""
    prompts = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
    tokens = _or(body.max_tokens, 16)
    scored = tokens == 0
    if scored and not body.echo:
        raise APIError(400, "`max_tokens` of 0 goes with `echo` only.", "max_tokens")
    config = body.config(_checked(tokens, most_tokens, "max_tokens") or 1, most_texts)
    if len(prompts) * config.num_samples > most_texts:
        raise APIError(400, f"Prompts times `n` are at most {most_texts} on this server: ask again for more.", "prompt")
    requests = [
        Request(
            check_ids(_ids(prompt, served), served),
            config,
            body.bias(tokenizer.vocab_size),
            body.logprobs,
            prompt_too=bool(body.echo) and body.logprobs is not None,
        )
        for prompt in prompts
    ]
    texts = [prompt if isinstance(prompt, str) else tokenizer.decode(prompt) for prompt in prompts if body.echo]
    return Asked("text", served, requests, bool(body.stream), _usage(body), texts, scored)


def chat(body: ChatRequest, served: Served, most_texts: int, most_tokens: int) -> Asked:
    """What a conversation asks for.

    Raises:
        APIError: the model knows no conversations, or something can't be done; 400.
    """
    if served.template is None:
        raise APIError(
            400,
            f"{served.name} has no chat template, for it was not trained on conversations: use /v1/completions.",
            "model",
            "no_chat_template",
        )
    if body.top_logprobs is not None and not body.logprobs:
        raise APIError(400, "`top_logprobs` goes with `logprobs`: true only.", "top_logprobs")
    if body.max_tokens and body.max_completion_tokens and body.max_tokens != body.max_completion_tokens:
        raise APIError(400, "`max_tokens` and `max_completion_tokens` mean the same: give one.", "max_tokens")
    messages = [
        {"role": one.role, "content": one.content if isinstance(one.content, str) else _joined(one.content)}
        for one in body.messages
    ]
    try:
        ids = served.template.ids(messages, served.tokenizer)
    except UserError as error:
        raise APIError(400, str(error), "messages") from None
    asked = body.max_completion_tokens or body.max_tokens
    room = min(most_tokens, max(1, served.n_positions - len(ids)))  # what the context leaves
    config = body.config(_checked(asked, most_tokens, "max_tokens") if asked else room, most_texts)
    alternatives = (body.top_logprobs or 0) if body.logprobs else None
    request = Request(check_ids(ids, served), config, body.bias(served.tokenizer.vocab_size), alternatives)
    return Asked("chat", served, [request], bool(body.stream), _usage(body))


def check_ids(ids: list[int], served: Served) -> list[int]:
    """The same ids.

    Raises:
        APIError: there are none, too many or unknown ones; 400.
    """
    if not ids:
        raise APIError(400, "The prompt is empty.", "prompt")
    if len(ids) > served.n_positions:
        raise APIError(
            400,
            f"The prompt has {len(ids):,} tokens, more than the model's context of {served.n_positions:,}: shorten it.",
            "prompt",
            "context_length_exceeded",
        )
    if max(ids) >= served.tokenizer.vocab_size:
        raise APIError(400, f"The prompt has ids beyond the vocabulary of {served.tokenizer.vocab_size:,}.", "prompt")
    return ids


class Answer:
    """The answer to a request as its pieces come, whole or in chunks."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        chat = asked.kind == "chat"
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._object = "chat.completion" if chat else "text_completion"
        self.prompt_tokens = sum(len(request.prompt) for request in asked.requests)
        self.completion_tokens = 0
        count = sum(request.config.num_samples for request in asked.requests)
        self._texts, self._tokens, self._reasons = [""] * count, [list[Token]() for _ in range(count)], [""] * count
        self._offsets = [0] * count

    def first(self) -> Iterator[dict[str, Any]]:
        """The chunks before the first token."""
        for i in range(len(self._texts)):
            if self._asked.kind == "chat":
                yield self._chunk({"index": i, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})
            elif self._asked.prompts and self._asked.requests[0].alternatives is None:
                yield self._chunk(self._choice(i, self._prompt(i), (), ""))

    def add(self, number: int, piece: Piece) -> list[dict[str, Any]]:
        """Take a piece of the text of prompt `number`; the chunks that tell of it."""
        i = sum(request.config.num_samples for request in self._asked.requests[:number]) + piece.sample
        of_prompt = bool(piece.tokens) and piece.tokens[0].logprob is None and self._asked.requests[number].prompt_too
        text = self._prompt(i) if of_prompt else piece.text
        tokens, reason = piece.tokens, piece.reason
        if self._asked.scored and not of_prompt:
            text, tokens = "", ()
        if not of_prompt:
            self.completion_tokens += len(tokens)
        self._texts[i] += text
        self._tokens[i] += tokens
        self._reasons[i] = "stop" if reason in ("end", "stop") and not self._asked.scored else reason and "length"
        return [self._chunk(self._choice(i, text, tokens, self._reasons[i]))] if text or tokens or reason else []

    def last(self) -> Iterator[dict[str, Any]]:
        """The chunk after the last token, if it is asked for."""
        if self._asked.include_usage:
            yield self._chunk(None) | {"usage": self.usage()}

    def whole(self) -> dict[str, Any]:
        """The answer in one."""
        choices = []
        self._offsets = [0] * len(self._texts)
        for i, text in enumerate(self._texts):
            echoed = self._asked.prompts and self._asked.requests[0].alternatives is None
            choice = self._choice(i, (self._prompt(i) if echoed else "") + text, self._tokens[i], self._reasons[i])
            if self._asked.kind == "chat":
                choice["message"] = choice.pop("delta") | {"role": "assistant", "refusal": None}
                choice["message"].setdefault("content", "")
            choices.append(choice)
        return self._head(self._object) | {"choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Tokens of the prompts, each counted once, and of the texts."""
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }

    def _prompt(self, i: int) -> str:
        return self._asked.prompts[i // self._asked.requests[0].config.num_samples]

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._asked.served.name}

    def _chunk(self, choice: dict[str, Any] | None) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._asked.kind == "chat" else self._object
        chunk = self._head(kind) | {"choices": [choice] if choice else []}
        return chunk | {"usage": None} if self._asked.include_usage else chunk

    def _choice(self, i: int, text: str, tokens: Sequence[Token], reason: str) -> dict[str, Any]:
        chat = self._asked.kind == "chat"
        told = self._asked.requests[0].alternatives is not None
        logprobs = (self._chat_logprobs(tokens) if chat else self._text_logprobs(i, tokens)) if told else None
        choice: dict[str, Any] = {"index": i, "logprobs": logprobs, "finish_reason": reason or None}
        if chat:
            return choice | {"delta": {"content": text} if text else {}}
        return choice | {"text": text}

    def _text_logprobs(self, i: int, tokens: Sequence[Token]) -> dict[str, Any]:
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[i])
            self._offsets[i] += len(token.text)
        name = self._asked.served.tokenizer.name_of
        return {
            "tokens": [name(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                # The token itself is always among them.
                {name(one): logprob for one, logprob in (*token.alternatives, (token.id, token.logprob))}
                if token.logprob is not None
                else None
                for token in tokens
            ],
            "text_offset": offsets,
        }

    def _chat_logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        tokenizer = self._asked.served.tokenizer

        def told(token: int, logprob: float | None) -> dict[str, Any]:
            return {"token": tokenizer.name_of(token), "logprob": logprob, "bytes": tokenizer.bytes_of(token)}

        content = [
            told(token.id, token.logprob) | {"top_logprobs": [told(*one) for one in token.alternatives]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}


def _ids(prompt: str | list[int], served: Served) -> list[int]:
    if isinstance(prompt, list):
        return prompt
    try:
        # As a text begins when there is nothing before it.
        return served.tokenizer.encode(prompt) if prompt else [served.tokenizer.end_of_text]
    except UserError as error:
        raise APIError(400, str(error), "prompt") from None


def _checked(tokens: int, most: int, name: str) -> int:
    if tokens > most:
        raise APIError(400, f"`{name}` is at most {most:,} on this server.", name)
    return tokens


def _usage(body: Sampling) -> bool:
    return body.stream_options is not None and body.stream_options.include_usage


def _joined(parts: Sequence[TextPart]) -> str:
    return "".join(part.text for part in parts)


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
