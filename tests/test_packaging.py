"""An installation gets everything that it needs, or pip refuses it."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DEPENDENCIES = [Requirement(line) for line in PYPROJECT["project"]["dependencies"]]
EXTRAS = {
    extra: [Requirement(line) for line in lines]
    for extra, lines in PYPROJECT["project"]["optional-dependencies"].items()
}


@pytest.mark.parametrize(
    ("system", "machine", "mlx_extras"),
    [("darwin", "arm64", set()), ("darwin", "x86_64", set()), ("linux", "x86_64", {"cpu"}), ("win32", "AMD64", set())],
)
def test_every_machine_asks_for_mlx(system, machine, mlx_extras):
    """Where MLX has no build, pip says so. Leaving it out would end in a traceback at the first import."""
    environment = {"sys_platform": system, "platform_machine": machine}
    wanted = [
        requirement
        for requirement in DEPENDENCIES
        if requirement.name == "mlx" and (requirement.marker is None or requirement.marker.evaluate(environment))
    ]
    assert wanted
    assert {extra for requirement in wanted for extra in requirement.extras} == mlx_extras


def test_mlx_has_one_range():
    """A backend of another version than MLX's would be refused, or load and crash."""
    everywhere = DEPENDENCIES + [requirement for extra in EXTRAS.values() for requirement in extra]
    assert len({str(requirement.specifier) for requirement in everywhere if requirement.name == "mlx"}) == 1


def test_every_file_that_is_not_python_is_packaged():
    package = ROOT / "mlx_gpt"
    packaged = {
        path for pattern in PYPROJECT["tool"]["setuptools"]["package-data"]["mlx_gpt"] for path in package.glob(pattern)
    }
    files = {path for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc" and path.name[0] != "."}
    assert files - packaged == {path for path in files if path.suffix == ".py"}


def test_extras_build_on_extras_that_exist():
    """pip only warns of an extra that does not exist, and installs the rest."""
    own = [requirement for lines in EXTRAS.values() for requirement in lines if requirement.name == "mlx-gpt"]
    assert own
    assert {extra for requirement in own for extra in requirement.extras} <= set(EXTRAS)
