"""Unpacking of zips that are trusted with nothing: neither their names, nor their sizes, nor their checksums."""

import errno
import io
import re
import shutil
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from mlx_gpt.errors import UserError
from mlx_gpt.files import sync

Echo = Callable[[str], object]

TEXT_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".txt", ".md", ".parquet")

# 20 GB of text are some five billion tokens, more than one Mac trains on in months. Deflate can reach 1000:1, but text
# stays near 5:1 and the dullest table near 50:1. Below the harmless size no ratio hurts: toy files may be repetitive.
MAX_BYTES = 20 * 10**9
MAX_RATIO = 200
HARMLESS_BYTES = 64 * 10**6
MAX_MEMBERS = 100_000
MAX_DIRECTORY = 100 * 10**6  # bytes of the table of the members: a thousand for each
# macOS allows 255 bytes for a name and 1024 for a path; what is left over is for the folder that the zip goes to.
MAX_NAME, MAX_PATH = 255, 700


def say_nothing(line: str) -> None:
    """Be an `Echo` that keeps its lines to itself."""


def is_text_like(name: str) -> bool:
    """Tell whether a zip's member is worth unpacking: data with text, and not hidden (macOS adds `._x.csv`)."""
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") for part in path.parts)
    return path.suffix.lower() in TEXT_SUFFIXES and not hidden


def extract(
    zip_path: Path, folder: Path, *, wanted: Callable[[str], bool] = is_text_like, echo: Echo | None = None
) -> list[Path]:
    """Unpack the wanted members of a zip into a new `folder`, and return their paths, sorted.

    All of it or nothing: one hostile name condemns the whole zip, and after a failure `folder` does not exist. A file
    has reached the disk, its checksum verified, when this returns.

    Args:
        zip_path: the zip.
        folder: where its members go; it must not be there yet.
        wanted: tells from a member's name whether to unpack it.
        echo: is told, in a line, which members are skipped.

    Raises:
        UserError: `folder` exists; the zip cannot be read, is damaged, is locked or would unpack to too much; a name in
            it is unsafe or ambiguous; nothing in it is wanted; or the disk cannot take it.
    """
    zip_path, folder = Path(zip_path), Path(folder)
    if folder.exists():
        raise UserError(f"{folder} is already there: move it away first.")
    try:
        with _Bounded(io.FileIO(zip_path)) as file, zipfile.ZipFile(file) as archive:
            members = _choose(archive.infolist(), zip_path, wanted, echo or say_nothing)
            check_space(sum(member.file_size for member in members), folder.parent)
            return _unpack(archive, members, folder)
    except UserError:
        raise
    except OSError as error:
        raise disk_trouble(error, f"unpack {zip_path.name} into {folder}") from error
    # The reader meets damage in many shapes: a length that is no number, a stream that ends, a version from the future.
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError, LookupError) as error:
        raise UserError(_explain_bad_zip(zip_path)) from error


def check_space(needed: int, folder: Path) -> None:
    """Refuse to write `needed` bytes to a `folder`, there or yet to be made, whose disk has fewer.

    Raises:
        UserError: says how many are needed and how many are free.
    """
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"The disk is full: {_size(needed)} needed, {_size(free)} free; make room, then run the command again."
        )


def disk_trouble(error: OSError, task: str) -> UserError:
    """Return the sentence for what the operating system says; `task` reads as in "Cannot <task>"."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"The disk is full, so this program cannot {task}: make room, then run the command again.")
    reason = ": ".join(str(part) for part in (error.strerror or type(error).__name__, error.filename) if part)
    return UserError(f"Cannot {task} ({reason}): check that it is readable and writable.")


class _Bounded(io.BufferedReader):
    """A zip's file whose table of members is refused before it is taken apart, which takes many times its size.

    `zipfile` reads that table in one call, by its size alone. Each member in it begins with the same four bytes, so
    that there are never more members than of these, whatever the zip's records say.
    """

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(min(-1 if size is None else size, MAX_DIRECTORY + 1))
        if len(data) > MAX_DIRECTORY or data.count(b"PK\1\2") > MAX_MEMBERS:
            name = Path(self.name).name
            raise UserError(f"{name} holds more than {MAX_MEMBERS:,} files: unpack it by hand and join them.")
        return data


def _choose(
    members: list[zipfile.ZipInfo], zip_path: Path, wanted: Callable[[str], bool], echo: Echo
) -> list[zipfile.ZipInfo]:
    """The wanted members of a zip that has proved harmless."""
    for member in members:
        if fault := _fault(member):
            raise UserError(f"{zip_path.name} is not safe to unpack, {_shown(member)} {fault}: do not use it.")
    files = [member for member in members if not member.is_dir()]
    _check_clashes(files, zip_path)

    chosen = [member for member in files if wanted(member.filename)]
    others = [_shown(member) for member in files if not wanted(member.filename)]
    listed = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
    if not chosen:
        raise UserError(
            f"{zip_path.name} holds no {', '.join(TEXT_SUFFIXES)} file, only {listed or 'nothing'}: use another."
        )
    if others:
        echo(f"Skipping what is not text: {listed}.")
    _check_contents(chosen, zip_path)
    return chosen


def _fault(member: zipfile.ZipInfo) -> str | None:
    """What is wrong with a member's name or kind, to be read after the name."""
    # The reader cuts a name at a NUL byte and may replace it by one in an extra field: neither version may be hostile.
    for name in (member.orig_filename, member.filename):
        path = PurePosixPath(name)
        if any(unicodedata.category(letter) == "Cc" for letter in name):
            return "has control characters in its name"
        if "\\" in name:
            return "has a backslash in its name"
        if path.is_absolute() or re.match("[A-Za-z]:", name):
            return "has an absolute path"
        if ".." in path.parts or not path.parts:
            return "names no place inside the folder"
        if len(name.encode()) > MAX_PATH or max(len(part.encode()) for part in path.parts) > MAX_NAME:
            return "has too long a name"
    if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a device"
    return None


def _check_clashes(files: list[zipfile.ZipInfo], zip_path: Path) -> None:
    """No file may overwrite another, on a disk that, as macOS's does, ignores case and ways to write an accent."""
    places: dict[PurePosixPath, zipfile.ZipInfo] = {}
    for member in files:
        place = PurePosixPath(unicodedata.normalize("NFC", unicodedata.normalize("NFC", member.filename).casefold()))
        if place in places:
            both = f"{_shown(places[place])} and {_shown(member)}"
            raise UserError(f"{zip_path.name} holds two files for one place, {both}: unpack it by hand.")
        places[place] = member
    for place, member in places.items():
        if clash := next((parent for parent in place.parents if parent in places), None):
            both = f"{_shown(places[clash])} and {_shown(member)}"
            raise UserError(f"{zip_path.name} holds a file and a folder of one name, {both}: unpack it by hand.")


def _check_contents(chosen: list[zipfile.ZipInfo], zip_path: Path) -> None:
    for member in chosen:
        if member.flag_bits & 0x41:  # bit 0: encrypted; bit 6: strongly
            raise UserError(f"{zip_path.name} is locked with a password: unpack it by hand and give the files.")
        # Nothing else is met in practice, and the reader lets other methods fill the memory from a few bytes.
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(f"{zip_path.name} is compressed in an unusual way: unpack it by hand and give the files.")
    # The reader stops at the declared size, so this bound holds; the zip's true size also counts parts that overlap.
    total, packed = sum(member.file_size for member in chosen), zip_path.stat().st_size
    if total > MAX_BYTES or total > max(HARMLESS_BYTES, MAX_RATIO * packed):
        sizes = f"{_size(packed)} would become {_size(total)}"
        raise UserError(f"{zip_path.name} unpacks to suspiciously much ({sizes}): if you trust it, unpack it by hand.")


def _unpack(archive: zipfile.ZipFile, members: list[zipfile.ZipInfo], folder: Path) -> list[Path]:
    folder.mkdir(parents=True)
    try:
        paths = []
        for member in members:
            path = folder / PurePosixPath(member.filename)
            path.parent.mkdir(parents=True, exist_ok=True)
            # Reading to the end verifies the checksum. "x" never follows or overwrites what is there.
            with archive.open(member) as source, path.open("xb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
            sync(path)
            paths.append(path)
    except BaseException:  # Ctrl-C too
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return sorted(paths)


def _explain_bad_zip(zip_path: Path) -> str:
    with zip_path.open("rb") as file:
        start = file.read(2)
    if start == b"PK":
        return f"{zip_path.name} is damaged or was cut short: download it again."
    return f"{zip_path.name} is not a zip file: download it again, and look whether it is an error page."


def _shown(member: zipfile.ZipInfo) -> str:
    name = member.orig_filename
    return repr(name if len(name) <= 80 else name[:77] + "...")


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
