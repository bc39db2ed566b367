"""The plan of a run, made before the run starts."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from mlx_gpt.config import Config
from mlx_gpt.device import GIB, Device

HEADROOM = 0.9  # of the usable memory: what is measured can be a few percent too low
FEW_STEPS = 300  # by default a run from weights makes at least these; any other run with fewer gets a hint
LONG_HOURS = 24


@dataclass(frozen=True)
class Plan:
    """The size of a run.

    Attributes:
        sizes: of the model, in words.
        windows_per_step: training windows that make one step.
        windows_per_epoch: training windows in one pass over the text.
        total_steps: the step at which the run ends at the latest.
        limits: the step at which each flag would end the run.
        scheduled_steps: length of the learning rate's schedule: all steps, or the number expected in the minutes given.
        first_step: the step at which the run begins.
        peak: expected peak of memory of each rank, in bytes; None if it was not even safe to try.
        step_seconds: expected seconds per step.
        ranks_here: number of the run's ranks on this host.
        facts: lines about the windows.
        extra: names of the parameters that are trained whole, in addition to adapters.
    """

    config: Config
    device: Device
    n_params: int
    n_trained: int
    sizes: str
    train_tokens: int
    val_tokens: int
    windows_per_step: int
    windows_per_epoch: int
    total_steps: int
    scheduled_steps: int
    first_step: int
    peak: int | None
    step_seconds: float | None
    limits: Mapping[str, int] = field(default_factory=dict)
    ranks_here: int = 1
    facts: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()

    def reached(self, step: int) -> list[str]:
        """Return the flags that end the run at this step or before."""
        return [flag for flag, end in self.limits.items() if end <= step]

    def epoch(self, step: int) -> int:
        """Return how many whole passes over the text `step` steps have made."""
        return step * self.windows_per_step // self.windows_per_epoch

    def tokens(self, step: int) -> int:
        """Return how many tokens `step` steps have trained on."""
        return step * self.windows_per_step * self.config.training.seq_len

    def lines(self) -> list[str]:
        """Return the plan as lines for a person."""
        training = self.config.training
        each = " on each rank" if training.ranks > 1 else ""
        by_time = self.scheduled_steps < self.total_steps
        steps = f"{'about ' if by_time else ''}{self.scheduled_steps:,}, each of {self.tokens(1):,} tokens"
        steps += f" ({self.epochs:.1f} epochs)"
        if training.max_minutes:
            steps += f"{', in' if by_time else ', or'} {training.max_minutes:g} minutes"
        lines = [
            f"Run          {self.config.out}",
            f"Device       {self.device}",
            f"Model        {self.n_params:,} parameters: {self.sizes}",
            *self._trained(),
            f"Vocabulary   {self.config.model.vocab_size:,} tokens",
            f"Text         {self.train_tokens:,} tokens to train on, {self.val_tokens:,} to validate",
            *(f"             {fact}" for fact in self.facts),
            f"             {self.train_tokens / self.n_params:.3g} tokens per parameter, "
            f"{self.tokens(self.scheduled_steps) / self.n_params:.3g} with all epochs",
            f"Steps        {steps}",
            *self._ranks(),
            f"Batch        {training.micro_batch_size} x {training.seq_len} tokens, {training.micro_steps} per step"
            f"{each}, activations {'computed twice' if training.grad_checkpoint else 'kept'}",
            f"Memory       {self._memory(each)}",
        ]
        if self.peak is None or self.peak > HEADROOM * self.device.usable:
            lines.append("WARNING      That is more than can safely be spared.")
        if self.config.model.dropout:
            lines.append(f"Dropout      {self.config.model.dropout:g}")
        if self.step_seconds:
            lines.append(f"Time         {self._time()}")
        if self.scheduled_steps < FEW_STEPS and not training.max_steps:
            smaller = "" if self.config.init_from else "--preset tiny, or "
            lines.append(
                f"Hint         {self.scheduled_steps} steps teach little. For such a short text use {smaller}smaller "
                "steps: --gradient-accumulation-steps 1 and a lower --batch-size."
            )
        return lines

    def _trained(self) -> list[str]:
        if self.n_trained == self.n_params:
            return []
        share = f"{100 * self.n_trained / self.n_params:.2g} % of all parameters"
        words = f"{self.n_trained:,} parameters ({share}), adapters of rank {self.config.lora.lora_rank}"
        if not self.extra:
            return [f"Trained      {words}"]
        return [
            f"Trained      {words} and all of {', '.join(self.extra)}",
            "             best and final have no folder adapters, because mlx-lm's files can't hold whole parameters",
        ]

    def _memory(self, each: str) -> str:
        usable = f"of {in_words(self.device.usable)} usable"
        if self.peak is None:
            return f"more than it is safe to try, {usable}"
        return f"about {in_words(self.peak)} at the peak{each}, {usable}"

    def _time(self) -> str:
        assert self.step_seconds is not None
        seconds = self.step_seconds * (self.scheduled_steps - self.first_step)
        words = f"about {duration(seconds)} ({self.tokens(1) / self.step_seconds:,.0f} tokens/s measured)"
        if seconds > LONG_HOURS * 3600:
            smaller = "smaller weights" if self.config.init_from else "a smaller --preset"
            words += f"; use {smaller}, or --max-minutes, to make it shorter"
        return words

    def _ranks(self) -> list[str]:
        training = self.config.training
        if training.ranks == 1:
            return []
        return [
            f"Ranks        {training.ranks}, {self.ranks_here} of them on this host; each computes "
            f"{training.windows_per_rank} of the {self.windows_per_step} windows of a step"
        ]

    @property
    def steps_per_epoch(self) -> float:
        """Steps in one pass over the text."""
        return self.windows_per_epoch / self.windows_per_step

    @property
    def epochs(self) -> float:
        """Passes over the text in the scheduled steps."""
        return self.scheduled_steps / self.steps_per_epoch


def in_words(count: float) -> str:
    """Return a number of bytes in words, such as "1.5 GiB"."""
    return f"{count / GIB:,.1f} GiB" if count >= GIB else f"{max(1, count / 2**20):,.0f} MiB"


def duration(seconds: float) -> str:
    """Return a time in words, such as "2 h 10 min"."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{round(hours / 24)} days"
