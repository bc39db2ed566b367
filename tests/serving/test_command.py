"""`mlx-gpt serve` on the command line."""

import socket
import sys

import httpx
import pytest

from mlx_gpt import cli


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
        (["--max-batch", "1000000000"], "The cache of 1000000000 texts of plain takes 16,384,000 MB"),
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


def test_the_key_may_come_unseen(folders, start, monkeypatch):
    monkeypatch.setenv("MLX_GPT_API_KEY", "sesame")
    server = start("--model", folders / "plain")
    assert httpx.get(f"{server.url}/v1/models").status_code == 401
    assert httpx.get(f"{server.url}/v1/models", headers={"Authorization": "Bearer sesame"}).status_code == 200
