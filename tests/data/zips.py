"""Helpers that make zips and compare folders."""

import io
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_gpt.errors import UserError

CSV = b"text,label\n" + b"".join(b"essay %d,0\n" % n for n in range(500))
FILES = {
    "essays.csv": CSV,
    "deep/notes.txt": b"some notes\n" * 20,
    "cover.png": b"\x89PNG",
    "__MACOSX/._essays.csv": b"?",
}


def make_zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tree(folder: Path) -> dict[str, bytes | None]:
    """Return every path below a folder, including hidden ones, with its content; None for a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def raw_zip(path: Path, members: list[tuple[str, bytes]], attributes: int = 0) -> Path:
    """Write a zip with names that `zipfile` would refuse or correct."""
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        warnings.simplefilter("ignore")  # about duplicate names
        for name, content in members:
            info = zipfile.ZipInfo("placeholder")
            info.filename, info.external_attr = name, attributes
            archive.writestr(info, content)
    return path


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def refused(action: Callable[[], object], secret: str = "") -> str:
    """Run an action that must raise `UserError`, and return its sentence: one line, without the `secret`."""
    with pytest.raises(UserError) as caught:
        action()
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert not secret or secret not in sentence
    assert sentence.endswith((".", "zip"))
    return sentence
