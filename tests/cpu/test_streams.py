"""Work on two streams side by side adds up to the work on one."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_gpt.cpu import streams


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    monkeypatch.setattr(streams, "cores", lambda: 2)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_slices_add_up_to_the_whole(length):
    """Also with a single window, and with an odd number."""
    x, weights = mx.random.normal((length, 3), key=mx.random.key(0)), mx.arange(length)
    parameters = {"a": mx.array([1.0, 2.0, 3.0])}

    def sums(parameters, key, x, weights):
        return {"sum": (x * parameters["a"] * weights[:, None]).sum(), "count": weights.sum()}

    whole, parts = (
        sums(parameters, None, x, weights),
        streams.add(streams.in_slices(sums)(parameters, None, x, weights)),
    )
    np.testing.assert_allclose(parts["sum"], whole["sum"], rtol=1e-6)
    assert parts["count"].item() == whole["count"].item()


def test_each_slice_has_a_key_of_its_own():
    """With one key for all, dropout would silence the same activations in each slice."""
    drawn = []

    def draw(parameters, key, x):
        drawn.append(mx.random.normal((4,), key=key).tolist())
        return x.sum()

    streams.in_slices(draw)({}, mx.random.key(3), mx.ones((4, 2)))
    assert len(drawn) == 2
    assert drawn[0] != drawn[1]


def test_the_norm_is_that_of_all_arrays_together():
    tree = {"a": mx.random.normal((7, 5), key=mx.random.key(0)), "b": [mx.array([3.0]), {"c": mx.ones((4,))}]}
    flat = np.concatenate([np.array(array).ravel() for _, array in tree_flatten(tree)])
    assert streams.global_norm(tree).item() == pytest.approx(np.linalg.norm(flat.astype(np.float64)), rel=1e-6)


def test_no_more_cores_are_used_than_the_environment_allows(monkeypatch):
    monkeypatch.undo()
    for name in ("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    there = streams.cores()
    monkeypatch.setenv("OMP_NUM_THREADS", str(there + 1))
    assert streams.cores() == there
    monkeypatch.setenv("MKL_NUM_THREADS", "1")
    assert streams.cores() == 1
    assert streams.stream_count() == 1
