"""An interruption at any change to a file leaves the old corpus or the new one, and no leftovers after the next run."""

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_gpt import files
from mlx_gpt.data.corpus import open_corpus
from mlx_gpt.data.prepare import prepare
from mlx_gpt.errors import UserError
from mlx_gpt.files import READY, publish, remove_leftovers, temporary_folder, write_text_whole, write_whole
from tests.data import interrupting
from tests.faults import at_each_change, disk_full, raising

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("strike", [disk_full, raising(KeyboardInterrupt)], ids=["full disk", "Ctrl-C"])
def test_an_error_at_any_change_loses_nothing(tmp_path, monkeypatch, strike):
    monkeypatch.setattr(files, "flush", lambda handle: None)  # disks are slow
    interrupting.start(tmp_path)
    strikes = at_each_change(tmp_path, lambda: interrupting.work(tmp_path), strike)
    assert interrupting.check_each(tmp_path, strikes) > 20


def test_a_kill_at_any_change_loses_nothing(tmp_path):
    command = [sys.executable, "-m", "tests.data.interrupting", str(tmp_path)]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert int(answer.stdout.split()[0]) > 20


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_process_after_it_has_cleaned_up(tmp_path, number):
    program = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from mlx_gpt.files import write_whole\n"
        "write_whole(Path(sys.argv[1]), lambda part: os.kill(os.getpid(), int(sys.argv[2])))\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "tokens.npy", str(int(number))], cwd=ROOT, check=False
    )
    assert answer.returncode == -number
    assert not list(tmp_path.iterdir())


def test_what_another_process_is_writing_stays(tmp_path):
    def write(part):
        part.write_bytes(b"half")
        # This stands for another process, because each opened file has a lock of its own.
        remove_leftovers(tmp_path)
        write_text_whole(tmp_path / "b.npy", "whole")
        assert part.read_bytes() == b"half"

    with temporary_folder(tmp_path) as staged:
        (staged / "train.jsonl").write_text("half")
        write_whole(tmp_path / "a.npy", write)
        assert (staged / "train.jsonl").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npy", "b.npy"]


def test_leftovers_of_a_dead_process_are_removed_and_nothing_else(tmp_path):
    dead = [".tokens.train.4711-140000.part.npy", ".model.4711-140000.part.safetensors", ".run.4711-140000.part"]
    own = [".notes.part", ".4711-140000.party", "a.4711-140000.part.npy", ".hidden"]
    for name in [*dead[:2], *own]:
        (tmp_path / name).touch()
    (tmp_path / dead[2]).mkdir()
    (tmp_path / dead[2] / "train.jsonl").touch()
    write_text_whole(tmp_path / "file", "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*own, "file"])


def test_leftovers_of_other_texts_in_the_cache_are_removed(tmp_path):
    cache = tmp_path / "cache"
    for folder in (cache / "other-1234", tmp_path / "data"):
        folder.mkdir(parents=True)
        (folder / ".abc.train.4711-140000.part.npy").touch()
    for split in ("train", "val"):
        (tmp_path / "data" / f"{split}.txt").write_text(f"{split}\n")
    open_corpus(tmp_path / "data", cache=cache)
    assert not list(tmp_path.rglob(".*"))
    assert not list(cache.iterdir()), "nor is the folder left, which is empty now"


def test_a_failure_leaves_no_empty_folder(tmp_path):
    (tmp_path / "text.txt").write_text(" ")
    with pytest.raises(UserError):
        prepare([tmp_path / "text.txt"], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_a_folder_without_locks_keeps_its_leftovers(tmp_path, monkeypatch):
    def unsupported(handle, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    (tmp_path / ".a.4711-140000.part").touch()
    write_text_whole(tmp_path / "file", "text")  # works without a lock
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.4711-140000.part", "file"]


@pytest.fixture
def order(tmp_path, monkeypatch):
    """List the names that are flushed to the disk and moved, in order."""
    order = []

    def flush(handle):
        opened = os.fstat(handle)
        found = [path for path in (tmp_path, *tmp_path.rglob("*")) if os.path.samestat(opened, path.stat())]
        order.append(f"flush {plain(found[0])}")

    def plain(path):
        path = Path(path)
        return "folder" if path == tmp_path else "part" if path.name.endswith((".part", ".part.npy")) else path.name

    rename = os.rename

    def move(source, target):
        order.append(f"{plain(source)} to {plain(target)}")
        rename(source, target)

    monkeypatch.setattr(os, "rename", move)
    monkeypatch.setattr(os, "replace", move)
    monkeypatch.setattr(files, "flush", flush)
    return order


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, order):
    write_text_whole(tmp_path / "a.npy", "text")
    assert order == ["flush part", "part to a.npy", "flush folder"]


def test_a_corpus_is_on_the_disk_before_it_replaces_another(tmp_path, order):
    with temporary_folder(tmp_path) as staged:
        for name in ("train.jsonl", "val.jsonl"):
            (staged / name).write_text("{}")
        publish(staged, tmp_path)
    assert order == [
        "flush train.jsonl",
        "flush val.jsonl",
        "flush part",
        f"part to {READY}",
        "flush folder",
        "train.jsonl to train.jsonl",
        "val.jsonl to val.jsonl",
        "flush folder",
    ]


@pytest.mark.parametrize("known", [True, False])
def test_the_cache_of_a_macs_drive_is_flushed_too(tmp_path, monkeypatch, known):
    calls = []

    def control(handle, command):
        calls.append(command)
        if not known:
            raise OSError(45, "Operation not supported")

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", control)
    monkeypatch.setattr(os, "fsync", lambda handle: calls.append("fsync"))
    files.sync(tmp_path)
    assert calls == ([51] if known else [51, "fsync"])


def test_an_error_names_the_file_and_not_its_temporary_name(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        write_text_whole(tmp_path / "gone" / "tokens.npy", "")
    assert caught.value.filename == str(tmp_path / "gone" / "tokens.npy")
