"""The benchmark compares what trains the same, and nothing else."""

import json
import math
import platform
import shutil
import statistics
import tempfile

import click
import pytest

import contest
import harness
from tests.benchmarks.conftest import ROOT

PROGRAMS = ["mlx-gpt", "PyTorch eager", "mlx.nn"]


@pytest.fixture(scope="module")
def smoke(benchmark):
    done = benchmark("throughput.py", "--smoke", "--against", "torch-eager", "--against", "mlx-nn")
    assert done.code == 0, done.err
    return done


def test_all_see_the_same_losses(smoke):
    assert "mlx-gpt, PyTorch eager, mlx.nn agree on the losses of 10 steps" in smoke.err
    assert 0 < smoke.result["shapes"]["smoke"]["loss_difference"] < contest.TOLERANCE["float32"][0]


def test_it_prints_one_table_with_a_row_for_each(smoke):
    table = [line.split("|")[1:-1] for line in smoke.out.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in table[0]] == [
        "shape",
        "program",
        "tokens/s",
        "TFLOP/s",
        "MFU",
        "peak MB",
        "resident MB",
        "mlx-gpt over it",
    ]
    assert [row[1].strip() for row in table[2:]] == PROGRAMS
    assert len({len(row) for row in table}) == 1


def test_the_result_says_where_and_what(smoke):
    result = smoke.result
    assert result["machine"]["chip"]
    assert result["machine"]["cores"] > 0
    assert result["versions"].keys() >= {"mlx", "torch", "numpy"}
    assert result["settings"] == {"threads": harness.available_threads(), "trials": 2}
    assert result["command"].startswith("python benchmarks/throughput.py --smoke --against torch-eager")
    assert "json" not in result["command"]
    for secret in (str(ROOT), platform.node(), tempfile.gettempdir()):
        assert secret not in json.dumps(result)


def test_the_figures_follow_from_the_seconds(smoke):
    shape, rows = smoke.result["shapes"]["smoke"], smoke.result["rows"]
    assert [row["program"] for row in rows] == PROGRAMS
    tokens, ours = shape["steps"] * 4 * 16, rows[0]
    for row in rows:
        speed = statistics.median(tokens / seconds for seconds in row["seconds"])
        assert row["tokens_per_second"]["median"] == pytest.approx(speed)
        assert row["tflops"] == pytest.approx(speed * shape["flops_per_token"] / 1e12)
        assert row["mfu"] == pytest.approx(row["tflops"] / max(shape["product_tflops"].values()))
        assert row["resident_memory"] > 10**7
    for row in rows[1:]:
        ratios = [theirs / mine for mine, theirs in zip(ours["seconds"], row["seconds"], strict=True)]
        assert row["ours_over_this"]["median"] == pytest.approx(statistics.median(ratios))
    assert ours["peak_memory"] > 4 * 4 * shape["n_params"]  # weights, gradients, two means


def test_it_refuses_to_compare_with_another_network(benchmark, tmp_path):
    shutil.copytree(ROOT / "mlx_gpt", tmp_path / "mlx_gpt")
    ops = tmp_path / "mlx_gpt/ops.py"
    changed = ops.read_text().replace("1 / math.sqrt(q_bhtd.shape[3])", "1.0")
    assert changed != ops.read_text()
    ops.write_text(changed)
    done = benchmark("throughput.py", "--smoke", "--against", str(tmp_path))
    assert done.code == 1
    assert "they don't train the same network, so they are not compared." in done.err
    assert not done.result


def test_without_the_other_ours_is_measured_alone(benchmark):
    done = benchmark("throughput.py", "--smoke", "--against", "nowhere")
    assert done.code == 0
    assert "Measured without nowhere." in done.err
    assert [row["program"] for row in done.result["rows"]] == ["mlx-gpt"]


def test_what_is_missing_can_be_installed():
    with pytest.raises(click.ClickException, match=r"pip install -e '.\[bench\]'"):
        harness.need("no-such-package")


@pytest.mark.parametrize(("losses", "step"), [([5.002, 5.0], 1), ([5.0, 5.02], 2), ([5.0, math.nan], 2)])
def test_a_loss_that_differs_is_found(losses, step):
    assert contest.largest_difference({"mlx-gpt": [5.0, 5.0], "other": [5.0, 5.002]}, (1e-4, 1e-3)) < 1e-3
    with pytest.raises(click.ClickException, match=f"In step {step} the loss of other"):
        contest.largest_difference({"mlx-gpt": [5.0, 5.0], "other": losses}, (1e-4, 1e-3))


@pytest.mark.parametrize("program", ["throughput.py", "memory.py"])
def test_a_bad_size_is_a_sentence(benchmark, program):
    done = benchmark(program, "--preset", "tiny", "--seq-len", "4096")
    assert done.code == 2
    assert "`seq_len` 4096 is longer than the model's `n_positions` 256" in done.err
