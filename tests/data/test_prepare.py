"""Documents become train.jsonl and val.jsonl, and nothing that a person wrote is overwritten."""

import errno
import json
import os
import random
import shutil
import threading
from pathlib import Path

import pytest

from mlx_gpt.data.corpus import open_corpus
from mlx_gpt.data.prepare import normalise, prepare
from mlx_gpt.errors import UserError
from mlx_gpt.files import READY

NASTY = [
    "emoji 🦆 👩‍👩‍👧",
    "漢字かな交じり文",
    "NUL \0 and \x1f",
    "\u2028 and \u0085 and \f and \v",
    "\ufeffa BOM",
    ' "quotes" \\ and,\ttabs ',
]


def splits(folder):
    corpus = open_corpus(folder)
    return list(corpus.documents("train")), list(corpus.documents("val"))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a\r\nb\rc\n\r\n", "a\nb\nc\n\n"), ("\u2028\u0085\f\v\0 ", "\u2028\u0085\f\v\0 "), ("\r\r\n\n", "\n\n\n")],
)
def test_only_carriage_returns_are_normalised(text, expected):
    assert normalise(text) == expected


def test_unusual_characters_survive(source, texts, tmp_path):
    prepare([source(NASTY + texts)], tmp_path / "out")
    train, val = splits(tmp_path / "out")
    assert sorted(train + val) == sorted(NASTY + texts)


def test_a_very_long_line_survives(source, texts, tmp_path):
    line = "".join(map(str, range(500_000)))  # three million characters, without a space
    prepare([source([*texts, line])], tmp_path / "out")
    train, val = splits(tmp_path / "out")
    assert sorted(train + val) == sorted([*texts, line[: int(len(line) * 0.9)], line[int(len(line) * 0.9) :]])


def test_empty_repeated_and_unusable_documents_are_dropped_and_counted(source, texts, tmp_path):
    path = source([*texts, texts[0], "a\r\nb", "a\nb", "a\rb", "", " \n\t"])
    with path.open("a") as file:
        file.write('{"text": 5}\n"\\ud800"\n')
    report = prepare([path], tmp_path / "out")
    assert report.dropped == {"repeated": 3, "empty": 2, "not a string": 1, "not valid Unicode": 1}
    assert (report.rows, report.kept) == (508, 501)
    train, val = splits(tmp_path / "out")
    assert (report.train.rows, report.val.rows) == (len(train), len(val))
    assert (report.train.characters, report.val.characters) == (len("".join(train)), len("".join(val)))
    assert report.characters == len("".join([*texts, "a\nb"]))


def test_the_split_of_a_document_depends_only_on_its_text(source, texts, tmp_path):
    shuffled = random.Random(1).sample(texts, len(texts))
    prepare([source(texts)], tmp_path / "a")
    prepare([source(["another", *shuffled[:400]], "other.jsonl")], tmp_path / "b")
    (train_a, val_a), (train_b, val_b) = splits(tmp_path / "a"), splits(tmp_path / "b")
    assert set(train_b) - {"another"} <= set(train_a)
    assert set(val_b) - {"another"} <= set(val_a)
    assert train_a == [text for text in texts if text in set(train_a)], "the order of the source is kept"


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.5])
def test_about_the_requested_fraction_is_validation(source, texts, tmp_path, fraction):
    report = prepare([source(texts)], tmp_path / "out", val_fraction=fraction)
    assert report.val.rows == pytest.approx(fraction * 500, abs=35)
    assert report.note == ""


def test_the_report_is_readable_and_kept(source, texts, tmp_path):
    report = prepare([source([*texts * 3, ""])], tmp_path / "out")
    lines = str(report).splitlines()
    assert lines[0].split() == ["read", "1,501", "documents"]
    assert ["dropped", "1,000", "repeated"] in [line.split() for line in lines]
    assert len({line.index("characters") for line in lines if "characters" in line}) == 1, "numbers are aligned"
    record = json.loads((tmp_path / "out" / "report.json").read_text())
    assert record["dropped"] == {"repeated": 1000, "empty": 1}
    assert record["sources"] == [
        {"path": str(tmp_path / "source.jsonl"), "bytes": (tmp_path / "source.jsonl").stat().st_size}
    ]
    assert record["fingerprint"] == open_corpus(tmp_path / "out").fingerprint


def test_skipped_files_are_in_the_report(tmp_path):
    (tmp_path / "a.txt").write_text("some text, long enough to be cut")
    (tmp_path / "photo").write_bytes(b"\x89PNG")
    report = prepare([tmp_path], tmp_path / "out")
    assert report.skipped == (str(tmp_path / "photo"),)
    assert "photo" in str(report)


def test_preparing_a_folder_twice_into_itself_does_not_read_its_own_output(tmp_path, texts):
    (tmp_path / "all.txt").write_text("\n".join(texts))
    first = prepare([tmp_path], tmp_path, documents="line")
    assert prepare([tmp_path], tmp_path, documents="line") == first


def test_progress_ends_at_the_total(source, texts, tmp_path):
    calls: list[tuple[int, int]] = []
    path = source([text * 200 for text in texts])
    prepare([path], tmp_path / "out", progress=lambda done, total: calls.append((done, total)))
    size = path.stat().st_size
    assert len(calls) > 2
    assert calls == sorted(calls)
    assert calls[-1] == (size, size)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError, UserError])
def test_a_prepare_that_fails_midway_leaves_the_folder_as_it_was(source, texts, tmp_path, failure):
    prepare([source(texts)], tmp_path / "out")
    before = contents(tmp_path / "out")

    def fail(done, total):
        assert len(list((tmp_path / "out").iterdir())) == 4, "unfinished files are on the same disk, to be renamed"
        raise failure

    with pytest.raises(failure):
        prepare([source(["new", *texts])], tmp_path / "out", progress=fail)
    assert contents(tmp_path / "out") == before
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.json", "train.jsonl", "val.jsonl"]


def test_an_earlier_corpus_is_replaced(source, texts, tmp_path):
    prepare([source(texts)], tmp_path / "out")
    prepare([source(texts[:100])], tmp_path / "out")
    assert sum(map(len, splits(tmp_path / "out"))) == 100


@pytest.mark.parametrize("name", ["train.txt", "val.txt", "train.jsonl", "val.jsonl"])
def test_a_corpus_written_by_hand_is_never_overwritten(source, texts, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text('"mine"')
    with pytest.raises(UserError, match=f"{name} that was written or edited by hand"):
        prepare([source(texts)], tmp_path / "out")
    assert contents(tmp_path / "out") == {name: b'"mine"'}


def test_prepared_files_that_were_edited_are_kept(source, texts, tmp_path):
    prepare([source(texts)], tmp_path / "out")
    with (tmp_path / "out" / "train.jsonl").open("a") as file:
        file.write('{"text": "mine"}\n')
    with pytest.raises(UserError, match="edited by hand"):
        prepare([source(texts)], tmp_path / "out")
    assert splits(tmp_path / "out")[0][-1] == "mine"


def test_a_corpus_of_a_version_that_knew_only_documents_is_prepared_again(source, texts, tmp_path):
    path = source(texts)
    prepare([path], tmp_path / "out")
    report = json.loads((tmp_path / "out/report.json").read_text())
    del report["kind"]
    (tmp_path / "out/report.json").write_text(json.dumps(report))
    assert open_corpus(tmp_path / "out").kind == "documents"
    prepare([path], tmp_path / "out")
    assert json.loads((tmp_path / "out/report.json").read_text())["kind"] == "documents"


def test_a_corpus_of_other_files_is_kept(source, texts, tmp_path):
    first, second = source(texts, "first.jsonl"), source(["new", *texts], "second.jsonl")
    prepare([first], tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=r"holds the text of .*first\.jsonl: .* --out, or replace it with --overwrite"):
        prepare([second], tmp_path / "out")
    assert contents(tmp_path / "out") == before
    prepare([first], tmp_path / "out", val_fraction=0.2)  # the same command with another setting
    prepare([first.rename(tmp_path / "moved.jsonl")], tmp_path / "out", val_fraction=0.2)
    prepare([tmp_path / "moved.jsonl", second], tmp_path / "out")  # nothing is lost when files are added


def test_a_file_of_the_same_name_in_another_folder_is_another_file(source, texts, tmp_path, monkeypatch):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        source([f"{folder}: {text}" for text in texts], f"{folder}/source.jsonl")
    monkeypatch.chdir(tmp_path / "a")
    prepare(["source.jsonl"], tmp_path / "out")
    before = contents(tmp_path / "out")
    monkeypatch.chdir(tmp_path / "b")
    with pytest.raises(UserError, match=r"holds the text of .*/a/source\.jsonl"):
        prepare(["source.jsonl"], tmp_path / "out")
    shutil.rmtree(tmp_path / "a")  # now the corpus is all that is left of it
    with pytest.raises(UserError, match=r"holds the text of .*/a/source\.jsonl"):
        prepare(["source.jsonl"], tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_a_project_that_was_moved_is_prepared_again(source, texts, tmp_path, monkeypatch):
    (tmp_path / "old").mkdir()
    source(texts, "old/source.jsonl")
    monkeypatch.chdir(tmp_path / "old")
    prepare(["source.jsonl", "builtin"], "data/out")
    (tmp_path / "old").rename(tmp_path / "new")
    monkeypatch.chdir(tmp_path / "new")
    source(["new", *texts], "new/source.jsonl")
    prepare(["source.jsonl", "builtin"], "data/out")
    assert b'"new"' in contents(tmp_path / "new/data/out")["train.jsonl"]


@pytest.mark.parametrize("paths", [None, 5, "source.jsonl", [None]])
def test_a_report_of_another_program_does_not_make_a_corpus_replaceable(source, texts, tmp_path, paths):
    prepare([source(texts)], tmp_path / "out")
    record = json.loads((tmp_path / "out" / "report.json").read_text())
    (tmp_path / "out" / "report.json").write_text(json.dumps(record | {"paths": paths}))
    with pytest.raises(UserError, match="edited by hand"):
        prepare([source(["new", *texts])], tmp_path / "out")


def test_what_is_added_to_the_corpus_while_the_sources_are_read_is_kept(source, texts, tmp_path):
    prepare([source(texts)], tmp_path / "out")

    def edit(done, total):
        if done == total:
            with (tmp_path / "out" / "train.jsonl").open("a") as file:
                file.write('{"text": "mine"}\n')

    with pytest.raises(UserError, match="edited by hand"):
        prepare([source(["new", *texts])], tmp_path / "out", progress=edit)
    assert splits(tmp_path / "out")[0][-1] == "mine"


def test_two_that_write_to_a_folder_at_once_take_turns(source, texts, tmp_path, monkeypatch, meanwhile):
    out, rename, others = tmp_path / "out", Path.rename, []
    path = source(texts)

    def at_once(self, target):
        if Path(target).name == READY and threading.current_thread() is threading.main_thread():
            others.append(meanwhile(out, lambda: prepare([path], out, val_fraction=0.2)))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", at_once)
    prepare([path], out)
    others[0].join()
    assert json.loads((out / "report.json").read_text())["settings"]["val_fraction"] == 0.2
    train, val = splits(out)
    assert sorted(train + val) == sorted(texts)


def test_a_folder_that_lost_a_file_is_prepared_again(texts, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "in" / name).write_text(f"{name}\n" * 100)
    prepare([tmp_path / "in"], tmp_path / "out")
    (tmp_path / "in" / "a.txt").unlink()
    assert prepare([tmp_path / "in"], tmp_path / "out").kept == 1


def test_overwrite_replaces_what_was_edited_or_made_from_other_files(source, texts, tmp_path):
    prepare([source(texts, "other.jsonl")], tmp_path / "out")
    (tmp_path / "out" / "val.jsonl").write_text('"mine"')
    prepare([source(texts)], tmp_path / "out", overwrite=True)
    train, val = splits(tmp_path / "out")
    assert sorted(train + val) == sorted(texts)


@pytest.mark.parametrize("name", ["train.txt", "val.txt"])
def test_overwrite_spares_text_files_that_a_person_wrote(source, texts, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(UserError, match="move it away"):
        prepare([source(texts)], tmp_path / "out", overwrite=True)


def test_a_source_is_never_overwritten(source, texts, tmp_path):
    prepare([source(texts)], tmp_path / "out")
    with pytest.raises(UserError, match="choose another folder"):
        prepare([tmp_path / "out" / "train.jsonl"], tmp_path / "out")
    # A hard link is the same file under another name, as `OUT/Train.jsonl` is on a Mac.
    os.link(tmp_path / "out" / "train.jsonl", tmp_path / "same.jsonl")
    with pytest.raises(UserError, match="choose another folder"):
        prepare([tmp_path / "same.jsonl"], tmp_path / "out", overwrite=True)


@pytest.mark.parametrize(
    ("files", "options", "words"),
    [
        (
            {"a.jsonl": '{"text": ""}\n{"text": 1}\n{"text": ""}\n'},
            {},
            ["Nothing is left", "2 empty", "1 not a string"],
        ),
        ({"a.txt": "x"}, {}, ["too short"]),
        ({"a.txt": "some text"}, {"val_fraction": 0}, ["between 0 and 1"]),
        ({"a.txt": "some text"}, {"val_fraction": 1.0}, ["between 0 and 1"]),
        ({"a.txt": "some text"}, {"documents": "page"}, ["--documents"]),
        ({"a.csv": "a,b\n1,2\n"}, {"column": "c"}, ["no column 'c'"]),
        ({".hidden": "x", "a.json": "{}"}, {}, ["has no text file"]),
        ({}, {}, ["has no text file"]),
    ],
)
def test_a_failure_to_prepare_is_one_sentence(tmp_path, files, options, words):
    (tmp_path / "in").mkdir()
    for name, content in files.items():
        (tmp_path / "in" / name).write_text(content)
    with pytest.raises(UserError) as caught:
        prepare([tmp_path / "in"], tmp_path / "out", **options)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)
    assert contents(tmp_path).keys() == files.keys()


def test_preparing_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="no documents"):
        prepare([], tmp_path / "out")


def test_a_folder_that_cannot_be_written_to_is_named(source, texts, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file is in the way of the folder .*file, .* cannot write to .*file"):
        prepare([source(texts)], tmp_path / "file")

    for code, words in (
        (errno.EACCES, r"no permission to use .*out, .* cannot write to .*out.* choose another"),
        (errno.EROFS, r"out is on a read-only disk, .* cannot write to .*out.* choose another path"),
    ):

        def locked(self, *args, code=code, **kwargs):  # because the tests may run as root, who has every permission
            raise OSError(code, os.strerror(code), str(self))

        monkeypatch.setattr(Path, "mkdir", locked)
        with pytest.raises(UserError, match=words):
            prepare([source(texts)], tmp_path / "out")
