"""Servers on real sockets: in a thread of this process, or in a process of their own."""

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from mlx_gpt.config import ServeConfig
from mlx_gpt.models.directory import save_model
from mlx_gpt.serving.server import Server
from mlx_gpt.tokenizer import Tokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('system comes first') }}"
    "{% endif %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def folders(tmp_path_factory, make_model, bpe, sentences):
    """A folder with a run, `plain`, and a model with a chat template, `chatty`."""
    folder = tmp_path_factory.mktemp("weights")
    save_model(folder / "plain/best", make_model(), bpe)
    records = [{"step": 0, "val_loss": 6.0}, *({"step": i, "train_loss": 6 - i / 10} for i in range(1, 21))]
    lines = "".join(json.dumps(record) + "\n" for record in [*records, {"step": 20, "val_loss": 4.1}])
    (folder / "plain/metrics.jsonl").write_text(lines)
    backend = Tokenizer.train(sentences, 300).backend
    backend.add_special_tokens(["<|user|>", "<|assistant|>", "<|system|>"])
    save_model(folder / "chatty", make_model(vocab_size=303), Tokenizer(backend))
    path = folder / "chatty/tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))
    return folder


@contextlib.contextmanager
def served(*paths: Path, **settings) -> Iterator[str]:
    """The address of a server that stops at the end of the block."""
    with Server(paths, ServeConfig(port=0, **settings)) as server:
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            yield server.url
        finally:
            server.should_exit = True
            thread.join(timeout=60)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def url(folders):
    with served(folders / "plain", folders / "chatty", max_batch=4, max_queue=4) as url:
        yield url


@pytest.fixture
def http(url):
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


PROGRAM = str(Path(sys.executable).with_name("mlx-gpt"))


class Process:
    """`mlx-gpt serve` in a process of its own.

    Attributes:
        url: its address.
        log: the file with its log.
    """

    def __init__(self, log: Path, *flags: object) -> None:
        self.log = log
        command = [PROGRAM, "serve", "--port", "0", *map(str, flags)]
        with log.open("w") as file:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True)
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert "http" in line, log.read_text()
        self.url = line.split(" at ")[1].split()[0]

    def memory(self) -> int:
        """Resident bytes."""
        pid = str(self.process.pid)
        return 1024 * int(subprocess.run(["ps", "-o", "rss=", "-p", pid], capture_output=True, check=True).stdout)


@pytest.fixture
def start(tmp_path):
    """A function that starts servers, which stop with the test."""
    with contextlib.ExitStack() as ends:

        def start(*flags):
            server = Process(tmp_path / "serve.log", *flags)
            ends.callback(server.process.wait)
            ends.callback(server.process.kill)
            return server

        yield start
