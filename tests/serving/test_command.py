"""`mlx-gpt serve` on the command line."""

import dataclasses
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from mlx.utils import tree_flatten

from mlx_gpt import cli
from mlx_gpt.device import device
from mlx_gpt.errors import UserError
from mlx_gpt.generation.cache import bytes_per_token
from mlx_gpt.models.directory import save_model
from mlx_gpt.serving.models import fit_contexts, load_models, names_of
from tests.serving.conftest import PROGRAM, served


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


def test_a_model_with_a_long_context_is_served_with_as_much_of_it_as_fits(
    tmp_path, make_model, bpe, monkeypatch, caplog
):
    """On a Mac with 16 GB, eight texts of Qwen3's whole context would not fit."""
    save_model(tmp_path / "long", make_model(n_positions=50_000), bpe)
    caches = 3 * bytes_per_token(make_model(n_positions=50_000))
    weights = sum(weight.nbytes for _, weight in tree_flatten(make_model(n_positions=50_000).parameters()))

    def context(usable, given=None):
        monkeypatch.setattr("mlx_gpt.device.device", lambda: dataclasses.replace(device(), usable=int(usable)))
        [served] = load_models([tmp_path / "long"], 2, given).values()
        assert served.engine().context == served.context
        return served.context

    assert context(weights + 2 * 50_000 * caches) == 50_000
    assert not caplog.records
    caplog.set_level("INFO")
    assert context(weights + 5000 * caches / 0.75) == 4096
    assert "long uses 4,096 of the 50,000 tokens of its context" in caplog.text
    assert context(weights + 5000 * caches, 4500) == 4500
    with pytest.raises(UserError, match=r"more than is free: lower --max-batch or --context\.$"):
        context(weights + 5000 * caches, 5500)
    with pytest.raises(UserError, match=r"more than is free: lower --max-batch or --context\.$"):
        context(weights + 1000 * caches)
    with pytest.raises(UserError, match=r"^The weights need .* serve a smaller model\.$"):
        context(weights / 2)


def test_a_model_that_needs_little_leaves_its_room_to_the_others():
    assert fit_contexts({"long": (10, 40_000), "short": (10, 1024)}, 410_240) == {"short": 1024, "long": 40_000}
    assert fit_contexts({"long": (10, 40_000), "short": (10, 1024)}, 410_230) == {"short": 1024, "long": 39_936}
    assert fit_contexts({"one": (10, 40_000), "two": (20, 40_000)}, 600_000) == {"one": 29_696, "two": 14_336}


def test_a_text_sees_no_more_than_the_context_that_was_set(folders):
    with served(folders / "plain", context=16) as url, httpx.Client(base_url=url) as http:
        assert http.get("/v1/models").json()["data"][0]["context"] == 16
        answer = http.post("/v1/completions", json={"prompt": [1] * 17, "max_tokens": 1})
        assert "more than the model's context of 16" in answer.json()["error"]["message"]
        body = {"prompt": [1] * 10, "max_tokens": 18, "temperature": 0, "logit_bias": {"0": -100, "2": -100}}
        answer = http.post("/v1/completions", json=body).json()
        assert answer["usage"]["completion_tokens"] == 18


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
