"""The report of `prepare`: how many documents it read, dropped and kept."""

from dataclasses import dataclass

from mlx_gpt.errors import printable


@dataclass(frozen=True)
class Split:
    """The size of one split of a corpus: training or validation."""

    documents: int
    characters: int


@dataclass(frozen=True)
class Report:
    """The documents that `prepare` read, dropped and wrote; `str(report)` is for people.

    Attributes:
        documents: number of documents read.
        dropped: number of documents dropped, by reason.
        kept: number of documents kept.
        characters: total length of the documents kept.
        train, val: sizes of the two splits.
        note: a sentence that says why the split is by length, or "".
        skipped: files in the folders that are not text, or .json.
        first: the place of the first document dropped, by reason, where a file has one.
    """

    documents: int
    dropped: dict[str, int]
    kept: int
    characters: int
    train: Split
    val: Split
    note: str
    skipped: tuple[str, ...]
    first: dict[str, str]

    def lines(self) -> list[str]:
        """Return the report as aligned lines of text."""
        rows = [("read", self.documents, "documents", "")]
        rows += [("dropped", count, reason, "") for reason, count in sorted(self.dropped.items())]
        rows += [("kept", self.kept, "documents", f"{self.characters:,} characters")]
        for name, split in (("train", self.train), ("val", self.val)):
            rows += [(name, split.documents, "documents", f"{split.characters:,} characters")]
        number = max(len(f"{row[1]:,}") for row in rows)
        word = max(len(row[2]) for row in rows)
        size = max(len(row[3]) for row in rows)
        lines = []
        for a, b, c, d in rows:
            place = self.first.get(c, "") if a == "dropped" else ""
            lines.append(
                f"{a:8} {b:>{number},} {c:{word}}  {f'first in {place}' if place else f'{d:>{size}}'}".rstrip()
            )
        lines += [self.note] if self.note else []
        for path in self.skipped:
            why = "a .json file, read only where it is named" if path.lower().endswith(".json") else "not text"
            lines.append(f"skipped, {why}: {path}")
        return [printable(line) for line in lines]

    def __str__(self) -> str:
        return "\n".join(self.lines())
