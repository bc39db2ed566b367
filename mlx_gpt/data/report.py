"""The report of `prepare`: how many documents, conversations or preferences it read, dropped and kept."""

from dataclasses import dataclass

from mlx_gpt.data.kinds import noun
from mlx_gpt.errors import printable


@dataclass(frozen=True)
class Split:
    """The size of a corpus, or of one of its splits.

    Attributes:
        rows: number of documents, conversations or preferences.
        characters: total length of their texts.
        turns: number of messages of the user and the assistant in conversations.
    """

    rows: int = 0
    characters: int = 0
    turns: int = 0

    def __add__(self, other: "Split") -> "Split":
        """Return the size of both."""
        return Split(self.rows + other.rows, self.characters + other.characters, self.turns + other.turns)


@dataclass(frozen=True)
class Report:
    """The rows that `prepare` read, dropped and wrote; `str(report)` is for people.

    Attributes:
        kind: the kind of the rows, one of `KINDS`.
        rows: number of rows read.
        dropped: number of rows dropped, by reason.
        dropped_parts: number of parts of rows dropped, by reason.
        kept: number of rows kept.
        characters: total length of the rows kept.
        turns: number of turns in the conversations kept.
        train, val: sizes of the two splits.
        note: a sentence that says why the split is by length, or "".
        skipped: files in the folders that are not text, or .json.
        first: the place of the first row dropped, by reason, where a file has one.
    """

    kind: str
    rows: int
    dropped: dict[str, int]
    dropped_parts: dict[str, int]
    kept: int
    characters: int
    turns: int
    train: Split
    val: Split
    note: str
    skipped: tuple[str, ...]
    first: dict[str, str]

    def lines(self) -> list[str]:
        """Return the report as aligned lines of text."""
        kept = Split(self.kept, self.characters, self.turns)
        sizes = {"kept": kept, "train": self.train, "val": self.val}
        details = _aligned(list(sizes.values()))
        read = self.kind if self.kind == "documents" else "rows"
        rows = [("read", self.rows, noun(self.rows, read), "")]
        for what, counts in (("dropped", self.dropped), ("cut off", self.dropped_parts)):
            for reason, count in sorted(counts.items()):
                rows.append((what, count, reason, f"first in {self.first[reason]}" if reason in self.first else ""))
        for (what, size), detail in zip(sizes.items(), details, strict=True):
            rows.append((what, size.rows, noun(size.rows, self.kind), detail))
        number = max(len(f"{row[1]:,}") for row in rows)
        word = max(len(row[2]) for row in rows)
        lines = [f"{a:8} {b:>{number},} {c:{word}}  {d}".rstrip() for a, b, c, d in rows]
        lines += [self.note] if self.note else []
        for path in self.skipped:
            is_json = path.lower().endswith(".json")
            why = "because a .json file in a folder is not read unless you name it" if is_json else "not text"
            lines.append(f"skipped, {why}: {path}")
        return [printable(line) for line in lines]

    def __str__(self) -> str:
        return "\n".join(self.lines())


def _aligned(sizes: list[Split]) -> list[str]:
    """Return a line for each size, with the numbers below each other."""
    columns = {
        name: [f"{getattr(size, name):,}" for size in sizes]
        for name in ("turns", "characters")
        if any(getattr(size, name) for size in sizes)
    }
    widths = {name: max(map(len, numbers)) for name, numbers in columns.items()}
    return [
        "  ".join(f"{numbers[i]:>{widths[name]}} {name}" for name, numbers in columns.items())
        for i in range(len(sizes))
    ]
