"""`mlx-gpt doctor`."""

import contextlib
import dataclasses
import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from mlx_gpt import mac, packages
from mlx_gpt.errors import in_a_sentence
from mlx_gpt.files import expanded

if TYPE_CHECKING:
    import numpy as np

    from mlx_gpt.device import Device

PACKAGES = ("mlx-gpt", "mlx", "mlx-data", "tokenizers", "safetensors", "huggingface-hub", "kaggle", "numpy")
PRODUCT = 2048
SLOW_GFLOPS = 20  # a reference BLAS is slower than this, a tuned one far faster
# The largest relative difference between two ways to compute one step. On a CPU float32 differed by 8e-7, and bfloat16
# by 8e-3. TF32 keeps 10 bits of a float32's 23, and bfloat16 keeps 7.
FLOAT32, TF32, BFLOAT16 = 1e-4, 1e-2, 5e-2


@click.command("doctor")
def command() -> int:
    """Check that this machine is ready: versions, device, speed, credentials."""
    problems = list(check())
    for problem in problems:
        click.echo(f"Problem: {problem}")
    count = "One problem" if len(problems) == 1 else f"{len(problems)} problems"
    click.echo(f"{count}: see above." if problems else "Ready.")
    return 1 if problems else 0


def check() -> Iterator[str]:
    """Show the rows, and yield each problem as a sentence."""
    _row("Python", platform.python_version())
    for package in PACKAGES:
        try:
            _row(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            _row(package, "not installed")
            yield f"{package} is missing: install mlx-gpt again."
    if conflict := packages.backend_conflict():
        yield conflict
    _row("System", platform.platform())
    machine = mac.look() if platform.system() == "Darwin" else None
    _row("Kaggle", credentials() or "no credentials; `mlx-gpt download` says how to get them")
    _row("Hugging Face", hub_token())
    try:
        from mlx_gpt.device import device

        here = device()
        here.prepare()
    except Exception as error:
        yield in_a_sentence(error)[0]
        return
    for name, value in device_rows(here, machine):
        _row(name, value)
    if machine and here.kind == "cpu" and os.environ.get("MLX_GPT_DEVICE") != "cpu":
        yield "MLX finds no GPU on this Mac, as in some virtual machines, so the CPU does all the work."
    try:
        yield from measure(here, machine)
    except Exception as error:
        yield f"A measurement failed. {in_a_sentence(error)[0]}"


def device_rows(here: "Device", machine: mac.Mac | None) -> Iterator[tuple[str, str]]:
    """Yield the facts about the device that are known without computing anything."""
    from mlx_gpt.device import GIB, blas, name_of

    yield "Device", str(here)
    if machine:
        cores = f"{machine.gpu_cores} GPU cores" if machine.gpu_cores else "GPU cores unknown"
        yield "Chip", f"{machine.chip or 'unknown'}, {cores}"
        yield "macOS", ".".join(map(str, machine.macos)) or "unknown"
    yield "Usable memory", f"{here.usable / GIB:.1f} GiB"
    if here.kind == "metal" and machine:
        yield "Wired memory", wired_memory(machine)
        if machine.has_matrix_units:
            yield "Matrix units", "used" if machine.uses_matrix_units else "not used: MLX needs macOS 26.2 for them"
    yield "Precision", f"computes in {name_of(here.dtype('auto'))}, keeps weights and optimizer state in float32"
    if rounds_to_tf32(here, machine):
        yield "float32", "products are rounded to TF32, which keeps 10 bits of 23; MLX_ENABLE_TF32=0 keeps all"
    elif here.kind != "cpu":
        yield "float32", "products keep all bits"
    if here.kind == "cpu":
        yield "BLAS", blas.live


def wired_memory(machine: mac.Mac) -> str:
    """Return whether memory stays wired, and the limit for wired memory."""
    if not machine.wires_memory:
        return "needs macOS 15; before it, memory may be paged out between two steps"
    limit = machine.wired_limit
    if limit is None:
        return "its limit, the sysctl iogpu.wired_limit_mb, can't be read"
    now = f"{limit:,} MiB at most" if limit else "the default limit (iogpu.wired_limit_mb is 0)"
    return f"{now}; `sudo sysctl iogpu.wired_limit_mb=N` raises it to N MiB until the next restart"


def rounds_to_tf32(here: "Device", machine: mac.Mac | None) -> bool:
    """Return whether MLX multiplies float32 matrices in TF32: on CUDA and in the matrix units of an M5."""
    able = here.kind == "cuda" or (here.kind == "metal" and machine is not None and machine.uses_matrix_units)
    return able and os.environ.get("MLX_ENABLE_TF32", "1") != "0"


def measure(here: "Device", machine: mac.Mac | None) -> Iterator[str]:
    """Show how fast the device is and whether it computes the same as the CPU; yield each problem."""
    from mlx_gpt.device import name_of

    gflops = product_gflops()
    _row("Matrix product", f"{gflops:,.0f} GFLOP/s (float32, {PRODUCT} cubed)")
    if here.kind == "cpu":
        if gflops < SLOW_GFLOPS:
            if chosen := os.environ.get("MLX_GPT_BLAS"):
                yield f"MLX_GPT_BLAS is {chosen}, and products are slow: unset it."
            else:
                yield "No tuned BLAS is in place: install `g++`, and `pip install scipy-openblas32`."
        if platform.system() == "Linux":
            if not shutil.which("g++"):
                yield "There is no g++, so MLX cannot compile the training step: install it."
                return
            click.echo("Compiling a training step. The first time, this can take a minute.", err=True)
    _row("Training", f"{training_speed(here):,.0f} tokens/s (preset tiny, {name_of(here.dtype('auto'))})")

    if here.kind == "cpu" and not here.accelerated:
        return  # nothing to compare: it is the reference itself
    title = "Fast path" if here.kind == "cpu" else "GPU and CPU"
    precisions = {"float32": TF32 if rounds_to_tf32(here, machine) else FLOAT32}
    if here.kind != "cpu":
        precisions["bfloat16"] = BFLOAT16
    # Fused attention on a GPU takes heads 64 wide, which the larger presets have and tiny does not.
    heads = {} if here.kind == "cpu" else {"n_head": 2}
    reference = one_step(plain_cpu(here), "float32", heads)
    for precision, tolerance in precisions.items():
        found = differences(one_step(here, precision, heads), reference)
        said = f"loss {found.loss:.0e}, gradients {found.gradients:.0e}, updates {found.updates:.0e}"
        _row(title, f"one step in {precision} differs by {said}; at most {tolerance:.0e} is fine")
        if not max(found) <= tolerance:  # NaN is no better
            yield (
                f"A training step in {precision} gives other numbers than plain operations on the CPU ({said}; at most "
                f"{tolerance:.0e} is fine). Don't trust a run on {here.name}: update mlx, and report it if that "
                "does not help."
            )


def product_gflops() -> float:
    """Billions of floating-point operations per second in a large product, the median of five."""
    import mlx.core as mx

    a, b = mx.random.normal((PRODUCT, PRODUCT)), mx.random.normal((PRODUCT, PRODUCT))
    mx.eval(a, b)
    return 2 * PRODUCT**3 / _median_seconds(lambda: mx.eval(a @ b)) / 1e9


def training_speed(here: "Device") -> float:
    """Tokens per second of a real training step of the preset tiny, the median of five."""
    import mlx.core as mx

    step, batch, arrays = _training(here, "auto")
    return batch[1].size / _median_seconds(lambda: mx.eval(step(0, 0.0, [batch]), arrays()))


class Numbers(NamedTuple):
    """The results of one training step: the loss, and by name the gradients and the changes of the weights."""

    loss: float
    gradients: dict[str, "np.ndarray"]
    updates: dict[str, "np.ndarray"]


class Differences(NamedTuple):
    """Relative differences between two steps."""

    loss: float
    gradients: float
    updates: float


def one_step(here: "Device", precision: str, settings: Mapping[str, Any] = MappingProxyType({})) -> Numbers:
    """Make the first step of a model that starts from the same weights on every device."""
    import mlx.core as mx
    import numpy as np
    from mlx.utils import tree_flatten

    on_cpu = mx.stream(mx.cpu) if here.kind == "cpu" else contextlib.nullcontext()
    with on_cpu, contextlib.nullcontext() if here.accelerated or here.kind != "cpu" else _uncompiled():
        step, batch, arrays = _training(here, precision, settings)
        before = {name: np.array(weight) for name, weight in tree_flatten(arrays()[0])}
        loss, _ = step(0, 1e-3, [batch]).numbers()
        weights, state = (tree_flatten(tree, destination={}) for tree in arrays())
        updates = {name: np.array(weights[name]) - weight for name, weight in before.items()}
        # After one step AdamW's mean gradient is a fixed fraction of the gradient. Names are states.0.wte.weight.m.
        means = {name.split(".", 2)[2][:-2]: np.array(m) for name, m in state.items() if name.endswith(".m")}
        return Numbers(loss, means, updates)


def differences(found: Numbers, reference: Numbers) -> Differences:
    """Return how far a step is from a reference, relative to the reference.

    Wherever there is a gradient, AdamW's first step has the size of the learning rate and depends only on the
    gradient's sign. So updates count only where the gradient is clearly not zero.
    """
    import numpy as np

    def distance(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
        squares = sum(np.square(ours[name] - theirs[name], dtype=np.float64).sum() for name in theirs)
        return float(np.sqrt(squares / sum(np.square(array, dtype=np.float64).sum() for array in theirs.values())))

    clear = {name: abs(array) > 0.1 * np.sqrt(np.square(array).mean()) for name, array in reference.gradients.items()}
    return Differences(
        abs(found.loss - reference.loss) / reference.loss,
        distance(found.gradients, reference.gradients),
        distance(*({name: numbers.updates[name][clear[name]] for name in clear} for numbers in (found, reference))),
    )


def plain_cpu(here: "Device") -> "Device":
    """Return the CPU without anything that makes it fast."""
    from mlx_gpt.device import describe

    return dataclasses.replace(here, accelerated=False) if here.kind == "cpu" else describe(False, False, {})


def hub_token() -> str:
    """Return whether there is a token for the Hugging Face Hub, in `HF_TOKEN` or of `hf auth login`."""
    try:
        from huggingface_hub import get_token

        return "a token" if get_token() else "no token (only private and gated models and data need one)"
    except Exception as error:
        return f"unknown ({in_a_sentence(error)[0].rstrip('.')})"


def credentials() -> str:
    """Return where Kaggle's credentials would be read from, or "". This does not read them."""
    for name in ("KAGGLE_API_TOKEN", "KAGGLE_KEY"):
        if os.environ.get(name):
            return f"credentials in {name}"
    folders = [expanded("~/.kaggle"), expanded("~/.config/kaggle")]
    if "KAGGLE_CONFIG_DIR" in os.environ:
        folders.insert(0, Path(os.environ["KAGGLE_CONFIG_DIR"]))
    files = [folder / name for folder in folders for name in ("access_token", "kaggle.json", "credentials.json")]
    found = [file for file in files if file.exists()]
    return f"credentials in {found[0]}" if found else ""


def _training(
    here: "Device", precision: str, settings: Mapping[str, Any] = MappingProxyType({})
) -> tuple[Any, tuple[Any, Any], Callable[[], tuple[Any, Any]]]:
    """Return a step of the preset tiny, a batch, and a function that returns the weights and the optimizer's state."""
    import mlx.core as mx
    import numpy as np

    from mlx_gpt import models
    from mlx_gpt.objectives import OBJECTIVES
    from mlx_gpt.optim import make_optimizer
    from mlx_gpt.settings import resolve
    from mlx_gpt.training.loop import make_step

    fixed = {"preset": "tiny", "data": "builtin", "precision": precision, "max_grad_norm": 0.0}
    config = resolve({**fixed, **settings})
    training = config.training
    model = here.accelerate(models.create(config.model))
    draw = np.random.default_rng(0)
    with mx.stream(mx.cpu):  # other devices round random numbers differently
        models.init_weights(model, seed=0)
        mx.eval(model.parameters())
    shape = training.batch_size, training.seq_len + 1
    batch = (
        mx.array(draw.integers(config.model.vocab_size, size=shape, dtype=np.int32)),
        mx.ones((shape[0], shape[1] - 1)),
    )
    optimizer = make_optimizer(training, model)
    step = make_step(model, optimizer, here.accelerate(OBJECTIVES["documents"]()), training, here)
    return step, batch, lambda: (model.parameters(), optimizer.state)


@contextlib.contextmanager
def _uncompiled() -> Iterator[None]:
    """Switch `mx.compile` off: on a CPU it would run a compiler for minutes."""
    import mlx.core as mx

    mx.disable_compile()
    try:
        yield
    finally:
        if "MLX_DISABLE_COMPILE" not in os.environ:
            mx.enable_compile()


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
