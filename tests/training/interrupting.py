"""Interrupt a run, and the resume of a run, at the changes that they make to files, and compare with undisturbed ones.

    python -m tests.training.interrupting

Each change is struck in three ways: the disk is full, Ctrl-C is pressed twice, the process is killed. After each, no
trained weights may be lost. The next command must end with the same bytes as an undisturbed run, and leave nothing
unfinished. `--sample` strikes a few changes, of every kind.

A run that is to be killed has a process of its own. It is no fork of this one, because MLX can't compute in a fork.
"""

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ["MLX_GPT_DEVICE"] = "cpu"

import mlx_gpt.device  # noqa: F401 - before mlx, so that a tuned BLAS can take its place

# isort: split

import mlx.core as mx
import pytest

from mlx_gpt import files
from mlx_gpt.errors import FORESEEN, in_a_sentence
from mlx_gpt.progress import Lines
from mlx_gpt.training import checkpoint, loop, memory, planning
from tests.faults import Strike, disk_full, kill, raising, strike_at
from tests.training.killing import outcome

SETTINGS = {
    "data": "text", "out": "run", "preset": "tiny", "tokenizer": "bytes", "n_layer": 1, "n_head": 1, "n_embd": 4,
    "n_positions": 8, "seq_len": 8, "batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": 3,
    "warmup_steps": 1, "learning_rate": 0.1, "log_every": 1, "eval_every": 1, "save_every": 2, "keep_checkpoints": 1,
    "eval_windows": 4,
}  # fmt: skip
STRIKES: dict[str, Strike] = {"full disk": disk_full, "Ctrl-C": raising(KeyboardInterrupt), "kill": kill}
SHOWN = Path("shown.txt")
# A full disk causes these warnings. After each, this file or record may be missing.
MISSING = {
    "run/best could not be saved": "best/model.safetensors",
    "run/metrics.jsonl could not be written": "metrics",
}
# Kinds of changes, by their first part under the run's folder.
KINDS = ("checkpoints", "best", "metrics", "run", "final")
SEED = 0  # another one draws another sample


def train(stop_after: int = 0) -> None:
    """Begin the run, or resume it; after so many steps, stop as Ctrl-C does."""
    made = iter(range(1, 99))
    resume = "run" if Path("run/run.toml").exists() else None
    settings = {} if resume else SETTINGS
    with SHOWN.open("a") as shown:
        display = Lines(lambda line: print(line, file=shown, flush=True))
        loop.train(settings, display, resume=resume, stop_requested=lambda: next(made) == stop_after)


def struck(at: int = 0, by: Strike = kill) -> list[str]:
    """Train, struck at change number `at`; return the changes. A strike other than a kill may end the run."""
    with strike_at(Path("run"), at, by) as changes:
        try:
            train()
        except FORESEEN as error:
            if not 0 < at <= len(changes) or "\n" in in_a_sentence(error)[0]:
                raise
    return changes


def killed(at: int) -> bool:
    """Train in a process that is killed at change number `at`; return whether it was."""
    command = [sys.executable, "-m", "tests.training.interrupting", "--killed-at", str(at)]
    path = {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(command, env=os.environ | path, check=False).returncode < 0


def kind_of(change: str) -> str:
    """Return the kind of a change, such as "best"; "" if it is none of `KINDS`."""
    found = re.search(r"\brun/\.?(\w+)", change)
    return found[1] if found and found[1] in KINDS else ""


def sample(changes: list[str], combination: int) -> Iterator[int]:
    """Yield the numbers of two changes of different kinds; the next combinations take the next kinds."""
    draw = random.Random(SEED + combination)
    for kind in (KINDS[(2 * combination + i) % len(KINDS)] for i in range(2)):
        yield draw.choice([number for number, change in enumerate(changes, 1) if kind_of(change) == kind])


def check(what: str, started: Path | None, expected: dict[str, object]) -> None:
    """Check that nothing is lost after an interruption, and that the next command ends as if it had not happened."""
    run, before = Path("run"), checkpoint.best_model(started) if started else None
    best, (newest, _) = checkpoint.best_model(run), checkpoint.newest_sound(run)
    assert not (best and best[0] and not newest), f"{what}: there is a best model and no checkpoint"
    if started:
        assert newest, f"{what}: the checkpoint is lost"
        assert before, "the run began with a best model"
        assert best, f"{what}: the best model is lost"
        assert best[1] <= before[1], f"{what}: the best model is lost"
    try:
        train()
    except FORESEEN as error:
        raise AssertionError(f"{what}: the next command fails") from error
    found = outcome(run)
    differing = {name for name in expected | found if expected.get(name) != found.get(name)}
    missing = {name for warning, name in MISSING.items() if f"WARNING: {warning}" in SHOWN.read_text()}
    assert differing <= missing, f"{what}: {differing} differ"
    left = [str(path) for path in run.rglob(".*") if path.name != ".lock"]
    assert not left, f"{what}: {left} are left"


def interrupt(folder: Path, sampled: bool = False) -> int:
    """Interrupt a run and a resume in `folder` at every change, or at a sample of them.

    Returns:
        The number of interruptions.
    """
    os.chdir(folder)
    Path("text").mkdir()
    for side in ("train", "val"):
        Path(f"text/{side}.txt").write_text("".join(f"The {number}th duck of {side}.\n" for number in range(20)))
    train()
    expected = outcome(Path("run").rename("straight"))
    train(stop_after=1)
    shutil.copytree("run", "stopped")

    def start(started: Path | None) -> None:
        shutil.rmtree("run")
        SHOWN.unlink()
        if started:
            shutil.copytree(started, "run")

    interruptions = 0
    for i, (name, by) in enumerate(STRIKES.items()):
        for j, started in enumerate((None, Path("stopped"))):
            start(started)
            changes = struck()
            assert {*map(kind_of, changes)} >= {*KINDS}
            for at in sample(changes, 2 * i + j) if sampled else range(1, len(changes) + 1):
                start(started)
                what = f"{name} at change {at} ({changes[at - 1]}) of {'a resume' if started else 'a run'}"
                if by is kill:
                    assert killed(at), f"{what}: it was not killed"
                else:
                    struck(at, by)
                check(what, started, expected)
                interruptions += 1
    return interruptions


def main() -> int:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", action="store_true", help="Interrupt at a few changes of every kind.")
    parser.add_argument("--killed-at", type=int, metavar="N", help="Only train here, until change number N.")
    arguments = parser.parse_args()
    line = memory.Line((memory.Trial(1, 2**20, 2**20, 0, 0.01), memory.Trial(2, 2**21, 2**21, 0, 0.01)))
    mx.disable_compile()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "measure", lambda run, make_step, training: line)
        patch.setattr(files, "flush", lambda handle: None)  # a kill loses nothing that was written, and disks are slow
        if arguments.killed_at:
            struck(arguments.killed_at)
            return 0
        with tempfile.TemporaryDirectory() as folder:
            print(interrupt(Path(folder), arguments.sample), "interruptions")
            os.chdir("/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
