"""Divides documents into training and validation.

The hash of a document's text decides its split, so it is the same among any other documents. With few documents, or
with one that is longer than all others together, the hashes may give validation nearly nothing or nearly everything.
Then the split is made by length.
"""

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from mlx_gpt.data.documents import read_documents
from mlx_gpt.data.report import Split
from mlx_gpt.errors import UserError

SPLITS = ("train", "val")
HASHES = 2**64
LONG = 0.1  # of all characters: a document that is longer is cut, if the split is by length


def split_file(folder: Path, split: str) -> Path:
    """Return the path of a split's prepared file."""
    return folder / f"{split}.jsonl"


def divide(texts: Iterable[tuple[int, str]], folder: Path, val_fraction: float) -> tuple[Split, dict[str, Split], str]:
    """Write texts to the two files of `folder`.

    A text goes to validation if its hash, as a fraction of `HASHES`, is below `val_fraction`. That stands if
    validation then has the share of the characters that was asked for, give or take half of the smaller side.
    Otherwise, every text longer than a tenth of all characters, and longer than the smaller side, is cut. Its end is
    validation.
    The other texts go to validation whole, in the order of their hashes, until it has its share. The last of them is
    cut if that share would otherwise be missed.

    This keeps 16 bytes per text in memory, and about 200 while the split is made by length.

    Args:
        texts: the hash, below `HASHES`, and the text of each document. Each has a character that is not white space.
        folder: an empty folder.
        val_fraction: the share of validation, between 0 and 1.

    Returns:
        The size of all texts, that of each split, and a sentence that says why the split is by length, or "".

    Raises:
        UserError: there is too little text to be cut.
    """
    hashes, lengths = array("Q"), array("Q")

    def by_hash() -> Iterator[tuple[str, str]]:
        for number, text in texts:
            hashes.append(number)
            lengths.append(len(text))
            yield _side(number, val_fraction), text

    sizes = _write(folder, by_hash())
    whole = Split(len(lengths), sum(lengths))
    share = sizes["val"].characters / max(whole.characters, 1)
    if not whole.documents or abs(share - val_fraction) <= min(val_fraction, 1 - val_fraction) / 2:
        return whole, sizes, ""

    fractions = _fractions(hashes, lengths, val_fraction)
    before = {split: split_file(folder, split).rename(folder / f"{split}-by-hash.jsonl") for split in SPLITS}
    readers = {split: read_documents(path, column="text") for split, path in before.items()}

    def by_length() -> Iterator[tuple[str, str]]:
        for number, fraction in zip(hashes, fractions, strict=True):
            text = next(readers[_side(number, val_fraction)])
            assert isinstance(text, str)  # because `_write` wrote the file
            end = place_to_cut(text, fraction)
            for split, part in (("train", text[:end]), ("val", text[end:])):
                if part.strip():
                    yield split, part

    sizes = _write(folder, by_length())
    for path in before.values():
        path.unlink()
    if not all(size.documents for size in sizes.values()):
        raise UserError("The text is too short to be cut into training and validation: add more text.")
    return whole, sizes, _note(whole.documents, sum(0 < fraction < 1 for fraction in fractions), val_fraction)


def place_to_cut(text: str, val_fraction: float) -> int:
    """Return where the last `val_fraction` of a text begins: at the nearest line, else word, if one begins near there.

    White space at the start and the end does not count, so both parts have text. A fraction of 0 or 1 gives an end of
    the text.
    """
    if val_fraction in (0, 1):
        return 0 if val_fraction else len(text)
    start = len(text) - len(text.lstrip())
    length = len(text.strip())
    exact = start + int(length * (1 - val_fraction))
    reach = int(length * min(val_fraction, 1 - val_fraction) / 4)
    for mark in "\n ":
        before, after = text.rfind(mark, exact - reach, exact), text.find(mark, exact, exact + reach)
        if places := [place + 1 for place in (before, after) if place >= 0]:
            return min(places, key=lambda place: abs(place - exact))
    return exact


def _side(number: int, val_fraction: float) -> str:
    return "val" if number / HASHES < val_fraction else "train"


def _fractions(hashes: Sequence[int], lengths: Sequence[int], val_fraction: float) -> array:
    """Return the fraction of each text that is validation, if the split is by length."""
    smaller = min(val_fraction, 1 - val_fraction)
    longest = max(LONG, smaller) * sum(lengths)
    others = sorted(pair for pair in zip(hashes, lengths, strict=True) if pair[1] <= longest)
    # Texts with a smaller hash than the last one go to validation, the rest to training.
    missing, last, fraction_of_last = val_fraction * sum(length for _, length in others), HASHES, 0.0
    for number, length in others:
        if length >= missing:
            last, fraction_of_last = number, missing / length
            if abs(round(fraction_of_last) * length - missing) <= smaller / 4 * sum(lengths):
                fraction_of_last = round(fraction_of_last)
            break
        missing -= length
    return array(
        "d",
        (
            val_fraction if length > longest else fraction_of_last if number == last else number < last
            for number, length in zip(hashes, lengths, strict=True)
        ),
    )


def _write(folder: Path, texts: Iterable[tuple[str, str]]) -> dict[str, Split]:
    """Write (split, text) pairs to the two files of `folder` and return the size of each split."""
    documents: Counter[str] = Counter()
    characters: Counter[str] = Counter()
    with split_file(folder, "train").open("wb") as train, split_file(folder, "val").open("wb") as val:
        files = {"train": train, "val": val}
        for split, text in texts:
            files[split].write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
            documents[split] += 1
            characters[split] += len(text)
    return {split: Split(documents[split], characters[split]) for split in SPLITS}


def _note(documents: int, cut: int, val_fraction: float) -> str:
    if documents == 1:
        return f"one document: its last {100 * val_fraction:.3g} % is validation"
    how = "no document is cut"
    if cut:
        how = f"{cut:,} documents are cut, and their ends are validation"
    if cut == 1:
        how = "one document is cut, and its end is validation"
    return f"split by length, because the documents are few or their lengths differ much: {how}"
