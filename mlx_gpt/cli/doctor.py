"""`mlx-gpt doctor`."""

import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import click

PACKAGES = ("mlx-gpt", "mlx", "mlx-data", "tokenizers", "safetensors", "kaggle", "numpy")
PRODUCT = 2048
SLOW_GFLOPS = 20  # a reference BLAS stays below, a tuned one is far above


@click.command("doctor")
def command() -> int:
    """Is this machine ready? Versions, device, speed, credentials."""
    from mlx_gpt import _blas, backend

    device = backend.device()
    backend.prepare(device)
    problems = []

    _row("Python", platform.python_version())
    for package in PACKAGES:
        _row(package, importlib.metadata.version(package))
    _row("System", platform.platform())
    _row("Device", str(device))
    _row("Usable memory", f"{device.usable / backend.GIB:.1f} GiB")
    _row(
        "Precision", f"{backend.compute_dtype('auto', device)} to compute in, float32 to keep".replace("mlx.core.", "")
    )
    gflops = product_gflops()
    _row("Matrix product", f"{gflops:,.0f} GFLOP/s (float32, {PRODUCT} cubed)")
    if device.kind == "cpu":
        _row("BLAS", _blas.live)
        if gflops < SLOW_GFLOPS:
            problems.append("No tuned BLAS is in place: install `g++`, and `pip install scipy-openblas32`.")
        if not shutil.which("g++") and platform.system() == "Linux":
            problems.append("There is no g++, so MLX cannot compile the training step: install it.")
    _row(
        "Training",
        f"{training_speed():,.0f} tokens/s (preset tiny, {backend.compute_dtype('auto', device)})".replace(
            "mlx.core.", ""
        ),
    )
    _row("Kaggle", credentials() or "no credentials; `mlx-gpt download` says how to get them")
    for problem in problems:
        click.echo(f"Problem: {problem}")
    click.echo("Ready." if not problems else "It works, but see above.")
    return 1 if problems else 0


def product_gflops() -> float:
    """Billions of floating-point operations per second in a large product, the median of five."""
    import mlx.core as mx

    a, b = mx.random.normal((PRODUCT, PRODUCT)), mx.random.normal((PRODUCT, PRODUCT))
    mx.eval(a, b)
    return 2 * PRODUCT**3 / _median_seconds(lambda: mx.eval(a @ b)) / 1e9


def training_speed() -> float:
    """Tokens per second of a real training step of the preset tiny, the median of five."""
    import mlx.core as mx
    import numpy as np

    from mlx_gpt import backend
    from mlx_gpt.model import GPT
    from mlx_gpt.settings import resolve
    from mlx_gpt.training.step import TrainingStep

    config = resolve({"preset": "tiny", "data": "builtin"})
    training = config.training
    model = GPT(config.model).init_weights(0)
    step = TrainingStep(model, training, backend.compute_dtype(training.precision, backend.device()))
    shape = (training.batch_size, training.seq_len + 1)
    windows = np.random.default_rng(0).integers(config.model.vocab_size, size=shape, dtype=np.int32)
    seconds = _median_seconds(lambda: mx.eval(step(0, 0.0, [windows])))
    return training.batch_size * training.seq_len / seconds


def credentials() -> str:
    """Where Kaggle's credentials would be taken from, or nothing. They are not read."""
    for name in ("KAGGLE_API_TOKEN", "KAGGLE_KEY"):
        if os.environ.get(name):
            return f"credentials in {name}"
    folders = [Path.home() / ".kaggle", Path.home() / ".config" / "kaggle"]
    if "KAGGLE_CONFIG_DIR" in os.environ:
        folders.insert(0, Path(os.environ["KAGGLE_CONFIG_DIR"]))
    files = [folder / name for folder in folders for name in ("access_token", "kaggle.json", "credentials.json")]
    found = [file for file in files if file.exists()]
    return f"credentials in {found[0]}" if found else ""


def _median_seconds(work: Callable[[], object], times: int = 5) -> float:
    work()
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return sorted(seconds)[times // 2]


def _row(name: str, value: str) -> None:
    click.echo(f"{name:15} {value}")
