"""Training computes attention with MLX's fused operation, in the form for which Metal and CUDA have kernels.

A step is traced, not computed, on the path that a GPU takes.
"""

import dataclasses
import re
from collections import Counter
from types import SimpleNamespace
from unittest import mock

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_gpt import models
from mlx_gpt.config import Config
from mlx_gpt.device import Device
from mlx_gpt.objectives import OBJECTIVES
from mlx_gpt.optim import make_optimizer
from mlx_gpt.presets import PRESETS
from mlx_gpt.settings import build
from mlx_gpt.training.loop import make_step
from tests.gpu import comparing

PLAIN = comparing.cpu(accelerated=False).device
WINDOWS = 2
FUSED_WIDTHS = {64, 72, 80, 96, 128, 192, 256}  # of a head


def traced(config: Config, device: Device) -> SimpleNamespace:
    """Trace one training step: its calls of two operations, and the parameters that it would leave.

    Attributes:
        attention: the calls of the fused operation.
        dropped: the shapes of the arrays that dropout is applied to.
        weights: the updated parameters, not computed.
    """
    attend, drop = mx.fast.scaled_dot_product_attention, mx.random.bernoulli
    with (
        mock.patch.object(mx.fast, "scaled_dot_product_attention", wraps=attend) as attention,
        mock.patch.object(mx.random, "bernoulli", wraps=drop) as dropped,
        mock.patch.object(mx, "async_eval"),  # or the step would be computed
    ):
        model = models.create(config.model)
        optimizer = make_optimizer(config.training, model)
        step = make_step(model, optimizer, OBJECTIVES["documents"](), config.training, device)
        seq_len = config.training.seq_len
        step(0, 1e-3, [(mx.zeros((WINDOWS, seq_len + 1), mx.int32), mx.ones((WINDOWS, seq_len)))])
    return SimpleNamespace(
        attention=attention.call_args_list,
        dropped=[call.args[1] for call in dropped.call_args_list],
        weights=model.parameters(),
    )


def preset(name: str, **training) -> Config:
    """A preset as it is, with dropout and a small vocabulary."""
    config = build(Config, PRESETS[name])
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vocab_size=300, dropout=0.1),
        training=dataclasses.replace(config.training, gradient_accumulation_steps=1, **training),
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", PRESETS)
def test_each_block_of_each_preset_attends_with_the_fused_operation(name, precision):
    """Once per block, causal without an array for a mask, in a window and with heads that kernels are there for."""
    config = preset(name, precision=precision)
    calls = traced(config, PLAIN).attention
    assert len(calls) == config.model.n_layer
    head_dim = config.model.n_embd // config.model.n_head
    shape = (WINDOWS, config.model.n_head, config.training.seq_len, head_dim)
    for call in calls:
        assert [array.shape for array in call.args] == [shape] * 3
        assert {array.dtype for array in call.args} == {mx.float32 if precision == "float32" else mx.bfloat16}
        assert call.kwargs == {"scale": head_dim**-0.5, "mask": "causal"}
    assert config.training.seq_len > 8
    assert head_dim in FUSED_WIDTHS or name == "tiny"  # which is made for a CPU


def test_the_blocks_of_a_qwen3_do_as_well():
    """Its few heads of keys and values are not repeated for the queries that share them."""
    config = preset("small")
    sizes = dataclasses.replace(config.model, model_type="qwen3", n_kv_head=2)
    calls = traced(dataclasses.replace(config, model=sizes), PLAIN).attention
    assert len(calls) == sizes.n_layer
    for call in calls:
        assert [array.shape for array in call.args] == [(WINDOWS, heads, 512, 64) for heads in (8, 2, 2)]
        assert call.kwargs == {"scale": 64**-0.5, "mask": "causal"}


def test_activations_that_are_computed_twice_attend_with_it_both_times():
    config = preset("small", grad_checkpoint=True)
    calls = traced(config, PLAIN).attention
    assert len(calls) == 2 * config.model.n_layer
    assert {call.kwargs["mask"] for call in calls} == {"causal"}


@pytest.mark.parametrize("name", PRESETS)
def test_no_attention_weight_is_dropped(name):
    """No kernel can drop them. Dropout acts once on the embeddings and twice on the residuals of each block."""
    config = preset(name)
    activations = (WINDOWS, config.training.seq_len, config.model.n_embd)
    assert traced(config, PLAIN).dropped == [activations] * (1 + 2 * config.model.n_layer)


# ---- the graph ------------------------------------------------------------------------------------------------------


def primitives(config: Config, device: Device, tmp_path) -> Counter:
    """How often each primitive stands in the graph of a training step."""
    path = tmp_path / "step.dot"
    with path.open("w") as file:
        mx.export_to_dot(file, *(weight for _, weight in tree_flatten(traced(config, device).weights)))
    return Counter(re.findall(r'label ?= ?"(\w+)', path.read_text()))


def test_the_graph_of_a_step_names_its_primitives(tmp_path, eager):
    """On a CPU attention is taken apart, so there is a softmax for each block."""
    config = preset("tiny")
    found = primitives(config, PLAIN, tmp_path)
    assert found["Softmax"] >= config.model.n_layer
    assert "ScaledDotProductAttention" not in found


@pytest.mark.gpu
@pytest.mark.skipif(not mx.is_available(mx.gpu), reason="MLX finds no GPU here")
@pytest.mark.parametrize("name", [name for name in PRESETS if name != "tiny"])
def test_attention_stays_fused_in_the_graph_of_a_step(tmp_path, eager, name):
    place = comparing.gpu()
    config = preset(name, precision="bfloat16")
    with place.default():
        found = primitives(config, place.device, tmp_path)
    assert found["ScaledDotProductAttention"] >= config.model.n_layer
