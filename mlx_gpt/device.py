"""The device that a process computes on, and everything that differs between Metal, CUDA and the CPU.

`MLX_GPT_DEVICE` chooses it: `cpu` or `gpu`; by default MLX chooses. `MLX_GPT_ACCELERATION=off` leaves out what makes a
CPU quick (`mlx_gpt.cpu`), so that a CPU takes the path that a GPU takes. Both are read when this module is imported,
which has to come before the first import of `mlx`, or a tuned BLAS can't take its place.
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

from mlx_gpt.cpu import accelerate, adamw, decoding, streams  # noqa: E402
from mlx_gpt.errors import UserError  # noqa: E402

if WANTED == "cpu" or (WANTED == "gpu" and mx.is_available(mx.gpu)):
    mx.set_default_device(mx.cpu if WANTED == "cpu" else mx.gpu)

GIB = 2**30
CHUNK_CPU, CHUNK_GPU = 128, 512  # tokens of a prompt that are read at a time
Tree = Any
"""Arrays in nested dicts, lists and tuples."""


@dataclass(frozen=True)
class Device:
    """What a run needs to know of the device that it computes on, and what the device does in a way of its own.

    Attributes:
        name: as the system calls it.
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
        """The dtype of the forward and backward pass for the setting `precision`.

        `auto` is bfloat16 on a GPU. On the CPU bfloat16 products bypass the BLAS and are dozens of times slower.
        """
        if precision == "auto":
            return mx.float32 if self.kind == "cpu" else mx.bfloat16
        return mx.float32 if precision == "float32" else mx.bfloat16

    def prepare(self) -> None:
        """Set the limits under which this device trains well."""
        # MLX starts operations ahead of the one that runs; near this limit it waits for those before.
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
        if self.accelerated:
            accelerate.accelerate(module)
        return module

    def decoder(self, model: nn.Module, sequences: int) -> Any:
        """Return what decodes so many sequences of `model` at a time: itself, unless a CPU has a quicker way."""
        return decoding.decoder(model, sequences) if self.accelerated else model

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
        optimizer: optim.Optimizer,
        gradients: dict,
        parameters: dict,
        state: dict,
        rate: mx.array,
        sound: mx.array,
    ) -> tuple[dict, dict]:
        """The parameters and the optimizer's state after an update; as they were where `sound` is false.

        Args:
            state: the optimizer's, before the update.
            rate: the learning rate.
        """
        optimizer.state = tree_map(lambda array: array, state)  # a copy, since the optimizer changes it in place
        optimizer.learning_rate = rate
        if self.accelerated and adamw.fits(optimizer):
            return adamw.update(optimizer, gradients, parameters, state, sound)
        new = optimizer.apply_gradients(gradients, parameters), optimizer.state
        return tree_map(lambda new, old: mx.where(sound, new, old), new, (parameters, state))

    def global_norm(self, gradients: Tree) -> mx.array:
        """The Euclidean norm of all gradients together."""
        if self.accelerated:
            return streams.global_norm(gradients)
        return mx.sqrt(sum(gradient.square().sum() for _, gradient in tree_flatten(gradients)))

    def share_host(self, number: int, processes_here: int) -> "Device":
        """Take part `number` of a host where several processes compute; return the device with its part of the memory.

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
    """The device that MLX computes on by default.

    Raises:
        UserError: `MLX_GPT_DEVICE` names none that is here, or `MLX_GPT_BLAS` a library that could not be loaded.
    """
    if WANTED not in ("", "cpu", "gpu"):
        raise UserError(f"MLX_GPT_DEVICE={WANTED} is no device: set it to cpu or gpu, or leave it out.")
    if WANTED == "gpu" and not mx.is_available(mx.gpu):
        raise UserError("MLX_GPT_DEVICE=gpu, but MLX finds no GPU here: leave it out, or run `mlx-gpt doctor`.")
    if blas.problem:
        raise UserError(blas.problem)
    on_gpu = mx.default_device() == mx.gpu
    found = describe(on_gpu and mx.metal.is_available(), on_gpu and mx.cuda.is_available(), dict(mx.device_info()))
    return dataclasses.replace(found, accelerated=ACCELERATION and found.kind == "cpu")


def describe(on_metal: bool, on_cuda: bool, info: dict[str, str | int]) -> Device:
    """The device that `mx.device_info()` describes."""
    name = str(info.get("device_name", platform.processor() or platform.machine()))
    if on_metal:
        # Beyond this Metal starts to swap, and at the end of memory the process dies without a Python exception.
        return Device("metal", name, int(info["memory_size"]), int(info["max_recommended_working_set_size"]))
    if on_cuda:
        total = int(info.get("total_memory", info.get("memory_size", 0)))
        return Device("cuda", name, total, int(info.get("free_memory", total)))
    page = os.sysconf("SC_PAGE_SIZE")
    memory = page * os.sysconf("SC_PHYS_PAGES")
    return Device("cpu", name, memory, available() or memory)


def available(root: Path = Path("/")) -> int:
    """Bytes that Linux could give to this program now, caches that it would drop included; 0 where it doesn't say.

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
