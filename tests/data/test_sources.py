"""Which files are found, and in what order."""

import pytest

from mlx_gpt.data.corpus import prepare
from mlx_gpt.data.sources import BUILTIN, find_files, find_sources, read_sources
from mlx_gpt.errors import UserError


def test_folders_are_walked_in_order_and_what_is_no_text_is_passed_over(tmp_path):
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
    files, passed_over = find_files([tmp_path])
    assert files == [tmp_path / name for name in ("z.txt", "b/a.csv", "b/b.md")]
    assert passed_over == [tmp_path / name for name in ("empty.txt", "metadata.json", "photo")]
    assert list(read_sources([*files], "", "auto", None)) == ["last", "first", "second"]


def test_what_prepare_wrote_is_not_found_and_the_same_names_elsewhere_are(tmp_path):
    (tmp_path / "all.txt").write_text("some text, long enough to be cut")
    prepare([tmp_path], tmp_path / "made")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.jsonl").write_text('"mine"')
    assert find_files([tmp_path]) == ([tmp_path / "all.txt", tmp_path / "mine" / "train.jsonl"], [])


def test_a_named_file_has_to_be_readable(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match=r"empty\.txt is empty"):
        find_files([tmp_path / "empty.txt"])
    with pytest.raises(UserError, match=r"no file or folder .*gone"):
        find_files([tmp_path / "gone"])
    (tmp_path / "a.json").write_text('"named, so read"\n')
    assert find_files([tmp_path / "a.json"]) == ([tmp_path / "a.json"], [])


def test_a_folder_without_text_is_named(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match="holds no file of text"):
        find_files([tmp_path])


def test_each_source_counts_once(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    sources, _ = find_sources([tmp_path, BUILTIN, tmp_path / "a.txt", BUILTIN])
    assert sources == [tmp_path / "a.txt", BUILTIN]
