"""Every setting once: a dataclass field holds its default, its check, its unit and the sentence that `--help` shows.

Flags, TOML keys and Python keyword arguments are made from these fields (settings.py), so no second list can drift away
from them.
"""

from dataclasses import dataclass, field
from typing import Any


def setting(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
    aliases: tuple[str, ...] = (),
    auto: str = "",
) -> Any:
    """A dataclass field that is also a flag and a TOML key. The bounds are what a value is checked against.

    With `auto`, the value may also be the word "auto", which sets the field of that name.
    """
    bounds = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    bounds = {words: bound for words, bound in bounds.items() if bound is not None}
    metadata = {"help": help, "bounds": bounds, "choices": choices, "aliases": aliases, "auto": auto}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a GPT-2."""

    vocab_size: int = setting(
        16384, "Entries of the tokenizer that is trained; --tokenizer bytes or PATH brings its own.", at_least=1
    )
    n_layer: int = setting(12, "Transformer blocks.", at_least=1)
    n_head: int = setting(12, "Attention heads per block; they share --n-embd evenly.", at_least=1)
    n_embd: int = setting(768, "Width: numbers per token between the blocks.", at_least=1)
    n_positions: int = setting(1024, "Longest context that the model can ever see, in tokens.", at_least=1)
    dropout: float = setting(
        0.1, "Share of activations that training drops (embeddings, attention, residuals).", at_least=0, below=1
    )
    layer_norm_epsilon: float = 1e-5  # GPT-2's; only a model from elsewhere brings another


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes tokens."""

    data: str = setting(
        "", "Folder, file or `builtin` to train on. [default: data/processed once prepared, else builtin]"
    )
    documents: str = setting(
        "auto",
        "What one document is in plain text; auto: a line in a hand-made train.txt, else a file.",
        choices=("auto", "line", "blank-line", "file"),
    )
    column: str = setting("", "Column that holds the text. [default: `text`, or the only long one]")
    val_fraction: float = setting(0.1, "Share of the documents kept for validation.", above=0, below=1)
    tokenizer: str = setting(
        "bpe",
        "`bpe` trains one on the text (32 MB of it at most), `bytes` is plain bytes, or the PATH of a tokenizer.json.",
    )


@dataclass(frozen=True)
class TrainingConfig:
    """How the weights are learnt. A step is one optimizer update."""

    seq_len: int = setting(512, "Tokens per training window.", at_least=1)
    batch_size: int = setting(
        16,
        "Windows per micro-step; `auto` takes as many of a step's windows at once as memory holds.",
        at_least=1,
        auto="auto_batch_size",
    )
    auto_batch_size: bool = False  # as long as the memory plan has not chosen
    gradient_accumulation_steps: int = setting(4, "Micro-steps whose gradients make one step.", at_least=1)
    grad_checkpoint: bool = setting(
        False, "Compute the activations of each block twice instead of keeping them: less memory, more time."
    )
    max_steps: int | None = setting(None, "Stop after this many steps.", at_least=1)
    max_epochs: float = setting(10.0, "Stop after this many passes over the training text.", above=0)
    max_minutes: float | None = setting(None, "Stop after this many minutes of training.", above=0)
    learning_rate: float = setting(3e-4, "Highest learning rate, reached after the warm-up.", above=0)
    min_lr: float | None = setting(None, "Learning rate at the end. [default: a tenth of --learning-rate]", at_least=0)
    warmup_steps: int | None = setting(
        None, "Steps in which the rate rises to its highest. [default: a tenth of all, 100 at most]", at_least=0
    )
    schedule: str = setting(
        "cosine",
        "How the rate falls after the warm-up; wsd keeps it high for four fifths of the steps.",
        choices=("cosine", "linear", "constant", "wsd"),
    )
    beta1: float = setting(0.9, "AdamW's decay of the mean gradient.", at_least=0, below=1)
    beta2: float = setting(0.95, "AdamW's decay of the mean squared gradient.", at_least=0, below=1)
    weight_decay: float = setting(0.1, "AdamW's weight decay, on matrices only.", at_least=0)
    max_grad_norm: float = setting(1.0, "Clip the gradients' global norm to this; 0 leaves it.", at_least=0)
    log_every: int = setting(100, "Steps between two lines of the log.", at_least=1)
    eval_every: int = setting(500, "Steps between two evaluations.", at_least=1)
    eval_windows: int = setting(1024, "Validation windows per evaluation, always the same; 0 takes all.", at_least=0)
    save_every: int = setting(1000, "Steps between two checkpoints.", at_least=1)
    keep_checkpoints: int = setting(3, "Newest checkpoints to keep, beside best and final.", at_least=1)
    max_bad_steps: int = setting(10, "End the run when more steps than this in a row have no finite loss.", at_least=1)
    precision: str = setting(
        "auto",
        "Numbers of the forward and backward pass; auto: bfloat16 on a GPU, float32 on the CPU.",
        choices=("auto", "float32", "bfloat16"),
    )
    report_to: tuple[str, ...] = setting(
        (),
        "Send the metrics there too; may be given several times. none ends what a run was begun with.",
        choices=("tensorboard", "wandb", "none"),
    )
    seed: int = setting(1337, "Steers initial weights, order of the text and dropout.", at_least=0, below=2**63)
    ranks: int = 1  # that make each step together; not a setting, for a run may go on with others

    @property
    def windows_per_step(self) -> int:
        """Training windows that make one step, over all ranks."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def windows_per_rank(self) -> int:
        """A rank's even part of them."""
        return self.windows_per_step // self.ranks

    @property
    def micro_batch_size(self) -> int:
        """Windows that a rank computes at once: the most up to `batch_size` that share its part evenly."""
        most = min(self.batch_size, self.windows_per_rank)
        return next(size for size in range(most, 0, -1) if self.windows_per_rank % size == 0)

    @property
    def micro_steps(self) -> int:
        """Micro-batches that a rank makes in a step."""
        return self.windows_per_rank // self.micro_batch_size


@dataclass(frozen=True)
class Config:
    """A whole run. In flags and in TOML its settings are flat: every name is unique."""

    preset: str = setting(
        "",
        "Sizes and rates to start from. [default: medium, or tiny for the built-in text]",
        choices=("tiny", "small", "medium", "large"),
    )
    out: str = setting("", "Folder of the run. [default: weights/<preset>-<name of the data>]")
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()


@dataclass(frozen=True)
class GenerationConfig:
    """How text is sampled. Names, meaning and order are Hugging Face's; each is off at its neutral value."""

    max_tokens: int = setting(200, "Most new tokens.", at_least=1, aliases=("max_length",))
    temperature: float = setting(0.8, "Below 1 is safer, above 1 bolder; 0 always takes the likeliest.", at_least=0)
    top_k: int = setting(50, "Sample among this many likeliest tokens; 0 is off.", at_least=0)
    top_p: float = setting(
        0.95, "Sample among the likeliest tokens that together have this probability; 1 is off.", above=0, at_most=1
    )
    min_p: float = setting(
        0.0, "Leave out tokens less likely than this share of the likeliest; 0 is off.", at_least=0, at_most=1
    )
    repetition_penalty: float = setting(1.2, "Above 1 makes tokens that stand in the text rarer; 1 is off.", above=0)
    presence_penalty: float = setting(
        0.0, "Subtracted from the logit of a token that stands in the text; 0 is off.", at_least=-2, at_most=2
    )
    frequency_penalty: float = setting(
        0.0, "Subtracted as often as a token stands in the text; 0 is off.", at_least=-2, at_most=2
    )
    seed: int | None = setting(
        None, "The same seed gives the same text. [default: another each time]", at_least=0, below=2**63
    )
    num_samples: int = setting(1, "Texts to make from each prompt; text i uses seed + i.", at_least=1)
    stop: tuple[str, ...] = setting((), "End the text before this string; may be given several times.")


@dataclass(frozen=True)
class ServeConfig:
    """How models are served."""

    host: str = setting("127.0.0.1", "The address to listen on.")
    port: int = setting(8080, "The port; 0 takes any.", at_least=0, below=2**16)
    api_key: str = setting("", "What clients have to know; MLX_GPT_API_KEY says it unseen.")
    insecure: bool = setting(False, "Listen beyond this machine without a key.")
    allow_host: tuple[str, ...] = setting((), "Another name of this server; may be given several times.")
    allow_origin: tuple[str, ...] = setting((), "A site whose pages may ask, as https://a.example; likewise.")
    max_batch: int = setting(8, "Texts of a model that are made at a time.", at_least=1)
    max_queue: int = setting(32, "Texts that may wait; more are refused.", at_least=0)
    max_tokens: int = setting(4096, "Most tokens that one may ask for.", at_least=1)
    grace: int = setting(30, "Seconds to finish what is being answered, after SIGTERM.", at_least=0)
    log_prompts: bool = setting(False, "Write what was asked into the log.")
