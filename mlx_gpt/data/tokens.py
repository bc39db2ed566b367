"""Documents to token ids in memory-mapped files."""

import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mlx_gpt.data.corpus import SPLITS, Corpus, normalise
from mlx_gpt.data.readers import read_documents
from mlx_gpt.data.sources import find_files
from mlx_gpt.errors import UserError
from mlx_gpt.files import write_text_whole, write_whole
from mlx_gpt.tokenizer import CorpusEncoder, Tokenizer

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""

BATCH_CHARACTERS = 2_000_000  # encoded at once, on all cores
PIECE_CHARACTERS = 100_000  # a longer document is encoded in pieces
TOKENIZER_BYTES = 32_000_000  # of text that a tokenizer learns from: twice as much gave 0.06 % fewer tokens
# Where a piece may end so that GPT-2's split into words stays the same: before a space that begins a word.
WORD_START = re.compile(r"(?<=\S) (?=[^\W\d_])")


@dataclass(frozen=True)
class Tokens:
    """Token ids of the two sides of a corpus: one long row each, every document closed by the end of text.

    Attributes:
        train, val: (tokens,) uint16 or uint32, memory-mapped.
        fingerprint: changes when the corpus or the tokenizer does.
    """

    train: np.ndarray
    val: np.ndarray
    fingerprint: str


def get_tokenizer(wanted: str, vocab_size: int, corpus: Corpus, echo: Callable[[str], None]) -> Tokenizer:
    """The tokenizer that `--tokenizer` names; BPE is trained on the corpus the first time and loaded afterwards.

    It learns from 32 MB, taken evenly from the whole training text, or from all of a smaller one.

    Raises:
        UserError: there is no such tokenizer.
    """
    if wanted == "bytes":
        return Tokenizer.of_bytes()
    if wanted != "bpe":
        return Tokenizer.load(wanted)
    path = corpus.folder / f"{corpus.fingerprint[:16]}-{vocab_size}.tokenizer.json"
    if path.exists():
        return Tokenizer.load(path)
    size = corpus.path("train").stat().st_size
    part = f"{TOKENIZER_BYTES // 10**6} of the {size // 10**6:,} MB of " if size > TOKENIZER_BYTES else ""
    echo(f"Training a tokenizer of {vocab_size:,} entries on {part}{corpus.name} ...")
    texts = (text for text, _ in _pieces(corpus.documents("train")))
    tokenizer = Tokenizer.train(_evenly(texts, TOKENIZER_BYTES / size), vocab_size)
    write_text_whole(path, tokenizer.to_json())
    return tokenizer


def tokenize(corpus: Corpus, tokenizer: Tokenizer, progress: Progress = lambda done, total: None) -> Tokens:
    """Encode a corpus, or map the files of an earlier time when neither it nor the tokenizer has changed."""
    fingerprint = hashlib.sha256(f"{corpus.fingerprint}\n{tokenizer.to_json()}".encode()).hexdigest()[:16]
    paths = [corpus.folder / f"{fingerprint}.{side}.npy" for side in SPLITS]
    missing = [(side, path) for side, path in zip(SPLITS, paths, strict=True) if not path.exists()]
    total = sum(corpus.path(side).stat().st_size for side, _ in missing)
    done = 0
    for side, path in missing:

        def advance(encoded: int, before: int = done) -> None:
            progress(min(before + encoded, total), total)

        write_whole(path, functools.partial(_encode, corpus.documents(side), tokenizer, advance))
        done += corpus.path(side).stat().st_size
        progress(done, total)
    train, val = (np.load(path, mmap_mode="r") for path in paths)
    return Tokens(train, val, fingerprint)


def encode_file(
    path: Path, tokenizer: Tokenizer, folder: Path, *, column: str = "", documents: str = "auto"
) -> np.ndarray:
    """The ids of a file of documents, or a folder of them, memory-mapped from a file in `folder`.

    Raises:
        UserError: it can't be read, or there is no such column.
    """
    files, _ = find_files([path])
    texts = (text for file in files for text in read_documents(file, column=column, documents=documents))
    target = folder / "tokens.npy"
    kept = (normalise(text) for text in texts if isinstance(text, str) and text.strip())
    _encode(kept, tokenizer, lambda encoded: None, target)
    tokens = np.load(target, mmap_mode="r")
    if len(tokens) < 2:
        raise UserError(f"{path} holds no text: name another file.")
    return tokens


def _encode(documents: Iterable[str], tokenizer: Tokenizer, advance: Callable[[int], None], path: Path) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    end_of_text = np.array([tokenizer.end_of_text], dtype).tobytes()
    encoder = CorpusEncoder(tokenizer, dtype)
    length = encoded = 0
    with path.open("wb") as file:
        _write_header(file, dtype, 0)
        for pieces in _batches(_pieces(documents)):
            for ids, (_, is_last) in zip(encoder.encode_batch([text for text, _ in pieces]), pieces, strict=True):
                length += file.write(ids + end_of_text if is_last else ids) // dtype.itemsize
            encoded += sum(len(text) for text, _ in pieces)
            advance(encoded)
        # The header leaves room for a larger length, so it is written again in place.
        file.seek(0)
        _write_header(file, dtype, length)


def _pieces(documents: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Documents in pieces of bounded length, each with whether it is the document's last."""
    for document in documents:
        start = 0
        while len(document) - start > PIECE_CHARACTERS:
            cut = WORD_START.search(document, start + PIECE_CHARACTERS // 2, start + PIECE_CHARACTERS)
            end = cut.start() if cut else start + PIECE_CHARACTERS
            yield document[start:end], False
            start = end
        yield document[start:], True


def _evenly(texts: Iterable[str], share: float) -> Iterator[str]:
    """About this share of the texts by length, from all over: all of them from 1 on."""
    seen = taken = 0
    for text in texts:
        if taken <= share * seen:
            yield text
            taken += len(text)
        seen += len(text)


def _batches(pieces: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    batch, characters = [], 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece[0])
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _write_header(file: BinaryIO, dtype: np.dtype, length: int) -> None:
    np.lib.format.write_array_header_1_0(
        file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    )


def check_windows(tokens: Tokens, seq_len: int) -> None:
    """Refuse a corpus that is shorter than one window of `seq_len` tokens and their successors.

    Raises:
        UserError: says how short it is and what would fit.
    """
    for side, ids in (("training", tokens.train), ("validation", tokens.val)):
        if len(ids) < 2:
            raise UserError(f"The {side} text has {len(ids)} tokens: add text, or change --val-fraction.")
    if len(tokens.train) <= seq_len:
        raise UserError(
            f"The training text has {len(tokens.train):,} tokens, fewer than one window of {seq_len:,} and its "
            f"successor: add text, or use --seq-len {len(tokens.train) - 1} or less."
        )
