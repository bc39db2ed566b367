"""Files of each format give their documents, or one sentence that says what is wrong."""

import builtins
import codecs
import csv
import json
import tracemalloc
from pathlib import Path

import pytest

from mlx_gpt.data.documents import read_documents
from mlx_gpt.data.rows import Dropped
from mlx_gpt.data.sniffing import HEAD
from mlx_gpt.errors import UserError

NASTY = "emoji 🦆, 漢字, NUL \0, \u2028 and \u0085 and \f, a BOM \ufeff, a lone \r, quotes \"' and a comma,\ttab"
PROSE = "Here is a sentence that is clearly much longer than any label or name."


@pytest.fixture
def read(tmp_path):
    """Write `content` to a file called `name` and return the documents that are read from it."""

    def write_and_read(name, content, **options):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return list(read_documents(path, **options))

    return write_and_read


def parquet(path, **columns):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)


# ---- documents ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", 'id,text\r\n1,one\r\n2,"two\r\nlines, ""quoted"""\r\n', ["one", 'two\r\nlines, "quoted"']),
        ("old-mac.csv", "id,text\r1,one\r2,two\r", ["one", "two"]),
        ("european.csv", "id;text\n1;one, two\n", ["one, two"]),
        ("blank-rows.csv", "\ntext\n\none\n\n", ["one"]),
        ("nul.csv", 'text,n\n"a\0b",1\n', ["a\0b"]),
        (
            "broken-row.csv",
            "id,text,n\n1,one,0\n2,two\nand more,0\n3,three,0\n4,four,0\n",
            ["one", Dropped("too few fields"), Dropped("too few fields"), "three", "four"],
        ),
        ("broken-text.csv", "text,n\none,0\ntwo\nand more,0\n", ["one", "two", "and more"]),
        ("trailing.csv", "id,text\n1,one,\n2,two, \n", ["one", "two"]),
        (
            "long-row.csv",
            "id,text\n1,one,more\n2,two\n3,three\n",
            [Dropped("more fields than the header"), "two", "three"],
        ),
        ("one-column.csv", 'text\nHello, world\n"Bye, moon"\n', ["Hello, world", "Bye, moon"]),
        ("spaced.csv", 'id, text\n1, "one, two"\n2, "a\nb"\n', ["one, two", "a\nb"]),
        ("indented.csv", "id,text\n1,    return x\n", ["    return x"]),
        (
            "late-space.csv",
            "text,n\n" + "one,1\n" * 20_000 + ' "two",2\n',
            ["one"] * 20_000 + [Dropped("a space before a quotation mark")],
        ),
        ("comments.csv", "# made by me, 2024\n\nid,text\n1,one\n", [Dropped("commented out above the header"), "one"]),
        ("hash-text.csv", "#text,n\none,1\n", ["one"]),
        ("excel.csv", "sep=;\nid;text\n1;one, two\n", ["one, two"]),
        ("blank-first.csv", "\nid;text\n1;one, two\n", ["one, two"]),
        ("bars.csv", "id|text\n1|one, two; three\n", ["one, two; three"]),
        ("both.csv", "text,a|b\none,x|y\n", ["one"]),
        ("commas.tsv", "id,text\n1,one\n", ["one"]),
        ("one-column.tsv", "text\none, two\n", ["one, two"]),
        ("short-row.csv", "id,text\n1\n2,two\n", [Dropped("too few fields"), "two"]),
        ("a.tsv", "id\ttext\n1\tone, two\n", ["one, two"]),
        ("UPPER.CSV", "text\none\n", ["one"]),
        ("a.jsonl", '{"text": "one"}\r\n\n"two"\n', ["one", "two"]),
        ("array.jsonl", '[{"text": "one"}, {"text": 5}, "two"]', ["one", Dropped("not a string"), "two"]),
        ("array.json", '[\n  {\n    "text": "one"\n  },\n  {\n    "text": "two"\n  }\n]\n', ["one", "two"]),
        ("empty-array.json", " [ ] ", []),
        ("indented.json", '{\n  "text": "one"\n}\n{\n  "text": "two"\n}\n', ["one", "two"]),
        ("numbers.json", "1 2.5\n-3", [Dropped("not a string")] * 3),
        ("a.ndjson", '"one"\n"two"', ["one", "two"]),
        (
            "holes.jsonl",
            '{"text": "one"}\n{"text": 5}\n{"txt": "x"}\n[1]\nnull\n',
            ["one", *map(Dropped, ["not a string", "column missing", "not a string", "not a string"])],
        ),
        ("surrogate.jsonl", '"\\ud800"\n"\\ud83e\\udd86"\n', [Dropped("not valid Unicode"), "🦆"]),
        ("a.txt", "one\n\ntwo\n", ["one\n\ntwo\n"]),
        ("notes", "no suffix", ["no suffix"]),
        ("a.md", "# one\n", ["# one\n"]),
        ("train.txt", "one\r\n\ntwo\r  \nthree", ["one", "two", "three"]),
        ("short.txt", "\0\0a", None),
        ("nuls.txt", "four \0\0\0\0 " * 20, None),
        ("few-nuls.txt", "a\0b\0 and a text with many more letters than NULs in it", None),
    ],
)
def test_documents_of_each_format(read, name, content, expected):
    assert read(name, content) == ([content] if expected is None else expected)


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ("file", ["a\nb\n\n \n\nc\u2028c\u0085c\n"]),
        ("auto", ["a\nb\n\n \n\nc\u2028c\u0085c\n"]),
        ("line", ["a", "b", "c\u2028c\u0085c"]),
        ("blank-line", ["a\nb", "c\u2028c\u0085c"]),
    ],
)
def test_plain_text_is_cut_as_requested(read, documents, expected):
    assert read("a.txt", "a\nb\n\n \n\nc\u2028c\u0085c\n", documents=documents) == expected


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.txt", "a.parquet"])
def test_every_character_survives(tmp_path, name):
    path = tmp_path / name
    if name == "a.csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["n", "text"], [1, NASTY]])
    elif name == "a.jsonl":
        path.write_bytes(json.dumps({"text": NASTY}, ensure_ascii=False).encode())
    elif name == "a.parquet":
        parquet(path, text=[NASTY])
    else:
        path.write_bytes(NASTY.encode())
    assert list(read_documents(path)) == [NASTY]


@pytest.mark.parametrize(
    ("bom", "encoding"),
    [
        (b"", "utf-8"),
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
    ],
)
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.txt"])
def test_encodings_are_recognised(read, bom, encoding, name):
    content = 'text\r\n"đàn\r\nਊ 🦆"\r\n'  # both bytes of U+0A0A are those of a line feed
    found = read(name, bom + content.encode(encoding))
    assert found == ([content] if name == "a.txt" else ["đàn\r\nਊ 🦆"])


def test_a_field_of_ten_megabytes_is_read_whole(read):
    text = f"{PROSE}, more\n" * 140_000
    assert read("a.csv", f'text,n\n"{text}",1\n') == [text]


def test_parquet_strings_are_read_and_nulls_are_dropped(tmp_path):
    parquet(tmp_path / "a.parquet", n=[1, 2, 3], text=["one", None, "three"])
    assert list(read_documents(tmp_path / "a.parquet")) == ["one", Dropped("not a string"), "three"]


def test_damaged_parquet_is_refused_in_one_sentence(tmp_path):
    path = tmp_path / "a.parquet"
    parquet(path, text=["some text", "and more"] * 50)
    content = path.read_bytes()
    path.write_bytes(content[:4] + bytes(len(content) // 2) + content[4 + len(content) // 2 :])
    with pytest.raises(UserError, match=r"a\.parquet is damaged or not Parquet") as caught:
        list(read_documents(path))
    assert "\n" not in str(caught.value)


def test_all_bytes_are_reported_as_they_are_read(tmp_path):
    sizes: list[int] = []
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "one\n" * 1000)
    list(read_documents(path, advance=sizes.append))
    assert sum(sizes) == path.stat().st_size


def test_documents_are_yielded_before_the_file_is_read_to_its_end(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "one\n" * 100_000)
    sizes: list[int] = []
    assert next(read_documents(path, advance=sizes.append)) == "one"
    assert sum(sizes) < 1000


# ---- the text column ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "row", "column", "expected"),
    [
        ("text,essay", f"short,{PROSE}", "", "short"),
        ("Text,TITLE", f"short,{PROSE}", "", "short"),
        ("Text,text", "capital,exact", "", "exact"),
        ("id,essay,label", f"7,{PROSE},0.5", "", PROSE),
        (" text ,n", "short,1", "", "short"),
        ("text,title", "one,two", "title", "two"),
        ("text,Title", "one,two", "title", "two"),
    ],
)
def test_the_text_column_is_found(read, header, row, column, expected):
    assert read("a.csv", f"{header}\n{row}\n", column=column) == [expected]


@pytest.mark.parametrize("header", ["id,,body", ",body,", ",body", "body,,", ",,\nbody,,", "id,note,note,body"])
def test_columns_without_a_name_of_their_own_are_no_hindrance(read, header):
    blank = {"": "", "id": "{n}", "note": "short", "body": f"{PROSE} {{n}}"}
    names = header.split("\n")[-1].split(",")
    row = ",".join("{n}" if i == 0 and name == "" else blank[name] for i, name in enumerate(names))
    rows = [row.format(n=n) for n in range(3)]
    found = read("a.csv", "\n".join([header, *rows]))
    assert [text for text in found if isinstance(text, str)] == [f"{PROSE} {n}" for n in range(3)]


@pytest.mark.parametrize("mark", [",", ";"])
@pytest.mark.parametrize(
    ("above", "header", "word"),
    [
        ("Essays of class 7,,", "id,grade,text", "title above its header (id, grade, text)"),
        ("Essays of class 7,,\n,,", "id,grade,text", "title above its header (id, grade, text)"),
        ("Essays of class 7,,\nby Ms Smith,,", "id,grade,body", "title above its header (id, grade, body)"),
        ("Essays,,Ms Smith", "id,grade,body", "title above its header (id, grade, body)"),
        (",,Essays", "author,author,body", "only 'Essays'"),
        ("My table,", "id,text", "title above its header (id, text)"),
        ("My table,,", "text,,", "title above its header (text)"),
        ("", "id,,", "only 'id'"),
        ("", "id,author,", "column 3, which has no name"),
    ],
)
def test_a_title_above_the_header_or_a_text_column_without_a_name_is_refused(read, mark, above, header, word):
    values = {"id": "{n}", "grade": "2", "author": "Ada"}
    row = [values.get(name, "") for name in header.split(",")]
    row[0 if header == "text,," else -1] = f"{PROSE} {{n}}"
    lines = [*([above] if above else []), header, *(",".join(row).format(n=n) for n in range(3))]
    with pytest.raises(UserError) as caught:
        read("a.csv", "\n".join(lines).replace(",", mark))
    assert word in str(caught.value)


def test_of_two_columns_with_one_name_neither_takes_the_place_of_the_other(read):
    with pytest.raises(UserError, match=r"one of id, note \(column 2\), note \(column 3\)"):
        read("a.csv", f"id,note,note\n1,{PROSE},{PROSE}\n")
    assert read("a.csv", f"id,note,note\n1,{PROSE},b\n") == [PROSE]


def test_the_only_name_of_a_table_is_counted_as_it_may_be_a_text(read):
    assert read("a.csv", "Hello\nyou\n") == [Dropped("first row, taken for the column's name"), "you"]
    assert read("a.csv", "Hello\nyou\n", column="hello") == ["you"]


@pytest.mark.parametrize("line", ["# made by me, 2024\nid,body", "#id,body"])
def test_a_first_line_with_a_hash_is_a_comment_or_a_header(read, line):
    found = read("a.csv", f"{line}\n1,one\n2,two\n", column="body")
    assert [text for text in found if isinstance(text, str)] == ["one", "two"]


def test_a_column_that_comes_late_is_read_if_it_is_named(read):
    content = '{"title": "x"}\n' * 150 + '{"title": "x", "body": "late"}\n'
    assert read("a.jsonl", content, column="body") == [Dropped("column missing")] * 150 + ["late"]
    assert read("a.jsonl", content, column="title") == ["x"] * 151
    assert read("a.jsonl", '"x"\n' * 150 + '{"title": "x", "text": "late"}\n') == ["x"] * 150 + ["late"]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}, "conversations"),
        ({"prompt": "a", "completion": "b"}, "conversations"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preferences"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_conversations_are_no_documents_but_each_column_of_strings_is(tmp_path, name, row, what):
    path = tmp_path / name
    if name == "a.parquet":
        parquet(path, **{column: [value] * 3 for column, value in row.items()})
    else:
        path.write_text(json.dumps([row] * 3) if name == "a.json" else f"{json.dumps(row)}\n" * 3)
    with pytest.raises(UserError, match=rf"{name} holds {what}, not documents: .* --column"):
        list(read_documents(path))
    for column, value in row.items():
        if isinstance(value, str):
            assert list(read_documents(path, column=column)) == [value] * 3
        else:
            with pytest.raises(UserError, match=rf"has lists or objects in its column '{column}'"):
                list(read_documents(path, column=column))


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_lists_of_numbers_hold_no_text(tmp_path, name):
    path = tmp_path / name
    row = {"body": "short", "vector": [0.5, 1.5], "box": {"x": 1}}
    if name == "a.parquet":
        parquet(path, **{column: [value] * 2 for column, value in row.items()})
    else:
        path.write_text(f"{json.dumps(row)}\n" * 2)
    assert list(read_documents(path)) == ["short"] * 2


def test_a_text_beside_a_conversation_is_read(read):
    assert read("a.jsonl", '{"messages": [{"role": "user"}], "text": "one"}\n') == ["one"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_the_only_column_of_strings_is_the_text_however_short(tmp_path, name):
    path = tmp_path / name
    if name == "a.jsonl":
        path.write_text('{"n": 1, "body": "short"}\n')
    else:
        parquet(path, n=[1], body=["short"])
    assert list(read_documents(path)) == ["short"]


@pytest.mark.parametrize(
    ("name", "content", "column", "words"),
    [
        ("a.csv", f"one,two\n{PROSE},{PROSE}\n", "", ["--column NAME", "one, two"]),
        ("a.csv", "one,two\na,b\n", "", ["--column NAME", "one, two"]),
        ("a.csv", "one,two\na,b\n", "three", ["no column 'three'", "one, two"]),
        ("a.jsonl", '{"a": "x", "b": "y"}\n', "", ["--column NAME", "a, b"]),
        ("a.jsonl", '{"a": 1}\n', "", ["--column NAME", "a"]),
        ("a.jsonl", '{"a": "x", "b": "y"}\n', "c", ["no column 'c'", "a, b"]),
        ("a.csv", f"1,{PROSE * 3}\n2,{PROSE}\n", "", ["no header", "`text`"]),
        ("a.csv", "I am a text.\nI am one, too\n", "", ["no header", "--column"]),
        ("a.csv", f"ham,hello\nspam,{PROSE}\nham,{PROSE}\n", "", ["no header", "--column"]),
        ("a.csv", "My report\nid,body\n1,one\n2,two\n", "", ["one name in its first row", "names all columns"]),
        ("a.csv", "id,text\n1,one,more\n2,two,more\n", "", ["row 1", "more fields than the header", "quotation"]),
        ("a.csv", "body\tid\none,1\ntwo,2\na,3\n", "id", ["row 1", "too few fields"]),
        ("a.csv", "text,text\na,b\n", "", ["2 columns", "'text'", "rename"]),
        (
            "a.jsonl",
            '{"t": "x"}\n' * 100 + '{"t": "x", "text": "y"}\n',
            "",
            ["line 101", "--column text or --column t"],
        ),
        ("a.json", '{"version": "1.1", "data": [{"title": "x"}]}', "", ["in data", "--column (version)"]),
        ("a.json", '{"title": "a", "parts": ["x"]}\n' * 2, "", ["in parts", "--column (title)"]),
        ("a.json", '{"text": {"0": "a", "1": "b"}}', "", ["lists or objects", "'text'"]),
        ("a.json", '{"text": ["a", "b"]}', "text", ["lists or objects", "'text'"]),
        ("a.csv", "7,0.5\n8,0.5\n", "", ["no header"]),
        ("a.csv", "text\n", "", ["no rows", "header"]),
        ("a.csv", "\n\n", "", ["no rows", "header"]),
    ],
)
def test_an_unclear_column_is_refused_with_the_names_to_choose_from(read, name, content, column, words):
    with pytest.raises(UserError) as caught:
        read(name, content, column=column)
    assert all(word in str(caught.value) for word in words), caught.value


# ---- files that cannot be read --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", ["a.txt is empty"]),
        ("a.txt", b"one\ntwo\ncaf\xe9\n", ["line 3", "offset 11", "save the file as UTF-8"]),
        ("a.csv", b'n,text\n1,"a\nb"\n2,caf\xe9\n', ["row 2", "offset 20", "save the file as UTF-8"]),
        ("a.csv", b"n,t\xe9xt\n1,a\n", ["header row", "offset 3"]),
        ("a.jsonl", b'"one"\n"\xe9"\n', ["line 2", "offset 7", "UTF-8"]),
        ("a.txt", codecs.BOM_UTF16_LE + "one\ntwo".encode("utf-16-le")[:-1], ["line 2", "UTF-16", "offset 14"]),
        ("a.txt", b"\xef\xbb\xbfone\n\xe9", ["line 2", "offset 7"]),
        ("a.csv", 'n,text\n1,a\n2,"never closed\n3,b\n', ["row 2", "not valid CSV (a quotation mark is never closed)"]),
        ("a.csv", 'text\n"a"b\n', ["row 1", "not valid CSV (text after a closing quotation mark)"]),
        ("a.jsonl", '{"text": "one"}\n{"text": \n', ["line 2", "not valid JSON"]),
        ("a.jsonl", "[" * 100_000, ["line 1", "not valid JSON"]),
        ("a.jsonl", '{"text": "one"},\n{"text": "two"}\n', ["line 1", "not valid JSON"]),
        ("a.json", '[\n"one",\n"two"\n"three"\n]', ["line 4", "no comma"]),
        ("a.json", '["one"]\n["two"]\n', ["line 2", "follows an array"]),
        ("a.json", '["one",\n"two"', ["line 2", "not valid JSON"]),
        ("a.json", '{"deep": ' + "[" * 900 + '"x"' + "]" * 900 + "}", ["a.json"]),
        ("a.json", '{"text": "one", "text": "two"}', ["line 1", "one name twice"]),
        ("a.parquet", b"PAR1 but no more", ["not Parquet"]),
        ("a.zip", b"PK\x03\x04rest", ["zip archive"]),
    ],
)
def test_an_unreadable_file_is_refused_in_one_sentence(read, name, content, words):
    with pytest.raises(UserError) as caught:
        read(name, content)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert name in message
    assert "\n" not in message


def test_what_is_dropped_has_its_place(tmp_path):
    table, objects = tmp_path / "a.csv", tmp_path / "a.json"
    table.write_text('id,text\n1,"a\nb"\n2,c\n3,d,e\n')
    objects.write_text('[\n  {"text": "a"},\n  {"text":\n 5},\n  {}\n, "\\ud800"]')
    for path, places in ((table, ["row 3"]), (objects, ["line 3", "line 5", "document 4"])):
        found = [document.place for document in read_documents(path) if isinstance(document, Dropped)]
        assert found == [f"{path}, {place}" for place in places]


def test_a_big_array_on_one_line_is_read_in_little_memory(tmp_path):
    path = tmp_path / "a.json"
    text = "x" * 1000
    path.write_text("[" + ", ".join(json.dumps({"text": f"{i} {text}"}) for i in range(10_000)) + "]")
    tracemalloc.start()
    assert sum(1 for _ in read_documents(path)) == 10_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000 < path.stat().st_size / 5


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.json"])
def test_each_encoding_is_told_by_its_byte_order_mark(read, name, encoding):
    text = "漢字 🦆 \N{LATIN SMALL LETTER E WITH ACUTE}, " * 9_000  # more than is read at once
    content = {"a.txt": text, "a.csv": f'n,text\r\n1,"{text}"\r\n', "a.json": json.dumps([text], ensure_ascii=False)}[
        name
    ]
    mark = "" if encoding == "utf-8-sig" else "\ufeff"
    assert read(name, (mark + content).encode(encoding)) == [text]


def test_line_endings_survive_the_ends_of_pieces(read):
    for ending in ("\n", "\r", "\r\n"):
        for before in (HEAD - 2, HEAD - 1, HEAD):
            assert read("a.txt", "x" * before + ending + "y", documents="line") == ["x" * before, "y"]


def test_rows_before_a_broken_one_are_still_yielded(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"text\n" + b"fine\n" * 150 + b"\xe9\n")
    documents = read_documents(path)
    assert [next(documents) for _ in range(150)] == ["fine"] * 150
    with pytest.raises(UserError, match="row 151"):
        next(documents)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no file or folder .*gone\.txt"):
        list(read_documents(tmp_path / "gone.txt"))


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a file"):
        list(read_documents(tmp_path))


def test_a_file_without_permission_is_named(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("secret")

    def locked(self, *args, **kwargs):  # because the tests may run as root, who has every permission
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", locked)
    with pytest.raises(UserError, match=r"no permission to use .*a\.txt, .* cannot read .*a\.txt"):
        list(read_documents(path))


def test_a_document_or_line_that_is_too_long_is_refused(read, monkeypatch):
    monkeypatch.setattr("mlx_gpt.data.documents.MAX_DOCUMENT", 100)
    assert len(read("a.txt", "ten chars\n\n" * 20, documents="blank-line")) == 20
    with pytest.raises(UserError, match="--documents blank-line"):
        read("a.txt", "ten chars\n" * 20)
    monkeypatch.setattr("mlx_gpt.data.decoding.MAX_LINE", 100)
    with pytest.raises(UserError, match="line of over"):
        read("a.txt", "x" * 101, documents="line")
    monkeypatch.setattr("mlx_gpt.data.json_rows.MAX_LINE", 100)
    assert read("a.json", json.dumps(["x" * 50] * 10_000)) == ["x" * 50] * 10_000
    with pytest.raises(UserError, match="line 2 has a value of over"):
        read("a.json", '["short",\n"' + "x" * 2 * HEAD + '"]')


def test_an_unknown_way_to_cut_text_lists_the_known_ones(read):
    with pytest.raises(UserError, match="auto, line, blank-line, file"):
        read("a.txt", "one", documents="page")


def test_without_pyarrow_parquet_says_what_to_install(read, monkeypatch):
    real = builtins.__import__

    def no_pyarrow(name, *args, **kwargs):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_pyarrow)
    with pytest.raises(UserError, match=r"pip install -e '\.\[parquet\]'"):
        read("a.parquet", b"PAR1")
