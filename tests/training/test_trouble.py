"""Trouble during a long run: full disks, folders that are taken away, a second trainer, signals."""

import contextlib
import errno
import fcntl
import json
import os
import pty
import resource
import shutil
import signal
import subprocess
import sys
import termios
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest

from mlx_gpt import cli, models
from mlx_gpt.api import load
from mlx_gpt.errors import RunError, UserError
from mlx_gpt.models.tensors import save_arrays
from mlx_gpt.signals import StopSignals
from mlx_gpt.tokenizer import Tokenizer
from mlx_gpt.training import checkpoint, run_folder, setup

from .conftest import TINY

COMMAND = [sys.executable, "-c", "import sys; from mlx_gpt.cli import run; sys.exit(run(sys.argv[1:]))", "train"]
ENVIRONMENT = {**os.environ, "MLX_DISABLE_COMPILE": "1", "HOME": "/nonexistent"}
EACH_STEP = {"save_every": 1, "eval_every": 99, "log_every": 1}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, eager, unmeasured):
    """An empty folder, where nothing is compiled."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def disk():
    """A disk that takes no more than so many bytes of a file: writing fails as on a full one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fills_up(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    def has_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return SimpleNamespace(fills_up=fills_up, has_room=has_room)


@pytest.fixture
def free(monkeypatch):
    """Say how many bytes the disk has left."""
    usage = namedtuple("usage", "total used free")

    def free(size):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12 - size, size))

    return free


@pytest.fixture
def start():
    """Start training in a process of its own, which ends with the test at the latest."""
    with contextlib.ExitStack() as stack:

        def start(*arguments, **options):
            options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
            process = subprocess.Popen([*COMMAND, *arguments], text=True, env=ENVIRONMENT, **options)
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


def after(actions):
    """A `tick` that acts after the steps named, before they are saved."""
    step = 0

    def tick():
        nonlocal step
        step += 1
        actions.get(step, lambda: None)()

    return tick


def steps_saved(run="run"):
    """The steps of the checkpoints, every one of which is sound."""
    return [checkpoint.read_progress(folder).step for folder in checkpoint.all_checkpoints(Path(run))]


def unfinished():
    return [path for path in Path("run").rglob("*") if ".part" in path.name]


def warnings(outcome):
    return [line for line in outcome.lines if line.startswith("WARNING")]


def flags(corpus, **changes):
    settings = {**TINY, **EACH_STEP, "data": corpus, "out": "run", **changes}
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]


# ---- a full disk ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("floats", [3, 2_000, 100_000])
def test_a_short_write_of_arrays_is_an_error(disk, tmp_path, floats):
    disk.fills_up(4 * floats)  # all but the header
    with pytest.raises(OSError) as caught:  # noqa: PT011 - its number is checked below
        save_arrays(tmp_path / "a.safetensors", {"a": mx.ones((floats,))})
    assert caught.value.errno == errno.EFBIG


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk here is always full")
def test_arrays_that_fill_the_disk_raise_the_error_of_a_full_disk():
    """MLX raises its own error, whatever the reason."""
    with pytest.raises(OSError) as caught:  # noqa: PT011 - its number is checked below
        save_arrays(Path("/dev/full"), {"a": mx.ones((10_000,))})
    assert caught.value.errno == errno.ENOSPC


# A checkpoint has an optimizer of 280 KB, a model of 140 KB and smaller files.
@pytest.mark.parametrize("size", [0, 4_000, 100_000, 200_000])
def test_a_full_disk_pauses_saving_and_nothing_else(train, disk, size):
    def look():
        assert steps_saved() == [1]
        assert not unfinished()
        disk.has_room()

    outcome = train("run", **EACH_STEP, max_steps=4, tick=after({2: lambda: disk.fills_up(size), 3: look}))
    (warning,) = (line for line in warnings(outcome) if "step 2" in line)
    assert "could not be saved" in warning
    assert "the newest checkpoint is run/checkpoints/step-00000001." in warning
    assert warning in Path("run/training.log").read_text()
    assert (outcome.finished, outcome.step) == (True, 4)
    assert steps_saved() == [1, 3, 4]


@pytest.mark.parametrize("eval_every", [99, 1], ids=["", "while the best model can still be saved"])
def test_the_third_failure_in_a_row_ends_the_run(train, disk, eval_every):
    settings = EACH_STEP | {"eval_every": eval_every, "max_steps": 5}
    with pytest.raises(RunError, match="the checkpoint of step 4 could not be saved") as caught:
        train("run", **settings, tick=after({2: lambda: disk.fills_up(200_000)}))
    sentence = str(caught.value)
    assert "the newest checkpoint is run/checkpoints/step-00000001." in sentence
    assert sentence.endswith("continue with: mlx-gpt train --resume run")
    assert "\n" not in sentence
    assert steps_saved() == [1]
    assert not unfinished()
    disk.has_room()
    assert train("run", resume="run", **settings).step == 5


def test_the_program_says_so_and_ends_with_1(corpus, disk, capsys):
    disk.fills_up(200_000)
    assert cli.run(["train", *flags(corpus)]) == 1
    out, err = capsys.readouterr()
    assert out.count("WARNING: the checkpoint of step") == 2
    assert err.startswith("Error: the checkpoint of step 3 could not be saved (")
    assert "there is no checkpoint yet" in err
    disk.has_room()
    assert cli.run(["train", "--resume", "run"]) == 0


@pytest.mark.parametrize("stop_after", [None, 3], ids=["at the end", "when it is stopped"])
def test_a_last_checkpoint_that_could_not_be_saved_is_no_success(train, disk, stop_after):
    full = after({3: lambda: disk.fills_up(200_000)})
    with pytest.raises(RunError, match=r"of step 3 .* newest checkpoint is run/checkpoints/step-00000002\. Make room"):
        train("run", **EACH_STEP, max_steps=3, stop_after=stop_after, tick=full)


def test_a_best_model_that_could_not_be_saved_does_not_count(train, monkeypatch):
    """Or nothing would be saved until the loss is below one whose weights are lost."""
    save, failures = checkpoint.save_model, [OSError(errno.ENOSPC, "No space left on device")]

    def save_when_there_is_room(folder, *rest, **options):
        if folder.name == "best" and failures:
            raise failures.pop()
        save(folder, *rest, **options)

    monkeypatch.setattr(checkpoint, "save_model", save_when_there_is_room)
    # A rate that ruins the weights: the first evaluation, whose model is not saved, has the lowest loss.
    outcome = train("run", **(EACH_STEP | {"eval_every": 1}), max_steps=2, learning_rate=50.0, warmup_steps=0)
    records = map(json.loads, Path("run/metrics.jsonl").read_text().splitlines())
    losses = [record["val_loss"] for record in records if "val_loss" in record]
    assert losses[0] < min(losses[1:]) == outcome.best_loss
    assert load("run/best")


def test_a_final_model_that_could_not_be_saved_is_no_success(train):
    with pytest.raises(RunError, match="run/final could not be saved"):
        train("run", **EACH_STEP, max_steps=2, tick=after({1: lambda: Path("run/final").write_text("")}))
    Path("run/final").unlink()
    assert train("run", resume="run").finished
    load("run/final")


def test_room_on_the_disk_is_checked_before_each_save(train, free):
    outcome = train("run", **EACH_STEP, max_steps=4, tick=after({2: lambda: free(10_000), 3: lambda: free(10**9)}))
    assert len(warnings(outcome)) == 1
    assert "it takes 488 KB and the disk has 10.0 KB left" in warnings(outcome)[0]
    assert steps_saved() == [1, 3, 4]


def test_room_on_the_disk_is_checked_before_the_run(train, free):
    train("first", max_steps=1)
    model, tokenizer = load("first")
    counts = 2 * 12  # each of two optimizers keeps a count and a rate
    small = 3 * (len(tokenizer.to_json().encode()) + checkpoint.SMALL_FILES)
    needed = 20 * models.n_params(model) + counts + small
    free(needed - 10_000)
    with pytest.raises(
        UserError, match=r"takes 908 KB \(a checkpoint, .* run/deep has 898 KB left: make room or"
    ) as caught:
        train("run/deep", max_steps=1)
    assert "\n" not in str(caught.value)
    assert not Path("run").exists()
    train("first", overwrite=True, max_steps=1)  # the old run makes room
    free(needed)
    assert train("run/deep", max_steps=1).finished


def test_room_for_all_checkpoints_that_are_there_at_a_time_is_checked_before_the_run(train, free):
    """The run keeps three, and writes a fourth before it removes the oldest."""
    settings = EACH_STEP | {"max_steps": 9, "keep_checkpoints": 3}
    free(2 * 10**6)
    with pytest.raises(
        UserError, match=r"takes 2\.37 MB \(up to 4 checkpoints .* make room, .* \(--keep-checkpoints 1: 1\.40 MB\) or"
    ):
        train("run", **settings)
    assert not Path("run").exists()
    assert train("run", **(settings | {"keep_checkpoints": 1})).finished
    # The same room as before, part of which the run takes up already.
    taken = sum(path.stat().st_size for path in Path("run").rglob("*.safetensors"))
    free(1_400_000 - taken)
    assert train("run", resume="run", **(settings | {"keep_checkpoints": 1, "max_steps": 10})).finished


def test_when_the_disk_is_full_the_oldest_checkpoint_makes_room(train, monkeypatch):
    """A disk that holds three checkpoints, as counted after the run was admitted."""
    full = False

    def disk_usage(path):
        count = len(list(Path("run").glob("checkpoints/step-*")))
        return SimpleNamespace(free=600_000 * (3 - count) if full else 10**10)

    def fill():
        nonlocal full
        full = True

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    outcome = train("run", **EACH_STEP, max_steps=6, keep_checkpoints=5, tick=after({1: fill}))
    assert (outcome.finished, steps_saved()) == (True, [5, 6])
    assert warnings(outcome) == [
        f"WARNING: the disk is full, so run/checkpoints/step-0000000{number} was removed to make room for {name}."
        for number, name in enumerate([*(f"the checkpoint of step {step}" for step in (4, 5, 6)), "run/best"], start=1)
    ]


def test_checkpoints_that_would_not_make_enough_room_stay(train, free):
    """One of them has 430 KB, and the next one needs 488 KB."""
    train("run", **EACH_STEP, max_steps=2, keep_checkpoints=2)
    fill_and_clear = after({1: lambda: free(10_000), 2: lambda: free(10**9)})
    outcome = train("run", resume="run", **(EACH_STEP | {"max_steps": 4}), tick=fill_and_clear)
    (warning,) = warnings(outcome)
    assert warning.startswith("WARNING: the checkpoint of step 3 could not be saved (it takes 488 KB")
    assert steps_saved() == [2, 4]


def test_a_disk_that_keeps_what_is_deleted_loses_one_checkpoint_at_most(train, free):
    """As APFS does while a snapshot holds the blocks."""
    fill_and_clear = after({4: lambda: free(10_000), 5: lambda: free(10**9)})
    outcome = train("run", **EACH_STEP, max_steps=5, keep_checkpoints=9, tick=fill_and_clear)
    freed, failed = warnings(outcome)
    assert freed.endswith(
        "step-00000001 was removed to make room for the checkpoint of step 4, but that freed no space."
    )
    assert "the checkpoint of step 4 could not be saved" in failed
    assert steps_saved() == [2, 3, 5]


def test_an_error_that_room_does_not_mend_costs_one_checkpoint_at_most(train, monkeypatch):
    save_model = checkpoint.save_model

    def save(folder, *rest, **options):
        if "step-00000004" in folder.name:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        save_model(folder, *rest, **options)

    monkeypatch.setattr(checkpoint, "save_model", save)
    assert train("run", **EACH_STEP, max_steps=5, keep_checkpoints=9).finished
    assert set(steps_saved()) >= {2, 3, 5}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk here is always full")
def test_a_log_that_can_t_be_written_is_warned_about(train):
    train("run", max_steps=1)
    Path("run/training.log").unlink()
    Path("run/training.log").symlink_to("/dev/full")
    outcome = train("run", resume="run", max_steps=2)
    assert outcome.finished
    assert set(warnings(outcome)) == {"WARNING: run/training.log could not be written: No space left on device."}


# ---- changed folders ------------------------------------------------------------------------------------------------


def put_a_file_in_its_place():
    Path("run/checkpoints").rename("run/moved")
    Path("run/checkpoints").write_text("mine")


def give_it_back():
    Path("run/checkpoints").unlink()
    Path("run/moved").rename("run/checkpoints")


@pytest.mark.parametrize(
    ("take", "give"),
    [
        (put_a_file_in_its_place, give_it_back),
        pytest.param(
            lambda: Path("run/checkpoints").chmod(0o500),
            lambda: Path("run/checkpoints").chmod(0o700),
            marks=pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere"),
        ),
    ],
)
def test_a_folder_that_can_no_longer_be_written_to(train, take, give):
    outcome = train("run", **EACH_STEP, max_steps=4, tick=after({2: take, 3: give}))
    assert len(warnings(outcome)) == 1
    assert steps_saved() == [1, 3, 4]
    with pytest.raises(RunError, match="the third failed save"):
        train("run", resume="run", **(EACH_STEP | {"max_steps": 9}), tick=after({2: take}))
    give()
    assert steps_saved() == [3, 4, 5]


def test_files_that_a_killed_save_left_are_removed(train):
    train("run", **EACH_STEP, max_steps=1)
    for name in ("checkpoints/.step-00000007.part", "checkpoints/.step-00000001.removed.part", ".best.removed.part"):
        (Path("run") / name / "half").mkdir(parents=True)
    for name in (".run.1-1.part.toml", "best/.model.1-1.part.safetensors"):
        (Path("run") / name).touch()
    train("run", resume="run", max_steps=2)
    assert not unfinished()


def test_a_checkpoint_too_many_after_a_kill_is_removed(train):
    train("run", **EACH_STEP, max_steps=3, keep_checkpoints=9)
    shutil.copytree("run", "killed")
    train("killed", resume="killed", **EACH_STEP, max_steps=3, keep_checkpoints=2)
    assert sorted(path.name for path in Path("killed/checkpoints").iterdir()) == ["step-00000002", "step-00000003"]


def test_a_run_that_was_killed_before_it_wrote_its_settings_can_begin_again(train):
    Path("run").mkdir()
    for name in (".lock", ".run.1-1.part.toml"):
        (Path("run") / name).touch()
    assert train("run", **EACH_STEP, max_steps=1).finished
    assert not unfinished()


def test_only_one_process_trains_into_a_run(start, corpus, capsys):
    first = start(*flags(corpus, max_steps=10**6, max_epochs=1e6))
    next(line for line in first.stdout if line.startswith("Step 2,"))
    for more in (["--resume", "run"], ["--overwrite", *flags(corpus)], flags(corpus)):
        assert cli.run(["train", *more]) == 2
        assert capsys.readouterr().err.startswith(f"Error: Process {first.pid} is training into run: ")
    assert first.poll() is None
    first.kill()
    first.wait()
    last = steps_saved()[-1]
    assert cli.run(["train", "--resume", "run", "--max-steps", str(last + 1)]) == 0
    assert steps_saved()[-1] == last + 1


def test_a_run_s_folder_is_taken_before_the_text_is_prepared(train, monkeypatch):
    """Preparing can take long, and a second process must not begin the same run meanwhile."""

    def prepare(config, display):
        with pytest.raises(UserError, match=rf"^Process {os.getpid()} is training into run: "):
            run_folder.claim(Path("run"), overwrite=True)
        return original(config, display)

    original = setup.open_data
    monkeypatch.setattr(setup, "open_data", prepare)
    assert train("run", max_steps=1).finished


@pytest.mark.parametrize("side", ["train", "val"])
@pytest.mark.parametrize("edit", [lambda text: text.replace("duck", "goat", 1), lambda text: text.split("\n", 1)[1]])
def test_an_edited_text_is_noticed(train, corpus, tmp_path, side, edit):
    shutil.copytree(corpus, "data")
    train("run", data="data", stop_after=2)
    file = Path(f"data/{side}.jsonl")
    written = file.stat()
    file.write_text(edit(file.read_text()))
    os.utime(file, ns=(written.st_atime_ns, written.st_mtime_ns))
    with pytest.raises(
        UserError, match=r"^The text in data is not what run was trained on: name that text with --data"
    ):
        train("run", data="data", resume="run")
    assert steps_saved() == [2]


# ---- signals --------------------------------------------------------------------------------------------------------


def test_a_hang_up_counts_as_sigterm(start, corpus):
    process = start(*flags(corpus, max_steps=10**6, max_epochs=1e6))
    next(line for line in process.stdout if line.startswith("Step 2,"))
    process.send_signal(signal.SIGHUP)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert err.strip() == "Stopping after this step, and saving. Press Ctrl-C again to quit at once."
    assert out.endswith(f"Stopped after step {steps_saved()[-1]:,}. Continue with: mlx-gpt train --resume run\n")


def test_a_run_whose_terminal_closes_is_saved(start, corpus):
    ours, theirs = pty.openpty()
    process = start(
        *flags(corpus, max_steps=10**6, max_epochs=1e6, save_every=10**6),
        **dict.fromkeys(("stdin", "stdout", "stderr"), theirs),
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    seen = b""
    while b"Step 2," not in seen:
        seen += os.read(ours, 4096)
    os.close(ours)
    assert process.wait(timeout=60) == 143
    (step,) = steps_saved()
    assert step >= 2


def test_a_run_outlives_the_program_that_reads_its_lines(start, corpus):
    process = start(*flags(corpus, max_steps=20))
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert steps_saved()[-1] == 20


def test_under_nohup_a_hang_up_is_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("in_a_save", [False, True])
def test_a_second_ctrl_c_leaves_at_once(train, monkeypatch, in_a_save):
    stop, to_json = StopSignals(), Tokenizer.to_json
    presses = 0

    def press():
        nonlocal presses
        presses += 1
        signal.raise_signal(signal.SIGINT)

    def press_in_a_save(tokenizer):
        if presses == 1:
            press()
        return to_json(tokenizer)

    def press_after_step_2():
        act()
        return stop.requested()

    act = after({2: press if in_a_save else lambda: [press(), press()]})
    monkeypatch.setattr(Tokenizer, "to_json", press_in_a_save)
    with pytest.raises(KeyboardInterrupt):
        train("run", **EACH_STEP, tick=press_after_step_2, around=stop)
    assert presses == 2
    assert steps_saved() == [1]
    assert train("run", resume="run").finished
    assert not unfinished()
