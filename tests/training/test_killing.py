"""A run that is killed at any point and resumed ends as if it had not been killed. `killing.py` tries it more often."""

from .killing import compare


def test_a_killed_run_ends_as_the_straight_one(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")
    assert compare(tmp_path, runs=1, kills=3, seed=1) == []
