"""Make files of every shape with a known content, and check that nothing in them is lost in silence.

    python -m tests.data.fuzz --files 2000

A sound file must give exactly its documents. An odd one, such as a table with unquoted commas, may be refused, or may
drop rows, but each word of its texts is then in a document, or in a row that was counted.
"""

import argparse
import codecs
import csv
import io
import json
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from mlx_gpt.data.documents import read_rows
from mlx_gpt.data.rows import Dropped
from mlx_gpt.data.schemas import Row
from mlx_gpt.errors import UserError

JUNK = [
    " ",
    ", ",
    "; ",
    " | ",
    "\t",
    '"',
    '""',
    "'",
    "\n",
    "\r\n",
    "\r",
    "\n\n",
    "\u2028",
    "\f",
    "\\",
    '\\"',
    "#",
    "🦆",
    "漢字",
    "é",
]
JUNK += ["{", "]", ": ", "\ufeff", "\0", "  ", ' "', '",', ",", "\x1c"]
SEPARATORS = [",", ";", "\t", "|"]
ENCODINGS = {
    "utf-8": b"",
    "utf-8-sig": b"",
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}


NAMES = {"text", "body", "grade"}


@dataclass
class Made:
    """A file with a known content.

    Attributes:
        shape: what it is, for the report.
        name, content: the file.
        texts: its documents, as a person would read them.
        expected: what must be read if the file is sound, with None for a row that is dropped; None if it is odd.
        options: the arguments of `read_rows`.
    """

    shape: str
    name: str
    content: bytes
    texts: list[str]
    expected: list[str | None] | None = None
    options: dict[str, str] = field(default_factory=dict)


class Maker:
    """Makes files from a seed. Each word in their texts is there once, so that it can be found again."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.words = 0

    def make(self) -> Made:
        """Return the next file."""
        kinds: list[Callable[[], Made]] = [
            self.plain, self.table, self.table, self.sheet, self.odd_table, self.odd_table, self.odd_table,
            self.objects, self.objects, self.odd_objects, self.odd_objects,
        ]  # fmt: skip
        return self.draw.choice(kinds)()

    def chance(self, probability: float = 0.5) -> bool:
        return self.draw.random() < probability

    def text(self, junk: list[str] | None = None) -> str:
        """Return some words with anything between, before and after them."""
        parts = []
        for _ in range(self.draw.randint(1, 6)):
            self.words += 1
            parts += [self.draw.choice(junk or JUNK) if self.chance(0.8) else " ", f"word{self.words}."]
        return "".join(parts[self.chance(0.7) :]) + (self.draw.choice(junk or JUNK) if self.chance(0.2) else "")

    def rows(self) -> int:
        """Return a number of rows: mostly few, sometimes more than are sampled."""
        return self.draw.randint(101, 160) if self.chance(0.15) else self.draw.randint(1, 12)

    def texts(self, junk: list[str] | None = None) -> list[str]:
        return [self.text(junk) for _ in range(self.rows())]

    def encoded(self, content: str) -> bytes:
        """Return the content in one of the encodings that are read."""
        encoding = self.draw.choice(["utf-8", *ENCODINGS])
        return ENCODINGS[encoding] + content.encode(encoding)

    def plain(self) -> Made:
        """Return a sound text file."""
        cut = self.draw.choice(["line", "blank-line", "file"])
        ending = self.draw.choice(["\n", "\r\n", "\r"])
        junk = [mark for mark in JUNK if not set(mark) & set("\r\n") or cut == "file"]
        texts = self.texts(junk)
        if cut == "file":
            texts = ["".join(texts)]
        between = {"line": ending, "blank-line": 2 * ending, "file": ""}[cut]
        content = between.join(texts) + between * self.chance()
        texts = [text.lstrip("\ufeff\0") if i == 0 else text for i, text in enumerate(texts)]
        content = content.lstrip("\ufeff\0")
        return Made(f"text, {cut}", "a.txt", self.encoded(content), texts, [*texts], {"documents": cut})

    def table(self) -> Made:
        """Return a sound CSV or TSV file."""
        mark = self.draw.choice(SEPARATORS)
        ending = self.draw.choice(["\n", "\r\n", "\r"])
        texts = self.texts()
        width = self.draw.randint(1, 4)
        index = self.draw.randrange(width)
        name = self.draw.choice(["text", "Text", " TEXT ", "body"])
        special = (mark, '"', "\n", "\r") if self.chance() else ("",)  # quotation marks where needed, or everywhere

        def quoted(text: str) -> str:
            return '"' + text.replace('"', '""') + '"' if any(c in text for c in special) else text

        lines = [mark.join(name if i == index else f"c{i}" for i in range(width))]
        for text in texts:
            lines.append(mark.join(quoted(text if i == index else f"label {i}") for i in range(width)))
            lines += [""] * self.chance(0.05)
        expected: list[str | None] = [*texts]
        content = ending.join(lines) + ending * self.chance()
        if self.chance(0.2):
            content = f"# a comment{ending}{content}"
            expected.insert(0, None)
        suffix = ".tsv" if mark == "\t" or self.chance(0.2) else ".csv"
        column = "body" if name == "body" else ""
        return Made(f"table {mark!r} {width}", "a" + suffix, self.encoded(content), texts, expected, {"column": column})

    def odd_table(self) -> Made:
        """Return a table as a careless program writes it."""
        mark, ending = self.draw.choice(SEPARATORS), self.draw.choice(["\n", "\r\n"])
        width = self.draw.randint(1, 3)
        index = self.draw.randrange(width)
        space = self.draw.choice(["", " "])
        faults = [
            "no quotes",
            "space",
            "title",
            "no header",
            "no names",
            "backslash",
            "late",
            "short",
            "latin-1",
            "mark",
        ]
        fault = self.draw.choice(faults)
        # Without quotation marks, a text with line breaks and separators may look like other rows that are whole.
        broken = [junk for junk in JUNK if not any(separator in junk for separator in SEPARATORS)]
        separated = [junk for junk in JUNK if not set(junk) & set("\r\n")]
        commas = [[", ", " ", ",", "; "], [" ", ' "', ", "]]
        texts = self.texts(broken if fault == "mark" else self.draw.choice([broken, separated, *commas]))
        if fault in ("no quotes", "late"):
            # A quotation mark at the start may end in a later text. The rows between them are then counted as one.
            texts = [text.lstrip(' "') for text in texts]
        between = self.draw.choice(SEPARATORS) if fault == "mark" else mark

        def quoted(text: str) -> str:
            if fault == "backslash":
                return '"' + text.replace('"', '\\"') + '"'
            return text if fault == "no quotes" else '"' + text.replace('"', '""') + '"'

        text = self.draw.choice(["text", "text", "body"])
        if fault == "title" and width == 1:
            text = "text"  # without this name, the first two rows may both be a title
        names = [text if i == index else f"c{i}" for i in range(width)]
        lines = [] if fault in ("no header", "no names") else [(mark + space).join(names)]
        for row, text in enumerate(texts):
            shown = text if fault == "late" and row == len(texts) - 1 else quoted(text)
            fields = [shown if i == index else str(row) for i in range(width)]
            if fault == "no names":  # one more than the header, as R writes row names
                fields.insert(0, str(row))
            if fault == "short" and self.chance(0.3):
                fields = fields[: self.draw.randint(1, width)]
            lines.append((between + space if fault == "space" else between).join(fields))
        if fault == "no names":
            lines.insert(0, mark.join(names))
        if fault == "title":
            lines.insert(0, self.draw.choice(["# by me, 2024", "My report", f"sep={mark}", "", "A, report"]))
        content = ending.join(lines) + ending
        data = content.encode("latin-1", "replace") if fault == "latin-1" else self.encoded(content)
        suffix = self.draw.choice([".csv", ".csv", ".tsv"])
        kept = [t for t in texts if t in content or quoted(t) in content]
        column = "body" if "body" in names and self.chance() else ""
        return Made(f"odd table {fault} {mark!r} {width}", "a" + suffix, data, kept, None, {"column": column})

    def sheet(self) -> Made:
        """Return a table as a spreadsheet exports it: with blank columns, and a title above the header."""
        mark = self.draw.choice([",", ";", "\t"])
        texts = [f"A text of more than forty characters, {self.text()}" for _ in range(self.rows())]
        width = self.draw.randint(1, 4)
        index = self.draw.randrange(width)
        blank = self.draw.randint(0, 3)  # columns at the right
        text = "text" if width == 1 else self.draw.choice(["text", "body"])  # as in `odd_table`
        names = [text if i == index else self.draw.choice(["grade", ""]) for i in range(width)]
        fault = self.draw.choice(["no title", "title", "two titles", "no names"])
        rows = [[each if i == index else str(n % 5 + i) for i in range(width)] for n, each in enumerate(texts)]
        above = [["Essays of class 7" if i == 0 else "" for i in range(width)]]
        if self.chance(0.2):  # in the middle, as over columns that were merged
            self.draw.shuffle(above[0])
        above += [["by Ms Smith", *[""] * (width - 1)]] * (fault == "two titles") + [[""] * width] * self.chance()
        lines = {
            "no title": [names, *rows],
            "no names": [[name if i != index else "" for i, name in enumerate(names)], *rows],
        }.get(fault, [*above, names, *rows])
        content = io.StringIO()
        csv.writer(content, delimiter=mark).writerows([line + [""] * blank for line in lines])
        column = text if self.chance(0.3) else ""
        sound: list[str | None] | None = [*texts] if fault == "no title" and (text == "text" or column) else None
        shape = f"sheet {fault} {mark!r} {width}+{blank}"
        return Made(shape, "a.csv", self.encoded(content.getvalue()), texts, sound, {"column": column})

    def spelled(self, rows: list[object], *, odd: bool = False) -> str:
        """Return JSON of these rows: on lines, in an array, or indented."""
        indent = self.draw.choice([None, None, 2])
        dumped = [json.dumps(row, ensure_ascii=self.chance(), indent=indent) for row in rows]
        ending = self.draw.choice(["\n", "\r\n", "\n\n"])
        shape = self.draw.choice(["lines", "lines", "array", "array on one line"] + ["commas", "no end"] * odd)
        if shape == "lines":
            return ending.join(dumped) + ending * self.chance()
        if shape == "commas":
            return ("," + ending).join(dumped)
        between = ", " if shape == "array on one line" else f",{ending}"
        return "[" + between.join(dumped) + ("]" if shape != "no end" else "") + ending * self.chance()

    def objects(self) -> Made:
        """Return a sound JSON file."""
        name = self.draw.choice(["text", "Text", "body"])
        texts = self.texts()
        rows: list[object] = []
        expected: list[str | None] = []
        for number, text in enumerate(texts):
            extra = {"id": number, "label": "x", "meta": {"tags": ["a"], "n": None}}
            rows.append({k: v for k, v in extra.items() if self.chance()} | {name: text})
            expected.append(text)
            if self.chance(0.1):
                rows.append({name: self.draw.choice([None, 5, [], "\ud800"])} if self.chance() else {"id": 5})
                expected.append(None)
            if self.chance(0.1):
                rows.append(self.draw.choice([3, None, [1]]))
                expected.append(None)
        if isinstance(rows[0], dict) and name not in rows[0]:
            rows, expected = rows[::-1], expected[::-1]
        content = self.spelled(rows).encode("utf-8", "surrogatepass").decode("utf-8", "surrogatepass")
        if "\ud800" in content:
            content = json.dumps(rows)
        suffix = self.draw.choice([".json", ".jsonl", ".ndjson"])
        column = "body" if name == "body" else ""
        return Made("objects", "a" + suffix, self.encoded(content), texts, expected, {"column": column})

    def odd_objects(self) -> Made:
        """Return JSON whose texts are elsewhere than in the first rows' column of that name, or that is damaged."""
        texts = self.texts()
        faults = ["late", "nested", "twice", "lists", "turns", "chats", "pairs", "strings", "damage", "mixed"]
        fault = self.draw.choice(faults)
        rows: list[object]
        if fault == "late":
            start = [{"title": f"title {i}"} for i in range(self.draw.choice([1, 120]))]
            rows = [*start, *({"title": "x", self.draw.choice(["text", "body"]): text} for text in texts)]
        elif fault == "nested":
            rows = [{"version": "1", "data": [{"text": text} for text in texts]}]
        elif fault == "lists":
            rows = [{"title": "x", "parts": texts[i : i + 2]} for i in range(0, len(texts), 2)]
        elif fault == "turns":
            rows = [{"id": "x", "messages": [{"role": "user", "content": text}]} for text in texts]
        elif fault == "chats":
            asked = {"role": "user", "content": "x"}
            rows = [{"id": "x", "messages": [asked, {"role": "assistant", "content": text}]} for text in texts]
            rows += [{"text": texts[0]}] * self.chance()
        elif fault == "pairs":
            rows = [{"prompt": "x", "completion": text} for text in texts]
        elif fault == "mixed":
            rows = [text if self.chance() else {"text": text} if self.chance() else [text] for text in texts]
        else:
            rows = [{"text": text} for text in texts] if fault != "strings" else [*texts]
        content = self.spelled(rows, odd=True)
        if fault == "twice":
            content = "\n".join(f'{{"text": {json.dumps(text)}, "text": "x"}}' for text in texts)
        if fault == "damage":
            at = self.draw.randrange(len(content))
            content = content[:at] + self.draw.choice(["", '"', "\n", "}", ",", "]"]) + content[at + self.chance() :]
            texts = [
                text for text in texts if json.dumps(text) in content or json.dumps(text, ensure_ascii=False) in content
            ]
        return Made(f"odd objects {fault}", "a.json", self.encoded(content), texts)


def problem(folder: Path, made: Made) -> tuple[str, bool]:
    """Read a file; return what is wrong with the result, or "", and whether the file was refused."""
    path = folder / made.name
    path.write_bytes(made.content)
    try:
        found = [_read(row, place) for row, place in read_rows(path, **made.options)]  # type: ignore[arg-type]
    except UserError as error:
        if made.expected is not None:
            return f"a sound file was refused: {error}", True
        one_sentence = made.name in str(error) and "\n" not in str(error)
        return "" if one_sentence else f"not one sentence about the file: {error}", True
    except Exception as error:
        return f"unforeseen: {error!r}", False
    if made.expected is not None:
        read = [None if isinstance(document, Dropped) else document for document in found]
        if read != made.expected:
            differing = next((pair for pair in zip(read, made.expected, strict=False) if pair[0] != pair[1]), "length")
            return f"{len(read)} documents for {len(made.expected)}, first difference {differing!r}", False
    if names := [document for document in found if document in NAMES]:
        return f"the header was read as a document: {names[0]!r}", False
    dropped = [document for document in found if isinstance(document, Dropped)]
    if unplaced := [document.reason for document in dropped if made.name not in document.place]:
        return f"a row was dropped without its place: {unplaced[0]}", False
    kept = "\n".join(document for document in found if isinstance(document, str))
    lost = [text for text in made.texts if any(f"{word}." not in kept for word in text_words(text))]
    if len(lost) > len(dropped):
        return f"{len(lost)} texts lost, {len(dropped)} counted, such as {lost[0]!r}", False
    return "", False


def _read(row: Row, place: str) -> str | Dropped:
    """Return a row with its place if it was dropped, and otherwise all of its text."""
    if isinstance(row, Dropped):
        return replace(row, place=place)
    return row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)


def text_words(text: str) -> list[str]:
    """Return the words that `Maker.text` put into a text."""
    return [word for part in text.split("word")[1:] if (word := "word" + part.split(".")[0])]


def problems(files: int, seed: int, folder: Path) -> tuple[list[str], dict[str, int]]:
    """Make and read files; return what is wrong, and how many files ended in each way."""
    found, ends = [], {"sound": 0, "odd and read": 0, "odd and refused": 0}
    for number in range(files):
        made = Maker(seed * 1_000_003 + number).make()
        wrong, refused = problem(folder, made)
        ends["sound" if made.expected is not None else "odd and refused" if refused else "odd and read"] += 1
        if wrong:
            found.append(f"file {number} ({made.shape}, {made.options}): {wrong}")
    return found, ends


def main() -> int:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found, ends = problems(arguments.files, arguments.seed, Path(folder))
    for line in found:
        print(ascii(line)[1:-1])
    counts = ", ".join(f"{count} {end}" for end, count in ends.items())
    print(f"{arguments.files} files ({counts}), {len(found)} read wrongly.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
