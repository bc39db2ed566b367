"""The BLAS behind MLX on Linux gives the right products, in every form, however a program is started."""

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_gpt

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="macOS has a BLAS of its own")


def live(**environment: str) -> str:
    """Compute a product in a new process, and return the BLAS that served it."""
    program = """
import mlx_gpt.device; from mlx_gpt.cpu import blas; import mlx.core as mx
assert (mx.ones((3, 4)) @ mx.ones((4, 70))).tolist() == [[4.0] * 70] * 3
print(blas.live)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    assert not done.stderr
    return done.stdout.strip()


@on_linux
@pytest.mark.parametrize(
    "module",
    ["api", "models", "distributed", "evaluation", "objectives", "optim", "training.loop", "generation.engine"],
)
def test_it_is_in_place_whichever_module_comes_first(module):
    """MLX has to be imported after the BLAS was loaded, or it keeps its own, a hundred times slower one."""
    program = f"import mlx_gpt.{module}; from mlx_gpt.cpu import blas; print(blas.live)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("OpenBLAS"), done.stdout


@on_linux
def test_it_is_in_place_for_the_command_line(corpus, tmp_path):
    program = (
        "import sys; from mlx_gpt.cli import run; code = run(sys.argv[1:]); "
        "from mlx_gpt.cpu import blas; print(blas.live, code)"
    )
    arguments = [
        "train",
        "--data",
        str(corpus),
        "--preset",
        "tiny",
        "--n-layer",
        "1",
        "--n-embd",
        "16",
        "--seq-len",
        "8",
    ]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments, "--dry-run", "--out", str(tmp_path / "run")],
        env={**os.environ, "MLX_DISABLE_COMPILE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    last = done.stdout.splitlines()[-1]
    assert last.startswith("OpenBLAS"), done.stderr
    assert last.endswith(" 0"), done.stderr


@pytest.mark.parametrize("transposed_b", [False, True])
@pytest.mark.parametrize("transposed_a", [False, True])
@pytest.mark.parametrize("m", [*range(1, 18), 40])
def test_products_of_every_form_are_right(m, transposed_a, transposed_b):
    draw = np.random.default_rng(0)
    for n in (1, 15, 63, 64, 65, 200):
        for k in (1, 3, 64, 769, 5000):
            a, b, c = (draw.normal(size=size).astype(np.float32) for size in ((m, k), (k, n), (m, n)))
            x = mx.array(a.T.copy()).T if transposed_a else mx.array(a)
            y = mx.array(b.T.copy()).T if transposed_b else mx.array(b)
            exact = a.astype(np.float64) @ b.astype(np.float64)
            np.testing.assert_allclose(np.array(x @ y), exact, rtol=1e-4, atol=1e-4 * k**0.5)
            both = mx.addmm(mx.array(c), x, y, alpha=0.5, beta=2.0)
            np.testing.assert_allclose(np.array(both), exact / 2 + 2 * c, rtol=1e-4, atol=1e-4 * k**0.5)


@pytest.mark.parametrize("shape", [(1, 64), (64, 1), (4, 64), (40, 64)])
def test_the_result_does_not_depend_on_what_its_memory_held(shape):
    """A BLAS may multiply the old contents by 0, and 0 times NaN is NaN."""
    m, n = shape
    for _ in range(20):
        mx.eval([mx.full(shape, mx.nan) for _ in range(5)])  # this memory is freed at once, and used again
        assert mx.isfinite(mx.ones((m, 64)) @ mx.ones((64, n))).all()


@on_linux
def test_openblas_serves_and_another_can_be_named_or_none():
    assert live().startswith("OpenBLAS 0.")
    assert live(MLX_GPT_BLAS="off") == "MLX's own"


@on_linux
def test_processes_that_start_together_leave_one_whole_library(tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", "import mlx_gpt.device; from mlx_gpt.cpu import blas; print(blas.live)"]
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert all(process.communicate()[0].startswith("OpenBLAS") for process in running)
    assert [path.suffix for path in (tmp_path / "mlx-gpt").iterdir()] == [".so"]
    without_compiler = str(Path(sys.executable).parent)
    assert live(XDG_CACHE_HOME=str(tmp_path), PATH=without_compiler).startswith("OpenBLAS")


@on_linux
def test_nothing_is_kept_in_or_taken_from_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert live(XDG_CACHE_HOME="here", PYTHONPATH=str(Path(mlx_gpt.__file__).parent.parent)).startswith("OpenBLAS")
    assert list(tmp_path.iterdir()) == []


@on_linux
def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path):
    (tmp_path / "file").write_text("")
    assert live(XDG_CACHE_HOME=str(tmp_path / "file")).startswith("OpenBLAS")


@on_linux
def test_without_a_compiler_it_says_why_products_are_slow(tmp_path):
    assert "g++" in live(XDG_CACHE_HOME=str(tmp_path), PATH=str(Path(sys.executable).parent))
