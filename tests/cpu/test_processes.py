"""Several processes that compute on one host."""

import os
from pathlib import Path

import pytest

from mlx_gpt.cpu import processes


def test_processes_compile_in_folders_of_their_own_which_they_find_again(monkeypatch, tmp_path):
    folders = []
    for number in (0, 1, 2, 1):
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        monkeypatch.setattr("tempfile.tempdir", None)
        processes.use_own_kernels(number)
        folders.append(Path(os.environ["TMPDIR"]))
    assert folders[0] == tmp_path
    assert folders[1] == folders[3] != folders[2]
    assert all(folder.is_dir() and folder.parent == tmp_path for folder in folders[1:])


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="Linux only")
def test_only_mlx_launch_is_made_to_idle():
    """test_distributed.py shows that mlx.launch is; what started this test stays as it was."""
    before = os.sched_getscheduler(os.getppid())
    processes.let_the_launcher_idle()
    assert os.sched_getscheduler(os.getppid()) == before != os.SCHED_IDLE
