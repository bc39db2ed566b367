"""Turns flags, TOML keys and keyword arguments into configs, checked against the declarations in config.py.

A value comes from the first of these that has it: flag, file, the defaults for fine-tuning if the run starts from
weights, recipe, optimizer, preset, default.
"""

import dataclasses
import difflib
import operator
import os
import re
import sys
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w

from mlx_gpt.config import PREPARED, Config
from mlx_gpt.errors import UserError, is_utf8, printable
from mlx_gpt.files import write_text_whole
from mlx_gpt.presets import OPTIMIZERS, PRESETS, RECIPES, fine_tuning

COMPARE = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}


class Setting(NamedTuple):
    """A setting as its dataclass `owner` declares it, with the type `kind` of its value."""

    name: str
    kind: type
    owner: type
    default: Any
    metadata: Mapping[str, Any]


def settings_of(config_class: type) -> Iterator[Setting]:
    """Yield each setting of a dataclass and of the dataclasses inside it."""
    hints = typing.get_type_hints(config_class)
    for f in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(hints[f.name]):
            yield from settings_of(typing.cast(type, hints[f.name]))
        elif f.metadata:
            yield Setting(f.name, kind_of(hints[f.name]), config_class, f.default, f.metadata)


def flat(config: Any) -> dict[str, Any]:
    """Return the settings of a config by name, without those that are None."""
    values: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            values |= flat(value)
        elif f.metadata and value is not None:
            values[f.name] = "auto" if f.metadata["auto"] and getattr(config, f.metadata["auto"]) else value
    return values


def build(config_class: type, values: Mapping[str, Any]) -> Any:
    """Return a config with the given values, and the default everywhere else. It is the inverse of `flat`.

    Raises:
        UserError: there are unknown settings or bad values; each gets a line.
    """
    values = {name: _plain(value) for name, value in values.items()}
    if problems := _problems(config_class, values):
        raise UserError("\n".join(problems.values()))
    return _fill(config_class, values)


def resolve(flags: Mapping[str, Any], in_file: Mapping[str, Any] = types.MappingProxyType({})) -> Config:
    """Return the settings of a run. A value comes from the first that has it: flag, file, recipe, optimizer, preset.

    Raises:
        UserError: there are unknown settings, bad values or impossible combinations; each gets a line.
    """
    given = dict(in_file) | dict(flags)
    given = {name: _plain(value) for name, value in given.items()}
    if not given.get("data"):
        has_corpus = any(Path(PREPARED, name).exists() for name in ("train.jsonl", "train.txt"))
        given["data"] = PREPARED if has_corpus else "builtin"
    recipe = RECIPES.get(str(given.get("recipe")), {})
    start = str(given.get("init_from") or "")
    if start:
        given.setdefault("preset", "")
    elif not given.get("preset"):
        given["preset"] = recipe.get("preset") or ("tiny" if given["data"] == "builtin" else "medium")
    if not given.get("out"):
        name = printable(Path(str(given["data"])).resolve().stem)  # resolved, because "." has no name
        given["out"] = f"weights/{given['preset'] or name_of_weights(start)}-{name}"
    optimizer = OPTIMIZERS.get(str(given.get("optimizer") or recipe.get("optimizer")), {})
    values = PRESETS.get(str(given["preset"]), {}) | optimizer | recipe | given
    if start:
        width = given.get("n_embd")  # the width of the weights, once they have been read
        kind = "lora" if given.get("lora_rank") else "full"
        values |= fine_tuning(kind, width if isinstance(width, int) and width > 0 else 128) | given
    problems = _problems(Config, values)
    sound: Config = _fill(Config, {name: value for name, value in values.items() if name not in problems})
    # A setting that is wrong by itself is not reported again as part of a combination.
    clashes = [sentence for names, sentence in _conflicts(sound) if not problems.keys() & names]
    if problems or clashes:
        raise UserError("\n".join([*problems.values(), *clashes]))
    return sound


def name_of_weights(path: str | Path) -> str:
    """Return the name of the run that weights belong to, else that of their directory."""
    folder = Path(path).resolve()
    if folder.name == "adapters" and re.fullmatch("best|final|step-[0-9]+", folder.parent.name):
        folder = folder.parent
    if folder.parent.name == "checkpoints":
        folder = folder.parent.parent
    elif folder.name in ("best", "final", "base") and _is_inside_run(folder):
        folder = folder.parent
    return printable(folder.name)


def _is_inside_run(folder: Path) -> bool:
    return not (folder / "run.toml").exists() and (folder.name != "base" or (folder.parent / "run.toml").exists())


def read_toml(path: str | Path) -> dict[str, Any]:
    """Return the settings in a TOML file, unchecked.

    Raises:
        UserError: the file cannot be read or is not valid TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"Cannot read {path} ({error.strerror}): give --config a TOML file of settings.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML ({error}): correct it and try again.") from None


def write_toml(config: Config, path: Path) -> None:
    """Write every setting to a file that is itself a valid `--config`."""
    write_text_whole(path, tomli_w.dumps(flat(config)))


def _plain(value: Any) -> Any:
    """Return a path as text, and a number of NumPy's or MLX's as Python's own; anything else as it is."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    return operator.index(value) if hasattr(value, "__index__") and not isinstance(value, bool) else value


def _fill(config_class: type, values: Mapping[str, Any]) -> Any:
    hints = typing.get_type_hints(config_class)
    arguments: dict[str, Any] = {}
    for f in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(hints[f.name]):
            arguments[f.name] = _fill(typing.cast(type, hints[f.name]), values)
        elif f.name in values and f.metadata.get("auto") and values[f.name] == "auto":
            arguments[f.metadata["auto"]] = True
        elif f.name in values:
            kind, value = kind_of(hints[f.name]), values[f.name]
            if kind is tuple and isinstance(value, str):
                value = [value]
            arguments[f.name] = kind(value) if kind in (float, tuple) and value is not None else value
    return config_class(**arguments)


def _problems(config_class: type, values: Mapping[str, Any]) -> dict[str, str]:
    """Return a sentence for each unknown name and each bad value."""
    problems = {}
    known = {setting.name: setting for setting in settings_of(config_class)}
    for name, value in values.items():
        if name not in known:
            words = name.replace("-", "_")
            turned = [other for other in known if sorted(other.split("_")) == sorted(words.split("_"))]
            nearest = turned or difflib.get_close_matches(words, known, n=1, cutoff=0.5)
            hint = f"did you mean `{nearest[0]}`?" if nearest else "--help lists the settings."
            problems[name] = f"There is no setting `{name}`: {hint}"
        elif wrong := _wrong(value, known[name]):
            found = value[0] if isinstance(value, tuple) and len(value) == 1 else value  # a flag that was given once
            problems[name] = f"`{name}` must be {wrong}, not {found!r}."
    return problems


def _wrong(value: Any, setting: Setting) -> str:
    """Return what the value should have been; "" if it is valid."""
    kind, metadata = setting.kind, setting.metadata
    if (value is None and setting.default is None) or value == "" == setting.default:
        return ""
    if value == "auto" and metadata["auto"]:
        return ""
    if kind is bool:
        return "" if isinstance(value, bool) else "true or false"
    if kind is tuple:
        return _wrong_list(value, metadata["choices"])
    fits = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
    if not fits:
        return {int: "a whole number", float: "a number", str: "text"}[kind] + (" or auto" if metadata["auto"] else "")
    if metadata["choices"] and value not in metadata["choices"]:
        nearest = difflib.get_close_matches(value, metadata["choices"], n=1, cutoff=0.5)
        return f"one of {', '.join(metadata['choices'])}" + (f" (did you mean {nearest[0]}?)" if nearest else "")
    if kind is str:
        return "" if is_utf8(value) else "valid Unicode, so that run.toml can store it"
    if kind is float and not -sys.float_info.max <= value <= sys.float_info.max:
        return "a finite number"
    fits_bounds = all(COMPARE[words](value, bound) for words, bound in metadata["bounds"].items())
    return "" if fits_bounds else " and ".join(f"{words} {bound:g}" for words, bound in metadata["bounds"].items())


def _wrong_list(value: Any, choices: tuple[str, ...]) -> str:
    texts = (value,) if isinstance(value, str) else value
    fits = isinstance(texts, list | tuple) and all(isinstance(text, str) and text for text in texts)
    if fits and (not choices or set(texts) <= set(choices)):
        return ""
    return f"one or several of {', '.join(choices)}" if choices else "a text or a list of texts, none of them empty"


def kind_of(annotation: Any) -> type:
    """Return the type of a value: int for `int | None`, tuple for `tuple[str, ...]`."""
    if isinstance(annotation, types.UnionType):
        annotation = next(kind for kind in typing.get_args(annotation) if kind is not types.NoneType)
    return typing.get_origin(annotation) or annotation


def _conflicts(config: Config) -> Iterator[tuple[set[str], str]]:
    """Yield each set of settings that exclude each other, and the sentence that says so."""
    training = config.training
    if not config.init_from:
        yield from _conflicts_of_sizes(config)
        if given := changed(config.lora):
            yield (
                {given, "init_from"},
                f"`{given}` is for adapters, which need existing weights: name the weights with `init_from` (--from).",
            )
    if training.min_lr is not None and training.min_lr > training.learning_rate:
        yield (
            {"min_lr", "learning_rate"},
            f"`min_lr` {training.min_lr:g} is above `learning_rate` {training.learning_rate:g}: lower `min_lr`.",
        )


def changed(config: Any) -> str:
    """Return the name of a setting that is not the default; "" if there is none."""
    return next((f.name for f in dataclasses.fields(config) if getattr(config, f.name) != f.default), "")


def _conflicts_of_sizes(config: Config) -> Iterator[tuple[set[str], str]]:
    """Yield the conflicts of a network that starts from nothing."""
    model, training = config.model, config.training
    if model.n_embd % model.n_head:
        nearest = next(n for n in range(min(model.n_head, model.n_embd), 0, -1) if model.n_embd % n == 0)
        yield (
            {"n_embd", "n_head"},
            f"`n_embd` {model.n_embd} is not a multiple of `n_head` {model.n_head}: try `n_head` {nearest}.",
        )
    if model.model_type == "gpt2" and (model.n_kv_head or not model.tie_embeddings):
        given = "n_kv_head" if model.n_kv_head else "tie_embeddings"
        yield {given, "model_type"}, f"GPT-2 has no `{given}` to set: leave it out, or use `model_type` qwen3."
    elif model.n_kv_head and model.n_head % model.n_kv_head:
        yield (
            {"n_kv_head", "n_head"},
            f"`n_head` {model.n_head} is not a multiple of `n_kv_head` {model.n_kv_head}, but all heads of keys and "
            "values must serve the same number of attention heads: change one of the two.",
        )
    if model.model_type == "qwen3" and model.n_embd % model.n_head == 0 and model.n_embd // model.n_head % 2:
        yield (
            {"n_embd", "n_head"},
            f"`n_embd` {model.n_embd} over `n_head` {model.n_head} gives heads of odd width, which qwen3's positions "
            "can't rotate: raise or lower one of them.",
        )
    if config.data.tokenizer == "bpe" and model.vocab_size < 259:
        yield (
            {"vocab_size", "tokenizer"},
            f"`vocab_size` {model.vocab_size} is too small: it must be at least 259, for 256 bytes and three "
            "special tokens, and each entry that the tokenizer learns needs one more.",
        )
    if training.seq_len > model.n_positions:
        yield (
            {"seq_len", "n_positions"},
            f"`seq_len` {training.seq_len} is longer than the model's `n_positions` {model.n_positions}: "
            "lower `seq_len` or raise `n_positions`.",
        )
