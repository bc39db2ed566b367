"""`mlx-gpt train`."""

import contextlib
import os
import signal
from types import FrameType
from typing import Any

import click

from mlx_gpt.cli.options import SettingsCommand, given, settings_options
from mlx_gpt.cli.terminal import Terminal
from mlx_gpt.config import Config


@click.command("train", cls=SettingsCommand)
@click.option("--config", "file", metavar="FILE", help="TOML file of settings, such as a run's run.toml.")
@click.option(
    "--resume",
    is_flag=False,
    flag_value="newest",
    metavar="[PATH]",
    help="Go on with the run that the flags name, with the newest, or with the run or checkpoint at PATH.",
)
@click.option(
    "--overwrite", is_flag=True, help="Replace the run in --out; with --resume CHECKPOINT, what came after it."
)
@click.option("--dry-run", is_flag=True, help="Check everything, measure a few steps, show the plan, and stop.")
@click.option(
    "--ignore-memory", is_flag=True, help="Start even if the run is expected to need more memory than there is."
)
@settings_options(Config)
def command(
    file: str | None, resume: str | None, overwrite: bool, dry_run: bool, ignore_memory: bool, **settings: Any
) -> int:
    """Train a model, or continue a run.

    A value comes from the flag, else from the --config file, else from the preset. With no data prepared it trains the
    preset tiny on the text that is built in.
    """
    from mlx_gpt.distributed import is_first
    from mlx_gpt.progress import Lines
    from mlx_gpt.training import loop

    stop = StopSignals(is_first())
    outcome = loop.train(
        given(settings),
        Terminal() if is_first() else Lines(),
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
    words = f"Talk to it with: mlx-gpt generate --model {outcome.folder} --interactive"
    if not outcome.finished:
        words = f"Stopped after step {outcome.step:,}. Continue with: mlx-gpt train --resume {outcome.folder}"
    if is_first():
        with contextlib.suppress(OSError):  # the terminal may be what has gone
            click.echo(words)
    return 0 if outcome.finished else 128 + (stop.received or signal.SIGTERM)  # a signal may reach another rank only


class StopSignals:
    """Notes SIGINT, SIGTERM and SIGHUP, so that training can stop between two steps; a second SIGINT stops at once.

    Args:
        tells: whether it says so on the terminal.
    """

    def __init__(self, tells: bool = True) -> None:
        self.received = 0
        self._tells = tells

    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.received != 0

    def __enter__(self) -> "StopSignals":
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as it is under nohup
            numbers.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        # MLX raises RuntimeError itself when another rank has gone. mlx.launch then sends SIGTERM, which must not end
        # this process before it has said so.
        lost = kind is RuntimeError
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if lost and number != signal.SIGINT else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        # Not through Python's buffers, which a signal may find in the middle of something.
        if self._tells:
            with contextlib.suppress(OSError):
                os.write(2, b"\nStopping after this step, and saving. Ctrl-C again leaves at once.\n")
        # A closed terminal counts as SIGTERM.
        self.received = signal.SIGTERM if number == signal.SIGHUP else number
