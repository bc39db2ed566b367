"""Every setting, declared once: a field has its default, its bounds, its unit and the sentence that `--help` shows.

Flags, TOML keys and Python keyword arguments are made from these fields (settings.py), so there is no second list to
keep in step with them.
"""

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from mlx_gpt.presets import PRESETS, RECIPES

DOCUMENTS = ("auto", "line", "blank-line", "file")
PREPARED = "data/processed"  # where `prepare` writes a corpus, and where `train` looks for one


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
    """Declare a dataclass field that is also a flag and a TOML key.

    Args:
        default: the value if the user gives none.
        help: the sentence that `--help` shows.
        at_least, above, at_most, below: the bounds of a number.
        choices: the only values that are allowed; () allows any.
        aliases: other names of the flag.
        auto: the name of a field. The setting then also takes the word "auto", which sets that field to true.
    """
    bounds = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    bounds = {words: bound for words, bound in bounds.items() if bound is not None}
    metadata = {"help": help, "bounds": bounds, "choices": choices, "aliases": aliases, "auto": auto}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ModelConfig:
    """The network, with its dropout."""

    model_type: str = setting(
        "gpt2",
        "Network: gpt2 is GPT-2; qwen3 has rotary positions, RMSNorm, normalised queries and keys, and a gated MLP.",
        choices=("gpt2", "qwen3"),
    )
    vocab_size: int = setting(
        16384, "Entries of the tokenizer to train; ignored with --tokenizer bytes or PATH, and with --from.", at_least=1
    )
    n_layer: int = setting(12, "Transformer blocks.", at_least=1)
    n_head: int = setting(12, "Attention heads per block; must divide --n-embd.", at_least=1)
    n_kv_head: int | None = setting(
        None,
        "Heads of keys and values, each shared by a group of attention heads; qwen3 only. [default: --n-head]",
        at_least=1,
    )
    tie_embeddings: bool = setting(True, "Use the token embedding as the output head, too; gpt2 always does.")
    n_embd: int = setting(768, "Width: numbers per token between the blocks.", at_least=1)
    n_positions: int = setting(1024, "Longest context that the model can see, in tokens.", at_least=1)
    dropout: float = setting(
        0.0,
        "Fraction of embeddings and residuals to drop in training, never of attention weights; `auto` drops 0.1 if the "
        "text is read more than ten times.",
        at_least=0,
        below=1,
        auto="auto_dropout",
    )
    auto_dropout: bool = False  # with `auto`, true until the plan knows how often the text is read


@dataclass(frozen=True)
class LoRAConfig:
    """Adapters (LoRA), which are trained while the weights stay frozen."""

    lora_rank: int | None = setting(
        None,
        "Train only adapters of this rank, and keep the weights of --from frozen; these may be quantised.",
        at_least=1,
    )
    lora_layers: int | None = setting(
        None, "Number of blocks that get adapters, counted from the last one. [default: all]", at_least=1
    )
    lora_scale: float = setting(20.0, "Factor for the adapters' output.", above=0)
    lora_dropout: float = setting(0.0, "Fraction of the adapters' input to drop in training.", at_least=0, below=1)


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes tokens."""

    data: str = setting(
        "",
        f"Folder or file to train on, or `builtin`, a text that comes with Python. [default: {PREPARED} if there, else "
        "builtin]",
    )
    documents: str = setting(
        "auto",
        "How plain text is cut into documents; auto: by line in a hand-made train.txt, else one per file.",
        choices=DOCUMENTS,
    )
    column: str = setting("", "Column that holds the text. [default: `text`, or the only long one]")
    val_fraction: float = setting(0.1, "Fraction of the text to keep for validation.", above=0, below=1)
    tokenizer: str = setting(
        "bpe",
        "`bpe` trains one on the text (on 32 MB at most), `bytes` uses plain bytes, a PATH loads a tokenizer.json.",
    )


@dataclass(frozen=True)
class TrainingConfig:
    """How the weights are trained. A step is one optimizer update."""

    seq_len: int = setting(512, "Tokens per training window.", at_least=1)
    batch_size: int = setting(
        16,
        "Windows per micro-batch; `auto` takes as many of a step's windows as fit in memory, and may turn on "
        "--grad-checkpoint.",
        at_least=1,
        auto="auto_batch_size",
    )
    auto_batch_size: bool = False  # true until the memory plan has chosen a batch size
    gradient_accumulation_steps: int = setting(4, "Micro-batches per step; their gradients are averaged.", at_least=1)
    grad_checkpoint: bool = setting(
        False, "Compute each block's activations twice instead of keeping them: less memory, more time."
    )
    loss_on: str = setting(
        "assistant",
        "Tokens of conversations that count in the loss: the assistant's answers, or all. In documents, all count.",
        choices=("assistant", "all"),
    )
    max_steps: int | None = setting(None, "Stop after this many steps.", at_least=1)
    max_epochs: float | None = setting(
        None,
        "Stop after this many passes over the training text. [default: 10, or no limit with --max-minutes; with --from "
        "10, or enough for 300 steps if that is more]",
        above=0,
    )
    max_minutes: float | None = setting(
        None, "Stop after this many minutes; the learning rate falls with the time.", above=0
    )
    optimizer: str = setting(
        "adamw",
        "Optimizer: adamw trains everything with AdamW; muon trains the matrices of the blocks with Muon and the rest "
        "with AdamW, and starts the blocks' output projections of a new model at zero.",
        choices=("adamw", "muon"),
    )
    learning_rate: float = setting(
        3e-4,
        "Highest learning rate, reached after the warm-up. The default differs with --from (0.128 / width, or twice "
        "that for adapters), muon (4e-3) and the preset tiny (2e-3).",
        above=0,
    )
    min_lr: float | None = setting(None, "Learning rate at the end. [default: a tenth of --learning-rate]", at_least=0)
    warmup_steps: int | None = setting(
        None, "Steps over which the rate rises to its highest value. [default: a tenth of all, 100 at most]", at_least=0
    )
    muon_learning_rate: float = setting(0.02, "Highest learning rate of the matrices that Muon trains.", above=0)
    muon_momentum: float = setting(0.95, "Muon's decay of the mean gradient.", at_least=0, below=1)
    schedule: str = setting(
        "cosine",
        "How the rate falls after the warm-up; wsd keeps it high for four fifths of the steps.",
        choices=("cosine", "linear", "constant", "wsd"),
    )
    beta1: float = setting(0.9, "AdamW's decay of the mean gradient.", at_least=0, below=1)
    beta2: float = setting(0.95, "AdamW's decay of the mean squared gradient.", at_least=0, below=1)
    weight_decay: float = setting(0.1, "Weight decay, on matrices only.", at_least=0)
    max_grad_norm: float = setting(1.0, "Clip the gradients' global norm to this; 0 turns this off.", at_least=0)
    log_every: int = setting(100, "Steps between two lines of the log.", at_least=1)
    eval_every: int = setting(500, "Steps between two evaluations.", at_least=1)
    eval_windows: int = setting(1024, "Validation windows per evaluation, always the same; 0 takes all.", at_least=0)
    save_every: int = setting(1000, "Steps between two checkpoints.", at_least=1)
    keep_checkpoints: int = setting(3, "Newest checkpoints to keep, besides best and final.", at_least=1)
    max_bad_steps: int = setting(
        10, "End the run after more than this many steps in a row without a finite loss.", at_least=1
    )
    precision: str = setting(
        "auto",
        "Number format of the forward and backward pass; auto: bfloat16 on a GPU, float32 on the CPU.",
        choices=("auto", "float32", "bfloat16"),
    )
    report_to: tuple[str, ...] = setting(
        (),
        "Also send the metrics to this service; may be given several times. none turns off the run's services.",
        choices=("tensorboard", "wandb", "none"),
    )
    seed: int = setting(1337, "Decides initial weights, the order of the text, and dropout.", at_least=0, below=2**63)
    # The ranks that share each step. Not a setting, because a run may be resumed with another number of them.
    ranks: int = 1

    @property
    def windows_per_step(self) -> int:
        """Training windows in one step, over all ranks."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def windows_per_rank(self) -> int:
        """Training windows in one step on each rank."""
        return self.windows_per_step // self.ranks

    @property
    def micro_batch_size(self) -> int:
        """Windows that a rank computes at once: the largest divisor of `windows_per_rank` up to `batch_size`."""
        most = min(self.batch_size, self.windows_per_rank)
        return next(size for size in range(most, 0, -1) if self.windows_per_rank % size == 0)

    @property
    def micro_steps(self) -> int:
        """Micro-steps of each rank in one step."""
        return self.windows_per_rank // self.micro_batch_size


@dataclass(frozen=True)
class Config:
    """All settings of a run. In flags and in TOML they are one flat list, so every name is unique."""

    preset: str = setting(
        "",
        "Sizes and rates to start from. [default: medium, or tiny for the built-in text; none with --from]",
        choices=tuple(PRESETS),
    )
    recipe: str = setting(
        "",
        "Settings that belong together. quick: a network, optimizer and schedule that learn much in a few minutes.",
        choices=tuple(RECIPES),
    )
    out: str = setting("", "Folder of the run. [default: weights/<preset or name of --from>-<name of the data>]")
    init_from: str = setting(
        "",
        "Start from the weights and the tokenizer of this run, model directory, folder of adapters or hf:owner/name.",
        aliases=("from",),
    )
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    lora: LoRAConfig = LoRAConfig()
    training: TrainingConfig = TrainingConfig()


@dataclass(frozen=True)
class GenerationConfig:
    """How text is sampled.

    Names, meaning and order of the filters are those of Hugging Face's transformers. Each can be turned off.
    """

    max_tokens: int = setting(200, "Maximum number of new tokens.", at_least=1, aliases=("max_length",))
    temperature: float = setting(
        0.8, "Below 1 is safer, above 1 is bolder; 0 always takes the likeliest token.", at_least=0
    )
    top_k: int = setting(50, "Sample from this many of the likeliest tokens; 0 turns this off.", at_least=0)
    top_p: float = setting(
        0.95,
        "Sample from the likeliest tokens that together have this probability; 1 turns this off.",
        above=0,
        at_most=1,
    )
    min_p: float = setting(
        0.0,
        "Leave out tokens less likely than this fraction of the likeliest token's probability; 0 turns this off.",
        at_least=0,
        at_most=1,
    )
    repetition_penalty: float = setting(
        1.2, "Above 1 makes tokens that are already in the text rarer; 1 turns this off.", above=0
    )
    presence_penalty: float = setting(
        0.0,
        "Subtracted from the logit of a token that is already in the text; 0 turns this off.",
        at_least=-2,
        at_most=2,
    )
    frequency_penalty: float = setting(
        0.0,
        "Subtracted from a token's logit once for each time that it is in the text; 0 turns this off.",
        at_least=-2,
        at_most=2,
    )
    seed: int | None = setting(
        None, "The same seed gives the same text. [default: a new one each time]", at_least=0, below=2**63
    )
    num_samples: int = setting(1, "Texts to write for each prompt; text i uses seed + i.", at_least=1)
    stop: tuple[str, ...] = setting((), "End the text before this string; may be given several times.")


# In a conversation these replace the defaults above. An answer ends by itself. The repetition penalty counts the whole
# prompt, so it would avoid the words of the question and of earlier answers.
CONVERSATION = MappingProxyType({"max_tokens": 1000, "repetition_penalty": 1.0})


@dataclass(frozen=True)
class ServeConfig:
    """How models are served."""

    host: str = setting("127.0.0.1", "Address to listen on.")
    port: int = setting(8080, "Port to listen on; 0 takes any free one.", at_least=0, below=2**16)
    api_key: str = setting("", "Key that clients must send; MLX_GPT_API_KEY keeps it out of the process list.")
    insecure: bool = setting(False, "Allow connections from other machines without a key.")
    allow_host: tuple[str, ...] = setting((), "Another name of this server; may be given several times.")
    allow_origin: tuple[str, ...] = setting(
        (), "Site whose pages may use the API, such as https://a.example; may be given several times."
    )
    max_batch: int = setting(8, "Texts that each model writes at the same time.", at_least=1)
    context: int | None = setting(
        None,
        "Tokens of each text that the model sees. [default: its whole context, or as much as fits in memory]",
        at_least=16,
    )
    max_queue: int = setting(32, "Texts that may wait for their turn; further ones are refused.", at_least=0)
    max_tokens: int = setting(4096, "Maximum number of tokens that a request may ask for.", at_least=1)
    grace: int = setting(30, "Seconds to finish answers after SIGTERM.", at_least=0)
    log_prompts: bool = setting(False, "Write the prompts to the log.")
