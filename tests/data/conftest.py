"""Documents, files of them, and folders that can't be written to."""

import json
import os
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
