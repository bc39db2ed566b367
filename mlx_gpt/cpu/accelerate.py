"""Layers that are computed in another way on a CPU.

`accelerate` replaces the leaves of a network, as `nn.quantize` does. The parameters and their names stay.
"""

import functools
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_gpt.cpu import kernels

FEW_ROWS = 8  # with fewer rows, a product with packed weights takes no longer than unpacking them
FEW = 2**13  # with fewer numbers, adding them up is faster than starting a product


class Linear(nn.Linear):
    """An `nn.Linear` whose gradient has the same memory layout as its weight."""

    def __call__(self, x: mx.array) -> mx.array:
        if x.dtype != mx.float32 or not self.training:
            return super().__call__(x)
        return kernels.linear(x, self.weight, self.get("bias"))


class QuantizedLinear(nn.QuantizedLinear):
    """An `nn.QuantizedLinear` that unpacks its weight for each product with many rows."""

    def __call__(self, x: mx.array) -> mx.array:
        if x.dtype != mx.float32 or x.size < FEW_ROWS * x.shape[-1]:
            return super().__call__(x)
        y = kernels.quantized_linear(x, self.weight, self.scales, self.biases, self.group_size, self.bits)
        return y + self.bias if "bias" in self else y


class QuantizedEmbedding(nn.QuantizedEmbedding):
    """An `nn.QuantizedEmbedding` that, as a head, unpacks its weight for each product with many rows."""

    def as_linear(self, x: mx.array) -> mx.array:
        if x.dtype != mx.float32 or x.size < FEW_ROWS * x.shape[-1]:
            return super().as_linear(x)
        return kernels.quantized_linear(x, self.weight, self.scales, self.biases, self.group_size, self.bits)


class LayerNorm(nn.LayerNorm):
    """An `nn.LayerNorm` whose sums are matrix products."""

    def __call__(self, x: mx.array) -> mx.array:
        if x.dtype != mx.float32 or "bias" not in self:
            return super().__call__(x)
        return kernels.layer_norm(x, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """An `nn.RMSNorm` whose sums are matrix products, unless it has few rows, as in decoding."""

    def __call__(self, x: mx.array) -> mx.array:
        if x.dtype != mx.float32 or x.size < FEW:
            return super().__call__(x)
        return kernels.rms_norm(x, self.weight, self.eps)


class RoPE(nn.RoPE):
    """An `nn.RoPE` that exchanges the halves by a matrix product."""

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        plain = x.dtype == mx.float32 and x.shape[-1] == self.dims and self.scale == 1 and not self.traditional
        return kernels.rope(x, self.base, offset) if plain else super().__call__(x, offset)


class SwiGLU(nn.Module):
    """SwiGLU with an exponential that compiles to vector instructions."""

    def __call__(self, gate: mx.array, up: mx.array) -> mx.array:
        return super().__call__(gate, up) if gate.dtype != mx.float32 else kernels.swiglu(gate, up)


class GELU(nn.Module):
    """GELU with a tanh that compiles to vector instructions."""

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x) if x.dtype != mx.float32 else kernels.gelu(x)


class ScaledDotProductAttention(nn.Module):
    """Causal attention, one block of queries at a time, with an exponential that compiles to vector instructions."""

    scale: float

    def __call__(self, q_bhtd: mx.array, k_bhsd: mx.array, v_bhsd: mx.array, mask: Any = None) -> mx.array:
        if q_bhtd.dtype != mx.float32 or not isinstance(mask, str):
            return super().__call__(q_bhtd, k_bhsd, v_bhsd, mask)
        if (shared_by := q_bhtd.shape[1] // k_bhsd.shape[1]) > 1:
            k_bhsd, v_bhsd = mx.repeat(k_bhsd, shared_by, 1), mx.repeat(v_bhsd, shared_by, 1)
        return kernels.causal_attention(q_bhtd * self.scale, k_bhsd, v_bhsd)


class LinearCrossEntropy(nn.Module):
    """The head and the loss, in chunks that stay in the cache."""

    def __call__(self, x_nc: mx.array, weight_vc: mx.array, targets_n: mx.array, weights_n: mx.array) -> mx.array:
        if x_nc.dtype != mx.float32 or weight_vc.dtype != mx.float32:
            return super().__call__(x_nc, weight_vc, targets_n, weights_n)
        compute = kernels.linear_cross_entropy if self.training else kernels.cross_entropy_sum
        return compute(x_nc, weight_vc, targets_n, weights_n)

    def losses(self, logits_nv: mx.array, targets_n: mx.array) -> mx.array:
        return (kernels.losses if logits_nv.dtype == mx.float32 else super().losses)(logits_nv, targets_n)

    def loss_and_gradient(self, head: Any, x_nc: mx.array, targets_n: mx.array, weights_n: mx.array) -> Any:
        compute = kernels.head_loss if x_nc.dtype == mx.float32 else super().loss_and_gradient
        return compute(head, x_nc, targets_n, weights_n)


MLX_LAYERS: dict[type, type] = {
    nn.Linear: Linear,
    nn.QuantizedLinear: QuantizedLinear,
    nn.QuantizedEmbedding: QuantizedEmbedding,
    nn.LayerNorm: LayerNorm,
    nn.RMSNorm: RMSNorm,
    nn.RoPE: RoPE,
}
BY_NAME: dict[str, type] = {  # for layers that name their twin with `cpu_twin`
    "gelu": GELU,
    "swiglu": SwiGLU,
    "attention": ScaledDotProductAttention,
    "linear_cross_entropy": LinearCrossEntropy,
}


def accelerate(module: nn.Module) -> None:
    """Give each layer of `module` that has a twin the twin's class. Only float32 is computed differently."""
    for layer in module.modules():
        original: Any = type(layer)
        if twin := MLX_LAYERS.get(original):
            layer.__class__ = twin
        elif twin := BY_NAME.get(getattr(original, "cpu_twin", "")):
            layer.__class__ = both(twin, original)


@functools.cache
def both(twin: Any, original: Any) -> Any:
    """Return a class that computes as the twin does, and falls back on the original."""
    return original if issubclass(original, twin) else type(original.__name__, (twin, original), {})
