"""Overwriting a run deletes the old run, all of it, and nothing that the new run needs; and one process does it."""

import errno
import fcntl
from pathlib import Path

import pytest

from mlx_gpt.errors import UserError
from mlx_gpt.training import run_folder
from mlx_gpt.training.lock import Lock


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, eager, unmeasured):
    """An empty folder, where nothing is compiled."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("source", ["run", "run/final", "link"])
def test_weights_that_the_new_run_begins_from_are_not_deleted(train, source):
    train("run", max_steps=1)
    Path("link").symlink_to("run/best")
    before = sorted(Path("run").rglob("*"))
    with pytest.raises(UserError, match=r"^\S+ would be deleted before the new run has saved anything: choose another"):
        train("run", init_from=source, overwrite=True, max_steps=1)
    assert sorted(Path("run").rglob("*")) == before
    assert train("another", init_from=source, max_steps=1).finished


def test_checkpoints_on_another_disk_stay_there(train):
    train("run", max_steps=1)
    moved = Path("run/checkpoints").rename("moved")
    Path("run/checkpoints").symlink_to(moved.absolute())
    train("run", overwrite=True, max_steps=2)
    assert [path.name for path in moved.iterdir()] == ["step-00000001"]
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["step-00000002"]


def test_a_disk_without_locks_can_be_trained_on(train, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert train("run", max_steps=1).finished


def test_a_lock_whose_file_is_removed_meanwhile_is_taken_again(monkeypatch):
    """Else two processes could hold the lock of one folder: one by the removed file, one by a new one."""
    flock, held = fcntl.flock, Lock(Path("run"))

    def release_first(file, how):
        monkeypatch.setattr(fcntl, "flock", flock)
        held.release()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", release_first)
    with Lock(Path("run")), pytest.raises(UserError, match="is training into run"):
        run_folder.claim(Path("run"), overwrite=True)
