"""Which packages brought the library that MLX runs on.

On Linux `mlx` itself holds no backend: `mlx-cpu`, `mlx-cuda-12` and `mlx-cuda-13` each install `mlx/lib/libmlx.so`, the
same file. An environment should have one of them. pip does not notice a second one, and uninstalling either deletes the
file of the other.
"""

import importlib.metadata

LIBRARY = "mlx/lib/libmlx.so"


def backends() -> dict[str, str]:
    """The installed distributions that own MLX's library, each with its version. On a Mac there is none."""
    owners = {}
    for distribution in importlib.metadata.distributions():
        record = distribution.read_text("RECORD") or ""
        if any(line.startswith(f"{LIBRARY},") for line in record.splitlines()):
            owners[distribution.name] = distribution.version
    return dict(sorted(owners.items()))


def backend_conflict() -> str | None:
    """A sentence that says which backends overwrite each other and the commands that leave one, if there are several.

    The CUDA backend stays, since `mlx-cpu` comes with every installation and CUDA only for the asking.
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
