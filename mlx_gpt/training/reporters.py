"""TensorBoard and Weights & Biases, told the very records that go to metrics.jsonl."""

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mlx_gpt.config import Config
from mlx_gpt.errors import UserError, shown
from mlx_gpt.files import write_text_whole
from mlx_gpt.settings import flat

Record = Mapping[str, Any]


class Reporter(Protocol):
    """Someone who is told of a run while it goes on."""

    def record(self, record: Record) -> None:
        """Take a record of metrics.jsonl."""
        ...

    def close(self) -> None:
        """Have all of it written or sent."""
        ...


class TensorBoard:
    """Writes event files to `tensorboard/` in the run's folder.

    TensorBoard's own writer has a thread, which prints a traceback when the disk is full; its parts don't.
    """

    def __init__(self, folder: Path, config: Config, resumed_at: int | None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        logs = folder / "tensorboard"
        logs.mkdir(exist_ok=True)
        # They are read in the order of their names.
        self._file = RecordWriter((logs / f"events.out.tfevents.{time.time():.6f}.{os.getpid()}").open("wb"))
        self._write(Event(file_version="brain.Event:2"))
        if resumed_at is not None:  # TensorBoard forgets what earlier files have from this step on
            self._write(Event(step=resumed_at + 1, session_log=SessionLog(status=SessionLog.START)))

    def record(self, record: Record) -> None:
        """Add a point to the curve of each number."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=number) for name, number in _numbers(record).items()]
        self._write(Event(step=record["step"], summary=Summary(value=values)))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._file.write(event.SerializeToString())
        self._file.flush()


class WeightsAndBiases:
    """Sends to wandb.ai, or writes what `wandb sync` sends later. wandb's own environment variables hold.

    The id in `wandb/id` of the run's folder makes a resumed run the same one there. W&B never takes a step back, so of
    the steps that are made again it keeps what it had first.
    """

    def __init__(self, folder: Path, config: Config, resumed_at: int | None) -> None:
        import wandb

        note = folder / "wandb/id"
        if not note.exists():
            note.parent.mkdir(exist_ok=True)
            write_text_whole(note, uuid.uuid4().hex)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "mlx-gpt"),
            name=os.environ.get("WANDB_NAME", folder.resolve().name),
            id=note.read_text(encoding="utf-8"),
            resume="allow",
            dir=folder,
            config=flat(config),
            settings=wandb.Settings(console="off"),  # training.log has the lines
        )

    def record(self, record: Record) -> None:
        """Add a point to the curve of each number."""
        if record["step"] >= self._run.step:
            self._run.log(_numbers(record), step=record["step"])

    def close(self) -> None:
        """Wait until all is sent."""
        self._run.finish()


REPORTERS: dict[str, Callable[[Path, Config, int | None], Reporter]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}


def check(names: Sequence[str]) -> None:
    """Make sure that these reporters can work.

    Raises:
        UserError: a package is missing or does not load, or wandb would ask for a key.
    """
    for name in _chosen(names):
        try:
            if name == "tensorboard":
                from tensorboard.compat.proto import event_pb2  # noqa: F401
                from tensorboard.summary.writer import record_writer  # noqa: F401
            else:
                from wandb import login, setup
        except ImportError:
            raise UserError(f"--report-to {name} takes a package: pip install 'mlx-gpt[{name}]'.") from None
        except Exception as error:  # such as a protobuf that is too old for it
            raise UserError(
                f"--report-to {name}: its package does not load ({shown(error, 200)}); "
                f"try pip install --upgrade 'mlx-gpt[{name}]'."
            ) from None
        if name == "wandb" and setup().settings.mode in ("online", "shared") and not login(prompt=False, verify=False):
            raise UserError(
                "--report-to wandb needs a key: `wandb login` or WANDB_API_KEY gives it one, and WANDB_MODE=offline "
                "does without."
            )


class Reporters:
    """Those that a run's settings name. One that fails is warned about and told no more; the training goes on."""

    def __init__(self, config: Config, resumed_at: int | None, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._open: dict[str, Reporter] = {}
        for name in _chosen(config.training.report_to):
            with self._guarded(name):
                self._open[name] = REPORTERS[name](Path(config.out), config, resumed_at)

    def record(self, record: Record) -> None:
        """Pass a record on, but for events: a spike's loss is no point of a curve of every `log_every`-th step."""
        if "event" in record:
            return
        for name, reporter in list(self._open.items()):
            with self._guarded(name):
                reporter.record(record)

    def close(self) -> None:
        """Close them."""
        for name, reporter in list(self._open.items()):
            with self._guarded(name):
                reporter.close()

    @contextlib.contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a library, a disk or a server does, the run is worth more
            self._open.pop(name, None)
            self._warn(f"WARNING: {name} is told no more of this run ({shown(error, 200)}); metrics.jsonl goes on.")


def _chosen(names: Sequence[str]) -> list[str]:
    """Each name once, and none beside "none"."""
    return [] if "none" in names else list(dict.fromkeys(names))


def _numbers(record: Record) -> dict[str, float]:
    return {name: value for name, value in record.items() if isinstance(value, int | float) and name != "step"}
