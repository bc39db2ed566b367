"""Unpack zips without trusting their names, their sizes or their checksums."""

import io
import os
import re
import shutil
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from mlx_gpt.errors import UserError, is_utf8, os_errors_explained
from mlx_gpt.files import DiskFullError, check_free_space, size_in_words, sync
from mlx_gpt.progress import Echo, ignore_line

TEXT_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".txt", ".md", ".parquet")
JSON_SUFFIX = ".json"  # beside other files it is mostly metadata, so it counts as text only where there is nothing else
ABOUT = re.compile(r"(^|/)(readme|licen[cs]e|copying|notice|citation)\.(txt|md)$", re.IGNORECASE)

# 20 GB of text are about five billion tokens, more than one Mac trains on in months. Deflate can reach 1000:1, but text
# stays near 5:1 and the most repetitive table near 50:1. Below the harmless size any ratio is allowed, because small
# files may be very repetitive.
MAX_BYTES = 20 * 10**9
MAX_RATIO = 200
HARMLESS_BYTES = 64 * 10**6
MAX_MEMBERS = 100_000
MAX_DIRECTORY = 100 * 10**6  # bytes of the table of members: a thousand for each
# macOS allows 255 bytes for a name and 1024 for a path. The difference is left for the folder that the zip goes to.
MAX_NAME, MAX_PATH = 255, 700


def is_text_like(name: str, suffixes: tuple[str, ...] = TEXT_SUFFIXES) -> bool:
    """Return whether a zip's member is worth unpacking: it holds text and is not hidden (macOS adds `._x.csv`)."""
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") for part in path.parts)
    return path.suffix.lower() in suffixes and not hidden


def is_json(name: str) -> bool:
    """Return whether a zip's member is a .json file that is not hidden."""
    return is_text_like(name, (JSON_SUFFIX,))


def extract(
    zip_path: Path, folder: Path, *, wanted: Callable[[str], bool] | None = None, echo: Echo = ignore_line
) -> list[Path]:
    """Unpack the wanted members of a zip into a new `folder`, and return their paths, sorted.

    Either everything is unpacked or nothing: one hostile name rejects the whole zip, and after a failure `folder` does
    not exist. On return every file has been verified against its checksum and written to the disk.

    Args:
        zip_path: the zip.
        folder: where its members go; it must not exist yet.
        wanted: returns, given a member's name, whether to unpack that member. By default these are the text files
            without a README, a licence and the like; if there are none, the .json files, and without those any text.
        echo: called with a line that names the members that are skipped.

    Raises:
        UserError: `folder` exists; the zip cannot be read, is damaged, is locked or is too large when unpacked; a name
            in it is unsafe or ambiguous; nothing in it is wanted; or the disk is full.
    """
    zip_path, folder = Path(zip_path), Path(folder)
    if folder.exists():
        raise UserError(f"{folder} already exists: move it away first.")
    try:
        with (
            os_errors_explained(f"unpack {zip_path.name} into {folder}"),
            _BoundedFile(io.FileIO(zip_path)) as file,
            zipfile.ZipFile(file) as archive,
        ):
            members = _choose(archive.infolist(), zip_path, wanted, echo)
            check_space(sum(member.file_size for member in members), folder.parent)
            return _unpack(archive, members, folder)
    except UserError:
        raise
    # Damage shows in many ways: a length that is not a number, a stream that ends early, an unknown version.
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError, LookupError) as error:
        raise UserError(_explain_bad_zip(zip_path)) from error


def fault_in_name(name: str) -> str | None:
    """Return why a downloaded file's name is unsafe, as words to put after the name; None if it is harmless."""
    path = PurePosixPath(name)
    if not is_utf8(name):
        return "has a name that is not valid Unicode"
    if any(unicodedata.category(letter) == "Cc" for letter in name):
        return "has control characters in its name"
    if "\\" in name:
        return "has a backslash in its name"
    if path.is_absolute() or re.match("[A-Za-z]:", name):
        return "has an absolute path"
    if ".." in path.parts or not path.parts:
        return "is not a path inside the folder"
    if len(name.encode()) > MAX_PATH or max(len(part.encode()) for part in path.parts) > MAX_NAME:
        return "has a name that is too long"
    return None


def clash_of(names: Iterable[str]) -> tuple[str, str, str] | None:
    """Return two files that cannot both be written, and a word for what they are; None if all can be written.

    Names are compared as on macOS, which ignores case and the different encodings of an accent.
    """
    places: dict[PurePosixPath, str] = {}
    for name in names:
        place = PurePosixPath(unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold()))
        if place in places:
            return places[place], name, "two files"
        places[place] = name
    for place, name in places.items():
        if clash := next((parent for parent in place.parents if parent in places), None):
            return places[clash], name, "a file and a folder"
    return None


def check_space(needed: int, folder: Path) -> None:
    """Refuse to write `needed` bytes to a disk that has less room. The `folder` need not exist yet.

    Raises:
        UserError: the sentence says how many bytes are needed and how many are free.
    """
    try:
        check_free_space(folder, needed)
    except DiskFullError as error:
        raise UserError(f"The disk is full ({error.strerror}): make room, then run the command again.") from None


class _BoundedFile(io.BufferedReader):
    """A zip's file that refuses too large a table of members before `zipfile` parses it.

    Parsing takes many times the table's size in memory. `zipfile` reads the table in one call, by its size alone. Each
    entry begins with the same four bytes, so counting these bounds the number of members, whatever the zip's own
    records claim.
    """

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(min(-1 if size is None else size, MAX_DIRECTORY + 1))
        if len(data) > MAX_DIRECTORY or data.count(b"PK\1\2") > MAX_MEMBERS:
            name = Path(self.name).name
            raise UserError(f"{name} holds more than {MAX_MEMBERS:,} files: unpack it by hand and join them.")
        return data


def _choose(
    members: list[zipfile.ZipInfo], zip_path: Path, wanted: Callable[[str], bool] | None, echo: Echo
) -> list[zipfile.ZipInfo]:
    """Check that a zip is harmless and return its wanted members."""
    for member in members:
        if fault := _fault(member):
            raise UserError(
                f"{zip_path.name} is not safe to unpack because {_shown(member)} {fault}: do not use this zip."
            )
    files = [member for member in members if not member.is_dir()]
    _check_clashes(files, zip_path)

    data = (lambda name: is_text_like(name) and not ABOUT.search(name), is_json, is_text_like)
    choices = [[each for each in files if choice(each.filename)] for choice in ((wanted,) if wanted else data)]
    chosen = next(filter(None, choices), [])
    names = {member.filename for member in chosen}
    others = [_shown(member) for member in files if member.filename not in names]
    listed = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
    if not chosen:
        suffixes = ", ".join((*TEXT_SUFFIXES, JSON_SUFFIX))
        raise UserError(f"{zip_path.name} holds {listed or 'nothing'} and no {suffixes} file: use another zip.")
    if others:
        echo(f"Skipping files that do not belong to the text: {listed}.")
    _check_contents(chosen, zip_path)
    return chosen


def _fault(member: zipfile.ZipInfo) -> str | None:
    """Return what is wrong with a member's name or kind, to be read after the name; None if it is harmless."""
    # `zipfile` cuts a name at a NUL byte and may replace it with one from an extra field, so both versions are checked.
    if fault := fault_in_name(member.orig_filename) or fault_in_name(member.filename):
        return fault
    if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a device"
    return None


def _check_clashes(files: list[zipfile.ZipInfo], zip_path: Path) -> None:
    """Refuse a zip in which one file would overwrite another."""
    if clash := clash_of(member.filename for member in files):
        first, second, what = clash
        both = f"{_shown_name(first)} and {_shown_name(second)}"
        raise UserError(f"{zip_path.name} holds {what} with one name, {both}: unpack it by hand.")


def _check_contents(chosen: list[zipfile.ZipInfo], zip_path: Path) -> None:
    for member in chosen:
        if member.flag_bits & 0x41:  # bit 0: encrypted; bit 6: strongly
            raise UserError(f"{zip_path.name} is locked with a password: unpack it by hand and give the files.")
        # Other methods hardly occur, and `zipfile` does not bound the memory that they fill from a few bytes.
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(f"{zip_path.name} is compressed in an unusual way: unpack it by hand and give the files.")
    # `zipfile` stops at the declared size, so this bound holds. Members that share compressed bytes are caught, too,
    # because the sum is compared with the size of the zip itself.
    total, packed = sum(member.file_size for member in chosen), zip_path.stat().st_size
    if total > MAX_BYTES or total > max(HARMLESS_BYTES, MAX_RATIO * packed):
        sizes = f"{size_in_words(packed)} would become {size_in_words(total)}"
        raise UserError(f"{zip_path.name} is suspiciously large inside ({sizes}): if you trust it, unpack it by hand.")


def _unpack(archive: zipfile.ZipFile, members: list[zipfile.ZipInfo], folder: Path) -> list[Path]:
    folder.mkdir(parents=True)
    try:
        paths = []
        for member in members:
            path = folder / PurePosixPath(member.filename)
            path.parent.mkdir(parents=True, exist_ok=True)
            # Reading to the end verifies the checksum. Mode "x" never overwrites a file and never follows a link.
            with archive.open(member) as source, path.open("xb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
                copy.flush()
                os.fsync(copy.fileno())
            paths.append(path)
        sync(folder)  # once for all files, because there may be very many
    except BaseException:  # including Ctrl-C
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return sorted(paths)


def _explain_bad_zip(zip_path: Path) -> str:
    with zip_path.open("rb") as file:
        start = file.read(2)
    if start == b"PK":
        return f"{zip_path.name} is damaged or was cut short: download it again."
    return f"{zip_path.name} is not a zip file: check that it is not an error page, then download it again."


def _shown(member: zipfile.ZipInfo) -> str:
    return _shown_name(member.orig_filename)


def _shown_name(name: str) -> str:
    return repr(name if len(name) <= 80 else name[:77] + "...")
