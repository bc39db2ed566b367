"""`mlx-gpt train`."""

import signal
from typing import Any

import click

from mlx_gpt.cli.options import SettingsCommand, given, settings_options
from mlx_gpt.cli.terminal import Terminal
from mlx_gpt.config import Config
from mlx_gpt.errors import typed
from mlx_gpt.signals import StopSignals, say_on_stderr


@click.command("train", cls=SettingsCommand)
@click.option("--config", "file", metavar="FILE", help="TOML file of settings, such as a run's run.toml.")
@click.option(
    "--resume",
    is_flag=False,
    flag_value="newest",
    metavar="[PATH]",
    help="Resume the run or checkpoint at PATH. Without PATH, resume the run that --out, --data or --preset names, or "
    "else the newest run.",
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="Delete the run in --out and begin again; with --resume CHECKPOINT, delete what came after the checkpoint.",
)
@click.option("--dry-run", is_flag=True, help="Check the settings, measure a few steps, show the plan and stop.")
@click.option("--ignore-memory", is_flag=True, help="Start even if the run may need more memory than this machine has.")
@settings_options(Config)
def command(
    file: str | None, resume: str | None, overwrite: bool, dry_run: bool, ignore_memory: bool, **settings: Any
) -> int:
    """Train a model, or resume a run.

    A flag overrides the --config file, which overrides the recipe, which overrides the preset. Without prepared data,
    this trains the preset tiny on a text that comes with Python.
    """
    from mlx_gpt.distributed import is_first
    from mlx_gpt.progress import Lines
    from mlx_gpt.training import loop

    stop = StopSignals(say_on_stderr if is_first() else None)
    display = Terminal(lossy=not dry_run) if is_first() else Lines()
    outcome = loop.train(
        given(settings),
        display,
        file=file,
        resume=resume,
        overwrite=overwrite,
        ignore_memory=ignore_memory,
        dry_run=dry_run,
        stop_requested=stop.requested,
        around=stop,
    )
    if dry_run:
        return 0
    words = f"Try it with: {typed('generate', '--model', outcome.folder, '--interactive')}"
    if not outcome.finished:
        again = typed("train", "--resume", outcome.folder)
        words = f"Stopped after step {outcome.step:,}. Continue with: {again}"
    display.line(words)
    return 0 if outcome.finished else 128 + (stop.received or signal.SIGTERM)  # a signal may reach only another rank
