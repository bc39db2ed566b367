"""Decode files: text a piece at a time or a line at a time, and errors with the place where they are."""

import codecs
import csv
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from mlx_gpt.data.sniffing import HEAD, byte_order_mark
from mlx_gpt.errors import UserError

MAX_DOCUMENT = 100_000_000  # characters, thirty times War and Peace; preparing holds four copies in memory
MAX_LINE = 8 * MAX_DOCUMENT  # characters: the longest document still fits on a line of JSON, with its escapes

DECODERS = {
    "": codecs.utf_8_decode,
    "UTF-8": codecs.utf_8_decode,
    "UTF-16-LE": codecs.utf_16_le_decode,
    "UTF-16-BE": codecs.utf_16_be_decode,
    "UTF-32-LE": codecs.utf_32_le_decode,
    "UTF-32-BE": codecs.utf_32_be_decode,
}

T = TypeVar("T")


def ignore_bytes(count: int) -> None:
    """Do nothing with the number of bytes that were read."""


def pieces(path: Path, advance: Callable[[int], None] = ignore_bytes) -> Iterator[str]:
    """Yield the text of a file in pieces of at most `HEAD` bytes.

    A decoding error is raised only after all text before it was yielded. Its `start` counts bytes from the start of
    the file.

    Raises:
        UnicodeDecodeError: the file is not in the encoding of its byte order mark, or not UTF-8 if it has none.
    """
    with path.open("rb") as file:
        mark, encoding = byte_order_mark(file.read(4))
        decode = DECODERS[encoding]
        # UTF-16 and UTF-32 can hold lone surrogates, and `read_documents` drops only the documents that have one.
        errors = "strict" if decode is codecs.utf_8_decode else "surrogatepass"
        file.seek(len(mark))
        start, rest = len(mark), b""
        while True:
            read = file.read(HEAD)
            data = rest + read
            try:
                text, used = decode(data, errors, not read)
            except UnicodeDecodeError as error:
                if error.start:
                    yield decode(data[: error.start], errors, True)[0]
                error.start += start
                raise
            if text:
                yield text
            advance(len(read))
            if not read:
                return
            start, rest = start + used, data[used:]


def lines(path: Path, advance: Callable[[int], None] = ignore_bytes) -> Iterator[str]:
    """Yield lines with their endings (LF, CRLF or lone CR).

    `str.splitlines` will not do, because it also splits at U+2028 and the like, which are text here.

    Raises:
        UserError: a line is longer than `MAX_LINE`.
        UnicodeDecodeError: as in `pieces`, after all earlier lines were yielded.
    """
    line: list[str] = []
    size = 0
    for piece in _with_whole_endings(pieces(path, advance)):
        for part in io.StringIO(piece, newline=""):
            line.append(part)
            size += len(part)
            if size > MAX_LINE:
                raise UserError(f"{path} has a line of over {MAX_LINE // 10**6:,} million characters: break it.")
            if part.endswith(("\n", "\r")):
                yield "".join(line)
                line, size = [], 0
    if line:
        yield "".join(line)


def _with_whole_endings(texts: Iterator[str]) -> Iterator[str]:
    """Move a CR at the end of a piece to the start of the next, in case an LF follows."""
    held = ""
    for text in texts:
        text = held + text
        held = "\r" if text.endswith("\r") else ""
        yield text[: len(text) - len(held)]
    if held:
        yield held


def numbered(items: Iterator[T], path: Path, unit: str) -> Iterator[tuple[int, T]]:
    """Number `items` from 1, and turn an error in them into a `UserError` that names the line or row."""
    number = 1
    while True:
        place = f"{path}, {unit} {number:,}"
        try:
            item = next(items)
        except StopIteration:
            return
        except UnicodeDecodeError as error:
            raise not_decoded(place, error) from error
        except csv.Error as error:
            raise UserError(
                f"{place} is not valid CSV ({_csv_fault(error)}): close every quotation mark, "
                "and double those inside a field."
            ) from error
        yield number, item
        number += 1


def _csv_fault(error: csv.Error) -> str:
    """Return what is wrong in words. Python's own may show a separator that no file has."""
    if "expected after" in str(error):
        return "text after a closing quotation mark"
    return "a quotation mark is never closed" if "unexpected end" in str(error) else str(error)


def not_decoded(place: str, error: UnicodeDecodeError) -> UserError:
    """Return the sentence about a decoding error from `pieces`, in the file and line `place`."""
    return UserError(
        f"{place}: the byte at offset {error.start:,} is not {error.encoding.upper()}; "
        "save the file as UTF-8 and try again."
    )
