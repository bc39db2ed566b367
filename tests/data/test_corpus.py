"""Files, and folders that were made by hand or prepared, open as a corpus."""

import json

import pytest

from mlx_gpt.data.corpus import Corpus, open_corpus
from mlx_gpt.data.prepare import normalise, prepare
from mlx_gpt.data.sources import BUILTIN, builtin_documents
from mlx_gpt.data.tokens import get_tokenizer
from mlx_gpt.errors import UserError


def splits(folder):
    corpus = open_corpus(folder)
    return list(corpus.documents("train")), list(corpus.documents("val"))


@pytest.mark.parametrize("name", ["train.txt", "train.jsonl"])
@pytest.mark.parametrize("other", ["val.txt", "val.jsonl"])
def test_a_corpus_written_by_hand_is_used_unchanged(tmp_path, name, other):
    for file in (name, other):
        (tmp_path / file).write_bytes(b"one\r\n\none\r\n" if file.endswith("txt") else b'"one"\n\n{"text": "one"}\n')
    corpus = open_corpus(tmp_path, cache=tmp_path / "cache")
    assert list(corpus.documents("train")) == list(corpus.documents("val")) == ["one", "one"]
    assert (corpus.path("train"), corpus.path("val")) == (tmp_path / name, tmp_path / other)
    assert corpus.name == tmp_path.name
    assert not (tmp_path / "cache").exists()


def test_text_files_are_cut_as_requested(tmp_path):
    for name in ("train.txt", "val.txt"):
        (tmp_path / name).write_text("a\nb\n\nc\n")
    lines, blocks = open_corpus(tmp_path), open_corpus(tmp_path, documents="blank-line")
    assert list(lines.documents("train")) == ["a", "b", "c"]
    assert list(blocks.documents("train")) == ["a\nb", "c"]
    assert lines.fingerprint == open_corpus(tmp_path, documents="line").fingerprint != blocks.fingerprint


def test_the_fingerprint_depends_on_the_content_of_each_split(tmp_path):
    def fingerprint(train, val):
        (tmp_path / "train.txt").write_text(train)
        (tmp_path / "val.txt").write_text(val)
        return open_corpus(tmp_path).fingerprint

    cases = [("a", "b"), ("b", "a"), ("a", "c"), ("ab", "b"), ("a", "b")]
    found = [fingerprint(*case) for case in cases]
    assert found[0] == found[-1]
    assert len(set(found)) == 4
    assert all(set(each) <= set("0123456789abcdef") for each in found)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"train.txt": "a", "train.jsonl": '"a"', "val.txt": "b"}, ["both train.jsonl and train.txt"]),
        ({"train.txt": "a", "val.jsonl": '"a"', "val.txt": "b"}, ["both val.jsonl and val.txt"]),
        ({"val.txt": "b"}, ["no train.jsonl or train.txt"]),
        ({"train.txt": "a", "val.txt": ""}, ["val.txt is empty"]),
        ({"train.txt": "\n \n", "val.txt": "b"}, ["train.txt has no document"]),
        ({"train.txt": "a", "val.jsonl": '{"text": ""}'}, ["val.jsonl has no document"]),
    ],
)
def test_an_ambiguous_or_incomplete_corpus_is_refused(tmp_path, files, words):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as caught:
        open_corpus(tmp_path, cache=tmp_path / "cache")
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("name", ["train.txt", "train.jsonl"])
def test_a_train_file_alone_is_split_as_prepare_does(texts, tmp_path, name):
    folder = tmp_path / "my notes"
    folder.mkdir()
    lines = texts if name == "train.txt" else map(json.dumps, texts)
    (folder / name).write_text("\n".join(lines))
    (folder / "readme.md").write_text("not a document")
    corpus = open_corpus(folder, cache=tmp_path / "cache")
    prepare([folder / name], tmp_path / "out")
    assert [list(corpus.documents("train")), list(corpus.documents("val"))] == list(splits(tmp_path / "out"))
    assert corpus.name == "my notes"
    assert corpus.folder.parent == tmp_path / "cache"
    assert sorted(path.name for path in folder.iterdir()) == sorted([name, "readme.md"])


def test_a_file_is_prepared_once_and_again_when_it_or_a_setting_changes(source, texts, tmp_path):
    path = source(texts)
    lines: list[str] = []

    def open_it(**options) -> Corpus:
        lines.clear()
        return open_corpus(path, cache=tmp_path / "cache", echo=lines.append, **options)

    first = open_it()
    assert any(line.split()[:2] == ["kept", "500"] for line in lines)
    assert first.folder.name.startswith("source-")
    assert len(first.folder.name) == len("source-") + 8

    assert open_it() == first
    assert lines == []

    (first.folder / "val.jsonl").unlink()  # no longer complete
    assert open_it() == first
    assert lines != []

    assert open_it(val_fraction=0.3).folder != first.folder
    source([*texts, "one more"])
    assert open_it().folder != first.folder
    source(texts)
    assert open_it() == first
    assert lines == [], "the content counts, not the date"


def test_the_fingerprint_depends_on_how_a_file_is_read_but_not_on_its_name(tmp_path):
    folders = {}
    for name, cut in [("a.txt", "auto"), ("b.text", "auto"), ("train.txt", "auto"), ("c.txt", "line")]:
        (tmp_path / name).write_text("one line\nand another\n")
        folders[name] = open_corpus(tmp_path / name, cache=tmp_path / "cache", documents=cut).folder.name[-8:]
    assert folders["a.txt"] == folders["b.text"] != folders["train.txt"] == folders["c.txt"]


def test_a_cache_inside_the_data_is_not_read_as_data(tmp_path, texts):
    (tmp_path / "all.txt").write_text("\n".join(texts))
    first = open_corpus(tmp_path, cache=tmp_path / "cache")
    assert open_corpus(tmp_path, cache=tmp_path / "cache") == first


def test_the_column_of_the_source_does_not_matter_to_a_prepared_corpus(tmp_path):
    (tmp_path / "a.csv").write_text("essay,title\n" + "".join(f"essay {i},title\n" for i in range(99)))
    prepare([tmp_path / "a.csv"], tmp_path / "out", column="essay")
    assert "essay 7" in "\n".join(open_corpus(tmp_path / "out", column="essay").documents("train"))
    assert open_corpus(tmp_path / "a.csv", column="essay", cache=tmp_path / "cache").name == "a"


def test_a_current_folder_that_cannot_be_written_to_is_named(source, texts, tmp_path, monkeypatch, read_only):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    prepare([source(texts)], "prepared")
    read_only(here / "prepared")
    read_only(here)
    for data in (tmp_path / "source.jsonl", "prepared"):
        with pytest.raises(
            UserError, match=r"needs data/cache/.*here can't be written to: run .* from a folder that you can write"
        ):
            get_tokenizer("bpe", 260, open_corpus(data), print)


def test_a_corpus_has_the_name_that_its_folder_has(tmp_path):
    folder = tmp_path / "Läufe 日本"
    folder.mkdir()
    (folder / "a.txt").write_text("A text. " * 99)
    assert open_corpus(folder, cache=tmp_path / "cache").name == "Läufe 日本"


def test_the_builtin_text_needs_no_file(tmp_path):
    corpus = open_corpus(BUILTIN, cache=tmp_path)
    expected = {normalise(text) for text in builtin_documents()}
    assert set(corpus.documents("train")) | set(corpus.documents("val")) == expected
    assert corpus.folder.name.startswith("builtin-")
    assert sum(map(len, expected)) > 300_000
    assert open_corpus(BUILTIN, cache=tmp_path) == corpus


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no file or folder .*gone\.csv"):
        open_corpus(tmp_path / "gone.csv", cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
