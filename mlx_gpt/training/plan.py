"""What a run is about to do, before it does it."""

import math
from dataclasses import dataclass

from mlx_gpt import backend
from mlx_gpt.backend import Device
from mlx_gpt.config import Config
from mlx_gpt.data.batches import windows_per_epoch
from mlx_gpt.data.tokens import Tokens
from mlx_gpt.model import GPT
from mlx_gpt.training import memory
from mlx_gpt.training.memory import Memory, in_words

FEW_STEPS = 300
CPU_FLOPS = 1e11  # per second: what two to four good cores reach in large products


@dataclass(frozen=True)
class Plan:
    """The size of a run.

    Attributes:
        windows_per_step: training windows that make one step.
        windows_per_epoch: training windows in one pass over the text.
        total_steps: where it ends at the latest.
        memory: that it is expected to hold, each rank by itself.
        ranks_here: how many of its ranks are on this host.
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
    ranks_here: int = 1

    def epoch(self, step: int) -> int:
        """Whole passes over the text that `step` steps have made."""
        return step * self.windows_per_step // self.windows_per_epoch

    def tokens(self, step: int) -> int:
        """Tokens that `step` steps have trained on."""
        return step * self.windows_per_step * self.config.training.seq_len

    def lines(self) -> list[str]:
        """The plan as a person reads it."""
        training, model, held = self.config.training, self.config.model, self.memory
        each = " on each rank" if training.ranks > 1 else ""
        steps = f"{self.total_steps:,}, each of {self.tokens(1):,} tokens"
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
            *self._ranks(),
            f"Batch        {training.micro_batch_size} x {training.seq_len} tokens, {training.micro_steps} per step"
            f"{each}, activations {'computed twice' if training.grad_checkpoint else 'kept'}",
            f"Memory       about {in_words(held.peak)} at the peak{each}, of {in_words(self.device.usable)} usable: "
            f"weights and means {in_words(held.weights)}, gradients {in_words(held.gradients)}, "
            f"activations {in_words(held.activations)}",
        ]
        if self.device.kind == "metal":
            wired = in_words(self.device.usable)
            lines.append(f"             Up to {wired} stay wired, so that macOS pages nothing out between two steps")
        if not memory.fits(held, self.device):
            lines.append("WARNING      That is more than can safely be spared.")
        hours = self.flops_per_token * self.tokens(self.total_steps) / CPU_FLOPS / 3600
        if self.device.kind == "cpu" and hours > 1 and not training.max_minutes:
            lines.append(f"Hint         On a CPU this takes {hours:,.0f} hours or more; --preset tiny takes minutes.")
        if self.total_steps < FEW_STEPS and not training.max_steps:
            lines.append(
                f"Hint         {self.total_steps} steps teach little. For so short a text take --preset tiny, or "
                "smaller steps: --gradient-accumulation-steps 1 and a lower --batch-size."
            )
        return lines

    def _ranks(self) -> list[str]:
        training = self.config.training
        if training.ranks == 1:
            return []
        cores = f", with {backend.cores()} of its cores each" if self.device.kind == "cpu" else ""
        return [
            f"Ranks        {training.ranks}, {self.ranks_here} of them on this host{cores}; each makes "
            f"{training.windows_per_rank} of the {self.windows_per_step} windows of a step"
        ]

    @property
    def steps_per_epoch(self) -> float:
        """Steps in one pass over the text."""
        return self.windows_per_epoch / self.windows_per_step


def make_plan(config: Config, tokens: Tokens, device: Device, ranks_here: int = 1) -> Plan:
    """Work out a run's size."""
    training, model = config.training, GPT(config.model)  # nothing of it is computed
    per_step = training.windows_per_step
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
        ranks_here=ranks_here,
    )
