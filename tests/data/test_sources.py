"""The right files are found, in a fixed order."""

import json
import os
from pathlib import Path

import pytest

from mlx_gpt.data.corpus import open_corpus
from mlx_gpt.data.prepare import prepare
from mlx_gpt.data.sources import BUILTIN, find_files, find_sources, read_sources
from mlx_gpt.data.tokens import get_tokenizer
from mlx_gpt.errors import UserError


def test_folders_are_searched_in_order_and_files_without_text_are_skipped(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name, content in {
        "z.txt": "last",
        "b/a.csv": "text\nfirst\n",
        "b/b.md": "second",
        ".hidden.txt": "no",
        ".git/x.txt": "no",
        "empty.txt": "",
        "photo": "\x89PNG",
        "metadata.json": "{}",
    }.items():
        (tmp_path / name).write_bytes(content.encode("latin-1"))
    files, skipped = find_files([tmp_path])
    assert files == [tmp_path / name for name in ("z.txt", "b/a.csv", "b/b.md")]
    assert skipped == [tmp_path / name for name in ("empty.txt", "metadata.json", "photo")]
    assert [text for text, _ in read_sources(files, "", "auto")] == ["last", "first", "second"]


def test_files_that_prepare_wrote_are_ignored_and_the_same_names_elsewhere_are_found(tmp_path):
    (tmp_path / "all.txt").write_text("some text, long enough to be cut")
    prepare([tmp_path], tmp_path / "made")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.jsonl").write_text('"mine"')
    assert find_files([tmp_path]) == ([tmp_path / "all.txt", tmp_path / "mine" / "train.jsonl"], [])


def test_a_file_that_is_named_is_never_skipped(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match=r"empty\.txt is empty"):
        find_files([tmp_path / "empty.txt"])
    with pytest.raises(UserError, match=r"no file or folder .*gone"):
        find_files([tmp_path / "gone"])
    (tmp_path / "a.json").write_text('"named, so read"\n')
    assert find_files([tmp_path / "a.json"]) == ([tmp_path / "a.json"], [])


def test_a_prepared_corpus_is_not_prepared_again(tmp_path, source, texts):
    corpus = tmp_path / "data" / "my corpus"
    prepare([source(texts)], corpus)
    get_tokenizer("bpe", 260, open_corpus(corpus), print)  # a tokenizer.json is no text
    for folder in (corpus, corpus.parent):
        with pytest.raises(UserError) as caught:
            prepare([folder], tmp_path / "out")
        assert str(caught.value) == f"{corpus} is prepared already: train on it with mlx-gpt train --data '{corpus}'."


def test_a_folder_without_text_is_refused(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match=r"has no text file.* text files\.$"):
        find_files([tmp_path])
    (tmp_path / "a.json").write_text('["a text"]')
    with pytest.raises(UserError, match=r"has no text file.* name its \.json files"):
        find_files([tmp_path])


def test_each_source_counts_once(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    sources, _ = find_sources([tmp_path, BUILTIN, tmp_path / "a.txt", BUILTIN])
    assert sources == [tmp_path / "a.txt", BUILTIN]


def test_a_file_name_that_is_not_utf8_is_read_and_reported_readably(tmp_path):
    try:
        (tmp_path / os.fsdecode(b"caf\xe9.jsonl")).write_text('"a text"\n"another text"\n5\n')
    except OSError:
        pytest.skip("this file system allows only UTF-8")
    (tmp_path / os.fsdecode(b"l\xe9er.txt")).touch()
    report = prepare([tmp_path], tmp_path / "out")
    assert report.kept == 2
    assert "first in" in str(report)
    assert "skipped, not text" in str(report)
    str(report).encode()
    sources = json.loads((tmp_path / "out" / "report.json").read_bytes())["sources"]
    assert [Path(source["path"]) for source in sources] == [tmp_path / os.fsdecode(b"caf\xe9.jsonl")]
    with pytest.raises(UserError) as caught:
        find_files([tmp_path / os.fsdecode(b"l\xe9er.txt")])
    str(caught.value).encode()
