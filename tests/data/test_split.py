"""Validation has its share of the text by length, a document keeps its side, and no text is lost."""

import json
import random
from hashlib import blake2b

import pytest

from mlx_gpt.data.corpus import open_corpus
from mlx_gpt.data.prepare import prepare
from mlx_gpt.data.sources import BUILTIN, builtin_documents
from mlx_gpt.data.split import place_to_cut
from mlx_gpt.errors import UserError

NOTES = ["Buy milk.", "Call Ada about the engine.", "The duck is in the pond again."]


@pytest.fixture
def split(tmp_path):
    """Prepare documents and return the two sides, and the report."""
    folders = (tmp_path / str(number) for number in range(1000))

    def split(documents, fraction=0.1):
        folder = next(folders)
        folder.mkdir()
        lines = [json.dumps({"text": text}) + "\n" for text in documents]
        (folder / "source.jsonl").write_text("".join(lines))
        report = prepare([folder / "source.jsonl"], folder / "out", val_fraction=fraction)
        corpus = open_corpus(folder / "out")
        train, val = list(corpus.documents("train")), list(corpus.documents("val"))
        assert (report.train.rows, report.val.rows) == (len(train), len(val))
        return train, val, report

    return split


def sentences(characters, seed=0):
    """Return about so many characters of words, with some line breaks."""
    draw = random.Random(seed)
    words = (f"{draw.choice('abcdefgh') * draw.randint(1, 9)}{draw.choice('    ,.' + chr(10))}" for _ in range(10**9))
    text = ""
    while len(text) < characters:
        text += next(words)
    return text


@pytest.mark.parametrize("seed", range(20))
def test_a_long_text_beside_short_notes_trains(split, seed):
    # One seed in ten gave validation the whole long text.
    long = sentences(20_000, seed)
    train, val, report = split([NOTES[0], long, *NOTES[1:]])
    assert report.val.characters == pytest.approx(0.1 * report.characters, rel=0.05)
    [start], [end] = [text for text in train if text not in NOTES], [text for text in val if text not in NOTES]
    assert start + end == long
    assert start.endswith("\n"), "it is cut at a line"
    assert "one document is cut, and its end is validation" in str(report)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.8])
def test_validation_is_near_its_share_and_nothing_is_lost(split, fraction):
    draw = random.Random(fraction)
    for seed in range(8):
        count = draw.choice([1, 2, 3, 5, 9, 17, 30, 60, 200])
        lengths = [int(draw.paretovariate(draw.choice([0.6, 1, 3])) * 300) for _ in range(count)]
        documents = [f"{seed} {number} " + sentences(min(n, 10_000), n) for number, n in enumerate(lengths)]
        train, val, report = split(documents, fraction)
        assert abs(report.val.characters / report.characters - fraction) <= min(fraction, 1 - fraction) / 2
        assert report.characters == sum(map(len, documents)) == len("".join(train + val))
        for document in documents:
            starts = [text for text in train if document.startswith(text)]
            assert document in train or document in val or any(document[len(text) :] in val for text in starts)


def test_more_documents_move_none_from_validation_to_training(split):
    documents = [f"{number} {sentences(200, number)}" for number in range(300)]
    _, before, first = split(documents[:200])
    train, _, second = split(documents)
    assert first.note == second.note == ""
    assert not set(before) & set(train)


def test_many_documents_stay_whole_when_their_hashes_are_unlucky(split):
    texts = (f"{number} {sentences(90, number)}" for number in range(100))
    # None of these would be validation.
    documents = [text for text in texts if blake2b(text.encode(), digest_size=16).digest()[0] > 64][:40]
    train, val, report = split(documents)
    assert "no document is cut" in report.note
    assert sorted(train + val) == sorted(documents)
    assert len(val) in (3, 4, 5)


def test_at_most_one_short_document_is_cut(split):
    documents = [f"{number} {sentences(700, number)}" for number in range(60)]
    train, _, report = split(documents, 0.002)
    assert report.val.characters == pytest.approx(0.002 * report.characters, rel=0.5)
    assert "one document is cut" in report.note
    assert len(set(train) & set(documents)) == 59


def test_the_order_of_documents_is_kept_when_some_are_cut(split):
    documents = [sentences(9_000, 1), *NOTES, sentences(9_000, 2), "The end."]
    train, val, report = split(documents)
    assert "2 documents are cut, and their ends are validation" in report.note
    first_words = [document[:8] for document in documents]
    places = [first_words.index(text[:8]) for text in train]
    assert places == sorted(places)
    assert [documents[0].endswith(val[0]), documents[4].endswith(val[-1])] == [True, True]


def test_the_builtin_text_is_divided_by_the_hashes_alone(tmp_path):
    # The README's figures depend on it.
    lines: list[str] = []
    open_corpus(BUILTIN, cache=tmp_path, echo=lines.append)
    assert not [line for line in lines if "length" in line]
    assert [line.split()[1] for line in lines if line.startswith(("train", "val"))] == ["65", "13"]
    assert builtin_documents()


def test_training_on_a_file_says_how_it_was_split(tmp_path):
    (tmp_path / "book.txt").write_text(sentences(3_000))
    lines: list[str] = []
    open_corpus(tmp_path / "book.txt", cache=tmp_path / "cache", echo=lines.append)
    assert "one document: its last 10 % is validation" in lines


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("a" * 1000, 900),  # one line without a space
        ("a" * 890 + "\n" + "a" * 109, 891),
        ("a" * 890 + " " + "a" * 109, 891),
        ("a" * 890 + "\n" + "a" * 5 + " " + "a" * 104, 891),  # a line is better than a word
        ("a" * 895 + "\n" + "a" * 8 + "\n" + "a" * 96, 896),  # the nearest line
        ("a" * 500 + "\n" + "a" * 499, 900),  # no line is near
        ("a" * 1000 + "\n" * 500, 900),
        ("ab", 1),
        (" " * 9000 + "a" * 500 + "\n" + "a" * 499, 9900),  # both parts have text
        ("a" + " " * 9000 + "b", 8101),
    ],
)
def test_a_text_is_cut_at_a_line_if_one_is_near(text, place):
    assert place_to_cut(text, 0.1) == place


@pytest.mark.parametrize("documents", [["x"], [" x"], ["x" + " " * 50]])
def test_a_text_that_cannot_be_cut_is_refused(split, documents):
    with pytest.raises(UserError, match="too short"):
        split(documents)


def test_a_repeated_document_is_on_one_side_only(split):
    long = sentences(5_000)
    train, val, _ = split([long, NOTES[0], long, long + "\r", long.replace("\n", "\r\n")])
    assert len("".join(train + val)) == 2 * len(long) + len(NOTES[0]) + 1
