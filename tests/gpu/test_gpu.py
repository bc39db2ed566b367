"""A GPU computes what the CPU computes, in one process. Needs a Mac's GPU or CUDA.

Float32 may be TF32 on a GPU, which rounds the factors of a product to 11 bits, and bfloat16 rounds to 8. The bounds are
two to three times what bfloat16 differs from float32 on the CPU, and an eighth of that for float32.
"""

import mlx.core as mx
import pytest

from mlx_gpt.models import cross_entropy
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

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not mx.is_available(mx.gpu), reason="MLX finds no GPU here"),
]


@pytest.fixture
def gpu():
    """The GPU, with the default device as it was afterwards."""
    before = mx.default_device()
    yield comparing.gpu()
    assert mx.default_device() == before


@pytest.fixture
def reference():
    """The CPU with the way to compute that a GPU has, in float32."""
    return cpu(accelerated=False)


def test_the_device_is_the_gpu(gpu):
    assert gpu.device.kind in ("metal", "cuda")
    assert 0 < gpu.device.usable <= gpu.device.memory
    assert not gpu.device.accelerated


@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.float32, 2e-3), (mx.bfloat16, 0.015)], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_gives_the_same(gpu, reference, monkeypatch, name, dtype, tolerance):
    """Values and gradients; the cross-entropy 128 rows at a time."""
    monkeypatch.setattr(cross_entropy, "CHUNK", 1)
    operation = OPERATIONS[name]
    found, expected = comparing.operate(gpu, operation, dtype), comparing.operate(reference, operation, mx.float32)
    assert_close(found, expected, tolerance)


@pytest.mark.parametrize("changes", TRAININGS.values(), ids=TRAININGS)
@pytest.mark.parametrize(
    ("precision", "losses", "gradients", "steps"),
    [("float32", 1e-3, 0.006, 0.03), ("bfloat16", 5e-3, 0.05, 0.2)],
    ids=["float32", "bfloat16"],
)
def test_training_gives_the_same(gpu, reference, precision, losses, gradients, steps, changes):
    """The loss, every gradient and the weights after three steps.

    Muon moves a matrix by as much for its small singular values as for its large ones, so rounding counts for more.
    """
    found = comparing.train(gpu, precision, **changes)
    expected = comparing.train(reference, "float32", **changes | {"grad_checkpoint": False})
    assert found.losses == pytest.approx(expected.losses, rel=losses)
    assert found.norms == pytest.approx(expected.norms, rel=gradients)
    assert_close(found.gradients, expected.gradients, gradients)
    assert_weights_close(found.weights, expected.weights, 3 * steps if "optimizer" in changes else steps)


def test_training_drops_the_same_activations(gpu, reference):
    """A key gives the same random bits everywhere, so a run can be continued on another device."""
    found, expected = (comparing.train(place, "float32", dropout=0.2) for place in (gpu, reference))
    assert found.losses == pytest.approx(expected.losses, rel=1e-3)
    assert_close(found.gradients, expected.gradients, 0.006)


@pytest.mark.parametrize("kind", NETWORKS)
def test_generation_gives_the_same(gpu, reference, kind):
    """Greedy, two texts at a time; tests/cpu/test_paths.py makes sure that rounding decides none of their tokens."""
    assert comparing.greedy(gpu, kind) == comparing.greedy(reference, kind)


@pytest.mark.parametrize("settings", SAMPLINGS, ids=str)
def test_the_same_tokens_are_drawn(gpu, reference, settings):
    assert comparing.drawn(gpu, **settings) == comparing.drawn(reference, **settings)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("pieces", [(9, 1, 1, 6), (1,) * 17], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.float32, 2e-3), (mx.bfloat16, 0.03)], ids=str)
def test_the_cache_changes_no_logit(gpu, reference, dtype, tolerance, pieces, kind):
    expected = comparing.logits(reference, mx.float32, (17,), kind)
    for read in (pieces, (17,)):
        assert_close(comparing.logits(gpu, dtype, read, kind), expected, tolerance)


@pytest.mark.parametrize("name", RUNS)
def test_the_memory_that_is_expected_is_taken(gpu, corpus, tmp_path, name):
    settings = RUNS[name] | {"data": str(corpus), "out": str(tmp_path / "run")}
    expected, taken = comparing.peaks(gpu, settings)
    assert expected == pytest.approx(taken, rel=0.15)
