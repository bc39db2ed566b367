"""Training leaves the right files, ends where it should, resumes exactly, and refuses what it cannot do."""

import dataclasses
import errno
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from mlx_gpt.api import load
from mlx_gpt.device import Device, device
from mlx_gpt.distributed import ALONE
from mlx_gpt.errors import RunError
from mlx_gpt.settings import read_toml, resolve
from mlx_gpt.tokenizer import Tokenizer
from mlx_gpt.training import loop, memory, planning
from mlx_gpt.training.network import make_model

from .conftest import Silent, contents, copy_of, refusal

MEASURE = memory.measure  # the real one: the tests here are `unmeasured`
WALL_CLOCK = {"seconds", "started", "tokens_per_second", "peak_memory_gb"}
MODEL_DIRECTORY = {
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, unmeasured):
    """No run finds what another left in data/ or weights/."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def clock(monkeypatch):
    """Time that a test lets pass."""

    class Clock:
        now = 0.0

        def pass_a_minute(self):
            self.now += 60

    clock = Clock()
    monkeypatch.setattr("time.perf_counter", lambda: clock.now)
    return clock


def records(run, *, timeless=False):
    """The lines of metrics.jsonl, without the fields that depend on the clock if `timeless`."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    without = WALL_CLOCK if timeless else set()
    return [{name: value for name, value in json.loads(line).items() if name not in without} for line in lines]


def column(run, name):
    return [record[name] for record in records(run) if name in record]


def checkpoints(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


# ---- what it leaves -------------------------------------------------------------------------------------------------


def test_the_validation_loss_falls(whole):
    losses = column(whole.folder, "val_loss")
    assert losses[-1] < losses[0] - 1
    assert whole.best_loss == min(losses)
    assert (whole.finished, whole.step) == (True, 8)


def test_the_folder_holds_what_the_design_says_and_nothing_else(whole):
    run = whole.folder
    inside = {path.name for path in run.iterdir()}
    assert inside == {".lock", "run.toml", "training.log", "metrics.jsonl", "best", "final", "checkpoints"}
    for folder in (run / "best", run / "final"):
        assert {path.name for path in folder.iterdir()} == MODEL_DIRECTORY
    assert checkpoints(run) == ["step-00000003", "step-00000006", "step-00000008"]
    for folder in (run / "checkpoints").iterdir():
        assert {path.name for path in folder.iterdir()} == MODEL_DIRECTORY | {"optimizer.safetensors", "training.json"}
    assert weights(run / "checkpoints/step-00000008") == weights(run / "final")


def test_every_folder_of_weights_opens(whole):
    for part in ("", "best", "final", "checkpoints/step-00000003"):
        model, tokenizer = load(whole.folder / part)
        assert model.args.n_layer == 2
        assert tokenizer.is_bytes


def test_the_saved_settings_are_those_of_the_run(whole, corpus):
    config = resolve(read_toml(whole.folder / "run.toml"))
    assert (config.data.data, config.out) == (str(corpus), str(whole.folder))
    assert (config.training.max_steps, config.model.dropout, config.training.learning_rate) == (8, 0.1, 0.01)


def test_the_log_is_what_was_shown(whole):
    shown = whole.lines[[line.startswith("Run ") for line in whole.lines].index(True) :]
    assert (whole.folder / "training.log").read_text().splitlines() == shown


def test_the_log_has_the_lines_that_scripts_read(whole):
    log = (whole.folder / "training.log").read_text()
    steps = [line for line in log.splitlines() if line.startswith("Step ")]
    assert all(re.fullmatch(r"Step \d+, Epoch \d+, Loss: \d+\.\d{4}, LR: \d\.\d{6}", line) for line in steps)
    assert re.findall(r"^Step (\d+)", log, re.MULTILINE) == ["2", "4", "6", "8"]
    assert [line[-12:] for line in steps[::3]] == ["LR: 0.006667", "LR: 0.001000"]  # second of the warm-up, and last
    losses = re.findall(r"^Validation Loss: (\d+\.\d{4})\b", log, re.MULTILINE)
    assert losses == [f"{loss:.4f}" for loss in column(whole.folder, "val_loss")]


def test_before_it_starts_it_shows_its_plan(whole):
    log = (whole.folder / "training.log").read_text()
    plan = log[: log.index("Validation Loss")]
    for words in (
        "Device",
        "parameters",
        "tokens to train on",
        "8, each of 128 tokens",
        "tokens per parameter",
        "Memory       about ",
        "Time         about ",
    ):
        assert words in plan


def test_each_record_has_the_fields_that_were_measured(whole):
    common = {"step", "epoch", "tokens", "seconds", "started"}
    trained = common | {"train_loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_gb"}
    validated = common | {"val_loss", "val_bits_per_byte"}
    found = [(record["step"], set(record)) for record in records(whole.folder)]
    assert found == [
        (0, validated),
        (2, trained),
        (4, trained),
        (4, validated),
        (6, trained),
        (8, trained),
        (8, validated),
    ]
    assert column(whole.folder, "tokens") == [step * 128 for step, _ in found]
    seconds = column(whole.folder, "seconds")
    assert seconds == sorted(seconds)


def test_only_the_newest_checkpoints_are_kept(train, tmp_path, eager):
    train(tmp_path / "run", max_steps=4, save_every=1, keep_checkpoints=2)
    assert checkpoints(tmp_path / "run") == ["step-00000003", "step-00000004"]


def test_best_keeps_the_weights_of_the_lowest_validation_loss(train, tmp_path, eager):
    run = tmp_path / "run"
    # A rate that ruins the weights: nothing is better than the beginning.
    outcome = train(run, max_steps=2, learning_rate=50.0, warmup_steps=0, eval_every=1)
    first, *later = column(run, "val_loss")
    assert outcome.best_loss == first < min(later)
    assert weights(run / "best") != weights(run / "final")
    assert "best so far" not in (run / "training.log").read_text().split("Step 2")[1]


# ---- before it begins -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"precision": "bfloat16", "grad_checkpoint": True}], ids=["", "other layers"])
def test_measuring_changes_no_number_of_a_run(train, monkeypatch, eager, changes):
    train("unmeasured", max_steps=2, **changes)
    monkeypatch.setattr(planning, "measure", MEASURE)
    train("measured", max_steps=2, **changes)
    for name in ("final/model.safetensors", "checkpoints/step-00000002/optimizer.safetensors"):
        assert Path("measured", name).read_bytes() == Path("unmeasured", name).read_bytes()
    assert records(Path("measured"), timeless=True) == records(Path("unmeasured"), timeless=True)


@pytest.fixture
def tight(monkeypatch):
    """Say how many bytes of memory a run may take, without holding MLX to it."""

    def tight(usable):
        here = dataclasses.replace(device(), usable=usable)
        monkeypatch.setattr(Device, "prepare", lambda self: None)
        monkeypatch.setattr("mlx_gpt.training.setup.device", lambda: here)

    return tight


@pytest.mark.parametrize(
    ("usable", "takes"), [(2**21, "about 4 MiB at its peak"), (10_000, "more memory than it is safe to try")]
)
def test_a_run_that_needs_too_much_memory_starts_only_on_request(train, tight, monkeypatch, eager, usable, takes):
    if usable < 2**20:
        monkeypatch.setattr(planning, "measure", MEASURE)  # which sees this by itself
    tight(usable)
    sentence = refusal(lambda: train("deep/run", max_steps=1, batch_size=4, gradient_accumulation_steps=1))
    assert sentence.startswith(f"Training would take {takes}, and ")
    assert sentence.endswith(" --ignore-memory starts it anyway.")
    assert not Path("deep").exists()
    outcome = train("deep/run", max_steps=1, batch_size=4, gradient_accumulation_steps=1, ignore_memory=True)
    assert outcome.finished
    assert any(re.fullmatch(r"Memory .* of \d+ MiB usable", line) for line in outcome.lines)


def test_a_dry_run_shows_the_plan_and_leaves_no_folder(train, eager):
    outcome = train("deep/run", dry_run=True)
    assert (outcome.finished, outcome.step) == (False, 0)
    assert {"Run", "Steps", "Memory", "Time"} <= {line.split(maxsplit=1)[0] for line in outcome.lines}
    assert not Path("deep").exists()


def test_a_dry_run_makes_no_folder_while_it_measures(train, monkeypatch, eager):
    """Or one would be left if the process is killed then."""
    there = []

    def measure(*arguments):
        there.append(Path("deep").exists())
        return line

    line = memory.Line((memory.Trial(1, 2**20, 2**20, 0, 0.01),))
    monkeypatch.setattr(planning, "measure", measure)
    train("deep/run", dry_run=True)
    assert there == [False]


@pytest.mark.parametrize("options", [{"overwrite": True}, {"resume": "run", "max_steps": 20}])
def test_a_dry_run_leaves_the_run_that_is_there(train, whole, tmp_path, options):
    run = copy_of(whole.folder, tmp_path / "run")
    before = contents(run)
    train("run", dry_run=True, **options)
    assert contents(run) == before


# ---- where it ends --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ({"max_steps": 3, "max_epochs": 1.0}, 3),
        # An epoch is 13,743 // 16 windows, 8 of which make a step.
        ({"max_steps": 9, "max_epochs": 0.04}, 5),
        ({"max_steps": None, "max_epochs": 0.02}, 3),
        # A minute passes between two steps.
        ({"max_steps": 9, "max_minutes": 3.5}, 5),
        ({"max_steps": 2, "max_minutes": 3.5}, 2),
    ],
)
def test_it_ends_at_the_limit_that_comes_first(train, tmp_path, clock, eager, limits, steps):
    outcome = train(tmp_path / "run", tick=clock.pass_a_minute, **limits)
    assert (outcome.finished, outcome.step) == (True, steps)
    assert max(column(tmp_path / "run", "step")) == steps


@pytest.mark.parametrize("limit", [{}, {"max_epochs": 100.0}], ids=["minutes alone", "and epochs"])
def test_the_rate_has_come_down_when_time_is_up_however_few_steps_that_are(train, tmp_path, clock, eager, limit):
    rate = {"learning_rate": 1e-3, "min_lr": 0.0, "warmup_steps": 2, "log_every": 1}
    train(tmp_path / "run", tick=clock.pass_a_minute, max_minutes=9.5, max_steps=None, **rate, **limit)
    first, second, *rates = column(tmp_path / "run", "learning_rate")
    assert first < second < rates[0]  # the warm-up
    assert rates[0] > 0.85e-3
    assert rates == sorted(rates, reverse=True)
    assert rates[3] == pytest.approx(0.46e-3, rel=0.1)  # five minutes of nine and a half
    assert rates[-1] < 1e-5


def test_the_warm_up_goes_by_steps_when_the_first_evaluation_takes_most_of_the_minutes(
    train, tmp_path, clock, eager, monkeypatch
):
    validate = loop.validate

    def slowly(*args):
        clock.now += 300 if not args[1] else 0  # the first takes five minutes
        return validate(*args)

    monkeypatch.setattr(loop, "validate", slowly)
    rate = {"learning_rate": 1e-3, "min_lr": 0.0, "warmup_steps": 3, "log_every": 1, "max_steps": None}
    train(tmp_path / "run", tick=clock.pass_a_minute, max_minutes=29.5, **rate)
    rates = column(tmp_path / "run", "learning_rate")
    assert rates[:3] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3], rel=1e-3)
    assert rates[3] == max(rates) < 0.9e-3  # eight minutes of twenty-nine and a half
    assert rates[-1] < 1e-5


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_projections_begin_at_zero_with_muon(bpe, weights_of, optimizer):
    config = resolve({"preset": "tiny", "optimizer": optimizer})
    weights = weights_of(make_model(config, None, bpe, None, device(), ALONE))
    projections = [weight for name, weight in weights.items() if name.endswith("c_proj.weight")]
    assert len(projections) == 8
    assert all((weight == 0).all() == (optimizer == "muon") for weight in projections)


def test_minutes_count_across_a_resume(train, tmp_path, clock, eager):
    limits = {"max_minutes": 5.0, "max_steps": 20}
    assert train("run", **limits, tick=clock.pass_a_minute, stop_after=3).step == 3
    outcome = train("run", **limits, resume="run", tick=clock.pass_a_minute)
    assert (outcome.finished, outcome.step) == (True, 6)  # three minutes, then two between 4, 5 and 6


# ---- how it resumes -------------------------------------------------------------------------------------------------


def test_two_half_runs_are_one_whole_run(train, whole, tmp_path):
    run = tmp_path / "run"
    half = train(run, stop_after=4)
    assert (half.finished, half.step) == (False, 4)
    assert not (run / "final").exists()
    assert train(run, resume=run).finished
    last = "checkpoints/step-00000008"
    assert weights(run / "final") == weights(whole.folder / "final")
    assert weights(run / "best") == weights(whole.folder / "best")
    assert (run / last / "optimizer.safetensors").read_bytes() == (
        whole.folder / last / "optimizer.safetensors"
    ).read_bytes()
    assert records(run, timeless=True) == records(whole.folder, timeless=True)


def test_going_back_to_an_earlier_checkpoint_makes_the_same_steps_again(train, whole, tmp_path):
    run = copy_of(whole.folder, tmp_path / "run")
    outcome = train(run, resume=run / "checkpoints/step-00000003", overwrite=True, only={})
    assert (outcome.finished, outcome.step, outcome.folder) == (True, 8, run)
    assert weights(run / "final") == weights(whole.folder / "final")
    assert records(run, timeless=True) == records(whole.folder, timeless=True)


def test_a_finished_run_continues_when_it_is_given_more_steps(train, whole, tmp_path):
    run = copy_of(whole.folder, tmp_path / "run")
    outcome = train(run, resume=run, max_steps=10)
    assert (outcome.finished, outcome.step) == (True, 10)
    assert column(run, "step")[-2:] == [10, 10]
    assert weights(run / "final") != weights(whole.folder / "final")


def test_a_finished_run_without_more_steps_stays_as_it_is(train, whole, tmp_path):
    run = copy_of(whole.folder, tmp_path / "run")
    assert train(run, resume=run).step == 8
    assert weights(run / "final") == weights(whole.folder / "final")
    assert records(run) == records(whole.folder)


def test_how_often_a_run_evaluates_saves_or_logs_never_changes_what_it_learns(train, whole, tmp_path):
    run = tmp_path / "run"
    train(run, log_every=1, eval_every=1, eval_windows=3, save_every=1, keep_checkpoints=1)
    assert len(column(run, "val_loss")) == 9
    assert column(run, "train_loss")[1::2] == column(whole.folder, "train_loss")
    assert weights(run / "final") == weights(whole.folder / "final")


def test_newest_continues_the_run_that_was_worked_on_last(train, tmp_path, eager):
    train("weights/one", max_steps=2)
    train("weights/two", max_steps=2)
    outcome = train(None, resume="newest", only={"max_steps": 3})
    assert (str(outcome.folder), outcome.step) == ("weights/two", 3)


def test_the_flags_or_the_file_that_began_a_run_name_it_again(train, tmp_path, eager):
    train("weights/one", max_steps=1)
    train("weights/two", max_steps=1)
    by_file = train(None, resume="newest", file="weights/one/run.toml", only={"max_steps": 2})
    assert (str(by_file.folder), by_file.step) == ("weights/one", 2)
    by_flag = train(None, resume="newest", only={"out": "weights/two", "max_steps": 2})
    assert (str(by_flag.folder), by_flag.step) == ("weights/two", 2)


def test_the_settings_that_began_a_run_continue_it(train, tmp_path, eager):
    """Also where the text is too small for a vocabulary of the size that was asked for."""
    wanted = {"tokenizer": "bpe", "vocab_size": 5000, "max_steps": 2}
    train("run", **wanted)
    assert load("run")[1].vocab_size < 1000
    assert train("run", resume="run", **wanted).finished
    assert train("run", resume="run", **(wanted | {"max_steps": 3})).step == 3


# ---- what it refuses to resume --------------------------------------------------------------------------------------


def test_a_run_cannot_become_another_one(train, whole, tmp_path):
    run = copy_of(whole.folder, tmp_path / "run")
    before = contents(run)
    changes = {"n_layer": 3, "seed": 2, "batch_size": 8, "tokenizer": "bpe", "max_steps": 10}
    sentences = refusal(lambda: train(run, resume=run, **changes)).splitlines()
    assert len(sentences) == 4
    for name, was in (("n_layer", "2"), ("seed", "1"), ("batch_size", "4"), ("tokenizer", "bytes")):
        assert any(f"`{name}` was" in sentence and was in sentence for sentence in sentences)
    assert contents(run) == before


def test_a_text_that_has_changed_is_noticed(train, corpus, tmp_path, eager):
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(corpus, data)
    train(run, data=str(data), max_steps=2)
    before = contents(run)
    with (data / "train.jsonl").open("a") as file:
        file.write('{"text": "One more."}\n')
    assert "start another run" in refusal(lambda: train(run, resume=run, data=str(data), max_steps=4))
    assert contents(run) == before


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "training.json"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(train, whole, tmp_path, file):
    run = copy_of(whole.folder, tmp_path / "run")
    path = run / "checkpoints/step-00000008" / file
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    outcome = train(run, resume=run)
    assert any("step-00000008 is damaged" in line for line in outcome.lines)
    assert any("Resuming from" in line and "step-00000006" in line for line in outcome.lines)
    assert weights(run / "final") == weights(whole.folder / "final")


def test_an_edited_step_number_is_noticed(train, whole, tmp_path):
    run = copy_of(whole.folder, tmp_path / "run")
    marker = run / "checkpoints/step-00000008/training.json"
    marker.write_text(marker.read_text().replace('"step": 8', '"step": 2'))
    assert any("step-00000006" in line for line in train(run, resume=run).lines)


def test_going_back_leaves_the_later_checkpoints_behind(train, whole, tmp_path):
    """Or the next resume would continue the branch that was given up."""
    run = copy_of(whole.folder, tmp_path / "run")
    back = run / "checkpoints/step-00000003"
    train(run, resume=back, overwrite=True, learning_rate=0.001, keep_checkpoints=1, stop_after=1)
    assert checkpoints(run) == ["step-00000004"]
    outcome = train(run, resume=run, learning_rate=0.001)
    assert any("after step 4." in line for line in outcome.lines)
    assert weights(run / "final") != weights(whole.folder / "final")
    assert weights(run / "best") != weights(whole.folder / "best")


def test_the_rate_and_its_lowest_change_together(train, whole, tmp_path):
    run = copy_of(whole.folder, tmp_path / "run")
    train(run, resume=run, learning_rate=1e-4, max_steps=10)
    assert min(column(run, "learning_rate")) == pytest.approx(1e-5)


def test_no_bar_stays_on_the_screen_when_a_run_ends_in_an_error(train, tmp_path, monkeypatch, eager):
    shown = []
    open_bar = Silent.bar

    def bar(self, what, *rest, **options):
        shown.append(what)
        return open_bar(self, what, *rest, **options)

    monkeypatch.setattr(Silent, "bar", bar)
    monkeypatch.setattr(Silent, "close", lambda self: shown.append("closed"))
    with pytest.raises(SystemExit):
        train(tmp_path / "run", tick=sys.exit)
    assert shown == ["Training", "Evaluating", "closed", "closed"]


def full(folder, needed):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_failed_save_at_the_end_is_a_failure(train, tmp_path, monkeypatch, eager):
    monkeypatch.setattr("mlx_gpt.training.checkpoint.check_free_space", full)
    with pytest.raises(RunError, match="could not be saved"):
        train(tmp_path / "run", max_steps=1)
    with pytest.raises(RunError, match="could not be saved"):
        train(tmp_path / "stopped", max_steps=5, stop_after=1)


def test_resume_and_overwrite_go_together_only_to_go_back(train, whole, tmp_path):
    run = copy_of(whole.folder, tmp_path / "run")
    before = contents(run)
    assert "only if --resume names a checkpoint" in refusal(lambda: train(run, resume=run, overwrite=True))
    assert contents(run) == before


def test_a_checkpoint_that_lacks_a_file_is_passed_over(train, whole, tmp_path):
    run = copy_of(whole.folder, tmp_path / "run")
    (run / "checkpoints/step-00000008/optimizer.safetensors").unlink()
    assert any("step-00000006" in line for line in train(run, resume=run).lines)


def test_a_run_without_a_sound_checkpoint_is_refused(train, whole, tmp_path):
    run = copy_of(whole.folder, tmp_path / "run")
    for marker in run.glob("checkpoints/*/training.json"):
        marker.write_text("{}")
    assert "--overwrite" in refusal(lambda: train(run, resume=run))
    assert "There is no run in" in refusal(lambda: train(run, resume=tmp_path / "none"))


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(train, whole, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(SystemExit):
        train(run, tick=sys.exit)
    assert (run / "best/model.safetensors").exists()  # of step 0, so nothing is lost with it
    outcome = train(run, resume=run)
    assert any("starts from the beginning" in line for line in outcome.lines)
    assert weights(run / "final") == weights(whole.folder / "final")
    assert records(run, timeless=True) == records(whole.folder, timeless=True)


def test_what_is_evaluated_first_is_saved_as_well(train, tmp_path, eager):
    """Or a run that is killed later would have a best model and nothing to resume from."""
    run, seen = tmp_path / "run", []
    train(run, max_steps=4, eval_every=2, save_every=4, tick=lambda: seen.append((run / "checkpoints").exists()))
    assert seen == [False, False, True, True]
    assert checkpoints(run) == ["step-00000002", "step-00000004"]


def lose(run, lost):
    if lost == "checkpoints":
        shutil.rmtree(run / lost)
    for path in run.glob(f"checkpoints/*/{lost}"):
        path.unlink()


@pytest.mark.parametrize("lost", ["checkpoints", "training.json", "optimizer.safetensors"])
def test_a_resume_never_replaces_weights_that_it_cannot_resume_from(train, whole, tmp_path, lost):
    run = copy_of(whole.folder, tmp_path / "run")
    lose(run, lost)
    before = contents(run)
    sentence = refusal(lambda: train(run, resume=run, max_steps=10)).splitlines()[-1]
    assert f"--from {run}/best --out" in sentence
    assert f"--config {run}/run.toml --overwrite" in sentence
    assert contents(run) == before


def test_checkpoints_that_cannot_be_read_are_not_taken_for_none(train, whole, tmp_path):
    run = copy_of(whole.folder, tmp_path / "run")
    (run / "checkpoints").rename(run / "moved")
    (run / "checkpoints").write_text("in the way")
    before = contents(run)
    with pytest.raises(NotADirectoryError):
        train(run, resume=run, max_steps=10)
    assert contents(run) == before


def test_a_checkpoint_without_its_record_is_set_aside(train, whole, tmp_path):
    run = copy_of(whole.folder, tmp_path / "run")
    newest = run / "checkpoints/step-00000008"
    (newest / "training.json").unlink()
    kept = weights(newest)
    outcome = train(run, resume=run)
    assert any("it has no training.json. It is set aside as damaged-step-00000008" in line for line in outcome.lines)
    assert weights(run / "checkpoints/damaged-step-00000008") == kept
    assert weights(newest) == kept  # the step was made again


def test_a_best_model_that_is_newer_than_any_checkpoint_is_kept(train, tmp_path, eager):
    """Even if the run continues with a rate that never reaches its loss again."""
    run = tmp_path / "run"

    def stop_before_step_4_is_saved():
        if len(column(run, "val_loss")) == 4:
            sys.exit()

    often = {"save_every": 1, "eval_every": 1, "max_steps": 5}
    train(run, **often, stop_after=1)
    with pytest.raises(SystemExit):
        train(run, resume=run, **(often | {"save_every": 9}), tick=stop_before_step_4_is_saved)
    best = contents(run / "best")
    assert checkpoints(run) == ["step-00000001"]
    outcome = train(run, resume=run, **(often | {"learning_rate": 1e-9}))
    assert contents(run / "best") == best
    assert outcome.best_loss < min(column(run, "val_loss"))


def test_a_run_killed_between_a_checkpoint_and_its_evaluation_evaluates_when_it_resumes(
    train, whole, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("mlx_gpt.training.checkpoint.remove_older", lambda run, step, keep: step == 4 and sys.exit())
        with pytest.raises(SystemExit):
            train(run, save_every=4)
    assert column(run, "step")[-1] == 4
    assert train(run, resume=run, save_every=4).finished
    assert records(run, timeless=True) == records(whole.folder, timeless=True)
    assert weights(run / "best") == weights(whole.folder / "best")


# ---- a run is never lost --------------------------------------------------------------------------------------------


def test_a_run_is_overwritten_only_on_request(train, whole, tmp_path):
    run = copy_of(whole.folder, tmp_path / "run")
    before = contents(run)
    assert "--overwrite" in refusal(lambda: train(run))
    assert contents(run) == before


def test_overwriting_replaces_the_run_and_leaves_other_files(train, whole, tmp_path, eager):
    run = copy_of(whole.folder, tmp_path / "run")
    (run / "notes.txt").write_text("mine")
    train(run, overwrite=True, max_steps=1)
    assert checkpoints(run) == ["step-00000001"]
    assert column(run, "step")[-1] == 1
    assert (run / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "mistake",
    [
        {"data": "none.csv"},
        {"n_head": 3},
        {"tokenizer": "none.json"},
        {"seq_len": 30_000, "n_positions": 30_000},
        {"learning_rate": -1.0},
        {"no_such_setting": 1},
    ],
    ids=lambda mistake: next(iter(mistake)),
)
def test_a_mistake_made_while_overwriting_loses_nothing(train, whole, tmp_path, mistake):
    run = copy_of(whole.folder, tmp_path / "run")
    before = contents(run)
    assert refusal(lambda: train(run, overwrite=True, **mistake))
    assert contents(run) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else_is_never_taken(train, tmp_path, overwrite):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "duck.jpg").write_bytes(b"duck")
    assert "is not a run" in refusal(lambda: train(folder, overwrite=overwrite))
    assert "is not a run" in refusal(lambda: train(folder / "duck.jpg", overwrite=overwrite))
    assert contents(folder) == {(folder / "duck.jpg").relative_to(folder): b"duck"}


def test_a_text_shorter_than_a_window_is_refused_with_what_would_fit(train, make_corpus, tmp_path):
    make_corpus(["A duck."])
    sentence = refusal(lambda: train(tmp_path / "run", data=str(tmp_path)))
    assert "has 8 tokens" in sentence
    assert "--seq-len 7" in sentence
    assert not (tmp_path / "run").exists()


# ---- tokenizers -----------------------------------------------------------------------------------------------------


def test_a_tokenizer_is_trained_once_and_then_loaded(train, tmp_path, eager):
    def is_trained(outcome):
        return any("Training a tokenizer of 310" in line for line in outcome.lines)

    bpe = {"tokenizer": "bpe", "vocab_size": 310, "max_steps": 1}
    assert is_trained(train("one", **bpe))
    assert not is_trained(train("two", **bpe))
    assert load("two")[1].vocab_size == load("one")[0].args.vocab_size == 310
    assert any("311" in line for line in train("three", **(bpe | {"vocab_size": 311})).lines)


def test_a_tokenizer_from_elsewhere_brings_its_own_vocabulary(train, tmp_path, foreign, eager):
    (tmp_path / "their.json").write_text(foreign.to_json(), encoding="utf-8")
    train("run", tokenizer="their.json", max_steps=1)
    model, tokenizer = load("run")
    assert model.args.vocab_size == tokenizer.vocab_size == foreign.vocab_size
    assert tokenizer.to_json() == Tokenizer.load("their.json").to_json()


def test_a_run_keeps_its_tokenizer(train, tmp_path, foreign, eager):
    (tmp_path / "their.json").write_text(foreign.to_json(), encoding="utf-8")
    train("run", tokenizer="their.json", max_steps=1)
    (tmp_path / "their.json").unlink()
    assert train("run", resume="run", tokenizer="their.json", max_steps=2).step == 2
