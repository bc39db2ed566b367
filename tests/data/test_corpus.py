"""Documents become train.jsonl and val.jsonl, and hand-made or prepared folders open as a corpus."""

import json
import random
from pathlib import Path

import pytest

from mlx_gpt.data.corpus import Corpus, normalise, open_corpus, prepare
from mlx_gpt.data.sources import BUILTIN, builtin_documents
from mlx_gpt.errors import UserError

NASTY = [
    "emoji 🦆 👩‍👩‍👧",
    "漢字かな交じり文",
    "NUL \0 and \x1f",
    "\u2028 and \u0085 and \f and \v",
    "\ufeffa BOM",
    ' "quotes" \\ and,\ttabs ',
    "x" * 10_000_000,
]


@pytest.fixture
def texts():
    return [f"Document {i} says something of its own." for i in range(500)]


@pytest.fixture
def source(tmp_path):
    """Write documents to a JSONL file and return its path."""

    def write(documents, name="source.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        return path

    return write


def splits(folder):
    corpus = open_corpus(folder)
    return list(corpus.documents("train")), list(corpus.documents("val"))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- prepare --------------------------------------------------------------------------------------------------------


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


def test_empty_repeated_and_unusable_documents_are_dropped_and_counted(source, texts, tmp_path):
    path = source([*texts, texts[0], "a\r\nb", "a\nb", "a\rb", "", " \n\t"])
    with path.open("a") as file:
        file.write('{"text": 5}\n"\\ud800"\n')
    report = prepare([path], tmp_path / "out")
    assert report.dropped == {"repeated": 3, "empty": 2, "not a string": 1, "not valid Unicode": 1}
    assert (report.documents, report.kept) == (508, 501)
    train, val = splits(tmp_path / "out")
    assert (report.train.documents, report.val.documents) == (len(train), len(val))
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
    assert report.val.documents == pytest.approx(fraction * 500, abs=35)
    assert not report.cut


@pytest.mark.parametrize("length", [20, 99, 12_345])
def test_the_end_of_a_single_document_is_validation(tmp_path, length):
    text = ("To be, or not. " * 1000)[:length]
    (tmp_path / "play.txt").write_text(text)
    report = prepare([tmp_path / "play.txt"], tmp_path / "out")
    assert splits(tmp_path / "out") == ([text[: int(length * 0.9)]], [text[int(length * 0.9) :]])
    assert report.cut


def test_each_document_is_cut_if_there_are_too_few(source, tmp_path):
    prepare([source(["a" * 10, "b" * 20])], tmp_path / "out", val_fraction=0.001)
    train, val = splits(tmp_path / "out")
    assert len(train) == len(val) == 2


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
        prepare([source(["new", *texts], "new.jsonl")], tmp_path / "out", progress=fail)
    assert contents(tmp_path / "out") == before
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.json", "train.jsonl", "val.jsonl"]


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_kill_between_the_renames_never_leaves_files_that_do_not_belong_together(
    source, texts, tmp_path, monkeypatch, step
):
    folder = tmp_path / "out"
    prepare([source(texts)], folder)
    real, moved = Path.replace, []

    def killed(self, target):
        moved.append(target)
        if len(moved) == step:
            raise KeyboardInterrupt
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare([source(["new", *texts], "new.jsonl")], folder)
    with pytest.raises(UserError, match=r"no train\.jsonl"):
        open_corpus(folder)
    prepare([source(texts)], folder)  # repairs it
    assert sum(map(len, splits(folder))) == 500


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


def test_a_source_is_never_overwritten(source, texts, tmp_path):
    prepare([source(texts)], tmp_path / "out")
    with pytest.raises(UserError, match="choose another folder"):
        prepare([tmp_path / "out" / "train.jsonl"], tmp_path / "out")


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

    def locked(self, *args, **kwargs):  # because the tests may run as root, who has every permission
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", locked)
    with pytest.raises(UserError, match=r"no permission to use .*out, .* cannot write to .*out"):
        prepare([source(texts)], tmp_path / "out")


# ---- open_corpus ----------------------------------------------------------------------------------------------------


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
    assert corpus.name == "my-notes"
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
