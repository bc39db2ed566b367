"""A run that is killed at any point and resumed ends as if it had not been killed. `killing.py` tries it more often."""

import pytest

from .killing import compare

RUNS = {
    "": (),
    "qwen3 with muon": ("--model-type=qwen3", "--optimizer=muon"),
    "conversations": ("--data=talks", "--n-positions=96", "--seq-len=96"),
    "adapters with dropout": ("--from=base", "--lora-rank=4", "--lora-dropout=0.1"),
    "adapters, conversations and a grown vocabulary": (
        *("--from=foreign", "--lora-rank=4", "--lora-dropout=0.1", "--model-type=qwen3"),
        *("--data=talks", "--n-positions=96", "--seq-len=96"),
    ),
}


@pytest.mark.parametrize("further", RUNS.values(), ids=RUNS)
def test_a_killed_run_ends_as_the_straight_one(tmp_path, monkeypatch, further):
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")
    assert compare(tmp_path, runs=1, kills=3, seed=1, further=further) == []
