"""The bodies that OpenAI's API accepts.

https://platform.openai.com/docs/api-reference, completions and chat. The server refuses a field that has a value but is
not declared here, and names it. `top_k`, `min_p` and `repetition_penalty` are additions that other servers have as
well.
"""

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
from mlx_gpt.serving.errors import TOO_MANY_ERRORS, APIError
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
            # A large body can have hundreds of thousands of errors, and FastAPI would make a dictionary of each.
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
    """Return the fields of `SAMPLING`; null is the default, as in OpenAI's API."""
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
        """Return the settings for these texts.

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
        """Return the number to add to the logit of each token id.

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
    max_tokens: int | None = Field(None, ge=0, lt=2**31, description="Highest number of new tokens. Default: 16.")
    echo: bool | None = Field(None, description="Start the answer with the prompt.")
    logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_ALTERNATIVES,
        description="Return log-probabilities: each token's, and those of this many of the likeliest tokens.",
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
    continue_final_message: bool | None = Field(
        None, description="Continue the assistant's last message instead of answering it. OpenAI's API lacks this."
    )
    max_tokens: int | None = Field(
        None, ge=1, lt=2**31, description="Highest number of new tokens. Default: what the context holds."
    )
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31, description="The same as `max_tokens`.")
    logprobs: bool | None = Field(None, description="Return each token's log-probability.")
    top_logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_ALTERNATIVES,
        description="Return this many of the likeliest tokens in each place. Needs `logprobs`.",
    )
