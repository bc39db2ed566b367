"""What the tests of layers share."""

import pytest

from mlx_gpt.cpu import accelerate


@pytest.fixture(params=["plain", "cpu"])
def layer(request):
    """Make a layer: as a GPU computes it, and as its CPU twin."""

    def make(layer_class, *args):
        made = layer_class(*args)
        if request.param == "cpu":
            accelerate.accelerate(made)
        return made

    return make
