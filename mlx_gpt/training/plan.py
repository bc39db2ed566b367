"""What a run is about to do, before it does it."""

import dataclasses
import math
from dataclasses import dataclass

from mlx_gpt.backend import GIB, Device
from mlx_gpt.config import PRESETS, Config, ModelConfig, TrainingConfig, build
from mlx_gpt.data.batches import windows_per_epoch
from mlx_gpt.data.tokens import Tokens
from mlx_gpt.errors import UserError
from mlx_gpt.model import GPT
from mlx_gpt.training import memory
from mlx_gpt.training.memory import Memory

FEW_STEPS = 300
CPU_FLOPS = 1e11  # per second: what two to four good cores reach in large products


@dataclass(frozen=True)
class Plan:
    """The size of a run.

    Attributes:
        windows_per_step: training windows that make one step.
        windows_per_epoch: training windows in one pass over the text.
        total_steps: where it ends at the latest.
        memory: that it is expected to hold.
    """

    config: Config
    device: Device
    n_params: int
    flops_per_token: int
    train_tokens: int
    val_tokens: int
    windows_per_step: int
    windows_per_epoch: int
    total_steps: int
    memory: Memory

    def epoch(self, step: int) -> int:
        """Whole passes over the text that `step` steps have made."""
        return step * self.windows_per_step // self.windows_per_epoch

    def tokens(self, step: int) -> int:
        """Tokens that `step` steps have trained on."""
        return step * self.windows_per_step * self.config.training.seq_len

    def lines(self) -> list[str]:
        """The plan as a person reads it."""
        training, model, memory = self.config.training, self.config.model, self.memory
        steps = f"{self.total_steps:,} of {self.tokens(1):,} tokens"
        steps += f" ({self.total_steps / self.steps_per_epoch:.1f} epochs)"
        if training.max_minutes:
            steps += f", or {training.max_minutes:g} minutes"
        lines = [
            f"Run          {self.config.out}",
            f"Device       {self.device}",
            f"Model        {self.n_params:,} parameters: {model.n_layer} layers, {model.n_head} heads, "
            f"{model.n_embd} wide",
            f"Vocabulary   {model.vocab_size:,} tokens",
            f"Text         {self.train_tokens:,} tokens to train on, {self.val_tokens:,} to validate",
            f"             {self.train_tokens / self.n_params:.3g} tokens per parameter, "
            f"{self.tokens(self.total_steps) / self.n_params:.3g} with all epochs",
            f"Steps        {steps}",
            f"Batch        {training.batch_size} x {training.seq_len} tokens, "
            f"{training.gradient_accumulation_steps} per step, "
            f"activations {'computed twice' if training.grad_checkpoint else 'kept'}",
            f"Memory       about {size(memory.peak)} at the peak, of {size(self.device.usable)} usable: "
            f"weights and means {size(memory.weights)}, gradients {size(memory.gradients)}, "
            f"activations {size(memory.activations)}",
        ]
        if self.device.kind == "metal":
            wired = size(self.device.usable)
            lines.append(f"             Up to {wired} stay wired, so that macOS pages nothing out between two steps")
        hours = self.flops_per_token * self.tokens(self.total_steps) / CPU_FLOPS / 3600
        if self.device.kind == "cpu" and hours > 1 and not training.max_minutes:
            lines.append(f"Hint         On a CPU this takes {hours:,.0f} hours or more; --preset tiny takes minutes.")
        if self.total_steps < FEW_STEPS and not training.max_steps:
            lines.append(
                f"Hint         {self.total_steps} steps teach little. For so short a text take --preset tiny, or "
                "smaller steps: --gradient-accumulation-steps 1 and a lower --batch-size."
            )
        return lines

    @property
    def steps_per_epoch(self) -> float:
        """Steps in one pass over the text."""
        return self.windows_per_epoch / self.windows_per_step


def make_plan(config: Config, tokens: Tokens, device: Device) -> Plan:
    """Work out a run's size."""
    training, model = config.training, GPT(config.model)  # nothing of it is computed
    per_step = training.batch_size * training.gradient_accumulation_steps
    per_epoch = windows_per_epoch(tokens.train, training.seq_len)
    total_steps = math.ceil(training.max_epochs * per_epoch / per_step)
    return Plan(
        config=config,
        device=device,
        n_params=model.n_params(),
        flops_per_token=model.flops_per_token(training.seq_len),
        train_tokens=len(tokens.train),
        val_tokens=len(tokens.val),
        windows_per_step=per_step,
        windows_per_epoch=per_epoch,
        total_steps=min(total_steps, training.max_steps or total_steps),
        memory=memory.estimate(config.model, training, device),
    )


def fit_memory(model: ModelConfig, training: TrainingConfig, device: Device) -> TrainingConfig:
    """The settings as they are if they fit the device's memory, or with the batch chosen if that was left to us.

    Raises:
        UserError: they don't fit; names the flags that would, those that cost least.
    """
    if training.auto_batch_size:
        asked = dataclasses.replace(memory.one_batch(training), auto_batch_size=False)
    else:
        asked = training
    fitting = memory.cheapest_fit(model, asked, device)
    if fitting == asked or (fitting and training.auto_batch_size):
        return fitting
    needed = memory.estimate(model, asked, device).peak
    problem = (
        f"Training would hold about {size(needed)} at its peak, and {device} can spare {size(device.usable)}, of which "
        f"{1 - 1 / memory.MARGIN:.0%} are kept in reserve."
    )
    if fitting:
        costs = "" if fitting.seq_len == asked.seq_len else "; shorter windows teach shorter context"
        peak = memory.estimate(model, fitting, device).peak
        raise UserError(f"{problem} This fits: {memory.flags(training, fitting)} (about {size(peak)}{costs}).")
    smaller = _largest_preset(device, below=memory.parameters_of(model))
    way_out = f"--preset {smaller} would" if smaller else "free some memory, or take another machine"
    raise UserError(f"{problem} No batch of this model fits: {way_out}.")


def _largest_preset(device: Device, below: int) -> str | None:
    """The largest preset that fits, of those with fewer parameters than `below`."""
    for name, values in reversed(PRESETS.items()):
        preset = build(Config, values)
        if memory.parameters_of(preset.model) < below and memory.cheapest_fit(preset.model, preset.training, device):
            return name
    return None


def size(count: int) -> str:
    """Bytes in words."""
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:.0f} MiB"
