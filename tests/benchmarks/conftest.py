"""Runs the benchmarks from the command line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def benchmark(tmp_path_factory):
    """Run a program in benchmarks/ from the root: its exit code, its output, and its result."""

    def run(program, *arguments):
        file = tmp_path_factory.mktemp("results") / "result.json"
        command = [sys.executable, f"benchmarks/{program}", *arguments, "--json", str(file)]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )
        result = json.loads(file.read_text()) if file.exists() else None
        return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr, result=result)

    return run


@pytest.fixture
def checkout(tmp_path):
    """A checkout of mlx-gpt in which `text` is replaced by `other` in some files."""

    def make(text, other, *files):
        for folder in ("mlx_gpt", "benchmarks"):
            shutil.copytree(ROOT / folder, tmp_path / "other" / folder)
        for file in files:
            path = tmp_path / "other" / file
            changed = path.read_text().replace(text, other)
            assert changed != path.read_text()
            path.write_text(changed)
        return tmp_path / "other"

    return make
