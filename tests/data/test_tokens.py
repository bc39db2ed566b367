"""Token files have every document whole and with its end, and nothing is encoded twice."""

import itertools
import random
import shutil

import numpy as np
import pytest
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, processors

from mlx_gpt import tokenizer_training
from mlx_gpt.data import tokens as tokens_module
from mlx_gpt.data.corpus import open_corpus
from mlx_gpt.data.encoder import CorpusEncoder
from mlx_gpt.data.prepare import prepare
from mlx_gpt.data.tokens import (
    PIECE_CHARACTERS,
    check_length,
    get_tokenizer,
    lost_text,
    tokenize,
    tokens_fingerprint,
)
from mlx_gpt.errors import UserError
from mlx_gpt.tokenizer import END_OF_TEXT, Tokenizer
from mlx_gpt.tokenizer_training import Sample


@pytest.fixture
def long_text(sentences):
    """A document that is encoded in two and a half pieces."""
    draw = random.Random(0)
    return "".join(draw.choices(sentences, k=2 * PIECE_CHARACTERS // 20))[: 2 * PIECE_CHARACTERS + 50_000]


def token_files(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.npy")}


# ---- encoding -------------------------------------------------------------------------------------------------------


def test_every_document_is_whole_and_has_its_end(tokenizer, make_corpus):
    train, val = ["one 🦆", "two\n\nlines ", "<|endoftext|>"], ["three"]
    tokens = tokenize(make_corpus(train, val), tokenizer)
    start, end = tokenizer.start, tokenizer.end_of_text
    assert tokens.train.tolist() == [i for text in train for i in [*start, *tokenizer.encode(text), end]]
    assert tokens.val.tolist() == [*start, *tokenizer.encode("three"), end]


def test_a_document_begins_as_its_model_expects(sentences, make_corpus, long_text):
    tokenizer = Tokenizer.train(sentences, 300)
    tokenizer.backend.add_special_tokens(["<s>"])
    begin = tokenizer.backend.token_to_id("<s>")
    tokenizer.backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", begin)])
    again = Tokenizer(HFTokenizer.from_str(tokenizer.to_json()))
    assert (again.start, again.beginning_of_text) == ([begin], begin)
    tokens = tokenize(make_corpus(["one", long_text]), again)
    expected = [i for text in ("one", long_text) for i in [begin, *again.encode(text), again.end_of_text]]
    assert tokens.train.tolist() == expected


@pytest.mark.parametrize("ends", [False, True])
def test_a_tokenizer_that_begins_no_text_adds_nothing(sentences, ends):
    tokenizer = Tokenizer.train(sentences, 300)
    if ends:  # as BERT's do, which no text model has
        end = ("<|endoftext|>", tokenizer.end_of_text)
        tokenizer.backend.post_processor = processors.TemplateProcessing("$A <|endoftext|>", special_tokens=[end])
    assert (tokenizer.start, tokenizer.beginning_of_text) == ([], tokenizer.end_of_text)


def test_a_long_document_has_the_ids_of_one_encoding(tokenizer, make_corpus, long_text):
    assert len(long_text) == 250_000
    tokens = tokenize(make_corpus(["before", long_text, "after"]), tokenizer)
    start, end = tokenizer.start, tokenizer.end_of_text
    expected = [i for text in ("before", long_text, "after") for i in [*start, *tokenizer.encode(text), end]]
    assert tokens.train.tolist() == expected


@pytest.mark.parametrize("unit", ["x", "鳥", "🦆", "\n", "1 2 ", "  a"])
def test_a_long_document_without_a_good_place_to_cut_survives(bpe, make_corpus, unit):
    text = "a" + (unit * PIECE_CHARACTERS)[: PIECE_CHARACTERS + 77] + "b"
    ids = tokenize(make_corpus([text]), bpe).train.tolist()
    assert ids.count(bpe.end_of_text) == 1
    assert bpe.decode(ids) == text


def test_batches_of_documents_are_joined_in_order(byte_tokenizer, make_corpus, sentences, monkeypatch):
    monkeypatch.setattr(tokens_module, "BATCH_CHARACTERS", 100)
    tokens = tokenize(make_corpus(sentences), byte_tokenizer)
    assert byte_tokenizer.decode(tokens.train) == "".join(sentences)


# ---- the files ------------------------------------------------------------------------------------------------------


def test_the_files_are_plain_npy(byte_tokenizer, make_corpus):
    corpus = make_corpus(["duck"])
    tokens = tokenize(corpus, byte_tokenizer)
    stored = np.load(corpus.folder / f"{tokens.fingerprint}.train.npy")
    assert stored.tolist() == [*b"duck", 256]
    assert isinstance(tokens.train, np.memmap)  # a corpus may be larger than memory


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_ids_take_two_bytes_if_they_fit(byte_tokenizer, make_corpus, vocab_size, dtype):
    tokenizer = Tokenizer.of_bytes()
    tokenizer.vocab_size, tokenizer.end_of_text = vocab_size, vocab_size - 1
    tokens = tokenize(make_corpus(["a"]), tokenizer)
    assert tokens.train.dtype == dtype
    assert tokens.train.tolist() == [97, vocab_size - 1]


def test_nothing_is_encoded_again_if_nothing_has_changed(bpe, make_corpus):
    corpus = make_corpus(["duck"])
    tokenize(corpus, bpe)
    before = token_files(corpus.folder)
    tokens = tokenize(make_corpus(["duck"]), Tokenizer.load(_written(bpe, corpus.folder)))
    assert token_files(corpus.folder) == before
    assert bpe.decode(tokens.train) == "duck"


def _written(tokenizer, folder):
    path = folder / "elsewhere.json"
    path.write_text(tokenizer.to_json())
    return path


@pytest.mark.parametrize("changed", ["train", "val", "tokenizer"])
def test_a_change_of_text_or_tokenizer_is_encoded_again(bpe, byte_tokenizer, make_corpus, changed):
    before = tokenize(make_corpus(["duck"], ["goose"]), bpe)
    train, val = ["drake" if changed == "train" else "duck"], ["gander" if changed == "val" else "goose"]
    tokenizer = byte_tokenizer if changed == "tokenizer" else bpe
    after = tokenize(make_corpus(train, val), tokenizer)
    assert after.fingerprint != before.fingerprint
    assert tokenizer.decode(after.train) == train[0]
    assert tokenizer.decode(after.val) == val[0]


def test_a_split_whose_file_is_missing_is_encoded_again(bpe, make_corpus):
    corpus = make_corpus(["duck"])
    tokens = tokenize(corpus, bpe)
    (corpus.folder / f"{tokens.fingerprint}.val.npy").unlink()
    again = tokenize(corpus, bpe)
    assert (again.fingerprint, again.val.tolist()) == (tokens.fingerprint, tokens.val.tolist())


@pytest.mark.parametrize("damage", [lambda whole: b"", lambda whole: whole[:100], lambda whole: whole[:-1]])
def test_a_split_whose_file_is_damaged_is_encoded_again(bpe, make_corpus, damage):
    corpus = make_corpus(["duck"])
    tokens = tokenize(corpus, bpe)
    path = corpus.folder / f"{tokens.fingerprint}.val.npy"
    path.write_bytes(damage(path.read_bytes()))
    assert bpe.decode(tokenize(corpus, bpe).val) == "What nobody has seen.\n"


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_text_that_changes_while_it_is_encoded_is_not_kept_as_the_old_one(byte_tokenizer, make_corpus, split):
    corpus, old = make_corpus(["duck"], ["goose"]), {"train": "duck", "val": "goose"}
    files = {name: corpus.path(name).read_text() for name in old}

    def edit(done, total):
        corpus.path(split).write_text(files[split].replace(old[split], "swan"))

    with pytest.raises(UserError, match="was changed while it was read"):
        tokenize(corpus, byte_tokenizer, edit)
    corpus.path(split).write_text(files[split])
    tokens = tokenize(corpus, byte_tokenizer)
    assert {"train": byte_tokenizer.decode(tokens.train), "val": byte_tokenizer.decode(tokens.val)} == old


def test_a_failure_halfway_leaves_no_file(byte_tokenizer, make_corpus, sentences, monkeypatch):
    encode, rounds = CorpusEncoder.encode_batch, itertools.count()

    def fail_the_third_time(encoder, texts):
        if next(rounds) == 2:
            raise OSError("the disk is full")
        return encode(encoder, texts)

    corpus = make_corpus(sentences)
    before = sorted(corpus.folder.iterdir())
    monkeypatch.setattr(tokens_module, "BATCH_CHARACTERS", 1000)
    monkeypatch.setattr(CorpusEncoder, "encode_batch", fail_the_third_time)
    with pytest.raises(OSError, match="full"):
        tokenize(corpus, byte_tokenizer)
    assert sorted(corpus.folder.iterdir()) == before


def test_progress_ends_at_the_total(bpe, make_corpus, sentences, monkeypatch):
    monkeypatch.setattr(tokens_module, "BATCH_CHARACTERS", 1000)
    seen = []
    corpus = make_corpus(sentences)
    tokenize(corpus, bpe, lambda done, total: seen.append((done, total)))
    total = sum(corpus.path(split).stat().st_size for split in ("train", "val"))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len(seen) > 5
    assert seen[-1] == (total, total)
    assert {of for _, of in seen} == {total}


def test_the_tokens_of_a_read_only_folder_are_kept_in_the_cache(
    bpe, byte_tokenizer, make_corpus, tmp_path_factory, read_only
):
    folder = make_corpus(["duck"], ["goose"]).folder
    tokenize(make_corpus(["duck"], ["goose"]), bpe)
    before = sorted(folder.iterdir())
    read_only(folder)
    lines: list[str] = []
    cache = tmp_path_factory.mktemp("cache")
    corpus = open_corpus(folder, cache=cache, echo=lines.append)
    tokens = tokenize(corpus, byte_tokenizer)
    assert byte_tokenizer.decode(tokens.train) == "duck"
    get_tokenizer("bpe", 270, corpus, lines.append)
    assert sorted(folder.iterdir()) == before
    [made] = cache.iterdir()
    assert str(made) in lines[0]
    tokenize(corpus, bpe)  # its tokens are in the folder already
    assert len(list(made.iterdir())) == 3, "two splits and a tokenizer"


def test_a_text_keeps_its_fingerprint_wherever_it_lies(bpe, source, texts, tmp_path):
    def fingerprint(data, here):
        return tokens_fingerprint(open_corpus(data, cache=here / "cache"), bpe)

    (tmp_path / "a" / "b").mkdir(parents=True)
    path = source(texts)
    copies = [shutil.copy(path, tmp_path / "a" / "b" / "renamed.jsonl"), path]
    prepare([path], tmp_path / "prepared")
    shutil.copytree(tmp_path / "prepared", tmp_path / "a" / "moved")
    found = {fingerprint(data, tmp_path / "a") for data in [*copies, tmp_path / "prepared", tmp_path / "a" / "moved"]}
    corpus = open_corpus(tmp_path / "prepared")
    assert found == {tokens_fingerprint(corpus, bpe)} == {tokenize(corpus, bpe).fingerprint}


# ---- the tokenizer --------------------------------------------------------------------------------------------------


def test_the_tokenizer_of_a_corpus_is_trained_once(make_corpus, sentences):
    corpus = make_corpus(sentences)
    lines: list[str] = []
    first = get_tokenizer("bpe", 280, corpus, lines.append)
    second = get_tokenizer("bpe", 280, corpus, lines.append)
    assert first.to_json() == second.to_json() == Tokenizer.train(sentences, 280).to_json()
    assert len(lines) == 1
    assert get_tokenizer("bpe", 290, corpus, lines.append).vocab_size == 290


def test_a_tokenizer_of_a_text_that_changes_meanwhile_is_not_kept(make_corpus, sentences):
    corpus = make_corpus(sentences)

    def edit(done, total):
        corpus.path("train").write_text('{"text": "swan"}\n')

    with pytest.raises(UserError, match="was changed while it was read"):
        get_tokenizer("bpe", 280, corpus, print, edit)
    assert not list(corpus.folder.glob("*.tokenizer.json"))


def test_a_tokenizer_for_a_large_corpus_is_trained_on_a_sample(make_corpus, sentences, monkeypatch):
    corpus = make_corpus(sentences)
    monkeypatch.setattr(tokenizer_training, "SAMPLE_BYTES", corpus.path("train").stat().st_size // 10)
    corpus.path("train").write_text(corpus.path("train").read_text().replace('{"text"', " " * 3000 + '{"text"'))
    corpus = open_corpus(corpus.folder)
    lines: list[str] = []
    tokenizer = get_tokenizer("bpe", 300, corpus, lines.append)
    assert tokenizer.to_json() == Tokenizer.train(Sample(corpus.documents("train")), 300).to_json()
    assert tokenizer.to_json() != Tokenizer.train(sentences, 300).to_json()
    assert "of the 0 MB of" in lines[0]


def test_a_tokenizer_is_trained_on_a_long_document_in_pieces(make_corpus, long_text):
    whole = get_tokenizer("bpe", 280, make_corpus([long_text]), print).to_json()
    assert whole == Tokenizer.train([long_text], 280).to_json()


def test_the_progress_of_training_a_tokenizer_reaches_the_end_of_the_corpus_and_of_the_sample(make_corpus, long_text):
    seen: list[tuple[int, int]] = []
    corpus = make_corpus([long_text])
    get_tokenizer("bpe", 300, corpus, print, lambda done, total: seen.append((done, total)))
    size, sample = corpus.path("train").stat().st_size, len(long_text.encode())
    assert [done for done, total in seen if total == size][-1] == size
    assert [done for done, total in seen if total == sample][-1] == sample
    assert {total for _, total in seen} == {size, sample}


def test_a_tokenizer_may_be_bytes_or_a_path(byte_tokenizer, bpe, make_corpus):
    corpus = make_corpus(["duck"])
    assert get_tokenizer("bytes", 300, corpus, print).to_json() == byte_tokenizer.to_json()
    assert get_tokenizer(str(_written(bpe, corpus.folder)), 999, corpus, print).to_json() == bpe.to_json()
    with pytest.raises(UserError, match=r"There is no nowhere\.json"):
        get_tokenizer("nowhere.json", 300, corpus, print)


def word_level():
    return Tokenizer(HFTokenizer(models.WordLevel({"[UNK]": 0, "duck": 1}, unk_token="[UNK]")))


def unigram():
    return Tokenizer(HFTokenizer(models.Unigram([("duck", -1.0), ("<unk>", 0.0)], unk_id=1)))


@pytest.mark.parametrize(("make", "name"), [(word_level, "[UNK]"), (unigram, "<unk>")])
def test_text_that_a_tokenizer_does_not_know_is_counted(make_corpus, make, name):
    tokenizer = make()
    tokens = tokenize(make_corpus(["duck", "zebra", "鳥"], ["duck"]), tokenizer)
    (line,) = lost_text([tokens.train, tokens.val], tokenizer)
    assert line.startswith(f"WARNING: 2 of the 8 tokens of this text are {name}, because ")
    assert lost_text([tokens.val], tokenizer) == []


def test_a_tokenizer_that_drops_characters_is_warned_of(make_corpus):
    tokenizer = Tokenizer(HFTokenizer(models.BPE({"a": 0, "b": 1}, merges=[])))
    assert tokenizer.encode("abc") == tokenizer.encode("ab")
    (line,) = lost_text([np.array(tokenizer.encode("abc"))], tokenizer)
    assert "drops characters" in line


def test_a_tokenizer_of_all_bytes_is_not_warned_of(tokenizer):
    ids = np.array([*range(tokenizer.vocab_size)])
    assert lost_text([ids], tokenizer) == []
    backend = HFTokenizer.from_str(tokenizer.to_json())
    backend.model.unk_token = END_OF_TEXT  # which GPT-2 names, and never uses
    assert lost_text([ids], Tokenizer(backend)) == []


# ---- a short text ---------------------------------------------------------------------------------------------------


def test_a_corpus_of_one_window_is_enough_and_a_shorter_one_is_refused(byte_tokenizer, make_corpus):
    tokens = tokenize(make_corpus(["twelve bytes"]), byte_tokenizer)
    check_length(tokens.train, "train", seq_len=12)
    with pytest.raises(UserError, match="use --seq-len 12 or less"):
        check_length(tokens.train, "train", seq_len=13)


def test_a_split_with_nothing_to_predict_is_refused(byte_tokenizer, make_corpus):
    tokens = tokenize(make_corpus(["a duck"], ["b"]), byte_tokenizer)
    with pytest.raises(UserError, match="validation text has 1 tokens"):
        check_length(tokens.val[:1], "val", seq_len=4)


def test_rows_without_text_are_reported_when_a_corpus_of_ones_own_is_encoded(byte_tokenizer, tmp_path):
    for split in ("train", "val"):
        (tmp_path / f"{split}.jsonl").write_text('{"text": "a duck"}\n{"text": 3}\n{"other": "x"}\n{"text": null}\n')
    lines: list[str] = []
    tokenize(open_corpus(tmp_path), byte_tokenizer, echo=lines.append)
    assert len(lines) == 4
    assert "left out 2 rows: not a string (first in" in lines[0]
    assert "train.jsonl, line 2" in lines[0]
