"""Turns documents into a corpus: `train.jsonl` and `val.jsonl`, without duplicates, for a person to read and edit."""

import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path

from mlx_gpt.data.documents import Dropped, read_documents
from mlx_gpt.data.report import Report, Split
from mlx_gpt.data.sources import (
    BUILTIN,
    FORMAT_VERSION,
    PREPARED_FILES,
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
from mlx_gpt.errors import UserError, os_errors_explained
from mlx_gpt.files import sync
from mlx_gpt.progress import ByteProgress, Echo, ignore_line, ignore_progress

SPLITS = ("train", "val")


@dataclass(frozen=True)
class Corpus:
    """A file of documents for training, and one for validation.

    Attributes:
        name: a name for people.
        folder: the folder of the two files.
        fingerprint: a hash in hex that changes with the files' content and with the way they are read.
        column: the text column of .jsonl files, as in `read_documents`.
        cut: how .txt files are cut into documents, as `documents` in `read_documents`.
    """

    name: str
    folder: Path
    fingerprint: str
    column: str = ""
    cut: str = "auto"

    def path(self, split: str) -> Path:
        """Return the file of a split, "train" or "val".

        Raises:
            UserError: there is no such file, or there are two.
        """
        found = _split_file(self.folder, split)
        if found is None:
            raise UserError(f"{self.folder} has no {split}.jsonl or {split}.txt: prepare it again.")
        return found

    def documents(self, split: str) -> Iterator[str]:
        """Yield the usable documents of a split, normalised.

        Raises:
            UserError: the file is missing, or as in `read_documents`.
        """
        return usable(read_documents(self.path(split), column=self.column, documents=self.cut))


def normalise(text: str) -> str:
    """Return `text` with CRLF and lone CR replaced by LF, and every other character unchanged."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def usable(documents: Iterable[str | Dropped]) -> Iterator[str]:
    """Yield the documents that are neither dropped nor empty, normalised."""
    for document in documents:
        if not isinstance(document, Dropped) and document.strip():
            yield normalise(document)


def prepare(
    paths: Iterable[Path | str],
    folder: Path | str,
    *,
    column: str = "",
    documents: str = "auto",
    val_fraction: float = 0.1,
    progress: ByteProgress = ignore_progress,
) -> Report:
    """Write the documents of `paths` to `folder`, as train.jsonl and val.jsonl, with a report.json beside them.

    Empty and repeated documents are dropped. A document goes to validation if the hash of its text, as a fraction of
    all hashes, is below `val_fraction`; nothing else decides its split. If that leaves a split empty, every document
    is cut in two instead, and its last `val_fraction` goes to validation.

    `folder` changes only at the very end. If anything fails before that, it stays as it was.

    Args:
        paths: files, folders or "builtin".
        folder: the folder to write to; created if it is missing.
        column: as in `read_documents`.
        documents: as in `read_documents`.
        val_fraction: the fraction of the documents, between 0 and 1, that goes to validation.
        progress: called with the bytes read so far.

    Raises:
        UserError: a source cannot be read, no document is left, or `folder` has a corpus that was written by hand.
    """
    folder = Path(folder)
    if not 0 < val_fraction < 1:
        raise UserError(f"The validation fraction must be between 0 and 1, not {val_fraction}: 0.1 is usual.")
    sources, skipped = find_sources(paths)
    _refuse_to_overwrite(folder, sources)
    dropped: Counter[str] = Counter()
    first: dict[str, str] = {}
    texts = _distinct(read_sources(sources, column, documents, progress), dropped, first)
    with os_errors_explained(f"write to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        # Inside `folder`, so that the finished files can be moved by renaming, which never leaves half a file.
        with tempfile.TemporaryDirectory(prefix=".preparing-", dir=folder) as temporary:
            staged = Path(temporary)
            sizes = _write(staged, _by_hash(texts, val_fraction))
            kept = sum(size.documents for size in sizes.values())
            characters = sum(size.characters for size in sizes.values())
            if not kept:
                raise UserError(_nothing_left(dropped, first))
            if cut := not all(size.documents for size in sizes.values()):
                sizes = _cut_each(staged, "train" if sizes["train"].documents else "val", val_fraction)
            report = Report(
                documents=kept + dropped.total(),
                dropped=dict(dropped),
                kept=kept,
                characters=characters,
                train=sizes["train"],
                val=sizes["val"],
                cut=cut,
                skipped=tuple(map(str, skipped)),
                first=first,
            )
            record = asdict(report) | {
                "sources": [{"path": str(source), "bytes": source_size(source)} for source in sources],
                "settings": {
                    "column": column,
                    "documents": documents,
                    "val_fraction": val_fraction,
                    "format": FORMAT_VERSION,
                },
                "source_fingerprint": source_fingerprint(sources, column, documents, val_fraction),
                "fingerprint": _fingerprint(staged, "text", ""),
            }
            text = json.dumps(record, ensure_ascii=False, indent=2) + "\n"
            # File names that are not UTF-8 become JSON's own escapes.
            (staged / REPORT).write_text(text, encoding="utf-8", errors="backslashreplace")
            _publish(staged, folder)
    return report


def open_corpus(
    data: Path | str,
    *,
    column: str = "",
    documents: str = "auto",
    val_fraction: float = 0.1,
    cache: Path | str = Path("data/cache"),
    echo: Echo = ignore_line,
    progress: ByteProgress = ignore_progress,
) -> Corpus:
    """Return the corpus at `data`, preparing it first if necessary.

    A folder with a train file and a val file is used unchanged. Everything else (a file, a folder of files, a folder
    with only a train file, or "builtin") is prepared into a folder in `cache`. That folder is named after the content
    and the settings, so it is found again the next time.

    Args:
        data: a file, a folder or "builtin".
        column: as in `read_documents`.
        documents: as in `read_documents`.
        val_fraction: as in `prepare`.
        cache: the folder in which corpora are prepared.
        echo: called with each line of the report, if a corpus was prepared.
        progress: as in `prepare`.

    Raises:
        UserError: as in `prepare`; or the train or val file of a folder is missing, empty or there twice.
    """
    path = Path(data)
    sources: list[Path | str] = [data]
    name = BUILTIN if str(data) == BUILTIN else path.stem
    with os_errors_explained(f"read {path}"):
        if str(data) != BUILTIN and path.is_dir():
            name = path.resolve().name
            train, val = (_split_file(path, split) for split in SPLITS)
            if train and val:
                return _opened(name, path, column, documents)
            if val:
                raise UserError(f"{path} has {val.name} but no train.jsonl or train.txt: add one.")
            if train:
                sources = [train]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "data"
    fingerprint = source_fingerprint(find_sources(sources)[0], column, documents, val_fraction)
    folder = Path(cache) / f"{name}-{fingerprint[:8]}"
    complete = all(_file(folder, split).exists() for split in SPLITS)
    if not complete or prepared_record(folder).get("source_fingerprint") != fingerprint:
        _file(folder, "train").unlink(missing_ok=True)  # it belongs to the cache, so nobody's work is lost
        report = prepare(
            sources, folder, column=column, documents=documents, val_fraction=val_fraction, progress=progress
        )
        echo(f"prepared {data} in {folder}")
        for line in report.lines():
            echo(line)
    return _opened(name, folder, "", "auto")


# ---- documents ------------------------------------------------------------------------------------------------------


def _distinct(
    documents: Iterable[str | Dropped], dropped: Counter[str], first: dict[str, str]
) -> Iterator[tuple[bytes, str]]:
    """Yield each text once, normalised, with its hash, and count the other documents in `dropped`.

    The place of the first that was dropped for a reason is put into `first`. Only the hash of each text, 16 bytes, is
    kept in memory.
    """
    seen: set[bytes] = set()
    for document in documents:
        if isinstance(document, Dropped):
            dropped[document.reason] += 1
            first.setdefault(document.reason, document.place)
        elif not document.strip():
            dropped["empty"] += 1
        else:
            text = normalise(document)
            digest = blake2b(text.encode(), digest_size=16).digest()
            if digest in seen:
                dropped["repeated"] += 1
            else:
                seen.add(digest)
                yield digest, text


def _by_hash(texts: Iterable[tuple[bytes, str]], val_fraction: float) -> Iterator[tuple[str, str]]:
    for digest, text in texts:
        yield "val" if int.from_bytes(digest[:8], "big") / 2**64 < val_fraction else "train", text


def _by_position(texts: Iterable[str | Dropped], val_fraction: float) -> Iterator[tuple[str, str]]:
    for text in texts:
        assert isinstance(text, str)  # because `_write` wrote the file
        end = int(len(text) * (1 - val_fraction))
        for split, half in (("train", text[:end]), ("val", text[end:])):
            if half.strip():
                yield split, half


def _cut_each(folder: Path, split: str, val_fraction: float) -> dict[str, Split]:
    """Cut each document in two, for the two splits. Until now `split` has all of them."""
    whole = _file(folder, split).rename(folder / "whole.jsonl")
    sizes = _write(folder, _by_position(read_documents(whole, column="text"), val_fraction))
    if not all(size.documents for size in sizes.values()):
        raise UserError("The text is too short to be cut into training and validation: add more text.")
    return sizes


def _write(folder: Path, texts: Iterable[tuple[str, str]]) -> dict[str, Split]:
    """Write (split, text) pairs to the two files of `folder` and return the size of each split."""
    documents: Counter[str] = Counter()
    characters: Counter[str] = Counter()
    with _file(folder, "train").open("wb") as train, _file(folder, "val").open("wb") as val:
        files = {"train": train, "val": val}
        for split, text in texts:
            files[split].write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
            documents[split] += 1
            characters[split] += len(text)
    return {split: Split(documents[split], characters[split]) for split in SPLITS}


def _nothing_left(dropped: Counter[str], first: dict[str, str]) -> str:
    if not dropped:
        return "There are no documents to prepare: name files with text in them."
    places = {reason: f", first in {place}" for reason, place in first.items()}
    reasons = "; ".join(f"{count:,} {reason}{places.get(reason, '')}" for reason, count in dropped.most_common())
    return f"Nothing is left to train on, because every document was dropped ({reasons}): check the file and --column."


# ---- corpora --------------------------------------------------------------------------------------------------------


def _file(folder: Path, split: str) -> Path:
    return folder / f"{split}.jsonl"


def _split_file(folder: Path, split: str) -> Path | None:
    found = [path for path in (_file(folder, split), folder / f"{split}.txt") if path.is_file()]
    if len(found) == 2:
        raise UserError(f"{folder} has both {split}.jsonl and {split}.txt: move one of them away.")
    return found[0] if found else None


def _fingerprint(folder: Path, column: str, cut: str) -> str:
    """Hash the two files of `folder`, each with the setting that decides how it is read."""
    files = [path for split in SPLITS if (path := _split_file(folder, split))]
    return hash_of([(hash_file(path), cut if path.suffix == ".txt" else column or "text") for path in files])


def _opened(name: str, folder: Path, column: str, documents: str) -> Corpus:
    """Return the corpus in `folder`, after checking that each of its files has a document."""
    if prepared_record(folder):
        column = "text"  # the setting names a column of the source, but a prepared file has only this one
    cut = "line" if documents == "auto" else documents
    corpus = Corpus(name, folder, _fingerprint(folder, column, cut), column, cut)
    for split in SPLITS:
        if next(corpus.documents(split), None) is None:
            raise UserError(f"{corpus.path(split)} has no document in it: add some text.")
    return corpus


def _refuse_to_overwrite(folder: Path, sources: list[Source]) -> None:
    """Refuse a `folder` whose train or val file is a source, or was not left there by `prepare`.

    Raises:
        UserError: the sentence names such a file.
    """
    with os_errors_explained(f"write to {folder}"):
        there = [path for split in SPLITS for path in (_file(folder, split), folder / f"{split}.txt") if path.exists()]
        if both := {path.resolve() for path in there} & {Path(source).resolve() for source in sources}:
            raise UserError(f"{both.pop()} is a source and would be overwritten: choose another folder to write to.")
    record = prepared_record(folder)
    ours = bool(record) and all(path.suffix == ".jsonl" for path in there)
    # A `prepare` that is killed while it renames leaves val.jsonl alone. Otherwise the files must be unchanged.
    if ours and there != [_file(folder, "val")]:
        ours = record.get("fingerprint") == _fingerprint(folder, "text", "")
    if there and not ours:
        raise UserError(
            f"{folder} has a {there[0].name} that was written or edited by hand: move it away or choose another folder."
        )


def _publish(staged: Path, folder: Path) -> None:
    """Move the three files from `staged` to `folder`.

    The old training file is removed first and the new one is moved last, so a kill in between never leaves two files
    that do not belong together.
    """
    _file(folder, "train").unlink(missing_ok=True)
    for name in PREPARED_FILES:
        sync(staged / name)
        (staged / name).replace(folder / name)
    sync(folder)
