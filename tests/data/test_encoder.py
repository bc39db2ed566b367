"""A corpus has the same ids as its texts have by themselves."""

import random

import numpy as np
import pytest
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import normalizers, pre_tokenizers

from mlx_gpt.data import encoder as encoder_module
from mlx_gpt.data.encoder import CorpusEncoder
from mlx_gpt.errors import UserError
from mlx_gpt.tokenizer import Tokenizer
from tests.test_tokenizer import NASTY, random_texts


def encoded(encoder, texts):
    return [np.frombuffer(ids, np.uint16).tolist() for ids in encoder.encode_batch(texts)]


def around_characters():
    """Return texts with every character up to U+3000 and some beyond, between letters and kinds of white space."""
    numbers = [*range(0x3001), *(i for i in range(0x3001, 0x110000, 1009) if not 0xD800 <= i < 0xE000)]
    return [
        "".join(f"a{c}b {c} {c}c  {c}\n{c}1" for c in map(chr, numbers[i : i + 100]))
        for i in range(0, len(numbers), 100)
    ]


def spaced_texts():
    """Return texts of words, contractions and digits with white space, and with characters that look like it."""
    draw = random.Random(0)
    pieces = [
        *" \t\n\r\v\f\x1c\x1f\x85\xa0\u180e\u200b\u2028\u3000",
        "  ",
        "   ",
        "\r\n",
        "'s",
        "'ll",
        "duck",
        "鳥",
        "7",
        "!?",
    ]
    return ["".join(draw.choices(pieces, k=draw.randint(1, 12))) for _ in range(5000)]


def test_a_corpus_has_the_same_ids_as_its_texts(tokenizer):
    encoder = CorpusEncoder(tokenizer, np.dtype(np.uint16))
    for texts in (NASTY, random_texts(), spaced_texts(), NASTY):
        assert encoded(encoder, texts) == tokenizer.encode_batch(texts)


def test_every_character_has_the_same_ids_in_a_corpus_and_in_a_text(bpe):
    assert bpe.splits_like_gpt2
    assert not any(chr(i).isspace() for i in range(0x3001, 0x110000))
    texts = around_characters()
    assert encoded(CorpusEncoder(bpe, np.dtype(np.uint16)), texts) == bpe.encode_batch(texts)


def test_emptying_the_cache_does_not_change_the_ids(bpe, sentences, monkeypatch):
    monkeypatch.setattr(encoder_module, "CACHE_CHARACTERS", 500)
    encoder = CorpusEncoder(bpe, np.dtype(np.uint16))
    for sentence in sentences:
        assert encoded(encoder, [sentence]) == [bpe.encode(sentence)]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda b: setattr(b, "normalizer", normalizers.Prepend("_")), id="normalizer"),
        pytest.param(lambda b: b.add_tokens(["k s"]), id="an entry with a space"),
        pytest.param(lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.ByteLevel()), id="a space before each text"),
        pytest.param(
            lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.ByteLevel(False, use_regex=False)), id="no split"
        ),
        pytest.param(lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.Metaspace()), id="another split"),
    ],
)
def test_a_tokenizer_that_splits_text_differently_keeps_its_ids(bpe, change):
    backend = HFTokenizer.from_str(bpe.to_json())
    change(backend)
    odd = Tokenizer(backend)
    texts = ["the duck swims", "the duck", *NASTY]
    assert encoded(CorpusEncoder(odd, np.dtype(np.uint16)), texts) == odd.encode_batch(texts)


def test_half_a_surrogate_pair_in_a_corpus_is_refused(tokenizer):
    with pytest.raises(UserError, match="lone surrogate"):
        CorpusEncoder(tokenizer, np.dtype(np.uint16)).encode_batch(["duck", "duck \ud83e"])
