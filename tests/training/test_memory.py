"""A run is measured before it starts. One that does not fit is refused, with the flags that would make it fit."""

import dataclasses
import itertools
import re
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_gpt import models
from mlx_gpt.config import TrainingConfig
from mlx_gpt.device import GIB, Device, device
from mlx_gpt.errors import UserError
from mlx_gpt.models.base import has_dropout
from mlx_gpt.optim import make_optimizer
from mlx_gpt.settings import resolve
from mlx_gpt.training import checkpoint, loop, memory, planning, run_settings
from mlx_gpt.training.memory import Estimate, Line, Trial
from mlx_gpt.training.plan import HEADROOM, duration, in_words
from tests.training.conftest import TINY, Silent
from tests.training.peaks import SHAPES, VARIANTS, expected, make_run, measured

FLAG = re.compile(r"--([a-z-]+)(?: (\d+))?")


def with_room(size: float) -> Device:
    """A device that a run may take so many bytes of."""
    return Device("cpu", "cores", int(size), int(size))


def estimate(training: TrainingConfig) -> Estimate:
    """A model that takes 1 GiB, and for each 512 tokens of a micro-batch 1 GiB more, or an eighth if recomputed."""
    each = GIB / 8 if training.grad_checkpoint else GIB
    return Estimate(int(GIB + each * training.micro_batch_size * training.seq_len / 512), 1.0)


# ---- what it measures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "variant"), [*itertools.product(SHAPES[1:3], VARIANTS), (SHAPES[4], VARIANTS[0])], ids=str
)
def test_the_estimate_is_close_to_what_the_run_takes(shape, variant):
    run = make_run(**shape, **variant)
    told, took = expected(run), measured(run)
    # How far one of the two streams is ahead of the other is left to the system, so peaks vary by a few percent, and by
    # more if other programs are at work.
    if not 0.93 * took <= told <= 1.12 * took:
        took = measured(make_run(**shape, **variant))
    assert 0.93 * took <= told <= 1.12 * took


def test_the_plain_path_is_measured_as_well():
    run = make_run(dataclasses.replace(device(), accelerated=False), **SHAPES[2])
    assert expected(run) == pytest.approx(measured(run), rel=0.07)


def test_the_line_goes_on_where_trying_takes_too_long(monkeypatch):
    monkeypatch.setattr(memory, "BUDGET", 0)
    run = make_run(**SHAPES[1])
    assert expected(run) == pytest.approx(measured(run), rel=0.25)


def test_a_line_goes_through_its_trials():
    line = Line((Trial(2, 300, 300, 200, 1.0), Trial(4, 500, 500, 200, 1.5)))
    assert [line.at(windows).peak for windows in (1, 2, 3, 4, 16)] == [200, 300, 400, 500, 1700]
    assert [line.at(windows).step_seconds for windows in (2, 3, 4, 16)] == [1.0, 1.25, 1.5, 4.5]


def test_an_update_that_takes_the_most_in_small_batches_hides_no_activations():
    line = Line((Trial(1, 1000, 300, 1000, 1.0), Trial(2, 1000, 500, 1000, 1.5)))
    assert [line.at(windows).peak for windows in (1, 2, 4, 16)] == [1000, 1000, 1000, 3300]


def test_no_trial_is_made_where_the_weights_alone_do_not_fit():
    run = make_run(with_room(1e6))
    assert memory.measure(run, loop.make_step, run.training) is None


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_a_run_holds_is_counted_without_making_it(optimizer):
    run = make_run(optimizer=optimizer, model_type="qwen3", tie_embeddings=False)
    mx.eval(run.model.parameters())
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    weights, gradients, state = memory.held_bytes(run)
    assert mx.get_peak_memory() - before < 10_000
    made = make_optimizer(run.training, run.model)
    made.init(run.model.trainable_parameters())
    mx.eval(made.state)
    assert state == pytest.approx(mx.get_active_memory() - before, rel=0.02)
    assert weights == gradients == 4 * models.n_params(run.model)
    assert state < 2 * weights if optimizer == "muon" else state == pytest.approx(2 * weights, abs=100)


@pytest.mark.parametrize(
    ("count", "words"),
    [(1, "1 MiB"), (0.16 * 2**30, "164 MiB"), (2**30 - 2**20, "1,023 MiB"), (1.55 * 2**30, "1.6 GiB")],
)
def test_memory_is_given_in_three_digits_or_so(count, words):
    assert in_words(count) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "1 s"), (59, "59 s"), (61, "1 min"), (3600, "1 h"), (7800, "2 h 10 min"), (200_000, "2 days")],
)
def test_times_are_told_in_words(seconds, words):
    assert duration(seconds) == words


# ---- what it chooses and refuses ------------------------------------------------------------------------------------


def test_what_fits_is_left_as_it_is():
    training = TrainingConfig()
    assert planning.fit(training, estimate, with_room(64 * GIB)) == (training, "")


@pytest.mark.parametrize(
    ("gigabytes", "changed"),
    [
        (12, {"batch_size", "gradient_accumulation_steps"}),
        (2.6, {"batch_size", "gradient_accumulation_steps"}),
        (2, {"batch_size", "gradient_accumulation_steps", "grad_checkpoint"}),
        (1.2, {"batch_size", "gradient_accumulation_steps", "grad_checkpoint", "seq_len"}),
    ],
)
def test_the_flags_that_it_names_fit_and_cost_the_least(gigabytes, changed):
    """The less memory, the more has to be given up; what is named is read back as a person would type it."""
    here = with_room(gigabytes * GIB)
    named = re.search(r"This fits: (--.*?) \(about", planning.fit(TrainingConfig(), estimate, here)[1])
    assert named
    given = {flag.replace("-", "_"): int(value) if value else True for flag, value in FLAG.findall(named[1])}
    assert given.keys() == changed
    again = resolve({"preset": "medium", "data": "builtin"} | given).training
    assert planning.fit(again, estimate, here) == (again, "")
    assert again.windows_per_step == 64
    larger = dataclasses.replace(again, batch_size=2 * again.batch_size)
    assert estimate(larger).peak > HEADROOM * here.usable


def test_a_model_that_fits_with_no_batch_says_so():
    problem = planning.fit(TrainingConfig(), estimate, with_room(GIB))[1]
    assert "No batch of this model fits" in problem
    unsafe = planning.fit(TrainingConfig(), lambda training: None, with_room(GIB))[1]
    assert unsafe.startswith("Training would take more memory than it is safe to try")


def test_auto_takes_as_many_windows_at_once_as_fit():
    training = TrainingConfig(auto_batch_size=True)
    roomy, _ = planning.fit(training, estimate, with_room(1000 * GIB))
    assert (roomy.batch_size, roomy.gradient_accumulation_steps) == (64, 1)
    tight, problem = planning.fit(training, estimate, with_room(20 * GIB))
    assert (tight.batch_size, tight.gradient_accumulation_steps, problem) == (16, 4, "")
    recomputing, problem = planning.fit(training, estimate, with_room(2 * GIB))
    assert (recomputing.batch_size, recomputing.grad_checkpoint, problem) == (4, True, "")
    tightest = with_room(1.2 * GIB)
    assert "--seq-len 256" in planning.fit(training, estimate, tightest)[1]  # another training, so only named


@pytest.mark.parametrize("ranks", [2, 4])
def test_auto_chooses_for_each_rank(ranks):
    training = TrainingConfig(auto_batch_size=True, ranks=ranks)
    chosen, problem = planning.fit(training, estimate, with_room(20 * GIB))
    assert not problem
    assert (chosen.windows_per_step, chosen.windows_per_rank) == (64, 64 // ranks)
    assert chosen.micro_batch_size == chosen.batch_size == 16


@pytest.mark.parametrize(
    ("windows", "ranks", "of_a_rank"),
    [((8, 4), 1, (8, 4)), ((8, 4), 2, (8, 2)), ((16, 1), 2, (8, 1)), ((4, 3), 2, (3, 2)), ((2, 7), 2, (1, 7))],
)
def test_a_rank_takes_as_many_windows_at_once_as_share_its_part_evenly(windows, ranks, of_a_rank):
    training = TrainingConfig(batch_size=windows[0], gradient_accumulation_steps=windows[1], ranks=ranks)
    assert (training.micro_batch_size, training.micro_steps) == of_a_rank


def test_training_config_has_no_automatic_batch_left_over():
    """Only the plan may see a batch that is still to be chosen."""
    assert not TrainingConfig().auto_batch_size
    assert resolve({"batch_size": "auto", "data": "builtin"}).training.auto_batch_size
    assert not resolve({"batch_size": 4, "data": "builtin"}).training.auto_batch_size


# ---- what a run does with it ----------------------------------------------------------------------------------------


@pytest.fixture
def little_room(monkeypatch):
    """Return a function that leaves too little memory for the tiny run, but enough to measure it safely."""

    def shrink():
        monkeypatch.setattr("mlx_gpt.training.setup.device", lambda: dataclasses.replace(device(), usable=700_000))
        # Near the real limit MLX waits for each operation, and other tests have left arrays in memory.
        monkeypatch.setattr(mx, "set_memory_limit", lambda limit: limit)

    return shrink


def test_a_run_that_does_not_fit_is_refused_before_anything_is_touched(
    train, tmp_path, monkeypatch, eager, little_room
):
    monkeypatch.chdir(tmp_path)
    little_room()
    with pytest.raises(UserError, match=r"^Training would take .* --ignore-memory starts it anyway\.$"):
        train("run", max_steps=1)
    assert not Path("run").exists()


def test_a_dry_run_shows_the_plan_of_what_does_not_fit(corpus, tmp_path, monkeypatch, eager, little_room):
    monkeypatch.chdir(tmp_path)
    little_room()
    display = Silent()
    with pytest.raises(UserError, match=r"^Training would take"):
        loop.train({"data": str(corpus), "out": "run", **TINY}, display, dry_run=True)
    assert any(line.startswith("Memory ") for line in display.lines)
    assert not Path("run").exists()


def test_a_run_that_fitted_when_it_began_may_continue(train, tmp_path, monkeypatch, eager, little_room):
    """Nothing that it could change would leave it the same run."""
    monkeypatch.chdir(tmp_path)
    train("run", max_steps=1)
    little_room()
    outcome = train("run", resume="run", max_steps=2)
    assert outcome.step == 2
    assert any(line.startswith("WARNING      That is more than can safely be spared") for line in outcome.lines)


def test_an_automatic_batch_is_timed_with_its_own_micro_steps(corpus, tmp_path, monkeypatch, eager):
    """The first candidate takes all windows of a step at once, and those that fit take several micro-steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mlx_gpt.training.setup.device", lambda: dataclasses.replace(device(), usable=5 * 10**6))

    def measure(run, make_step, training):
        seconds = 0.01 * min(2, training.micro_steps)
        return Line(tuple(Trial(n, n * 10**6, n * 10**6, 0, n * seconds) for n in (1, 2)))

    monkeypatch.setattr(planning, "measure", measure)
    display = Silent()
    settings = {**TINY, "data": str(corpus), "out": "run", "batch_size": "auto", "gradient_accumulation_steps": 4}
    loop.train(settings, display, dry_run=True)
    assert any("Batch        4 x 16 tokens, 16 per step" in line for line in display.lines)
    assert any("(1,600 tokens/s measured)" in line for line in display.lines)  # 64 windows of 16 tokens in 0.64 s


@pytest.mark.parametrize(("epochs", "dropout"), [(10, 0.0), (12, 0.1)])
def test_a_text_that_is_read_often_is_trained_on_with_dropout(train, tmp_path, monkeypatch, epochs, dropout):
    monkeypatch.chdir(tmp_path)
    often = {"dropout": "auto", "max_epochs": epochs, "max_steps": None}
    started = train("run", **often, stop_after=1)
    assert run_settings.read_settings(Path("run"))["dropout"] == dropout
    assert any(line.split() == ["Dropout", "0.1"] for line in started.lines) == (dropout > 0)
    train("told", **often | {"dropout": dropout}, stop_after=1)
    stopped = [checkpoint.all_checkpoints(Path(run))[-1] / "model.safetensors" for run in ("run", "told")]
    assert stopped[0].read_bytes() == stopped[1].read_bytes()
    resumed = train("run", resume="run", dropout="auto", stop_after=1)
    assert resumed.step == 2


def test_dropout_that_may_be_needed_is_measured(train, tmp_path, monkeypatch):
    """It takes time, and the time may decide how often the text is read."""
    monkeypatch.chdir(tmp_path)
    measured = []

    def measure(run, make_step, training):
        measured.append(has_dropout(run.model))
        return Line((Trial(1, 1, 1, 0, 0.01), Trial(2, 2, 2, 0, 0.01)))

    monkeypatch.setattr(planning, "measure", measure)
    for dropout in ("auto", 0.0):
        train("run", dropout=dropout, dry_run=True)
    assert measured == [True, False]
