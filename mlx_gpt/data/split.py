"""Divides documents, conversations or preferences into training and validation.

The hash of a row decides its split, so other rows do not change it. With few rows, or with one that is longer than all
others together, the hashes may give validation nearly nothing or nearly everything. Then the rows are split by length.
"""

import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_gpt.data.kinds import Kinds, characters, from_json, kind_of, misplaced, one_of, to_json, turns
from mlx_gpt.data.report import Split
from mlx_gpt.data.rows import Drops
from mlx_gpt.errors import UserError

SPLITS = ("train", "val")
HASHES = 2**64
LONG = 0.1  # of all characters: a document that is longer is cut, if the split is by length


def split_file(folder: Path, split: str) -> Path:
    """Return the path of a split's prepared file."""
    return folder / f"{split}.jsonl"


@dataclass(frozen=True)
class Division:
    """Rows that are divided into training and validation.

    Attributes:
        kind: one of `KINDS`.
        whole: the size of all rows, before any was cut.
        sizes: the size of each split.
        note: a sentence that says why the split is by length, or "".
    """

    kind: str
    whole: Split
    sizes: dict[str, Split]
    note: str = ""


def divide(rows: Iterable[tuple[int, Any, str]], folder: Path, val_fraction: float, drops: Drops) -> Division:
    """Write rows to the two files of `folder`.

    Rows of another kind than nearly all rows are dropped. Each other row goes to validation if its hash, as a fraction
    of `HASHES`, is below `val_fraction`. This division is kept if validation has its share of the characters, give or
    take half of the smaller side.
    Otherwise, the rows are divided by length. Every document longer than a tenth of all characters, and longer than the
    smaller side, is cut, and its end is validation.
    The other documents go to validation whole, in the order of their hashes, until it has its share. The last of them
    is cut if that share would otherwise be missed. Conversations and preferences always stay whole.

    This keeps 16 bytes per row in memory, and about 200 while the split is made by length.

    Args:
        rows: the hash, below `HASHES`, the row and its place. Each has a character that is not white space.
        folder: an empty folder.
        val_fraction: the share of validation, between 0 and 1.
        drops: counts the rows of another kind.

    Raises:
        UserError: there is too little text to be cut, only one conversation or preference, or no clear kind.
    """
    kinds = Kinds()
    counted = ((number, row) for number, row, place in rows if kinds.add(row, place))
    sizes, hashes, lengths = _by_hash(counted, folder, val_fraction)
    kind = kinds.meant()
    if len(kinds.counts) > 1:
        for other in kinds.counts.keys() - {kind}:
            drops.add(misplaced(other, kind), kinds.first[other], kinds.counts[other])
        own = (pair for pair in _again(folder, hashes, val_fraction) if kind_of(pair[1]) == kind)
        sizes, hashes, lengths = _by_hash(own, folder, val_fraction)
    whole = sizes["train"] + sizes["val"]
    share = sizes["val"].characters / max(whole.characters, 1)
    if not whole.rows or abs(share - val_fraction) <= min(val_fraction, 1 - val_fraction) / 2:
        return Division(kind, whole, sizes)

    fractions = (_fractions if kind == "documents" else _sides)(hashes, lengths, val_fraction)
    before = _again(folder, hashes, val_fraction)

    def by_length() -> Iterator[tuple[str, Any]]:
        for (_, row), fraction in zip(before, fractions, strict=True):
            if fraction in (0, 1):
                yield ("val" if fraction else "train"), row
                continue
            end = place_to_cut(row, fraction)
            for split, part in (("train", row[:end]), ("val", row[end:])):
                if part.strip():
                    yield split, part

    sizes = _write(folder, by_length())
    if not all(size.rows for size in sizes.values()):
        raise UserError(_too_few(kind))
    cut = sum(0 < fraction < 1 for fraction in fractions)
    return Division(kind, whole, sizes, _note(kind, whole.rows, cut, val_fraction))


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


def _sides(hashes: Sequence[int], lengths: Sequence[int], val_fraction: float) -> array:
    """Return 1 for each row that is validation and 0 for each other row, for a split by length that cuts no row.

    In the order of the hashes, a row is validation if that brings validation nearer to its share. Both sides get a row.
    """
    pairs = sorted(zip(hashes, lengths, strict=True))
    missing, val = val_fraction * sum(lengths), set()
    for number, length in pairs:
        if length < 2 * missing:
            val.add(number)
            missing -= length
    shortest = min(pairs, key=lambda pair: pair[1])[0]
    val = val - {shortest} if len(val) == len(pairs) else val or {shortest}
    return array("d", (number in val for number in hashes))


def _by_hash(
    rows: Iterable[tuple[int, Any]], folder: Path, val_fraction: float
) -> tuple[dict[str, Split], array, array]:
    """Write each row to the side that its hash says. Return the sizes of the sides, the hashes and the lengths."""
    hashes, lengths = array("Q"), array("Q")

    def sides() -> Iterator[tuple[str, Any]]:
        for number, row in rows:
            hashes.append(number)
            lengths.append(characters(row))
            yield _side(number, val_fraction), row

    return _write(folder, sides()), hashes, lengths


def _again(folder: Path, hashes: Sequence[int], val_fraction: float) -> Iterator[tuple[int, Any]]:
    """Move away the files that `_by_hash` wrote, and yield their rows in the order of `hashes`."""
    before = {split: split_file(folder, split).rename(folder / f"{split}-by-hash.jsonl") for split in SPLITS}

    def rows() -> Iterator[tuple[int, Any]]:
        with before["train"].open("rb") as train, before["val"].open("rb") as val:
            files = {"train": train, "val": val}
            for number in hashes:
                yield number, from_json(json.loads(files[_side(number, val_fraction)].readline()))
        for path in before.values():
            path.unlink()

    return rows()


def _write(folder: Path, rows: Iterable[tuple[str, Any]]) -> dict[str, Split]:
    """Write (split, row) pairs to the two files of `folder` and return the size of each split."""
    sizes = {split: [0, 0, 0] for split in SPLITS}
    with split_file(folder, "train").open("wb") as train, split_file(folder, "val").open("wb") as val:
        files = {"train": train, "val": val}
        for split, row in rows:
            files[split].write(json.dumps(to_json(row), ensure_ascii=False).encode() + b"\n")
            size = sizes[split]
            size[0] += 1
            size[1] += characters(row)
            size[2] += turns(row)
    return {split: Split(*size) for split, size in sizes.items()}


def _too_few(kind: str) -> str:
    if kind == "documents":
        return "The text is too short to be cut into training and validation: add more text."
    return f"There is only one {one_of(kind)}, but training and validation need one each: add more."


def _note(kind: str, rows: int, cut: int, val_fraction: float) -> str:
    if rows == 1:
        return f"one document: its last {100 * val_fraction:.3g} % is validation"
    how = f"no {one_of(kind)} is cut"
    if cut:
        how = f"{cut:,} documents are cut, and their ends are validation"
    if cut == 1:
        how = "one document is cut, and its end is validation"
    return f"split by length, because there are few {kind} or their lengths are very different: {how}"
