"""Fixtures that run the program, in this process or in another, and the models that the commands use."""

import contextlib
import fcntl
import io
import json
import os
import pty
import select
import shlex
import struct
import subprocess
import sys
import termios
import time
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


class Terminal:
    """A terminal in which the program runs."""

    def __init__(self, start, *arguments):
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 160, 0, 0))  # lines and columns

        def take_terminal():
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C reaches it as a signal

        streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "env": {**ENVIRONMENT, "TERM": "xterm"}}
        self.process = start(*arguments, **streams, start_new_session=True, preexec_fn=take_terminal)
        os.close(theirs)
        self.screen = ""

    def type(self, text):
        os.write(self._ours, text.encode())

    def insist(self, key, text):
        """Type a key again and again until the text appears."""
        for _ in range(20):
            self.type(key)
            with contextlib.suppress(TimeoutError):
                self.see(text, seconds=1)
                return
        raise TimeoutError(f"{text!r} did not come")

    def see(self, text, seconds=20):
        """Wait for a text, and forget everything before it."""
        until = time.monotonic() + seconds
        while text not in self.screen:
            readable, _, _ = select.select([self._ours], [], [], max(0, until - time.monotonic()))
            if not readable:
                raise TimeoutError(f"{text!r} did not come after {self.screen[-200:]!r}")
            try:
                self.screen += os.read(self._ours, 4096).decode(errors="replace")
            except OSError as error:  # Linux raises this when the program has ended
                raise AssertionError(f"it ended without {text!r}, after {self.screen!r}") from error
        self.screen = self.screen.split(text, 1)[1]

    def close(self):
        os.close(self._ours)


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


@pytest.fixture
def terminal(start):
    """Start the program in a terminal."""
    opened = []

    def terminal(*arguments):
        opened.append(Terminal(start, *arguments))
        return opened[-1]

    yield terminal
    for one in opened:
        one.close()


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
