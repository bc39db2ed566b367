"""Train a GPT from scratch on your own text with MLX, and talk to it.

import mlx_gpt

mlx_gpt.train(data="essays.csv", preset="tiny", out="weights/essays")
model, tokenizer = mlx_gpt.load("weights/essays")
print(mlx_gpt.generate(model, tokenizer, "Students should"))
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_gpt.api import generate, load, stream, train
    from mlx_gpt.config import GenerationConfig, ModelConfig
    from mlx_gpt.errors import RunError, UserError
    from mlx_gpt.tokenizer import Tokenizer

_HOME = {
    "GenerationConfig": "config",
    "ModelConfig": "config",
    "RunError": "errors",
    "Tokenizer": "tokenizer",
    "UserError": "errors",
    "generate": "api",
    "load": "api",
    "stream": "api",
    "train": "api",
}
__all__ = [
    "GenerationConfig",
    "ModelConfig",
    "RunError",
    "Tokenizer",
    "UserError",
    "generate",
    "load",
    "stream",
    "train",
]


def __getattr__(name: str) -> Any:
    # Loaded on first use: importing the package starts nothing, and `mlx-gpt --help` needs no arrays.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"mlx_gpt.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    # Notebooks complete these: the public names alone, without this module's imports and submodules.
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
