"""Contenders are compared only if they train the same network."""

import contextlib
import json
import math
import platform
import statistics
import tempfile
from typing import ClassVar

import click
import pytest

import contest
import harness
import shapes
import throughput
from mlx_gpt.settings import resolve
from tests.benchmarks.conftest import ROOT

PROGRAMS = ["mlx-gpt", "PyTorch eager", "mlx.nn"]


@pytest.fixture(scope="module")
def smoke(benchmark):
    done = benchmark("throughput.py", "--smoke", "--against", "torch-eager", "--against", "mlx-nn")
    assert done.code == 0, done.err
    return done


def test_all_have_the_same_losses(smoke):
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


def test_the_result_names_the_machine_and_the_settings(smoke):
    result = smoke.result
    assert result["machine"]["chip"]
    assert result["machine"]["cores"] > 0
    assert result["versions"].keys() >= {"mlx", "torch", "numpy"}
    assert result["tf32"] is False
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


def test_it_refuses_to_compare_with_another_network(benchmark, checkout):
    other = checkout("head_dim**-0.5", "1.0", "mlx_gpt/models/base.py")
    done = benchmark("throughput.py", "--smoke", "--against", str(other))
    assert done.code == 1
    assert "they don't train the same network, so they are not compared." in done.err
    assert not done.result


def test_a_checkout_is_measured_by_its_own_program(benchmark, checkout):
    other = checkout("make_step", "prepare_step", "mlx_gpt/training/loop.py", "benchmarks/train_ours.py")
    done = benchmark("throughput.py", "--smoke", "--against", str(other))
    assert done.code == 0, done.err
    assert [row["program"] for row in done.result["rows"]] == ["mlx-gpt", "mlx-gpt other"]
    assert done.result["shapes"]["smoke"]["loss_difference"] == 0


def test_a_checkout_is_sent_only_what_a_step_depends_on():
    settings = shapes.settings_of("smoke", learning_rate=0.5)
    sent = shapes.of_a_step(settings)
    assert (sent["learning_rate"], sent["n_embd"]) == (0.5, 32)
    assert not sent.keys() & {"out", "report_to", "log_every", "save_every"}
    assert resolve(sent).model == resolve(settings).model


@pytest.mark.parametrize(("least", "peak", "requests"), [(6, 0, 0), (1, 6, 1)])
def test_a_shape_that_does_not_fit_twice_is_left_out(monkeypatch, capsys, least, peak, requests):
    answers = {
        "memory": {"least": least * 2**30, "usable": 10 * 2**30},
        "run": {"losses": [5.0], "seconds": 1.0, "peak_memory": peak * 2**30},
    }
    asked = []

    def ask(worker, what, **arguments):
        asked.append(what)
        return answers.get(what)

    monkeypatch.setattr(contest, "Worker", FakeWorker)
    monkeypatch.setattr(FakeWorker, "ask", ask)
    assert throughput.measure("smoke", shapes.settings_of("smoke"), (), OPTIONS) is None
    assert capsys.readouterr().err == (
        "smoke is left out: two programs of at least 6.0 GiB each don't fit into memory.\n"
    )
    assert asked.count("run") == requests


def test_without_another_contender_ours_is_measured_alone(benchmark):
    done = benchmark("throughput.py", "--smoke", "--against", "nowhere")
    assert done.code == 0
    assert "Measured without nowhere." in done.err
    assert [row["program"] for row in done.result["rows"]] == ["mlx-gpt"]


OPTIONS = contest.Options(device="gpu", precision="auto", steps=None, trials=1, threads=1, smoke=True)


class FakeWorker:
    """Answers as a worker on a GPU would, without a process."""

    compiled: ClassVar[list[float]] = []
    ended: ClassVar[list[str]] = []
    facts: ClassVar = {"kind": "metal", "dtype": "bfloat16"}

    def __init__(self, name, program, threads, settings, checkout=None):
        self.name = name

    def ask(self, what, **arguments):
        if what == "run":
            losses = self.compiled if "compiled" in self.name else [5.0, 4.0]
            if not losses:
                raise click.ClickException(f"{self.name}: it does not compile")
            return {"losses": losses, "seconds": 1.0, "peak_memory": 1}
        return {"least": 1, "usable": 2} if what == "memory" else None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.ended.append(self.name)


@pytest.fixture
def admitted(monkeypatch, tmp_path):
    """Names of the contenders on a GPU, and of workers that have ended; depends on compiled PyTorch's losses."""

    def admit(compiled, against=()):
        monkeypatch.setattr(contest, "Worker", FakeWorker)
        monkeypatch.setattr(FakeWorker, "compiled", compiled)
        monkeypatch.setattr(FakeWorker, "ended", [])
        with contextlib.ExitStack() as stack:
            several = contest.Contest(shapes.settings_of("smoke"), OPTIONS, tmp_path, stack)
            several.memory()
            several.admit(against)
            assert several.check() == 0
            return [worker.name for worker in several.workers], FakeWorker.ended.copy()

    return admit


def test_compiled_pytorch_is_the_reference_on_a_gpu(admitted, capsys):
    assert admitted([5.0, 4.0]) == (["mlx-gpt", "PyTorch compiled, autocast"], [])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("against", [(), ("torch-compile",), ("torch-compile", "torch-eager")])
@pytest.mark.parametrize(("compiled", "reason"), [([5.0, 3.0], "In step 2 the loss"), ([], "it does not compile")])
def test_pytorch_eager_takes_the_place_of_a_compiled_one_that_fails(admitted, capsys, compiled, reason, against):
    names, ended = admitted(compiled, against)
    assert names == ["mlx-gpt", "PyTorch eager, autocast"]
    assert ended == ["PyTorch compiled, autocast"]
    said = capsys.readouterr().err
    assert said.startswith("Measured without torch-compile. ")
    assert reason in said
    assert ("PyTorch eager takes its place." in said) == ("torch-eager" not in against)


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
