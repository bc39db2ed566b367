"""The limits of the device: the speed of a large product and of a large copy, measured in the same run as the rest.

It is a worker of its own for MLX (`roofline.py mlx`) or PyTorch (`roofline.py torch`), so that its arrays don't count
as a contender's memory.
"""

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from harness import THREAD_SETTINGS, TORCH_DEVICES, serve

COPIED = 2**28  # bytes, far more than caches hold
PRODUCT = {"cpu": 2048, "gpu": 8192}  # N
PRODUCTS = {"cpu": 1, "gpu": 8}  # started before waiting for them
SMOKE = 64  # divides the sizes when nothing has to be measured
LEAST_SECONDS, LEAST_TIMES = 0.4, 3


def fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of several runs after a warm-up. The fastest counts, because a limit is meant."""
    work()
    seconds: list[float] = []
    while len(seconds) < LEAST_TIMES or sum(seconds) < LEAST_SECONDS:
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


class Roofline:
    """The limits of one device that one library reaches.

    Args:
        kind: "metal", "cuda" or "cpu".
        dtype: of the product. A float32 product has the TF32 setting of every worker (`harness.TF32`).
        smoke: use arrays that are too small to measure anything.
    """

    def __init__(self, kind: str, dtype: str, smoke: bool = False) -> None:
        where = "cpu" if kind == "cpu" else "gpu"
        self._kind, self._dtype = kind, dtype
        self._size, self._count = PRODUCT[where] // (SMOKE if smoke else 1), PRODUCTS[where]
        self._copied = COPIED // (SMOKE if smoke else 1)

    def facts(self) -> dict[str, Any]:
        """Which limits it can measure."""
        return {"limits": [what for what in ("product", "copy") if hasattr(self, what)]}

    def product(self) -> float:
        """TFLOP/s of (N, N) products with 2 N^3 operations each."""
        return self._count * 2 * self._size**3 / fastest(self._make_product()) / 1e12

    def _make_product(self) -> Callable[[], object]:
        """A function that multiplies (N, N) arrays `_count` times and waits for the results."""
        raise NotImplementedError


class MLX(Roofline):
    """MLX, with mlx-gpt's BLAS on a CPU."""

    def __init__(self, kind: str, dtype: str, smoke: bool = False) -> None:
        super().__init__(kind, dtype, smoke)
        import mlx_gpt.device  # noqa: F401, I001 - first, so that a tuned BLAS serves mlx
        import mlx.core as mx

        mx.set_default_device(mx.cpu if kind == "cpu" else mx.gpu)
        self._mx = mx

    def _make_product(self) -> Callable[[], object]:
        mx, shape = self._mx, (self._size, self._size)
        a, b = (mx.random.normal(shape).astype(getattr(mx, self._dtype)) for _ in range(2))
        mx.eval(a, b)
        return lambda: mx.eval([a @ b for _ in range(self._count)])

    def copy(self) -> float:
        """GB/s of a copy in the device's memory. Bytes read and bytes written both count, as in STREAM.

        On a CPU numpy copies on all threads. On a GPU MLX reads each number and writes its negative.
        """
        if self._kind == "cpu":
            return copy_on_threads(self._copied, int(os.environ[THREAD_SETTINGS[0]]))
        source = self._mx.ones((self._copied // 4,))
        self._mx.eval(source)
        return 2 * self._copied / fastest(lambda: self._mx.eval(-source)) / 1e9


class Torch(Roofline):
    """PyTorch."""

    def _make_product(self) -> Callable[[], object]:
        import torch

        device = TORCH_DEVICES[self._kind]
        a, b = (torch.randn(self._size, self._size, device=device).to(getattr(torch, self._dtype)) for _ in range(2))

        def work() -> None:
            for _ in range(self._count):
                product = torch.mm(a, b)
            product[0, 0].item()  # waits on every device

        return work


def copy_on_threads(copied: int, threads: int) -> float:
    """GB/s of a copy of `copied` bytes in main memory. Threads run at once, because numpy releases the GIL."""
    source, target = np.ones(copied // 4, np.float32), np.zeros(copied // 4, np.float32)
    parts = list(zip(np.array_split(source, threads), np.array_split(target, threads), strict=True))
    with ThreadPoolExecutor(threads) as pool:
        return 2 * copied / fastest(lambda: list(pool.map(lambda part: np.copyto(part[1], part[0]), parts))) / 1e9


if __name__ == "__main__":
    serve({"mlx": MLX, "torch": Torch}[sys.argv[1]])
