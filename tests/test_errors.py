"""Sentences for people, and commands that they can paste."""

import errno
import os
import shutil
import subprocess

import pytest

from mlx_gpt.errors import explain_os_error, typed

NAMES = [b"demo", "Läufe é/e 1".encode(), b"it's", b'a $HOME `id` \\ "b" !x *', b"na\xefve", b"two\nlines\t'\\n", b""]


def test_a_plain_command_has_no_quotes():
    assert typed("train", "--resume", "weights/demo") == "mlx-gpt train --resume weights/demo"
    assert typed("generate", "--model", "a b") == "mlx-gpt generate --model 'a b'"


def test_a_refusal_without_a_file_names_none():
    error = OSError(errno.ENOTSUP, "Operation not supported")
    assert explain_os_error(error) == "Cannot continue (Operation not supported): try another disk."
    assert explain_os_error(error, "read a.csv").endswith("check that it is readable and writable.")


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_a_shell_reads_each_word_as_it_was():
    command = typed(*map(os.fsdecode, NAMES))
    shown = subprocess.run(["bash", "-c", f"mlx-gpt() {{ printf '%s\\0' \"$@\"; }}; {command}"], capture_output=True)
    assert shown.stdout.split(b"\0")[:-1] == NAMES
    assert "\n" not in command
