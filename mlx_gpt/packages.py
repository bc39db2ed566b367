"""Says how to install what is missing, and finds the packages that installed the library that MLX runs on.

On Linux `mlx` itself has no backend: `mlx-cpu`, `mlx-cuda-12` and `mlx-cuda-13` each install `mlx/lib/libmlx.so`, the
same file. An environment should have one of them. pip does not notice a second one, and uninstalling either deletes the
file of the other.
"""

import importlib.metadata
import json

LIBRARY = "mlx/lib/libmlx.so"


def install(extra: str, upgrade: bool = False) -> str:
    """Say how to install an extra of this package, which is on no index; to be read after a colon."""
    flags = ("--upgrade " if upgrade else "") + ("-e " if is_editable() else "")
    return f"run `pip install {flags}'.[{extra}]'` in the project's folder"


def is_editable() -> bool:
    """Return whether this package was installed with `pip install -e`."""
    # In the project's folder there may be a second description, which setuptools has left.
    found = importlib.metadata.distributions(name="mlx-gpt")
    origins = [json.loads(each.read_text("direct_url.json") or "{}") for each in found]
    return any(origin.get("dir_info", {}).get("editable") for origin in origins)


def backends() -> dict[str, str]:
    """Return the installed distributions that own MLX's library, each with its version. On a Mac there are none."""
    owners = {}
    for distribution in importlib.metadata.distributions():
        record = distribution.read_text("RECORD") or ""
        if any(line.startswith(f"{LIBRARY},") for line in record.splitlines()):
            owners[distribution.name] = distribution.version
    return dict(sorted(owners.items()))


def backend_conflict() -> str | None:
    """Return a sentence that names the backends that overwrite each other, and the commands that leave one of them.

    Without a conflict, return None. The CUDA backend stays, since every installation has `mlx-cpu`, but CUDA only on
    request.
    """
    installed = backends()
    if len(installed) < 2:
        return None
    kept = max(installed)  # mlx-cuda-13 before mlx-cuda-12 before mlx-cpu
    others = " ".join(name for name in installed if name != kept)
    return (
        f"{' and '.join(installed)} both install {LIBRARY}, so either can overwrite the other: keep one with "
        f"`pip uninstall --yes {others}` and then "
        f"`pip install --force-reinstall --no-deps {kept}=={installed[kept]}`."
    )
