"""What training holds in memory at its peak, told before it starts, and what to change when that is too much.

B windows of T tokens, C = n_embd, H heads, V = vocab_size.
"""

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from mlx_gpt import ops
from mlx_gpt.backend import Device, compute_dtype
from mlx_gpt.config import ModelConfig, TrainingConfig
from mlx_gpt.model import GPT

FLOAT32 = 4
MARGIN = 1.15  # the estimate was at most a tenth off what was measured; see tests/training/peaks.py
SHORTEST = 128  # windows that a suggestion cuts no shorter


class Held(NamedTuple):
    """How many numbers stand in memory per number of each kind.

    Attributes:
        hidden: per B T C, the hidden state of a micro-batch.
        attention: per B H T T, its attention weights in one block.
        weight: per C C.
        head: per V C.
        logits: per logit that is made at once, where one chunk has all, and where there are several.
    """

    hidden: float = 0
    attention: float = 0
    weight: float = 0
    head: float = 0
    logits: tuple[float, float] = (0, 0)


# Measured on MLX's CPU back end, which allocates about ten operations ahead of the one that runs. First what each
# block keeps for the backward pass, by whether there is dropout; then what comes on top of all blocks in the moments
# that can be the worst: while the loss is taken, and twice within the backward pass of a block.
BLOCK = {False: Held(23, 1.6), True: Held(24.3, 2.7)}
MOMENTS = {
    False: (Held(head=2.1, logits=(7.6, 16.8)), Held(49, 0, 38.7, head=1), Held(37.1, 3.7, head=1)),
    True: (Held(head=3.5, logits=(6.2, 17.1)), Held(51.1, 0, 30.7, head=1), Held(26.3, 5.3, head=1)),
}
# The same with `grad_checkpoint`, where each block keeps what came into it.
RECOMPUTED_BLOCK = Held(1)
RECOMPUTED_MOMENTS = {
    False: (Held(61.2, 3.9, head=2.5, logits=(4.5, 8.7)), Held(98.8, 4.2, 24.9, head=1), Held(85.7, 8.3, head=1)),
    True: (Held(62.3, 10.7, head=1.6, logits=(4.3, 7.1)), Held(19.5, 14.3, 87, head=1), Held(88.3, 9.8, 21.3, head=1)),
}
UPDATE = Held(weight=170, head=2.2)  # new weights and means, made before the old ones go


@dataclass(frozen=True)
class Memory:
    """Bytes that training is expected to hold.

    Attributes:
        weights: parameters and AdamW's two means, all the time.
        gradients: of the parameters.
        activations: of one micro-batch with its loss, where they are largest.
        peak: where all together is largest.
    """

    weights: int
    gradients: int
    activations: int
    peak: int


@functools.cache
def parameters_of(model: ModelConfig) -> int:
    """How many parameters the model has."""
    return GPT(model).n_params()  # from the shapes: nothing of it is computed


def estimate(model: ModelConfig, training: TrainingConfig, device: Device) -> Memory:
    """What `training` holds on `device`.

    Metal and CUDA are taken to hold as many numbers as the CPU does, which is where they were counted.
    """
    n_params = parameters_of(model)
    number_size = compute_dtype(training.precision, device).size
    hidden = training.batch_size * training.seq_len * model.n_embd
    attention = training.batch_size * model.n_head * training.seq_len**2
    weight, head = model.n_embd**2, model.vocab_size * model.n_embd
    tokens = training.batch_size * training.seq_len
    rows = ops.rows_at_once(tokens, model.vocab_size, device.kind != "cpu")

    def size(held: Held) -> float:
        passing = held.hidden * hidden + held.attention * attention
        fixed = held.weight * weight + held.head * head + held.logits[rows < tokens] * rows * model.vocab_size
        return passing * number_size + fixed * FLOAT32

    drops = model.dropout > 0
    if training.grad_checkpoint:
        block, moments = RECOMPUTED_BLOCK, RECOMPUTED_MOMENTS[drops]
    else:
        block, moments = BLOCK[drops], MOMENTS[drops]
    activations = model.n_layer * size(block) + max(size(moment) for moment in moments)
    parameters = FLOAT32 * n_params
    weights = 3 * parameters + (n_params * number_size if number_size < FLOAT32 else 0)  # with a copy to compute with
    summed = parameters if training.gradient_accumulation_steps > 1 else 0
    update = parameters + min(3 * parameters, size(UPDATE))
    return Memory(
        weights=int(weights),
        gradients=parameters,
        activations=int(activations),
        peak=int(weights + max(summed + activations, update)),
    )


def fits(memory: Memory, device: Device) -> bool:
    """Whether the device allows it, the estimate's error included."""
    return memory.peak * MARGIN <= device.usable


def cheapest_fit(model: ModelConfig, training: TrainingConfig, device: Device) -> TrainingConfig | None:
    """The first of `changes` that fits the device; None when none does."""
    return next((changed for changed in changes(training) if fits(estimate(model, changed, device), device)), None)


def changes(training: TrainingConfig) -> Iterator[TrainingConfig]:
    """Ways to hold less, those first that cost least; the windows per step stay the same.

    Smaller micro-batches change only the time, and that little; recomputed activations cost a third more of it;
    shorter windows change what is learnt.
    """
    windows = training.batch_size * training.gradient_accumulation_steps
    seq_len = training.seq_len
    while True:
        for recompute in sorted({training.grad_checkpoint, True}):
            for batch_size in range(training.batch_size, 0, -1):
                if windows % batch_size == 0:
                    yield dataclasses.replace(
                        training,
                        batch_size=batch_size,
                        gradient_accumulation_steps=windows // batch_size,
                        grad_checkpoint=recompute,
                        seq_len=seq_len,
                    )
        if seq_len // 2 < SHORTEST:
            return
        seq_len //= 2


def one_batch(training: TrainingConfig) -> TrainingConfig:
    """The settings with all windows of a step in one micro-batch: what `--batch-size auto` cuts down from."""
    windows = training.batch_size * training.gradient_accumulation_steps
    return dataclasses.replace(training, batch_size=windows, gradient_accumulation_steps=1)


def flags(before: TrainingConfig, after: TrainingConfig) -> str:
    """The command-line flags that turn the one into the other."""
    words = []
    for name in ("batch_size", "gradient_accumulation_steps", "grad_checkpoint", "seq_len"):
        value = getattr(after, name)
        if value != getattr(before, name):
            words.append(f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}"))
    return " ".join(words)
