"""`mlx-gpt serve` on the command line."""

import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from mlx_gpt import cli
from mlx_gpt.serving.models import names_of
from tests.serving.conftest import PROGRAM


def refused(capsys, *arguments):
    """Run a command that a user's mistake ends; what it prints."""
    assert cli.run(["serve", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_without_the_extra_it_says_how_to_install_it(folders, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "mlx_gpt.serving.server", raising=False)
    assert "pip install -e '.[serve]'" in refused(capsys, "--model", folders / "plain")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "nowhere"], "There is no nowhere: name a run or a model directory."),
        (["--port", "65536"], "below 65536"),
        (["--max-batch", "0"], "at least 1"),
        (["--max-batch", "1000000000"], "The weights and the caches of 1000000000 texts need 16,384,000 MB"),
        (["--host", "no such host", "--insecure"], "Cannot listen on no such host"),
        (["--host", "0.0.0.0"], "set an --api-key, or --insecure"),
    ],
)
def test_mistakes_end_in_a_sentence(folders, capsys, flags, words):
    known = [] if "--model" in flags else ["--model", folders / "plain"]
    assert words in refused(capsys, *known, *flags)


def test_a_port_in_use_is_reported(folders, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = refused(capsys, "--model", folders / "plain", "--port", port)
    assert f"Cannot listen on 127.0.0.1:{port}" in message
    assert "choose another --port" in message


def test_models_with_the_same_name_get_different_ones(folders, start):
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
        (["run/best/adapters", "run/checkpoints/step-200"], ["run", "run-2"]),
    ],
)
def test_names_in_use_get_a_number(paths, names):
    assert names_of([Path(path) for path in paths]) == names


def test_a_failure_while_loading_prints_one_line(folders, tmp_path):
    log = (tmp_path / "log").open("w+")
    done = subprocess.run(
        [PROGRAM, "serve", "--model", folders / "plain", "--max-batch", "1000000000"], stderr=log, check=False
    )
    log.seek(0)
    assert (done.returncode, len(log.read().splitlines())) == (2, 1)


def test_the_key_may_come_from_the_environment(folders, start, monkeypatch):
    monkeypatch.setenv("MLX_GPT_API_KEY", "sesame")
    server = start("--model", folders / "plain")
    assert httpx.get(f"{server.url}/v1/models").status_code == 401
    assert httpx.get(f"{server.url}/v1/models", headers={"Authorization": "Bearer sesame"}).status_code == 200
