"""Answer in a conversation: the assistant's tokens are predicted from everything before them."""

from mlx_gpt.config import TrainingConfig
from mlx_gpt.data.batches import Windows
from mlx_gpt.data.chat_tokens import tokenize_conversations
from mlx_gpt.data.corpus import Corpus
from mlx_gpt.data.packing import PackedWindows
from mlx_gpt.data.tokens import Tokens
from mlx_gpt.objectives.text import Text
from mlx_gpt.progress import ByteProgress, Echo, ignore_line, ignore_progress
from mlx_gpt.tokenizer import Tokenizer


class Chat(Text):
    """The same loss on windows of whole conversations, in which only some tokens have a weight."""

    @staticmethod
    def encode(
        corpus: Corpus,
        tokenizer: Tokenizer,
        training: TrainingConfig,
        progress: ByteProgress = ignore_progress,
        echo: Echo = ignore_line,
    ) -> Tokens:
        """Return the marked tokens of a corpus; errors as in `tokenize_conversations`."""
        return tokenize_conversations(corpus, tokenizer, training.loss_on, progress, echo)

    @staticmethod
    def windows(tokens: Tokens, seq_len: int, seed: int = 0, context: int = 0) -> tuple[Windows, Windows]:
        """Return the windows for training and those for validation; arguments as in `Text`.

        Raises:
            UserError: no conversation fits into a window.
        """
        return (
            PackedWindows(tokens.train, seq_len, seed, context=context),
            PackedWindows(tokens.val, seq_len, name="validation", context=context),
        )
