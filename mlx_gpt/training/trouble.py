"""What a run does, and says, when saving fails or the numbers go wrong."""

from collections.abc import Callable

from mlx_gpt.errors import RunError
from mlx_gpt.training import checkpoint, run_folder
from mlx_gpt.training.setup import Run

MAX_FAILED_SAVES = 3


def guarded(run: Run, name: str, save: Callable[[], object], last: bool = False) -> None:
    """Save on rank 0. If that fails, as on a full disk, warn and train on: everything saved before is still there.

    Raises:
        RunError: saving failed for the third time since it last succeeded, or it was the `last` save of the run; on all
            ranks.
    """
    end = run.ranks.broadcast(_save(run, name, save, last) if run.ranks.first else "")
    if end:
        raise RunError(end)


def _save(run: Run, name: str, save: Callable[[], object], last: bool) -> str:
    """Save, and return why the run has to end because of it: empty if it can continue."""
    try:
        save()
    except OSError as error:
        run.failed_saves += 1
        why = error.strerror or str(error)
        sound = checkpoint.all_checkpoints(run.folder)
        newest = f"the newest checkpoint is {sound[-1]}" if sound else "there is no checkpoint yet"
        if last or run.failed_saves >= MAX_FAILED_SAVES:
            return (
                f"{name} could not be saved ({why}){'' if last else ', the third failure'}; training ends, {newest}. "
                f"Make room, then continue with: mlx-gpt train --resume {run.folder}"
            )
        run.monitor.line(
            f"WARNING: {name} could not be saved ({why}); {newest}. Training continues: make room, because it ends "
            f"after {MAX_FAILED_SAVES} failures."
        )
    return ""


def too_many_bad_steps(run: Run, step: int) -> RunError:
    """The error that ends a run whose steps have had no finite loss for too long, with the way back."""
    bad_steps, rate = run.progress.bad_steps, run.training.learning_rate
    before = [at for at in checkpoint.all_checkpoints(run.folder) if checkpoint.step_of(at) <= step - bad_steps]
    start = f"--resume {before[-1]}" if before else f"--config {run.folder / run_folder.SETTINGS}"
    newest = before and not checkpoint.later_than(run.folder, checkpoint.step_of(before[-1]))
    way_back = f"mlx-gpt train {start}{'' if newest else ' --overwrite'}"
    return RunError(
        f"{bad_steps} steps in a row had no finite loss or gradient, and changed nothing. Likely causes: a learning "
        f"rate that is too high (it was {rate:g}), bfloat16 (try --precision float32), or weights that had grown too "
        f"large before. Go back with: {way_back} --learning-rate {rate / 3:.1g}"
    )
