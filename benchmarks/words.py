"""Generates text of any size from a seeded vocabulary."""

from pathlib import Path

import numpy as np

WORDS = 30_000
WORDS_PER_DOCUMENT = 250
DOCUMENTS_AT_ONCE = 1_000
SYLLABLES = [consonant + vowel for consonant in "bdfghklmnprstvz" for vowel in "aeiou"]


def write_text(path: Path, size: int, seed: int = 0) -> None:
    """Write documents, one per line, until the file has at least `size` bytes.

    Words have one to five syllables. The frequency of the k-th word is 1 / k (Zipf's law), as in real text.
    """
    draw = np.random.default_rng(seed)
    words = ["".join(draw.choice(SYLLABLES, n)) for n in draw.integers(1, 6, WORDS)]
    cumulative = np.cumsum(1 / np.arange(1, WORDS + 1))
    written = 0
    with path.open("w", encoding="ascii") as file:
        while written < size:
            shape = (DOCUMENTS_AT_ONCE, WORDS_PER_DOCUMENT)
            for row in np.searchsorted(cumulative, draw.random(shape) * cumulative[-1]).tolist():
                document = " ".join([words[i] for i in row]) + ".\n"
                file.write(document)
                written += len(document)
                if written >= size:
                    break
