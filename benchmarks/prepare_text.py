"""From a text to training windows in a process of its own: `mlx-gpt prepare`, then what `mlx-gpt train` does first."""

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from contender import resident_memory
from harness import serve


class Preparation:
    """Three things to do with one text, in this order.

    Args:
        text: a file with a document per line.
        folder: where the corpus goes.
        vocab_size: of the tokenizer.
    """

    def __init__(self, text: str, folder: str, vocab_size: int) -> None:
        self._text, self._folder, self._vocab_size = Path(text), Path(folder), vocab_size
        os.chdir(folder)

    def facts(self) -> dict[str, Any]:
        """Nothing that is not known."""
        return {}

    def prepare(self) -> dict[str, Any]:
        """Read, drop repetitions, split, write."""
        from mlx_gpt.data.corpus import open_corpus, prepare

        result = timed(lambda: prepare([self._text], self._folder / "corpus", documents="line"))
        self._corpus = open_corpus(self._folder / "corpus")
        return result

    def train_tokenizer(self) -> dict[str, Any]:
        """Learn a byte-level BPE."""
        from mlx_gpt.data.tokens import get_tokenizer

        def work() -> None:
            self._tokenizer = get_tokenizer("bpe", self._vocab_size, self._corpus, lambda line: None)

        return timed(work)

    def tokenise(self) -> dict[str, Any]:
        """Encode both sides into memory-mapped files."""
        from mlx_gpt.data.tokens import tokenize

        return timed(lambda: tokenize(self._corpus, self._tokenizer))


def timed(work: Callable[[], object]) -> dict[str, Any]:
    """Seconds that it takes, and the peak up to its end of the process, and of a child if it has had any."""
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "resident_memory": resident_memory() + resident_memory(resource.RUSAGE_CHILDREN)}


if __name__ == "__main__":
    serve(Preparation)
