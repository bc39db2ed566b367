"""The command line. Each command has a file of its own that parses flags, calls the library and prints."""

import difflib
import importlib
import os
import sys
import time
from typing import Any

import click

from mlx_gpt.cli import streams
from mlx_gpt.errors import FORESEEN, in_a_sentence, shown

# A command is imported only when it runs, so that `mlx-gpt --help` is quick. It shows these sentences.
COMMANDS = {
    "download": "Get a dataset from Kaggle or the Hugging Face Hub, or one downloaded by hand, and prepare it.",
    "prepare": "Turn CSV, TSV, JSONL, Parquet and text files into a corpus to train on.",
    "train": "Train a model, or resume a run.",
    "generate": "Continue a prompt, or talk to a model.",
    "serve": "Serve models to other programs, and to people on a page.",
    "eval": "Measure loss, perplexity and bits per byte of a model on a text.",
    "plot": "Plot the curves of a run, or of several.",
    "doctor": "Check that this machine is ready: versions, device, speed, credentials.",
}


# Where people expect a command to take a name that it takes by a flag.
NAMED_BY = {
    "download": "name a dataset with --dataset",
    "train": "name a run with --resume, weights to start from with --from, and one text with --data",
    "generate": "name a model with --model, and a text to continue, in quotes, with --prompt",
    "serve": "name a model with --model",
}


class LazyGroup(click.Group):
    """A group that imports each command only when it runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands, in the order in which a user needs them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import a command."""
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"mlx_gpt.cli.{name}").command
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Find a command. The error for an unknown one suggests a similar name."""
        if args and args[0] not in COMMANDS and args[0][:1] != "-":
            similar = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f"did you mean {similar[0]}?" if similar else "`mlx-gpt --help` lists the commands."
            raise click.UsageError(f"There is no command {shown(args[0])}: {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Show the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=LazyGroup,
    # --max_length means --max-length
    context_settings={
        "token_normalize_func": lambda name: name.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
    },
)
@click.version_option(package_name="mlx-gpt")
def cli() -> None:
    """Train a GPT from scratch on your own text, and talk to it."""


def main() -> None:
    """Run the program and exit."""
    streams.prepare()
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError:
        # Nothing can be written any more, so the flush at exit must not try.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run a command and return its exit code, printing an error as one sentence on stderr.

    The code is 0 for success, 2 for a user's mistake, 1 for a failure and 130 for Ctrl-C.
    """
    try:
        code = cli.main(arguments, prog_name="mlx-gpt", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.ClickException as error:
        message = error.format_message()
        context = getattr(error, "ctx", None)
        if message.startswith("Got unexpected extra argument") and context and context.info_name in NAMED_BY:
            message = f"{message}: {NAMED_BY[context.info_name]}."
        if os.environ.get("MLX_RANK", "0") != "0":
            time.sleep(10)  # all ranks have this error: rank 0 reports it, and mlx.launch ends this rank meanwhile
        return _report(message, 2)
    except BrokenPipeError:
        code = 1  # the reader of stdout has gone, as `head` does
    except (Exception, KeyboardInterrupt) as error:
        # click takes an EOFError for Ctrl-C
        cause = (error.__cause__ or KeyboardInterrupt()) if isinstance(error, click.Abort) else error
        words, code = in_a_sentence(cause)
        if "MLX_GPT_TRACEBACK" in os.environ and code != 130 and not isinstance(error, FORESEEN):
            raise
        return _report(words, code)
    return code if isinstance(code, int) else 0


def _report(message: str, code: int) -> int:
    rank = os.environ.get("MLX_RANK", "0")
    if code != 130:
        message = f"Error: {message}" if rank == "0" else f"Error: Rank {rank}: {message}"
    if code != 130 or rank == "0":
        click.echo(message, err=True)
    return code
