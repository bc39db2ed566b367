"""Initial weights, for every network."""

import math

import mlx_gpt.device  # noqa: F401 - before mlx, so that a tuned BLAS can take its place

# isort: split

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

DEVIATION = 0.02


def init_weights(model: nn.Module, seed: int, zero_projections: bool = False) -> nn.Module:
    """Draw fresh weights as GPT-2 does: matrices normal with deviation 0.02, biases 0, gains of norms 1.

    The projections of each block that feed the residual stream (`residual_projections`) get 0.02 / sqrt(2 layers), so
    that the stream does not grow with depth (Radford et al. 2019, section 2.3).

    Args:
        zero_projections: make these projections 0, so that each block begins as the identity (Zhang et al. 2019, Fixup,
            arXiv:1901.09321).
    """
    projection_scale = 0.0 if zero_projections else DEVIATION / math.sqrt(2 * len(model.layers))
    projections: tuple[str, ...] = getattr(model, "residual_projections", ())
    key = mx.random.key(seed)
    fresh = []
    for name, weight in tree_flatten(model.parameters()):
        if weight.ndim >= 2:
            scale = projection_scale if name.endswith(projections) else DEVIATION
            key, subkey = mx.random.split(key)
            fresh.append((name, scale * mx.random.normal(weight.shape, key=subkey)))
        else:
            is_gain = name.endswith("weight")
            fresh.append((name, mx.ones_like(weight) if is_gain else mx.zeros_like(weight)))
    model.update(tree_unflatten(fresh))
    return model
