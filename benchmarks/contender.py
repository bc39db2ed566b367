"""The common parts of the programs that train: the clock and, for those on MLX, the device."""

import dataclasses
import itertools
import os
import resource
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


def resident_memory(whose: int = resource.RUSAGE_SELF) -> int:
    """Peak of main memory in bytes, libraries included, of this process or of its largest child."""
    peak = resource.getrusage(whose).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def choose_device(name: str) -> None:
    """Compute on "cpu" or "gpu"; "auto" leaves it to mlx-gpt. Call it before MLX and mlx_gpt.device are imported."""
    if name != "auto":
        os.environ["MLX_GPT_DEVICE"] = name


def open_device(name: str) -> Any:
    """Choose the device, put the tuned BLAS of a CPU in place, and return the device, prepared for training."""
    choose_device(name)
    from mlx_gpt.device import device

    found = device()
    found.prepare()
    return found


def device_facts(device: Any) -> dict[str, str]:
    """Kind and name of the device, and the BLAS if it is a CPU."""
    from mlx_gpt.cpu import blas

    library = Path(blas.live).name if device.kind == "cpu" else ""
    return {"kind": device.kind, "device": device.name, "blas": library}


class Contender(ABC):
    """Trains one network, step by step.

    Attributes:
        kind: "metal", "cuda" or "cpu".
    """

    kind: str
    _batches: Iterator[np.ndarray]

    def load_windows(self, path: str) -> None:
        """Read the batches of `shapes.write_windows`, which are repeated without end."""
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
        """Facts for the result."""

    @abstractmethod
    def step(self, windows_bt: np.ndarray, rate: float) -> Any:
        """Start one step on windows (B, T + 1) of ids. Returns a scalar, the mean loss in nats."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until everything that was started is computed."""

    @abstractmethod
    def reset_peak_memory(self) -> None:
        """Start to count the peak again."""

    @abstractmethod
    def peak_memory(self) -> int | None:
        """Most bytes that the library's arrays have held at once; None where it doesn't count them."""

    @abstractmethod
    def give_back(self) -> None:
        """Return cached memory to the system before another contender's turn."""


class MLXContender(Contender):
    """Trains with MLX, on the device and in the dtype that mlx-gpt would choose.

    Args:
        settings: every setting of a run by name.
        device: "cpu", "gpu" or "auto".
        precision: "float32", "bfloat16" or "auto".
    """

    def __init__(self, settings: dict[str, Any], device: str, precision: str) -> None:
        self.device = open_device(device)
        import mlx.core as mx

        from mlx_gpt.settings import resolve

        self.mx, self.kind, self.dtype = mx, self.device.kind, self.device.dtype(precision)
        resolved = resolve(settings)
        self.config, self.training = resolved.model, dataclasses.replace(resolved.training, precision=precision)

    def facts(self) -> dict[str, Any]:
        from mlx_gpt.device import name_of

        return device_facts(self.device) | {"dtype": name_of(self.dtype)}

    def synchronize(self) -> None:
        self.mx.synchronize()

    def reset_peak_memory(self) -> None:
        self.mx.reset_peak_memory()

    def peak_memory(self) -> int | None:
        return self.mx.get_peak_memory()

    def give_back(self) -> None:
        self.mx.clear_cache()
