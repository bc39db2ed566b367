"""What became of the documents on their way to a corpus."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Split:
    """The size of one side of the corpus."""

    documents: int
    characters: int


@dataclass(frozen=True)
class Report:
    """What `prepare` read, dropped and wrote; `str(report)` is for people.

    Attributes:
        documents: how many were read.
        dropped: how many were left out, by reason.
        kept: how many are left.
        characters: how many those have.
        train, val: the two sides.
        cut: whether there were too few documents to share out, so that each one was cut in two.
        passed_over: files in the folders that hold no text.
    """

    documents: int
    dropped: dict[str, int]
    kept: int
    characters: int
    train: Split
    val: Split
    cut: bool
    passed_over: tuple[str, ...]

    def lines(self) -> list[str]:
        """Return the report as aligned lines of text."""
        rows = [("read", self.documents, "documents", "")]
        rows += [("dropped", count, reason, "") for reason, count in sorted(self.dropped.items())]
        rows += [("kept", self.kept, "documents", f"{self.characters:,} characters")]
        for name, split in (("train", self.train), ("val", self.val)):
            unit = "beginnings" if name == "train" else "ends"
            rows += [(name, split.documents, unit if self.cut else "documents", f"{split.characters:,} characters")]
        number = max(len(f"{row[1]:,}") for row in rows)
        word = max(len(row[2]) for row in rows)
        size = max(len(row[3]) for row in rows)
        lines = [f"{a:8} {b:>{number},} {c:{word}}  {d:>{size}}".rstrip() for a, b, c, d in rows]
        return lines + [f"passed over, not text: {path}" for path in self.passed_over]

    def __str__(self) -> str:
        return "\n".join(self.lines())
