"""Documents, and files of them."""

import json

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
