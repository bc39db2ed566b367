"""The head of a result: chip, system, versions, commit and settings, but no name of a host or a folder."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from harness import TF32

PACKAGES = ("mlx", "torch", "mlx-lm", "transformers", "tokenizers", "numpy")


def begin(benchmark: str, **settings: Any) -> dict[str, Any]:
    """The head of a result, with a warning on stderr if the machine is busy."""
    result = gather(benchmark, **settings)
    warn_if_busy(result["machine"]["load_before"])
    return result


def gather(benchmark: str, **settings: Any) -> dict[str, Any]:
    """The head of a result."""
    return {
        "benchmark": benchmark,
        "date": datetime.now(UTC).date().isoformat(),
        "command": command(sys.argv),
        "commit": commit(),
        "machine": machine(),
        "versions": {name: version for name in PACKAGES if (version := version_of(name))},
        "tf32": TF32,
        "settings": settings,
    }


def command(arguments: list[str]) -> str:
    """The command that repeats the measurement, without `--json` and without the folders of paths."""
    words = ["python", f"benchmarks/{Path(arguments[0]).name}"]
    rest = iter(arguments[1:])
    for word in rest:
        if word == "--json":
            next(rest, None)
        elif not word.startswith("--json="):
            words.append(Path(word).name if os.sep in word else word)
    return shlex.join(words)


def machine() -> dict[str, Any]:
    """Chip, cores, memory in GiB, system, Python, and the load before the benchmark.

    On a Mac the GPU's cores too, and on other systems the name of an NVIDIA GPU.
    """
    on_mac = sys.platform == "darwin"
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = {
        "chip": chip(),
        "cores": os.cpu_count(),
        "memory_gib": round(pages / 2**30, 1),
        "system": f"macOS {platform.mac_ver()[0]}" if on_mac else f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
    }
    if on_mac and (count := gpu_cores(_output_of("system_profiler", "SPDisplaysDataType", "-json"))):
        found["gpu_cores"] = count
    elif not on_mac and (names := _output_of("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")):
        found["gpu"] = names.splitlines()[0]
    return found


def chip() -> str:
    """The system's name for the processor."""
    if sys.platform == "darwin":
        return _output_of("sysctl", "-n", "machdep.cpu.brand_string")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def gpu_cores(displays: str) -> int | None:
    """Cores of the GPU in the output of `system_profiler SPDisplaysDataType -json`; None if it gives no number."""
    try:
        cards = json.loads(displays)["SPDisplaysDataType"]
        return next(int(card["sppci_cores"]) for card in cards if "sppci_cores" in card)
    except (ValueError, KeyError, StopIteration):
        return None


def commit(checkout: Path | None = None) -> str:
    """The commit of the measured mlx_gpt, with "+" if files have changed since; empty outside a repository."""
    spec = importlib.util.find_spec("mlx_gpt")
    assert spec is not None
    assert spec.origin is not None
    git = ("git", "-C", str(checkout / "mlx_gpt" if checkout else Path(spec.origin).parent))
    name = _output_of(*git, "rev-parse", "--short=10", "HEAD")
    changed = _output_of(*git, "status", "--porcelain", "--untracked-files=no", "--", ".")
    return name + ("+" if changed else "")


def name_of_checkout(folder: Path) -> str:
    """The name in tables of another checkout of mlx-gpt; empty if the folder is not one."""
    if not all((folder / file).is_file() for file in ("mlx_gpt/__init__.py", "benchmarks/harness.py")):
        return ""
    return f"mlx-gpt {commit(folder) or folder.name}"


def version_of(package: str) -> str:
    """The package's version; empty if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def warn_if_busy(load: float) -> None:
    """Warn when other programs are computing, because they make the figures worse."""
    if load > 0.3 * (os.cpu_count() or 1):
        click.echo(
            f"Other programs are using this machine (load {load} on {os.cpu_count()} cores): "
            "quit them before you measure figures to publish.",
            err=True,
        )


def _output_of(*command: str) -> str:
    """What the command printed; empty if it could not be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""
