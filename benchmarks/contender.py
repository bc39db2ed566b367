"""What every program that trains has in common: the clock, and what MLX's share beyond it."""

import itertools
import resource
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


def resident_memory(whose: int = resource.RUSAGE_SELF) -> int:
    """Bytes of main memory that this process, or its largest child, has held at the peak, libraries included."""
    peak = resource.getrusage(whose).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class Contender(ABC):
    """Trains one network, step by step.

    Attributes:
        kind: "metal", "cuda" or "cpu".
    """

    kind: str
    _batches: Iterator[np.ndarray]

    def load_windows(self, path: str) -> None:
        """Take the batches of `shapes.write_windows`, over and over."""
        self._batches = itertools.cycle(np.load(path))

    def run(self, rates: list[float], warm_up: int = 0) -> dict[str, Any]:
        """Make a step at each learning rate. The clock runs from after the first `warm_up` until all is computed."""
        losses = []
        for i, rate in enumerate(rates):
            if i == warm_up:
                self.synchronize()
                self.reset_peak_memory()
                started = time.perf_counter()
            losses.append(self.step(next(self._batches), rate))
        self.synchronize()
        seconds = time.perf_counter() - started
        result = {"seconds": seconds, "losses": [float(loss) for loss in losses], "peak_memory": self.peak_memory()}
        self.give_back()
        return result

    def resident_memory(self) -> int:
        """Bytes, as `resident_memory`."""
        return resident_memory()

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What there is to know of it."""

    @abstractmethod
    def step(self, windows_bt: np.ndarray, rate: float) -> Any:
        """Begin one step on windows (B, T + 1); a scalar, the mean loss in nats."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all that was begun is done."""

    @abstractmethod
    def reset_peak_memory(self) -> None:
        """Forget the peak."""

    @abstractmethod
    def peak_memory(self) -> int | None:
        """Bytes that the library has held at once for arrays; None where it doesn't count."""

    @abstractmethod
    def give_back(self) -> None:
        """Return cached memory to the system, for the next one's turn."""


class MLXContender(Contender):
    """Trains with MLX, on the device and in the dtype that mlx-gpt would choose."""

    def __init__(self, settings: dict[str, Any], device: str, precision: str) -> None:
        from mlx_gpt import _blas, backend  # first, so that a tuned BLAS serves mlx
        from mlx_gpt.settings import resolve

        import mlx.core as mx  # isort: skip

        self.mx = mx
        if device != "auto":
            mx.set_default_device(mx.gpu if device == "gpu" else mx.cpu)
        self.device = backend.device()
        backend.prepare(self.device)
        self.kind = self.device.kind
        self.dtype = backend.compute_dtype(precision, self.device)
        self.blas = Path(_blas.live).name if self.kind == "cpu" else ""
        resolved = resolve(settings)
        self.config, self.training = resolved.model, resolved.training

    def facts(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "device": self.device.name,
            "blas": self.blas,
            "dtype": str(self.dtype).removeprefix("mlx.core."),
        }

    def synchronize(self) -> None:
        self.mx.synchronize()

    def reset_peak_memory(self) -> None:
        self.mx.reset_peak_memory()

    def peak_memory(self) -> int | None:
        return self.mx.get_peak_memory()

    def give_back(self) -> None:
        self.mx.clear_cache()
