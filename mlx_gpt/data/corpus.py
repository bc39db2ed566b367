"""Documents to a corpus: `train.jsonl` and `val.jsonl`, without repetitions, which a person can read and edit."""

import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path

from mlx_gpt.data.readers import Dropped, plainly, read_documents
from mlx_gpt.data.report import Report, Split
from mlx_gpt.data.sources import (
    BUILTIN,
    FORMAT,
    Source,
    find_sources,
    hash_file,
    hash_of,
    prepared_record,
    read_sources,
    source_fingerprint,
    source_size,
)
from mlx_gpt.errors import UserError
from mlx_gpt.files import sync

SPLITS = ("train", "val")


@dataclass(frozen=True)
class Corpus:
    """Two files of documents.

    Attributes:
        name: for people.
        folder: where the files are.
        fingerprint: in hex; changes with their content and with the way they are read.
        column: of their tables, as in `read_documents`.
        cut: how .txt files are cut into documents, as in `read_documents`.
    """

    name: str
    folder: Path
    fingerprint: str
    column: str = ""
    cut: str = "auto"

    def path(self, split: str) -> Path:
        """Return the file of `split`, "train" or "val".

        Raises:
            UserError: there is none, or there are two.
        """
        found = _split_file(self.folder, split)
        if found is None:
            raise UserError(f"{self.folder} has no {split}.jsonl or {split}.txt: prepare it again.")
        return found

    def documents(self, split: str) -> Iterator[str]:
        """Yield the documents of `split`, normalised, without those that are empty or unusable.

        Raises:
            UserError: the file is missing, or as `read_documents` does.
        """
        for document in read_documents(self.path(split), column=self.column, documents=self.cut):
            if not isinstance(document, Dropped) and document.strip():
                yield normalise(document)


def normalise(text: str) -> str:
    """Return `text` with CRLF and lone CR turned into LF, and every other character as it is."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def prepare(
    paths: Iterable[Path | str],
    folder: Path | str,
    *,
    column: str = "",
    documents: str = "auto",
    val_fraction: float = 0.1,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Write the documents of `paths` (files, folders or "builtin") to `folder`/train.jsonl, val.jsonl and report.json.

    Empty and repeated documents are dropped. A document goes to validation when the hash of its text, as a fraction of
    all hashes, is below `val_fraction`: its side depends on nothing else. When that leaves one side empty, each
    document is cut instead, and its last `val_fraction` is validation.

    `folder` changes only at the very end, and all at once; if anything fails before, it stays as it was.

    Args:
        paths: what to read.
        folder: what to write to; made if it is missing.
        column: as in `read_documents`.
        documents: as in `read_documents`.
        val_fraction: the part, between 0 and 1, that is for validation.
        progress: called now and then with the bytes done and the bytes in all.

    Raises:
        UserError: a source cannot be read, nothing is left, or `folder` holds what a person wrote by hand.
    """
    folder = Path(folder)
    if not 0 < val_fraction < 1:
        raise UserError(f"The validation fraction must lie between 0 and 1, not at {val_fraction}: 0.1 is usual.")
    sources, passed_over = find_sources(paths)
    _refuse_to_overwrite(folder, sources)
    dropped: Counter[str] = Counter()
    texts = _distinct(read_sources(sources, column, documents, progress), dropped)
    with plainly("write", folder):
        folder.mkdir(parents=True, exist_ok=True)
        # Inside `folder`, so that the files get their names by renaming, which never leaves half a file.
        with tempfile.TemporaryDirectory(prefix=".preparing-", dir=folder) as temporary:
            staged = Path(temporary)
            sizes = _write(staged, _by_hash(texts, val_fraction))
            kept = sum(size.documents for size in sizes.values())
            characters = sum(size.characters for size in sizes.values())
            if not kept:
                raise UserError(_nothing_left(dropped))
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
                passed_over=tuple(map(str, passed_over)),
            )
            record = asdict(report) | {
                "sources": [{"path": str(source), "bytes": source_size(source)} for source in sources],
                "settings": {"column": column, "documents": documents, "val_fraction": val_fraction, "format": FORMAT},
                "source_fingerprint": source_fingerprint(sources, column, documents, val_fraction),
                "fingerprint": _fingerprint(staged, "text", ""),
            }
            text = json.dumps(record, ensure_ascii=False, indent=2) + "\n"
            (staged / "report.json").write_text(text, encoding="utf-8")
            _publish(staged, folder)
    return report


def open_corpus(
    data: Path | str,
    *,
    column: str = "",
    documents: str = "auto",
    val_fraction: float = 0.1,
    cache: Path | str = Path("data/cache"),
    echo: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Corpus:
    """Return the corpus at `data`: a folder with a train and a val file as it is; anything else is prepared first.

    What is prepared (a file, a folder of files or of only a train file, "builtin") goes to a folder in `cache` that is
    named after the content of `data` and the settings, and is found there the next time.

    Args:
        data: the file, the folder or "builtin".
        column: as in `read_documents`.
        documents: as in `read_documents`.
        val_fraction: as in `prepare`.
        cache: the folder of the folders that are prepared.
        echo: is told, one line at a time, what was prepared.
        progress: as in `prepare`.

    Raises:
        UserError: as `prepare` does; or the train or val file of a folder is there twice, missing or empty.
    """
    path = Path(data)
    sources: list[Path | str] = [data]
    name = BUILTIN if str(data) == BUILTIN else path.stem
    with plainly("read", path):
        if str(data) != BUILTIN and path.is_dir():
            name = path.resolve().name
            train, val = (_split_file(path, split) for split in SPLITS)
            if train and val:
                return _as_it_is(name, path, column, documents)
            if val:
                raise UserError(f"{path} has {val.name} but no train.jsonl or train.txt: add one.")
            if train:
                sources = [train]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "data"
    fingerprint = source_fingerprint(find_sources(sources)[0], column, documents, val_fraction)
    folder = Path(cache) / f"{name}-{fingerprint[:8]}"
    complete = all(_file(folder, split).exists() for split in SPLITS)
    if not complete or prepared_record(folder).get("source_fingerprint") != fingerprint:
        _file(folder, "train").unlink(missing_ok=True)  # nobody's but this cache's
        report = prepare(
            sources, folder, column=column, documents=documents, val_fraction=val_fraction, progress=progress
        )
        if echo:
            echo(f"prepared {data} in {folder}")
            for line in report.lines():
                echo(line)
    return _as_it_is(name, folder, "", "auto")


# ---- documents ------------------------------------------------------------------------------------------------------


def _distinct(documents: Iterable[str | Dropped], dropped: Counter[str]) -> Iterator[tuple[bytes, str]]:
    """Yield each text once, normalised, with its digest; count the others in `dropped`. Keeps 16 bytes of each."""
    seen: set[bytes] = set()
    for document in documents:
        if isinstance(document, Dropped):
            dropped[document.reason] += 1
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
        assert isinstance(text, str)  # they come from what we wrote
        end = int(len(text) * (1 - val_fraction))
        for split, part in (("train", text[:end]), ("val", text[end:])):
            if part.strip():
                yield split, part


def _cut_each(folder: Path, split: str, val_fraction: float) -> dict[str, Split]:
    """Share out the documents of `split`, which has them all, by cutting each one in two."""
    whole = _file(folder, split).rename(folder / "whole.jsonl")
    sizes = _write(folder, _by_position(read_documents(whole, column="text"), val_fraction))
    if not all(size.documents for size in sizes.values()):
        raise UserError("The text is too short to be cut into training and validation: give more of it.")
    return sizes


def _write(folder: Path, texts: Iterable[tuple[str, str]]) -> dict[str, Split]:
    """Write (split, text) pairs to the two files of `folder` and return how much went into each."""
    documents: Counter[str] = Counter()
    characters: Counter[str] = Counter()
    with _file(folder, "train").open("wb") as train, _file(folder, "val").open("wb") as val:
        files = {"train": train, "val": val}
        for split, text in texts:
            files[split].write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
            documents[split] += 1
            characters[split] += len(text)
    return {split: Split(documents[split], characters[split]) for split in SPLITS}


def _nothing_left(dropped: Counter[str]) -> str:
    if not dropped:
        return "There are no documents in what was given: name files with text in them."
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.most_common())
    return f"Nothing is left to train on, as every document was dropped ({reasons}): check the file and its --column."


# ---- corpora --------------------------------------------------------------------------------------------------------


def _file(folder: Path, split: str) -> Path:
    return folder / f"{split}.jsonl"


def _split_file(folder: Path, split: str) -> Path | None:
    found = [path for path in (_file(folder, split), folder / f"{split}.txt") if path.is_file()]
    if len(found) == 2:
        raise UserError(f"{folder} has both {split}.jsonl and {split}.txt: move away the one that is not meant.")
    return found[0] if found else None


def _fingerprint(folder: Path, column: str, cut: str) -> str:
    """Hash the two files of `folder`, each with the option that decides how its kind is read."""
    files = [path for split in SPLITS if (path := _split_file(folder, split))]
    return hash_of([(hash_file(path), cut if path.suffix == ".txt" else column or "text") for path in files])


def _as_it_is(name: str, folder: Path, column: str, documents: str) -> Corpus:
    """Return the corpus of the files in `folder`, after a look whether each has a document."""
    if prepared_record(folder):
        column = "text"  # the option names a column of the source, and prepared files have but this one
    cut = "line" if documents == "auto" else documents
    corpus = Corpus(name, folder, _fingerprint(folder, column, cut), column, cut)
    for split in SPLITS:
        if next(corpus.documents(split), None) is None:
            raise UserError(f"{corpus.path(split)} has no document in it: put some text there.")
    return corpus


def _refuse_to_overwrite(folder: Path, sources: list[Source]) -> None:
    """Raise `UserError` if `folder` has a train or val file that is a source, or that `prepare` did not write so."""
    with plainly("write", folder):
        there = [path for split in SPLITS for path in (_file(folder, split), folder / f"{split}.txt") if path.exists()]
        if both := {path.resolve() for path in there} & {Path(source).resolve() for source in sources}:
            raise UserError(f"{both.pop()} is read and would be replaced: choose another folder to write to.")
    record = prepared_record(folder)
    ours = bool(record) and all(path.suffix == ".jsonl" for path in there)
    if ours and there != [_file(folder, "val")]:  # which alone is what a prepare that was killed while renaming leaves
        ours = record.get("fingerprint") == _fingerprint(folder, "text", "")
    if there and not ours:
        raise UserError(
            f"{folder} has a {there[0].name} that was written or edited by hand: move it away or choose another folder."
        )


def _publish(staged: Path, folder: Path) -> None:
    """Move the three files from `staged` to `folder`.

    The training file leaves first and comes last, so that a kill in between never leaves a pair that does not match.
    """
    _file(folder, "train").unlink(missing_ok=True)
    for name in ("report.json", "val.jsonl", "train.jsonl"):
        sync(staged / name)
        (staged / name).replace(folder / name)
    sync(folder)
