"""Turns bodies into requests to the engine, and checks them against the model and the server's limits."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_gpt.errors import UserError
from mlx_gpt.generation.requests import Request, room_for_answer
from mlx_gpt.serving.bodies import ChatRequest, CompletionRequest
from mlx_gpt.serving.errors import APIError
from mlx_gpt.serving.models import ServedModel


@dataclass
class ParsedRequest:
    """The texts that a body asks for.

    Attributes:
        requests: the requests to the engine, one per prompt.
        echoes: the text of each prompt, if the answer starts with it.
        prompt_only: whether no new tokens are wanted. The engine still generates one, and the answer omits it.
    """

    model: ServedModel
    requests: list[Request]
    stream: bool
    include_usage: bool
    echoes: list[str] = field(default_factory=list)
    prompt_only: bool = False


def parse_completion(body: CompletionRequest, model: ServedModel, max_texts: int, max_tokens: int) -> ParsedRequest:
    """Return what a completion asks for.

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
    """Return what a conversation asks for.

    Raises:
        APIError: the model has no chat template, or the body asks for something that the model or the server cannot do;
            status 400.
    """
    if model.template is None:
        message = f"{model.name} has no chat template, since it was not trained on conversations: use /v1/completions."
        raise APIError(400, message, "model", "no_chat_template")
    if body.top_logprobs is not None and not body.logprobs:
        raise APIError(400, "`top_logprobs` needs `logprobs`: true.", "top_logprobs")
    if body.max_tokens and body.max_completion_tokens and body.max_tokens != body.max_completion_tokens:
        raise APIError(400, "`max_tokens` and `max_completion_tokens` mean the same: send only one.", "max_tokens")
    # "developer" is OpenAI's newer name for "system", which templates do not know.
    messages = [
        {"role": "system" if message.role == "developer" else message.role, "content": message.text}
        for message in body.messages
    ]
    begun = ""
    if body.continue_final_message:
        if messages[-1]["role"] != "assistant":
            message = "`continue_final_message` needs a last message from the assistant: add one, or leave this out."
            raise APIError(400, message, "continue_final_message")
        begun = messages.pop()["content"]
    try:
        ids = model.template.ids(messages, model.tokenizer, begun)
    except UserError as error:
        raise APIError(400, str(error), "messages") from None
    _check_ids(ids, model, "messages")
    tokens = body.max_completion_tokens or body.max_tokens
    if tokens:
        _check_max_tokens(tokens, max_tokens)
    config = body.generation_config(room_for_answer(tokens or max_tokens, ids, model.context), max_texts)
    alternatives = (body.top_logprobs or 0) if body.logprobs else None
    request = Request(ids, config, body.bias(model.tokenizer.vocab_size), alternatives)
    return ParsedRequest(model, [request], bool(body.stream), body.include_usage)


def _encode(prompt: str | list[int], model: ServedModel) -> list[int]:
    if isinstance(prompt, list):
        return prompt
    try:
        tokenizer = model.tokenizer
        return [*tokenizer.start, *tokenizer.encode(prompt)] if prompt else tokenizer.start or [tokenizer.end_of_text]
    except UserError as error:
        raise APIError(400, str(error), "prompt") from None


def _check_ids(ids: Sequence[int], model: ServedModel, param: str = "prompt") -> Sequence[int]:
    """Check the ids of a prompt or of a conversation, and return them.

    Raises:
        APIError: there are no ids, too many, or ids that are not in the vocabulary.
    """
    what, remedy = {
        "prompt": ("prompt", "shorten it"),
        "messages": ("conversation", "leave out its oldest messages, or shorten them"),
    }[param]
    if not ids:
        raise APIError(400, f"The {what} is empty.", param)
    if len(ids) > model.context:
        message = f"The {what} has {len(ids):,} tokens, more than the model's context of {model.context:,}: {remedy}."
        raise APIError(400, message, param, "context_length_exceeded")
    if max(ids) >= model.tokenizer.vocab_size:
        message = f"The {what} has token ids beyond the vocabulary of {model.tokenizer.vocab_size:,}."
        raise APIError(400, message, param)
    return ids


def _check_max_tokens(tokens: int, most: int) -> None:
    if tokens > most:
        raise APIError(400, f"`max_tokens` is at most {most:,} on this server.", "max_tokens")
