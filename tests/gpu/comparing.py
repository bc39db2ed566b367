"""The same work on two devices in one process, and how far the results may differ.

tests/gpu compares the GPU with the CPU. tests/cpu/test_paths.py compares the two ways in which a CPU computes, one of
which is the GPU's.
"""

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_gpt import models
from mlx_gpt.config import GenerationConfig, ModelConfig, TrainingConfig
from mlx_gpt.device import Device, device
from mlx_gpt.generation.cache import BatchCache, Rows
from mlx_gpt.generation.engine import Engine
from mlx_gpt.generation.requests import Continuation, Request, choose
from mlx_gpt.models import lora
from mlx_gpt.models.base import (
    GELU,
    ScaledDotProductAttention,
    SwiGLU,
    cast_parameters,
    set_precision,
)
from mlx_gpt.models.cross_entropy import LinearCrossEntropy
from mlx_gpt.objectives import OBJECTIVES
from mlx_gpt.optim import make_optimizer
from mlx_gpt.progress import Lines
from mlx_gpt.tokenizer import Tokenizer
from mlx_gpt.training.loop import make_step
from mlx_gpt.training.memory import measure
from mlx_gpt.training.setup import set_up

Arrays = dict[str, np.ndarray]

# Heads of 64 and windows of more than 8 tokens: GPUs have fused attention for these.
SIZES = ModelConfig(vocab_size=257, n_layer=2, n_head=2, n_embd=128, n_positions=64, dropout=0.0)
NETWORKS = {"gpt2": SIZES, "qwen3": dataclasses.replace(SIZES, model_type="qwen3", n_kv_head=1, tie_embeddings=False)}
WINDOW = 32
RATE = 1e-3
TRAINING = TrainingConfig(seq_len=WINDOW, batch_size=5, gradient_accumulation_steps=1, max_grad_norm=0.0, seed=1)
# An orthogonal update of these matrices has numbers of about a tenth, and so moves a weight about as far as AdamW.
MUON: dict[str, Any] = {"optimizer": "muon", "muon_learning_rate": 10 * TRAINING.learning_rate}
TRAININGS: dict[str, dict[str, Any]] = {
    "": {},
    "recomputing": {"grad_checkpoint": True},
    "muon": MUON,
    "qwen3 with muon": MUON | {"kind": "qwen3"},
    "adapters": {"frozen": "plain"},
    "packed": {"frozen": "packed"},
    "qwen3 packed": {"frozen": "packed", "kind": "qwen3"},
}


@dataclass(frozen=True)
class Place:
    """A device of ours and MLX's name for it."""

    device: Device
    mlx: mx.DeviceType

    @contextlib.contextmanager
    def default(self) -> Iterator[None]:
        """Have MLX compute here by default."""
        before = mx.default_device()
        mx.set_default_device(self.mlx)
        try:
            yield
        finally:
            mx.set_default_device(before)


def cpu(*, accelerated: bool) -> Place:
    """The CPU, with its own ways to compute or with those of a GPU."""
    return Place(dataclasses.replace(_device_on(mx.cpu), accelerated=accelerated), mx.cpu)


def gpu() -> Place:
    """The GPU, where there is one."""
    return Place(_device_on(mx.gpu), mx.gpu)


def _device_on(mlx: mx.DeviceType) -> Device:
    before = mx.default_device()
    mx.set_default_device(mlx)
    try:
        return device()
    finally:
        mx.set_default_device(before)


def assert_close(found: Arrays, expected: Arrays, tolerance: float) -> None:
    """Each array differs by at most a fraction `tolerance` of its Euclidean norm."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert np.isfinite(found[name]).all(), name
        error = np.linalg.norm(found[name] - array) / np.linalg.norm(array)
        assert error <= tolerance, f"{name}: {error:.1e} of its norm"


def assert_weights_close(found: Arrays, expected: Arrays, steps: float) -> None:
    """The weights of each array differ by at most so many steps on average.

    Single weights may differ more: Adam divides a gradient by its own size, so one that is 0 but for rounding becomes a
    step of any size up to the rate. That of a key's bias always is: it adds the same to all scores of a query.
    """
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        difference = np.abs(found[name] - array)
        if name.endswith("c_attn.bias"):
            difference = np.delete(difference, slice(SIZES.n_embd, 2 * SIZES.n_embd))
        assert difference.mean() <= steps * RATE, f"{name}: {difference.mean() / RATE:.1e} steps"


def _numpy(tree: Any) -> Arrays:
    """The arrays of a tree by name, in float32."""
    return {name: np.array(array.astype(mx.float32)) for name, array in tree_flatten(tree)}


def _draw(layer: nn.Module, spread: Callable[[str], float]) -> nn.Module:
    """Give a layer the same weights on every device."""
    draw, weights = np.random.default_rng(0), []
    for name, weight in tree_flatten(layer.parameters()):
        mean = 1 if weight.ndim == 1 and name.endswith("weight") else 0
        weights.append((name, mx.array(draw.normal(mean, spread(name), weight.shape).astype(np.float32))))
    layer.update(tree_unflatten(weights))
    return layer


# ---- operations -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operation:
    """A layer and its arguments: arrays that have a gradient, and further ones.

    Attributes:
        training: whether it has gradients.
    """

    layer: Callable[[], nn.Module]
    inputs: tuple[np.ndarray, ...]
    further: tuple[Any, ...] = ()
    training: bool = True


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _heads(queries: int, tokens: int) -> tuple[np.ndarray, ...]:
    """Queries, keys and values of two sequences and heads, 64 wide as in GPT-2."""
    return _normal(2, 2, queries, 64), _normal(2, 2, tokens, 64, seed=1), _normal(2, 2, tokens, 64, seed=2)


def _operations() -> dict[str, Operation]:
    draw = np.random.default_rng(2)
    mask = draw.random((2, 1, 5, 21)) < 0.5
    mask[..., 0] = True  # every query sees something
    targets, weights = draw.integers(0, 300, 257), np.where(np.arange(257) % 3, 1.5, 0).astype(np.float32)
    attention = lambda: ScaledDotProductAttention(64)  # noqa: E731
    return {
        "linear": Operation(lambda: nn.Linear(24, 40), (_normal(3, 17, 24),)),
        "layer norm": Operation(lambda: nn.LayerNorm(24), (_normal(3, 17, 24),)),
        "root mean square norm": Operation(lambda: nn.RMSNorm(24), (_normal(3, 170, 24),)),
        "GELU": Operation(GELU, (3 * _normal(3, 17, 24),)),
        "SwiGLU": Operation(SwiGLU, (3 * _normal(3, 17, 24), _normal(3, 17, 24, seed=1))),
        "rotation": Operation(lambda: nn.RoPE(64, base=500.0), (_normal(2, 2, 17, 64),)),
        "rotation of later tokens": Operation(
            lambda: nn.RoPE(64, base=500.0), (_normal(2, 2, 5, 64),), (np.array([3, 40]),), training=False
        ),
        "causal attention": Operation(attention, _heads(17, 17), ("causal",)),
        "causal attention of shared heads": Operation(
            attention, (_normal(2, 4, 17, 64), *(_normal(2, 2, 17, 64, seed=seed) for seed in (1, 2))), ("causal",)
        ),
        "causal attention in a short window": Operation(attention, _heads(8, 8), ("causal",)),
        "attention after cached tokens": Operation(attention, _heads(5, 21), ("causal",), training=False),
        "attention with a mask": Operation(attention, _heads(5, 21), (mask,), training=False),
        "attention of one query": Operation(attention, _heads(1, 21), (), training=False),
        "embedding": Operation(lambda: nn.Embedding(30, 24), (), (draw.integers(0, 30, (8, 64)),)),
        "cross-entropy": Operation(
            LinearCrossEntropy, (_normal(257, 24), _normal(300, 24, seed=1)), (targets, weights)
        ),
        "cross-entropy in use": Operation(
            LinearCrossEntropy, (_normal(257, 24), _normal(300, 24, seed=1)), (targets, weights), training=False
        ),
    }


OPERATIONS = _operations()


def operate(place: Place, operation: Operation, dtype: mx.Dtype) -> Arrays:
    """What an operation returns when it computes in `dtype`, and its gradients, float32 as in training."""
    with place.default():
        layer = place.device.accelerate(_draw(operation.layer(), lambda name: 0.5)).train(operation.training)
        set_precision(layer, dtype)
        further = [mx.array(x) if isinstance(x, np.ndarray) else x for x in operation.further]
        arguments = {"parameters": layer.parameters(), "inputs": [mx.array(x) for x in operation.inputs]}

        def value(arguments: dict[str, Any]) -> mx.array:
            layer.update(cast_parameters(layer, arguments["parameters"], dtype))
            return layer(*(x.astype(dtype) for x in arguments["inputs"]), *further).astype(mx.float32)

        y = value(arguments)
        found = {"value": y}
        if operation.training:
            weight = mx.array(_normal(*y.shape, seed=3)) if y.ndim else mx.array(1.0)
            found["gradient"] = mx.grad(lambda arguments: (value(arguments) * weight).sum())(arguments)
        return _numpy(found)


# ---- training -------------------------------------------------------------------------------------------------------


def network(place: Place, kind: str = "gpt2", dropout: float = 0.0, frozen: str = "") -> nn.Module:
    """A network with the same weights everywhere, far from those that training starts with.

    Args:
        frozen: "plain" or "packed" for adapters beside frozen weights, which may be packed into 4 bits each.
    """
    model = models.create(dataclasses.replace(NETWORKS[kind], dropout=dropout))
    spreads = {"wpe": 0.3, "wte": 0.2, "ln_f": 0.2, "embed_tokens": 0.2, "norm": 0.2, "lm_head": 0.2}
    _draw(model, lambda name: spreads.get(name.removeprefix("model.").split(".")[0], 0.1))
    if frozen == "packed":
        with cpu(accelerated=False).default():  # so that every device has the same bits
            nn.quantize(model, 32, 4)
            mx.eval(model.parameters())
    if frozen:
        lora.adapt_blocks(model, rank=4, scale=2.0, dropout=0.0, blocks=None, seed=3)
        draw = np.random.default_rng(4)
        for adapter in lora.adapted_layers(model).values():
            adapter.lora_b = mx.array(draw.normal(0, 0.1, adapter.lora_b.shape).astype(np.float32))
    return place.device.accelerate(model)


@dataclass(frozen=True)
class Trained:
    """What steps of training leave.

    Attributes:
        losses: of each step.
        norms: of each step's gradients.
        gradients: of the first step.
        weights: the trained ones, after the last step.
    """

    losses: list[float]
    norms: list[float]
    gradients: Arrays
    weights: Arrays


def train(
    place: Place,
    precision: str,
    steps: int = 3,
    dropout: float = 0.0,
    kind: str = "gpt2",
    frozen: str = "",
    **changes: Any,
) -> Trained:
    """Make steps of one micro-batch each, some of whose tokens do not count.

    Args:
        kind: a name in `NETWORKS`.
        frozen: as for `network`.
        changes: of `TRAINING`.
    """
    training = dataclasses.replace(TRAINING, precision=precision, **changes)
    draw = np.random.default_rng(5)
    losses, norms, gradients = [], [], {}
    with place.default():
        model = network(place, kind, dropout, frozen)
        lora.set_dtypes(model, place.device.dtype(precision))
        optimizer = make_optimizer(training, model)
        objective = place.device.accelerate(OBJECTIVES["documents"]())
        step = make_step(model, optimizer, objective, training, place.device)
        for number in range(steps):
            windows = draw.integers(0, SIZES.vocab_size, (training.batch_size, WINDOW + 1)).astype(np.int32)
            weights = (draw.random((training.batch_size, WINDOW)) < 0.8).astype(np.float32)
            result = step(number, RATE, [(mx.array(windows), mx.array(weights))])
            losses.append(result.loss.item())
            norms.append(result.grad_norm.item())
            if number == 0:
                gradients = mean_gradients(optimizer.state)
        return Trained(losses, norms, gradients, _numpy(model.trainable_parameters()))


def mean_gradients(state: dict[str, Any]) -> Arrays:
    """The means of the gradients by the parameter's name: after one step, a fixed fraction of its gradients.

    They are AdamW's `m`, and Muon's `v`.
    """
    named: Arrays = {}
    for part in state["states"]:
        arrays = tree_flatten(part, destination={})
        mean = ".m" if any(name.endswith(".m") for name in arrays) else ".v"
        named |= {name.removesuffix(mean): np.array(array) for name, array in arrays.items() if name.endswith(mean)}
    return named


# ---- decoding -------------------------------------------------------------------------------------------------------

# Of the random prompts that were tried, these leave the least doubt about the likeliest token.
PROMPTS = {
    "gpt2": ([221, 48, 188, 23], [101, 155, 137, 205, 41, 41, 71]),
    "qwen3": ([186, 22, 17], [206, 252, 97, 176, 244, 167, 215, 176]),
}

# Not `top_k`: it leaves the tokens in an order that depends on the device, and draws the random numbers in that order.
PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2}
SAMPLINGS: list[dict[str, float]] = [
    {"temperature": 0.0} | PENALTIES,
    {"temperature": 0.8, "repetition_penalty": 1.0},
    {"temperature": 0.8, "top_p": 0.7, "min_p": 0.02} | PENALTIES,
]


def greedy(place: Place, kind: str = "gpt2", count: int = 12) -> list[list[int]]:
    """The likeliest tokens after two prompts that are decoded together."""
    with place.default():
        engine = Engine(network(place, kind), Tokenizer.of_bytes(), len(PROMPTS[kind]), on=place.device)
        config = GenerationConfig(max_tokens=count, temperature=0.0, repetition_penalty=1.0)
        requests = [Request(prompt, config, ends=False) for prompt in PROMPTS[kind]]
        for request in requests:
            engine.add(request)
        made: dict[Request, list[int]] = {request: [] for request in requests}
        while engine.busy:
            for request, piece in engine.step():
                made[request] += [token.id for token in piece.tokens]
        return [*made.values()]


def drawn(place: Place, count: int = 9, **settings: Any) -> list[list[int]]:
    """Tokens that are drawn for two texts from the same logits again and again."""
    tokenizer, config = Tokenizer.of_bytes(), GenerationConfig(max_tokens=count, **settings)
    logits_bv = np.random.default_rng(0).normal(0, 2, (2, tokenizer.vocab_size)).astype(np.float32)
    with place.default():
        requests = [Request([1, 2], config), Request([3], config)]
        texts = [Continuation(request, 0, 7, tokenizer, tokenizer.vocab_size) for request in requests]
        for _ in range(count):
            for text, token in zip(texts, choose(mx.array(logits_bv), texts).tolist(), strict=True):
                text.ids.append(token)
                text.picked += 1
    return [text.ids for text in texts]


def margin(made: list[list[int]], kind: str = "gpt2") -> float:
    """By how much the likeliest logit leads at the closest choice, seen by the CPU."""
    place, leads = cpu(accelerated=False), []
    with place.default():
        model = network(place, kind).eval()
        for prompt, ids in zip(PROMPTS[kind], made, strict=True):
            logits = np.array(model(mx.array([[*prompt, *ids]])))[0, len(prompt) - 1 : -1]
            second, first = np.sort(logits, axis=-1)[:, -2:].T
            leads.append((first - second).min())
    return float(min(leads))


def logits(place: Place, dtype: mx.Dtype, pieces: tuple[int, ...], kind: str = "gpt2") -> Arrays:
    """The logits of two texts that are read in pieces, with a cache, or as one piece without."""
    ids = np.random.default_rng(3).integers(0, SIZES.vocab_size, (2, sum(pieces)))
    with place.default():
        model = network(place, kind).eval()
        model.update(cast_parameters(model, model.parameters(), dtype))
        if len(pieces) == 1:
            return _numpy({"logits": model(mx.array(ids))})
        cache, parts, start = BatchCache(len(model.layers), Rows(2, capacity=32)), [], 0
        cache.rows.begin(2)
        for length in pieces:
            cache.rows.grow(length)
            parts.append(model(mx.array(ids[:, start : start + length]), cache.layers))
            start += length
        return _numpy({"logits": mx.concatenate(parts, axis=1)})


# ---- memory ---------------------------------------------------------------------------------------------------------


RUN: dict[str, Any] = {
    "tokenizer": "bytes",
    **{"n_layer": 4, "n_head": 2, "n_embd": 128, "n_positions": 64, "dropout": 0.1, "seq_len": 64},
    **{"batch_size": 12, "gradient_accumulation_steps": 2, "max_steps": 3, "eval_windows": 12},
}
RUNS = {
    "mostly activations": RUN,
    "activations computed twice": RUN | {"grad_checkpoint": True},
    "mostly the update": RUN | {"seq_len": 16, "batch_size": 2, "gradient_accumulation_steps": 1},
    "mostly Muon's update": RUN
    | {"model_type": "qwen3", "optimizer": "muon"}
    | {"seq_len": 16, "batch_size": 2, "gradient_accumulation_steps": 1},
}
"""Settings of runs, by what takes their memory."""


def peaks(place: Place, settings: dict[str, Any]) -> tuple[int, int]:
    """Bytes that a run is expected to take at its peak, and that its first steps take."""
    with (
        place.default(),
        mock.patch("mlx_gpt.training.setup.device", return_value=place.device),
        set_up(settings, Lines(None)) as run,
    ):
        line = measure(run, make_step, run.training)
        assert line is not None
        expected = line.at(run.training.micro_batch_size).peak
        optimizer, batches = make_optimizer(run.training, run.model), run.batches()
        step = make_step(run.model, optimizer, run.objective, run.training, place.device)
        mx.eval(run.model.parameters())
        gc.collect()
        mx.clear_cache()
        mx.reset_peak_memory()
        for number in range(3):
            batch = [next(batches) for _ in range(run.training.micro_steps)]
            mx.eval(step(number, RATE, batch), run.model.parameters(), optimizer.state)
        return expected, mx.get_peak_memory()
