"""Reads and writes the files of a model directory that belong to its tokenizer.

`tokenizer.json` has the tokenizer, `tokenizer_config.json` or `chat_template.jinja` the chat template, and
`generation_config.json` the ids that end a text.
"""

from pathlib import Path
from typing import Any

import mlx.nn as nn
from safetensors import SafetensorError, safe_open

from mlx_gpt import models
from mlx_gpt.chat_template import UNUSABLE, VARIABLES
from mlx_gpt.errors import UserError, os_errors_explained
from mlx_gpt.files import write_text_whole
from mlx_gpt.models import adapters
from mlx_gpt.models.tensors import read_json, save_json
from mlx_gpt.tokenizer import Tokenizer
from mlx_gpt.tokenizer_training import END_OF_TURN

TRAINED_WITH = "tokenizer"  # the metadata that has the fingerprint of the tokenizer that weights were trained with
MAX_TOKENIZER_CONFIG = 10**7  # Gemma 3's has 1.2 MB


def save_tokenizer(folder: Path, model: nn.Module, tokenizer: Tokenizer) -> None:
    """Write the files of the tokenizer, with the chat template and the ids that end an answer."""
    folder.mkdir(parents=True, exist_ok=True)
    end_of_text, bos_token = map(tokenizer.backend.id_to_token, (tokenizer.end_of_text, tokenizer.beginning_of_text))
    usual = {"bos_token": bos_token, "eos_token": end_of_text, "unk_token": end_of_text}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **(tokenizer.chat or usual),
        "model_max_length": models.context_length(model),
        "clean_up_tokenization_spaces": False,
    }
    save_json(folder / "generation_config.json", ends_of_texts(tokenizer))
    save_json(folder / "tokenizer_config.json", config)
    write_text_whole(folder / "tokenizer.json", tokenizer.to_json())


def ends_of_texts(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the ids of the tokens around a text, in the form of `generation_config.json`."""
    ends = {"bos_token_id": tokenizer.beginning_of_text, "eos_token_id": tokenizer.end_of_text}
    return ends | (_ends_of_answers(tokenizer) if tokenizer.chat else {})


def _ends_of_answers(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the ids at which transformers, mlx-lm and llama.cpp's converter end an answer, the end of a turn first.

    The end of a document comes before all other ids, so that `read_tokenizer` recognises it.
    """
    backend, first = tokenizer.backend, tokenizer.end_of_text
    ids = sorted(tokenizer.ends, key=lambda i: (i != backend.token_to_id(END_OF_TURN), i != first, i))
    bos = backend.token_to_id(tokenizer.chat.get("bos_token", ""))
    return {"eos_token_id": ids if len(ids) > 1 else ids[0]} | ({} if bos is None else {"bos_token_id": bos})


def load_tokenizer(folder: str | Path, model: nn.Module) -> Tokenizer:
    """Read the tokenizer of a model directory, for its model.

    Raises:
        UserError: as in `read_tokenizer`, or it has ids that the model does not know.
    """
    tokenizer = read_tokenizer(folder)
    if tokenizer.vocab_size > models.vocab_size(model):
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size:,} entries and the weights "
            f"{models.vocab_size(model):,}: they don't belong together."
        )
    return tokenizer


def read_tokenizer(folder: str | Path) -> Tokenizer:
    """Read the tokenizer of a model directory.

    Raises:
        UserError: there is none, or the weights say that they were trained with another.
    """
    folder = Path(folder)
    described = [folder]
    if adapters.are_in(folder):  # our adapters have their tokenizer beside them, so this needs no base
        complete = (folder / "tokenizer.json").exists() and (folder / "generation_config.json").exists()
        described = [] if complete else [adapters.base_of(folder)]
        folder = folder if (folder / "tokenizer.json").exists() else described[0]
    configs = [read_json(base / "config.json") for base in described]
    named = [config.get("eos_token_id") for config in configs]
    if (folder / "generation_config.json").is_file():
        named.append(read_json(folder / "generation_config.json").get("eos_token_id"))
    ends = [i for ids in named for i in (ids if isinstance(ids, list) else [ids]) if type(i) is int and 0 <= i < 2**32]
    tokenizer = Tokenizer.load(folder / "tokenizer.json", *ends[:1])
    end_of_turn = tokenizer.backend.token_to_id(END_OF_TURN)
    if documents := [i for i in ends if i != end_of_turn and tokenizer.backend.id_to_token(i) is not None]:
        tokenizer.end_of_text = documents[0]
    tokenizer.chat = read_chat(folder)
    end_of_answer = tokenizer.backend.token_to_id(tokenizer.chat.get("eos_token", ""))
    tokenizer.end_at(ends if end_of_answer is None else [*ends, end_of_answer])
    rows = next((config["vocab_size"] for config in configs if type(config.get("vocab_size")) is int), None)
    if rows is not None and tokenizer.vocab_size > rows:
        tokenizer = tokenizer.without_unknown(rows)
    if _tokenizer_of_weights(folder / "model.safetensors") not in (None, tokenizer.fingerprint):
        raise UserError(
            f"{folder}: the weights were trained with another tokenizer than the tokenizer.json beside them: copy the "
            "tokenizer.json of their run there."
        )
    return tokenizer


def _tokenizer_of_weights(path: Path) -> str | None:
    """Return the fingerprint of the tokenizer that weights were trained with; None if their file does not say."""
    try:
        with safe_open(path, framework="np") as file:
            fingerprint: str | None = (file.metadata() or {}).get(TRAINED_WITH)
            return fingerprint
    except (OSError, SafetensorError):
        return None  # `load_model` says what is wrong with the file


def read_chat(folder: Path) -> dict[str, str]:
    """Return the chat template of a model directory, in the form of `Tokenizer.chat`; {} if there is none.

    The template is `chat_template.jinja`, or else `chat_template` in `tokenizer_config.json`.

    Raises:
        UserError: a file cannot be read, is not UTF-8, or is not JSON.
    """
    path = folder / "tokenizer_config.json"
    config = read_json(path, MAX_TOKENIZER_CONFIG) if path.exists() else {}
    source = config.get("chat_template")
    if isinstance(source, list):  # several templates with names
        named = [one for one in source if isinstance(one, dict)]
        source = next((one.get("template") for one in named if one.get("name") == "default"), None)
    if (file := folder / "chat_template.jinja").is_file():
        try:
            with os_errors_explained(f"read {file}"), file.open(encoding="utf-8") as opened:
                source = opened.read(MAX_TOKENIZER_CONFIG)
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
