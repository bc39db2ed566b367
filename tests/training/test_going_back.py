"""A run goes back to an earlier checkpoint only when the user agrees to drop the steps after it."""

import contextlib
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_gpt.errors import UserError
from mlx_gpt.training import checkpoint
from mlx_gpt.training.metrics import was_evaluated

from .conftest import contents

EACH_STEP = {"save_every": 1, "eval_every": 1, "keep_checkpoints": 9, "max_steps": 5}
BACK = "run/checkpoints/step-00000002"
BRANCH = EACH_STEP | {"learning_rate": 0.001, "max_steps": 4}


@pytest.fixture(scope="module")
def trained(train, tmp_path_factory):
    """A run of five steps, a checkpoint after each, the last of which is the best. Not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    mx.disable_compile()
    with contextlib.chdir(folder):
        train(folder / "run", **EACH_STEP)
    mx.enable_compile()
    return folder / "run"


@pytest.fixture(autouse=True)
def run(trained, tmp_path, monkeypatch, eager, unmeasured):
    """A copy of it in the current folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "run")


def test_it_is_refused_without_overwrite(train, trained):
    with pytest.raises(UserError, match=r"^run reaches step 5: --overwrite drops everything after step 2; to keep"):
        train("run", resume=BACK, **BRANCH)
    assert contents("run").keys() - {Path(".lock")} == contents(trained).keys() - {Path(".lock")}


@pytest.mark.parametrize(
    ("changes", "limit"),
    [({"max_steps": 5}, "--max-steps"), ({"max_steps": 9, "max_epochs": 0.046}, "--max-epochs")],
)
def test_a_complete_run_names_the_limit_that_ended_it(train, changes, limit):
    outcome = train("run", resume="run", only={}, **changes)
    assert (outcome.finished, outcome.step) == (True, 5)
    assert outcome.lines[-1] == f"This run is complete: 5 steps. To train it further, raise {limit}."


def test_a_run_beyond_its_limit_names_it(train):
    with pytest.raises(UserError, match=r"at step 5, beyond step 3, at which it would end: raise --max-steps\.$"):
        train("run", resume="run", only={}, max_steps=3)


def test_a_copy_goes_back_and_leaves_the_original(train, trained):
    shutil.copytree("run", "copy")
    outcome = train("copy", resume="copy/checkpoints/step-00000002", overwrite=True, **BRANCH)
    assert any("Resuming from copy/checkpoints/step-00000002" in line for line in outcome.lines)
    for name in ("best", "final", "checkpoints"):
        assert contents(f"run/{name}") == contents(trained / name)


def test_later_steps_are_dropped_before_the_first_step(train):
    """With `final`, with `best`, which is the last step here, and with their records in metrics.jsonl."""
    seen = []

    def tick():
        seen.append(
            (len(checkpoint.all_checkpoints(Path("run"))), Path("run/final").exists(), Path("run/best").exists())
        )

    train("run", resume=BACK, overwrite=True, **(BRANCH | {"eval_every": 9}), tick=tick)
    assert seen[0] == (2, False, False)
    assert not was_evaluated(Path("run"), 5)


def test_the_best_model_stays_if_it_is_from_before(train):
    """A rate ruins the model after step 3, a reason to go back; the best model is from before."""
    train("ruined", **(EACH_STEP | {"max_steps": 3}))
    best = contents("ruined/best")
    train("ruined", resume="ruined", **(EACH_STEP | {"learning_rate": 50.0}))
    assert contents("ruined/best") == best
    back = "ruined/checkpoints/step-00000003"
    outcome = train("ruined", resume=back, overwrite=True, **(EACH_STEP | {"max_steps": 3}))
    assert contents("ruined/best") == best
    assert checkpoint.best_model(Path("ruined")) == (3, outcome.best_loss)
    assert contents("ruined/final")[Path("model.safetensors")] == contents(back)[Path("model.safetensors")]


def test_going_back_takes_the_name_of_a_checkpoint(train):
    with pytest.raises(UserError, match="only if --resume names a checkpoint"):
        train("run", resume="run", overwrite=True)


def test_the_same_way_again_ends_in_the_same_bytes(train, trained):
    train("run", resume=BACK, overwrite=True, **EACH_STEP)
    for name in (
        "best/model.safetensors",
        "final/model.safetensors",
        "checkpoints/step-00000005/optimizer.safetensors",
    ):
        assert Path("run", name).read_bytes() == (trained / name).read_bytes()


@pytest.mark.parametrize("moves", [0, 1, 3])
def test_a_crash_while_it_goes_back_leaves_a_run_that_resumes(train, trained, monkeypatch, moves):
    def rename(self, target):
        nonlocal moves
        if ".removed" in Path(target).name:
            if moves == 0:
                raise SystemExit
            moves -= 1
        return original(self, target)

    original = Path.rename
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(SystemExit):
            train("run", resume=BACK, overwrite=True, **EACH_STEP)
    outcome = train("run", resume="run", **EACH_STEP)
    assert outcome.finished
    assert (Path("run/final/model.safetensors")).read_bytes() == (trained / "final/model.safetensors").read_bytes()
