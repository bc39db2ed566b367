"""The reports of a run: lines for people, and records for plots."""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import mlx.core as mx

from mlx_gpt.device import GIB
from mlx_gpt.evaluation import Evaluation
from mlx_gpt.files import flush
from mlx_gpt.progress import Display


class Monitor:
    """Writes `training.log` and `metrics.jsonl` and keeps the time.

    Args:
        folder: the run's folder; None on a rank that keeps no records.
        seconds: time that the run has used before.
        resumed_at: the step of the checkpoint that the run resumes from; later records are removed.
    """

    def __init__(
        self, folder: Path | None, display: Display, seconds: float = 0.0, resumed_at: int | None = None
    ) -> None:
        self._display = display
        log, metrics = (folder / "training.log", folder / "metrics.jsonl") if folder else [Path(os.devnull)] * 2
        self._log = log.open("a", encoding="utf-8")
        if resumed_at is not None:
            _drop_records_after(metrics, resumed_at)
        self._metrics = metrics.open("a", encoding="utf-8")
        self._started = datetime.now(UTC).isoformat(timespec="seconds")
        self._used_before, self._start = seconds, time.perf_counter()
        self._mark, self._tokens, self._aside = self._start, 0, 0.0
        self._last_speed = 0.0
        self._listeners: list[Callable[[Mapping[str, Any]], None]] = []

    @property
    def seconds(self) -> float:
        """Time that the run has used, across resumes."""
        return self._used_before + time.perf_counter() - self._start

    def line(self, text: str) -> None:
        """Add a line to the log and show it."""
        self._write(self._log, text)
        self._display.line(text)

    def listen(self, listener: Callable[[Mapping[str, Any]], None]) -> None:
        """Pass each record to `listener` from now on."""
        self._listeners.append(listener)

    def count(self, tokens: int) -> None:
        """Count trained tokens, for the speed of the next record."""
        self._tokens += tokens

    def aside(self, started: float) -> None:
        """Leave the time since `started` (perf_counter) out of the speed: it was spent evaluating or saving."""
        self._aside += time.perf_counter() - started

    def facts(self, loss: float | None, learning_rate: float) -> dict[str, str]:
        """Return the facts to show beside the progress bar."""
        return {
            "loss": f"{loss:.3f}" if loss is not None else "-",
            "lr": f"{learning_rate:.1e}",
            "tok/s": f"{self._speed():,.0f}",
            "mem": f"{mx.get_peak_memory() / GIB:.1f}G",
        }

    def _speed(self) -> float:
        """Return the tokens trained per second since the last record; right after a record, the speed up to it."""
        if self._tokens:
            self._last_speed = self._tokens / max(1e-9, time.perf_counter() - self._mark - self._aside)
        return self._last_speed

    def log_skipped(self, step: int, loss: float, grad_norm: float, windows: list[int]) -> None:
        """Log a step that changed nothing, with the numbers of its windows in the text."""
        self.line(f"Step {step} skipped: loss {loss}, gradient norm {grad_norm}; windows {windows}")
        self._record(step=step, event="skipped", windows=windows)

    def log_spike(self, step: int, loss: float, average: float) -> None:
        """Log a loss far above its average."""
        self.line(f"Loss spike at step {step}: {loss:.4f}, against {average:.4f} on average before")
        self._record(step=step, event="spike", train_loss=loss)

    def log_step(self, step: int, epoch: int, tokens: int, loss: float, grad_norm: float, learning_rate: float) -> None:
        """Log a step: `tokens` trained so far, `loss` in nats."""
        speed = self._speed()
        self._mark, self._tokens, self._aside = time.perf_counter(), 0, 0.0
        self.line(f"Step {step}, Epoch {epoch}, Loss: {loss:.4f}, LR: {learning_rate:.6f}")
        self._record(
            step=step,
            epoch=epoch,
            tokens=tokens,
            train_loss=finite(loss),
            learning_rate=learning_rate,
            grad_norm=finite(grad_norm),
            tokens_per_second=round(speed, 1),
            peak_memory_gb=round(mx.get_peak_memory() / 1e9, 3),
        )

    def log_validation(self, step: int, epoch: int, tokens: int, evaluation: Evaluation, is_best: bool) -> None:
        """Log an evaluation."""
        self.line(
            f"Validation Loss: {evaluation.loss:.4f} (perplexity {evaluation.perplexity:,.2f}, "
            f"{evaluation.bits_per_byte:.3f} bits per byte){', best so far' if is_best else ''}"
        )
        self._record(
            step=step,
            epoch=epoch,
            tokens=tokens,
            val_loss=finite(evaluation.loss),
            val_bits_per_byte=finite(evaluation.bits_per_byte),
        )

    def close(self) -> None:
        """Close both files."""
        for file in (self._log, self._metrics):
            with contextlib.suppress(OSError):  # lines lost to a full disk were already reported
                file.close()

    def _record(self, **facts: Any) -> None:
        record = facts | {"seconds": round(self.seconds, 3), "started": self._started}
        self._write(self._metrics, json.dumps(record))
        for listener in self._listeners:
            listener(record)

    def _write(self, file: TextIO, line: str) -> None:
        try:
            file.write(line + "\n")
            file.flush()
        except OSError as error:
            # A full disk must not end the training; saving a checkpoint will say more.
            self._display.line(f"WARNING: {file.name} could not be written: {error.strerror}.")


def finite(number: float) -> float | None:
    """Return the number, or None if JSON cannot represent it."""
    return number if math.isfinite(number) else None


def read_records(run: Path) -> list[dict[str, Any]]:
    """Return the records of a run's metrics.jsonl, in order.

    Raises:
        OSError: the file cannot be read.
    """
    records = []
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").split("\n"):
        with contextlib.suppress(ValueError):  # a line that is being written, or that a crash left unfinished
            record = json.loads(line)
            if isinstance(record, dict) and "step" in record:
                records.append(record)
    return records


def was_evaluated(run: Path, step: int) -> bool:
    """Return whether the metrics of a run have an evaluation of `step`."""
    try:
        return any(record["step"] == step and "val_loss" in record for record in read_records(run))
    except OSError:
        return False


def _drop_records_after(path: Path, step: int) -> None:
    """Remove the records of steps that will be repeated, and a last line that a crash left unfinished."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        kept = 0
        for line in file:
            try:
                if json.loads(line)["step"] > step or not line.endswith(b"\n"):
                    break
            except (ValueError, KeyError, TypeError):
                break
            kept += len(line)
        file.truncate(kept)
        flush(file.fileno())
