"""What training holds in memory at its peak, told before it starts, and what to change when that is too much.

B windows of T tokens, C = n_embd, H heads, V = vocab_size.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from mlx_gpt import ops
from mlx_gpt.backend import GIB, Device, compute_dtype, share_count
from mlx_gpt.config import Config, ModelConfig, TrainingConfig
from mlx_gpt.model import GPT
from mlx_gpt.presets import PRESETS
from mlx_gpt.settings import build

FLOAT32 = 4
# Above how far off the estimate was of what was measured (tests/training/peaks.py).
MARGIN = 1.15
SHORTEST = 128  # windows that a suggestion cuts no shorter


class Held(NamedTuple):
    """How many numbers stand in memory per number of each kind.

    Attributes:
        hidden: per B T C, the hidden state of a micro-batch.
        attention: per attention weight of a micro-batch in one block: of all for what it keeps, else of as many as are
            made at a time.
        weight: per C C.
        head: per V C.
        logits: per logit of a chunk.
        logits_before: per logit of the chunk before it, on average over the chunks: the first has none.
    """

    hidden: float = 0
    attention: float = 0
    weight: float = 0
    head: float = 0
    logits: float = 0
    logits_before: float = 0


class Phases(NamedTuple):
    """What is held where it can be the most.

    Attributes:
        block: kept by each block for the backward pass.
        moments: on top of all blocks, while the loss is taken and twice within the backward pass of a block.
        update: new weights and means, made before the old ones and the last of the backward pass have gone.
    """

    block: Held
    moments: tuple[Held, Held, Held]
    update: Held


# By `grad_checkpoint` and whether there is dropout. Measured on MLX's CPU back end with two shares of a batch, where it
# allocates some ten operations ahead of those that run.
ON_CPU = {
    (False, False): Phases(
        Held(27.2, 1.04),
        (Held(0, 0.2, 0, 4.6, 10.9, 10.6), Held(12.1, 1.4, 1.2, 2.1, 0.5, 10), Held(13.7, 0.6, 17.8, 5.8, 0, 16.4)),
        Held(0.9, 0, 174.3, 1.4),
    ),
    (False, True): Phases(
        Held(24.19, 2.34),
        (Held(0, 0, 0, 4, 12.1, 10.7), Held(0.1, 3.1, 1.9, 0.3, 3.3, 2.8), Held(28.4, 0, 16.4, 5.6, 0, 16.9)),
        Held(0.5, 0, 181.8, 1.1),
    ),
    (True, False): Phases(
        Held(1.54),
        (Held(33.6, 3.96, 88.3, 0, 0.31), Held(56.2, 2.49, 0, 0, 0, 0.39), Held(0, 0, 85.1, 0.63, 3.58, 10.9)),
        Held(0.42, 0, 163.5, 1.78),
    ),
    (True, True): Phases(
        Held(1.04, 1.13),
        (Held(28, 0.11, 121.9), Held(56.9, 4.76), Held(0, 0, 96.9, 0.77, 3.26, 11.3)),
        Held(1.27, 0, 139.6, 2.32),
    ),
}
# For GPUs, where MLX derives most gradients itself and keeps more for them: measured on the CPU when it did so there.
UPDATE_KEPT, UPDATE_RECOMPUTED = Held(0.7, 0, 163, 3), Held(14, 0, 165, 0.7)
ON_GPU = {
    (False, False): Phases(
        Held(25.7, 1.2),
        (Held(10.9, 0, 0, 4.3, 11, 8.8), Held(29.8, 1.5, 0, 5.9), Held(4.5, 3.8, 0, 5.9)),
        UPDATE_KEPT,
    ),
    (False, True): Phases(
        Held(27.2, 2.1),
        (Held(19.2, 0, 0, 4.8, 8.3, 10.4), Held(3.2, 5.1, 10.3, 5.7), Held(22.3, 0.1, 10.7, 5.7)),
        UPDATE_KEPT,
    ),
    (True, False): Phases(
        Held(3),
        (Held(44.8, 0, 0, 1.4, 7.6, 7.9), Held(49.8, 6.7, 0, 2.8), Held(85.9, 0.2, 31.2, 2.8)),
        UPDATE_RECOMPUTED,
    ),
    (True, True): Phases(
        Held(3.5, 0.2),
        (Held(39.3, 3.9, 0, 3.3, 9.1, 4.8), Held(60.6, 5.9, 80.1), Held(39.1, 9)),
        UPDATE_RECOMPUTED,
    ),
}


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
    """What a rank of `training` holds on `device`.

    What Metal and CUDA hold has been counted on the CPU as well.
    """
    n_params = parameters_of(model)
    number_size = compute_dtype(training.precision, device).size
    on_gpu = device.kind != "cpu"
    tokens = training.micro_batch_size * training.seq_len
    hidden = tokens * model.n_embd
    heads, at_a_time = training.micro_batch_size * model.n_head, ops.attention_weights(training.seq_len, on_gpu)
    weight, head = model.n_embd**2, model.vocab_size * model.n_embd
    shares = share_count(training.micro_batch_size, on_gpu, saving=training.grad_checkpoint)
    rows = ops.rows_at_once(tokens // shares, model.vocab_size, on_gpu)
    logits, chunks = rows * model.vocab_size, math.ceil(tokens // shares / rows)

    def size(held: Held, attention: int) -> float:
        passing = held.hidden * hidden + held.attention * heads * attention
        fixed = held.weight * weight + held.head * head
        fixed += (held.logits + held.logits_before * (1 - 1 / chunks)) * logits
        return passing * number_size + fixed * FLOAT32

    phases = (ON_GPU if on_gpu else ON_CPU)[training.grad_checkpoint, model.dropout > 0]
    activations = model.n_layer * size(phases.block, sum(at_a_time))
    activations += max(size(moment, max(at_a_time)) for moment in phases.moments)
    parameters = FLOAT32 * n_params
    weights = 3 * parameters + (n_params * number_size if number_size < FLOAT32 else 0)  # with a copy to compute with
    summed = shares * parameters if training.micro_steps > 1 else 0
    exchanged = 2 * parameters if training.ranks > 1 else 0  # gradients, joined to be sent, and their means
    update = exchanged + parameters + min(3 * parameters, size(phases.update, 0))
    return Memory(
        weights=int(weights),
        gradients=parameters,
        activations=int(activations),
        peak=int(weights + max(summed + activations, update)),
    )


def fits(memory: Memory, device: Device) -> bool:
    """Whether the device allows it, the estimate's error included."""
    return memory.peak * MARGIN <= device.usable


def fit(model: ModelConfig, training: TrainingConfig, device: Device) -> tuple[TrainingConfig, str]:
    """The settings to train with on `device`, and what is wrong with them: empty if they fit.

    They are those given; if the batch was left to us, it is chosen, and whether activations are computed twice.
    """
    asked = training
    if training.auto_batch_size:
        asked = dataclasses.replace(
            training,
            batch_size=training.windows_per_rank,
            gradient_accumulation_steps=training.ranks,
            auto_batch_size=False,
        )
    fitting = _first_that_fits(model, asked, device)
    if fitting == asked or (fitting and training.auto_batch_size and fitting.seq_len == asked.seq_len):
        return fitting, ""
    held = estimate(model, asked, device)
    problem = (
        f"Training would hold about {in_words(held.peak)} at its peak, and {device} can safely spare "
        f"{in_words(device.usable / MARGIN)}."
    )
    if fitting:
        held = estimate(model, fitting, device)
        return asked, f"{problem} This fits: {flags(training, fitting)} (about {in_words(held.peak)})."
    smaller = _largest_preset(device, below=parameters_of(model))
    way_out = f"{smaller} would" if smaller else "free some memory, or take another machine"
    return asked, f"{problem} No batch of this model fits: {way_out}."


def _first_that_fits(model: ModelConfig, training: TrainingConfig, device: Device) -> TrainingConfig | None:
    """The first of `changes` that fits, which is the cheapest."""
    return next((changed for changed in changes(training) if fits(estimate(model, changed, device), device)), None)


def changes(training: TrainingConfig) -> Iterator[TrainingConfig]:
    """Ways to hold less, those first that cost least; the windows per step stay the same.

    Smaller micro-batches change only the time; activations that are computed twice cost a third more of it; shorter
    windows change what is learnt.
    """
    windows, seq_len = training.windows_per_step, training.seq_len
    while True:
        for recompute in [True] if training.grad_checkpoint else [False, True]:
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


def flags(before: TrainingConfig, after: TrainingConfig) -> str:
    """The command-line flags that turn the one into the other."""
    words = []
    for name in ("batch_size", "gradient_accumulation_steps", "grad_checkpoint", "seq_len"):
        value = getattr(after, name)
        if value != getattr(before, name):
            words.append(f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}"))
    return " ".join(words)


def _largest_preset(device: Device, below: int) -> str:
    """The flags of the largest preset that fits, of those with fewer parameters than `below`; empty if none does."""
    for name, values in reversed(PRESETS.items()):
        preset = build(Config, values)
        fitting = _first_that_fits(preset.model, preset.training, device)
        if fitting and parameters_of(preset.model) < below:
            return f"--preset {name} {flags(preset.training, fitting)}".rstrip()
    return ""


def in_words(count: float) -> str:
    """Bytes in words."""
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:.0f} MiB"
