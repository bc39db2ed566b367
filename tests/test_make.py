"""`make` finds a suitable Python, or says which one to get before it makes anything."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAKE = shutil.which("make")
TOOLS = ("cp", "mkdir", "touch")

pytestmark = pytest.mark.skipif(not MAKE, reason="there is no make")


@pytest.fixture
def checkout(tmp_path):
    """A folder with what `make setup` reads."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture
def stand_in(tmp_path):
    """Put a program on an otherwise empty PATH that says it is this Python. Its environments hold only itself."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        (folder / tool).symlink_to(str(shutil.which(tool)))

    def add(name, version, system="Linux", machine="x86_64", answer=None, venv="true"):
        major, minor = version.split(".")
        program = folder / name
        program.write_text(
            f"""#!/bin/sh
case "$1 $2" in
  "-c "*) {answer or f"echo {system} {machine} {major} {minor}"} ;;
  "-m venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python; echo {name} > .venv/made-by; {venv} ;;
esac
"""
        )
        program.chmod(0o755)
        return program

    return add


@pytest.fixture
def setup(checkout, tmp_path):
    """Run `make setup` where only the stand-ins are on the PATH."""

    def run(*variables):
        # The outer make, which may have started these tests, hands its own variables down in MAKEFLAGS.
        inherited = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "PYTHON")}
        environment = inherited | {"PATH": str(tmp_path / "bin")}
        command = [str(MAKE), "setup", *variables]
        return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=60)

    return run


def test_the_newest_that_serves_is_used_although_python3_is_newer(checkout, stand_in, setup):
    stand_in("python3", "3.14")
    stand_in("python3.11", "3.11")
    stand_in("python3.12", "3.12")
    done = setup()
    assert done.returncode == 0, done.stderr
    assert (checkout / ".venv/made-by").read_text() == "python3.12\n"


def test_python3_is_used_if_it_serves(checkout, stand_in, setup):
    stand_in("python3", "3.13", "Darwin", "arm64")
    assert setup().returncode == 0
    assert (checkout / ".venv/made-by").read_text() == "python3\n"


def test_one_that_does_not_run_is_passed_over(checkout, stand_in, setup):
    stand_in("python3.13", "3.13", answer="exit 127")  # a shim of pyenv without the version behind it
    stand_in("python3.11", "3.11")
    assert setup().returncode == 0
    assert (checkout / ".venv/made-by").read_text() == "python3.11\n"


@pytest.mark.parametrize("version", ["3.9", "3.14"])
def test_a_python_that_does_not_serve_is_refused_before_anything_is_made(checkout, stand_in, setup, version):
    stand_in("python3", version, "Darwin", "arm64")
    refused = setup()
    assert refused.returncode != 0
    sentence = refused.stderr.splitlines()[0]
    assert sentence.startswith(f"mlx-gpt needs Python 3.11, 3.12 or 3.13, not {version} (python3):")
    assert "python.org" in sentence
    assert "brew install python@3.13" in sentence
    assert not (checkout / ".venv").exists()


def test_no_python_at_all_is_refused(checkout, stand_in, setup):
    refused = setup()
    assert refused.returncode != 0
    assert refused.stderr.startswith("mlx-gpt needs Python 3.11, 3.12 or 3.13: ")
    assert not (checkout / ".venv").exists()


def test_a_python_for_intel_is_refused_on_a_mac(checkout, stand_in, setup):
    stand_in("python3.13", "3.13", "Darwin", "x86_64")
    stand_in("python3", "3.9", "Darwin", "arm64")
    refused = setup()
    assert refused.returncode != 0
    sentence = refused.stderr.splitlines()[0]
    assert "a native arm64 Python, but python3.13 is built for Intel" in sentence
    assert not (checkout / ".venv").exists()


def test_a_native_python_is_preferred_to_a_newer_one_for_intel(checkout, stand_in, setup):
    stand_in("python3.13", "3.13", "Darwin", "x86_64")
    stand_in("python3.12", "3.12", "Darwin", "arm64")
    assert setup().returncode == 0
    assert (checkout / ".venv/made-by").read_text() == "python3.12\n"


def test_PYTHON_decides(checkout, stand_in, setup, tmp_path):  # noqa: N802 - the variable's name
    stand_in("python3.13", "3.13")
    chosen = stand_in("python", "3.11")
    spaced = tmp_path / "a folder" / "python"
    spaced.parent.mkdir()
    chosen.rename(spaced)
    assert setup(f"PYTHON={spaced}").returncode == 0
    assert (checkout / ".venv/made-by").read_text() == "python\n"


@pytest.mark.parametrize(
    ("version", "answer", "said"), [("3.14", None, ", not 3.14 (mine):"), ("3.12", "exit 1", " (mine does not run):")]
)
def test_PYTHON_is_checked_as_well(checkout, stand_in, setup, version, answer, said):  # noqa: N802
    stand_in("python3.13", "3.13")
    stand_in("mine", version, answer=answer)
    refused = setup("PYTHON=mine")
    assert refused.returncode != 0
    assert refused.stderr.startswith(f"mlx-gpt needs Python 3.11, 3.12 or 3.13{said}")
    assert not (checkout / ".venv").exists()


def test_the_python_of_these_tests_serves(checkout, stand_in, setup):
    stand_in("mine", "3.0", answer=f'exec {sys.executable} "$@"')
    assert setup("PYTHON=mine").returncode == 0


def test_an_environment_that_was_not_finished_is_made_again(checkout, stand_in, setup):
    stand_in("python3", "3.12", venv="exit 1")  # Debian's python3 without python3-venv ends like this
    assert setup().returncode != 0
    stand_in("python3.11", "3.11")
    assert setup().returncode == 0
    assert (checkout / ".venv/made-by").read_text() == "python3.11\n"
