"""A tokenizer is trained in bounded time and memory, and Ctrl-C ends it soon."""

import os
import random
import signal
import threading

import pytest
from tokenizers import pre_tokenizers

from mlx_gpt import tokenizer_training
from mlx_gpt.tokenizer_training import WORD_CHARACTERS, Sample, train

SPLIT = pre_tokenizers.ByteLevel(add_prefix_space=False)


def longest_word(texts):
    """Return the characters of the longest word in GPT-2's split of the texts."""
    return max(end - start for text in texts for _, (start, end) in SPLIT.pre_tokenize_str(text))


@pytest.fixture
def two_halves():
    """Words that are all different: half of them begin with a, and half with b."""
    draw = random.Random(0)
    return [first + "".join(draw.choices("etaoinshrdlu", k=20)) for first in "ab" for _ in range(2000)]


def test_ordinary_text_is_taken_as_it_is(sentences):
    texts = [*sentences, "a  b\n\n c", "", "_" * WORD_CHARACTERS]
    sample = Sample(iter(texts))
    assert list(sample) == texts
    assert sample.share == 1
    assert sample.bytes == sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize("unit", ["ACGT", "鳥の歌", "3½", " \n\u3000", "=_", "é", "\x1c="])
def test_a_word_without_end_is_cut(unit):
    text = "before  " + unit * 1000 + " after"
    parts = list(Sample([text]))
    assert longest_word(parts) <= WORD_CHARACTERS + 1  # and the space before it
    assert "".join(parts) == text


@pytest.mark.parametrize("limit", ["WORD_BYTES", "SAMPLE_BYTES"])
def test_a_text_that_is_too_large_is_taken_in_part_and_evenly(two_halves, monkeypatch, limit):
    monkeypatch.setattr(tokenizer_training, limit, 21 * 1500)
    sample = Sample(iter(two_halves))
    taken = list(sample)
    assert sample.share == 0.25
    assert 800 < len(taken) < 1200
    assert sum(text[0] == "a" for text in taken) == pytest.approx(len(taken) / 2, rel=0.2)
    assert list(Sample(iter(two_halves))) == taken


def test_repeated_words_do_not_count_as_distinct_ones(two_halves, monkeypatch):
    monkeypatch.setattr(tokenizer_training, "WORD_BYTES", 21 * 1500)
    assert Sample(two_halves[:1000] * 4).share == 1


def test_ctrl_c_does_not_wait_for_the_library(monkeypatch):
    monkeypatch.setattr(tokenizer_training, "PATIENCE", 0.1)
    release, ended = threading.Event(), threading.Event()

    def texts():
        """Take as long as the library does, which does not look at signals."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        os.kill(os.getpid(), signal.SIGINT)
        release.wait(timeout=10)
        ended.set()
        yield "duck"

    try:
        with pytest.raises(KeyboardInterrupt):
            train(texts(), 300)
        assert not ended.is_set()
    finally:
        release.set()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def test_an_error_while_the_texts_are_read_is_raised(sentences):
    def texts():
        yield from sentences
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        train(texts(), 300)
