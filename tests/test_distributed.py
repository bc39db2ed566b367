"""Several processes that train one model: the same numbers as one, and an end for all when one of them ends.

The ranks are real ones over loopback. Nothing is compiled in them, which would take far longer than what is tried.
"""

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_gpt import distributed
from mlx_gpt.progress import Lines
from mlx_gpt.training import checkpoint, loop, setup
from mlx_gpt.training.metrics import read_records

BIN = Path(sys.executable).parent
# Eight windows a step. The rate does not depend on the length of the run, so that a part of it is as the whole.
SETTINGS = {
    "tokenizer": "bytes", "n_layer": 1, "n_head": 2, "n_embd": 32, "n_positions": 32, "dropout": 0.0, "seq_len": 16,
    "batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 6, "learning_rate": 0.003, "schedule": "constant",
    "warmup_steps": 0, "log_every": 1, "eval_every": 3, "eval_windows": 13, "save_every": 3,
}  # fmt: skip
FOR_EVER = {"max_steps": 10**6, "max_epochs": 1e6, "eval_every": 10**6, "save_every": 5}
PATIENCE = 120  # seconds, of a machine that does much else


def environment(rank=None, hostfile=None):
    here = {} if rank is None else {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hostfile)}
    return {**os.environ, "MLX_DISABLE_COMPILE": "1", **here}


def free_ports(count):
    """The first of so many ports in a row that nobody uses, below those that systems give out by themselves."""
    while True:
        first = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in range(first, first + count):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            return first


def launch(count, *command):
    """Run a command by `mlx.launch`; its lines on stdout, and on stderr without those of mlx.launch itself."""
    launcher = [str(BIN / "mlx.launch"), "-n", str(count), "-p", str(free_ports(count)), "--", *map(str, command)]
    reading, writing = os.pipe()  # which stays open: at its end mlx.launch would use up a core
    with os.fdopen(reading), os.fdopen(writing, "w"):
        done = subprocess.run(
            launcher, env=environment(), stdin=reading, capture_output=True, text=True, timeout=PATIENCE
        )
    # Its threads tear each other's lines apart: "[WARN] Node with rank 1 exited with code 2".
    theirs = re.compile(r"(\x1b\[\d+m|\[WARN\]| ?Node with rank \d+ .*?(?=\x1b)| )*")
    return done.stdout.splitlines(), [line for line in done.stderr.splitlines() if not theirs.fullmatch(line)]


def flags(**settings):
    return [f"--{name.replace('_', '-')}={value}" for name, value in {**SETTINGS, **settings}.items()]


@pytest.fixture(scope="module", autouse=True)
def eager():
    """Nothing is compiled here either."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """An empty folder."""
    monkeypatch.chdir(tmp_path)


def train_alone(out, resume=None, **changes):
    settings = changes if resume else {**SETTINGS, **changes}
    return loop.train({**settings, "out": str(out)}, Lines(), resume=str(resume) if resume else None)


def train_on(count, out, resume=None, **changes):
    """Train on so many ranks; what each of them holds at the end."""
    settings = changes if resume else {**SETTINGS, **changes}
    request = json.dumps([{**settings, "out": str(out)}, str(resume) if resume else None])
    lines, errors = launch(count, sys.executable, Path(__file__), request)
    assert not errors
    return [json.loads(line) for line in lines]


def as_a_rank(settings, resume):
    """Train, and tell what this rank holds at the end."""
    with setup.set_up(settings, Lines(), resume=resume) as run:
        outcome = loop.fit(run, Lines(), lambda: False)
        arrays = tree_flatten((run.model.parameters(), run.step.optimizer_state))
        bits = hashlib.sha256(b"".join(bytes(memoryview(array)) for _, array in arrays)).hexdigest()
        print(json.dumps([run.ranks.rank, bits, outcome.step, outcome.best_loss]), flush=True)


def losses(run):
    """By step, those of training and of validation."""
    records = read_records(run)
    return [
        {record["step"]: record[name] for record in records if name in record} for name in ("train_loss", "val_loss")
    ]


def assert_equal_losses(run, other):
    """Up to rounding, and to what Adam makes of a gradient that is nothing but rounding."""
    for ours, theirs in zip(losses(run), losses(other), strict=True):
        assert list(ours) == list(theirs)
        assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=1e-5)


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """Six steps of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    train_alone(out, data=str(corpus))
    return out


@pytest.fixture(scope="module")
def half(corpus, tmp_path_factory):
    """Three steps of two ranks, and what each held at the end. Not to be changed."""
    out = tmp_path_factory.mktemp("half") / "run"
    return out, train_on(2, out, data=str(corpus), max_steps=3)


# ---- the same training ----------------------------------------------------------------------------------------------


def test_two_ranks_and_then_four_make_the_steps_of_one_process(alone, half, tmp_path):
    """Two made the first three steps, four go on from their checkpoint."""
    shutil.copytree(half[0], tmp_path / "run")
    held = train_on(4, "run", resume="run", max_steps=6)
    assert {step for _, _, step, _ in held} == {6}
    assert_equal_losses(tmp_path / "run", alone)


def test_one_process_goes_on_with_what_two_ranks_began(alone, half, tmp_path):
    shutil.copytree(half[0], tmp_path / "run")
    train_alone("run", resume="run", max_steps=6)
    assert_equal_losses(tmp_path / "run", alone)


def test_all_ranks_hold_the_same_bits(half):
    ranks, bits, steps, best = zip(*sorted(half[1]), strict=True)
    assert ranks == (0, 1)
    assert len(set(bits)) == len(set(best)) == 1
    assert steps == (3, 3)
    assert best[0] == min(losses(half[0])[1].values())


def test_the_plan_is_that_of_all_ranks(corpus):
    lines, errors = launch(4, BIN / "mlx-gpt", "train", "--data", corpus, *flags(), "--dry-run")
    assert not errors
    assert sum(line.startswith("Run ") for line in lines) == 1
    assert any("6, each of 128 tokens" in line for line in lines)
    assert any(line.startswith("Ranks        4, 4 of them on this host") for line in lines)
    assert any("2 x 16 tokens, 1 per step on each rank" in line for line in lines)
    assert not Path("weights").exists()


def test_a_launch_of_one_is_a_process_by_itself(corpus):
    lines, errors = launch(1, BIN / "mlx-gpt", "train", "--data", corpus, *flags(max_steps=1), "--out=run")
    assert not errors
    assert any(line.startswith("Done: 1 steps") for line in lines)


# ---- what ends one ends all -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "wrong", "sentence"),
    [
        (3, {}, "3 ranks can't share the 8 windows of a step evenly: start 2 (mlx.launch -n 2), or begin"),
        (2, {"seq_len": 64}, "`seq_len` 64 is longer than"),
        (2, {"n_layer": "two"}, "'two' is not a valid integer"),
    ],
)
def test_a_refusal_is_said_once(corpus, count, wrong, sentence):
    lines, errors = launch(count, BIN / "mlx-gpt", "train", "--data", corpus, *flags(**wrong), "--out=run")
    assert not lines
    assert len(errors) == 1
    assert sentence in errors[0]
    assert not Path("run").exists()


class Rank:
    """A rank that no `mlx.launch` looks after, as one on another host whose launcher has gone."""

    def __init__(self, rank, hostfile, arguments, cwd=None):
        self.process = subprocess.Popen(
            [BIN / "mlx-gpt", "train", *map(str, arguments)],
            env=environment(rank, hostfile),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self):
        """Its exit code, and what it said on stdout and on stderr, but for MLX's own words."""
        out, err = self.process.communicate(timeout=PATIENCE)
        return (
            self.process.returncode,
            out,
            [line for line in err.splitlines() if line.strip() and "[ring]" not in line],
        )


@pytest.fixture
def start(tmp_path):
    """Start ranks by hand; what is left of them ends with the test."""
    with contextlib.ExitStack() as stack:

        def start(count, *arguments, folders=None):
            port, hostfile = free_ports(count), tmp_path / "hosts.json"
            hostfile.write_text(json.dumps([[f"127.0.0.1:{port + rank}"] for rank in range(count)]))
            started = [Rank(rank, hostfile, arguments, folders[rank] if folders else None) for rank in range(count)]
            for rank in started:
                stack.enter_context(rank.process)
                stack.callback(rank.process.kill)
            return started

        yield start


def wait_for_a_checkpoint(rank, run=Path("run")):
    until = time.monotonic() + PATIENCE
    while not checkpoint.all_checkpoints(run):
        assert rank.process.poll() is None, rank.end()
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_rank_ends_though_nobody_hears_why(start, corpus):
    """As when mlx.launch was killed, which held the other end of its stderr."""
    started = start(2, "--data", corpus, *flags(**FOR_EVER), "--out=run")
    wait_for_a_checkpoint(started[0])
    for output in (started[0].process.stdout, started[0].process.stderr):
        output.close()
    started[1].process.kill()
    assert started[0].process.wait(PATIENCE) != 0


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_ends_the_others_with_a_sentence(start, corpus, victim):
    started = start(2, "--data", corpus, *flags(**FOR_EVER), "--out=run")
    wait_for_a_checkpoint(started[0])
    started[victim].process.kill()
    code, _, errors = started[1 - victim].end()
    assert code == 1
    assert len(errors) == 1, errors
    assert f"Rank {victim} has died" in errors[0]
    assert "--resume" in errors[0]
    saved = checkpoint.newest_sound(Path("run"))[0]
    assert saved
    made = saved[1].step
    assert train_alone("run", resume="run", max_steps=made + 1).step == made + 1


@pytest.mark.parametrize("asked", [0, 1])
def test_a_stop_that_one_rank_is_asked_for_stops_all_after_the_same_step(start, corpus, asked):
    started = start(2, "--data", corpus, *flags(**FOR_EVER), "--out=run")
    wait_for_a_checkpoint(started[0])
    started[asked].process.send_signal(signal.SIGTERM)
    (code, out, _), (other_code, other_out, other_errors) = (rank.end() for rank in started)
    assert (code, other_code) == (143, 143)
    assert (other_out, other_errors) == ("", [])
    stopped = checkpoint.step_of(checkpoint.all_checkpoints(Path("run"))[-1])
    assert f"Stopped after step {stopped:,}." in out


def test_the_clock_of_rank_0_ends_the_run(start, corpus):
    started = start(2, "--data", corpus, *flags(**FOR_EVER, max_minutes=0.02), "--out=run")
    (code, out, _), (other_code, _, _) = (rank.end() for rank in started)
    assert (code, other_code) == (0, 0)
    assert "Done: " in out


def test_another_text_on_another_host_is_refused_by_name(start, corpus, tmp_path):
    for rank in range(2):
        shutil.copytree(corpus, tmp_path / f"host{rank}" / "text")
    with (tmp_path / "host1/text/train.txt").open("a") as file:
        file.write("One more.\n")
    folders = [tmp_path / "host0", tmp_path / "host1"]
    started = start(2, "--data", "text", *flags(), "--out=run", folders=folders)
    (code, _, errors), (other_code, _, other_errors) = (rank.end() for rank in started)
    assert (code, other_code) == (2, 2)
    assert len(errors) == 1
    assert errors[0].startswith("Error: Rank 1: The text in text on this host is not the one of rank 0")
    assert not other_errors
    assert not (tmp_path / "host0/run").exists()


def test_a_host_that_has_only_the_text_can_take_part_in_a_resume(start, half, corpus, tmp_path):
    """It has neither the run's folder nor its run.toml."""
    shutil.copytree(half[0], tmp_path / "host0/run")
    (tmp_path / "host1").mkdir()
    folders = [tmp_path / "host0", tmp_path / "host1"]
    started = start(2, "--resume=run", "--max-steps=6", folders=folders)
    for rank in started:
        code, _, errors = rank.end()
        assert (code, errors) == (0, [])
    assert list(losses(tmp_path / "host0/run")[0]) == [1, 2, 3, 4, 5, 6]
    assert not list((tmp_path / "host1").iterdir())


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="Linux only")
def test_mlx_launch_leaves_the_cores_to_its_ranks():
    """It watches them in a busy loop. What started this test is no `mlx.launch`, and stays as it is."""
    ask = "distributed.let_the_launcher_idle(); print(os.sched_getscheduler(os.getppid()))"
    lines, errors = launch(1, sys.executable, "-c", f"import os; from mlx_gpt import distributed; {ask}")
    assert (lines, errors) == ([str(os.SCHED_IDLE)], [])
    distributed.let_the_launcher_idle()
    assert os.sched_getscheduler(os.getppid()) == os.SCHED_OTHER


# ---- each for itself ------------------------------------------------------------------------------------------------


def test_ranks_compile_in_folders_of_their_own_which_they_find_again(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", None)
    folders = []
    for rank in ("1", "2", "1"):
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        monkeypatch.setattr("tempfile.tempdir", None)
        monkeypatch.setenv("MLX_RANK", rank)
        distributed.use_own_kernels()
        folders.append(os.environ["TMPDIR"])
    assert folders[0] == folders[2] != folders[1]
    assert all(Path(folder).is_dir() and Path(folder).parent == tmp_path for folder in folders)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"MLX_JACCL_COORDINATOR": "10.0.0.1:32323"}, "10.0.0.1"),
        ({"NCCL_HOST_IP": "10.0.0.2", "NCCL_PORT": "12345"}, "10.0.0.2"),
    ],
)
def test_rank_0_is_looked_for_where_mlx_finds_it(monkeypatch, variables, expected):
    monkeypatch.delenv("MLX_HOSTFILE", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert distributed.own_addresses()[0] == expected


if __name__ == "__main__":
    as_a_rank(*json.loads(sys.argv[1]))
