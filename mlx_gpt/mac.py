"""Facts that macOS knows and MLX does not report: GPU cores, the system's version, the limit for wired memory."""

import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

MATRIX_UNITS = 5  # the first M chip whose GPU cores have them
MATRIX_UNITS_FROM = (26, 2)  # MLX asks for this macOS
WIRED_FROM = (15,)  # residency sets, which keep memory wired, came with this macOS


@dataclass(frozen=True)
class Mac:
    """The facts about a Mac, as far as its commands report them.

    Attributes:
        chip: such as "Apple M3 Max".
        macos: its version, such as (26, 2).
        wired_limit: the sysctl `iogpu.wired_limit_mb` in MiB, 0 for the system's default.
    """

    chip: str
    gpu_cores: int | None
    macos: tuple[int, ...]
    wired_limit: int | None

    @property
    def has_matrix_units(self) -> bool:
        """Whether the GPU has units for matrix products ("neural accelerators"), as the M5 and later chips do."""
        found = re.match(r"Apple M(\d+)\b", self.chip)
        return found is not None and int(found[1]) >= MATRIX_UNITS

    @property
    def uses_matrix_units(self) -> bool:
        """Whether MLX can use these units."""
        return self.has_matrix_units and self.macos >= MATRIX_UNITS_FROM

    @property
    def wires_memory(self) -> bool:
        """Whether MLX can keep memory wired."""
        return self.macos >= WIRED_FROM


def output(*command: str) -> str:
    """Return what a command prints, or "" if it fails or is missing."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, ValueError, subprocess.SubprocessError):
        return ""


def look(run: Callable[..., str] = output) -> Mac:
    """Ask macOS for the facts; `run` returns what a command prints."""
    return Mac(
        chip=run("sysctl", "-n", "machdep.cpu.brand_string"),
        gpu_cores=gpu_cores(run("system_profiler", "SPDisplaysDataType", "-json")),
        macos=version(run("sw_vers", "-productVersion")),
        wired_limit=number(run("sysctl", "-n", "iogpu.wired_limit_mb")),
    )


def gpu_cores(report: str) -> int | None:
    """Return the cores of the first GPU that reports some in `system_profiler SPDisplaysDataType -json`."""
    try:
        displays = json.loads(report)["SPDisplaysDataType"]
        return next((int(gpu["sppci_cores"]) for gpu in displays if "sppci_cores" in gpu), None)
    except (ValueError, KeyError, TypeError):
        return None


def version(text: str) -> tuple[int, ...]:
    """Return the numbers of a version such as "26.2.1", or () if the text is not a version."""
    return tuple(map(int, text.split("."))) if re.fullmatch(r"\d+(\.\d+)*", text) else ()


def number(text: str) -> int | None:
    """Return the text as a whole number, or None if it is not one."""
    return int(text) if text.isdecimal() else None
