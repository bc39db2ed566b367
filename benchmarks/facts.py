"""What a result has to say of where it was measured: chip, system, versions, commit; no host's or folder's name."""

import importlib.metadata
import importlib.util
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

PACKAGES = ("mlx", "torch", "mlx-lm", "transformers", "tokenizers", "numpy")


def gather(benchmark: str, **settings: Any) -> dict[str, Any]:
    """The head of a result."""
    return {
        "benchmark": benchmark,
        "date": datetime.now(UTC).date().isoformat(),
        "command": command(sys.argv),
        "commit": commit(),
        "machine": machine(),
        "versions": {name: version for name in PACKAGES if (version := version_of(name))},
        "settings": settings,
    }


def command(arguments: list[str]) -> str:
    """How to measure it again: the command without the files that it names."""
    words = ["python", f"benchmarks/{Path(arguments[0]).name}"]
    rest = iter(arguments[1:])
    for word in rest:
        if word == "--json":
            next(rest, None)
        elif not word.startswith("--json="):
            words.append(Path(word).name if os.sep in word else word)
    return shlex.join(words)


def machine() -> dict[str, Any]:
    """Chip, memory, system, and how busy it was before anything was measured."""
    on_mac = sys.platform == "darwin"
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "chip": chip(),
        "cores": os.cpu_count(),
        "memory_gib": round(pages / 2**30, 1),
        "system": f"macOS {platform.mac_ver()[0]}" if on_mac else f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def chip() -> str:
    """The processor's name as the system tells it."""
    if sys.platform == "darwin":
        return _said("sysctl", "-n", "machdep.cpu.brand_string")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def commit(checkout: Path | None = None) -> str:
    """The commit of the mlx_gpt that is measured, "+" where it was changed since; empty outside a repository."""
    spec = importlib.util.find_spec("mlx_gpt")
    assert spec is not None
    assert spec.origin is not None
    git = ("git", "-C", str(checkout / "mlx_gpt" if checkout else Path(spec.origin).parent))
    name = _said(*git, "rev-parse", "--short=10", "HEAD")
    changed = _said(*git, "status", "--porcelain", "--untracked-files=no", "--", ".")
    return name + ("+" if changed else "")


def version_of(package: str) -> str:
    """Its version; empty when it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def warn_if_busy(load: float) -> None:
    """Say so when something else has been computing: the figures would be of both."""
    if load > 0.3 * (os.cpu_count() or 1):
        click.echo(
            f"Something else uses this machine (load {load} on {os.cpu_count()} cores): "
            "end it for figures that can be told to others.",
            err=True,
        )


def _said(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""
