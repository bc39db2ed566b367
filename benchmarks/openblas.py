"""Plain OpenBLAS for MLX, without mlx-gpt's own products of few rows."""

import importlib.util
import subprocess
from pathlib import Path

import click

ARGUMENTS = "order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc"
SOURCE = """
extern "C" {
#define TYPED int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a, int lda, \\
              const float *b, int ldb, float beta, float *c, int ldc
void scipy_cblas_sgemm(TYPED);
void cblas_sgemm(TYPED) { scipy_cblas_sgemm(%s); }
void scipy_openblas_set_num_threads(int count);
void openblas_set_num_threads(int count) { scipy_openblas_set_num_threads(count); }
}
"""


def as_it_is(folder: Path) -> dict[str, str]:
    """Compile a library into `folder` and return the environment variables that make mlx-gpt load it.

    Raises:
        click.ClickException: scipy-openblas32 is missing, or the compiler fails.
    """
    package = importlib.util.find_spec("scipy_openblas32")
    if not package:
        raise click.ClickException("scipy-openblas32 is not installed: `pip install scipy-openblas32`.")
    library = Path(str(package.origin)).parent / "lib"
    made = folder / "OpenBLAS as it is"
    linked = [f"-L{library}", "-l:libscipy_openblas.so", f"-Wl,-rpath,{library}"]
    command = ["g++", "-x", "c++", "-O2", "-shared", "-fPIC", "-o", str(made), "-", "-Wl,--no-as-needed", *linked]
    done = subprocess.run(command, input=SOURCE % ARGUMENTS, text=True, capture_output=True, check=False)
    if done.returncode:
        raise click.ClickException(f"g++ can't link OpenBLAS: {done.stderr.strip()}")
    return {"MLX_GPT_BLAS": str(made)}
