"""A tiny run on a tiny text, and the files that it leaves behind."""

import contextlib
import json
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_gpt.errors import UserError
from mlx_gpt.training import loop

# Arguments of `loop.train`, which are no settings.
ARGUMENTS = {"file", "overwrite", "ignore_memory", "dry_run", "around", "network"}
# The sizes and constants of test_step.py, so that nothing more has to be compiled. 128 tokens make a step.
TINY: dict[str, Any] = {
    "tokenizer": "bytes",
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "n_positions": 32,
    "dropout": 0.1,
    "seq_len": 16,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 8,
    "learning_rate": 0.01,
    "warmup_steps": 2,
    "max_grad_norm": 0.5,
    "log_every": 2,
    "eval_every": 4,
    "eval_windows": 16,
    "save_every": 3,
    "seed": 1,
}


def contents(folder):
    """Every file with its bytes."""
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def refusal(action):
    """The message of an action that must be refused."""
    with pytest.raises(UserError) as refused:
        action()
    return str(refused.value)


def copy_of(run, folder):
    """A copy of a run."""
    shutil.copytree(run, folder)
    return folder


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Lift a limit on the size of files that a test has set, before pytest writes its own."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        return (yield)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Silent:
    """A display that only remembers its lines."""

    def __init__(self):
        self.lines = []

    def line(self, text):
        self.lines.append(text)

    def progress(self, what):
        return lambda done, total: None

    def bar(self, what, total, done=0, unit="step"):
        return self

    def advance(self, amount, facts=None):
        pass

    def close(self):
        pass


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, sentences):
    """A folder with 270 documents to train on and 30 to validate."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, documents in (("train", sentences[:270]), ("val", sentences[270:])):
        lines = [json.dumps({"text": document}) + "\n" for document in documents]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def train(corpus):
    """Train in the current folder; the outcome, with the lines that were shown."""

    def train(out, *, resume=None, stop_after=None, tick=None, only=None, **options):
        """Train with `TINY`, or with the settings `only`.

        Args:
            resume: a run or a checkpoint.
            stop_after: ask for a stop after so many steps, as Ctrl-C does.
            tick: called after each step, before anything is saved; asks for a stop if it returns true.
            options: arguments of `loop.train`, and settings that differ.
        """
        display, made = Silent(), 0

        def stop_requested():
            nonlocal made
            made += 1
            return bool(tick and tick()) or made == stop_after

        settings = only if only is not None else {"data": str(corpus), "out": str(out), **TINY}
        arguments = {name: options.pop(name) for name in ARGUMENTS & options.keys()}
        outcome = loop.train(
            {**settings, **options},
            display,
            resume=str(resume) if resume else None,
            stop_requested=stop_requested,
            **arguments,
        )
        return SimpleNamespace(**vars(outcome), lines=display.lines)

    return train


@pytest.fixture(scope="session")
def whole(train, tmp_path_factory):
    """A run of eight steps from beginning to end. Not to be changed."""
    folder = tmp_path_factory.mktemp("whole")
    with contextlib.chdir(folder):
        return train(folder / "run")
