"""A run that goes back to an earlier checkpoint loses nothing that it came from before it has something new."""

import contextlib
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_gpt.api import load
from mlx_gpt.errors import UserError
from mlx_gpt.training import checkpoint
from mlx_gpt.training.run import model_directory

EACH_STEP = {"save_every": 1, "eval_every": 1, "keep_checkpoints": 9, "max_steps": 5}
LATER = ["step-00000003", "step-00000004", "step-00000005"]
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
def run(trained, tmp_path, monkeypatch, eager):
    """A copy of it in the current folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "run")


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def crash(*_):
    raise SystemExit


def test_what_is_left_behind_waits_for_the_next_checkpoint(train, trained):
    before: list[list[str]] = []

    def tick():  # after a step, before it is saved
        if not before:
            before.append(names("run/checkpoints"))
            assert contents("run/set-aside/best") == contents(trained / "best")
            for name in LATER:
                assert contents(f"run/set-aside/{name}") == contents(trained / "checkpoints" / name)

    outcome = train("run", resume=BACK, **BRANCH, tick=tick)
    assert before == [["step-00000001", "step-00000002"]]
    assert any("run/set-aside until the next checkpoint" in line and LATER[0] in line for line in outcome.lines)
    assert not Path("run/set-aside").exists()
    assert names("run/checkpoints") == [f"step-0000000{step}" for step in (1, 2, 3, 4)]


def test_who_stops_at_once_has_it_all_back(train, trained):
    train("run", resume=BACK, **EACH_STEP, stop_after=1)
    assert names("run/set-aside") == ["best", *LATER]
    shutil.rmtree("run/checkpoints/step-00000003")
    shutil.rmtree("run/best")
    for name in LATER:
        Path("run/set-aside", name).rename(f"run/checkpoints/{name}")
    Path("run/set-aside/best").rename("run/best")
    outcome = train("run", resume="run", **EACH_STEP)
    assert any("Going on from run/checkpoints/step-00000005" in line for line in outcome.lines)
    for name in ("best", "final", "checkpoints"):
        assert contents(f"run/{name}") == contents(trained / name)


def test_nobody_takes_it_for_the_run_s_own(train):
    train("run", resume=BACK, **(EACH_STEP | {"eval_every": 9}), stop_after=1)
    shutil.rmtree("run/final")
    assert [checkpoint.step_of(path) for path in checkpoint.all_checkpoints(Path("run"))] == [1, 2, 3]
    assert model_directory(Path("run")) == Path("run/checkpoints/step-00000003")
    load("run/set-aside/best")  # but it can be looked at
    with pytest.raises(UserError, match=r"was set aside: move it back to .*run/checkpoints to go on from it\.$"):
        train("run", resume="run/set-aside/step-00000005", **EACH_STEP)
    outcome = train("run", resume="run", **EACH_STEP)
    assert any("Going on from run/checkpoints/step-00000003" in line for line in outcome.lines)
    assert not Path("run/set-aside").exists()


def test_going_back_twice_keeps_what_was_set_aside_first(train, trained):
    for _ in range(2):
        train("run", resume=BACK, **BRANCH, stop_after=1)
    for name in LATER:
        assert contents(f"run/set-aside/{name}") == contents(trained / "checkpoints" / name)
    assert contents("run/set-aside/best") == contents(trained / "best")


def test_replacing_a_run_takes_what_it_set_aside_along(train):
    train("run", resume=BACK, **EACH_STEP, stop_after=1)
    train("run", overwrite=True, **(EACH_STEP | {"max_steps": 1}))
    assert not Path("run/set-aside").exists()


@pytest.mark.parametrize("moves", [0, 1, 3, 4])
def test_a_crash_while_it_goes_back_leaves_a_run_at_the_chosen_checkpoint(train, trained, monkeypatch, moves):
    def rename(self, target):
        nonlocal moves
        if Path(target).parent.name == "set-aside":
            if moves == 0:
                crash()
            moves -= 1
        return original(self, target)

    original = Path.rename
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        if moves == 4:  # all that there is: the crash comes after them
            patch.setattr("mlx_gpt.training.setup.write_toml", crash)
        with pytest.raises(SystemExit):
            train("run", resume=BACK, **EACH_STEP)
    outcome = train("run", resume="run", **EACH_STEP)
    assert any(f"Going on from {BACK}" in line for line in outcome.lines)
    for name in ("best", "final", "checkpoints"):
        assert contents(f"run/{name}").keys() == contents(trained / name).keys()
    for name in ("best/model.safetensors", "final/model.safetensors", f"checkpoints/{LATER[-1]}/optimizer.safetensors"):
        assert Path("run", name).read_bytes() == (trained / name).read_bytes()
