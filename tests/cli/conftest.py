"""Fixtures that run the program, in this process or in another, and the models that the commands use."""

import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from safetensors.numpy import load_file

from mlx_gpt import cli
from mlx_gpt.models.directory import save_model

PROGRAM = str(Path(sys.executable).with_name("mlx-gpt"))
# Nothing is compiled, which would take long, and nobody's credentials are found.
ENVIRONMENT = {**os.environ, "MLX_DISABLE_COMPILE": "1", "HOME": "/nonexistent"}
TINY = shlex.split(
    "--tokenizer bytes --n-layer 1 --n-head 2 --n-embd 16 --n-positions 32 --dropout 0 --seq-len 16 --batch-size 2 "
    "--gradient-accumulation-steps 1 --max-steps 2 --learning-rate 0.01 --warmup-steps 0 --log-every 1 --eval-windows 4"
)


class Run:
    """The files that a run left in its folder, and what the program printed on stdout."""

    def __init__(self, folder, out=""):
        self.folder, self.out = Path(folder), out
        self.log = (self.folder / "training.log").read_text()
        self.records = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        self.config = json.loads((self.folder / "final/config.json").read_text())
        self.weights = (self.folder / "final/model.safetensors").read_bytes()
        self.checkpoints = sorted(path.name for path in self.folder.glob("checkpoints/*"))

    def column(self, name):
        """Return the values of that name in metrics.jsonl."""
        return [record[name] for record in self.records if name in record]

    def steps(self, name):
        """Return the steps that have such a value."""
        return [record["step"] for record in self.records if name in record]

    def shape(self, name):
        """Return the shape of a tensor."""
        return load_file(self.folder / "final/model.safetensors")[name].shape

    @property
    def train_tokens(self):
        """The number of training tokens in the log."""
        return int(self.log.split(" tokens to train on")[0].split()[-1].replace(",", ""))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, eager):
    """Change to an empty folder, and compile nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/nonexistent")


@pytest.fixture
def mlx_gpt(capfd, monkeypatch):
    """Run the program and return its exit code, stdout and stderr."""

    def run(*arguments, stdin=""):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8"))
        capfd.readouterr()
        code = cli.run([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return run


@pytest.fixture
def train(mlx_gpt, corpus):
    """Train into the folder `run` with more flags, and return what is there afterwards."""

    def train(*flags, out="run"):
        answer = mlx_gpt("train", "--data", corpus, *TINY, "--out", out, *flags)
        assert answer.code == 0, answer.err
        return Run(out, answer.out)

    return train


@pytest.fixture
def folder_of():
    """Read a run's folder."""
    return Run


@pytest.fixture
def start():
    """Start the program in another process, which is killed when the test ends."""
    with contextlib.ExitStack() as stack:

        def start(*arguments, **options):
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, "text": True}
            options = {**pipes, "env": ENVIRONMENT, **options}
            process = subprocess.Popen([PROGRAM, *map(str, arguments)], **options)
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


@pytest.fixture(scope="session")
def text(tmp_path_factory, sentences):
    """A file of 300 lines."""
    path = tmp_path_factory.mktemp("text") / "ducks.txt"
    path.write_text("".join(sentences), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory, corpus):
    """A folder with a run of two steps in weights/ducks. Tests must not change it."""
    folder = tmp_path_factory.mktemp("trained")
    mx.disable_compile()
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        assert cli.run(["train", "--data", str(corpus), *TINY, "--out", "weights/ducks", "--eval-windows", "0"]) == 0
    mx.enable_compile()
    return folder


@pytest.fixture(scope="session")
def base(trained):
    """What `train` leaves without more flags, except that its evaluation takes all windows."""
    return Run(trained / "weights/ducks")


@pytest.fixture(scope="session")
def models(tmp_path_factory, make_model, bpe):
    """Two model directories, `one` and `two`, which generate nonsense of many words."""
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "one", make_model(0), bpe)
    save_model(folder / "two", make_model(1), bpe)
    return folder
