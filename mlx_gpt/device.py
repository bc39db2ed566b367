"""The device that a process computes on, and everything that differs between Metal, CUDA and the CPU.

`MLX_GPT_DEVICE` chooses the device: `cpu` or `gpu`; by default MLX chooses. `MLX_GPT_ACCELERATION=off` switches off the
code that makes a CPU fast (`mlx_gpt.cpu`), so that a CPU takes the path that a GPU takes. Both are read when this
module is imported. That must come before the first import of `mlx`, because a tuned BLAS can be loaded only before it.
"""

import contextlib
import dataclasses
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlx_gpt.cpu import blas, processes

WANTED = os.environ.get("MLX_GPT_DEVICE", "")
ACCELERATION = os.environ.get("MLX_GPT_ACCELERATION", "on") != "off"
if ACCELERATION and WANTED != "gpu":
    blas.load()
    processes.keep_streams_busy()

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import mlx.optimizers as optim  # noqa: E402
from mlx.utils import tree_flatten, tree_map  # noqa: E402

from mlx_gpt.cpu import accelerate, decoding, optimizers, streams  # noqa: E402
from mlx_gpt.errors import UserError  # noqa: E402

if WANTED == "cpu" or (WANTED == "gpu" and mx.is_available(mx.gpu)):
    mx.set_default_device(mx.cpu if WANTED == "cpu" else mx.gpu)

GIB = 2**30
CHUNK_CPU, CHUNK_GPU = 128, 512  # tokens of a prompt that are read at a time
_process = 0  # the first that asked for the device
Tree = Any
"""Arrays in nested dicts, lists and tuples."""


@dataclass(frozen=True)
class Device:
    """The facts that a run needs about its device, and the operations that this device does in its own way.

    Attributes:
        name: the system's name for it.
        memory: bytes that the device has.
        usable: bytes that a run may take.
        accelerated: whether a CPU computes with the twins in `mlx_gpt.cpu`.
    """

    kind: Literal["metal", "cuda", "cpu"]
    name: str
    memory: int
    usable: int
    accelerated: bool = False

    def __str__(self) -> str:
        return f"{self.name} ({self.kind}, {self.memory / GIB:.0f} GiB)"

    @property
    def chunk(self) -> int:
        """Tokens of a prompt that are read at a time."""
        return CHUNK_CPU if self.kind == "cpu" else CHUNK_GPU

    def dtype(self, precision: str) -> mx.Dtype:
        """Return the dtype of the forward and backward pass for the setting `precision`.

        `auto` is bfloat16 on a GPU. On the CPU bfloat16 products bypass the BLAS and are dozens of times slower.
        """
        if precision == "auto":
            return mx.float32 if self.kind == "cpu" else mx.bfloat16
        return mx.float32 if precision == "float32" else mx.bfloat16

    def prepare(self) -> None:
        """Set the limits under which this device trains well."""
        # MLX starts operations before earlier ones have ended; near this limit it waits for the earlier ones.
        mx.set_memory_limit(self.usable)
        self.wire_memory()
        if self.accelerated:
            streams.prepare()

    def wire_memory(self) -> None:
        """Keep memory wired on Metal, so that it is not paged out between two steps. It takes macOS 15."""
        if self.kind == "metal":
            mx.set_wired_limit(self.usable)

    def accelerate(self, module: nn.Module) -> nn.Module:
        """Replace layers by their CPU twins, where that helps; returns `module`."""
        self._end_with_thread()
        if self.accelerated:
            accelerate.accelerate(module)
        return module

    def decoder(self, model: nn.Module, sequences: int) -> Any:
        """Return a module that decodes this many sequences at a time: `model` itself, or a faster one on a CPU."""
        self._end_with_thread()
        return decoding.decoder(model, sequences) if self.accelerated else model

    def _end_with_thread(self) -> None:
        if self.kind == "cpu":
            streams.end_with_thread()

    def in_slices(self, function: Callable[..., Tree]) -> Callable[..., list[Tree]]:
        """Compute a function of a batch in slices side by side, where that fills the device; else in one slice.

        `function(parameters, key, *arrays)` is called with slices of the arrays, (B, ...). Its results for two slices
        must add up, with `add`, to the result for both.
        """
        return streams.in_slices(function) if self.accelerated else lambda *arguments: [function(*arguments)]

    def add(self, trees: Sequence[Tree]) -> Tree:
        """The sum of trees of one structure, such as the results of `in_slices`."""
        return streams.add(trees)

    def update(
        self,
        optimizer: optim.MultiOptimizer,
        gradients: dict,
        parameters: dict,
        state: dict,
        rate: mx.array,
        sound: mx.array,
    ) -> tuple[dict, dict]:
        """Return the parameters and the optimizer's state after an update, or unchanged if `sound` is false.

        Args:
            state: the optimizer's, before the update.
            rate: the learning rate.
        """
        optimizer.state = tree_map(lambda array: array, state)  # a copy, since the optimizer changes it in place
        optimizer.learning_rate = rate
        if self.accelerated:
            return optimizers.update(optimizer, gradients, parameters, state, sound)
        new = optimizer.apply_gradients(gradients, parameters), optimizer.state
        return tree_map(lambda new, old: mx.where(sound, new, old), new, (parameters, state))

    def global_norm(self, gradients: Tree) -> mx.array:
        """Return the Euclidean norm of all gradients together."""
        if self.accelerated:
            return streams.global_norm(gradients)
        return mx.sqrt(sum(gradient.square().sum() for _, gradient in tree_flatten(gradients)))

    def share_host(self, number: int, processes_here: int) -> "Device":
        """Take share `number` of a host on which several processes compute; return the device with its share of the
        memory.

        On CUDA `mlx.launch` gives each process a GPU of its own.
        """
        if processes_here == 1 or self.kind == "cuda":
            return self
        if self.kind == "cpu":
            processes.take_cores(number, processes_here)
            processes.use_own_kernels(number)
            processes.let_the_launcher_idle()
        return dataclasses.replace(self, usable=self.usable // processes_here)


def device() -> Device:
    """Return the device that MLX computes on by default.

    Raises:
        UserError: `MLX_GPT_DEVICE` names a device that is not here, or `MLX_GPT_BLAS` a library that does not load; or
            this process is a fork of one that computes with MLX.
    """
    global _process
    _process = _process or os.getpid()
    if _process != os.getpid():
        # The threads that MLX waits for are not copied, so it would wait for ever.
        raise UserError(
            "MLX can't compute in a process that was forked from one that uses it: start processes with "
            'multiprocessing.get_context("spawn").'
        )
    if WANTED not in ("", "cpu", "gpu"):
        raise UserError(f"MLX_GPT_DEVICE={WANTED} is not a device: set it to cpu or gpu, or unset it.")
    if WANTED == "gpu" and not mx.is_available(mx.gpu):
        raise UserError("MLX_GPT_DEVICE=gpu, but MLX finds no GPU here: unset it, or run `mlx-gpt doctor`.")
    if blas.problem:
        raise UserError(blas.problem)
    on_gpu = mx.default_device() == mx.gpu
    found = describe(on_gpu and mx.metal.is_available(), on_gpu and mx.cuda.is_available(), dict(mx.device_info()))
    return dataclasses.replace(found, accelerated=ACCELERATION and found.kind == "cpu")


def name_of(dtype: mx.Dtype) -> str:
    """Return the name of a dtype, such as "float32"."""
    return str(dtype).removeprefix("mlx.core.")


def describe(on_metal: bool, on_cuda: bool, info: dict[str, str | int]) -> Device:
    """Return the device that `mx.device_info()` describes."""
    name = str(info.get("device_name", platform.processor() or platform.machine()))
    if on_metal:
        # Above this size Metal starts to swap, and when memory runs out the process dies without a Python exception.
        return Device("metal", name, int(info["memory_size"]), int(info["max_recommended_working_set_size"]))
    if on_cuda:
        total = int(info.get("total_memory", info.get("memory_size", 0)))
        return Device("cuda", name, total, int(info.get("free_memory", total)))
    page = os.sysconf("SC_PAGE_SIZE")
    memory = page * os.sysconf("SC_PHYS_PAGES")
    return Device("cpu", name, memory, available() or memory)


def available(root: Path = Path("/")) -> int:
    """Return the bytes that Linux could give this program now, including caches that it would drop; 0 if it doesn't
    say.

    A container's limit counts too (cgroup v2, or v1).
    """
    found = []
    with contextlib.suppress(OSError):
        lines = (root / "proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    groups = root / "sys/fs/cgroup"
    for limit, used in (
        (groups / "memory.max", groups / "memory.current"),
        (groups / "memory/memory.limit_in_bytes", groups / "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # there is none, or it is the word "max"
            found.append(int(limit.read_text()) - int(used.read_text()))
    return max(0, min(found, default=0))
