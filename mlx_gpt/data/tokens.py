"""Turns documents into token ids in memory-mapped files."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mlx_gpt.data.corpus import Corpus, check_writable, usable
from mlx_gpt.data.documents import read_documents
from mlx_gpt.data.encoder import CorpusEncoder
from mlx_gpt.data.sources import find_files, hash_of
from mlx_gpt.data.split import SPLITS
from mlx_gpt.errors import UserError, shown
from mlx_gpt.files import write_text_whole, write_whole
from mlx_gpt.progress import ByteProgress, Echo, ignore_line, ignore_progress
from mlx_gpt.tokenizer import Tokenizer
from mlx_gpt.tokenizer_training import Sample

BATCH_CHARACTERS = 2_000_000  # encoded at once, on all cores
PIECE_CHARACTERS = 100_000  # a longer document is encoded in pieces
NAMES = {"train": "training", "val": "validation"}  # of the splits, for messages
ID = np.uint32((1 << 28) - 1)  # these bits are the token; in conversations the other bits are marks
# A document may be cut before a space that begins a word, because there GPT-2's split into words stays the same.
WORD_START = re.compile(r"(?<=\S) (?=[^\W\d_])")


@dataclass(frozen=True)
class Tokens:
    """The token ids of a corpus. Each split is one long row, in which every document ends with the end-of-text token.

    Documents begin with the tokenizer's `start`.

    Attributes:
        train, val: (tokens,) uint16 or uint32, memory-mapped.
        fingerprint: a hash in hex that changes with the corpus and the tokenizer.
    """

    train: np.ndarray
    val: np.ndarray
    fingerprint: str


def get_tokenizer(
    wanted: str, vocab_size: int, corpus: Corpus, echo: Echo, progress: ByteProgress = ignore_progress
) -> Tokenizer:
    """Return the tokenizer that `--tokenizer` names, training it if necessary.

    The BPE of a corpus is trained once and loaded afterwards. It is trained on a `Sample` of the training text.

    Args:
        wanted: "bpe", "bytes" or the path of a tokenizer.json.
        vocab_size: entries of a BPE that is trained.
        corpus: the corpus that a BPE is trained on, and in whose folder it is kept.
        echo: called with a line if a tokenizer is trained.
        progress: called with the bytes read so far: first of the corpus, then of the sample.

    Raises:
        UserError: there is no such tokenizer, or the corpus was changed since it was opened.
    """
    if wanted == "bytes":
        return Tokenizer.of_bytes()
    if wanted != "bpe":
        return Tokenizer.load(wanted)
    path = corpus.made(f"{corpus.fingerprint[:16]}-{vocab_size}.tokenizer.json")
    if path.exists():
        return Tokenizer.load(path)
    check_writable(path.parent)  # before the work
    size = corpus.path("train").stat().st_size
    sample = Sample(_counted((text for text, _ in _pieces(_texts(corpus))), size, progress))
    part = f"{sample.bytes / 1e6:,.0f} of the {sample.text_bytes / 1e6:,.0f} MB of " if sample.share < 1 else ""
    echo(f"Training a tokenizer of {vocab_size:,} entries on {part}{corpus.name} ...")
    tokenizer = Tokenizer.train(sample, vocab_size, lambda done: progress(min(done, sample.bytes - 1), sample.bytes))
    corpus.check_unchanged()
    progress(sample.bytes, sample.bytes)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_whole(path, tokenizer.to_json())
    return tokenizer


def tokens_fingerprint(corpus: Corpus, tokenizer: Tokenizer) -> str:
    """Return the fingerprint that the tokens of a corpus have, without encoding it.

    It depends on the text and the tokenizer alone. A text that was moved or copied keeps it.
    """
    start = [tokenizer.start] if tokenizer.start else []
    return hash_of(corpus.fingerprint, tokenizer.to_json(), *start)[:16]


def tokenize(
    corpus: Corpus, tokenizer: Tokenizer, progress: ByteProgress = ignore_progress, echo: Echo = ignore_line
) -> Tokens:
    """Encode a corpus, or open the files of an earlier call if neither the corpus nor the tokenizer has changed.

    Raises:
        UserError: the corpus cannot be read, or was changed since it was opened.
    """

    def encode(split: str, path: Path, advance: Callable[[int], None]) -> None:
        _encode(corpus.documents(split, echo), tokenizer, advance, path)

    return make_tokens(corpus, tokens_fingerprint(corpus, tokenizer), encode, progress)


def make_tokens(
    corpus: Corpus, fingerprint: str, encode: Callable[[str, Path, Callable[[int], None]], None], progress: ByteProgress
) -> Tokens:
    """Make the token files of a corpus with `encode`, or open them if they are there.

    Args:
        encode: called with a split, the path to write its ids to, and a function to call with the characters read.

    Raises:
        UserError: as in `tokenize`.
    """
    paths = [corpus.made(f"{fingerprint}.{split}.npy") for split in SPLITS]
    missing = [(split, path) for split, path in zip(SPLITS, paths, strict=True) if not _is_whole(path)]
    total = sum(corpus.path(split).stat().st_size for split, _ in missing)
    done = 0
    for split, path in missing:

        def advance(encoded: int, before: int = done) -> None:
            progress(min(before + encoded, total), total)

        def write(part: Path, split: str = split, advance: Callable[[int], None] = advance) -> None:
            encode(split, part, advance)
            corpus.check_unchanged()

        check_writable(path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, write)
        done += corpus.path(split).stat().st_size
        progress(done, total)
    train, val = (np.load(path, mmap_mode="r") for path in paths)
    return Tokens(train, val, fingerprint)


def encode_file(
    path: Path,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    column: str = "",
    documents: str = "auto",
    echo: Echo = ignore_line,
) -> np.ndarray:
    """Return the token ids of a file of documents, or of a folder of such files, as (tokens,) uint16 or uint32.

    Args:
        path: the file or folder.
        tokenizer: the tokenizer to encode with.
        folder: the folder for the file that the ids are memory-mapped from.
        column: as in `read_documents`.
        documents: as in `read_documents`.
        echo: called with a line for each reason why rows are left out.

    Raises:
        UserError: the file cannot be read, has no such column or no text.
    """
    files, _ = find_files([path])
    texts = (text for file in files for text in read_documents(file, column=column, documents=documents))
    target = folder / "tokens.npy"
    _encode(usable(texts, echo), tokenizer, lambda encoded: None, target)
    tokens = np.load(target, mmap_mode="r")
    if len(tokens) < 2:
        raise UserError(f"{path} holds no text: name another file.")
    return tokens


def lost_text(tokens: Iterable[np.ndarray], tokenizer: Tokenizer) -> list[str]:
    """Return a warning about the text that its ids do not hold; an empty list if nothing was lost."""
    if tokenizer.drops_unknown:
        return [
            "WARNING: The tokenizer drops characters that it has no token for, without counting them: check that it "
            "covers your text."
        ]
    if tokenizer.unknown is None:
        return []
    parts = [ids[i : i + 2**24] for ids in tokens for i in range(0, len(ids), 2**24)]  # each comparison makes an array
    unknown = sum(np.count_nonzero(part & ID == tokenizer.unknown) for part in parts)
    if not unknown:
        return []
    count, name = (
        f"{unknown:,} of the {sum(map(len, parts)):,}",
        shown(tokenizer.backend.id_to_token(tokenizer.unknown)),
    )
    return [
        f"WARNING: {count} tokens of this text are {name}, because the tokenizer does not know these words or "
        "characters. They are lost, so the bits per byte are misleading."
    ]


def check_length(ids: np.ndarray, split: str, seq_len: int) -> None:
    """Refuse a training text that is shorter than one window, which is `seq_len` tokens and the token after them.

    A validation text only needs two tokens, because its last window may be shorter.

    Raises:
        UserError: the sentence says how short the text is and which window would fit.
    """
    if len(ids) < 2:
        raise UserError(f"The {NAMES[split]} text has {len(ids)} tokens: add text, or change --val-fraction.")
    if split == "train" and len(ids) <= seq_len:
        raise UserError(
            f"The training text has {len(ids):,} tokens, fewer than the {seq_len + 1:,} of one window: add text, or "
            f"use --seq-len {len(ids) - 1} or less."
        )


def _is_whole(path: Path) -> bool:
    """Return whether there is a .npy file at `path` that can be opened."""
    try:
        np.lib.format.open_memmap(path, mode="r")
    except (FileNotFoundError, ValueError):
        return False
    return True


def _encode(documents: Iterable[str], tokenizer: Tokenizer, advance: Callable[[int], None], path: Path) -> None:
    """Write the ids of documents to a .npy file, calling `advance` with the characters encoded so far."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    start, end_of_text = (np.array(ids, dtype).tobytes() for ids in (tokenizer.start, [tokenizer.end_of_text]))
    encoder = CorpusEncoder(tokenizer, dtype)

    def encoded() -> Iterator[bytes]:
        done, is_first = 0, True
        for pieces in _batches(_pieces(documents)):
            for ids, (_, is_last) in zip(encoder.encode_batch([text for text, _ in pieces]), pieces, strict=True):
                yield (start if is_first else b"") + ids + (end_of_text if is_last else b"")
                is_first = is_last
            done += sum(len(text) for text, _ in pieces)
            advance(done)

    write_ids(path, dtype, encoded())


def write_ids(path: Path, dtype: np.dtype, parts: Iterable[bytes]) -> int:
    """Write ids, given as the bytes of arrays of `dtype`, to a .npy file with one row, and return their number."""
    length = 0
    with path.open("wb") as file:
        _write_header(file, dtype, 0)
        for part in parts:
            length += file.write(part) // dtype.itemsize
        # NumPy pads the header, so the true length fits into the same number of bytes.
        file.seek(0)
        _write_header(file, dtype, length)
    return length


def _texts(corpus: Corpus) -> Iterator[str]:
    """Yield the training text of a corpus: its documents, or the messages of its conversations."""
    if corpus.kind == "documents":
        yield from corpus.documents("train")
    else:
        yield from (message["content"] for turns in corpus.conversations("train") for message in turns)


def _pieces(documents: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Yield documents in pieces of bounded length, each with whether it is the last piece of its document."""
    for document in documents:
        start = 0
        while len(document) - start > PIECE_CHARACTERS:
            cut = WORD_START.search(document, start + PIECE_CHARACTERS // 2, start + PIECE_CHARACTERS)
            end = cut.start() if cut else start + PIECE_CHARACTERS
            yield document[start:end], False
            start = end
        yield document[start:], True


def _counted(texts: Iterable[str], size: int, progress: ByteProgress) -> Iterator[str]:
    """Yield the texts, calling `progress` about every megabyte and at the end; a file of `size` bytes has them."""
    read = shown = 0
    for text in texts:
        yield text
        read += len(text)
        if read >= shown + 1_000_000:
            shown = read
            progress(min(read, size - 1), size)
    progress(size, size)


def _batches(pieces: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Yield the pieces in lists of about `BATCH_CHARACTERS`."""
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
