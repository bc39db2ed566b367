"""Turns a text into token files, in a process of its own: `mlx-gpt prepare`, then the start of `mlx-gpt train`."""

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from contender import resident_memory
from harness import serve


class Preparation:
    """The three parts of preparing one text, to be requested in the order of the methods.

    Args:
        text: a file with one document per line.
        folder: the folder for the corpus.
        vocab_size: entries of the tokenizer.
    """

    def __init__(self, text: str, folder: str, vocab_size: int) -> None:
        self._text, self._folder, self._vocab_size = Path(text), Path(folder), vocab_size
        os.chdir(folder)

    def facts(self) -> dict[str, Any]:
        """None: everything is known beforehand."""
        return {}

    def prepare(self) -> dict[str, Any]:
        """Read the text, drop repeated documents, split the rest and write it."""
        from mlx_gpt.data.corpus import open_corpus
        from mlx_gpt.data.prepare import prepare

        result = timed(lambda: prepare([self._text], self._folder / "corpus", documents="line"))
        self._corpus = open_corpus(self._folder / "corpus")
        return result

    def train_tokenizer(self) -> dict[str, Any]:
        """Train a byte-level BPE tokenizer."""
        from mlx_gpt.data.tokens import get_tokenizer

        def work() -> None:
            self._tokenizer = get_tokenizer("bpe", self._vocab_size, self._corpus, lambda line: None)

        return timed(work)

    def tokenise(self) -> dict[str, Any]:
        """Encode both splits into memory-mapped files."""
        from mlx_gpt.data.tokens import tokenize

        return timed(lambda: tokenize(self._corpus, self._tokenizer))


def timed(work: Callable[[], object]) -> dict[str, Any]:
    """Seconds of `work`, and the peak memory in bytes of the process so far, plus that of its largest child."""
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "resident_memory": resident_memory() + resident_memory(resource.RUSAGE_CHILDREN)}


if __name__ == "__main__":
    serve(Preparation)
