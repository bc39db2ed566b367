"""TensorBoard and Weights & Biases, which get the same records as metrics.jsonl."""

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
from mlx_gpt.packages import install
from mlx_gpt.settings import flat

Record = Mapping[str, Any]


class Reporter(Protocol):
    """A service that shows the metrics of a run while it trains."""

    def record(self, record: Record) -> None:
        """Report a record of metrics.jsonl."""
        ...

    def close(self) -> None:
        """Wait until everything is written or sent."""
        ...


class TensorBoard:
    """Writes event files to `tensorboard/` in the run's folder.

    TensorBoard's own writer has a thread that prints a traceback when the disk is full, so its parts are used here.
    """

    def __init__(self, folder: Path, config: Config, resumed_at: int | None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        logs = folder / "tensorboard"
        logs.mkdir(exist_ok=True)
        # TensorBoard reads the files in the order of their names, so the name begins with the time.
        self._file = RecordWriter((logs / f"events.out.tfevents.{time.time():.6f}.{os.getpid()}").open("wb"))
        self._write(Event(file_version="brain.Event:2"))
        if resumed_at is not None:  # makes TensorBoard discard points of earlier files from this step on
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
    """Sends metrics to wandb.ai, or writes files that `wandb sync` sends later.

    wandb's own environment variables apply. The id in `wandb/id` in the run's folder lets a resumed run continue the
    same run on wandb.ai. wandb.ai cannot go back to an earlier step, so for steps that are trained again it keeps the
    first values.
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
            settings=wandb.Settings(console="off"),  # because training.log has the lines
        )

    def record(self, record: Record) -> None:
        """Add a point to the curve of each number."""
        if record["step"] >= self._run.step:
            self._run.log(_numbers(record), step=record["step"])

    def close(self) -> None:
        """Wait until everything is sent."""
        self._run.finish()


REPORTERS: dict[str, Callable[[Path, Config, int | None], Reporter]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}


def check(names: Sequence[str]) -> None:
    """Check that these reporters can start.

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
            raise UserError(f"--report-to {name} needs a package: {install(name)}.") from None
        except Exception as error:  # for example, its protobuf is too old
            raise UserError(
                f"The package for --report-to {name} does not load ({shown(error, 200)}): "
                f"{install(name, upgrade=True)}."
            ) from None
        if name == "wandb" and setup().settings.mode in ("online", "shared") and not login(prompt=False, verify=False):
            raise UserError(
                "--report-to wandb needs a key: run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline to "
                "log without one."
            )


class Reporters:
    """The reporters that a run's settings name.

    If one fails, a warning says so, it gets no further records, and training continues.
    """

    def __init__(self, config: Config, resumed_at: int | None, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._open: dict[str, Reporter] = {}
        for name in _chosen(config.training.report_to):
            with self._guarded(name):
                self._open[name] = REPORTERS[name](Path(config.out), config, resumed_at)

    def record(self, record: Record) -> None:
        """Report a record, unless it is an event.

        The loss of a spike is not part of the curve, which has a point every `log_every` steps.
        """
        if "event" in record:
            return
        for name, reporter in list(self._open.items()):
            with self._guarded(name):
                reporter.record(record)

    def close(self) -> None:
        """Close all reporters."""
        for name, reporter in list(self._open.items()):
            with self._guarded(name):
                reporter.close()

    @contextlib.contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # no failure of a library, a disk or a server may end the run
            self._open.pop(name, None)
            self._warn(
                f"WARNING: logging to {name} has stopped for this run ({shown(error, 200)}); metrics.jsonl continues."
            )


def _chosen(names: Sequence[str]) -> list[str]:
    """Return each name once, or no name at all if one of them is "none"."""
    return [] if "none" in names else list(dict.fromkeys(names))


def _numbers(record: Record) -> dict[str, float]:
    """Return the numbers of a record by name, without its step."""
    return {name: value for name, value in record.items() if isinstance(value, int | float) and name != "step"}
