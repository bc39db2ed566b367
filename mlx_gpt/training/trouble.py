"""Handles failed saves, numbers that are not finite, and work on the GPU that macOS ends, and explains them."""

import contextlib
import errno
import re
from collections.abc import Callable, Iterator

from mlx_gpt.errors import RunError, typed
from mlx_gpt.files import DiskFullError, free_space
from mlx_gpt.training import checkpoint, run_folder
from mlx_gpt.training.run import Run

MAX_FAILED_SAVES = 3
FULL = (errno.ENOSPC, errno.EDQUOT)
# MLX's message when a command buffer fails on Metal quotes the system. The first words mean that the work took too long
# for the watchdog that keeps the display alive, the second that memory ran out.
TOO_LONG, NO_MEMORY = ("Timeout", "GPU Hang", "Impacting Interactivity"), ("Insufficient Memory",)
METAL_FAILED = re.compile(r"\[METAL\] Command buffer execution failed: (.*)", re.DOTALL)


def guarded(run: Run, name: str, save: Callable[[], object], last: bool = False) -> bool:
    """Save on rank 0; return whether that succeeded.

    If it fails, as on a full disk, the run warns and trains on: everything saved before is still there.

    Raises:
        RunError: saving failed for the third time since it last succeeded, or the `last` save of the run failed. All
            ranks raise it.
    """
    saved, end = run.ranks.broadcast(_save(run, name, save, last) if run.ranks.first else (False, ""))
    if end:
        raise RunError(end)
    return saved


def _save(run: Run, name: str, save: Callable[[], object], last: bool) -> tuple[bool, str]:
    """Save; return whether that succeeded, and why the run has to end because of it: empty if it can continue."""
    try:
        _save_making_room(run, name, save)
    except OSError as error:
        run.failed_saves += 1
        why = error.strerror or str(error)
        newest = _newest(run)
        if last or run.failed_saves >= MAX_FAILED_SAVES:
            return False, (
                f"{name} could not be saved ({why}){'' if last else '. This was the third failed save'}, so training "
                f"ends; {newest}. Make room, then continue with: {typed('train', '--resume', run.folder)}"
            )
        run.monitor.line(
            f"WARNING: {name} could not be saved ({why}); {newest}. Training continues: make room, because it ends "
            f"after {MAX_FAILED_SAVES} failures."
        )
        return False, ""
    return True, ""


def _save_making_room(run: Run, name: str, save: Callable[[], object]) -> None:
    """Save; while the disk is full, remove the oldest checkpoint and try again. The newest checkpoint always stays.

    Nothing is removed if everything that may go is too little. A removal that frees nothing is the last one: snapshots
    of the disk, as macOS makes them, keep what is deleted. If the disk does not say how much is missing, at most one is
    removed, because it leaves the room of a checkpoint.

    Raises:
        OSError: saving failed.
    """
    made_room = False
    while True:
        try:
            save()
            return
        except OSError as error:
            older, free = checkpoint.all_checkpoints(run.folder)[:-1], free_space(run.folder)
            missing = max(1, error.needed - free) if isinstance(error, DiskFullError) else 1
            in_vain = made_room and not isinstance(error, DiskFullError)
            if error.errno not in FULL or in_vain or sum(map(checkpoint.size, older)) < missing:
                raise
            checkpoint.remove(older[0])
            removed = f"WARNING: the disk is full, so {older[0]} was removed to make room for {name}"
            if free_space(run.folder) <= free:
                run.monitor.line(f"{removed}, but that freed no space.")
                raise
            run.monitor.line(f"{removed}.")
            made_room = True


def too_many_bad_steps(run: Run, step: int) -> RunError:
    """Return the error that ends a run after too many steps without a finite loss. It says how to go back."""
    bad_steps, rate = run.progress.bad_steps, run.training.learning_rate
    slower = ["--learning-rate", f"{rate / 3:.1g}"]
    if run.training.optimizer == "muon":
        slower += ["--muon-learning-rate", f"{run.training.muon_learning_rate / 3:.1g}"]
    before = [at for at in checkpoint.all_checkpoints(run.folder) if checkpoint.step_of(at) <= step - bad_steps]
    start = ["--resume", before[-1]] if before else ["--config", run.folder / run_folder.SETTINGS]
    newest = before and not checkpoint.later_than(run.folder, checkpoint.step_of(before[-1]))
    overwrite = [] if newest else ["--overwrite"]
    way_back = typed("train", *start, *overwrite, *slower)
    return RunError(
        f"{bad_steps} steps in a row had no finite loss or gradient, and changed nothing. Likely causes: a learning "
        f"rate that is too high (it was {rate:g}), bfloat16 (try --precision float32), or weights that had grown too "
        f"large before. Go back with: {way_back}"
    )


@contextlib.contextmanager
def gpu_failures(run: Run) -> Iterator[None]:
    """Explain an error of macOS that ended the GPU's work; leave any other error as it is.

    Raises:
        RunError: macOS ended the work; the sentence says why, and how to continue.
    """
    try:
        yield
    except RuntimeError as error:
        if explained := gpu_failure(run, str(error)):
            raise explained from None
        raise


def gpu_failure(run: Run, message: str) -> RunError | None:
    """Return the error that ends a run after MLX's `message`; None unless macOS ended the GPU's work."""
    found = METAL_FAILED.search(message)
    why = found[1].strip().rstrip(".") if found else ""
    if any(words in why for words in TOO_LONG):
        what = f"macOS ended the GPU's work ({why}), as it does when a step takes long while the display is on"
        remedy, awake = "Let the display sleep", "caffeinate -is "
    elif any(words in why for words in NO_MEMORY):
        what, remedy, awake = f"macOS had no memory left for the GPU's work ({why})", "Close other programs", ""
    else:
        return None
    smaller = "a lower --batch-size and more --gradient-accumulation-steps"
    if not (run.folder / run_folder.SETTINGS).is_file():  # the steps that measure a new run come before its folder
        words = f", then start again under `{awake.strip()}`" if awake else ""
        return RunError(f"{what}; nothing was written. {remedy}{words}, or take {smaller}.")
    whole = ", which is complete" if checkpoint.all_checkpoints(run.folder) else ""
    return RunError(
        f"{what}; {_newest(run)}{whole}. A resumed run keeps its batch, so if it happens again, begin another run with "
        f"{smaller}. {remedy}, then continue with: {awake}{typed('train', '--resume', run.folder)}"
    )


def _newest(run: Run) -> str:
    """Say which checkpoint is the newest."""
    sound = checkpoint.all_checkpoints(run.folder)
    return f"the newest checkpoint is {sound[-1]}" if sound else "there is no checkpoint yet"
