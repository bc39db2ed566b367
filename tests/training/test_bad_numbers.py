"""Numbers that go wrong: skipped, counted, flagged, and told when they end a run."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest

from mlx_gpt.errors import RunError
from mlx_gpt.model import GPT
from mlx_gpt.training import checkpoint, loop

from .conftest import TINY, Silent

POISON = ord("~")  # that no document has by itself
CLOCK = {"seconds", "started", "tokens_per_second", "peak_memory_gb"}
EACH_STEP = {"save_every": 1, "keep_checkpoints": 99, "log_every": 1, "eval_every": 99}
SELDOM = {"save_every": 99, "log_every": 99, "eval_every": 99}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, eager):
    """An empty folder, where nothing is compiled."""
    monkeypatch.chdir(tmp_path)


class PoisonedGPT(GPT):
    """Has no number for a batch in which the poison stands."""

    def hidden(self, ids_bt, cache=None, key=None):
        return mx.where((ids_bt == POISON).any(), mx.nan, super().hidden(ids_bt, cache, key))


class StartledGPT(GPT):
    """Is sure of nonsense when the poison stands in a batch."""

    def hidden(self, ids_bt, cache=None, key=None):
        return mx.where((ids_bt == POISON).any(), -30, 1) * super().hidden(ids_bt, cache, key)


class DeadGPT(GPT):
    """Never has a number."""

    def hidden(self, ids_bt, cache=None, key=None):
        return mx.nan * super().hidden(ids_bt, cache, key)


@pytest.fixture
def poisoned(corpus, tmp_path):
    """The corpus with the poison at the end of every twelfth document to train on."""
    folder = tmp_path / "poisoned"
    shutil.copytree(corpus, folder)
    texts = [json.loads(line)["text"] for line in (folder / "train.jsonl").read_text().splitlines()]
    lines = [json.dumps({"text": text[:-1] + "~" if n % 12 == 0 else text}) + "\n" for n, text in enumerate(texts)]
    (folder / "train.jsonl").write_text("".join(lines))
    return folder


def train(data, network, *, out="run", resume=None, stop_after=None, **changes):
    """Train through the public seam: the outcome, the lines that were shown, and the records."""
    display, made = Silent(), 0

    def stop_requested():
        nonlocal made
        made += 1
        return made == stop_after

    settings = {**TINY, "data": str(data), "out": out, **changes}
    with loop.set_up(settings, display, resume=resume, network=network) as run:
        outcome = loop.fit(run, display, stop_requested)
    return SimpleNamespace(**vars(outcome), lines=display.lines, records=records(out))


def records(out="run"):
    """The lines of metrics.jsonl, without what the clock decides."""
    lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in CLOCK} for line in lines]


def events(records, event):
    return [record for record in records if record.get("event") == event]


def steps_with(event, out="run"):
    return [record["step"] for record in events(records(out), event)]


def losses(records):
    return {record["step"]: record["train_loss"] for record in records if "learning_rate" in record}


def state(step):
    """The weights and AdamW's state after a step."""
    folder = Path(f"run/checkpoints/step-{step:08d}")
    return [(folder / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")]


# ---- a batch without numbers ----------------------------------------------------------------------------------------


def test_a_bad_step_changes_nothing_and_is_told(poisoned):
    run = train(poisoned, PoisonedGPT, **EACH_STEP)
    bad = steps_with("skipped")
    assert 0 < len(bad) < 6
    for step in range(2, 9):
        assert (state(step) == state(step - 1)) == (step in bad)

    for record in events(run.records, "skipped"):
        assert len(set(record["windows"])) == 8
        told = f"Step {record['step']} skipped: loss nan, gradient norm nan; windows {record['windows']}"
        assert told in run.lines
        assert told in Path("run/training.log").read_text()
    assert {step: loss is None for step, loss in losses(run.records).items()} == {n: n in bad for n in range(1, 9)}


def test_training_goes_on_to_nearly_the_same_quality(poisoned):
    """Against a network that the poison leaves cold."""
    ill = train(poisoned, PoisonedGPT, max_steps=40, max_bad_steps=3, **SELDOM)
    well = train(poisoned, GPT, out="well", max_steps=40, **SELDOM)
    assert len(steps_with("skipped")) > 3  # not in a row
    assert steps_with("skipped", "well") == []
    assert well.best_loss < well.records[0]["val_loss"] - 2
    assert abs(ill.best_loss - well.best_loss) < 0.2


def test_a_validation_without_a_number_is_never_the_best(corpus):
    run = train(corpus, DeadGPT, max_steps=2)
    assert run.best_loss is None
    assert not Path("run/best").exists()
    assert [record["val_loss"] for record in run.records if "val_loss" in record] == [None, None]
    assert "NaN" not in Path("run/metrics.jsonl").read_text()


# ---- too many of them -----------------------------------------------------------------------------------------------


def test_eleven_in_a_row_end_the_run_and_ten_do_not(corpus):
    assert train(corpus, DeadGPT, out="ten", max_steps=10, **SELDOM).finished
    with pytest.raises(RunError, match=r"^11 steps in a row had no finite loss or gradient, and changed nothing"):
        train(corpus, DeadGPT, max_steps=99, **SELDOM)
    assert steps_with("skipped") == list(range(1, 12))


def test_the_count_goes_on_after_a_resume(corpus):
    settings = {"max_steps": 9, "max_bad_steps": 4}
    assert train(corpus, DeadGPT, **settings, stop_after=3).step == 3
    with pytest.raises(RunError, match=r"^5 steps in a row .* --overwrite --learning-rate 0\.003$"):
        train(corpus, DeadGPT, **settings, resume="run")
    assert steps_with("skipped") == [1, 2, 3, 4, 5]


def test_the_sentence_names_causes_and_the_way_back(corpus):
    train(corpus, GPT, **EACH_STEP, max_steps=2)
    settings = {**EACH_STEP, "max_steps": 20, "max_bad_steps": 3}
    with pytest.raises(RunError, match=r"^4 steps in a row") as caught:
        train(corpus, DeadGPT, resume="run", **settings)
    told = str(caught.value)
    assert "\n" not in told
    assert all(cause in told for cause in ("learning rate", "bfloat16", "weights that had grown too large"))
    back = "run/checkpoints/step-00000002"
    assert told.endswith(f"mlx-gpt train --resume {back} --overwrite --learning-rate 0.003")
    assert state(5) == state(2)

    # Stopped when it has hardly gone back: what it went back from is not taken up again.
    slower = {**settings, "learning_rate": 0.003}
    with loop.set_up(slower, Silent(), resume=back, overwrite=True):
        assert [path.name for path in checkpoint.all_checkpoints(Path("run"))] == ["step-00000001", "step-00000002"]
    assert train(corpus, GPT, resume="run", stop_after=1, **slower).step == 3
    run = train(corpus, GPT, resume="run", **(slower | {"max_steps": 5}))
    assert (run.step, steps_with("skipped")) == (5, [])
    assert sorted(path.name for path in Path("run/checkpoints").iterdir()) == [f"step-0000000{n}" for n in range(1, 6)]


# ---- a loss that jumps ----------------------------------------------------------------------------------------------


def test_a_spike_is_flagged(poisoned):
    run = train(poisoned, StartledGPT, **(SELDOM | {"log_every": 1}), max_steps=12)
    spikes = events(run.records, "spike")
    startled = [step for step, loss in losses(run.records).items() if loss > 8]
    assert startled
    assert [record["step"] for record in spikes] == startled
    for record in spikes:
        assert record["train_loss"] == losses(run.records)[record["step"]]
        told = f"Loss spike at step {record['step']}: {record['train_loss']:.4f}, against "
        assert any(line.startswith(told) for line in run.lines)


# ---- what must change nothing ---------------------------------------------------------------------------------------


def test_looking_and_saving_twice_as_often_leaves_each_loss_as_it_is(corpus):
    before = train(corpus, GPT, out="before", log_every=1, eval_every=4, save_every=4)
    assert len(losses(before.records)) == 8
    for name in ("eval_every", "save_every"):
        often = {"log_every": 1, "eval_every": 4, "save_every": 4, name: 2}
        after = train(corpus, GPT, out=name, **often)
        assert losses(after.records) == losses(before.records)
        final = "final/model.safetensors"
        assert (after.folder / final).read_bytes() == (before.folder / final).read_bytes()
