"""macOS ends work on the GPU that takes too long or too much memory: the run reports it and can be resumed."""

import pytest

from mlx_gpt.progress import Lines
from mlx_gpt.training import loop

from .conftest import TINY

FAILED = "[METAL] Command buffer execution failed: "
TIMEOUT = "Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)"
HANG = "Caused GPU Hang Error (00000003:kIOGPUCommandBufferCallbackErrorHang)"
DISPLAY = "Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)"
MEMORY = "Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"
LONGER = ("--max-steps", "13", "--save-every", "9")


@pytest.fixture
def break_step(monkeypatch):
    """Let a step raise an error; the steps that measure the run are numbered from 0, fewer than ten."""
    make_step = loop.make_step

    def break_step(number, error):
        def make_broken(*arguments):
            step = make_step(*arguments)

            def broken(at, rate, batches):
                if at == number:
                    raise error
                return step(at, rate, batches)

            return broken

        monkeypatch.setattr(loop, "make_step", make_broken)

    yield break_step
    monkeypatch.undo()


@pytest.mark.parametrize("why", [TIMEOUT, HANG, DISPLAY, MEMORY])
def test_a_step_that_macos_ends_says_why_and_how_to_continue(mlx_gpt, corpus, break_step, why):
    break_step(10, RuntimeError(f"{FAILED}{why}."))
    answer = mlx_gpt("train", "--data", corpus, *TINY, *LONGER, "--out", "a run")
    assert answer.code == 1
    sentence = answer.err.splitlines()[-1]
    assert sentence.startswith("Error: macOS")
    assert f"({why}" in sentence
    assert "the newest checkpoint is a run/checkpoints/step-00000009, which is complete" in sentence
    assert sentence.endswith("mlx-gpt train --resume 'a run'")
    assert ("Let the display sleep, then continue with: caffeinate -is mlx-gpt" in sentence) == (why != MEMORY)
    assert "a lower --batch-size and more --gradient-accumulation-steps" in sentence


def test_it_continues_from_the_checkpoint_as_if_nothing_had_happened(mlx_gpt, corpus, break_step, train):
    whole = train(*LONGER, out="whole")
    break_step(10, RuntimeError(f"{FAILED}{TIMEOUT}."))
    assert mlx_gpt("train", "--data", corpus, *TINY, *LONGER, "--out", "run").code == 1
    break_step(-1, None)
    assert mlx_gpt("train", "--resume", "run").code == 0
    final = "final/model.safetensors"
    assert (whole.folder / final).read_bytes() == (whole.folder.parent / "run" / final).read_bytes()


def test_a_run_that_fails_while_it_is_measured_leaves_nothing(mlx_gpt, corpus, break_step, tmp_path):
    break_step(2, RuntimeError(f"{FAILED}{DISPLAY}."))
    answer = mlx_gpt("train", "--data", corpus, *TINY, "--out", "run")
    assert answer.code == 1
    assert "nothing was written. Let the display sleep, then start again under `caffeinate -is`, or" in answer.err
    assert "--resume" not in answer.err
    assert not (tmp_path / "run").exists()


def test_before_the_first_checkpoint_there_is_none(mlx_gpt, corpus, break_step):
    break_step(10, RuntimeError(f"{FAILED}{HANG}."))
    answer = mlx_gpt("train", "--data", corpus, *TINY, "--max-steps", "12", "--out", "run")
    assert "there is no checkpoint yet. A resumed run keeps its batch" in answer.err


@pytest.mark.parametrize("message", ["no such kernel", f"{FAILED}Internal Error (0000000e:Internal Error).", ""])
def test_any_other_error_stays_as_it_is(corpus, break_step, message):
    error = RuntimeError(message)
    break_step(5, error)
    settings = {"data": str(corpus), "tokenizer": "bytes", "n_layer": 1, "n_head": 2, "n_embd": 16, "seq_len": 16}
    with pytest.raises(RuntimeError) as caught:
        loop.train({**settings, "batch_size": 2, "max_steps": 8, "out": "run"}, Lines())
    assert caught.value is error
