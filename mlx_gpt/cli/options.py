"""Command-line flags, made from the settings in config.py."""

from collections.abc import Callable, Mapping
from typing import Any

import click

from mlx_gpt.config import DataConfig, LoRAConfig, ModelConfig, TrainingConfig
from mlx_gpt.settings import Setting, settings_of

SECTIONS = {DataConfig: "Text", ModelConfig: "Model", LoRAConfig: "Adapters (LoRA)", TrainingConfig: "Training"}


class SettingOption(click.Option):
    """The flag of a setting, with the section of `--help` that it belongs to. It is None if it is not given."""

    def __init__(self, *args: Any, section: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self.section = section


class NumberOrAuto(click.ParamType):
    """A number, or the word "auto"."""

    name = "number or auto"

    def __init__(self, kind: type[int] | type[float]) -> None:
        self._kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        """Return the number, or "auto"."""
        if value == "auto":
            return value
        try:
            return self._kind(value)
        except ValueError:
            number = "whole number" if self._kind is int else "number"
            self.fail(f"{value!r} is neither a {number} nor auto.", param, ctx)


class SettingsCommand(click.Command):
    """A command whose `--help` shows the flags in sections."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the flags section by section."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record:
                sections.setdefault(getattr(parameter, "section", "Options"), []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def settings_options(config_class: type, only: tuple[str, ...] = ()) -> Callable[[Callable], Callable]:
    """Give a command a flag for each setting of a dataclass, or only for the settings in `only`."""

    def decorate(function: Callable) -> Callable:
        for setting in reversed(list(settings_of(config_class))):  # decorators apply from the last to the first
            if not only or setting.name in only:
                function = _option(setting)(function)
        return function

    return decorate


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that were given on the command line."""
    return {name: value for name, value in values.items() if value not in (None, ())}


def _option(setting: Setting) -> Callable[[Callable], Callable]:
    """Return the decorator that gives a command the flag of a setting."""
    help_text = setting.metadata["help"]
    if setting.default not in ("", None, ()):
        help_text += f"  [default: {setting.default}]"
    choices = setting.metadata["choices"]
    flags = [f"--{word.replace('_', '-')}" for word in (setting.name, *setting.metadata["aliases"])]
    if setting.kind is bool:
        flags = [f"{flag}/--no-{flag.removeprefix('--')}" for flag in flags]
    repeated, or_auto = setting.kind is tuple, bool(setting.metadata["auto"])
    kind = str if repeated else NumberOrAuto(setting.kind) if or_auto else setting.kind
    metavar = {int: "N", float: "X"}.get(setting.kind, "TEXT") + ("|auto" if or_auto else "")
    return click.option(
        *flags,
        setting.name,
        cls=SettingOption,
        section=SECTIONS.get(setting.owner, "Options"),
        type=click.Choice(choices) if choices else kind,
        multiple=repeated,
        default=None,
        help=help_text,
        metavar=None if choices or setting.kind is bool else metavar,
    )
