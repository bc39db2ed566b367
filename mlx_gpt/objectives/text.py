"""Continue text: every token is predicted from those before it."""

import mlx.core as mx
import mlx.nn as nn

from mlx_gpt import models
from mlx_gpt.config import TrainingConfig
from mlx_gpt.data.batches import TextWindows, Windows
from mlx_gpt.data.corpus import Corpus
from mlx_gpt.data.tokens import Tokens, check_length, tokenize
from mlx_gpt.models.cross_entropy import LinearCrossEntropy
from mlx_gpt.progress import ByteProgress, Echo, ignore_line, ignore_progress
from mlx_gpt.tokenizer import Tokenizer


class Text(nn.Module):
    """The cross-entropy of every token of a window except the first."""

    @staticmethod
    def encode(
        corpus: Corpus,
        tokenizer: Tokenizer,
        training: TrainingConfig,
        progress: ByteProgress = ignore_progress,
        echo: Echo = ignore_line,
    ) -> Tokens:
        """Return the tokens of a corpus; errors as in `tokenize`. No setting in `training` changes them."""
        return tokenize(corpus, tokenizer, progress, echo)

    @staticmethod
    def windows(tokens: Tokens, split: str, seq_len: int, seed: int = 0, context: int = 0) -> Windows:
        """Return the windows of a split.

        Args:
            tokens: what `encode` returned.
            split: "train" or "val".
            seq_len: targets per window.
            seed: decides between windows that would be equally good.
            context: the highest number of targets for this model; 0 if it can be raised.

        Raises:
            UserError: there is too little text for one window.
        """
        ids = getattr(tokens, split)
        check_length(ids, split, seq_len)
        return TextWindows(ids, seq_len)

    def __init__(self) -> None:
        super().__init__()
        self.cross_entropy = LinearCrossEntropy()

    def __call__(self, model: nn.Module, tokens_bt: mx.array, weights_bt: mx.array) -> tuple[mx.array, mx.array]:
        """Return the weighted sum of the losses in nats and the sum of the weights, float32 scalars both.

        Args:
            tokens_bt: windows (B, T + 1) of ids.
            weights_bt: (B, T), the weight of every token except the first; 0 if the token does not count.
        """
        inputs_bt, targets_n, weights_n = tokens_bt[:, :-1], tokens_bt[:, 1:].flatten(), weights_bt.flatten()
        if hasattr(model, "hidden"):
            x_nc = model.hidden(inputs_bt).flatten(0, 1)
            if models.trains_head(model):
                loss = self.cross_entropy(x_nc, model.head_weight, targets_n, weights_n)
            else:
                loss = self.cross_entropy.frozen(model.head, x_nc, targets_n, weights_n)
        else:
            loss = (mx.fast.cross_entropy(model(inputs_bt).flatten(0, 1), targets_n) * weights_n).sum()
        return loss, weights_n.sum()
