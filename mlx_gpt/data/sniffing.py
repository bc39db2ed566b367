"""Tell a file's format from its name, and files without text from their first bytes."""

import codecs
import re
from pathlib import Path

FORMATS = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}

HEAD = 65536  # bytes that are read to tell text from other files
UNPACK = "unpack it first"
MAGIC = (
    (b"PK\x03\x04", "a zip archive", "unpack it first, or use `mlx-gpt download --from-file`"),
    (b"\x1f\x8b", "a gzip archive", UNPACK),
    (b"BZh91AY&SY", "a bzip2 archive", UNPACK),
    (b"\xfd7zXZ\x00", "an xz archive", UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", UNPACK),
    (b"%PDF-", "a PDF", "save its text as .txt"),
    (b"{\\rtf", "an RTF document", "save its text as .txt"),
    (b"\x89PNG", "a PNG image", "give a file of text"),
    (b"\xff\xd8\xff", "a JPEG image", "give a file of text"),
    (b"SQLite format 3\x00", "a SQLite database", "export the table as CSV"),
    (b"PAR1\x15", "a Parquet file", "give it the suffix .parquet"),
)
# UTF-32 first, because its mark begins with that of UTF-16.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32-LE"),
    (codecs.BOM_UTF32_BE, "UTF-32-BE"),
    (codecs.BOM_UTF16_LE, "UTF-16-LE"),
    (codecs.BOM_UTF16_BE, "UTF-16-BE"),
    (codecs.BOM_UTF8, "UTF-8"),
)
OFFICE = {".docx": ("a Word document", "save its text as .txt"), ".xlsx": ("an Excel workbook", "save it as CSV")}


def format_of(path: Path) -> str:
    """Return "csv", "tsv", "jsonl", "parquet" or, for every other suffix, "text"."""
    return FORMATS.get(path.suffix.lower(), "text")


def byte_order_mark(head: bytes) -> tuple[bytes, str]:
    """Return the byte order mark with which a file begins, and its encoding; two empty values if there is none."""
    return next(((mark, encoding) for mark, encoding in BYTE_ORDER_MARKS if head.startswith(mark)), (b"", ""))


def refusal(path: Path) -> str:
    """Return the sentence that says why the file at `path` cannot hold text; "" if it can.

    A NUL alone does not make a file binary: it is legal text, and real corpora have a few. A file is binary if it has
    control characters and is not UTF-8, or if nearly half of it is NULs, as in UTF-16 or UTF-32 without a byte order
    mark.

    Raises:
        OSError: the file cannot be opened or read.
    """
    if path.exists() and not path.is_file():
        return f"{path} is not a file: save the text in one, because it has to be read more than once."
    with path.open("rb") as file:
        head = file.read(HEAD)
    if not head:
        return f"{path} is empty: give a file with text in it."
    if format_of(path) == "parquet":
        return ""  # pyarrow checks it
    for magic, what, remedy in MAGIC:
        if head.startswith(magic):
            what, remedy = OFFICE.get(path.suffix.lower(), (what, remedy)) if magic[:2] == b"PK" else (what, remedy)
            return f"{path} is {what}: {remedy}."
    if head[3:9] == bytes(5) + b"{":  # a length below 16 MB in eight bytes, then JSON
        return f"{path} is a safetensors file: give a file of text."
    if head[257:262] == b"ustar":
        return f"{path} is a tar archive: {UNPACK}."
    if byte_order_mark(head)[1].startswith(("UTF-16", "UTF-32")):
        return ""
    if len(head) >= 32 and head.count(0) > 0.4 * len(head):
        return f"{path} is binary, or UTF-16 or UTF-32 without a byte order mark: save it as UTF-8."
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # incremental, as `head` may end inside a character
    except UnicodeDecodeError:
        if re.search(rb"[\x00-\x06\x0e-\x19\x1c-\x1f]", head):
            return f"{path} is a binary file: give a file of text, saved as UTF-8."
    return ""
