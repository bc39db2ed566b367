"""Turns files into train.jsonl and val.jsonl, without duplicates, for a person to read and edit."""

import itertools
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any

from mlx_gpt.data.kinds import to_json
from mlx_gpt.data.report import Report
from mlx_gpt.data.rows import Dropped, DroppedPart, Drops, normalise
from mlx_gpt.data.schemas import Row
from mlx_gpt.data.sources import (
    BUILTIN,
    FORMAT_VERSION,
    REPORT,
    Source,
    find_sources,
    hash_file,
    hash_of,
    prepared_record,
    read_sources,
    source_fingerprint,
    source_size,
)
from mlx_gpt.data.split import SPLITS, divide, split_file
from mlx_gpt.errors import UserError, os_errors_explained
from mlx_gpt.files import finish_publishing, locked, publish, temporary_folder
from mlx_gpt.progress import ByteProgress, ignore_progress

MLX_LM_VAL = "valid.jsonl"  # mlx-lm's name for val.jsonl


def prepare(
    paths: Iterable[Path | str],
    folder: Path | str,
    *,
    column: str = "",
    documents: str = "auto",
    val_fraction: float = 0.1,
    overwrite: bool = False,
    progress: ByteProgress = ignore_progress,
) -> Report:
    """Write the rows of `paths` to `folder`, as train.jsonl and val.jsonl, with a report.json beside them.

    At least nine rows in ten must be of one kind: documents, conversations or preferences. Rows of another kind, empty
    rows and repeated rows are dropped. `divide` decides which of the other rows are validation.

    `folder` changes only at the very end. If anything fails before that, it stays as it was.

    Args:
        paths: files, folders or "builtin".
        folder: the folder to write to; created if it is missing.
        column: as in `read_rows`.
        documents: as in `read_rows`.
        val_fraction: the share of the text, between 0 and 1, that goes to validation.
        overwrite: replace a corpus that was edited, or made from other paths.
        progress: called with the bytes read so far.

    Raises:
        UserError: a source cannot be read, no row is left, no kind has nine rows in ten, or `folder` has a corpus that
            would be lost.
    """
    folder, paths = Path(folder), list(paths)
    if not 0 < val_fraction < 1:
        raise UserError(f"The validation fraction must be between 0 and 1, not {val_fraction}: 0.1 is usual.")
    sources, skipped = find_sources(paths)
    fingerprint = source_fingerprint(sources, column, documents, val_fraction)

    def check() -> None:
        finish_publishing(folder)
        _refuse_to_overwrite(folder, paths, sources, fingerprint, overwrite)

    with os_errors_explained(f"write to {folder}"):
        check()
    drops, parts = Drops(), Drops()
    rows = _distinct(read_sources(sources, column, documents, progress), drops, parts)
    with os_errors_explained(f"write to {folder}"), temporary_folder(folder) as staged:
        divided = divide(rows, staged, val_fraction, drops)
        if not divided.whole.rows:
            raise UserError(_nothing_left(drops))
        report = Report(
            kind=divided.kind,
            rows=divided.whole.rows + drops.counts.total(),
            dropped=dict(drops.counts),
            dropped_parts=dict(parts.counts),
            kept=divided.whole.rows,
            characters=divided.whole.characters,
            turns=divided.whole.turns,
            train=divided.sizes["train"],
            val=divided.sizes["val"],
            note=divided.note,
            skipped=tuple(map(str, skipped)),
            first=drops.first | parts.first,
        )
        record = asdict(report) | {
            "paths": [BUILTIN if str(path) == BUILTIN else str(Path(path).resolve()) for path in paths],
            "folder": str(folder.resolve()),
            "sources": [{"path": str(source), "bytes": source_size(source)} for source in sources],
            "settings": {
                "column": column,
                "documents": documents,
                "val_fraction": val_fraction,
                "format": FORMAT_VERSION,
            },
            "source_fingerprint": fingerprint,
            "fingerprint": fingerprint_of(staged, "text", ""),
        }
        text = json.dumps(record, ensure_ascii=False, indent=2) + "\n"
        # File names that are not UTF-8 become JSON's own escapes.
        (staged / REPORT).write_text(text, encoding="utf-8", errors="backslashreplace")
        with locked(folder):
            check()  # again, because the corpus may have been edited or replaced while the sources were read
            publish(staged, folder)
    return report


def find_split(folder: Path, split: str) -> Path | None:
    """Return the .jsonl or .txt file of a split, if there is one. For "val", mlx-lm's valid.jsonl also counts.

    Raises:
        UserError: there are several.
    """
    names = [split_file(folder, split).name, f"{split}.txt", *([MLX_LM_VAL] if split == "val" else [])]
    found = [path for name in names if (path := folder / name).is_file()]
    if len(found) > 1:
        raise UserError(f"{folder} has both {found[0].name} and {found[1].name}: move one of them away.")
    return found[0] if found else None


def fingerprint_of(folder: Path, column: str, cut: str) -> str:
    """Hash the two files of `folder`, each with the setting that decides how it is read."""
    files = [path for split in SPLITS if (path := find_split(folder, split))]
    return hash_of([(hash_file(path), cut if path.suffix == ".txt" else column or "text") for path in files])


def _distinct(rows: Iterable[tuple[Row, str]], drops: Drops, parts: Drops) -> Iterator[tuple[int, Any, str]]:
    """Yield each row once, normalised, between the hash that `divide` needs and its place. Count the rest in `drops`.

    Only the hashes of the rows stay in memory, 16 bytes each.
    """
    seen: set[bytes] = set()
    for row, place in rows:
        if isinstance(row, Dropped):
            (parts if isinstance(row, DroppedPart) else drops).add(row.reason, place)
        elif not row or (isinstance(row, str) and not row.strip()):
            drops.add("empty")
        else:
            row = normalise(row) if isinstance(row, str) else row
            text = row if isinstance(row, str) else json.dumps(to_json(row), ensure_ascii=False)
            digest = blake2b(text.encode(), digest_size=16).digest()
            if digest in seen:
                drops.add("repeated")
            else:
                seen.add(digest)
                yield int.from_bytes(digest[:8], "big"), row, place


def _nothing_left(drops: Drops) -> str:
    if not drops.counts:
        return "There are no documents to prepare: name files with text in them."
    places = {reason: f", first in {place}" for reason, place in drops.first.items()}
    reasons = "; ".join(f"{count:,} {reason}{places.get(reason, '')}" for reason, count in drops.counts.most_common())
    return f"Nothing is left to train on, because everything was dropped ({reasons}): check the file and --column."


def _refuse_to_overwrite(
    folder: Path, paths: list[Path | str], sources: list[Source], fingerprint: str, overwrite: bool
) -> None:
    """Refuse a `folder` in which a file would be lost that cannot be made again by the same command.

    Raises:
        UserError: a train or val file is a source, or was written or edited by hand, or was made from other paths.
    """
    names = [f"{split}.{suffix}" for split in SPLITS for suffix in ("jsonl", "txt")]
    there = [path for name in (*names, MLX_LM_VAL) if (path := folder / name).exists()]
    for path, source in itertools.product(there, sources):
        if source != BUILTIN and path.samefile(source):  # a Mac's disk takes a name in any capitals
            raise UserError(f"{source} is a source and would be overwritten: choose another folder to write to.")
    if by_hand := [path.name for path in there if path.suffix == ".txt" or path.name == MLX_LM_VAL]:
        raise UserError(
            f"{folder} has a {by_hand[0]} that was written or edited by hand: move it away or choose another folder."
        )
    if not there or overwrite:
        return
    record = prepared_record(folder)
    if record.get("fingerprint") != fingerprint_of(folder, "text", ""):
        raise UserError(
            f"{folder} has a {there[0].name} that was written or edited by hand: choose another folder with --out, or "
            "replace it with --overwrite."
        )
    now = {Path(path).resolve() for path in (*paths, *sources)}
    # If the whole project was moved, a path is still where it was as seen from the corpus.
    moved = {path: folder.resolve() / os.path.relpath(path, record["folder"]) for path in record["paths"]}
    lost = [path for path in moved if now.isdisjoint((Path(path).resolve(), moved[path].resolve()))]
    if lost and record["source_fingerprint"] != fingerprint:
        raise UserError(
            f"{folder} holds the text of {lost[0]}: choose another folder with --out, or replace it with --overwrite."
        )
