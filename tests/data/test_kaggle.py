"""Downloads work, fail in one sentence, and never damage old data: the real Kaggle client against a local server."""

import fcntl
import functools
import io
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
from requests.adapters import HTTPAdapter

from mlx_gpt.data import kaggle as data_kaggle
from mlx_gpt.data.kaggle import DEFAULT_DATASET, download, from_file
from mlx_gpt.errors import UserError

from . import zips
from .kaggle_server import BLOB, DOWNLOAD, LOGIN, FakeKaggle, point_client_at, serving
from .zips import CSV, FILES, make_zip, tree, write

SECRET = "KGAT_secret"

Arrange = Callable[[FakeKaggle, pytest.MonkeyPatch], None]


refused = functools.partial(zips.refused, secret=SECRET)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeKaggle]:
    """A fake Kaggle for a freshly imported client, with a token that it accepts."""
    with serving(make_zip(FILES), SECRET, tmp_path / "home", monkeypatch) as fake:
        yield fake


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "raw"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch, server: FakeKaggle) -> None:
    """Remove the client's pauses between attempts, which add up to a minute."""
    client = import_module("kaggle.api.kaggle_api_extended")
    monkeypatch.setattr(client, "time", SimpleNamespace(sleep=lambda seconds: None, mktime=time.mktime))


# ---- downloads that succeed -----------------------------------------------------------------------------------------


def test_download_leaves_the_text_files_and_nothing_else(
    server: FakeKaggle, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lines: list[str] = []
    files = download("owner/name", folder, echo=lines.append)
    assert files == [folder / "owner-name/deep/notes.txt", folder / "owner-name/essays.csv"]
    assert [file.read_bytes() for file in files] == [FILES["deep/notes.txt"], CSV]
    assert set(tree(folder)) == {
        "owner-name",
        *(f"owner-name/{name}" for name in ("essays.csv", "deep", "deep/notes.txt", ".complete.json")),
    }
    assert any("licence" in line and "https://www.kaggle.com/datasets/owner/name" in line for line in lines)
    assert any("cover.png" in line for line in lines)
    assert capfd.readouterr() == ("", "")  # the client prints on import and on download, but nothing is shown


def test_a_version_is_requested_and_has_a_folder_of_its_own(server: FakeKaggle, folder: Path) -> None:
    assert download("owner/name/3", folder)[0].is_relative_to(folder / "owner-name-v3")
    asked = dict(server.requests)[DOWNLOAD]
    assert (asked["ownerSlug"], asked["datasetSlug"], asked["datasetVersionNumber"]) == ("owner", "name", 3)


def test_a_complete_dataset_is_used_again_without_the_network(server: FakeKaggle, folder: Path) -> None:
    files = download("owner/name", folder)
    server.requests.clear()
    lines: list[str] = []
    assert download("owner/name", folder, echo=lines.append) == files
    assert server.requests == []
    assert "already" in lines[0]


@pytest.mark.parametrize("why", ["forced", "a file is gone", "a file is shorter"])
def test_a_dataset_is_downloaded_again_if(why: str, server: FakeKaggle, folder: Path) -> None:
    essays = download("owner/name", folder)[1]
    if why == "a file is gone":
        essays.unlink()
    elif why == "a file is shorter":
        essays.write_bytes(CSV[:-5])
    server.body = make_zip({"essays.csv": b"text\nnew\n"})
    assert download("owner/name", folder, force=why == "forced") == [essays]
    assert essays.read_bytes() == b"text\nnew\n"
    assert not (folder / "owner-name/deep").exists()
    assert [path.name for path in folder.iterdir()] == ["owner-name"]


def test_only_one_of_the_default_datasets_two_editions_is_used(server: FakeKaggle, folder: Path) -> None:
    old, new = "train_essays_7_prompts.csv", "train_essays_7_prompts_v2.csv"
    server.body = make_zip({old: CSV, new: CSV})
    lines: list[str] = []
    for _ in range(2):  # downloaded, then used again
        assert [path.name for path in download(DEFAULT_DATASET, folder, echo=lines.append)] == [new]
    assert any(old in line for line in lines)
    server.body = make_zip({old: CSV})
    assert [path.name for path in download(DEFAULT_DATASET, folder, force=True)] == [old]


def test_a_body_that_stops_once_is_resumed(server: FakeKaggle, folder: Path, impatient: None) -> None:
    noise = os.urandom(1_500_000)  # the client keeps only whole mebibytes
    server.body, server.cut = make_zip({"noise.txt": noise}), 1_200_000
    assert download("owner/name", folder)[0].read_bytes() == noise
    assert [path for path, _ in server.requests].count(BLOB) == 2


# ---- downloads that fail --------------------------------------------------------------------------------------------


def network_down(server: FakeKaggle, monkeypatch: pytest.MonkeyPatch) -> None:
    point_client_at("http://127.0.0.1:1", monkeypatch)


def sets(**knobs: object) -> Arrange:
    def arrange(server: FakeKaggle, monkeypatch: pytest.MonkeyPatch) -> None:
        for knob, value in knobs.items():
            setattr(server, knob, value)

    return arrange


def fails_with(path: str, status: int) -> Arrange:
    return sets(status={path: status})


def sends(body: bytes) -> Arrange:
    return sets(body=body)


def hangs(path: str) -> Arrange:
    def arrange(server: FakeKaggle, monkeypatch: pytest.MonkeyPatch) -> None:
        server.hang = path
        monkeypatch.setattr(data_kaggle, "STALL_SECONDS", 0.2)

    return arrange


def with_token(token: str | None) -> Arrange:
    def arrange(server: FakeKaggle, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("KAGGLE_API_TOKEN") if token is None else monkeypatch.setenv("KAGGLE_API_TOKEN", token)

    return arrange


def flipped() -> bytes:
    body = bytearray(make_zip({"essays.csv": CSV}))
    body[60] ^= 0x10  # within the compressed data
    return bytes(body)


def little_room(server: FakeKaggle, monkeypatch: pytest.MonkeyPatch) -> None:
    server.body = make_zip({"zeros.txt": bytes(5_000_000)})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))


def read_only_home(server: FakeKaggle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/dev/null")


def broken_client(server: FakeKaggle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "six", None)
    monkeypatch.setitem(sys.modules, "kaggle", None)


FAILURES: dict[str, tuple[Arrange, list[str]]] = {
    "no token": (
        with_token(None),
        ["there is none", "kaggle.com/settings", "KAGGLE_API_TOKEN", "~/.kaggle/access_token"],
    ),
    "inactive token": (sets(active=False), ["does not accept", "KAGGLE_API_TOKEN", "kaggle.com/settings"]),
    "invalid token": (fails_with(LOGIN, 404), ["does not accept", "kaggle.com/settings"]),
    "token with a line break": (with_token(f"{SECRET}\n"), ["characters"]),
    "token with a character that no header can have": (with_token(f"{SECRET}\N{EURO SIGN}"), ["characters"]),
    "401 at login": (fails_with(LOGIN, 401), ["401", "kaggle.com/settings"]),
    "500 at login": (fails_with(LOGIN, 500), ["500", "later"]),
    "401": (fails_with(DOWNLOAD, 401), ["401", "kaggle.com/settings"]),
    "403": (fails_with(DOWNLOAD, 403), ["403", "accept its terms", "https://www.kaggle.com/datasets/owner/name"]),
    "404": (fails_with(DOWNLOAD, 404), ["404", "spelling", "https://www.kaggle.com/datasets/owner/name"]),
    "429": (fails_with(DOWNLOAD, 429), ["429", "wait"]),
    "500": (fails_with(DOWNLOAD, 500), ["500", "later", "--from-file"]),
    "503 from the storage": (fails_with(BLOB, 503), ["503", "later"]),
    "network down": (network_down, ["Cannot reach Kaggle", "network"]),
    "login hangs": (hangs(LOGIN), ["did not answer", "0.2 seconds"]),
    "download hangs": (hangs(DOWNLOAD), ["did not answer"]),
    "a hotel's network": (sets(html=LOGIN), ["login page"]),
    "a web page instead of a zip": (sets(html=BLOB), ["name.zip is not a zip"]),
    "not a zip": (sends(b"<html>sorry</html>"), ["name.zip is not a zip"]),
    "empty answer": (sends(b""), ["name.zip is not a zip"]),
    "truncated zip": (sends(make_zip(FILES)[:-30]), ["name.zip is damaged"]),
    "flipped byte": (sends(flipped()), ["name.zip is damaged"]),
    "no text": (sends(make_zip({"a.png": b"", "b.bin": b""})), ["no .csv", "a.png", "b.bin"]),
    "hostile": (sends(make_zip({"../evil.csv": CSV})), ["not safe"]),
    "too big for the disk": (sets(promised=10**15), ["disk is full", "it takes 1,000,000 GB", "left"]),
    "too big once unpacked": (little_room, ["disk is full", "it takes 5.00 MB", "has 1.00 MB left"]),
    "client not importable": (broken_client, ["pip install"]),
    "no home": (read_only_home, ["/dev/null"]),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failed_download_is_one_sentence_and_changes_nothing(
    case: str, server: FakeKaggle, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    old = folder / "owner-name"
    from_file(write(folder.parent / "owner-name.zip", make_zip({"old.csv": CSV})), folder)
    before = tree(folder)
    arrange, words = FAILURES[case]
    arrange(server, monkeypatch)
    stdin = io.StringIO()
    monkeypatch.setattr(sys, "stdin", stdin)
    send = HTTPAdapter.send
    sentence = refused(lambda: download("owner/name", folder))
    assert [word for word in words if word not in sentence] == [], sentence
    assert tree(folder) == before
    assert (old / "old.csv").read_bytes() == CSV
    assert sys.stdin is stdin
    assert not stdin.closed
    assert HTTPAdapter.send is send
    assert capfd.readouterr() == ("", "")


def test_a_body_that_is_always_cut_short_is_reported(server: FakeKaggle, folder: Path, impatient: None) -> None:
    server.promised = len(server.body) + 1000
    assert "cut short" in refused(lambda: download("owner/name", folder))
    assert tree(folder) == {}


def test_a_body_that_stalls_is_reported(
    server: FakeKaggle, folder: Path, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_kaggle, "STALL_SECONDS", 0.1)
    server.halfway = lambda: None
    assert "halfway" in refused(lambda: download("owner/name", folder))
    assert tree(folder) == {}


def test_ctrl_c_halfway_leaves_nothing(server: FakeKaggle, folder: Path) -> None:
    main = threading.main_thread().ident
    assert main is not None
    server.halfway = lambda: signal.pthread_kill(main, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        download("owner/name", folder)
    assert tree(folder) == {}


@pytest.mark.parametrize(("call", "count"), [("fsync", 1), ("fsync", 2), ("fsync", 3), ("rename", 1), ("rename", 2)])
@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interruption_while_unpacking_changes_nothing(
    call: str, count: int, failure: BaseException, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = write(folder.parent / "a.zip", make_zip({"old.csv": CSV}))
    from_file(archive, folder)
    before = tree(folder)
    archive.write_bytes(make_zip(FILES))
    remaining = [count]
    real = getattr(os, call)

    def fail(*args: object) -> object:
        remaining[0] -= 1
        if remaining[0] == 0:
            raise failure
        return real(*args)

    monkeypatch.setattr(os, call, fail)
    monkeypatch.delattr(fcntl, "F_FULLFSYNC", raising=False)  # so that fsync is called on a Mac, too
    with pytest.raises(KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else UserError):
        from_file(archive, folder)
    assert remaining[0] <= 0
    assert tree(folder) == before


def test_a_dataset_that_was_being_replaced_when_the_process_died_is_there_again(
    server: FakeKaggle, folder: Path
) -> None:
    download("owner/name", folder)
    before = tree(folder)
    (folder / "owner-name").rename(folder / ".owner-name.old")
    server.body = b"the network is not asked"
    download("owner/name", folder)
    assert tree(folder) == before


def test_a_second_download_leaves_the_first_to_replace_the_dataset(
    folder: Path, monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[Path, Callable[[], object]], threading.Thread]
) -> None:
    archive, target = folder.parent / "a.zip", folder / "a"
    from_file(write(archive, make_zip({"old.csv": CSV})), folder)
    write(archive, make_zip({"new.csv": CSV}))
    rename, others, found = Path.rename, [], []

    def at_once(self: Path, to: Path) -> Path:
        if to == target and threading.current_thread() is threading.main_thread():
            others.append(meanwhile(folder, lambda: found.extend(from_file(archive, folder))))
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", at_once)
    assert from_file(archive, folder) == [target / "new.csv"]
    others[0].join()
    assert found == [target / "new.csv"]
    assert [path.name for path in folder.iterdir()] == ["a"]


def test_a_folder_that_appears_during_a_download_is_kept(folder: Path) -> None:
    archive, mine = write(folder.parent / "a.zip", make_zip(FILES)), folder / "a" / "mine.csv"

    def echo(line: str) -> None:
        write(mine, b"text\n")

    assert "in the way" in refused(lambda: from_file(archive, folder, echo=echo))
    assert mine.read_bytes() == b"text\n"


@pytest.mark.parametrize(
    "dataset", ["", "name", "a/b/c", "a/b/0", "a/b/1/2", "../b", "a/..", "/a/b", "a b/c", "a/b\n/c"]
)
def test_a_misspelt_dataset_never_reaches_the_network(dataset: str, folder: Path) -> None:
    assert "owner/name" in refused(lambda: download(dataset, folder))
    assert not folder.exists()


def test_a_folder_that_was_not_downloaded_is_never_replaced(folder: Path) -> None:
    mine = write(folder / "owner-name/mine.csv", b"text\n")
    assert "in the way" in refused(lambda: download("owner/name", folder, force=True))
    assert mine.read_bytes() == b"text\n"


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "file", b"")
    assert f"in the way of the folder {file}" in refused(lambda: download("owner/name", file))


# ---- files that were downloaded by hand -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["essays.csv", "essays.CSV", "a.parquet", "b.jsonl", ".hidden.txt"])
def test_a_text_file_is_used_where_it_is(name: str, tmp_path: Path, folder: Path) -> None:
    file = write(tmp_path / name, b"text\n")
    assert from_file(file, folder) == [file]
    assert not folder.exists()


@pytest.mark.parametrize(
    ("name", "made"), [("archive.zip", "archive"), ("essays.csv.ZIP", "essays.csv"), ("..zip", "archive")]
)
def test_a_zip_is_unpacked_beside_the_downloads(name: str, made: str, tmp_path: Path, folder: Path) -> None:
    archive = write(tmp_path / name, make_zip(FILES))
    for _ in range(2):  # browsers call every download archive.zip, so a second one replaces the first
        files = from_file(archive, folder)
        assert files == [folder / made / "deep/notes.txt", folder / made / "essays.csv"]
    assert files[1].read_bytes() == CSV
    assert archive.exists()
    assert [path.name for path in folder.iterdir()] == [made]


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("page.zip", b"<html>", "is not a zip"),
        ("empty.zip", b"", "is not a zip"),
        ("short.zip", make_zip(FILES)[:100], "damaged"),
        ("pictures.zip", make_zip({"a.png": b"", "b/": b""}), "a.png"),
        ("hollow.zip", make_zip({}), "nothing"),
        ("table.xlsx", make_zip(FILES), "suffix"),
        ("no_suffix", b"text", "suffix"),
    ],
)
def test_a_file_without_usable_text_is_refused(
    name: str, content: bytes, word: str, tmp_path: Path, folder: Path
) -> None:
    file = write(tmp_path / name, content)
    sentence = refused(lambda: from_file(file, folder))
    assert word in sentence
    assert name in sentence
    assert not folder.exists() or tree(folder) == {}


def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path, folder: Path) -> None:
    assert "no file" in refused(lambda: from_file(tmp_path / "missing.csv", folder))
    assert "mlx-gpt prepare" in refused(lambda: from_file(tmp_path, folder))


def test_a_download_keeps_a_record_of_its_files(tmp_path: Path, folder: Path) -> None:
    from_file(write(tmp_path / "a.zip", make_zip(FILES)), folder)
    record = json.loads((folder / "a/.complete.json").read_text())
    assert record["source"] == "a.zip"
    assert record["files"] == {"deep/notes.txt": len(FILES["deep/notes.txt"]), "essays.csv": len(CSV)}
