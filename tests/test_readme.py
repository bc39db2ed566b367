"""README.md and the pages in docs/ are right: their commands and their Python work, and their links lead somewhere."""

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import mlx.core as mx
import pytest

from mlx_gpt import cli, models
from mlx_gpt.config import GenerationConfig
from mlx_gpt.presets import PRESETS
from mlx_gpt.settings import flat, resolve

from .data.hub_server import serving as serving_hub
from .data.kaggle_server import serving
from .data.zips import make_zip
from .serving.conftest import Process

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
TEXTS = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)

# These install something, need a Mac, or run until someone stops them.
NOT_RUN = {"brew", "curl", "make", "pip", "sudo", "tensorboard"}
# These start mlx-gpt, which is run without them.
STARTERS = {"caffeinate", "mlx.launch"}
# `serve` runs until it is stopped, and `doctor` measures the machine. Other tests start them; here their flags count.
ONLY_PARSED = {"doctor", "serve"}
# The runs on the pages take minutes, or days. These are as short as can be.
SHORT = shlex.split(
    "--n-layer 1 --n-head 2 --n-embd 16 --n-positions 256 --seq-len 256 --vocab-size 300 --max-steps 2 --eval-windows 8"
)
SMALL_STEPS = ["--batch-size", "2", "--gradient-accumulation-steps", "1"]


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> Iterator[list[str]]:
    """The commands that a page shows, each as a list of words, without variables that are set in front."""
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words[next(i for i, word in enumerate(words) if "=" not in word) :]


def uses(page: Path) -> Iterator[list[str]]:
    """The arguments of each use of mlx-gpt on a page. Any other program has to be known."""
    for words in commands(page):
        if words[0] in NOT_RUN:
            continue
        programs = [Path(word).name for word in words]
        if programs[0] == "python":
            continue
        assert programs[0] == "mlx-gpt" or programs[0] in STARTERS, words
        yield words[programs.index("mlx-gpt") + 1 :]


def command(name: str) -> click.Command:
    """A subcommand, imported."""
    found = cli.cli.get_command(click.Context(cli.cli), name)
    assert found
    return found


def shortened(arguments: list[str]) -> list[str]:
    """The arguments of a run that takes a moment."""
    if arguments[0] != "train":
        return arguments
    arguments = [re.sub(r"step-\d{8}", "step-00000002", word) for word in arguments]
    if "--resume" in arguments:
        return [*arguments, "--max-steps", "3"]
    return [*arguments, *SHORT, *([] if "auto" in arguments else SMALL_STEPS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, sentences):
    """A folder with the texts that the pages speak of, one of them prepared, and the run of `make demo`."""
    folder = tmp_path_factory.mktemp("newcomer")
    table = "".join(f'"{sentence.strip()}",0\n' for sentence in sentences)
    files = {
        "essays.csv": "text,label\n" + table,
        "posts.csv": "body,title\n" + table,
        "book.txt": "".join(sentences),
        "beginning.txt": "The statement\n",
        "notes/monday.txt": "".join(sentences[:9]),
        "poems/train.txt": "".join(sentences),
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "archive.zip").write_bytes(make_zip({"more.csv": files["essays.csv"].encode()}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        # Compiling takes longer than all these runs. Subprocesses read the variable.
        patch.setenv("MLX_DISABLE_COMPILE", "1")
        mx.disable_compile()
        demo = ["train", "--data", "builtin", "--recipe", "quick", "--out", "weights/demo"]
        assert cli.run(shortened(demo)) == 0
        assert cli.run(["prepare", "essays.csv"]) == 0
        yield folder
        mx.enable_compile()


@pytest.fixture(autouse=True)
def newcomer(monkeypatch, tmp_path, folder):
    """The test has its own copy of that folder, and downloads from a fake Kaggle and a fake Hub."""
    here = tmp_path / "here"
    shutil.copytree(folder, here)
    monkeypatch.chdir(here)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in Path("book.txt").read_text().splitlines()).encode()
    on_hub = dict.fromkeys(("train.jsonl", "english/train.jsonl", "data/train-00001.jsonl"), rows)
    on_hub |= {path.name: path.read_bytes() for path in Path("weights/demo/best").iterdir()}
    with (
        serving(Path("archive.zip").read_bytes(), "KGAT_test", tmp_path / "home", monkeypatch),
        serving_hub(on_hub, "hf_test", tmp_path / "home", monkeypatch),
    ):
        yield


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_command_works(page, monkeypatch, capfd):
    for block in blocks(page, "toml"):
        Path("settings.toml").write_text(block, encoding="utf-8")
    for words in commands(page):
        if words[0] == "python":
            *script, into, target = words[1:]
            assert into == ">"
            made = subprocess.run(
                [sys.executable, ROOT / script[0], *script[1:]], capture_output=True, check=True
            ).stdout
            Path(target).write_bytes(made)
    for arguments in uses(page):
        if arguments[0] in ONLY_PARSED:
            command(arguments[0]).make_context(arguments[0], arguments[1:])
            continue
        monkeypatch.setattr("sys.stdin", io.StringIO("the duck\n/temperature 0.9\n"))
        code = cli.run(shortened(arguments))
        assert code == 0, f"mlx-gpt {shlex.join(arguments)}\n{capfd.readouterr().err}"


def test_every_subcommand_is_shown_and_run():
    assert re.findall(r"^\| `mlx-gpt ([a-z]+)", README.read_text(encoding="utf-8"), re.MULTILINE) == [*cli.COMMANDS]
    assert {arguments[0] for page in PAGES for arguments in uses(page)} == {*cli.COMMANDS}


def test_every_target_of_make_is_there():
    targets = {words[1] for page in PAGES for words in commands(page) if words[0] == "make"}
    assert targets == {"demo", "test"}
    assert targets <= set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def test_the_server_is_used_as_it_shows(capsys):
    page = ROOT / "docs/serving.md"
    serve = next(arguments for arguments in uses(page) if arguments[0] == "serve")
    ask = next(words for words in commands(page) if words[0] == "curl")
    server = Process(Path("serve.log"), *serve[1:])
    try:
        here = server.url.removeprefix("http://")
        answer = subprocess.run([word.replace("127.0.0.1:8080", here) for word in ask], capture_output=True, check=True)
        completion = json.loads(answer.stdout)
        assert completion["model"] == "demo"
        assert completion["usage"]["completion_tokens"] > 0
        [code] = blocks(page, "python")
        exec(compile(code.replace("127.0.0.1:8080", here), page.name, "exec"), {})
        assert capsys.readouterr().out
    finally:
        server.process.kill()
        server.process.wait()


def test_the_functions_work(capsys):
    code, _ = [block for block in blocks(ROOT / "docs/python.md", "python") if "mlx_gpt" in block]
    small = "n_layer=1, n_head=2, n_embd=16, n_positions=32, seq_len=16, vocab_size=300, max_steps=2"
    short = code.replace("max_steps=300", small).replace("temperature=0.7", "temperature=0.7, max_tokens=5")
    assert short.count("max_") == 3
    exec(compile(short, "python.md", "exec"), {})
    assert "Done: 2 steps" in capsys.readouterr().out


@pytest.mark.parametrize("library", ["transformers", "mlx_lm"])
def test_other_libraries_open_a_model(library, capsys):
    pytest.importorskip(library)
    [code] = [block for block in blocks(ROOT / "docs/python.md", "python") if library in block]
    names: dict = {}
    exec(compile(code, "python.md", "exec"), names)
    assert names["tokenizer"].encode("the duck")
    assert names["model"]


def test_the_table_of_presets_is_right():
    rows = re.findall(r"^\| `(tiny|small|medium|large)` \|(.*)\|$", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert [name for name, _ in rows] == [*PRESETS]
    for name, row in rows:
        shape = resolve({"preset": name, "data": "builtin"}).model
        numbers = (shape.n_layer, shape.n_head, shape.n_embd, shape.n_positions, shape.vocab_size)
        millions = models.n_params(models.create(shape)) / 1e6
        assert [cell.strip() for cell in row.split("|")][:6] == [*(f"{n:,}" for n in numbers), f"{millions:.1f} M"]


def test_the_table_of_sampling_settings_is_right():
    text = (ROOT / "docs/generation.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `--([a-z-]+)` \| ([\d.]+) \|", text, re.MULTILINE)
    defaults = flat(GenerationConfig())
    assert len(rows) == 7
    assert {name: float(default) for name, default in rows} == {
        name: defaults[name.replace("-", "_")] for name, _ in rows
    }


def test_every_name_is_known():
    flags = {
        flag
        for name in cli.COMMANDS
        for option in command(name).params
        for flag in [*option.opts, *option.secondary_opts]
    }
    assert set(re.findall(r"`(--[a-z0-9-]+)", TEXTS)) <= flags
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "mlx_gpt").rglob("*.py"))
    assert all(variable in source for variable in re.findall(r"MLX_GPT_[A-Z]+", TEXTS))


def test_every_page_is_in_the_table():
    listed = re.findall(r"^\| \[(.+)\]\(\1\) \|", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == NAMES[1:]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "weights/README.md"], ids=[*NAMES, "weights/README.md"])
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = page.parent / path
            assert target.is_file(), link
            assert not anchor or anchor in anchors(target), link


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
