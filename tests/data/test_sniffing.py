"""A file without text is refused with a sentence that says what it is and what to do."""

import pytest

from mlx_gpt.data.sniffing import refusal


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", ["a.txt is empty"]),
        ("a.csv", b"PK\x03\x04rest", ["zip archive", "unpack it first", "mlx-gpt download --from-file"]),
        ("a.xlsx", b"PK\x03\x04rest", ["Excel", "save it as CSV"]),
        ("a.docx", b"PK\x03\x04rest", ["Word", ".txt"]),
        ("a.csv.gz", b"\x1f\x8b\x08rest", ["gzip", "unpack"]),
        ("a.pdf", b"%PDF-1.7\n", ["PDF", ".txt"]),
        ("a.png", b"\x89PNG\r\n\x1a\n\0\0", ["PNG"]),
        ("a.safetensors", b"\x40\0\0\0\0\0\0\0" + b'{"wte.weight": {}}', ["safetensors"]),
        ("a.tar", b"name".ljust(257, b"\0") + b"ustar" + b"0" * 999, ["tar archive"]),
        ("a.bin", bytes(range(256)), ["binary"]),
        ("a.bin", bytes(1000), ["binary"]),
        ("a.txt", "UTF-16 that does not say so".encode("utf-16-le"), ["UTF-16", "save it as UTF-8"]),
        ("a.txt", b"PAR1\x15\x04", [".parquet"]),
    ],
)
def test_a_file_without_text_is_refused_in_one_sentence(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    reason = refusal(path)
    assert all(word in reason for word in words), reason
    assert name in reason
    assert reason.endswith(".")
    assert "\n" not in reason


@pytest.mark.parametrize(
    "content",
    [
        b"text",
        b"\0\0a",
        b"four \0\0\0\0 " * 20,
        b"caf\xe9",  # the reader of the format reports where the byte is
        b"\x01\x01" + "漢".encode() * 30_000,  # the block that is checked ends inside a character
        "UTF-16 that says so".encode("utf-16"),
    ],
)
def test_a_file_that_may_be_text_is_not_refused(tmp_path, content):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    assert refusal(path) == ""


def test_a_folder_is_refused(tmp_path):
    assert "not a file" in refusal(tmp_path)
