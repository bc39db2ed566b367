"""Runs that start from weights: the settings that the weights decide, and the directory of the frozen weights."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_gpt import models
from mlx_gpt.config import Config, ModelConfig
from mlx_gpt.errors import UserError
from mlx_gpt.models import adapters
from mlx_gpt.models.directory import read_config
from mlx_gpt.models.tensors import checksum
from mlx_gpt.presets import PRESETS
from mlx_gpt.settings import changed, resolve
from mlx_gpt.training import run_folder

# The keys of `config.json` for each setting here, in the order in which they are tried.
SIZES = {
    "n_layer": ("n_layer", "num_hidden_layers"),
    "n_head": ("n_head", "num_attention_heads"),
    "n_kv_head": ("num_key_value_heads",),
    "n_embd": ("n_embd", "hidden_size"),
    "n_positions": ("n_positions", "max_position_embeddings"),
    "vocab_size": ("vocab_size",),
}


def settle(config: Config, given: Mapping[str, Any]) -> Config:
    """Return the settings of a new run. Its weights decide the sizes, the context and the kind of adapters.

    Args:
        config: the settings before the weights are looked at.
        given: the settings that the user gave, which must not contradict the weights.

    Raises:
        UserError: a given setting contradicts the weights, or there are no weights.
    """
    folder = run_folder.model_directory(Path(config.init_from))
    decided = _sizes(folder)
    for name, value in decided.items():
        # The tokenizer comes with the weights, and `vocab_size` is for a tokenizer that is to be trained.
        if name != "vocab_size" and given.get(name) not in (None, value):
            raise UserError(f"`{name}` {given[name]} contradicts the weights in {folder}, which have {value}: omit it.")
    preset = PRESETS.get(str(given.get("preset")), {})
    for name, value in decided.items():
        if name != "vocab_size" and given.get(name) is None and preset.get(name) not in (None, value):
            raise UserError(
                f"`preset` {given['preset']} has `{name}` {preset[name]}, but the weights in {folder} have {value}: "
                "omit `preset`."
            )
    for field in dataclasses.fields(ModelConfig):
        others = field.name not in (*decided, "vocab_size", "dropout")
        if others and given.get(field.name) not in (None, field.default):
            raise UserError(f"`{field.name}` can't be set for the weights in {folder}, which decide it: omit it.")
    if adapters.are_in(folder):
        stored = adapters.read(folder)
        own = {"lora_rank": stored.rank, "lora_scale": stored.scale}
        for name, value in own.items():
            if given.get(name) not in (None, value):
                raise UserError(
                    f"`{name}` {given[name]} contradicts the adapters in {folder}, which have {value:g}: omit it."
                )
        if given.get("lora_layers"):
            raise UserError(f"`lora_layers` is for new adapters, and those in {folder} are trained further: omit it.")
        decided |= own | {"lora_dropout": given.get("lora_dropout", stored.dropout)}
    elif not config.lora.lora_rank and (setting := changed(config.lora)):
        raise UserError(f"`{setting}` is for adapters: give `lora_rank` as well, such as 8.")
    if "seq_len" not in given and "n_positions" in decided:
        decided["seq_len"] = min(config.training.seq_len, decided["n_positions"])
    return resolve({**given, "init_from": config.init_from, "out": config.out, **decided})


def _sizes(folder: Path) -> dict[str, Any]:
    """Return those sizes of the model in a directory that are settings."""
    config = read_config(adapters.base_of(folder) if adapters.are_in(folder) else folder)
    found = {name: next((config[key] for key in keys if key in config), None) for name, keys in SIZES.items()}
    sizes: dict[str, Any] = {name: size for name, size in found.items() if type(size) is int and size > 0}
    if config["model_type"] not in models.OURS:
        return sizes
    sizes["model_type"] = config["model_type"]
    if config["model_type"] != "gpt2" and isinstance(tied := config.get("tie_word_embeddings"), bool):
        sizes["tie_embeddings"] = tied
    return sizes


def base_of(config: Config, resumes: bool) -> Path | None:
    """Return the directory of the weights that a run with adapters keeps frozen; None for other runs.

    A run that `resumes` has the weights in its own folder, unless they are on another disk.

    Raises:
        UserError: the directory is gone.
    """
    if not config.lora.lora_rank:
        return None
    kept = Path(config.out) / run_folder.BASE
    if resumes and (kept / "config.json").is_file():
        return kept.resolve()
    try:
        folder = run_folder.model_directory(Path(config.init_from))
        return (adapters.base_of(folder) if adapters.are_in(folder) else folder).resolve()
    except UserError as error:
        raise UserError(f"{config.out} has only adapters, and needs the weights that they belong to. {error}") from None


def start_of(config: Config, base: Path | None) -> Path | None:
    """Return the directory from which a run without a checkpoint starts: `base`, or adapters for it.

    This is None for a run that starts from nothing.

    Raises:
        UserError: the directory is gone.
    """
    if not config.init_from:
        return None
    folder = run_folder.model_directory(Path(config.init_from))
    return folder if base is None or adapters.are_in(folder) else base


def fingerprint(base: Path | None, known: str) -> str:
    """Return the checksum of the weights in `base`; "" if there is no base.

    Args:
        known: the checksum in the checkpoint; "" if there is none.

    Raises:
        UserError: the weights have changed since the checkpoint.
    """
    if base is None:
        return ""
    found = checksum(sorted(base.glob("model*.safetensors")))
    if known and found != known:
        raise UserError(
            f"The weights in {base} have changed since the run began, and its adapters belong to the old ones: put "
            "those back, or start another run with another --out."
        )
    return found
