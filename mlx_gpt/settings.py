"""Flags, TOML keys and keyword arguments to configs, checked against what config.py declares.

Where a value comes from, the first that has it: flag, file, preset, default.
"""

import dataclasses
import difflib
import operator
import sys
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w

from mlx_gpt.config import Config
from mlx_gpt.errors import UserError
from mlx_gpt.files import write_text_whole
from mlx_gpt.presets import PRESETS

COMPARE = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}


class Setting(NamedTuple):
    """A setting as its dataclass declares it: `kind` is the type of its value, `owner` the dataclass."""

    name: str
    kind: type
    owner: type
    default: Any
    metadata: Mapping[str, Any]


def settings_of(config_class: type) -> Iterator[Setting]:
    """Each setting of a dataclass and of the dataclasses inside it."""
    hints = typing.get_type_hints(config_class)
    for f in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(hints[f.name]):
            yield from settings_of(typing.cast(type, hints[f.name]))
        elif f.metadata:
            yield Setting(f.name, kind_of(hints[f.name]), config_class, f.default, f.metadata)


def flat(config: Any) -> dict[str, Any]:
    """The settings of a config by name, those that are None left out."""
    values: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            values |= flat(value)
        elif f.metadata and value is not None:
            values[f.name] = "auto" if f.metadata["auto"] and getattr(config, f.metadata["auto"]) else value
    return values


def build(config_class: type, values: Mapping[str, Any]) -> Any:
    """A config with the values given by name, all else at its default. The inverse of `flat`.

    Raises:
        UserError: names every unknown setting and every value out of its bounds, all at once.
    """
    if problems := _problems(config_class, values):
        raise UserError("\n".join(problems.values()))
    return _fill(config_class, values)


def resolve(flags: Mapping[str, Any], file: str | Path | None = None) -> Config:
    """The settings of a run, from flags over the file over the preset over the defaults.

    Raises:
        UserError: names every unknown setting, bad value and impossible combination, all at once.
    """
    given = (read_toml(file) if file else {}) | dict(flags)
    given |= {name: str(value) for name, value in given.items() if isinstance(value, Path)}
    if not given.get("data"):
        prepared = Path("data/processed")
        has_corpus = any((prepared / name).exists() for name in ("train.jsonl", "train.txt"))
        given["data"] = str(prepared) if has_corpus else "builtin"
    if not given.get("preset"):
        given["preset"] = "tiny" if given["data"] == "builtin" else "medium"
    if not given.get("out"):
        name = Path(str(given["data"])).resolve().stem  # resolved, since "." has no name
        given["out"] = f"weights/{given['preset']}-{name}"
    values = PRESETS.get(str(given["preset"]), {}) | given
    problems = _problems(Config, values)
    sound: Config = _fill(Config, {name: value for name, value in values.items() if name not in problems})
    # Of two settings that don't go together, neither must be wrong by itself.
    clashes = [sentence for names, sentence in _conflicts(sound) if not problems.keys() & names]
    if problems or clashes:
        raise UserError("\n".join([*problems.values(), *clashes]))
    return sound


def read_toml(path: str | Path) -> dict[str, Any]:
    """The settings in a TOML file, unchecked.

    Raises:
        UserError: the file can't be read or is no TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; --config wants a TOML file of settings.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}.") from None


def write_toml(config: Config, path: Path) -> None:
    """Write every setting, so that the file is itself a valid `--config`."""
    write_text_whole(path, tomli_w.dumps(flat(config)))


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
            arguments[f.name] = kind(value) if kind in (float, tuple) and value is not None else value
    return config_class(**arguments)


def _problems(config_class: type, values: Mapping[str, Any]) -> dict[str, str]:
    """A sentence for each name that is no setting, or whose value is not fit for it."""
    problems = {}
    known = {setting.name: setting for setting in settings_of(config_class)}
    for name, value in values.items():
        if name not in known:
            nearest = difflib.get_close_matches(name.replace("-", "_"), known, n=1, cutoff=0.5)
            hint = f"did you mean `{nearest[0]}`?" if nearest else "see --help for those there are."
            problems[name] = f"There is no setting `{name}`: {hint}"
        elif wrong := _wrong(value, known[name]):
            problems[name] = f"`{name}` must be {wrong}, not {value!r}."
    return problems


def _wrong(value: Any, setting: Setting) -> str:
    """What the value should have been; empty when it is fine."""
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
        return {int: "a whole number", float: "a number", str: "a text"}[kind] + (
            " or auto" if metadata["auto"] else ""
        )
    if metadata["choices"] and value not in metadata["choices"]:
        nearest = difflib.get_close_matches(value, metadata["choices"], n=1, cutoff=0.5)
        return f"one of {', '.join(metadata['choices'])}" + (f" (did you mean {nearest[0]}?)" if nearest else "")
    if kind is str:
        return ""
    if kind is float and not -sys.float_info.max <= value <= sys.float_info.max:
        return "a finite number"
    fits_bounds = all(COMPARE[words](value, bound) for words, bound in metadata["bounds"].items())
    return "" if fits_bounds else " and ".join(f"{words} {bound:g}" for words, bound in metadata["bounds"].items())


def _wrong_list(value: Any, choices: tuple[str, ...]) -> str:
    if not isinstance(value, list | tuple) or not all(isinstance(v, str) and v for v in value):
        return "a list of texts"
    return "" if not choices or set(value) <= set(choices) else f"a list of {', '.join(choices)}"


def kind_of(annotation: Any) -> type:
    """The type that a value has: int for `int | None`, tuple for `tuple[str, ...]`."""
    if isinstance(annotation, types.UnionType):
        annotation = next(part for part in typing.get_args(annotation) if part is not types.NoneType)
    return typing.get_origin(annotation) or annotation


def _conflicts(config: Config) -> Iterator[tuple[set[str], str]]:
    """Settings that don't go together, and the sentence that says so."""
    model, training = config.model, config.training
    if model.n_embd % model.n_head:
        nearest = next(n for n in range(min(model.n_head, model.n_embd), 0, -1) if model.n_embd % n == 0)
        yield (
            {"n_embd", "n_head"},
            f"`n_embd` {model.n_embd} can't be shared evenly by `n_head` {model.n_head}: try `n_head` {nearest}.",
        )
    if config.data.tokenizer == "bpe" and model.vocab_size < 257:
        yield (
            {"vocab_size", "tokenizer"},
            f"`vocab_size` {model.vocab_size} is too small: 256 bytes and the end of a document are 257 entries, "
            "and what a tokenizer learns comes on top.",
        )
    if training.seq_len > model.n_positions:
        yield (
            {"seq_len", "n_positions"},
            f"`seq_len` {training.seq_len} is longer than the model's `n_positions` {model.n_positions}: "
            "raise the one or lower the other.",
        )
    if training.min_lr is not None and training.min_lr > training.learning_rate:
        yield (
            {"min_lr", "learning_rate"},
            f"`min_lr` {training.min_lr:g} is above `learning_rate` {training.learning_rate:g}: lower it.",
        )
