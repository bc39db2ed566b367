"""The functions that `import mlx_gpt` offers: the commands, for use from Python."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx_gpt.device  # noqa: F401 - before mlx, so that a tuned BLAS can take its place

# isort: split

import mlx.nn as nn

from mlx_gpt.config import CONVERSATION, GenerationConfig, TrainingConfig
from mlx_gpt.data import hub
from mlx_gpt.device import device
from mlx_gpt.distributed import is_first
from mlx_gpt.errors import UserError, in_a_sentence, is_utf8
from mlx_gpt.generation.stop_strings import Piece
from mlx_gpt.generation.stream import Prompt
from mlx_gpt.generation.stream import stream as stream_pieces
from mlx_gpt.models.directory import load_model
from mlx_gpt.models.tokenizer_files import load_tokenizer
from mlx_gpt.progress import Lines, ignore_line
from mlx_gpt.settings import build
from mlx_gpt.signals import StopSignals
from mlx_gpt.tokenizer import Tokenizer
from mlx_gpt.training.run_folder import model_directory


def load(
    path: str | Path, precision: str = "auto", *, echo: Callable[[str], None] | None = print
) -> tuple[nn.Module, Tokenizer]:
    """Open a model directory, the best model of a run, or a model of the Hugging Face Hub.

    Args:
        path: its path, or `hf:owner/name`, which is fetched unless it already was.
        precision: "float32", "bfloat16", or "auto" for bfloat16 on a GPU and float32 on the CPU.
        echo: called with each line about a download.

    Raises:
        UserError: there is no such model, it is damaged or can't be fetched, or its architecture or the precision is
            unknown.
    """
    if not isinstance(path, str | os.PathLike) or isinstance(os.fspath(path), bytes):
        raise UserError(f'load() opens a path, such as "weights/demo", not {path!r}.')
    build(TrainingConfig, {"precision": precision})  # its error says which precisions there are
    if hub.is_hub_name(path):
        path = hub.model(str(path), echo=echo or ignore_line)[0]
    folder = model_directory(Path(path))
    if not is_utf8(str(folder)):
        raise UserError(f"MLX cannot open {folder}, because the name is not UTF-8: rename it.")
    here = device()
    here.wire_memory()
    model = load_model(folder, here.dtype(precision))
    return here.accelerate(model).eval(), load_tokenizer(folder, model)


def stream(model: nn.Module, tokenizer: Tokenizer, prompt: Prompt, **settings: Any) -> Iterator[Piece]:
    """Continue a text or answer a conversation, yielding pieces of the new text as they are made.

    Args:
        prompt: a text, or messages such as `[{"role": "user", "content": "Which bird?"}]`.
        settings: those of `GenerationConfig`: `max_tokens`, `temperature`, `seed`, ... In a conversation some defaults
            differ, as in `mlx-gpt generate --interactive`.

    Raises:
        UserError: a setting is unknown or out of its bounds; the prompt is empty, too long, or neither text nor
            messages; or the model has no chat template for messages.
    """
    defaults = {} if isinstance(prompt, str) else CONVERSATION
    return stream_pieces(model, tokenizer, prompt, build(GenerationConfig, {**defaults, **settings}))


def generate(model: nn.Module, tokenizer: Tokenizer, prompt: Prompt, **settings: Any) -> str:
    """Continue a text or answer a conversation, and return the new text; arguments and errors as in `stream`."""
    if settings.get("num_samples", 1) != 1:
        raise UserError("generate() returns one text: for several samples iterate over stream().")
    return "".join(piece.text for piece in stream(model, tokenizer, prompt, **settings))


def train(
    *,
    config: str | Path | None = None,
    resume: str | None = None,
    overwrite: bool = False,
    ignore_memory: bool = False,
    echo: Callable[[str], None] | None = print,
    **settings: Any,
) -> Path:
    """Train as `mlx-gpt train` does and return the run's folder, which `load` opens.

    Ctrl-C finishes the step, saves a checkpoint and then raises `KeyboardInterrupt`. SIGTERM and SIGHUP save as well.

    Args:
        config: a TOML file of settings.
        resume: a run or checkpoint to continue, or "newest".
        overwrite: replace the run that is already in the folder.
        ignore_memory: start even if the run is expected to need more memory than there is.
        echo: called with each line of the log.
        settings: those of `Config` by name: `data`, `preset`, `out`, `max_steps`, ...

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed.
        RunError: training could not continue.
        UserError: a setting, the data or a folder cannot be used; in that case nothing has been changed.
    """
    from mlx_gpt.training.loop import train as run_training

    display = Lines(echo if is_first() else None)
    stop = StopSignals(display.line)
    stopped = False
    try:
        outcome = run_training(
            settings,
            display,
            file=config,
            resume=resume,
            overwrite=overwrite,
            ignore_memory=ignore_memory,
            stop_requested=stop.requested,
            around=stop,
        )
        stopped = not outcome.finished
    except Exception as error:
        if stop.received:  # which may end this process before the caller sees the error
            display.line(in_a_sentence(error)[0])
        raise
    finally:
        # Training has ended, so the signal may now do what the caller expects of it. Perhaps only another rank got it.
        if stop.received or stopped:
            signal.raise_signal(stop.received or signal.SIGTERM)
    return outcome.folder
