"""Answer in a conversation: the assistant's tokens are predicted from everything before them."""

from mlx_gpt.config import TrainingConfig
from mlx_gpt.data.batches import Windows
from mlx_gpt.data.chat_tokens import tokenize_conversations
from mlx_gpt.data.corpus import Corpus
from mlx_gpt.data.packing import PackedWindows
from mlx_gpt.data.tokens import NAMES, Tokens
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
    def windows(tokens: Tokens, split: str, seq_len: int, seed: int = 0, context: int = 0) -> Windows:
        """Return the windows of a split; arguments as in `Text`.

        Raises:
            UserError: no conversation fits into a window.
        """
        return PackedWindows(getattr(tokens, split), seq_len, seed, NAMES[split], context)
