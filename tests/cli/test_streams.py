"""A stream that is closed, or of another encoding than UTF-8, ends no command."""

import os
import subprocess

import pytest

from tests.cli.conftest import ENVIRONMENT, PROGRAM, TINY


@pytest.fixture
def shell():
    """Run the program from a shell, with redirections, and return its exit code, stdout and stderr as bytes."""

    def shell(redirections, *arguments, **variables):
        line = ["sh", "-c", f'exec "$0" "$@" {redirections}', PROGRAM, *map(str, arguments)]
        return subprocess.run(line, env={**ENVIRONMENT, **variables}, capture_output=True, timeout=60)

    return shell


@pytest.fixture
def generate(shell, models):
    """Run `generate` in that way."""

    def generate(redirections, prompt="The duck", **variables):
        flags = ("--model", models / "one", "--prompt", prompt, "--max-tokens", "3", "--seed", "1")
        return shell(redirections, "generate", *flags, **variables)

    return generate


def test_a_closed_stdin_and_stdout_do_not_end_a_command(generate):
    """Otherwise the model's file would get the number of stdin, 0, which MLX takes for a failure."""
    ran = generate("<&- >&-")
    assert ran.returncode == 0
    assert ran.stderr.startswith(b"Prompt: ")
    assert ran.stderr.count(b"\n") == 1


def test_training_with_closed_streams_trains(shell, corpus, tmp_path):
    ran = shell("<&- >&- 2>&-", "train", "--data", corpus, *TINY, "--out", "run")
    assert ran.returncode == 0
    assert (tmp_path / "run/final/model.safetensors").exists()
    assert "Done: 2 steps" in (tmp_path / "run/training.log").read_text()


def test_characters_that_stdout_lacks_are_written_as_escapes(generate):
    ran = generate("", "Läufer 鴨", PYTHONIOENCODING="latin-1")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(b"L\xe4ufer \\u9d28")


def test_a_prompt_is_utf8_where_python_expects_ascii(generate, start, models):
    in_c = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "utf-8"}
    ran = generate("", "Läufer", **in_c)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("Läufer".encode())
    talk = ("generate", "--model", models / "one", "--interactive", "--max-tokens", "2")
    process = start(*talk, stdin=subprocess.PIPE, text=False, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    _, err = process.communicate("Läufer\n".encode(), timeout=30)
    assert b"not valid Unicode" not in err
    assert b"Generation: 2 tokens" in err


@pytest.fixture
def gone():
    """A pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


def test_messages_that_nobody_reads_change_no_exit_code(start, gone):
    assert start("generate", "--model", "none", stderr=gone).wait(timeout=60) == 2


def test_training_prepares_and_trains_although_nobody_reads_its_lines(start, gone, text, tmp_path):
    process = start("train", "--data", text, *TINY, "--out", "run", stdout=gone, stderr=gone)
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "run/final/model.safetensors").exists()
