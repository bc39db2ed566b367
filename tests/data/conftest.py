"""Documents, files of them and of other rows, folders that can't be written to, and calls at the same time."""

import csv
import fcntl
import json
import os
import threading
from pathlib import Path

import pytest


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


@pytest.fixture
def write(tmp_path):
    """Write rows to a file, in the format that its name has, and return its path."""

    def write(rows, name="a.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            pa = pytest.importorskip("pyarrow")
            import pyarrow.parquet as pq

            pq.write_table(pa.Table.from_pylist(rows), path)
        elif name.endswith(".csv"):
            with path.open("w", newline="", encoding="utf-8") as file:
                table = csv.DictWriter(file, rows[0])
                table.writeheader()
                table.writerows(rows)
        elif name.endswith(".json"):
            path.write_text(json.dumps(rows, indent=1))
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def read_only(monkeypatch):
    """Make a folder read-only, also for a superuser, who has every permission."""
    access, locked = os.access, set()

    def read_only(folder):
        locked.add(folder)
        folder.chmod(0o555)

    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).absolute() not in locked and access(path, mode))
    yield read_only
    for folder in locked:
        folder.chmod(0o755)


@pytest.fixture
def meanwhile(monkeypatch):
    """Start a call in another thread, and return when it has ended or waits for the lock of a folder."""
    threads, flock = [], fcntl.flock

    def meanwhile(folder, call):
        halted = threading.Event()

        def noting(handle, operation):
            waits = threading.current_thread() is thread and not operation & fcntl.LOCK_NB
            if waits and os.path.samestat(os.fstat(handle), folder.stat()):
                halted.set()
            flock(handle, operation)

        def run():
            try:
                call()
            finally:
                halted.set()

        monkeypatch.setattr(fcntl, "flock", noting)
        thread = threading.Thread(target=run)
        threads.append(thread)
        thread.start()
        halted.wait()
        return thread

    yield meanwhile
    for thread in threads:
        thread.join()
