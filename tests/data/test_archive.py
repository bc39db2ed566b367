"""Hostile zips are refused in one sentence and leave nothing behind."""

import shutil
import stat
import struct
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from mlx_gpt.data import archive as data_archive
from mlx_gpt.data.archive import extract, fault_in_name
from mlx_gpt.errors import UserError

from .zips import CSV, FILES, make_zip, raw_zip, refused, tree, write

GOOD = ("good.csv", CSV)

BAD_NAMES = [
    *(
        "/etc/evil.csv",
        "//evil.csv",
        "../evil.csv",
        "../../evil.csv",
        "a/../../evil.csv",
        "a/..",
        "..",
        "../",
        "/",
        ".",
        "./",
    ),
    *("a/../evil.csv", "C:evil.csv", "C:/evil.csv", "c:\\evil.csv", "\\evil.csv", "..\\evil.csv", "a\\..\\evil.csv"),
    *(
        "\\\\host\\share\\evil.csv",
        "a\nb.csv",
        "a\rb.csv",
        "\x1b[2Jevil.csv",
        "evil.csv\x7f",
        "nul\0.csv",
        "../nul\0.csv",
    ),
    *("x" * 252 + ".csv", "é" * 130 + ".csv", "/".join("y" * 99 for _ in range(12)) + ".csv", "d/" * 600 + "evil.csv"),
    *("GOOD.CSV", "good.csv", "Good.csv", "./good.csv", "good.csv/inside.csv", "GOOD.csv/x/inside.csv"),
]


@pytest.mark.parametrize("place", ["alone", "first", "last"])
def test_hostile_names(place: str, tmp_path: Path) -> None:
    before = None
    for number, name in enumerate(BAD_NAMES):
        clashes = "good" in name.lower()
        if place == "alone" and clashes:
            continue
        evil = (name, b"evil")
        members = {"alone": [evil], "first": [evil, GOOD], "last": [GOOD, evil]}[place]
        archive = raw_zip(tmp_path / "a.zip", members)
        before = tree(tmp_path)
        sentence = refused(lambda archive=archive: extract(archive, tmp_path / "in/here"))  # type: ignore[misc]
        assert ("with one name" if clashes else "not safe") in sentence, (number, sentence)
        assert len(sentence) < 300
        assert not (tmp_path / "in/here").exists()
        assert set(tree(tmp_path)) - set(before) <= {"in"}


def test_a_hostile_member_that_is_not_wanted_rejects_the_zip_too(tmp_path: Path) -> None:
    archive = raw_zip(tmp_path / "a.zip", [GOOD, ("../evil.png", b"evil")])
    assert "not safe" in refused(lambda: extract(archive, tmp_path / "here"))


def test_accents_written_in_two_ways_clash(tmp_path: Path) -> None:
    archive = raw_zip(
        tmp_path / "a.zip", [("caf\N{LATIN SMALL LETTER E WITH ACUTE}.csv", b"1"), ("CAFe\u0301.csv", b"2")]
    )
    assert "with one name" in refused(lambda: extract(archive, tmp_path / "here"))


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK])
def test_links_and_devices(kind: int, tmp_path: Path) -> None:
    archive = raw_zip(tmp_path / "a.zip", [("passwords.txt", b"/etc/passwd")], (kind | 0o777) << 16)
    assert "link or a device" in refused(lambda: extract(archive, tmp_path / "here"))
    assert set(tree(tmp_path)) == {"a.zip"}


def test_a_locked_zip(tmp_path: Path) -> None:
    body = bytearray(make_zip({"a.csv": CSV}))
    body[6] |= 1
    body[body.index(b"PK\1\2") + 8] |= 1
    assert "password" in refused(lambda: extract(write(tmp_path / "a.zip", bytes(body)), tmp_path / "here"))


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2, 9, 97])
def test_unusual_compression(method: int, tmp_path: Path) -> None:
    body = bytearray(make_zip({"a.csv": CSV}))
    body[8] = body[body.index(b"PK\1\2") + 10] = method
    assert "unusual" in refused(lambda: extract(write(tmp_path / "a.zip", bytes(body)), tmp_path / "here"))


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as bomb, bomb.open("zeros.csv", "w") as member:
        for _ in range(70):
            member.write(bytes(1_000_000))
    assert " would become 70.0 MB" in refused(lambda: extract(archive, tmp_path / "here"))
    assert set(tree(tmp_path)) == {"a.zip"}


@pytest.mark.parametrize("claim", [0, 10, 2**31])
def test_a_wrong_size_in_the_header_is_refused(claim: int, tmp_path: Path) -> None:
    body = bytearray(make_zip({"a.csv": CSV}))
    central = body.index(b"PK\1\2")
    body[22:26] = body[central + 24 : central + 28] = claim.to_bytes(4, "little")
    sentence = refused(lambda: extract(write(tmp_path / "a.zip", bytes(body)), tmp_path / "here"))
    assert "damaged" in sentence or "suspiciously large" in sentence
    assert set(tree(tmp_path)) == {"a.zip"}


def test_too_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_archive, "MAX_MEMBERS", 3)
    archive = write(tmp_path / "a.zip", make_zip(FILES))
    assert "more than 3" in refused(lambda: extract(archive, tmp_path / "here"))


def crowded_zip(members: int, record: str) -> bytes:
    """Make a zip of many empty files, whose last record has their number (`zip64`) or claims one file (`lying`)."""
    header = struct.Struct(zipfile.structCentralDir)  # type: ignore[attr-defined]
    one = header.pack(zipfile.stringCentralDir, 20, 0, 20, *[0] * 8, 1, *[0] * 6) + b"a"  # type: ignore[attr-defined]
    size, zip64 = members * len(one), b""
    if record == "zip64":
        zip64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, members, members, size, 0)
        zip64 += struct.pack("<4sLQL", b"PK\6\7", 0, size, 1)
    counts = (0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF) if zip64 else (1, 1, size, 0)
    return one * members + zip64 + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, *counts, 0)


@pytest.mark.parametrize("record", ["zip64", "lying"])
def test_the_table_of_too_many_files_is_not_parsed(record: str, tmp_path: Path) -> None:
    few = write(tmp_path / "few.zip", crowded_zip(3, record))
    with zipfile.ZipFile(few) as zipped:
        assert len(zipped.infolist()) == 3  # `zipfile` accepts such a zip
    archive = write(tmp_path / "a.zip", crowded_zip(200_000, record))
    tracemalloc.start()
    try:
        assert "a.zip holds more than 100,000 files" in refused(lambda: extract(archive, tmp_path / "here"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * archive.stat().st_size + 4 * 10**6


def test_a_table_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_archive, "MAX_DIRECTORY", 200)
    archive = write(tmp_path / "a.zip", make_zip(FILES))
    assert "more than 100,000" in refused(lambda: extract(archive, tmp_path / "here"))


def test_any_damage_gives_one_sentence_or_the_original_text(tmp_path: Path) -> None:
    whole = make_zip({"a.csv": CSV[:200], "b/c.txt": b"text " * 9})
    damaged = [whole[:length] for length in range(0, len(whole), 7)]
    for position in range(len(whole)):
        damaged.append(whole[:position] + bytes([whole[position] ^ (1 << position % 8)]) + whole[position + 1 :])
    here, archive = tmp_path / "here", tmp_path / "a.zip"
    for body in damaged:
        archive.write_bytes(body)
        try:
            paths = extract(archive, here)
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017 - some damage, such as to a date, does no harm
        else:
            assert {path.read_bytes() for path in paths} <= {CSV[:200], b"text " * 9}
            shutil.rmtree(here)
        assert set(tree(tmp_path)) == {"a.zip"}


def test_unusual_but_harmless_names_are_unpacked(tmp_path: Path) -> None:
    names = [
        "a.csv",
        "./b.csv",
        "deep/er/still/c.csv",
        "caf\u00e9.txt",
        "Bild 9.41\N{NARROW NO-BREAK SPACE}PM.md",
        "a..b.csv",
    ]
    archive = raw_zip(tmp_path / "a.zip", [(name, name.encode()) for name in names], (stat.S_IFREG | 0o644) << 16)
    paths = extract(archive, tmp_path / "here")
    assert {path.relative_to(tmp_path / "here").as_posix(): path.read_bytes() for path in paths} == {
        name.removeprefix("./"): name.encode() for name in names
    }


def test_the_caller_chooses_the_members(tmp_path: Path) -> None:
    archive = write(tmp_path / "a.zip", make_zip(FILES))
    assert extract(archive, tmp_path / "here", wanted=lambda name: name.endswith(".png")) == [
        tmp_path / "here/cover.png"
    ]


def test_a_readme_and_a_licence_are_no_part_of_a_text_unless_there_is_nothing_else(tmp_path: Path) -> None:
    lines: list[str] = []
    files = {"README.md": b"About.", "a/LICENSE.txt": b"MIT.", "a/essays.csv": CSV, "readme first.txt": b"Read."}
    zipped = write(tmp_path / "a.zip", make_zip(files))
    found = extract(zipped, tmp_path / "a", echo=lines.append)
    assert [path.name for path in found] == ["essays.csv", "readme first.txt"]
    assert lines == ["Skipping files that do not belong to the text: 'README.md', 'a/LICENSE.txt'."]
    beside = write(tmp_path / "c.zip", make_zip({"README.md": b"About.", "data.json": b'["a text"]'}))
    assert extract(beside, tmp_path / "c") == [tmp_path / "c/data.json"]
    alone = write(tmp_path / "b.zip", make_zip({"README.md": b"A text."}))
    assert extract(alone, tmp_path / "b") == [tmp_path / "b/README.md"]


def test_json_is_unpacked_where_there_is_no_other_text(tmp_path: Path) -> None:
    files = {"a/data.json": b'["a text"]', "a/.hidden.json": b"{}", "photo.png": b"x"}
    alone = write(tmp_path / "a.zip", make_zip(files))
    assert extract(alone, tmp_path / "a") == [tmp_path / "a/a/data.json"]
    beside = write(tmp_path / "b.zip", make_zip(files | {"a.csv": CSV}))
    assert extract(beside, tmp_path / "b") == [tmp_path / "b/a.csv"]


def test_extract_never_adds_to_a_folder(tmp_path: Path) -> None:
    archive = write(tmp_path / "a.zip", make_zip(FILES))
    mine = write(tmp_path / "here/mine.csv", b"")
    assert "already exists" in refused(lambda: extract(archive, tmp_path / "here"))
    assert mine.exists()


def test_a_name_that_no_file_can_have_is_a_fault():
    assert fault_in_name("train\ud800.jsonl") == "has a name that is not valid Unicode"
    assert fault_in_name("tr\u00e4in.jsonl") is None
