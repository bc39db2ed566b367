"""What the README shows works: each of its commands, in its order, and its Python."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from mlx_gpt import cli
from mlx_gpt.models.directory import save_model

from .data.kaggle_server import serving
from .data.zips import make_zip
from .serving.conftest import Process

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.partition("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]
# The README's runs take minutes; these are as short as can be.
SHORT = shlex.split(
    "--n-layer 1 --n-head 2 --n-embd 16 --n-positions 32 --seq-len 16 --batch-size 2 --vocab-size 300 --max-steps 2"
)


@pytest.fixture(autouse=True)
def newcomer(monkeypatch, tmp_path, sentences, eager):
    """An empty folder with the texts that the README speaks of, and a Kaggle to fetch from."""
    monkeypatch.chdir(tmp_path)
    table = "text,label\n" + "".join(f'"{sentence.strip()}",0\n' for sentence in sentences)
    Path("essays.csv").write_text(table, encoding="utf-8")
    Path("book.txt").write_text("".join(sentences), encoding="utf-8")
    archive = make_zip({"more.csv": table.encode()})
    Path("archive.zip").write_bytes(archive)
    with serving(archive, "KGAT_test", tmp_path / "home", monkeypatch):
        yield


def test_every_command_works(capfd):
    assert (
        cli.run(["train", "--data", "builtin", "--preset", "tiny", "--out", "weights/demo", *SHORT]) == 0
    )  # make demo
    ran = set()
    for command in COMMANDS:
        program, *arguments = shlex.split(command)
        if program == "mlx-gpt":
            if arguments[0] == "train":
                arguments += ["--max-steps", "3"] if "--resume" in arguments else SHORT
            code = cli.run(arguments)
            assert code == 0, f"{command}\n{capfd.readouterr().err}"
            ran.add(arguments[0])
    assert ran | {"serve"} == set(cli.COMMANDS)


def test_the_server_is_used_as_it_shows(bpe, make_model, capsys):
    save_model(Path("weights/demo/best"), make_model(), bpe)
    serve, ask = (command for command in COMMANDS if "serve" in command or command.startswith("curl"))
    flags = shlex.split(serve.removeprefix(".venv/bin/mlx-gpt serve "))
    server = Process(Path("serve.log"), *flags)
    try:
        here = server.url.removeprefix("http://")
        answer = subprocess.run(shlex.split(ask.replace("127.0.0.1:8080", here)), capture_output=True, check=True)
        assert json.loads(answer.stdout)["usage"]["completion_tokens"] > 0
        [code] = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "openai" in block]
        exec(compile(code.replace("127.0.0.1:8080", here), "README.md", "exec"), {})
        assert json.loads(answer.stdout)["model"] == "demo"
        assert capsys.readouterr().out
    finally:
        server.process.kill()
        server.process.wait()


def test_every_target_of_make_is_there():
    targets = [command.split()[1] for command in COMMANDS if command.startswith("make ")]
    assert targets == ["demo", "test"]
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_the_python_works(capsys):
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "import mlx_gpt" in block]
    small = "n_layer=1, n_head=2, n_embd=16, n_positions=32, seq_len=16, batch_size=2, vocab_size=300, max_steps=2"
    short = code.replace("max_steps=300", small).replace("temperature=0.7", "temperature=0.7, max_tokens=5")
    assert short.count("max_") == 3
    exec(compile(short, "README.md", "exec"), {})
    assert "Done: 2 steps" in capsys.readouterr().out


def test_the_settings_it_names_are_there():
    named = set(re.findall(r"`(--[a-z-]+)", README))
    context = cli.cli.make_context("mlx-gpt", ["doctor"])
    commands = [cli.cli.get_command(context, name) for name in cli.COMMANDS]
    assert named <= {name for command in commands if command for option in command.params for name in option.opts}
