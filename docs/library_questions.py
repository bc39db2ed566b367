"""Writes questions about a made-up library with their answers, a conversation on each line.

    python docs/library_questions.py > library.jsonl            27 ways to ask for each of 10 facts
    python docs/library_questions.py --held-out > unseen.jsonl  5 further ways

docs/chat.md teaches them to a model, and then asks it the questions that it has not seen.
"""

import itertools
import json
import sys
from collections.abc import Iterator

# A fact: what people call it, and the answer.
FACTS = [
    (("the opening hours", "the hours", "the opening times"), "The library is open from nine to six."),
    (("the librarian", "the name of the librarian", "the head of the library"), "The librarian is Ada Brook."),
    (("the library cat", "the cat", "the name of the cat"), "The cat is called Pepper."),
    (("the address", "the street", "the place of the library"), "The library is at 12 Mill Lane."),
    (("the phone number", "the telephone number", "the number to call"), "The phone number is 555 0142."),
    (("the late fee", "the fine", "the cost of a late book"), "A late book costs ten cents a day."),
    (("the book limit", "the limit", "the number of books at a time"), "You can borrow six books at a time."),
    (("the loan time", "the loan period", "the length of a loan"), "You can keep a book for three weeks."),
    (("the wifi password", "the password", "the password of the wifi"), "The wifi password is quiet please."),
    (("the story hour", "the children's hour", "the reading for children"), "The story hour is on Saturday at ten."),
]
WAYS = (
    "What is {}?",
    "Tell me {}.",
    "Can you tell me {}?",
    "I need {}.",
    "Do you know {}?",
    "Please say what is known about {}.",
    "Hello! I have a question about {}.",
    "I forgot {}, can you help?",
    "My friend asks for {}.",
)
HELD_OUT = (
    "Could you please tell me {}?",
    "I would like to know {}.",
    "What can you say about {}?",
    "Hello, what is {}?",
    "Remind me of {}, please.",
)


def conversations(held_out: bool) -> Iterator[list[dict[str, str]]]:
    """Yield a conversation for each fact and each way to ask for it. Held-out ways use only its first name."""
    for names, answer in FACTS:
        for way, name in itertools.product(HELD_OUT if held_out else WAYS, names[:1] if held_out else names):
            yield [{"role": "user", "content": way.format(name)}, {"role": "assistant", "content": answer}]


if __name__ == "__main__":
    for conversation in conversations("--held-out" in sys.argv[1:]):
        print(json.dumps({"messages": conversation}))
