"""The chat templates of `mlx_gpt.chat_template`, where generation looks for them."""

from mlx_gpt.chat_template import CHATML, ChatTemplate

__all__ = ["CHATML", "ChatTemplate"]
