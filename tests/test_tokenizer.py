"""Text becomes ids and text again, without losing anything and without half characters."""

import json
import random

import pytest
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers

from mlx_gpt.detokenizer import Detokenizer
from mlx_gpt.errors import UserError
from mlx_gpt.tokenizer import END_OF_TEXT, Tokenizer, failing_as

NASTY = [
    "",
    " ",
    "\n\n\n",
    "emoji 🦆 👩‍👩‍👧 🇫🇮",
    "漢字かな交じり文 한국어 العربية",
    "NUL \0, \x01\x1b\x7f\x85\u2028\ufeff and a\u0301 and \U0010ffff",
    " leading,  double  and trailing spaces  ",
    "tabs\tand\r\nline ends\r",
    f"{END_OF_TEXT} <s> <pad> {END_OF_TEXT}{END_OF_TEXT}",
    "the duck 鳥 naïve",
]


def random_texts():
    """Return texts of every kind of character except surrogates."""
    draw = random.Random(0)
    kinds = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000), (0x20, 0x7F)]
    return ["".join(chr(draw.randrange(*draw.choice(kinds))) for _ in range(draw.randint(1, 40))) for _ in range(300)]


def random_ids(tokenizer):
    """Return lists of ids that hardly ever make whole characters."""
    draw = random.Random(0)
    return [[draw.randrange(tokenizer.vocab_size) for _ in range(draw.randint(0, 12))] for _ in range(1000)]


def detokenized(tokenizer, ids):
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.add(i) for i in ids), detokenizer.finish()]


# ---- encoding and decoding ------------------------------------------------------------------------------------------


def test_any_text_survives(tokenizer):
    texts = NASTY + random_texts()
    batch = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids) for ids in batch] == texts
    assert batch == [tokenizer.encode(text) for text in texts]
    assert max(max(ids, default=0) for ids in batch) < tokenizer.vocab_size


def test_text_never_becomes_the_end_of_a_document(tokenizer):
    assert not any(tokenizer.end_of_text in ids for ids in tokenizer.encode_batch(NASTY))


def test_nothing_is_added_to_a_text(tokenizer):
    assert tokenizer.encode("") == []
    assert tokenizer.encode("a🐘") == [*tokenizer.encode("a"), *tokenizer.encode("🐘")]


def test_the_end_of_a_document_has_no_text(tokenizer):
    ids = tokenizer.encode("duck")
    end = tokenizer.end_of_text
    assert (
        tokenizer.decode([end, *ids, end, *ids])
        == "".join(detokenized(tokenizer, [end, *ids, end, *ids]))
        == "duckduck"
    )


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(UserError, match="lone surrogate"):
        tokenizer.encode("duck \ud83e")


@pytest.mark.parametrize("prompt", [None, 7, b"duck", ["duck"]])
def test_what_is_not_text_is_refused(tokenizer, prompt):
    for special in (False, True):
        with pytest.raises(UserError, match="Only text can be encoded, not"):
            tokenizer.encode(prompt, special)


def test_bytes_are_their_own_ids(byte_tokenizer):
    assert byte_tokenizer.encode("né") == list("né".encode())
    assert (byte_tokenizer.end_of_text, byte_tokenizer.vocab_size) == (256, 259)


# ---- streaming ------------------------------------------------------------------------------------------------------


def test_the_pieces_of_a_stream_add_up_to_the_text(tokenizer):
    for ids in [tokenizer.encode(text) for text in NASTY] + random_ids(tokenizer):
        assert "".join(detokenized(tokenizer, ids)) == tokenizer.decode(ids)


def test_streaming_never_yields_half_a_character(tokenizer):
    for text in NASTY:
        pieces = detokenized(tokenizer, tokenizer.encode(text))
        assert not any("\ufffd" in piece for piece in pieces)


def test_streaming_yields_a_character_as_soon_as_it_is_whole(byte_tokenizer):
    assert detokenized(byte_tokenizer, "aé🦆".encode()) == ["a", "", "é", "", "", "", "🦆", ""]


def test_streaming_ends_with_a_replacement_for_an_unfinished_character(tokenizer):
    unfinished = tokenizer.encode("a🐘")[:-1]
    assert "".join(detokenized(tokenizer, unfinished)) == "a\ufffd"


def test_the_pieces_of_a_tokenizer_without_byte_tokens_add_up_too():
    bytes_in_hex = {f"<0x{byte:02X}>": byte for byte in range(256)}
    backend = HFTokenizer(models.BPE(bytes_in_hex | {"a": 256, "▁": 257}, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = Tokenizer(backend)
    for ids in [tokenizer.encode("a▁a🦆")[:cut] for cut in range(8)]:
        assert "".join(detokenized(tokenizer, ids)) == tokenizer.decode(ids)


# ---- sizes ----------------------------------------------------------------------------------------------------------


def test_byte_lengths_add_up_to_the_length_of_the_text(tokenizer):
    lengths = tokenizer.byte_lengths()
    assert lengths.shape == (tokenizer.vocab_size,)
    assert lengths[tokenizer.end_of_text] == 0
    for text in NASTY + random_texts():
        assert lengths[tokenizer.encode(text)].sum() == len(text.encode())


@pytest.mark.parametrize("kind", ["Llama 2's", "Metaspace", "Gemma's"])
def test_sizes_and_names_of_a_sentencepiece_model_include_the_space_before_a_word(kind):
    words = ["▁", "t", "h", "e", "▁t", "he", "▁the"]
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {word: 256 + i for i, word in enumerate(words)}
    backend = HFTokenizer(models.BPE(vocabulary, [("▁", "t"), ("h", "e"), ("▁t", "he")], byte_fallback=True))
    if kind == "Metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        backend.decoder = decoders.Sequence(steps)
    if kind == "Gemma's":  # whose runs of spaces are added tokens
        backend.add_tokens(["▁▁"])
        assert Tokenizer(backend).name_of(backend.token_to_id("▁▁") or 0) == "  "
    tokenizer, text = Tokenizer(backend), "the the é"
    ids = tokenizer.encode(text)
    assert [tokenizer.name_of(i) for i in ids] == [" the", " the", " ", "bytes:\\xc3", "bytes:\\xa9"]
    assert bytes(byte for i in ids for byte in tokenizer.bytes_of(i)) == f" {text}".encode()
    assert tokenizer.byte_lengths()[ids].sum() == len(f" {text}".encode())
    assert tokenizer.byte_lengths()[tokenizer.end_of_text] == 0


@pytest.mark.parametrize("vocab_size", [259, 280, 300])
def test_training_fills_the_vocabulary_and_no_more(sentences, vocab_size):
    assert Tokenizer.train(sentences, vocab_size).vocab_size == vocab_size


def test_a_text_with_few_pairs_gives_a_smaller_vocabulary():
    assert Tokenizer.train(["abab"], 1000).vocab_size == 260  # the bytes, three special tokens and "ab"


def test_training_is_a_function_of_the_text(sentences, bpe):
    assert Tokenizer.train(iter(sentences), 300).to_json() == bpe.to_json()
    assert Tokenizer.train(sentences[:100], 300).to_json() != bpe.to_json()


def test_training_learns_words(bpe):
    assert len(bpe.encode("the duck swims")) < len("the duck swims") / 2


# ---- files ----------------------------------------------------------------------------------------------------------


def test_a_file_and_its_folder_load_as_the_same_tokenizer(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_json(), encoding="utf-8")
    for loaded in (Tokenizer.load(path), Tokenizer.load(str(tmp_path))):
        assert loaded.to_json() == tokenizer.to_json()
        assert (loaded.end_of_text, loaded.vocab_size) == (tokenizer.end_of_text, tokenizer.vocab_size)
        assert [loaded.encode(text) for text in NASTY] == [tokenizer.encode(text) for text in NASTY]


def with_entry(tokenizer, entry, i):
    content = json.loads(tokenizer.to_json())
    content["model"]["vocab"][entry] = i
    return json.dumps(content)


def test_an_entry_that_is_not_a_run_of_bytes_decodes_to_itself(bpe, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(with_entry(bpe, "鳥 ", 300))
    tokenizer = Tokenizer.load(path)
    assert tokenizer.decode([300]) == "".join(detokenized(tokenizer, [300])) == "鳥 "
    assert tokenizer.byte_lengths()[300] == 4


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.ByteLevel(),
        decoders.Sequence([decoders.ByteLevel()]),
        decoders.Sequence([decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])]),
    ],
)
def test_an_added_token_decodes_to_itself(bpe, decoder):
    backend = HFTokenizer.from_str(bpe.to_json())
    backend.add_tokens(["đem"])  # GPT-2 writes the byte 0x11 as đ
    backend.decoder = decoder
    tokenizer = Tokenizer(backend)
    ids = tokenizer.encode("naïve đem 🦆")
    assert tokenizer.decode(ids) == "".join(detokenized(tokenizer, ids)) == "naïve đem 🦆"
    assert tokenizer.byte_lengths()[ids].sum() == len("naïve đem 🦆".encode())


def test_a_decoder_that_would_change_an_added_token_is_refused(bpe, tmp_path):
    backend = HFTokenizer.from_str(bpe.to_json())
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    path = tmp_path / "tokenizer.json"
    backend.add_tokens(["duckling", "日本"])  # no character of these stands for a byte, or each for its own
    backend.save(str(path))
    tokenizer = Tokenizer.load(path)
    assert tokenizer.decode(tokenizer.encode("duckling 日本")) == "duckling 日本"
    backend.add_tokens(["đem"])
    backend.save(str(path))
    with pytest.raises(UserError, match=r"added token 'đem'.* make ByteLevel its only decoder"):
        Tokenizer.load(path)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(lambda bpe: b"", id="empty"),
        pytest.param(lambda bpe: b"{}", id="an empty object"),
        pytest.param(lambda bpe: bpe.to_json().encode()[:-9], id="cut short"),
        pytest.param(lambda bpe: b"\xff\xfe", id="not text"),
        pytest.param(lambda bpe: b"[" * 100_000, id="deeply nested"),
        pytest.param(lambda bpe: with_entry(bpe, "duckling", 10**8).encode(), id="an absurd id"),
    ],
)
def test_a_file_that_is_not_a_tokenizer_is_refused(bpe, tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content(bpe))
    with pytest.raises(UserError, match=r"tokenizer\.json") as caught:
        Tokenizer.load(path)
    assert str(caught.value).startswith(str(path))


def odd(path, model=None, **changes):
    """Load a tokenizer from a minimal file with these changes."""
    model = {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "": 2}, "unk_token": "a"} | (model or {})
    path.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model} | changes))
    return Tokenizer.load(path)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model": {"unk_token": "none"}}, "Missing [UNK] token"),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "must be non-zero"),  # a panic
        ({"decoder": {"type": "Strip", "content": "a", "start": 0, "stop": 1}}, "out of bounds"),  # a panic
    ],
    ids=["encode", "encode with a panic", "decode with a panic"],
)
def test_a_later_failure_of_the_library_is_one_sentence(tmp_path, changes, why):
    tokenizer = odd(tmp_path / "tokenizer.json", **changes)
    if "decoder" in changes:
        actions = [lambda: tokenizer.decode([2]), lambda: detokenized(tokenizer, [2])]
    else:
        actions = [lambda: tokenizer.encode("c")]
    for action in actions:
        with pytest.raises(UserError) as caught:
            action()
        assert str(caught.value).startswith("The tokenizer can't ")
        assert why in str(caught.value)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("second", ["🦆", "b"])
def test_a_file_with_which_the_library_would_end_the_process_is_refused(tmp_path, second):
    """If it were not refused, the tests would end here."""
    bpe = {"type": "BPE", "vocab": {"a": 0, second: 1, "ab": 2}, "merges": [["a", second]]}
    with pytest.raises(UserError, match="continues a word without '##'"):
        odd(tmp_path / "tokenizer.json", bpe | {"continuing_subword_prefix": "##"})
    bpe = {"type": "BPE", "vocab": {"a": 0, "##b": 1, "ab": 2}, "merges": ["a ##b"]}
    assert odd(tmp_path / "tokenizer.json", bpe | {"continuing_subword_prefix": "##", "unk_token": None}).encode("ab")


def test_ctrl_c_is_not_reported_as_a_damaged_file():
    with pytest.raises(KeyboardInterrupt), failing_as("never"):
        raise KeyboardInterrupt


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"There is no .*nowhere\.json"):
        Tokenizer.load(tmp_path / "nowhere.json")


def test_a_tokenizer_can_be_sent_to_another_process():
    tokenizer = Tokenizer(HFTokenizer(models.BPE({"a": 0, "b": 1}, merges=[])))
    tokenizer.end_at([0])
    tokenizer.converse("{{ messages }}")
    received = Tokenizer.from_state(json.loads(json.dumps(tokenizer.state())))
    for name in ("fingerprint", "vocab_size", "end_of_text", "ends", "chat", "added"):
        assert getattr(received, name) == getattr(tokenizer, name)
    assert received.encode("<|im_start|>ab", special=True) == [3, 0, 1]
