"""The bodies that OpenAI's API accepts, and what each asks of the engine.

https://platform.openai.com/docs/api-reference, completions and chat. A field that has a value and is not declared here
is refused by name. `top_k`, `min_p` and `repetition_penalty` are additions that other servers have as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    StringConstraints,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic_core import PydanticCustomError

from mlx_gpt.config import GenerationConfig
from mlx_gpt.errors import UserError
from mlx_gpt.generation.engine import Request
from mlx_gpt.serving.errors import TOO_MANY_ERRORS, APIError
from mlx_gpt.serving.models import ServedModel
from mlx_gpt.settings import settings_of

MAX_ALTERNATIVES = 20
MAX_ERRORS = 100
Stop = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]


class Body(BaseModel):
    """A JSON object without unknown fields, whose values have the declared types exactly."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _limit_errors(cls, value: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            # A large body can have a million errors. FastAPI would make a dictionary of each, which takes seconds.
            if error.error_count() > MAX_ERRORS:
                raise PydanticCustomError(TOO_MANY_ERRORS, "The body has too many errors") from None
            raise


# ---- the sampling settings, from GenerationConfig -------------------------------------------------------------------

SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
)  # fmt: skip

# Clients of OpenAI's API expect the model's own distribution unless they ask for another.
DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}

# Bounds that replace those of GenerationConfig.
BOUNDS = {
    "temperature": {"at least": 0, "at most": 2},  # OpenAI's
    "top_p": {"at least": 0, "at most": 1},  # OpenAI's; 0 keeps the likeliest token
    "repetition_penalty": {"above": 0, "at most": 100},  # a logit times a huge one would overflow float32
    "seed": {"at least": -(2**63), "below": 2**63},  # OpenAI's: any 64-bit integer
}
CONSTRAINTS = {"at least": "ge", "above": "gt", "at most": "le", "below": "lt"}


def _sampling_fields() -> dict[str, Any]:
    """The fields of `SAMPLING`; null is the default, as in OpenAI's API."""
    settings = {setting.name: setting for setting in settings_of(GenerationConfig)}
    fields = {}
    for name in SAMPLING:
        setting = settings[name]
        bounds = BOUNDS.get(name, setting.metadata["bounds"])
        constraints: Any = {CONSTRAINTS[words]: bound for words, bound in bounds.items()}
        default = DEFAULTS.get(name, setting.default)
        fields[name] = (setting.kind | None, Field(default, description=setting.metadata["help"], **constraints))
    return fields


SamplingSettings: Any = create_model("SamplingSettings", __base__=Body, **_sampling_fields())


# ---- bodies ---------------------------------------------------------------------------------------------------------


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool = Field(False, description="Send the token counts in a last chunk.")


class PlainText(Body):
    """The only response format."""

    type: Literal["text"]


class TextRequest(SamplingSettings):
    """The fields that completions and chat share."""

    model: str | None = Field(None, description="A model of /v1/models. Default: the first.")
    n: int | None = Field(None, ge=1, description="Texts to generate.")
    stream: bool | None = Field(None, description="Send the text while it is generated, as server-sent events.")
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = Field(
        None, description="End the text before any of these."
    )
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, description="Added to the logits of these token ids.", max_length=1024
    )
    user: str | None = Field(None, description="Has no effect.")
    # Fields of OpenAI's API that these models do not support. Clients send null, or the value that always holds here.
    audio: None = None
    function_call: None = None
    functions: None = None
    metadata: None = None
    modalities: None = None
    parallel_tool_calls: None = None
    prediction: None = None
    prompt_cache_key: None = None
    reasoning_effort: None = None
    response_format: PlainText | None = None
    safety_identifier: None = None
    service_tier: None = None
    store: None = None
    tool_choice: None = None
    tools: None = None
    verbosity: None = None
    web_search_options: None = None

    def generation_config(self, max_tokens: int, max_texts: int) -> GenerationConfig:
        """The settings for these texts.

        Raises:
            APIError: `n` is greater than `max_texts`.
        """
        texts = self.n or 1
        if texts > max_texts:
            raise APIError(400, f"`n` is at most {max_texts} on this server.", "n")
        settings = {name: getattr(self, name) for name in SAMPLING}
        settings |= {name: type(self).model_fields[name].default for name, value in settings.items() if value is None}
        settings["top_p"] = max(settings["top_p"], 1e-9)
        if settings["seed"] is not None:
            settings["seed"] %= 2**62
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return GenerationConfig(max_tokens=max_tokens, num_samples=texts, stop=tuple(stop), **settings)

    def bias(self, vocab_size: int) -> dict[int, float]:
        """What is added to the logit of each token id.

        Raises:
            APIError: an id is not in the vocabulary.
        """
        bias = {}
        for key, value in (self.logit_bias or {}).items():
            if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < vocab_size):
                raise APIError(400, f"The keys of `logit_bias` are token ids from 0 to {vocab_size - 1}.", "logit_bias")
            bias[int(key)] = value
        return bias

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(TextRequest):
    """The body of POST /v1/completions."""

    prompt: str | Texts | Ids | Annotated[list[Ids], Field(fail_fast=True)] | None = Field(
        None, description="A text, its token ids, or several of either. Default: the start of a new text."
    )
    max_tokens: int | None = Field(None, ge=0, lt=2**31, description="Most new tokens. Default: 16.")
    echo: bool | None = Field(None, description="Start the answer with the prompt.")
    logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_ALTERNATIVES,
        description="Return log-probabilities: each token's, and those of this many more.",
    )
    best_of: Literal[1] | None = None
    suffix: None = None


class TextPart(Body):
    """Part of a message."""

    type: Literal["text"]
    text: str


class Message(Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]
    name: str | None = None
    # Fields of OpenAI's answers, which clients send back with the next question. Here they are always null.
    audio: None = None
    function_call: None = None
    refusal: None = None
    tool_calls: None = None

    @property
    def text(self) -> str:
        """The whole content."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(TextRequest):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(min_length=1)
    max_tokens: int | None = Field(
        None, ge=1, lt=2**31, description="Most new tokens. Default: what the context holds."
    )
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31, description="The same as `max_tokens`.")
    logprobs: bool | None = Field(None, description="Return each token's log-probability.")
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_ALTERNATIVES, description="Return this many likely tokens in each place. Needs `logprobs`."
    )


# ---- what they ask of the engine ------------------------------------------------------------------------------------


@dataclass
class ParsedRequest:
    """What a body asks for, checked against the model.

    Attributes:
        requests: the engine's, one per prompt.
        echoes: the text of each prompt, if the answer starts with it.
        prompt_only: no new tokens are wanted. The engine generates one all the same, and the answer omits it.
    """

    model: ServedModel
    requests: list[Request]
    stream: bool
    include_usage: bool
    echoes: list[str] = field(default_factory=list)
    prompt_only: bool = False


def parse_completion(body: CompletionRequest, model: ServedModel, max_texts: int, max_tokens: int) -> ParsedRequest:
    """What a completion asks for.

    Raises:
        APIError: it asks for something that the model or the server cannot do; status 400.
    """
    tokenizer = model.tokenizer
    given: Any = body.prompt if body.prompt is not None else ""
    prompts = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
    tokens = 16 if body.max_tokens is None else body.max_tokens
    if tokens == 0 and not body.echo:
        raise APIError(400, "`max_tokens` can be 0 only with `echo`.", "max_tokens")
    _check_max_tokens(tokens, max_tokens)
    config = body.generation_config(tokens or 1, max_texts)
    if len(prompts) * config.num_samples > max_texts:
        message = f"This server takes at most {max_texts} texts (prompts times `n`) per request: send several requests."
        raise APIError(400, message, "prompt")
    bias = body.bias(tokenizer.vocab_size)
    score_prompt = bool(body.echo) and body.logprobs is not None
    requests = [
        Request(_check_ids(_encode(prompt, model), model), config, bias, body.logprobs, prompt_too=score_prompt)
        for prompt in prompts
    ]
    echoes = [prompt if isinstance(prompt, str) else tokenizer.decode(prompt) for prompt in prompts if body.echo]
    return ParsedRequest(model, requests, bool(body.stream), body.include_usage, echoes, prompt_only=tokens == 0)


def parse_chat(body: ChatRequest, model: ServedModel, max_texts: int, max_tokens: int) -> ParsedRequest:
    """What a conversation asks for.

    Raises:
        APIError: the model has no chat template, or it is asked for something that it or the server cannot do;
            status 400.
    """
    if model.template is None:
        message = f"{model.name} has no chat template, since it was not trained on conversations: use /v1/completions."
        raise APIError(400, message, "model", "no_chat_template")
    if body.top_logprobs is not None and not body.logprobs:
        raise APIError(400, "`top_logprobs` needs `logprobs`: true.", "top_logprobs")
    if body.max_tokens and body.max_completion_tokens and body.max_tokens != body.max_completion_tokens:
        raise APIError(400, "`max_tokens` and `max_completion_tokens` mean the same: send only one.", "max_tokens")
    messages = [{"role": message.role, "content": message.text} for message in body.messages]
    try:
        ids = model.template.ids(messages, model.tokenizer)
    except UserError as error:
        raise APIError(400, str(error), "messages") from None
    _check_ids(ids, model)
    tokens = body.max_completion_tokens or body.max_tokens
    if tokens:
        _check_max_tokens(tokens, max_tokens)
    else:
        tokens = min(max_tokens, max(1, model.n_positions - len(ids)))  # up to the end of the context
    config = body.generation_config(tokens, max_texts)
    alternatives = (body.top_logprobs or 0) if body.logprobs else None
    request = Request(ids, config, body.bias(model.tokenizer.vocab_size), alternatives)
    return ParsedRequest(model, [request], bool(body.stream), body.include_usage)


def _encode(prompt: str | list[int], model: ServedModel) -> list[int]:
    if isinstance(prompt, list):
        return prompt
    try:
        return model.tokenizer.encode(prompt) if prompt else [model.tokenizer.end_of_text]  # which starts a new text
    except UserError as error:
        raise APIError(400, str(error), "prompt") from None


def _check_ids(ids: Sequence[int], model: ServedModel) -> Sequence[int]:
    """The same ids.

    Raises:
        APIError: there are none, too many, or ids that are not in the vocabulary.
    """
    if not ids:
        raise APIError(400, "The prompt is empty.", "prompt")
    if len(ids) > model.n_positions:
        message = (
            f"The prompt has {len(ids):,} tokens, more than the model's context of {model.n_positions:,}: shorten it."
        )
        raise APIError(400, message, "prompt", "context_length_exceeded")
    if max(ids) >= model.tokenizer.vocab_size:
        message = f"The prompt has token ids beyond the vocabulary of {model.tokenizer.vocab_size:,}."
        raise APIError(400, message, "prompt")
    return ids


def _check_max_tokens(tokens: int, most: int) -> None:
    if tokens > most:
        raise APIError(400, f"`max_tokens` is at most {most:,} on this server.", "max_tokens")
