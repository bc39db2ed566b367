"""Sizes, rates and recipes to start from, by name."""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # It trains in minutes on a laptop's CPU, so it evaluates often and learns fast.
    "tiny": {
        "n_layer": 4,
        "n_head": 4,
        "n_embd": 128,
        "n_positions": 256,
        "vocab_size": 2048,
        "seq_len": 128,
        "gradient_accumulation_steps": 1,
        "learning_rate": 2e-3,
        "log_every": 10,
        "eval_every": 100,
        "save_every": 200,
    },
    "small": {"n_layer": 6, "n_head": 8, "n_embd": 512, "vocab_size": 8192},
    "medium": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "large": {"n_layer": 24, "n_head": 16, "n_embd": 1024, "vocab_size": 32768},
}

# Rates that suit an optimizer, where they differ from the defaults and the presets' (benchmarks/NOTES.md).
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "muon": {"learning_rate": 4e-3},
}

# The steps are small, because a few hundred conversations fill only a few dozen windows.
SHORT_RUN = {"batch_size": 4, "gradient_accumulation_steps": 1, "log_every": 10, "eval_every": 100, "save_every": 200}
# Runs that start from weights are short, and must not forget too much. The rates suit a network that is 128 wide.
FINE_TUNING: dict[str, dict[str, Any]] = {
    "full": {"learning_rate": 1e-3, "muon_learning_rate": 3e-3, **SHORT_RUN},
    "lora": {"learning_rate": 2e-3, "muon_learning_rate": 3e-3, **SHORT_RUN},
}


def fine_tuning(kind: str, width: int) -> dict[str, Any]:
    """Return the rates, the batch and the intervals for fine-tuning existing weights: all of them, or adapters (LoRA).

    The rate falls as the width grows (Yang et al. 2022, arXiv:2203.03466).

    Args:
        kind: full or lora.
        width: the width of the network, in numbers per token between the blocks.
    """
    values = FINE_TUNING[kind]
    return values | {"learning_rate": float(f"{values['learning_rate'] * 128 / width:.2g}")}


RECIPES: dict[str, dict[str, Any]] = {
    # It learned more in a few minutes than GPT-2 with AdamW (benchmarks/NOTES.md).
    "quick": {
        "preset": "tiny",
        "model_type": "qwen3",
        "optimizer": "muon",
        "muon_momentum": 0.9,
        "schedule": "wsd",
        "min_lr": 0.0,
        "dropout": "auto",
    },
}
