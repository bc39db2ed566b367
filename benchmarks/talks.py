"""Makes conversations to fine-tune on: questions about invented towns, and answers of one to three sentences."""

import json
from pathlib import Path

import numpy as np

from words import SYLLABLES

FACTS = (  # how people ask for a fact, and the answer
    (("Who founded {town}?", "By whom was {town} founded?"), "{town} was founded by {founder} in the year {year}."),
    (("Which river does {town} lie on?", "What is the river of {town}?"), "It lies on the river {river}."),
    (("What is {town} known for?", "What do people in {town} make?"), "The people there make {goods}."),
    (("How many people live in {town}?", "How large is {town}?"), "About {people} people live in it."),
)
GOODS = ("boats", "paper", "clocks", "bread", "bricks", "glass", "ropes", "shoes", "lamps", "salt")


def write_conversations(folder: Path, towns: int) -> int:
    """Write train.jsonl and val.jsonl, and return the number of rows of each.

    The validation side asks for the same facts in other words.
    """
    draw = np.random.default_rng(0)

    def name(least: int, most: int) -> str:
        return "".join(draw.choice(SYLLABLES, draw.integers(least, most + 1))).capitalize()

    rows: tuple[list[str], list[str]] = [], []
    for _ in range(towns):
        known = {"town": name(2, 3), "founder": f"{name(1, 2)} {name(2, 3)}", "river": name(2, 2)}
        known |= {"goods": str(draw.choice(GOODS)), "year": str(draw.integers(900, 1900))}
        known |= {"people": str(100 * draw.integers(10, 999))}
        for first in range(len(FACTS)):
            facts = FACTS[first : first + draw.integers(1, len(FACTS))]
            answer = " ".join(answer for _, answer in facts).format(**known)
            for asked, questions in zip(zip(*(ways for ways, _ in facts), strict=True), rows, strict=True):
                messages = [
                    {"role": "user", "content": " ".join(asked).format(**known)},
                    {"role": "assistant", "content": answer},
                ]
                questions.append(json.dumps({"messages": messages}) + "\n")
    for split, lines in zip(("train", "val"), rows, strict=True):
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return len(rows[0])
