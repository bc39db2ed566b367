"""`mlx-gpt serve` on the command line."""

import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from mlx_gpt import cli
from mlx_gpt.serving.app import names_of
from tests.serving.conftest import PROGRAM


def refused(capsys, *arguments):
    """What a command says that ends as a user's mistake does."""
    assert cli.run(["serve", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_without_the_extra_it_tells_how_to_get_it(folders, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "mlx_gpt.serving.server", raising=False)
    assert "pip install 'mlx-gpt[serve]'" in refused(capsys, "--model", folders / "plain")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "nowhere"], "There is no nowhere: name a run or a model directory."),
        (["--port", "65536"], "below 65536"),
        (["--max-batch", "0"], "at least 1"),
        (["--max-batch", "1000000000"], "Weights and caches of 1000000000 texts take 16,384,000 MB"),
        (["--host", "no such host", "--insecure"], "Can't listen on no such host"),
        (["--host", "0.0.0.0"], "give an --api-key, or --insecure"),
    ],
)
def test_mistakes_are_told(folders, capsys, flags, words):
    known = [] if "--model" in flags else ["--model", folders / "plain"]
    assert words in refused(capsys, *known, *flags)


def test_a_port_that_is_taken_is_told(folders, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused(capsys, "--model", folders / "plain", "--port", port)
    assert f"Can't listen on 127.0.0.1:{port}" in said
    assert "choose another --port" in said


def test_models_of_one_name_are_told_apart(folders, start):
    server = start("--model", folders / "plain", "--model", folders / "plain/best", "--api-key", "sesame")
    models = httpx.get(f"{server.url}/v1/models", headers={"Authorization": "Bearer sesame"}).json()["data"]
    assert [model["id"] for model in models] == ["plain", "plain-2"]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a", "b/best", "c/final"], ["a", "b", "c"]),
        (["x/a", "y/a", "z/a/best"], ["a", "a-2", "a-3"]),
        (["x/a-2", "x/a", "y/a"], ["a-2", "a", "a-3"]),
        (["demo-long", "demo"], ["demo-long", "demo"]),
    ],
)
def test_names_are_numbered_where_they_are_taken(paths, names):
    assert names_of([Path(path) for path in paths]) == names


def test_an_end_while_loading_is_clean(folders, tmp_path):
    log = (tmp_path / "log").open("w+")
    done = subprocess.run(
        [PROGRAM, "serve", "--model", folders / "plain", "--max-batch", "1000000000"], stderr=log, check=False
    )
    log.seek(0)
    assert (done.returncode, len(log.read().splitlines())) == (2, 1)


def test_the_key_may_come_unseen(folders, start, monkeypatch):
    monkeypatch.setenv("MLX_GPT_API_KEY", "sesame")
    server = start("--model", folders / "plain")
    assert httpx.get(f"{server.url}/v1/models").status_code == 401
    assert httpx.get(f"{server.url}/v1/models", headers={"Authorization": "Bearer sesame"}).status_code == 200
