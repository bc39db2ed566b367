"""Interrupt a run, and the resume of a run, at the changes that they make to files, and compare with undisturbed ones.

    python -m tests.training.interrupting --every 1

Each change is struck in three ways: the disk is full, Ctrl-C is pressed twice, the process is killed. After each, no
trained weights may be lost. The next command must end with the same bytes as an undisturbed run, and leave nothing
unfinished.

Every run is a fork of this process, so that a kill ends only the run. MLX can't compute in a fork of a process that has
computed with it, so this process computes nothing itself.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import mlx_gpt.device  # noqa: F401 - before mlx, so that a tuned BLAS can take its place

# isort: split

import mlx.core as mx
import pytest

from mlx_gpt import files
from mlx_gpt.errors import FORESEEN, in_a_sentence
from mlx_gpt.progress import Lines
from mlx_gpt.training import checkpoint, loop, memory
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
# What may be missing after such a warning, which a full disk causes.
MISSING = {
    "run/best could not be saved": "best/model.safetensors",
    "run/metrics.jsonl could not be written": "metrics",
}
FINISHED, ENDED = 0, 3


def train(stop_after: int = 0) -> None:
    """Begin the run, or resume it; after so many steps, stop as Ctrl-C does."""
    made = iter(range(1, 99))
    resume = "run" if Path("run/run.toml").exists() else None
    settings = {} if resume else SETTINGS
    with SHOWN.open("a") as shown:
        display = Lines(lambda line: print(line, file=shown, flush=True))
        loop.train(settings, display, resume=resume, stop_requested=lambda: next(made) == stop_after)


def struck(act: Callable[[], object], at: int = 0, by: Strike = kill) -> tuple[int, int]:
    """Do something in a fork that is struck at change number `at`; return how it ended, and the number of changes."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            with strike_at(Path("run"), at, by) as changes:
                act()
            os.write(writing, str(len(changes)).encode())
            code = FINISHED
        except FORESEEN as error:
            code = ENDED if "\n" not in in_a_sentence(error)[0] else 1
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as lines:
        changes_made = int(lines.read() or 0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), changes_made


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
    assert struck(train)[0] == FINISHED, f"{what}: the next command fails"
    found = outcome(run)
    differing = {name for name in expected | found if expected.get(name) != found.get(name)}
    missing = {name for warning, name in MISSING.items() if f"WARNING: {warning}" in SHOWN.read_text()}
    assert differing <= missing, f"{what}: {differing} differ"
    left = [str(path) for path in run.rglob(".*") if path.name != ".lock"]
    assert not left, f"{what}: {left} are left"


def interrupt(folder: Path, every: int = 1) -> int:
    """Interrupt a run and a resume in `folder` at every n-th change, n being `every`.

    Returns:
        The number of interruptions.
    """
    os.chdir(folder)
    Path("text").mkdir()
    for side in ("train", "val"):
        Path(f"text/{side}.txt").write_text("".join(f"The {number}th duck of {side}.\n" for number in range(20)))
    assert struck(train)[0] == FINISHED
    expected = outcome(Path("run").rename("straight"))
    assert struck(lambda: train(stop_after=1))[0] == FINISHED
    shutil.copytree("run", "stopped")
    interruptions = 0
    for name, by in STRIKES.items():
        for started in (None, Path("stopped")):

            def start(started: Path | None = started) -> None:
                shutil.rmtree("run")
                SHOWN.unlink()
                if started:
                    shutil.copytree(started, "run")

            start()
            changes = struck(train)[1]
            assert changes > 50
            for at in range(1 + interruptions % every, changes + 1, every):
                start()
                ended, _ = struck(train, at, by)
                what = f"{name} at change {at} of {'a resume' if started else 'a run'}"
                assert ended in (FINISHED, ENDED) if by is not kill else ended < 0, f"{what}: {ended}"
                check(what, started, expected)
                interruptions += 1
    return interruptions


def main() -> int:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="Interrupt at every N-th change.")
    every = parser.parse_args().every
    line = memory.Line((memory.Trial(1, 2**20, 2**20, 0, 0.01), memory.Trial(2, 2**21, 2**21, 0, 0.01)))
    mx.disable_compile()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "measure", lambda run, make_step, training: line)
        patch.setattr(files, "flush", lambda handle: None)  # a kill loses nothing that was written, and disks are slow
        print(interrupt(Path(folder), every), "interruptions")
        os.chdir("/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
