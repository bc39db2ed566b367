"""Two backends of MLX in one environment are noticed."""

import json
import sys

import pytest

from mlx_gpt import packages
from mlx_gpt.packages import backend_conflict, backends


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Make up installed distributions, the only ones that there are."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])

    def add(name, version, *files):
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        if files:
            (folder / "RECORD").write_text("".join(f"{file},sha256=0,1\n" for file in files))

    return add


def test_one_backend_is_as_it_should_be(install):
    install("mlx", "0.32.4", "mlx/core.cpython-311-x86_64-linux-gnu.so")
    install("mlx-cpu", "0.32.4", "mlx/lib/libmlx.so", "mlx/lib/libmlx.so.debug")
    install("no-record", "1.0")
    assert backends() == {"mlx-cpu": "0.32.4"}
    assert backend_conflict() is None


def test_a_mac_has_none(install):
    install("mlx-metal", "0.32.4", "mlx/lib/libmlx.dylib")
    assert backends() == {}
    assert backend_conflict() is None


def test_the_sentence_keeps_the_backend_for_cuda(install):
    install("mlx-cuda-13", "0.32.4", "mlx/lib/libmlx.so")
    install("mlx-cpu", "0.32.3", "mlx/lib/libmlx.so")
    assert backend_conflict() == (
        "mlx-cpu and mlx-cuda-13 both install mlx/lib/libmlx.so, so either can overwrite the other: keep one with "
        "`pip uninstall --yes mlx-cpu` and then "
        "`pip install --force-reinstall --no-deps mlx-cuda-13==0.32.4`."
    )


def test_the_backend_of_this_environment_is_found():
    """The library's path is the one that MLX's packages really use."""
    assert bool(backends()) == (sys.platform == "linux")


@pytest.mark.parametrize(("editable", "flag"), [(True, "-e "), (False, "")])
def test_an_extra_is_installed_as_the_package_was(install, tmp_path, editable, flag):
    """Otherwise a copy in an environment of somebody's own would become a link to a folder."""
    install("mlx-gpt", "0.1")
    origin = {"url": "file:///somewhere", "dir_info": {"editable": editable}}
    (tmp_path / "mlx_gpt-0.1.dist-info/direct_url.json").write_text(json.dumps(origin))
    assert packages.install("serve") == f"run `pip install {flag}'.[serve]'` in the project's folder"
