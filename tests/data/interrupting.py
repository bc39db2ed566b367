"""Prepare and encode a text in place of another, interrupt that at every change to a file, and look at what is left.

    python -m tests.data.interrupting FOLDER

kills it with SIGKILL at each change, and then a command that unpacks an archive in place of another.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from mlx_gpt import files
from mlx_gpt.data.corpus import open_corpus
from mlx_gpt.data.kaggle import from_file
from mlx_gpt.data.prepare import prepare
from mlx_gpt.data.tokens import tokenize
from mlx_gpt.tokenizer import Tokenizer
from tests.data.zips import make_zip
from tests.faults import killed_at_each_change

OLD = [f"The {number}th duck of old.\n" for number in range(30)]
NEW = [f"Goose {number} is new.\n" for number in range(40)]


def work(folder: Path) -> None:
    """Do what is interrupted: prepare a file, and encode it."""
    prepare([folder / "text.txt"], folder / "out")
    tokenize(open_corpus(folder / "out"), Tokenizer.of_bytes())


def start(folder: Path) -> None:
    """Leave the old text prepared and encoded, and the new one ready to take its place."""
    (folder / "text.txt").write_text("".join(OLD))
    work(folder)
    (folder / "text.txt").write_text("".join(NEW))


def check_each(folder: Path, interruptions: Iterable[str]) -> int:
    """Check after each interruption that nothing is lost, and that the next run leaves nothing unfinished.

    Returns:
        The number of interruptions.
    """
    count = 0
    for interruption in interruptions:
        count += 1
        assert text_of(folder) in (OLD, NEW), f"{interruption}: the corpus is neither the old one nor the new one"
        assert tokenized(folder) in (OLD, NEW), f"{interruption}: the tokens are neither the old ones nor the new ones"
        work(folder)
        assert text_of(folder) == tokenized(folder) == NEW, f"{interruption}: the next run did not do its work"
        left = [path.name for path in folder.rglob(".*")]
        assert not left, f"{interruption}: the next run left {left}"
        for path in (folder / "out").iterdir():
            path.unlink()
        start(folder)
    return count


def check_unpacking(folder: Path) -> int:
    """Kill `from_file` at each change, and check the same as `check_each`."""
    folder.mkdir()

    def unpack() -> list[Path]:
        return from_file(folder / "ducks.zip", folder)

    def replace() -> None:
        (folder / "ducks.zip").write_bytes(make_zip({"new.txt": b"Geese."}))
        unpack()

    unpacked = folder / "ducks"
    (folder / "ducks.zip").write_bytes(make_zip({"old.txt": b"Ducks."}))
    unpack()
    count = 0
    for interruption in killed_at_each_change(folder, replace):
        count += 1
        there = {path.name for path in folder.rglob("*.txt") if path.parent in (unpacked, folder / ".ducks.old")}
        assert there & {"old.txt", "new.txt"}, f"{interruption}: there is neither the old archive nor the new one"
        (folder / "ducks.zip").write_bytes(make_zip({"old.txt": b"Ducks."}))
        assert unpack() == [unpacked / "old.txt"], f"{interruption}: the next run did not do its work"
        left = [path.name for path in folder.iterdir() if path.name not in ("ducks", "ducks.zip")]
        assert not left, f"{interruption}: the next run left {left}"
    return count


def text_of(folder: Path) -> list[str]:
    """Return the lines of the corpus."""
    corpus = open_corpus(folder / "out")
    return "".join(text for split in ("train", "val") for text in corpus.documents(split)).splitlines(keepends=True)


def tokenized(folder: Path) -> list[str]:
    """Return the lines of the tokens."""
    tokenizer = Tokenizer.of_bytes()
    tokens = tokenize(open_corpus(folder / "out"), tokenizer)
    return (tokenizer.decode(tokens.train.tolist()) + tokenizer.decode(tokens.val.tolist())).splitlines(keepends=True)


if __name__ == "__main__":
    here = Path(sys.argv[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "flush", lambda handle: None)  # a kill loses nothing that was written, and disks are slow
        start(here)
        kills = check_each(here, killed_at_each_change(here, lambda: work(here)))
        kills += check_unpacking(here / "archives")
    print(kills, "kills")
