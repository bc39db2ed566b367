"""Numbers that go wrong: skipped, counted, flagged, and explained when they end a run."""

import contextlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest

from mlx_gpt.config import TrainingConfig
from mlx_gpt.errors import RunError
from mlx_gpt.models import gpt2
from mlx_gpt.optim import make_schedule
from mlx_gpt.training import checkpoint

from .conftest import TINY

POISON = ord("~")  # in no document of the corpus
CLOCK = {"seconds", "started", "tokens_per_second", "peak_memory_gb"}
EACH_STEP = {"save_every": 1, "keep_checkpoints": 99, "log_every": 1, "eval_every": 99}
SELDOM = {"save_every": 99, "log_every": 99, "eval_every": 99}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, eager, unmeasured):
    """An empty folder, where nothing is compiled."""
    monkeypatch.chdir(tmp_path)


class Poisoned(gpt2.Model):
    """Has no number for a batch in which the poison stands."""

    def hidden(self, inputs_bt, cache=None):
        return mx.where((inputs_bt == POISON).any(), mx.nan, super().hidden(inputs_bt, cache))


class Startled(gpt2.Model):
    """Is sure of nonsense when the poison stands in a batch."""

    def hidden(self, inputs_bt, cache=None):
        return mx.where((inputs_bt == POISON).any(), -30, 1) * super().hidden(inputs_bt, cache)


class Dead(gpt2.Model):
    """Never has a number."""

    def hidden(self, inputs_bt, cache=None):
        return mx.nan * super().hidden(inputs_bt, cache)


@pytest.fixture
def poisoned(corpus, tmp_path):
    """The corpus with the poison at the end of every twelfth document to train on."""
    folder = tmp_path / "poisoned"
    shutil.copytree(corpus, folder)
    texts = [json.loads(line)["text"] for line in (folder / "train.jsonl").read_text().splitlines()]
    lines = [json.dumps({"text": text[:-1] + "~" if n % 12 == 0 else text}) + "\n" for n, text in enumerate(texts)]
    (folder / "train.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def fit(train):
    """Train one of the networks above; the outcome, the lines that were shown, and the records."""

    def fit(data, network, *, out="run", **options):
        def replace(model):
            model.__class__ = network
            return model

        outcome = train(out, data=str(data), network=replace, **options)
        return SimpleNamespace(**vars(outcome), records=records(out))

    return fit


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


def test_a_bad_step_changes_nothing_and_is_reported(fit, poisoned):
    run = fit(poisoned, Poisoned, **EACH_STEP)
    bad = steps_with("skipped")
    assert 0 < len(bad) < 6
    for step in range(2, 9):
        assert (state(step) == state(step - 1)) == (step in bad)

    for record in events(run.records, "skipped"):
        assert len(set(record["windows"])) == 8
        line = f"Step {record['step']} skipped: loss nan, gradient norm nan; windows {record['windows']}"
        assert line in run.lines
        assert line in Path("run/training.log").read_text()
    assert {step: loss is None for step, loss in losses(run.records).items()} == {n: n in bad for n in range(1, 9)}


def test_a_bad_step_does_not_shift_the_schedule(fit, poisoned):
    run = fit(poisoned, Poisoned, **(SELDOM | {"log_every": 1}))
    assert steps_with("skipped")
    training = TrainingConfig(learning_rate=TINY["learning_rate"], warmup_steps=TINY["warmup_steps"])
    rate = make_schedule(training, TINY["max_steps"])
    found = [record["learning_rate"] for record in run.records if "learning_rate" in record]
    assert found == [rate(step) for step in range(8)]


def test_training_with_bad_steps_reaches_nearly_the_same_quality(fit, poisoned):
    """It is compared with a network to which the poison is a character like any other."""
    settings = SELDOM | {"max_steps": 40, "max_bad_steps": 3, "batch_size": 8, "gradient_accumulation_steps": 1}
    ill = fit(poisoned, Poisoned, **settings)
    well = fit(poisoned, gpt2.Model, out="well", **settings)
    assert len(steps_with("skipped")) > 3  # not in a row
    assert steps_with("skipped", "well") == []
    assert well.best_loss < well.records[0]["val_loss"] - 2
    assert abs(ill.best_loss - well.best_loss) < 0.2


def test_a_validation_without_a_number_is_never_the_best(fit, corpus):
    run = fit(corpus, Dead, max_steps=2)
    assert run.best_loss is None
    assert not Path("run/best").exists()
    assert [record["val_loss"] for record in run.records if "val_loss" in record] == [None, None]
    assert "NaN" not in Path("run/metrics.jsonl").read_text()


# ---- too many of them -----------------------------------------------------------------------------------------------


def test_eleven_in_a_row_end_the_run_and_ten_do_not(fit, corpus):
    assert fit(corpus, Dead, out="ten", max_steps=10, **SELDOM).finished
    with pytest.raises(RunError, match=r"^11 steps in a row had no finite loss or gradient, and changed nothing"):
        fit(corpus, Dead, max_steps=99, **SELDOM)
    assert steps_with("skipped") == list(range(1, 12))


def test_bad_steps_are_counted_across_a_resume(fit, corpus):
    settings = {"max_steps": 9, "max_bad_steps": 4}
    assert fit(corpus, Dead, **settings, stop_after=3).step == 3
    with pytest.raises(RunError, match=r"^5 steps in a row .* --overwrite --learning-rate 0\.003$"):
        fit(corpus, Dead, **settings, resume="run")
    assert steps_with("skipped") == [1, 2, 3, 4, 5]


@contextlib.contextmanager
def interrupted():
    """Ctrl-C as soon as the steps would begin."""
    raise KeyboardInterrupt
    yield


def test_the_sentence_names_causes_and_the_way_back(fit, corpus):
    fit(corpus, gpt2.Model, **EACH_STEP, max_steps=2)
    settings = {**EACH_STEP, "max_steps": 20, "max_bad_steps": 3}
    with pytest.raises(RunError, match=r"^4 steps in a row") as caught:
        fit(corpus, Dead, resume="run", **settings)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert all(cause in sentence for cause in ("learning rate", "bfloat16", "weights that had grown too large"))
    back = "run/checkpoints/step-00000002"
    assert sentence.endswith(f"mlx-gpt train --resume {back} --overwrite --learning-rate 0.003")
    assert state(5) == state(2)

    # A run that is interrupted before its first step does not return to the steps that it dropped.
    slower = {**settings, "learning_rate": 0.003}
    with pytest.raises(KeyboardInterrupt):
        fit(corpus, gpt2.Model, resume=back, overwrite=True, around=interrupted(), **slower)
    assert [path.name for path in checkpoint.all_checkpoints(Path("run"))] == ["step-00000001", "step-00000002"]
    assert fit(corpus, gpt2.Model, resume="run", stop_after=1, **slower).step == 3
    run = fit(corpus, gpt2.Model, resume="run", **(slower | {"max_steps": 5}))
    assert (run.step, steps_with("skipped")) == (5, [])
    assert sorted(path.name for path in Path("run/checkpoints").iterdir()) == [f"step-0000000{n}" for n in range(1, 6)]


def test_the_way_back_lowers_muons_rate_too(fit, corpus):
    settings = {**EACH_STEP, "max_steps": 3, "max_bad_steps": 1}
    fit(corpus, gpt2.Model, **EACH_STEP, max_steps=1, optimizer="muon")
    with pytest.raises(RunError, match=r" --overwrite --learning-rate 0\.003 --muon-learning-rate 0\.007$"):
        fit(corpus, Dead, resume="run", **settings)
    back = {"resume": "run/checkpoints/step-00000001", "overwrite": True}
    assert fit(corpus, gpt2.Model, **back, **settings, learning_rate=0.003, muon_learning_rate=0.007).step == 3


# ---- a loss that jumps ----------------------------------------------------------------------------------------------


def test_a_spike_is_flagged(fit, poisoned):
    run = fit(poisoned, Startled, **(SELDOM | {"log_every": 1}), max_steps=12)
    spikes = events(run.records, "spike")
    startled = [step for step, loss in losses(run.records).items() if loss > 8]
    assert startled
    assert [record["step"] for record in spikes] == startled
    for record in spikes:
        assert record["train_loss"] == losses(run.records)[record["step"]]
        beginning = f"Loss spike at step {record['step']}: {record['train_loss']:.4f}, against "
        assert any(line.startswith(beginning) for line in run.lines)
