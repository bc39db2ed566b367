"""The step that memory.py compares with: ours, except that the loss needs all logits at once."""

from typing import Any

from harness import serve
from train_ours import Ours


class Plain(Ours):
    """mlx-gpt with the loss of `mlx.nn`."""

    def objective(self) -> Any:
        import mlx.core as mx
        import mlx.nn as nn

        class AllLogits(nn.Module):
            """`mlx_gpt.objectives.text.Text` without chunks."""

            def __call__(
                self, model: nn.Module, tokens_bt: mx.array, weights_bt: mx.array
            ) -> tuple[mx.array, mx.array]:
                logits_btv = model(tokens_bt[:, :-1]).astype(mx.float32)
                losses_bt = nn.losses.cross_entropy(logits_btv, tokens_bt[:, 1:])
                return (losses_bt * weights_bt).sum(), weights_bt.sum()

        return AllLogits()


if __name__ == "__main__":
    serve(Plain)
