"""The CPU's own way to compute and the plain way, which is the GPU's, give the same; each can be used alone."""

import json
import os
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

from mlx_gpt.cpu import decoding, streams
from tests.gpu import comparing
from tests.gpu.comparing import (
    NETWORKS,
    OPERATIONS,
    RUNS,
    SAMPLINGS,
    TRAININGS,
    assert_close,
    assert_weights_close,
    cpu,
)

FAST, PLAIN = cpu(accelerated=True), cpu(accelerated=False)
ROUNDING = 5e-6  # of float32 sums in another order, as a fraction of an array's norm


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    """Halves are computed side by side, in decoding too, however many cores and however small the network."""
    monkeypatch.setattr(streams, "cores", lambda: 2)
    monkeypatch.setattr(decoding, "WORTH_IT", 1)


# ---- the same numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_gives_the_same(name):
    operation = OPERATIONS[name]
    assert_close(operate(FAST, operation), operate(PLAIN, operation), ROUNDING)


def operate(place, operation):
    return comparing.operate(place, operation, mx.float32)


@pytest.mark.parametrize("changes", TRAININGS.values(), ids=TRAININGS)
def test_training_gives_the_same(changes):
    """The loss, every gradient and the weights after three steps, with an odd number of windows."""
    fast, plain = (comparing.train(place, "float32", **changes) for place in (FAST, PLAIN))
    assert fast.losses == pytest.approx(plain.losses, rel=ROUNDING)
    assert fast.norms == pytest.approx(plain.norms, rel=1e-5)
    assert_close(fast.gradients, plain.gradients, ROUNDING)
    assert_weights_close(fast.weights, plain.weights, steps=1e-3)


def test_training_drops_what_the_key_says_and_a_slice_has_a_key_of_its_own():
    """Both paths lose some activations, but not the same: their losses differ more than rounding could make them."""
    whole = comparing.train(PLAIN, "float32", steps=1).losses
    fast, plain, again = (comparing.train(place, "float32", 1, 0.2).losses for place in (FAST, PLAIN, PLAIN))
    assert plain == again
    assert fast != pytest.approx(plain, rel=1e-4)
    assert whole != pytest.approx(plain, rel=1e-4)
    assert fast == pytest.approx(plain, rel=0.2)


def test_the_plain_path_trains_in_bfloat16():
    whole, half = (comparing.train(PLAIN, precision, steps=5) for precision in ("float32", "bfloat16"))
    assert half.losses != whole.losses
    assert half.losses == pytest.approx(whole.losses, rel=0.02)
    assert_close(half.gradients, whole.gradients, 0.05)


@pytest.mark.parametrize("kind", NETWORKS)
def test_generation_gives_the_same(kind):
    fast, plain = (comparing.greedy(place, kind) for place in (FAST, PLAIN))
    assert fast == plain
    assert all(len(set(ids)) > 3 for ids in plain)  # a network that says but one thing would show nothing
    assert comparing.margin(plain, kind) > 0.2  # so that rounding on a GPU decides no token, either


@pytest.mark.parametrize("settings", SAMPLINGS, ids=str)
def test_the_same_tokens_are_drawn(settings):
    tokens = comparing.drawn(FAST, **settings)
    assert tokens == comparing.drawn(PLAIN, **settings)
    assert all(len(set(ids)) > 3 for ids in tokens)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("pieces", [(9, 1, 1, 6), (1,) * 17], ids=str)
def test_the_cache_changes_no_logit_on_either_path(pieces, kind):
    for place in (FAST, PLAIN):
        found, whole = (comparing.logits(place, mx.float32, p, kind) for p in (pieces, (17,)))
        assert_close(found, whole, ROUNDING)


@pytest.mark.parametrize("place", [FAST, PLAIN], ids=["accelerated", "plain"])
@pytest.mark.parametrize("name", RUNS)
def test_the_memory_that_is_expected_is_taken(corpus, tmp_path, place, name):
    settings = RUNS[name] | {"data": str(corpus), "out": str(tmp_path / "run")}
    expected, taken = comparing.peaks(place, settings)
    assert expected == pytest.approx(taken, rel=0.15)


def test_differences_are_noticed():
    """The comparison itself: an array that is off, one that is not finite, and one that is missing."""
    one = {"a": np.ones(4), "b": np.ones(4)}
    assert_close(one, one, 0)
    for other in ({"a": np.ones(4)}, one | {"b": np.ones(4) + 1e-3}, one | {"b": np.full(4, np.nan)}):
        with pytest.raises(AssertionError):
            assert_close(other, one, 1e-4)
    with pytest.raises(AssertionError):
        assert_weights_close({"a": np.ones(4)}, {"a": np.ones(4) + comparing.RATE}, steps=0.5)


# ---- alone ----------------------------------------------------------------------------------------------------------

WATCH = """
import json, os, sys
loaded, started, changed, before = [], [], [], dict(os.environ)
def watch(event, arguments):
    if event == "ctypes.dlopen" and arguments[0]:
        loaded.append(str(arguments[0]))
    elif event in ("subprocess.Popen", "os.posix_spawn", "os.fork", "os.exec", "os.system"):
        started.append(event)
    elif event in ("os.putenv", "os.unsetenv"):
        changed.append(str(arguments[0]))
sys.addaudithook(watch)
import {module}
imported = sorted({{"mlx", "mlx.core", "numpy"}} & sys.modules.keys())
print(json.dumps([loaded, started, changed, imported, dict(os.environ) == before]))
"""


def importing(module, **environment):
    """Import a module in a new process: what it loads, starts, sets and imports, and whether the environment stays."""
    environment = {**os.environ, **environment}
    environment.pop("MLX_BFS_MAX_WIDTH", None)  # set in this process by the same import
    program = WATCH.format(module=module)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_importing_the_package_does_nothing():
    """No library is loaded, no process started, no variable set, and MLX waits."""
    assert importing("mlx_gpt") == [[], [], [], [], True]


def test_without_acceleration_no_blas_is_loaded_and_no_variable_set():
    loaded, started, changed, imported, unchanged = importing("mlx_gpt.device", MLX_GPT_ACCELERATION="off")
    assert (loaded, started, changed, unchanged) == ([], [], [], True)
    assert "mlx.core" in imported


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has a BLAS of its own")
def test_with_acceleration_openblas_is_loaded():
    """Or the two tests above could not fail."""
    loaded, *_, unchanged = importing("mlx_gpt.device", MLX_GPT_ACCELERATION="on")
    assert any("openblas" in path for path in loaded)
    assert not unchanged


def test_a_run_without_acceleration_trains_and_generates(corpus, tmp_path):
    """Through the command line, as a person would compare the two."""
    sizes = "--tokenizer bytes --n-layer 1 --n-head 2 --n-embd 16 --n-positions 32 --seq-len 16 --batch-size 2"
    steps = "--gradient-accumulation-steps 1 --max-steps 2 --log-every 1 --eval-windows 4"
    program = [sys.executable, "-c", "import sys; from mlx_gpt.cli import main; sys.exit(main())"]
    environment = {**os.environ, "MLX_GPT_ACCELERATION": "off", "HOME": str(tmp_path)}

    def run(*arguments):
        command = [*program, *arguments]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("train", "--data", str(corpus), "--out", "run", *sizes.split(), *steps.split())
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "train_loss" in record] == [1, 2]
    assert run("generate", "--model", "run", "--prompt", "The duck", "--max-tokens", "3")
